"""Round attention in plain jax.numpy: the definition that implementations are tested against."""

import jax
import jax.numpy as jnp

from tokendance_jax.kernels import storage
from tokendance_jax.kernels.lanes import LaneTables
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import Rope, rotate


def round_attention_reference(
    q: jax.Array,
    kv: PagedKV,
    layer: int | jax.Array,
    position: jax.Array,
    lane: jax.Array,
    tables: LaneTables,
    *,
    rope: Rope,
) -> jax.Array:
    """Attends every row to its whole lane at once, with the keys rotated to logical positions.

    The implementations rotate queries; this function rotates keys, which makes it an independent
    definition of the same result. Its arguments are those of `api.round_attention`, with `lane`
    i32 [rows] in place of tiles.
    """
    kv_heads, head_dim = kv.k.shape[3:]
    weights, seen = weights_of(q, kv, layer, position, lane, tables, rope=rope)
    values = storage.load(kv.v[layer, tables.page]).astype(jnp.float32)
    values = values.reshape(values.shape[0], -1, kv_heads, head_dim)[lane]
    values = jnp.where(seen[:, :, None, None], values, jnp.zeros((), values.dtype))
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("rkgs,rskh->rkgh", weights, values, precision=exact).reshape(q.shape)


def weights_of(
    q: jax.Array,
    kv: PagedKV,
    layer: int | jax.Array,
    position: jax.Array,
    lane: jax.Array,
    tables: LaneTables,
    *,
    rope: Rope,
) -> tuple[jax.Array, jax.Array]:
    """Weights f32 [rows, kv_heads, group, slots], and which slots each row sees [rows, slots]."""
    rows, heads, head_dim = q.shape
    page_size, kv_heads = kv.k.shape[2], kv.k.shape[3]
    slot_position = tables.slot_positions(page_size).reshape(tables.page.shape[0], -1)[lane]
    seen = slot_position <= position[:, None]

    cos, sin = rope.rotation(jnp.asarray(tables.frame), head_dim)
    keys = storage.load(kv.k[layer, tables.page]).astype(jnp.float32)
    keys = rotate(keys, cos[:, :, None, None, :], sin[:, :, None, None, :])
    keys = keys.reshape(keys.shape[0], -1, kv_heads, head_dim)[lane]
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, head_dim)
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("rkgh,rskh->rkgs", grouped, keys, precision=exact) * head_dim**-0.5
    scores = jnp.where(seen[:, None, None, :], scores, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1), seen

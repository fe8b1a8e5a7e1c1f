"""Round attention in plain jax.numpy: the definition that every other path is tested against."""

import jax
import jax.numpy as jnp

from tokendance_jax.kernels import rope, storage
from tokendance_jax.kernels.lanes import LaneTables


def round_attention_reference(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    layer: int,
    position: jax.Array,
    lane: jax.Array,
    tables: LaneTables,
    *,
    theta: float,
) -> jax.Array:
    """Attends every row to its whole lane at once, with the keys rotated to logical positions.

    Rotating the keys, where the product rotates queries, makes this an independent statement of
    the same result. Arguments as `api.round_attention`, and `lane` i32 [rows] in place of tiles.
    """
    rows, heads, head_dim = q.shape
    page_size, kv_heads = k_pool.shape[2], k_pool.shape[3]
    slot_position = tables.slot_positions(page_size).reshape(tables.page.shape[0], -1)[lane]
    seen = slot_position <= position[:, None]  # [rows, slots]

    cos, sin = rope.rotation(tables.frame, theta=theta, head_dim=head_dim)
    keys = storage.load(k_pool[layer, tables.page]).astype(jnp.float32)
    keys = rope.rotate(keys, cos[:, :, None, None, :], sin[:, :, None, None, :])
    values = storage.load(v_pool[layer, tables.page]).astype(jnp.float32)
    keys = keys.reshape(keys.shape[0], -1, kv_heads, head_dim)[lane]
    values = values.reshape(values.shape[0], -1, kv_heads, head_dim)[lane]
    values = jnp.where(seen[:, :, None, None], values, jnp.zeros((), values.dtype))

    grouped = q.reshape(rows, kv_heads, heads // kv_heads, head_dim)
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("rkgh,rskh->rkgs", grouped, keys, precision=exact) * head_dim**-0.5
    scores = jnp.where(seen[:, None, None, :], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("rkgs,rskh->rkgh", weights, values, precision=exact)
    return out.reshape(rows, heads, head_dim)

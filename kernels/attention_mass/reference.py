"""Attention mass in plain jax.numpy: the definition that `attention_mass` is tested against."""

import jax

from tokendance_jax.kernels.lanes import LaneTables
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import Rope
from tokendance_jax.kernels.round_attention.reference import weights_of


def attention_mass_reference(
    q: jax.Array,
    kv: PagedKV,
    layer: int | jax.Array,
    position: jax.Array,
    lane: jax.Array,
    tables: LaneTables,
    *,
    rope: Rope,
) -> jax.Array:
    """Sums the weights of `round_attention_reference` by entry, as `api.attention_mass` does.

    Returns:
      f32 [rows, entries]: the sums of each row, not of each lane.
    """
    weights, _ = weights_of(q, kv, layer, position, lane, tables, rope=rope)
    entries = weights.reshape(*weights.shape[:3], -1, kv.k.shape[2])
    return entries.sum(axis=(1, 2, 4))

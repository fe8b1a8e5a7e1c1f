"""Writing the K and V of rows into pages."""

import jax
import jax.numpy as jnp

from tokendance_jax.kernels import storage
from tokendance_jax.kernels.paged_kv import PagedKV


def kv_write(
    kv: PagedKV, layer: int | jax.Array, slot: jax.Array, k: jax.Array, v: jax.Array
) -> PagedKV:
    """Writes one layer's rows into their slots, in place when the pool is donated.

    All platforms use the same XLA code.

    Args:
      kv: the pool.
      layer: index of the layer.
      slot: i32 [rows]; page * page_size + offset, a different one for each row. Rows with slots
        past the pool are dropped, never clamped; such slots may repeat.
      k: f32 [rows, kv_heads, head_dim].
      v: as k.

    Returns:
      The pool with the rows written.
    """
    layers, pages, page_size = kv.k.shape[:3]
    slots = pages * page_size
    # Unless XLA is told that indices are unique, it writes bfloat16 on GPUs number by number, each
    # with a compare-and-swap of a word. Dropped rows need distinct indices, too.
    past = layers * slots + jnp.arange(slot.shape[0], dtype=slot.dtype)
    index = jnp.where(slot < slots, layer * slots + slot, past)

    def write(pool: jax.Array, value: jax.Array) -> jax.Array:
        rows = pool.reshape(layers * slots, *pool.shape[3:])
        stored = storage.store(value, pool.dtype)
        written = rows.at[index].set(stored, mode="drop", unique_indices=True)
        return written.reshape(pool.shape)

    return PagedKV(write(kv.k, k), write(kv.v, v))

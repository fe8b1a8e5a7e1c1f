"""Writing the K and V of rows into pages."""

import jax
import jax.numpy as jnp

from tokendance_jax.kernels import storage
from tokendance_jax.kernels.paged_kv import PagedKV


def kv_write(
    kv: PagedKV, layer: int | jax.Array, slot: jax.Array, k: jax.Array, v: jax.Array
) -> PagedKV:
    """Writes one layer's rows into their slots, in place when the pool is donated.

    One implementation for all platforms: XLA code.

    Args:
      kv: the pool.
      layer: index of the layer.
      slot: i32 [rows]; page * page_size + offset, no two rows with the same. Slots past the pool
        are dropped, never clamped, and may be the same.
      k: f32 [rows, kv_heads, head_dim].
      v: as k.

    Returns:
      The pool with the rows written.
    """
    layers, pages, page_size = kv.k.shape[:3]
    slots = pages * page_size
    # Without a promise that no two rows meet, XLA writes bfloat16 on GPUs number by number, each by
    # comparing and swapping a word. What is dropped goes to places of its own.
    past = layers * slots + jnp.arange(slot.shape[0], dtype=slot.dtype)
    index = jnp.where(slot < slots, layer * slots + slot, past)

    def write(pool: jax.Array, value: jax.Array) -> jax.Array:
        rows = pool.reshape(layers * slots, *pool.shape[3:])
        stored = storage.store(value, pool.dtype)
        written = rows.at[index].set(stored, mode="drop", unique_indices=True)
        return written.reshape(pool.shape)

    return PagedKV(write(kv.k, k), write(kv.v, v))

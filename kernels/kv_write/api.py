"""Writing the K and V of rows into pages."""

import jax
import jax.numpy as jnp

from tokendance_jax.kernels import storage


def kv_write(
    pool: jax.Array, layer: int | jax.Array, slot: jax.Array, value: jax.Array
) -> jax.Array:
    """Writes one layer's rows into their slots, in place when the pool is donated.

    Args:
      pool: [layers, pages, page_size, kv_heads, head_dim], in its storage dtype.
      layer: index of the layer.
      slot: i32 [rows]; page * page_size + offset, no two rows with the same. Slots past the pool
        are dropped, never clamped, and may be the same.
      value: f32 [rows, kv_heads, head_dim].

    Returns:
      The pool with the rows written.
    """
    layers, pages, page_size = pool.shape[:3]
    slots = pages * page_size
    # Without a promise that no two rows meet, XLA writes bfloat16 on GPUs number by number, each by
    # comparing and swapping a word. What is dropped goes to places of its own.
    past = layers * slots + jnp.arange(slot.shape[0], dtype=slot.dtype)
    index = jnp.where(slot < slots, layer * slots + slot, past)
    rows = pool.reshape(layers * slots, *pool.shape[3:])
    stored = storage.store(value, pool.dtype)
    return rows.at[index].set(stored, mode="drop", unique_indices=True).reshape(pool.shape)

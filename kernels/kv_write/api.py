"""Writing the K and V of rows into pages."""

import jax
import jax.numpy as jnp

from tokendance_jax.kernels import storage


def kv_write(pool: jax.Array, layer: int, slot: jax.Array, value: jax.Array) -> jax.Array:
    """Writes one layer's rows into their slots, in place when the pool is donated.

    Args:
      pool: [layers, pages, page_size, kv_heads, head_dim], in its storage dtype.
      layer: index of the layer.
      slot: i32 [rows]; page * page_size + offset. Slots past the pool are dropped, never clamped.
      value: f32 [rows, kv_heads, head_dim].

    Returns:
      The pool with the rows written.
    """
    page_size = pool.shape[2]
    stored = storage.store(value, pool.dtype)
    index = jnp.full_like(slot, layer), slot // page_size, slot % page_size
    return pool.at[index].set(stored, mode="drop")

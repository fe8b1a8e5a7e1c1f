"""Copying K and V between slots, keys rotated to the position of the copy."""

import jax
import jax.numpy as jnp

from tokendance_jax.kernels import rope, storage


def kv_link(
    k_pool: jax.Array,
    v_pool: jax.Array,
    source: jax.Array,
    target: jax.Array,
    shift: jax.Array,
    *,
    theta: float,
) -> tuple[jax.Array, jax.Array]:
    """Copies slots of all layers, in place when the pools are donated.

    Keys are rotated once, from the source, in float32 and then rounded to the pool's precision: the
    way of CacheBlend (arXiv 2405.16444) to move a cached segment.

    Args:
      k_pool: [layers, pages, page_size, kv_heads, head_dim], in its storage dtype.
      v_pool: as k_pool.
      source: i32 [slots]; page * page_size + offset.
      target: i32 [slots]; slots past the pool are dropped. No source is a target.
      shift: i32 [slots]; position of the copy minus position of the source.
      theta: base of the rotary frequencies.

    Returns:
      The pools with the copies.
    """
    layers, _, page_size, _, head_dim = k_pool.shape
    cos, sin = rope.rotation(jnp.asarray(shift), theta=theta, head_dim=head_dim)
    cos, sin = cos[:, None, :], sin[:, None, :]

    def one(layer: jax.Array, pools: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        k, v = pools
        index = jnp.full_like(source, 1) * layer
        read = index, source // page_size, source % page_size
        written = index, target // page_size, target % page_size
        keys = rope.rotate(storage.load(k[read]).astype(jnp.float32), cos, sin)
        k = k.at[written].set(storage.store(keys, k.dtype), mode="drop")
        return k, v.at[written].set(v[read], mode="drop")

    return jax.lax.fori_loop(0, layers, one, (k_pool, v_pool))

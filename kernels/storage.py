"""How the page pool stores the numbers of K and V.

XLA's CPU backend has no bfloat16 scatter: it widens the whole pool to float32 and narrows it again
on every write (189 ms and twice the pool in temporaries for a 300 MB pool, against 0.12 ms in
place). On CPU, the pool therefore stores bfloat16 numbers as their 16-bit patterns. A `uint16` pool
always holds bfloat16 bits; a pool of any other dtype holds numbers of that dtype.
"""

import jax
import jax.numpy as jnp


def storage_dtype(dtype: jnp.dtype, platform: str) -> jnp.dtype:
    """The dtype of a pool that holds `dtype` numbers on `platform`."""
    if platform == "cpu" and dtype == jnp.bfloat16:
        return jnp.dtype(jnp.uint16)
    return jnp.dtype(dtype)


def value_dtype(storage: jnp.dtype) -> jnp.dtype:
    """The dtype of the numbers that a pool of dtype `storage` holds."""
    return jnp.dtype(jnp.bfloat16) if storage == jnp.uint16 else jnp.dtype(storage)


def check_numbers(pool: jax.Array) -> None:
    """Raises NotImplementedError for pools that hold no numbers of the Mosaic kernels' dtypes."""
    if pool.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(
            f"the kernel supports bfloat16 and float32 pools, not {pool.dtype}"
        )


def store(x: jax.Array, storage: jnp.dtype) -> jax.Array:
    """Rounds floats to the pool's precision and returns them in the pool's storage dtype."""
    rounded = x.astype(value_dtype(storage))
    return jax.lax.bitcast_convert_type(rounded, storage) if storage == jnp.uint16 else rounded


def load(stored: jax.Array) -> jax.Array:
    """Converts numbers read from a pool back to floats."""
    if stored.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(stored, jnp.bfloat16)
    return stored

"""What the Mosaic TPU attention kernels share: limits, and the products of one key block."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tokendance_jax.kernels import flash

# Key blocks in VMEM: one comes in, one is read.
PLACES = 2
# Rows of a float32 tile: the queries of a KV head are filled up to a multiple.
TILE = 8
# The largest tables: they lie in SMEM, which has 1 MiB.
TABLE_BYTES = 1_000_000
# The most VMEM that arrays may take; a TPU has 128 MiB.
VMEM_BYTES = 80 << 20
# What the softmax's maximum begins with: above the scores of slots that are not seen, so that these
# have no weight even before the first slot that is.
LOWEST = np.float32(flash.MASKED / 2)

Ref = Any


def check_pool(pool: jax.Array) -> None:
    """Raises NotImplementedError for pools that the attention kernels cannot read."""
    dtype, kv_heads = pool.dtype, pool.shape[3]
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"the kernel takes bfloat16 and float32 pools, not {dtype}")
    if dtype == jnp.bfloat16 and kv_heads % 2:
        raise NotImplementedError(f"{kv_heads} KV heads: the kernel takes pairs of bfloat16 heads")


def table_bytes(columns: dict[str, jax.Array]) -> int:
    """Bytes of numbers in SMEM."""
    return 4 * sum(column.size for column in columns.values())


def compiler_params(columns: dict[str, jax.Array], vmem: int) -> pltpu.CompilerParams:
    """How an attention kernel is compiled that has `columns` in SMEM and `vmem` bytes in VMEM."""
    if table_bytes(columns) > TABLE_BYTES:
        raise NotImplementedError(f"tables of {columns['page'].size} entries fill SMEM")
    if vmem > VMEM_BYTES:
        raise NotImplementedError(f"queries and key blocks of {vmem} bytes fill VMEM")
    return pltpu.CompilerParams(
        # Scores lie in VMEM too.
        vmem_limit_bytes=vmem + (16 << 20),
        # More than half of what starting a copy costs, and a key block has many pages.
        disable_bounds_checks=True,
    )


def product(x: jax.Array, y: jax.Array, contracted: int) -> jax.Array:
    """The product f32 [m, n, :] of x [m, n, :] with y over one of y's axes, in y's precision."""
    found = jax.lax.dot_general(
        x.reshape(-1, x.shape[2]).astype(y.dtype),
        y,
        (((1,), (contracted,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=flash.precision(y.dtype),
    )
    return found.reshape(*x.shape[:2], -1)


def clear_unseen(values: Ref, first: jax.Array, stop: jax.Array) -> None:
    """Clears the slots of a page that nobody sees: a weight of zero would keep a NaN.

    Pages of which nobody sees anything are not fetched, and nothing is to be cleared.
    """

    @pl.when((stop > first) & (stop - first < values.shape[0]))
    def _() -> None:
        slot = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
        kept = jnp.where((slot >= first) & (slot < stop), values[...].astype(jnp.float32), 0.0)
        values[...] = kept.astype(values.dtype)


def swapped(x: jax.Array) -> jax.Array:
    """The two halves of each head exchanged."""
    half = x.shape[-1] // 2
    if x.shape[-1] % 128 == 0:
        return pltpu.roll(x, half, x.ndim - 1)
    return jnp.concatenate([x[..., half:], x[..., :half]], axis=-1)


def heads_of(pages: Ref, *, simulated: bool) -> list[jax.Array]:
    """The rows [slots, head_dim] of each head of pages [entries, page_size, kv_heads, head_dim]."""
    entries, page_size, kv_heads, head_dim = pages.shape
    slots = entries * page_size
    if simulated:  # which knows no views
        x = pages[...].reshape(slots, kv_heads, head_dim)
        return [x[:, head] for head in range(kv_heads)]
    rows = pages.reshape(slots * kv_heads, head_dim)
    if pages.dtype == jnp.float32:
        return [rows[pl.ds(head, slots, stride=kv_heads)] for head in range(kv_heads)]
    # A word holds one number each of two heads, that of the even one in its lower half.
    words, found = rows.bitcast(jnp.int32), []
    for pair in range(kv_heads // 2):
        both = words[pl.ds(pair, slots, stride=kv_heads // 2)]
        for bits in (both << 16, both & np.int32(-(1 << 16))):
            found.append(jax.lax.bitcast_convert_type(bits, jnp.float32).astype(pages.dtype))
    return found

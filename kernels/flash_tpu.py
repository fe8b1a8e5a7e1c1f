"""Code shared by the Mosaic TPU attention kernels: limits, and the products with a key block."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tokendance_jax.kernels import flash, storage

# Key blocks in VMEM at a time: one is copied in while the other is read.
PLACES = 2
# Rows of a float32 tile in VMEM: query heads are padded to a multiple of it.
TILE = 8
# The most bytes that tables may take in SMEM, which has 1 MiB.
TABLE_BYTES = 1_000_000
# The most VMEM that arrays may take; a TPU has 128 MiB.
VMEM_BYTES = 80 << 20
# The initial maximum of the softmax. It is greater than the score of a masked slot, so that masked
# slots have no weight even before a query sees its first slot.
LOWEST = np.float32(flash.MASKED / 2)

Ref = Any


def check_pool(pool: jax.Array) -> None:
    """Raises NotImplementedError for pools that the attention kernels cannot read."""
    storage.check_numbers(pool)
    kv_heads = pool.shape[3]
    if pool.dtype == jnp.bfloat16 and kv_heads % 2:
        raise NotImplementedError(f"{kv_heads} KV heads: the kernel takes pairs of bfloat16 heads")


def table_bytes(columns: dict[str, jax.Array]) -> int:
    """Bytes that tables take in SMEM."""
    return 4 * sum(column.size for column in columns.values())


def compiler_params(columns: dict[str, jax.Array], vmem: int) -> pltpu.CompilerParams:
    """Compiler parameters of a kernel with `columns` in SMEM and `vmem` bytes of arrays in VMEM.

    Raises:
      NotImplementedError: the columns or the arrays do not fit.
    """
    if table_bytes(columns) > TABLE_BYTES:
        raise NotImplementedError(f"tables of {columns['page'].size} entries do not fit into SMEM")
    if vmem > VMEM_BYTES:
        raise NotImplementedError(f"queries and key blocks of {vmem} bytes do not fit into VMEM")
    return pltpu.CompilerParams(
        # Leave room for scores, which are in VMEM too.
        vmem_limit_bytes=vmem + (16 << 20),
        # The checks are more than half of the cost of starting a copy, and a key block has many
        # pages.
        disable_bounds_checks=True,
    )


def product(x: jax.Array, y: jax.Array, contracted: int) -> jax.Array:
    """The product f32 [m, n, :] of x [m, n, :] and y over one of y's axes, in y's precision."""
    found = jax.lax.dot_general(
        x.reshape(-1, x.shape[2]).astype(y.dtype),
        y,
        (((1,), (contracted,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=flash.precision(y.dtype),
    )
    return found.reshape(*x.shape[:2], -1)


def clear_unseen(values: Ref, first: jax.Array, stop: jax.Array) -> None:
    """Clears the slots of a page that no query sees: a weight of zero would not remove NaN.

    Pages without a slot that any query sees are not fetched, so they are not cleared.
    """

    @pl.when((stop > first) & (stop - first < values.shape[0]))
    def _() -> None:
        slot = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
        kept = jnp.where((slot >= first) & (slot < stop), values[...].astype(jnp.float32), 0.0)
        values[...] = kept.astype(values.dtype)


def swapped(x: jax.Array) -> jax.Array:
    """Swaps the two halves of each head."""
    half = x.shape[-1] // 2
    # One instruction, if a head fills the register's lanes. It does not wrap around within
    # narrower heads.
    if x.shape[-1] % 128 == 0:
        return pltpu.roll(x, half, x.ndim - 1)
    return jnp.concatenate([x[..., half:], x[..., :half]], axis=-1)


def heads_of(pages: Ref, *, simulated: bool) -> list[jax.Array]:
    """Returns each head's rows [slots, head_dim], of [entries, page_size, kv_heads, head_dim]."""
    entries, page_size, kv_heads, head_dim = pages.shape
    slots = entries * page_size
    if simulated:  # the simulator does not support views
        x = pages[...].reshape(slots, kv_heads, head_dim)
        return [x[:, head] for head in range(kv_heads)]
    rows = pages.reshape(slots * kv_heads, head_dim)
    if pages.dtype == jnp.float32:
        return [rows[pl.ds(head, slots, stride=kv_heads)] for head in range(kv_heads)]
    # A word holds one number of each of two heads; that of the even head is in its lower half.
    words, found = rows.bitcast(jnp.int32), []
    for pair in range(kv_heads // 2):
        both = words[pl.ds(pair, slots, stride=kv_heads // 2)]
        for bits in (both << 16, both & np.int32(-(1 << 16))):
            found.append(jax.lax.bitcast_convert_type(bits, jnp.float32).astype(pages.dtype))
    return found

"""Products of the Mosaic GPU attention kernels, on tensor cores that take bfloat16.

Numbers of a float32 pool are sums of two bfloat16 planes: the number rounded, and what that leaves,
rounded in turn. Of the four products of two such sums three are taken, and each is exact in
float32; the fourth, and what the planes miss, is at most about 2^-16 of a product.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Ref = Any


def planes_of(dtype: jnp.dtype) -> int:
    """Planes of the numbers of a pool."""
    return 2 if dtype == jnp.float32 else 1


def split(numbers: jax.Array, planes: int) -> list[jax.Array]:
    """The planes of numbers f32, bf16 each, the largest first."""
    high = numbers.astype(jnp.bfloat16)
    if planes == 1:
        return [high]
    # XLA, which runs the simulator, would take what is rounded and widened for what it was.
    high = jax.lax.optimization_barrier(high)
    return [high, (numbers - high.astype(jnp.float32)).astype(jnp.bfloat16)]


def store(there: Ref, numbers: jax.Array, first: jax.Array | int = 0) -> None:
    """Writes the planes of numbers f32 [rows, width] to [planes, rows, width], from `first` on."""
    for index, plane in enumerate(split(numbers, there.shape[0])):
        there[first + index] = plane


def scores(q: list[Ref], k: list[Ref], *, interpreted: bool) -> jax.Array:
    """Products of queries and keys, f32 [queries, slots]; the simulator's take none transposed.

    Args:
      q: planes [queries, head_dim].
      k: planes [slots, head_dim].
      interpreted: whether the simulator runs this.
    """
    shape = q[0].shape[0], k[0].shape[0]
    if not interpreted:
        return products(q, [plgpu.transpose_ref(plane, (1, 0)) for plane in k], shape)
    exact = jax.lax.Precision.HIGHEST
    total = jnp.zeros(shape, jnp.float32)
    for one, other in _pairs(q, k):
        total += jnp.dot(
            one[...], other[...].T, preferred_element_type=jnp.float32, precision=exact
        )
    return total


def products(left: list[Any], right: list[Ref], shape: tuple[int, int]) -> jax.Array:
    """The product of two matrices, f32, by their planes; those of the left may be in registers."""

    def product(accumulator: Ref) -> jax.Array:
        for one, other in _pairs(left, right):
            plgpu.wgmma(accumulator, one, other)
        return accumulator[...]

    accumulator = plgpu.ACC(shape, jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
    return pl.run_scoped(product, accumulator)


def _pairs(left: list[Any], right: list[Any]) -> list[tuple[Any, Any]]:
    """The planes that meet: all but those whose product is lost anyway."""
    return [(one, other) for index, one in enumerate(left) for other in right[: len(left) - index]]

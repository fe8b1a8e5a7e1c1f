"""Matrix products of the Mosaic GPU attention kernels, on tensor cores with bfloat16 inputs.

Each number of a float32 pool is represented by the sum of two bfloat16 planes: the rounded number,
and the rounded remainder. The product of two such sums has four terms. Three of them are computed,
each exactly in float32. The fourth, and the remainders that the planes lose, make up at most about
2^-16 of a product.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Ref = Any


def planes_of(dtype: jnp.dtype) -> int:
    """The number of planes for a pool of a dtype."""
    return 2 if dtype == jnp.float32 else 1


def split(numbers: jax.Array, planes: int) -> list[jax.Array]:
    """Splits numbers f32 into planes bf16, the largest first."""
    high = numbers.astype(jnp.bfloat16)
    if planes == 1:
        return [high]
    # XLA, which runs the simulator, would simplify rounding and widening to the number itself.
    high = jax.lax.optimization_barrier(high)
    return [high, (numbers - high.astype(jnp.float32)).astype(jnp.bfloat16)]


def store(there: Ref, numbers: jax.Array, first: jax.Array | int = 0) -> None:
    """Writes the planes of f32 [rows, width] to `there`, [planes, rows, width], from `first` on."""
    for index, plane in enumerate(split(numbers, there.shape[0])):
        there[first + index] = plane


def scores(q: list[Ref], k: list[Ref], *, interpreted: bool) -> jax.Array:
    """Products of queries and keys, f32 [queries, slots].

    The simulator's tensor cores do not support transposed operands; it uses `jnp.dot` instead.

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
    """The product f32 of two matrices given as planes. The left planes may be in registers."""

    def product(accumulator: Ref) -> jax.Array:
        for one, other in _pairs(left, right):
            plgpu.wgmma(accumulator, one, other)
        return accumulator[...]

    accumulator = plgpu.ACC(shape, jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
    return pl.run_scoped(product, accumulator)


def _pairs(left: list[Any], right: list[Any]) -> list[tuple[Any, Any]]:
    """The pairs of planes to multiply: all but those whose product is too small to matter."""
    return [(one, other) for index, one in enumerate(left) for other in right[: len(left) - index]]

"""Products of rows with a model's matrices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from tokendance_jax.kernels.flash import precision

# Tuned on a CPU, and used for XLA's CPU code only: products of at most `FEW_ROWS` rows, or with at
# least `MANY_OUTPUTS` outputs, are faster with the matrix on the left if the number of rows is a
# multiple of `ROW_GROUP`.
ROW_GROUP = 16
FEW_ROWS = 64
MANY_OUTPUTS = 1 << 15


def matmul(
    x: Float[jax.Array, "rows inputs"], weight: Float[jax.Array, "outputs inputs"]
) -> Float[jax.Array, "rows outputs"]:
    """Multiplies by the transpose of `weight`: inputs in the weight's precision, result in float32.

    On CPU, a bfloat16 product with a bfloat16 result takes twice as long. Gradients are computed
    with inputs in the weight's precision too; JAX's own rule would multiply a float32 cotangent.
    """
    return _matmul(x, weight)


def transposed(product: Float[jax.Array, "rows outputs"]) -> Float[jax.Array, "outputs rows"]:
    """Transposes a result of `matmul`, so that XLA can cancel the transpose in `_outputs_first`."""
    rows, outputs = product.shape
    if rows % ROW_GROUP:
        return product.T
    return product.reshape(-1, ROW_GROUP // 2, outputs).transpose(2, 0, 1).reshape(outputs, rows)


def _forward(x: jax.Array, weight: jax.Array) -> jax.Array:
    rows, outputs = x.shape[0], weight.shape[0]
    if rows % ROW_GROUP or (rows > FEW_ROWS and outputs < MANY_OUTPUTS):
        return _rows_first(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=_outputs_first, default=_rows_first)


def _rows_first(x: jax.Array, weight: jax.Array) -> jax.Array:
    return _product(x, weight, 1, 1)


def _outputs_first(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiplies with the matrix on the left, where XLA's CPU code reads it without repacking."""
    # The rows get two axes; otherwise XLA would swap the operands back.
    parted = x.reshape(-1, ROW_GROUP // 2, x.shape[1])
    return _product(weight, parted, 1, 2).transpose(1, 2, 0).reshape(x.shape[0], -1)


def _forward_and_saved(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple]:
    return _forward(x, weight), (x, weight)


def _backward(saved: tuple, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    cotangent = cotangent.astype(weight.dtype)
    of_x, of_weight = _product(cotangent, weight, 1, 0), _product(cotangent, x, 0, 0)
    return of_x.astype(x.dtype), of_weight.astype(weight.dtype)


def _product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Contracts one axis of each array, in the lower precision of the two, to a float32 result."""
    dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return jax.lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((axis_a,), (axis_b,)), ((), ())),
        precision=precision(dtype),
        preferred_element_type=jnp.float32,
    )


_matmul: Callable[[jax.Array, jax.Array], jax.Array] = jax.custom_vjp(_forward)
_matmul.defvjp(_forward_and_saved, _backward)  # pyright: ignore[reportFunctionMemberAccess]

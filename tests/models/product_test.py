"""Products of rows with a matrix are the same whether the matrix is the left or right operand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokendance_jax.models import product
from tokendance_jax.models.product import FEW_ROWS, MANY_OUTPUTS, ROW_GROUP, matmul, transposed

MORE_ROWS = FEW_ROWS + ROW_GROUP


def numbers(rows: int, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(rows + outputs)
    x = draw.standard_normal((rows, inputs), np.float32)
    return x, draw.standard_normal((outputs, inputs), np.float32) / np.sqrt(np.float32(inputs))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("outputs", [24, MANY_OUTPUTS])
@pytest.mark.parametrize("rows", [1, ROW_GROUP, 25, 3 * ROW_GROUP, FEW_ROWS, MORE_ROWS])
def test_a_product_is_the_sum_over_inputs(rows, outputs, dtype):
    x, weight = (jnp.asarray(a).astype(dtype) for a in numbers(rows, 48, outputs))
    found = jax.jit(matmul)(x.astype(jnp.float32), weight)
    assert found.dtype == jnp.float32
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(found, exact, atol=1e-5)


@pytest.mark.parametrize("rows", [1, ROW_GROUP, 25, FEW_ROWS, MORE_ROWS])
def test_transposed_is_the_transpose(rows):
    x, weight = map(jnp.asarray, numbers(rows, 16, 40))
    found = jax.jit(lambda x, weight: transposed(matmul(x, weight)))(x, weight)
    np.testing.assert_allclose(found, jax.jit(matmul)(x, weight).T, atol=1e-6)
    y = np.arange(rows * 6, dtype=np.float32).reshape(rows, 6)
    np.testing.assert_array_equal(transposed(jnp.asarray(y)), y.T)


def compiled(rows: int, outputs: int) -> str:
    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, 48), (outputs, 48)))
    return jax.jit(matmul).lower(*shapes).compile().as_text() or ""


@pytest.mark.parametrize(
    ("rows", "outputs", "left"),
    [
        (ROW_GROUP, 96, True),
        (FEW_ROWS, 96, True),
        (MORE_ROWS, MANY_OUTPUTS, True),
        (MORE_ROWS, 96, False),
        (25, 96, False),
    ],
)
def test_the_matrix_stands_on_the_left_where_that_is_faster(rows, outputs, left):
    text = compiled(rows, outputs)
    assert (f"f32[{outputs},{rows}]" in text) == left


def test_gradients_do_not_depend_on_the_side(monkeypatch):
    x, weight = map(jnp.asarray, numbers(ROW_GROUP, 16, 8))

    def gradients() -> tuple[jax.Array, jax.Array]:
        return jax.grad(lambda x, w: jnp.sum(matmul(x, w) ** 2), argnums=(0, 1))(x, weight)

    left = gradients()
    monkeypatch.setattr(product, "ROW_GROUP", 3)
    for a, b in zip(left, gradients(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

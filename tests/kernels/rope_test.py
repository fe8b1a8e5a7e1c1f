import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokendance_jax.kernels import rope

THETA, HEAD_DIM, POSITIONS = 1e6, 64, 64
FAR = 10_000_000
SEEDS = st.integers(0, 2**32 - 1)


@functools.partial(jax.jit, static_argnames=("theta", "head_dim"))
def rotation(position, *, theta=THETA, head_dim=HEAD_DIM):
    return rope.rotation(position, theta=theta, head_dim=head_dim)


@jax.jit
def rotated(x, position):
    cos, sin = rope.rotation(position, theta=THETA, head_dim=x.shape[-1])
    return rope.rotate(x, cos, sin)


def exact(position, theta, head_dim):
    """The angle of each pair, in float64."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    return position.astype(np.float64)[..., None] / theta**exponent


@pytest.mark.parametrize(("theta", "head_dim"), [(1e6, 64), (1e4, 128), (1e6, 32)])
def test_rotation_is_that_of_float64(theta, head_dim):
    random = np.random.default_rng(0)
    edges = np.array([0, 1, -1, 255, 256, 65535, 65536, -65536, FAR, -FAR])
    near, far = random.integers(-40_000, 40_000, 4000), random.integers(-FAR, FAR, 4000)
    position = np.concatenate([edges, near, far]).astype(np.int32)
    cos, sin = rotation(position, theta=theta, head_dim=head_dim)
    angle = exact(position, theta, head_dim)
    np.testing.assert_allclose(cos, np.cos(angle), rtol=0, atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angle), rtol=0, atol=1e-6)


def test_positions_may_have_any_shape():
    position = np.arange(-12, 12, dtype=np.int32).reshape(2, 3, 4)
    cos, sin = rotation(position)
    flat_cos, flat_sin = rotation(position.reshape(-1))
    assert cos.shape == sin.shape == (2, 3, 4, HEAD_DIM // 2)
    np.testing.assert_array_equal(cos.reshape(24, -1), flat_cos)
    np.testing.assert_array_equal(sin.reshape(24, -1), flat_sin)


@given(SEEDS, st.sampled_from([0, 1, -1, 17, -4000, 100_000, -100_000]))
@settings(max_examples=50)
def test_products_depend_on_position_differences_alone(seed, shift):
    random = np.random.default_rng(seed)
    q, k = random.standard_normal((2, POSITIONS, HEAD_DIM)).astype(np.float32)
    m, n = random.integers(0, 131_072, (2, POSITIONS)).astype(np.int32)
    here = np.sum(np.float64(rotated(q, m)) * rotated(k, n), axis=-1)
    there = np.sum(np.float64(rotated(q, m - shift)) * rotated(k, n - shift), axis=-1)
    scale = np.linalg.norm(q, axis=-1) * np.linalg.norm(k, axis=-1)
    assert np.max(np.abs(here - there) / scale) < 1e-5


def test_pairs_are_the_two_halves():
    position = np.full(HEAD_DIM, 3, np.int32)
    turned = rotated(np.eye(HEAD_DIM, dtype=np.float32), position)
    angle = exact(position[0], THETA, HEAD_DIM)
    cos, sin = np.diag(np.cos(angle)), np.diag(np.sin(angle))
    expected = np.block([[cos, sin], [-sin, cos]])  # row i: unit vector i, rotated
    np.testing.assert_allclose(turned, expected, rtol=0, atol=1e-6)


@given(SEEDS)
@settings(max_examples=20)
def test_position_zero_changes_no_bit(seed):
    x = np.random.default_rng(seed).standard_normal((POSITIONS, HEAD_DIM)).astype(np.float32)
    np.testing.assert_array_equal(rotated(x, np.zeros(POSITIONS, np.int32)), x)

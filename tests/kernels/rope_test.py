import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokendance_jax.kernels.rope import Rope, Yarn, rotate

HEAD_DIM, POSITIONS = 64, 64
ROPE = Rope(1e6)
# As Qwen2.5 documents it for contexts beyond 32,768 tokens, and one with other bounds.
QWEN = Rope(1e6, Yarn(4.0, 32768))
ROPES = (ROPE, QWEN, Rope(1e4, Yarn(7.5, 2048, beta_fast=20.0, beta_slow=2.0)))
FAR = 10_000_000
SEEDS = st.integers(0, 2**32 - 1)


@functools.partial(jax.jit, static_argnames=("rope", "head_dim"))
def rotation(position, *, rope=ROPE, head_dim=HEAD_DIM):
    return rope.rotation(position, head_dim)


@functools.partial(jax.jit, static_argnames="rope")
def rotated(x, position, *, rope=ROPE):
    return rotate(x, *rope.rotation(position, x.shape[-1]))


def frequencies(rope, head_dim):
    """The angle of each pair per position, in float64: YaRN by the turns in the original context.

    Between the last frequency with `beta_fast` turns and the first with `beta_slow`, indices decide
    in equal steps how much of a frequency is divided by the factor.
    """
    pairs = head_dim // 2
    angle = np.array([rope.theta ** (-pair / pairs) for pair in range(pairs)])
    if rope.yarn is None:
        return angle
    index = np.arange(-1, head_dim)
    turns = rope.yarn.original * rope.theta ** (-index / pairs) / (2 * np.pi)
    first = max(index[turns >= rope.yarn.beta_fast].max(initial=0), 0)
    last = min(index[turns <= rope.yarn.beta_slow].min(initial=head_dim), head_dim - 1)
    for pair in range(pairs):
        divided = min(max((pair - first) / (last - first), 0.0), 1.0)
        angle[pair] *= 1 - divided + divided / rope.yarn.factor
    return angle


def exact(position, rope, head_dim):
    """The angle of each pair, in float64."""
    return position.astype(np.float64)[..., None] * frequencies(rope, head_dim)


@pytest.mark.parametrize("rope", [*ROPES, Rope(1e4)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rotation_is_that_of_float64(rope, head_dim):
    random = np.random.default_rng(0)
    edges = np.array([0, 1, -1, 255, 256, 65535, 65536, -65536, FAR, -FAR])
    near, far = random.integers(-40_000, 40_000, 4000), random.integers(-FAR, FAR, 4000)
    position = np.concatenate([edges, near, far]).astype(np.int32)
    cos, sin = rotation(position, rope=rope, head_dim=head_dim)
    angle = exact(position, rope, head_dim)
    np.testing.assert_allclose(cos, np.cos(angle), rtol=0, atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angle), rtol=0, atol=1e-6)


def test_positions_may_have_any_shape():
    position = np.arange(-12, 12, dtype=np.int32).reshape(2, 3, 4)
    cos, sin = rotation(position)
    flat_cos, flat_sin = rotation(position.reshape(-1))
    assert cos.shape == sin.shape == (2, 3, 4, HEAD_DIM // 2)
    np.testing.assert_array_equal(cos.reshape(24, -1), flat_cos)
    np.testing.assert_array_equal(sin.reshape(24, -1), flat_sin)


def test_yarn_leaves_fast_pairs_and_divides_slow_ones():
    plain, scaled = ROPE.frequencies(128), QWEN.frequencies(128)
    ratio = plain / scaled
    assert (np.diff(ratio) >= 0).all()
    assert (ratio[0], ratio[-1]) == (1.0, 4.0)
    # More than 32 turns in 32,768 positions, and less than one.
    turns = 32768 * plain / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns > 40], 1.0)
    np.testing.assert_allclose(ratio[turns < 0.8], 4.0)
    assert np.isclose(QWEN.score_scale, (0.1 * np.log(4) + 1) ** 2)
    assert ROPE.score_scale == 1.0


@given(SEEDS, st.sampled_from([0, 1, -1, 17, -4000, 100_000, -100_000]), st.sampled_from(ROPES))
@settings(max_examples=50)
def test_products_depend_on_position_differences_alone(seed, shift, rope):
    random = np.random.default_rng(seed)
    q, k = random.standard_normal((2, POSITIONS, HEAD_DIM)).astype(np.float32)
    m, n = random.integers(0, 131_072, (2, POSITIONS)).astype(np.int32)
    here = np.sum(np.float64(rotated(q, m, rope=rope)) * rotated(k, n, rope=rope), axis=-1)
    m, n = m - shift, n - shift
    there = np.sum(np.float64(rotated(q, m, rope=rope)) * rotated(k, n, rope=rope), axis=-1)
    scale = np.linalg.norm(q, axis=-1) * np.linalg.norm(k, axis=-1)
    assert np.max(np.abs(here - there) / scale) < 1e-5


def test_pairs_are_the_two_halves():
    position = np.full(HEAD_DIM, 3, np.int32)
    turned = rotated(np.eye(HEAD_DIM, dtype=np.float32), position)
    angle = exact(position[0], ROPE, HEAD_DIM)
    cos, sin = np.diag(np.cos(angle)), np.diag(np.sin(angle))
    expected = np.block([[cos, sin], [-sin, cos]])  # row i: unit vector i, rotated
    np.testing.assert_allclose(turned, expected, rtol=0, atol=1e-6)


@given(SEEDS)
@settings(max_examples=20)
def test_position_zero_changes_no_bit(seed):
    x = np.random.default_rng(seed).standard_normal((POSITIONS, HEAD_DIM)).astype(np.float32)
    np.testing.assert_array_equal(rotated(x, np.zeros(POSITIONS, np.int32)), x)

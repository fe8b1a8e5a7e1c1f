import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import cases
from tokendance_jax.kernels import rope
from tokendance_jax.kernels.kv_link import kv_link

LAYERS, PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM = SHAPE = (3, 8, 4, 2, 16)
SLOTS, COPIES = PAGES * PAGE_SIZE, 12
DTYPES = pytest.mark.parametrize("dtype", ["float32", "uint16"])
SHIFTS = st.sampled_from([0, 1, -1, 7, -30, 1000, 100_000, -9_000_000])

link = jax.jit(functools.partial(kv_link, theta=cases.THETA))


def stored(x, dtype):
    return x.astype(ml_dtypes.bfloat16).view(np.uint16) if dtype == "uint16" else x


def values(x):
    x = np.asarray(x)
    return x.view(ml_dtypes.bfloat16).astype(np.float32) if x.dtype == np.uint16 else x


def turned(keys, shift):
    """Keys [layers, slots, kv_heads, head_dim] rotated by shift [slots], in float64."""
    first, second = np.split(keys.astype(np.float64), 2, axis=-1)
    frequency = cases.THETA ** (-2 * np.arange(HEAD_DIM // 2) / HEAD_DIM)
    turn = np.exp(1j * shift[None, :, None, None] * frequency)
    moved = (first + 1j * second) * turn
    return np.concatenate([moved.real, moved.imag], axis=-1)


@DTYPES
@given(
    seed=st.integers(0, 2**32 - 1),
    shifts=st.lists(SHIFTS, min_size=COPIES, max_size=COPIES),
    # Past the pool by one slot, by pages, and by as much as int32 holds.
    sentinel=st.sampled_from([SLOTS, SLOTS + 1, 2 * SLOTS, 2**31 - 1]),
    dropped=st.sets(st.integers(0, COPIES - 1)),
)
@settings(max_examples=40, deadline=None)
def test_copies_values_and_keys_turned_by_the_shift(dtype, seed, shifts, sentinel, dropped):
    random = np.random.default_rng(seed)
    k, v = (stored(random.standard_normal(SHAPE).astype(np.float32), dtype) for _ in "kv")
    order, shift = random.permutation(SLOTS).astype(np.int32), np.array(shifts, np.int32)
    # Some sources are copied twice; no source is a target.
    source, target = random.choice(order[:6], COPIES), order[6 : 6 + COPIES].copy()
    target[list(dropped)] = sentinel

    def flat(pool):
        return np.asarray(pool).reshape(LAYERS, SLOTS, KV_HEADS, HEAD_DIM)

    linked_k, linked_v = link(k, v, source, target, shift)
    assert linked_k.dtype == k.dtype
    kept = np.setdiff1d(np.arange(SLOTS), target)
    assert flat(linked_k)[:, kept].tobytes() == flat(k)[:, kept].tobytes()
    assert flat(linked_v)[:, kept].tobytes() == flat(v)[:, kept].tobytes()

    live = np.setdiff1d(np.arange(COPIES), list(dropped))
    assert (flat(linked_v)[:, target[live]] == flat(v)[:, source[live]]).all()
    expected = turned(values(flat(k)[:, source[live]]), shift[live])
    # A float32 angle at its worst, and half a step of bfloat16 for numbers below 8.
    atol = 2e-2 if dtype == "uint16" else 1e-5
    np.testing.assert_allclose(values(flat(linked_k)[:, target[live]]), expected, atol=atol)


def test_keys_are_turned_once_and_rounded_once():
    # The bits are those of one rotation in float32, rounded to the pool's precision.
    random = np.random.default_rng(0)
    k = stored(random.standard_normal(SHAPE).astype(np.float32), "uint16")
    source, target = np.arange(4, 8, dtype=np.int32), np.arange(20, 24, dtype=np.int32)
    shift = np.array([3, -3, 5000, 0], np.int32)
    linked, _ = link(k, k, source, target, shift)
    cos, sin = rope.rotation(jnp.asarray(shift), theta=cases.THETA, head_dim=HEAD_DIM)
    keys = values(k).reshape(LAYERS, SLOTS, KV_HEADS, HEAD_DIM)[:, source]
    expected = rope.rotate(jnp.asarray(keys), cos[None, :, None, :], sin[None, :, None, :])
    found = np.asarray(linked).reshape(LAYERS, SLOTS, KV_HEADS, HEAD_DIM)[:, target]
    assert (found == stored(np.asarray(expected), "uint16")).all()


@DTYPES
def test_a_copy_to_its_own_position_keeps_every_bit(dtype):
    k = stored(np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32), dtype)
    source, target = np.arange(4, 8, dtype=np.int32), np.arange(12, 16, dtype=np.int32)
    linked, _ = link(k, k, source, target, np.zeros(4, np.int32))
    assert (np.asarray(linked)[:, 3] == k[:, 1]).all()


@DTYPES
def test_a_donated_pool_is_written_in_place(dtype):
    pool = jax.ShapeDtypeStruct((8, 2048, 16, 2, 64), dtype)  # at least 64 MiB, never allocated
    column = jax.ShapeDtypeStruct((256,), jnp.int32)
    program = jax.jit(functools.partial(kv_link, theta=cases.THETA), donate_argnums=(0, 1))
    needs = program.lower(pool, pool, column, column, column).compile().memory_analysis()
    assert needs is not None
    size = 2 * pool.size * pool.dtype.itemsize
    assert needs.alias_size_in_bytes == size
    assert needs.temp_size_in_bytes < 0.1 * size

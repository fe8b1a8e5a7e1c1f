import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import cases
from tokendance_jax.kernels.decode_attention import decode_attention

SMALL = cases.HEADS[1]
SEEDS = st.integers(0, 2**32 - 1)

program = jax.jit(functools.partial(decode_attention, theta=cases.THETA), static_argnums=3)


def run(case, q, k, v, position):
    return np.asarray(program(q, k, v, cases.LAYER, position, case.tables))


def check(case, heads, dtype, position):
    """Poisoned pools against the reference on clean ones; lanes at -1 give zeros."""
    q = cases.queries(cases.LANES, heads)
    k, v = cases.pools(case, heads, dtype)
    out = run(case, q, cases.poisoned(case, k), cases.poisoned(case, v), position)
    live = position >= 0
    lane = np.where(live, np.arange(cases.LANES, dtype=np.int32), np.int32(cases.LANES))
    cases.assert_close(out, cases.reference(case, q, k, v, position, lane), dtype)
    assert not out[~live].any()


@pytest.mark.parametrize(("heads", "page_size", "dtype"), cases.COMBINATIONS, ids=str)
def test_equals_the_reference(heads, page_size, dtype):
    case = cases.sharing(page_size)
    position = case.last_positions()
    assert (position == -1).any()
    check(case, heads, dtype, position)


@given(SEEDS, st.sets(st.integers(0, cases.LANES - 1)))
@settings(max_examples=25, deadline=None)
def test_random_lanes_equal_the_reference(seed, ended):
    case = cases.random_case(seed, page_size=16)
    position = case.last_positions()
    position[list(ended)] = -1  # lanes that ended keep their tables
    check(case, SMALL, "float32", position)


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_a_frame_equals_keys_rotated_by_it(seed):
    # Invariant 4: +d, -d and large d.
    case = cases.random_case(seed, page_size=16)
    q, position = cases.queries(cases.LANES, SMALL), case.last_positions()
    k, v = cases.pools(case, SMALL, "float32")
    moved, moved_k, source = cases.rerotated(case, k, pages=200)
    framed = run(case, q, k, v, position)
    cases.assert_close(framed, run(moved, q, moved_k, v[:, source], position), "float32")


def test_nothing_live_gives_zeros():
    case = cases.sharing(16)
    k, v = cases.pools(case, SMALL, "float32")
    out = run(case, cases.queries(cases.LANES, SMALL), k, v, np.full(cases.LANES, -1, np.int32))
    assert not out.any()

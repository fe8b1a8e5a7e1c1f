import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import cases
from tokendance_jax.kernels.lanes import TILE_ROWS, RowTiles
from tokendance_jax.kernels.round_attention import round_attention

SMALL = cases.HEADS[1]
SEEDS = st.integers(0, 2**32 - 1)

program = jax.jit(functools.partial(round_attention, theta=cases.THETA), static_argnums=3)


def run(case, q, k, v):
    return np.asarray(program(q, k, v, cases.LAYER, case.position, case.tables, case.tiles))


def check(case, heads, dtype):
    """The pools hold NaN wherever no token lies; the reference reads clean ones."""
    q = cases.queries(cases.ROWS, heads)
    k, v = cases.pools(case, heads, dtype)
    out = run(case, q, cases.poisoned(case, k), cases.poisoned(case, v))
    cases.assert_close(out, cases.reference(case, q, k, v, case.position, case.lane), dtype)
    assert not out[~case.used].any()


@pytest.mark.parametrize(("heads", "page_size", "dtype"), cases.COMBINATIONS, ids=str)
def test_equals_the_reference(heads, page_size, dtype):
    case = cases.sharing(page_size)
    assert (~case.used).any()
    check(case, heads, dtype)


@given(SEEDS)
@settings(max_examples=8, deadline=None)
def test_random_lanes_equal_the_reference(seed):
    check(cases.random_case(seed, page_size=16), SMALL, "float32")


@given(SEEDS)
@settings(max_examples=6, deadline=None)
def test_a_frame_equals_keys_rotated_by_it(seed):
    # Invariant 4: +d, -d and large d.
    case = cases.random_case(seed, page_size=16)
    q = cases.queries(cases.ROWS, SMALL)
    k, v = cases.pools(case, SMALL, "float32")
    moved, moved_k, source = cases.rerotated(case, k, pages=200)
    cases.assert_close(run(case, q, k, v), run(moved, q, moved_k, v[:, source]), "float32")


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_rows_may_stand_in_any_order(seed):
    case = cases.sharing(16)
    k, v = cases.pools(case, SMALL, "float32")
    q = cases.queries(cases.ROWS, SMALL)
    in_order = run(case, q, k, v)

    order = np.random.default_rng(seed).permutation(cases.ROWS).astype(np.int32)
    row, lane = np.full_like(case.tiles.row, cases.ROWS), np.zeros_like(case.tiles.lane)
    count = 0
    for index in range(len(case.lanes)):  # the rows of a lane, as they come
        rows = np.flatnonzero(case.lane[order] == index)
        for start in range(0, len(rows), TILE_ROWS):
            part = rows[start : start + TILE_ROWS]
            row[count, : len(part)], lane[count] = part, index
            count += 1
    tiles = RowTiles(row, lane, np.asarray(count, np.int32))
    out = program(q[order], k, v, cases.LAYER, case.position[order], case.tables, tiles)
    cases.assert_close(np.asarray(out), in_order[order], "float32")

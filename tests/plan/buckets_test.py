import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokendance_jax.plan.buckets import Buckets

BUCKETS = st.tuples(st.integers(1, 64), st.integers(0, 4096)).map(
    lambda pair: Buckets(pair[0], pair[0] + pair[1])
)
ROWS = st.integers(0, 20_000)


@given(BUCKETS)
def test_sizes_double_up_to_exactly_the_budget(buckets):
    sizes = buckets.sizes
    assert sizes[0] == buckets.minimum
    assert sizes[-1] == buckets.budget
    assert all(a < b <= 2 * a for a, b in pairwise(sizes))
    assert len(sizes) == math.ceil(math.log2(buckets.budget / buckets.minimum)) + 1


@given(BUCKETS, ROWS, ROWS)
def test_fit_is_the_smallest_size_monotone_and_idempotent(buckets, n, m):
    n, m = sorted((n % (buckets.budget + 1), m % (buckets.budget + 1)))
    size = buckets.fit(n)
    assert size == min(s for s in buckets.sizes if s >= n)
    assert size < 2 * n or size == buckets.minimum
    assert buckets.fit(size) == size
    assert size <= buckets.fit(m)


@given(BUCKETS, ROWS)
def test_cover_holds_all_rows_with_bounded_padding(buckets, n):
    cover = buckets.cover(n)
    assert set(cover) <= set(buckets.sizes)
    assert cover == sorted(cover, reverse=True)
    padding = sum(cover) - n
    assert 0 <= padding <= max(n / 3, buckets.minimum - 1)
    full, tail = divmod(n, buckets.budget)
    assert cover[:full] == [buckets.budget] * full
    assert len(cover[full:]) <= 2
    if len(cover[full:]) == 2:
        alone = buckets.fit(tail)
        assert sum(cover[full:]) < alone
        assert alone - tail > tail / 4


@given(BUCKETS, ROWS, st.integers(0, 100))
def test_cover_is_monotone(buckets, n, more):
    assert sum(buckets.cover(n)) <= sum(buckets.cover(n + more))


@given(BUCKETS)
def test_cover_of_a_size_is_the_size(buckets):
    assert all(buckets.cover(size) == [size] for size in buckets.sizes)


@given(st.integers(1, 64), st.integers(0, 8), ROWS)
def test_cover_is_idempotent_for_a_doubled_budget(minimum, doublings, n):
    buckets = Buckets(minimum, minimum << doublings)
    cover = buckets.cover(n)
    assert buckets.cover(sum(cover)) == cover


@pytest.mark.parametrize(
    ("n", "cover"),
    [
        (0, []),
        (1, [16]),
        (1452, [1024, 512]),
        (1536, [1024, 512]),
        (1537, [2048]),  # 1024 + 1024 saves nothing
        (1700, [2048]),  # padding of a fifth
        (2048, [2048]),
        (5000, [2048, 2048, 1024]),
        (5200, [2048, 2048, 1024, 128]),
    ],
)
def test_cover_examples(n, cover):
    assert Buckets(16, 2048).cover(n) == cover


def test_odd_budget():
    buckets = Buckets(16, 100)
    assert buckets.sizes == (16, 32, 64, 100)
    assert buckets.cover(70) == [64, 16]
    assert buckets.cover(80) == [100]  # padding of a quarter


@pytest.mark.parametrize(("minimum", "budget"), [(0, 8), (-1, 8), (8, 4)])
def test_bad_sizes_are_refused(minimum, budget):
    with pytest.raises(ValueError, match="minimum"):
        Buckets(minimum, budget)


def test_bad_rows_are_refused():
    buckets = Buckets(16, 64)
    with pytest.raises(ValueError, match="65 rows do not fit the budget of 64"):
        buckets.fit(65)
    with pytest.raises(ValueError, match="budget"):
        buckets.fit(-1)
    with pytest.raises(ValueError, match="-1"):
        buckets.cover(-1)


def test_upto_names_every_size_that_fit_gives():
    buckets = Buckets(4, 100)
    for n in (0, 4, 5, 64, 65, 100):
        assert buckets.upto(n) == tuple(sorted({buckets.fit(k) for k in range(n + 1)}))

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import cases
from tokendance_jax.kernels.page_diff import Deviation, DiffPlan, page_diff
from tokendance_jax.kernels.page_diff.mosaic_tpu import page_diff_mosaic_tpu
from tokendance_jax.kernels.page_diff.reference import page_diff_reference
from tokendance_jax.kernels.paged_kv import PagedKV

# Layers, pages, page size, KV heads, head dim.
SMALL = (3, 12, 4, 2, 16)
FRAMES = st.sampled_from([0, 1, -1, 7, -30, 1000, 100_000, -9_000_000])
SCORES = ("k_largest", "k_squares", "v_largest", "v_squares")


@functools.partial(jax.jit, static_argnames="implementation")
def diff(kv, siblings, plan, threshold, implementation="xla"):
    return page_diff(
        kv,
        siblings,
        plan,
        rope=cases.ROPE,
        threshold=threshold,
        implementation=implementation,
    )


def stored(x, dtype):
    """Numbers as a pool of this dtype stores them; uint16 stands for bfloat16 bits."""
    if dtype == "uint16":
        return x.astype(ml_dtypes.bfloat16).view(np.uint16)
    return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def values(x):
    x = np.asarray(x)
    return (x.view(ml_dtypes.bfloat16) if x.dtype == np.uint16 else x).astype(np.float64)


@dataclasses.dataclass
class Pages:
    """A pool of base pages and their siblings. Slots that are not compared are NaN."""

    k: np.ndarray
    v: np.ndarray
    plan: DiffPlan
    outside: bool

    @classmethod
    def of(cls, comparisons, shape, dtype, *, outside=False, seed=0, scale=0.01):
        """Makes siblings that differ from their base pages by noise.

        Args:
          comparisons: (base page, frame, first slot, slots), in the order of base pages. Siblings
            are the last pages, in the reverse order of comparisons.
          shape: shape of the pool.
          dtype: dtype of the pool; "uint16" stands for bfloat16 bits.
          outside: whether siblings lie outside the pool.
          seed: seed of all numbers.
          scale: scale of the noise.
        """
        random = np.random.default_rng(seed)
        base_k, base_v = (values(stored(random.standard_normal(shape), dtype)) for _ in "kv")
        k, v = np.full((2, *shape), np.nan)
        base, frame, first, slots = np.array(comparisons, np.int32).reshape(-1, 4).T
        sibling = np.arange(len(base), dtype=np.int32)[::-1]
        sibling = sibling + np.int32(shape[1] - len(base))
        for (page, turn, begin, length), own in zip(comparisons, sibling, strict=True):
            used = slice(begin, begin + length)
            k[:, page, used], v[:, page, used] = base_k[:, page, used], base_v[:, page, used]
            noise = scale * random.standard_normal((2, *k[:, page, used].shape))
            k[:, own, used] = cases.turned(base_k[:, page, used], turn) + noise[0]
            v[:, own, used] = base_v[:, page, used] + noise[1]
        plan = DiffPlan.of_comparisons(base, sibling, frame, first, slots)
        return cls(stored(k, dtype), stored(v, dtype), plan, outside)

    def arguments(self, pages, comparisons):
        """Arguments of a page diff, with a plan padded to these sizes."""
        plan, siblings = self.plan, None
        if self.outside:
            start = self.k.shape[1] - len(plan.sibling)
            siblings = PagedKV(jnp.asarray(self.k[:, start:]), jnp.asarray(self.v[:, start:]))
            plan = dataclasses.replace(plan, sibling=plan.sibling - np.int32(start))
        kv = PagedKV(jnp.asarray(self.k), jnp.asarray(self.v))
        return kv, siblings, plan.padded(pages, comparisons)


def comparisons_of(page_size):
    """Whole and partial pages, one with four siblings, one of one slot; near and far frames."""
    w = page_size
    return [
        (1, 0, 0, w),
        (1, 3, 0, w),
        (1, -100_000, 1, w - 3),
        (1, 4_000, w // 2, w - w // 2),
        (2, 9, w - 1, 1),
        (3, -5, 0, w - 1),
    ]


def check(found, expected):
    """Compares deviations. The kernels' angles are exact to 2e-6, and numbers are up to 5."""
    for name in SCORES:
        one, other = (np.asarray(getattr(x, name)) for x in (found, expected))
        assert np.isfinite(other).all()
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-5, err_msg=name)
    assert (np.asarray(found.far) == np.asarray(expected.far)).all()


def reference(kv, siblings, plan):
    return jax.jit(functools.partial(page_diff_reference, plan=plan, rope=cases.ROPE))(kv, siblings)


def expected_of(arguments, threshold):
    scores = reference(*arguments)
    largest = np.maximum(scores[0], scores[2]).max(axis=0)
    return Deviation(*scores, far=~(largest <= threshold))


@pytest.mark.parametrize("outside", [False, True])
@cases.swept(
    ("shape", "dtype"),
    itertools.product([(2, 12, 16, 2, 64), (1, 12, 32, 4, 128)], ["uint16", "float32", "bfloat16"]),
)
def test_xla_equals_the_reference(shape, dtype, outside):
    pages = Pages.of(comparisons_of(shape[2]), shape, dtype, outside=outside)
    arguments = pages.arguments(5, 20)
    check(diff(*arguments, 0.04), expected_of(arguments, 0.04))


@pytest.mark.parametrize(
    ("shape", "dtype", "outside"),
    [
        ((2, 12, 16, 2, 64), "float32", False),
        ((2, 12, 16, 2, 64), "bfloat16", True),
        pytest.param((1, 12, 16, 4, 128), "bfloat16", False, marks=pytest.mark.sweep),
        # Pages large enough for several blocks of threads each.
        pytest.param((1, 12, 32, 8, 128), "bfloat16", True, marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_the_gpu_kernel_equals_the_reference_without_races(shape, dtype, outside, simulator):
    pages = Pages.of(comparisons_of(shape[2]), shape, dtype, outside=outside)
    arguments = pages.arguments(4, 8)
    found = diff(*arguments, 0.04, implementation="interpret")
    check(found, expected_of(arguments, 0.04))
    assert not simulator.races()


def check_scores(scores, expected):
    for name, one, other in zip(SCORES, scores, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("outside", [False, True])
@cases.swept(
    ("shape", "dtype"), [((4, 12, 16, 2, 64), "float32"), ((2, 12, 32, 8, 128), "bfloat16")]
)
def test_the_tpu_kernel_equals_the_reference(shape, dtype, outside):
    pages = Pages.of(comparisons_of(shape[2]), shape, dtype, outside=outside)
    arguments = pages.arguments(4, 8)
    kernel = functools.partial(page_diff_mosaic_tpu, rope=cases.ROPE, interpret=True)
    expected = reference(*arguments)
    check_scores(jax.jit(kernel)(*arguments), expected)


def test_the_tpu_kernel_has_no_races(tpu_simulator):
    pages = Pages.of(comparisons_of(16), (2, 12, 16, 2, 128), "bfloat16")
    arguments = pages.arguments(4, 8)
    kernel = functools.partial(
        page_diff_mosaic_tpu, rope=cases.ROPE, interpret=tpu_simulator.parameters
    )
    expected = reference(*arguments)
    check_scores(jax.jit(kernel)(*arguments), expected)
    assert not tpu_simulator.races()


COMPARISONS = st.lists(
    st.tuples(st.integers(1, 4), FRAMES, st.integers(0, 3), st.integers(1, 4)).map(
        lambda drawn: (*drawn[:3], min(drawn[3], SMALL[2] - drawn[2]))
    ),
    min_size=1,
    max_size=6,
).map(lambda drawn: sorted(drawn, key=lambda comparison: comparison[0]))


def gaps(pages, comparisons, kind):
    """Yields differences of K or V in float64, [layers, slots, kv_heads, head_dim] each."""
    pool = values(getattr(pages, kind))
    for (base, frame, first, slots), own in zip(comparisons, pages.plan.sibling, strict=True):
        used = slice(first, first + slots)
        shown = pool[:, base, used]
        yield np.abs(pool[:, own, used] - (cases.turned(shown, frame) if kind == "k" else shown))


@pytest.mark.parametrize("dtype", ["float32", "uint16"])
@given(comparisons=COMPARISONS, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15)
def test_scores_are_those_of_float64(dtype, comparisons, seed):
    pages = Pages.of(comparisons, SMALL, dtype, seed=seed)
    found = diff(*pages.arguments(4, 6), 1.0)
    count = len(comparisons)
    for kind in "kv":
        expected = list(gaps(pages, comparisons, kind))
        largest = np.stack([gap.max(axis=(1, 2, 3)) for gap in expected], axis=1)
        squares = np.stack([(gap**2).sum(axis=(1, 2, 3)) for gap in expected], axis=1)
        for name, other in (("largest", largest), ("squares", squares)):
            one = np.asarray(getattr(found, f"{kind}_{name}"))
            np.testing.assert_allclose(one[:, :count], other, rtol=1e-3, atol=1e-5)
            assert not one[:, count:].any()


@pytest.mark.parametrize("dtype", ["float32", "uint16"])
@given(
    comparisons=COMPARISONS,
    changes=st.lists(st.sampled_from(["", "k", "v"]), min_size=6, max_size=6),
    ratio=st.sampled_from([0.5, 0.99, 1.01, 1.5, 1e6]),
    threshold=st.sampled_from([0.25, 1.0, 30.0]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=15)
def test_a_page_is_far_if_any_of_its_numbers_is(
    dtype, comparisons, changes, ratio, threshold, seed
):
    # The noise is far below the threshold, so the changed number decides.
    pages = Pages.of(comparisons, SMALL, dtype, seed=seed)
    random = np.random.default_rng(seed)
    for own, change, (_, _, first, slots) in zip(
        pages.plan.sibling, changes, comparisons, strict=False
    ):
        if change:
            pool = getattr(pages, change)
            layers, _, _, kv_heads, head_dim = pool.shape
            slot = random.integers(first, first + slots)
            at = (random.integers(layers), own, slot, *random.integers((kv_heads, head_dim)))
            pool[at] = stored(values(pool)[at] + np.float32(threshold * ratio), dtype)
    # The largest differences of the stored numbers. Those so near the threshold that rounding
    # decides are left out.
    largest = [
        max(k.max(), v.max())
        for k, v in zip(*(gaps(pages, comparisons, kind) for kind in "kv"), strict=True)
    ]
    clear = np.abs(np.array(largest) - threshold) > 1e-4 * threshold
    far = np.asarray(diff(*pages.arguments(4, 6), threshold).far)
    count = len(comparisons)
    assert (far[:count] == (np.array(largest) > threshold))[clear].all()
    assert not far[count:].any()


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_the_threshold_itself_is_near(implementation, request):
    if implementation == "interpret":
        request.getfixturevalue("simulator")
    shape = (1, 4, 16, 2, 64)
    k, v = np.zeros((2, *shape), np.float32)
    # A value in frame 7 and a key in frame 0: neither is rotated, so nothing is rounded.
    plan = DiffPlan.of_comparisons(*np.array([[1, 1], [2, 3], [7, 0], [0, 0], [16, 16]]))
    v[0, 2, 5, 1, 3] = k[0, 3, 9, 0, 60] = 0.1
    threshold = np.float32(0.1)
    for limit, far in ((threshold, False), (np.nextafter(threshold, np.float32(0)), True)):
        found = diff(
            PagedKV(jnp.asarray(k), jnp.asarray(v)),
            None,
            plan,
            limit,
            implementation=implementation,
        )
        assert np.asarray(found.far).tolist() == [far, far]
        assert np.asarray(found.v_largest).tolist() == [[threshold, 0]]
        assert np.asarray(found.k_largest).tolist() == [[0, threshold]]


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_infinitely_far(number, implementation, request):
    if implementation == "interpret":
        request.getfixturevalue("simulator")
    shape = (2, 6, 16, 2, 64)
    k, v = np.ones((2, *shape), np.float32)
    base, sibling = [1, 1, 2], [3, 4, 5]
    # The key in slot 8 of siblings 3 and 4; sibling 4 is compared from slot 9 on. The value in slot
    # 2 of base page 2 and of its sibling, page 5.
    plan = DiffPlan.of_comparisons(*np.array([base, sibling, [0, 0, 9], [0, 9, 0], [16, 7, 16]]))
    k[1, 3:5, 8, 1, 40] = v[0, 2, 2, 0, 0] = v[0, 5, 2, 0, 0] = number
    found = diff(
        PagedKV(jnp.asarray(k), jnp.asarray(v)),
        None,
        plan,
        np.float32(np.inf),
        implementation=implementation,
    )
    assert np.asarray(found.far).tolist() == [True, False, True]
    infinite = np.array([[False, False, False], [True, False, False]])
    for score in (found.k_largest, found.k_squares):
        assert (np.isinf(score)[:, :2] == infinite[:, :2]).all()
    for score in (found.v_largest, found.v_squares):
        assert np.isinf(score).tolist() == [[False, False, True], [False, False, False]]
    for name in SCORES:
        assert not np.isnan(getattr(found, name)).any()


def test_a_plan_of_nothing_finds_nothing():
    nothing = np.zeros(0, np.int32)
    plan = DiffPlan.of_comparisons(*[nothing] * 5).padded(2, 4)
    pool = jnp.full(SMALL, jnp.nan)
    found = diff(PagedKV(pool, pool), None, plan, 0.0)
    assert not np.asarray(found.far).any()
    assert not any(np.asarray(getattr(found, name)).any() for name in SCORES)


def test_a_plan_reads_a_base_page_once():
    columns = [
        [2, 2, 5, 5, 5],
        [7, 8, 7, 9, 10],
        [0, 3, -3, 0, 1],
        [0, 1, 0, 2, 0],
        [4, 3, 2, 1, 4],
    ]
    plan = DiffPlan.of_comparisons(*np.array(columns))
    assert plan.page.tolist() == [2, 5]
    assert plan.begin.tolist() == [0, 2, 5]
    assert [x.tolist() for x in (plan.sibling, plan.frame, plan.first, plan.slots)] == columns[1:]
    wider = plan.padded(4, 7)
    assert wider.begin.tolist() == [0, 2, 5, 5, 5]
    assert wider.page.tolist() == [2, 5, 0, 0]
    assert wider.slots.tolist() == [4, 3, 2, 1, 4, 0, 0]
    with pytest.raises(ValueError, match="base: pages do not ascend"):
        DiffPlan.of_comparisons(*np.array([[2, 1], [3, 4], [0, 0], [0, 0], [4, 4]]))


@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_little_memory_is_needed(dtype):
    pool = cases.shape(8, 2048, 16, 2, 64, dtype=dtype)  # at least 64 MiB, never allocated
    column = cases.shape(1024)
    plan = DiffPlan(column, cases.shape(1025), *[column] * 4)
    needs = diff.lower(PagedKV(pool, pool), None, plan, 0.1).compile().memory_analysis()
    assert needs is not None
    assert needs.temp_size_in_bytes < 0.03 * 2 * pool.size * pool.dtype.itemsize


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 4, 4, 2, 8), "float32"), ((3, 4, 4, 2, 16), "float16")]
)
@pytest.mark.parametrize("kind", [0, 1])
def test_siblings_that_do_not_fit_are_refused(shape, dtype, kind):
    pool = jnp.zeros(SMALL)
    fitting, other = jnp.zeros((3, 4, 4, 2, 16)), jnp.zeros(shape, dtype)
    siblings = PagedKV(fitting, other) if kind else PagedKV(other, fitting)
    plan = DiffPlan.of_comparisons(*np.array([[1], [2], [0], [0], [4]]))
    with pytest.raises(ValueError, match="siblings: pages"):
        page_diff(PagedKV(pool, pool), siblings, plan, rope=cases.ROPE, threshold=0.1)


def test_an_unfit_kernel_says_why():
    pool = jnp.zeros(SMALL)
    plan = DiffPlan.of_comparisons(*np.array([[1], [2], [0], [0], [4]]))
    with pytest.raises(NotImplementedError, match="heads of 16"):
        diff(PagedKV(pool, pool), None, plan, 0.1, implementation="mosaic_gpu")
    bits = pool.astype("uint16")
    for implementation in ("mosaic_gpu", "mosaic_tpu"):
        with pytest.raises(NotImplementedError, match="bfloat16 and float32 pools, not uint16"):
            diff(PagedKV(bits, bits), None, plan, 0.1, implementation=implementation)
    with pytest.raises(ValueError, match="implementation: 'cuda' is none of"):
        diff(PagedKV(pool, pool), None, plan, 0.1, implementation="cuda")

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
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import rotate
from tokendance_jax.kernels.sparse_restore import RestorePlan, Source, sparse_restore
from tokendance_jax.kernels.sparse_restore.mosaic_tpu import sparse_restore_mosaic_tpu
from tokendance_jax.kernels.sparse_restore.reference import sparse_restore_reference

TURNS = st.sampled_from([0, 1, -1, 7, -30, 1000, 100_000, -9_000_000])
KINDS = ("pool", "pages", "at rest", "int8")
# Layers, pages, page size, KV heads, head dim.
SMALL = (3, 8, 4, 2, 16)


@functools.partial(jax.jit, static_argnames="implementation")
def restore(kv, source, plan, implementation="xla"):
    return sparse_restore(kv, source, plan, rope=cases.ROPE, implementation=implementation)


def stored(x, dtype):
    """Numbers as a pool of this dtype stores them; uint16 stands for bfloat16 bits."""
    if dtype == "uint16":
        return x.astype(ml_dtypes.bfloat16).view(np.uint16)
    return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def values(x):
    x = np.asarray(x)
    return (x.view(ml_dtypes.bfloat16) if x.dtype == np.uint16 else x).astype(np.float32)


def pool_of(random, shape, dtype):
    numbers = (random.standard_normal(shape).astype(np.float32) for _ in "kv")
    return PagedKV(*(jnp.asarray(stored(x, dtype)) for x in numbers))


def source_of(kind, random, shape, dtype, pages=4):
    """A source of `pages` pages. Unless int8, the last slot of each is NaN: nothing reads it."""
    layers, _, *slot_shape = shape
    shape = (layers, pages, *slot_shape)
    if kind == "pool":
        return None
    bias = 50 * random.standard_normal((layers, *slot_shape[1:])).astype(np.float32)
    if kind == "int8":
        k, v = (random.integers(-127, 128, shape, np.int8) for _ in "kv")
        scales = [random.random(shape[:-1], np.float32) / 100 for _ in "kv"]
        return Source(k, v, *scales, key_bias=bias, rotated=False)
    k, v = (random.standard_normal(shape).astype(np.float32) for _ in "kv")
    k[:, :, -1] = v[:, :, -1] = np.nan
    k, v = stored(k, dtype), stored(v, dtype)
    return Source(k, v) if kind == "pages" else Source(k, v, key_bias=bias, rotated=False)


def pieces_of(page_size):
    """Pieces of several lengths, one page restored four times, and targets that cross pages."""
    w = page_size
    return [  # source page, first slot, slots, target slot, turn
        (2, 0, w - 1, 6 * w, 5),
        (1, 3, w - 5, 5 * w + 1, -100_000),
        (2, 0, w - 1, 7 * w, 0),
        (2, 1, w - 2, 8 * w + 2, 9),
        (2, 0, w - 1, 9 * w + w // 2, -4_000),
    ]


def plan_of(pieces, page_size):
    columns = [
        np.concatenate(column).astype(np.int32)
        for column in zip(
            *(
                (page * page_size + first + np.arange(n), target + np.arange(n), np.full(n, turn))
                for page, first, n, target, turn in pieces
            ),
            strict=True,
        )
    ]
    return RestorePlan.of_slots(*columns, page_size=page_size)


def reference(kv, source, plan):
    return jax.jit(functools.partial(sparse_restore_reference, plan=plan, rope=cases.ROPE))(
        kv, source
    )


def check(found, expected, dtype):
    # Results may differ by one rounding of a number of up to 256.
    rtol = 1e-5 if dtype == "float32" else 2**-7
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(values(one), values(other), rtol=rtol, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@cases.swept(
    ("shape", "dtype"),
    itertools.product([(2, 12, 16, 2, 64), (1, 12, 32, 4, 128)], ["uint16", "float32", "bfloat16"]),
)
def test_xla_equals_the_reference(shape, dtype, kind):
    random = np.random.default_rng(0)
    kv = pool_of(random, shape, dtype)
    source = source_of(kind, random, shape, dtype)
    plan = plan_of(pieces_of(shape[2]), shape[2])
    expected = reference(kv, source, plan)
    check(restore(kv, source, plan.padded(7, 30)), expected, dtype)


@pytest.mark.parametrize("kind", KINDS)
@cases.swept(
    ("shape", "dtype"),
    [
        ((1, 12, 16, 4, 128), "bfloat16"),
        ((2, 12, 16, 2, 64), "float32"),
        ((1, 12, 32, 8, 128), "bfloat16"),  # pages large enough for several blocks of threads each
    ],
)
def test_the_gpu_kernel_equals_the_reference_without_races(shape, dtype, kind, simulator):
    random = np.random.default_rng(0)
    kv = pool_of(random, shape, dtype)
    source = source_of(kind, random, shape, dtype)
    plan = plan_of(pieces_of(shape[2]), shape[2])
    expected = reference(kv, source, plan)
    found = restore(kv, source, plan.padded(4, 30), implementation="interpret")
    check(found, expected, dtype)
    assert not simulator.races()


@pytest.mark.parametrize("kind", KINDS)
@cases.swept(
    ("shape", "dtype"), [((4, 12, 16, 2, 64), "float32"), ((1, 12, 32, 8, 128), "bfloat16")]
)
def test_the_tpu_kernel_equals_the_reference(shape, dtype, kind):
    random = np.random.default_rng(0)
    kv = pool_of(random, shape, dtype)
    source = source_of(kind, random, shape, dtype)
    plan = plan_of(pieces_of(shape[2]), shape[2])
    expected = reference(kv, source, plan)
    kernel = functools.partial(sparse_restore_mosaic_tpu, rope=cases.ROPE, interpret=True)
    check(jax.jit(kernel)(kv, source, plan.padded(4, 30)), expected, dtype)


def test_the_tpu_kernel_has_no_races(tpu_simulator):
    shape = (2, 12, 16, 2, 128)
    random = np.random.default_rng(0)
    kv = pool_of(random, shape, "bfloat16")
    source = source_of("int8", random, shape, "bfloat16")
    plan = plan_of(pieces_of(16), 16)
    expected = reference(kv, source, plan)
    kernel = functools.partial(
        sparse_restore_mosaic_tpu, rope=cases.ROPE, interpret=tpu_simulator.parameters
    )
    check(jax.jit(kernel)(kv, source, plan.padded(4, 30)), expected, "bfloat16")
    assert not tpu_simulator.races()


@pytest.mark.parametrize("dtype", ["float32", "uint16"])
@given(
    seed=st.integers(0, 2**32 - 1),
    turns=st.lists(TURNS, min_size=12, max_size=12),
    copies=st.integers(0, 12),
)
@settings(max_examples=15)
def test_any_slots_go_anywhere_and_all_others_keep_their_bits(dtype, seed, turns, copies):
    layers, pages, page_size, kv_heads, head_dim = SMALL
    random = np.random.default_rng(seed)
    kv = pool_of(random, SMALL, dtype)
    order = random.permutation(pages * page_size).astype(np.int32)
    # Some sources are copied twice; no source is a target.
    source, target = random.choice(order[:6], copies), order[6 : 6 + copies]
    turn = np.array(turns[:copies], np.int32)
    plan = RestorePlan.of_slots(source, target, turn, page_size=page_size)
    found = restore(kv, None, plan.padded(12, 12))

    def flat(pool):
        return np.asarray(pool).reshape(layers, pages * page_size, kv_heads, head_dim)

    kept = np.setdiff1d(np.arange(pages * page_size), target)
    assert flat(found.k)[:, kept].tobytes() == flat(kv.k)[:, kept].tobytes()
    assert flat(found.v)[:, kept].tobytes() == flat(kv.v)[:, kept].tobytes()
    assert (flat(found.v)[:, target] == flat(kv.v)[:, source]).all()
    # The same rotation in float64.
    first, second = np.split(values(flat(kv.k)[:, source]).astype(np.float64), 2, axis=-1)
    frequency = cases.ROPE.theta ** (-2 * np.arange(head_dim // 2) / head_dim)
    moved = (first + 1j * second) * np.exp(1j * turn[None, :, None, None] * frequency)
    expected = np.concatenate([moved.real, moved.imag], axis=-1)
    # The worst error of a float32 angle, and half a bfloat16 step of numbers below 8.
    atol = 2e-2 if dtype == "uint16" else 1e-5
    np.testing.assert_allclose(values(flat(found.k)[:, target]), expected, atol=atol)


@pytest.mark.parametrize("implementation", ["xla", "interpret", "mosaic_tpu"])
def test_a_plan_of_no_pieces_changes_nothing(implementation):
    kv = pool_of(np.random.default_rng(0), (2, 12, 16, 2, 64), "float32")
    nothing = np.zeros(0, np.int32)
    plan = RestorePlan.of_slots(nothing, nothing, nothing, page_size=16)
    found = restore(kv, None, plan, implementation=implementation)
    jax.tree.map(np.testing.assert_array_equal, found, kv)


@pytest.mark.parametrize("kind", ["pool", pytest.param("int8", marks=pytest.mark.slow)])
def test_padding_alone_changes_nothing(kind, simulator):
    random, shape = np.random.default_rng(0), (2, 12, 16, 2, 64)
    kv = pool_of(random, shape, "float32")
    source, nothing = source_of(kind, random, shape, "float32"), np.zeros(0, np.int32)
    plan = RestorePlan.of_slots(nothing, nothing, nothing, page_size=16).padded(4, 8)
    tpu = functools.partial(sparse_restore_mosaic_tpu, rope=cases.ROPE, interpret=True)
    for found in (
        restore(kv, source, plan),
        restore(kv, source, plan, implementation="interpret"),
        jax.jit(tpu)(kv, source, plan),
    ):
        jax.tree.map(np.testing.assert_array_equal, found, kv)
    assert not simulator.races()


def test_keys_are_turned_once_and_rounded_once():
    # The result equals, to the bit, one rotation in float32 rounded to the pool's precision.
    layers, pages, page_size, kv_heads, head_dim = SMALL
    k = pool_of(np.random.default_rng(0), SMALL, "uint16").k
    source, target = np.arange(4, 8, dtype=np.int32), np.arange(20, 24, dtype=np.int32)
    turn = np.array([3, -3, 5000, 0], np.int32)
    plan = RestorePlan.of_slots(source, target, turn, page_size=page_size)
    moved = restore(PagedKV(k, k), None, plan).k
    cos, sin = cases.ROPE.rotation(jnp.asarray(turn), head_dim)
    keys = values(k).reshape(layers, pages * page_size, kv_heads, head_dim)[:, source]
    expected = rotate(jnp.asarray(keys), cos[None, :, None, :], sin[None, :, None, :])
    found = np.asarray(moved).reshape(layers, pages * page_size, kv_heads, head_dim)[:, target]
    assert (found == stored(np.asarray(expected), "uint16")).all()


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_what_is_not_turned_keeps_every_bit(seed):
    # Any bit pattern: signed zeros, infinities, NaNs with their payload.
    random = np.random.default_rng(seed)
    kv = PagedKV(*(jnp.asarray(random.integers(0, 2**16, SMALL, np.uint16)) for _ in "kv"))
    pages_k, pages_v = (random.integers(0, 2**16, SMALL, np.uint16) for _ in "kv")
    source = Source(pages_k, pages_v)
    slots = np.arange(4, 8, dtype=np.int32)
    plan = RestorePlan.of_slots(slots, slots + 8, np.zeros(4, np.int32), page_size=4)
    found = restore(kv, source, plan)
    for one, pages in ((found.k, source.k), (found.v, source.v)):
        assert (np.asarray(one)[:, 3] == pages[:, 1]).all()


def test_a_plan_reads_a_page_once_and_writes_pieces_of_one_page():
    # Two mirrors read page 1, one of them across a boundary of target pages. One reads page 0.
    source = np.array([4, 5, 6, 7, 4, 5, 0, 1], np.int32)
    target = np.array([10, 11, 12, 13, 30, 31, 20, 22], np.int32)
    turn = np.array([6, 6, 6, 6, 26, 26, 20, 20], np.int32)
    plan = RestorePlan.of_slots(source, target, turn, page_size=4)
    assert plan.page.tolist() == [0, 1]
    assert plan.begin.tolist() == [0, 2, 5]
    assert plan.first.tolist() == [0, 1, 0, 2, 0]
    assert plan.slots.tolist() == [1, 1, 2, 2, 2]
    assert plan.target.tolist() == [20, 22, 10, 12, 30]
    assert plan.turn.tolist() == [20, 20, 6, 6, 26]


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 7))
@settings(max_examples=12)
def test_a_plan_that_is_cut_does_the_same_work(seed, size):
    random = np.random.default_rng(seed)
    source = random.integers(0, 32, 20).astype(np.int32)
    target, turn = random.permutation(200)[:20].astype(np.int32), source % 3
    plan = RestorePlan.of_slots(source, target, turn, page_size=4)

    def work(plan):
        page = np.repeat(plan.page, np.diff(plan.begin))
        columns = (page, plan.first, plan.slots, plan.target, plan.turn)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    parts = [plan.cut(start, start + size) for start in range(0, len(plan.first), size)]
    assert [piece for part in parts for piece in work(part)] == work(plan)
    assert all(len(part.page) == len(set(part.page.tolist())) for part in parts)


@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_a_donated_pool_is_written_in_place(dtype):
    pool = cases.shape(8, 2048, 16, 2, 64, dtype=dtype)  # at least 64 MiB, never allocated
    slots = np.arange(512, dtype=np.int32)
    plan = RestorePlan.of_slots(slots, slots + 16 * 1024, slots, page_size=16)
    program = jax.jit(functools.partial(sparse_restore, rope=cases.ROPE), donate_argnums=0)
    needs = program.lower(PagedKV(pool, pool), None, plan).compile().memory_analysis()
    assert needs is not None
    size = 2 * pool.size * pool.dtype.itemsize
    assert needs.alias_size_in_bytes == size
    assert needs.temp_size_in_bytes < 0.1 * size


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"k": np.zeros((3, 4, 4, 2, 8), np.float32)}, "all but the number of pages"),
        ({"v": np.zeros((3, 5, 4, 2, 16), np.float32)}, "all but the number of pages"),
        ({"k": np.zeros((3, 4, 4, 2, 16), np.float16)}, "int8 or in the pool's dtype"),
        ({"v": np.zeros((3, 4, 4, 2, 16), np.int8)}, "int8 or in the pool's dtype"),
        ({"k_scale": np.zeros((3, 4, 4, 2), np.float32)}, "come with k_scale and v_scale"),
        (
            {name: np.zeros((3, 4, 4, 2, 16), np.int8) for name in ("k", "v")},
            "come with k_scale and v_scale",
        ),
    ],
)
def test_a_source_that_does_not_fit_is_refused(change, problem):
    random = np.random.default_rng(0)
    kv = pool_of(random, SMALL, "float32")
    source = source_of("pages", random, SMALL, "float32")
    assert source is not None
    source = dataclasses.replace(source, **change)
    plan = plan_of([(0, 0, 2, 20, 0)], 4)
    with pytest.raises(ValueError, match=problem):
        sparse_restore(kv, source, plan, rope=cases.ROPE)


def test_an_unfit_kernel_says_why():
    kv = pool_of(np.random.default_rng(0), SMALL, "float32")
    plan = plan_of([(0, 0, 2, 20, 0)], 4)
    with pytest.raises(NotImplementedError, match="heads of 16"):
        sparse_restore(kv, None, plan, rope=cases.ROPE, implementation="mosaic_gpu")
    bits = jax.tree.map(lambda x: x.astype("uint16"), kv)
    for implementation in ("mosaic_gpu", "mosaic_tpu"):
        with pytest.raises(NotImplementedError, match="bfloat16 and float32 pools, not uint16"):
            sparse_restore(bits, None, plan, rope=cases.ROPE, implementation=implementation)
    with pytest.raises(ValueError, match="implementation: 'cuda' is none of"):
        sparse_restore(kv, None, plan, rope=cases.ROPE, implementation="cuda")

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import cases
from tokendance_jax.kernels.decode_attention import decode_attention, mosaic_gpu
from tokendance_jax.kernels.decode_attention.mosaic_tpu import decode_attention_mosaic_tpu
from tokendance_jax.plan.buckets import Buckets
from tokendance_jax.plan.groups import group_tables, shared_block_cost
from tokendance_jax.plan.shapes import Shapes

SMALL = cases.HEADS[1]
PAGES = 200  # of every pool, so that all cases of a shape share one program
SEEDS = st.integers(0, 2**32 - 1)
ENDED = st.sets(st.integers(0, cases.LANES - 1))

program = jax.jit(
    functools.partial(decode_attention, rope=cases.ROPE),
    static_argnums=2,
    static_argnames="implementation",
)


def case_of(lanes, page_size):
    return cases.Case.of(lanes, pages=PAGES, page_size=page_size)


def split(case, cost=shared_block_cost):
    """The group tables of a case, and the rest of the lanes' tables."""
    shapes = Shapes(
        rows=Buckets(cases.ROWS, cases.ROWS),
        lanes=Buckets(cases.LANES, cases.LANES),
        entries=Buckets(*case.tables.page.shape[1:] * 2),
        pages=case.pages,
        page_size=case.page_size,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokendance_jax.plan.groups.shared_block_cost", cost)
        return group_tables(case.lanes, shapes)


def run(case, q, kv, position, cost=shared_block_cost):
    groups, tables = split(case, cost)
    return np.asarray(program(q, kv, cases.LAYER, position, tables, groups))


def check(case, heads, dtype, position, cost=shared_block_cost):
    """Compares poisoned pools with the reference on clean pools. Lanes at -1 must return zeros."""
    q = cases.queries(cases.LANES, heads)
    kv = cases.pool(case, heads, dtype)
    out = run(case, q, cases.poisoned(case, kv), position, cost)
    live = position >= 0
    lane = np.where(live, np.arange(cases.LANES, dtype=np.int32), np.int32(cases.LANES))
    cases.assert_close(out, cases.reference(case, q, kv, position, lane), dtype)
    assert not out[~live].any()


def base_round(page_size, tokens=544):
    """Six lanes that read most of one base in various frames, and one lane that does not."""
    base, fresh = range(1, 1 + tokens // page_size), iter(range(100, PAGES))
    lanes = []
    for agent in range(6):
        own = [(next(fresh), 0, 0, page_size) for _ in range(agent % 3 + 1)]
        frame = [0, 5, -7, 100_000, -100_000, 5][agent]
        shared = [(page, frame, 0, page_size) for page in base]
        shared[3 + agent] = (next(fresh), 0, 0, page_size)  # a patch
        # The last page shows other slots in every second lane; two lanes leave out two pages.
        shared[-1] = (base[-1], frame, agent % 2, page_size - 1)
        if agent > 3:
            shared = shared[2:]
        # Agent 0 has no private text, only the base and the slots of its answer.
        entries = [*own, *shared] if agent else shared
        lanes.append(cases.lane([*entries, (next(fresh), 0, 0, page_size)], 1, ahead=page_size - 1))
    lanes.append(cases.lane([(next(fresh), 0, 0, 5)], 1))
    return case_of(lanes, page_size)


def random_round(seed, page_size):
    """Lanes that hold random parts of two bases, in random order and random frames."""
    random = np.random.default_rng(seed)
    bases = (
        [(page, 0, page_size) for page in range(1, 25)],
        [(page, 1, 7) for page in range(20, 40)],
    )
    lanes, fresh = [], iter(range(40, PAGES))
    for _ in range(random.integers(2, cases.LANES + 1)):
        entries = []
        for base in range(random.integers(1, 3)):
            frame = int(random.choice([0, 0, 5, -5, 100_000, -9_000_000]))
            start, stop = sorted(random.integers(0, 25, 2).tolist())
            entries += [(p, frame, f, s) for p, f, s in bases[base][start : stop + 1]]
            entries += [(next(fresh), 0, 0, page_size) for _ in range(random.integers(0, 2))]
        entries.append((next(fresh), 0, 0, page_size))
        lanes.append(cases.lane(entries, 1, ahead=int(random.integers(0, page_size))))
    return case_of(lanes, page_size)


@pytest.mark.parametrize(("heads", "page_size", "dtype"), cases.COMBINATIONS, ids=str)
def test_equals_the_reference(heads, page_size, dtype):
    every_kind = case_of(cases.sharing(page_size).lanes, page_size)
    shared = base_round(page_size)
    assert split(shared)[0].count >= 2
    for case in (every_kind, shared):
        position = case.last_positions()
        assert (position == -1).any()
        check(case, heads, dtype, position)


@given(SEEDS, ENDED)
@settings(max_examples=7)
def test_random_lanes_equal_the_reference(seed, ended):
    case = case_of(cases.random_case(seed, page_size=16).lanes, 16)
    position = case.last_positions()
    position[list(ended)] = -1  # lanes that ended keep their tables
    check(case, SMALL, "float32", position)


@given(SEEDS, ENDED)
@settings(max_examples=10)
def test_random_groups_equal_the_reference(seed, ended):
    case = random_round(seed, page_size=16)
    position = case.last_positions()
    position[list(ended)] = -1
    # At no cost, all that two lanes hold is shared: key blocks with few members, and partial ones.
    check(case, SMALL, "float32", position, cost=lambda _: 0.0)


@given(SEEDS)
@settings(max_examples=5)
def test_a_frame_equals_keys_rotated_by_it(seed):
    # Positive, negative and large frames.
    case = case_of(cases.random_case(seed, page_size=16).lanes, 16)
    q, position = cases.queries(cases.LANES, SMALL), case.last_positions()
    kv = cases.pool(case, SMALL, "float32")
    moved, moved_kv = cases.rerotated(case, kv, PAGES)
    framed = run(case, q, kv, position, cost=lambda _: 0.0)
    cases.assert_close(framed, run(moved, q, moved_kv, position), "float32")


def test_lanes_outside_of_a_group_give_its_slots_no_weight():
    # The base's values are so large that even the smallest weight on them would show.
    case = base_round(16)
    q, position = cases.queries(cases.LANES, SMALL), case.last_positions()
    kv = cases.pool(case, SMALL, "float32")
    values = np.array(kv.v)
    values[:, 1:35] *= 1e30
    loud = dataclasses.replace(kv, v=values)
    outside = len(case.lanes) - 1
    quiet, noisy = (run(case, q, x, position)[outside] for x in (kv, loud))
    np.testing.assert_array_equal(quiet, noisy)
    assert quiet.any()


def test_lanes_that_see_only_shared_slots():
    case = base_round(16)
    case = dataclasses.replace(case, lanes=case.lanes[1:2] * 6)
    groups, tables = split(case)
    assert groups.count
    # Empty tables: no row has seen a slot of its own before the merge.
    tables = jax.tree.map(np.zeros_like, tables)
    q, position = cases.queries(cases.LANES, SMALL), case.last_positions()
    kv = cases.pool(case, SMALL, "float32")
    out = np.asarray(program(q, kv, cases.LAYER, position, tables, groups))
    assert np.isfinite(out).all()
    assert out[:6].any(axis=(1, 2)).all()
    assert not out[6:].any()


def test_nothing_live_gives_zeros():
    case = base_round(16)
    kv = cases.pool(case, SMALL, "float32")
    out = run(case, cases.queries(cases.LANES, SMALL), kv, np.full(cases.LANES, -1, np.int32))
    assert not out.any()


@pytest.mark.parametrize(
    "heads", [cases.Heads(14, 2, 64), cases.Heads(28, 4, 128), cases.Heads(40, 8, 128)], ids=str
)
def test_the_gpu_kernel_moves_little_more_than_it_must(heads):
    # 25 lanes that share 2,048 slots and have 256 slots each of their own.
    tokens = {"shared": 2048, "own": 25 * 256}
    queries = 4 * 25 * heads.heads * heads.head_dim
    pages = 4 * sum(tokens.values()) * heads.kv_heads * heads.head_dim
    steps = {name: count // mosaic_gpu.SLOTS for name, count in tokens.items()}
    numbers = 25, heads.heads, heads.kv_heads, heads.head_dim
    assert mosaic_gpu.parts_of(*numbers[:3], **steps) > 1
    beside = mosaic_gpu.bytes_beside_pages(*numbers, 16, **steps)
    assert 1 < (pages + beside) / (pages + 2 * queries) < 1.1
    # The bytes of pages limit the number of parts, but shared steps need at least one.
    assert mosaic_gpu.parts_of(*numbers[:3], shared=1, own=0) == 1
    assert mosaic_gpu.parts_of(*numbers[:3], shared=0, own=steps["own"]) == 0


@pytest.mark.parametrize(
    ("heads", "page_size", "blocks", "dtype"),
    [
        (cases.Heads(14, 2, 64), 16, 128, "uint16"),
        pytest.param(cases.Heads(10, 2, 128), 16, 16, "float32", marks=pytest.mark.sweep),
        pytest.param(cases.Heads(10, 2, 128), 32, 16, "uint16", marks=pytest.mark.sweep),
        pytest.param(cases.Heads(14, 2, 64), 32, 128, "float32", marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_the_gpu_kernel_equals_the_reference_without_races(
    heads, page_size, blocks, dtype, simulator, monkeypatch
):
    """Own steps form one part on a device of 16 cores, and several parts on one of 128."""
    monkeypatch.setattr(mosaic_gpu, "BLOCKS", blocks)
    monkeypatch.setattr(mosaic_gpu, "PARTS_SHARE", 1)
    case = base_round(page_size, tokens=320)
    groups, tables = split(case)
    assert groups.count
    own_parts = mosaic_gpu._most_parts(cases.LANES, heads.heads, heads.kv_heads)[1]
    assert own_parts == (4 if blocks == 128 else 1)
    counted = {"shared": int(groups.count) * 256 // mosaic_gpu.SLOTS, "own": 0}
    assert mosaic_gpu.parts_of(cases.LANES, heads.heads, heads.kv_heads, **counted) > 1
    position = case.last_positions()
    q = cases.queries(cases.LANES, heads)
    kv = cases.pool(case, heads, dtype)
    poisoned = cases.numbers_of(cases.poisoned(case, kv))
    out = jax.jit(
        functools.partial(decode_attention, rope=cases.ROPE, implementation="interpret"),
        static_argnums=2,
    )(q, poisoned, cases.LAYER, position, tables, groups)
    lane = np.where(position >= 0, np.arange(cases.LANES), cases.LANES).astype(np.int32)
    expected = cases.reference(case, q, kv, position, lane)
    cases.assert_close(np.asarray(out), expected, cases.on_tensor_cores(dtype))
    assert not np.asarray(out)[position < 0].any()
    assert not simulator.races()


@pytest.mark.parametrize(
    ("heads", "page_size", "dtype"),
    [
        (cases.Heads(14, 2, 64), 16, "uint16"),
        pytest.param(cases.Heads(8, 4, 128), 16, "float32", marks=pytest.mark.slow),
        pytest.param(cases.Heads(10, 2, 128), 32, "uint16", marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_the_tpu_kernel_equals_the_reference(heads, page_size, dtype):
    check_tpu(heads, page_size, dtype, True)


def test_the_tpu_kernel_has_no_races(tpu_simulator):
    check_tpu(cases.Heads(4, 2, 128), 16, "uint16", tpu_simulator.parameters)
    assert not tpu_simulator.races()


def check_tpu(heads, page_size, dtype, interpret):
    case = base_round(page_size)
    groups, tables = split(case)
    assert groups.count
    position = case.last_positions()
    q = cases.queries(cases.LANES, heads)
    kv = cases.pool(case, heads, dtype)
    poisoned = cases.numbers_of(cases.poisoned(case, kv))
    kernel = functools.partial(decode_attention_mosaic_tpu, rope=cases.ROPE, interpret=interpret)
    out = jax.jit(kernel, static_argnums=2)(q, poisoned, cases.LAYER, position, tables, groups)
    lane = np.where(position >= 0, np.arange(cases.LANES), cases.LANES).astype(np.int32)
    expected = cases.reference(case, q, kv, position, lane)
    cases.assert_close(np.asarray(out), expected, dtype)
    assert not np.asarray(out)[position < 0].any()

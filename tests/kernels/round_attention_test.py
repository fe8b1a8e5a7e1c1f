import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import cases
from tokendance_jax.kernels import flash_tpu
from tokendance_jax.kernels.lanes import TILE_ROWS, RowTiles
from tokendance_jax.kernels.round_attention import round_attention
from tokendance_jax.kernels.round_attention.mosaic_tpu import round_attention_mosaic_tpu
from tokendance_jax.kernels.round_attention.tpu_stretches import stretches

SMALL = cases.HEADS[1]
SEEDS = st.integers(0, 2**32 - 1)

program = jax.jit(
    functools.partial(round_attention, rope=cases.ROPE),
    static_argnums=2,
    static_argnames=("implementation", "with_lse"),
)


def run(case, q, kv, shared=None):
    arguments = q, kv, cases.LAYER, case.position, case.tables, case.tiles
    return np.asarray(program(*arguments, shared=shared))


def check(case, heads, dtype, shared=None):
    """Compares a pool with NaN in slots without tokens to the reference on a clean pool."""
    q = cases.queries(cases.ROWS, heads)
    kv = cases.pool(case, heads, dtype)
    out = run(case, q, cases.poisoned(case, kv), shared)
    cases.assert_close(out, cases.reference(case, q, kv, case.position, case.lane), dtype)
    assert not out[~case.used].any()


@pytest.mark.parametrize(("heads", "page_size", "dtype"), cases.COMBINATIONS, ids=str)
def test_equals_the_reference(heads, page_size, dtype):
    case = cases.sharing(page_size)
    assert (~case.used).any()
    check(case, heads, dtype)


@given(SEEDS)
@settings(max_examples=4)
def test_random_lanes_equal_the_reference(seed):
    check(cases.random_case(seed, page_size=16), SMALL, "float32")


@pytest.mark.parametrize(
    ("heads", "page_size", "dtype"),
    [
        (cases.HEADS[1], 16, "float32"),
        pytest.param(cases.HEADS[2], 32, "uint16", marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_rows_of_many_lanes_meet_what_these_share(heads, page_size, dtype):
    case = cases.tasks(page_size)
    shared = cases.share(case)
    assert shared.groups.count >= 2
    assert len(np.unique(shared.lane[shared.row < cases.ROWS])) == 6
    # Shared entries are missing from the lanes' own tables, yet rows see all of them.
    check(case, heads, dtype, shared)


@given(SEEDS)
@settings(max_examples=4)
def test_random_lanes_share_rows(seed):
    case = cases.random_case(seed, page_size=16)
    check(case, SMALL, "float32", cases.share(case, whatever=True))


@pytest.mark.parametrize("sharing", [True, pytest.param(False, marks=pytest.mark.sweep)])
def test_log_sum_exps_are_those_of_the_scores(sharing):
    case = cases.tasks(16)
    q = cases.queries(cases.ROWS, SMALL)
    kv = cases.pool(case, SMALL, "float32")
    arguments = q, kv, cases.LAYER, case.position, case.tables, case.tiles
    shared = cases.share(case) if sharing else None
    out, lse = program(*arguments, shared=shared, with_lse=True)
    np.testing.assert_allclose(lse, cases.log_sum_exps(case, q, kv), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(out, run(case, q, kv, shared))


@given(SEEDS)
@settings(max_examples=4)
def test_a_frame_equals_keys_rotated_by_it(seed):
    # Positive, negative and large frames.
    case = cases.random_case(seed, page_size=16)
    q = cases.queries(cases.ROWS, SMALL)
    kv = cases.pool(case, SMALL, "float32")
    moved, moved_kv = cases.rerotated(case, kv, pages=200)
    cases.assert_close(run(case, q, kv), run(moved, q, moved_kv), "float32")


@given(SEEDS)
@settings(max_examples=4)
def test_rows_may_stand_in_any_order(seed):
    case = cases.sharing(16)
    kv = cases.pool(case, SMALL, "float32")
    q = cases.queries(cases.ROWS, SMALL)
    in_order = run(case, q, kv)

    order = np.random.default_rng(seed).permutation(cases.ROWS).astype(np.int32)
    row, lane = np.full_like(case.tiles.row, cases.ROWS), np.zeros_like(case.tiles.lane)
    count = 0
    for index in range(len(case.lanes)):  # the rows of a lane, in their new order
        rows = np.flatnonzero(case.lane[order] == index)
        for start in range(0, len(rows), TILE_ROWS):
            part = rows[start : start + TILE_ROWS]
            row[count, : len(part)], lane[count] = part, index
            count += 1
    tiles = RowTiles(row, lane, np.asarray(count, np.int32))
    out = program(q[order], kv, cases.LAYER, case.position[order], case.tables, tiles)
    cases.assert_close(np.asarray(out), in_order[order], "float32")


def small_tiles(case, lanes, rows):
    """Tiles of up to `rows` rows of the given lanes, and one unused tile."""
    row, lane = [], []
    for index in lanes:
        own = np.flatnonzero(case.lane == index)
        for start in range(0, len(own), rows):
            part = own[start : start + rows]
            row.append(np.pad(part, (0, rows - len(part)), constant_values=cases.ROWS))
            lane.append(index)
    row.append(np.zeros(rows))
    return RowTiles(
        np.stack(row).astype(np.int32),
        np.array([*lane, 0], np.int32),
        np.array(len(lane), np.int32),
    )


# The simulator is slow. The sweep and the test of packed rows cover the other precision.
@pytest.mark.slow
@cases.swept(
    ("heads", "page_size", "dtype"),
    [(cases.Heads(6, 2, 64), 32, "float32"), (cases.Heads(10, 2, 128), 32, "uint16")],
)
def test_the_gpu_kernel_equals_the_reference_without_races(heads, page_size, dtype, simulator):
    case, lanes = cases.sharing(page_size), range(1, 6)
    tiles = small_tiles(case, lanes, 16)
    q = cases.queries(cases.ROWS, heads)
    kv = cases.pool(case, heads, dtype)
    poisoned = cases.numbers_of(cases.poisoned(case, kv))
    out = program(
        q,
        poisoned,
        cases.LAYER,
        case.position,
        case.tables,
        tiles,
        implementation="interpret",
    )
    lane = np.where(np.isin(case.lane, lanes), case.lane, cases.LANES)
    expected = cases.reference(case, q, kv, case.position, lane)
    cases.assert_close(np.asarray(out), expected, cases.on_tensor_cores(dtype))
    assert not simulator.races()


@pytest.mark.slow
@cases.swept(
    ("heads", "page_size", "dtype"),
    [(cases.Heads(6, 2, 64), 16, "uint16"), (cases.Heads(10, 2, 128), 16, "float32")],
)
def test_the_gpu_kernel_packs_rows_of_many_lanes(heads, page_size, dtype, simulator):
    case = cases.tasks(page_size, tokens=288)
    case = cases.Case.of(case.lanes[2:5], pages=case.pages, page_size=page_size)
    shared = cases.share(case, whatever=True)
    assert shared.groups.count
    # Keep only the tiles in use, and their first 64 rows: the simulator is slow.
    tiles = jax.tree.map(lambda x: x[: int(shared.tiles.count)] if x.ndim else x, shared.tiles)
    row = np.where(tiles.row < cases.ROWS, tiles.row, cases.ROWS)[:, :64]
    shared = dataclasses.replace(shared, tiles=dataclasses.replace(tiles, row=row))
    q = cases.queries(cases.ROWS, heads)
    kv = cases.pool(case, heads, dtype)
    poisoned = cases.numbers_of(cases.poisoned(case, kv))
    arguments = q, poisoned, cases.LAYER, case.position, case.tables, case.tiles
    out, lse = program(*arguments, shared=shared, with_lse=True, implementation="interpret")
    expected = cases.reference(case, q, kv, case.position, case.lane)
    cases.assert_close(np.asarray(out), expected, cases.on_tensor_cores(dtype))
    atol = 2e-2 if dtype == "uint16" else 1e-4
    np.testing.assert_allclose(lse, cases.log_sum_exps(case, q, kv), rtol=0, atol=atol)
    assert not simulator.races()


@pytest.mark.slow
@cases.swept(
    ("heads", "page_size", "dtype"),
    [
        (cases.Heads(8, 4, 128), 16, "float32"),
        (cases.Heads(14, 2, 64), 16, "uint16"),
        (cases.Heads(10, 2, 128), 32, "uint16"),
    ],
)
def test_the_tpu_kernel_equals_the_reference(heads, page_size, dtype):
    case = cases.sharing(page_size)
    q = cases.queries(cases.ROWS, heads)
    kv = cases.pool(case, heads, dtype)
    poisoned = cases.numbers_of(cases.poisoned(case, kv))
    kernel = functools.partial(round_attention_mosaic_tpu, rope=cases.ROPE, interpret=True)
    out = jax.jit(kernel, static_argnums=2)(
        q, poisoned, cases.LAYER, case.position, case.tables, case.tiles
    )
    cases.assert_close(
        np.asarray(out), cases.reference(case, q, kv, case.position, case.lane), dtype
    )
    assert not np.asarray(out)[~case.used].any()


@pytest.mark.slow
def test_the_tpu_kernel_gives_log_sum_exps():
    run_on_tpu(cases.tasks(16), cases.Heads(14, 2, 64), "uint16", None)


def run_on_tpu(case, heads, dtype, shared, interpret=True):
    """Checks the TPU kernel's outputs and log-sum-exps; packs rows unless `shared` is None."""
    q = cases.queries(cases.ROWS, heads)
    kv = cases.pool(case, heads, dtype)
    poisoned = cases.numbers_of(cases.poisoned(case, kv))
    arguments = q, poisoned, cases.LAYER, case.position, case.tables, case.tiles
    out, lse = tpu_kernel(interpret)(*arguments, shared=shared)
    expected = cases.reference(case, q, kv, case.position, case.lane)
    cases.assert_close(np.asarray(out), expected, dtype)
    atol = 2e-2 if dtype == "uint16" else 1e-4
    np.testing.assert_allclose(lse, cases.log_sum_exps(case, q, kv), rtol=0, atol=atol)
    assert not np.asarray(out)[~case.used].any()


@functools.cache
def tpu_kernel(interpret):
    options = {"rope": cases.ROPE, "with_lse": True, "interpret": interpret}
    return jax.jit(functools.partial(round_attention_mosaic_tpu, **options), static_argnums=2)


@cases.swept(
    ("heads", "page_size", "dtype"),
    [
        (cases.Heads(14, 2, 64), 16, "uint16"),
        (cases.Heads(10, 2, 128), 32, "uint16"),
        (cases.Heads(8, 4, 128), 8, "float32"),
    ],
)
@pytest.mark.slow
def test_the_tpu_kernel_packs_rows_of_many_lanes(heads, page_size, dtype):
    case = cases.tasks(page_size)
    shared = cases.share(case)
    assert shared.groups.count >= 2
    run_on_tpu(case, heads, dtype, shared)


@pytest.mark.slow
@cases.swept("page_size", [(16,), (4,)])
@given(SEEDS)
@settings(max_examples=4)
def test_the_tpu_kernel_packs_rows_of_random_lanes(page_size, seed):
    case = cases.random_case(seed, page_size=page_size)
    run_on_tpu(case, SMALL, "float32", cases.share(case, whatever=True))


@pytest.mark.slow
def test_the_tpu_kernel_leaves_packing_aside_where_smem_is_full(monkeypatch):
    case = cases.tasks(16)
    shared = cases.share(case)
    arguments = cases.LAYER, jnp.asarray(case.position), case.tables, case.tiles
    alone, together = (
        flash_tpu.table_bytes(stretches(*arguments, x, 16)[0]) for x in (None, shared)
    )
    assert alone < together
    monkeypatch.setattr(flash_tpu, "TABLE_BYTES", alone)
    run_on_tpu(case, cases.Heads(6, 2, 64), "uint16", shared)


@pytest.mark.slow
def test_the_tpu_kernel_has_no_races(tpu_simulator):
    case, heads = cases.sharing(16), cases.Heads(4, 2, 128)
    lanes = range(1, 6)
    q = cases.queries(cases.ROWS, heads)
    kv = cases.pool(case, heads, "uint16")
    poisoned = cases.numbers_of(cases.poisoned(case, kv))
    kernel = functools.partial(
        round_attention_mosaic_tpu, rope=cases.ROPE, interpret=tpu_simulator.parameters
    )
    tiles = small_tiles(case, lanes, 16)
    out = jax.jit(kernel, static_argnums=2)(
        q, poisoned, cases.LAYER, case.position, case.tables, tiles
    )
    lane = np.where(np.isin(case.lane, lanes), case.lane, cases.LANES)
    expected = cases.reference(case, q, kv, case.position, lane)
    cases.assert_close(np.asarray(out), expected, "uint16")
    assert not tpu_simulator.races()


def test_the_tpu_kernel_packs_rows_without_races(tpu_simulator):
    case = cases.tasks(16)
    case = cases.Case.of(case.lanes[2:5], pages=case.pages, page_size=16)
    shared = cases.share(case, whatever=True)
    assert shared.groups.count
    run_on_tpu(case, cases.Heads(4, 2, 128), "uint16", shared, tpu_simulator.parameters)
    assert not tpu_simulator.races()


@pytest.mark.parametrize(
    ("heads", "dtype", "message"),
    [
        (cases.HEADS[1], "float32", "heads of 64 or 128"),
        (cases.HEADS[0], "float16", "bfloat16 and float32"),
    ],
)
def test_the_gpu_kernel_says_what_it_takes(heads, dtype, message):
    case = cases.sharing(16)
    kv = jax.tree.map(lambda x: x.astype(dtype), cases.pool(case, heads, "float32"))
    q = cases.queries(cases.ROWS, heads)
    arguments = q, kv, cases.LAYER, case.position, case.tables, case.tiles
    with pytest.raises(NotImplementedError, match=message):
        program(*arguments, implementation="mosaic_gpu")

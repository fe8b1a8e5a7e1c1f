import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.decoder import tiny
from tokendance_jax.engine import programs as device
from tokendance_jax.engine.compiling import Programs
from tokendance_jax.kernels.lanes import KEY_BLOCK, TILE_ROWS
from tokendance_jax.paged import PagePool, PrefixCache
from tokendance_jax.plan.buckets import Buckets
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.plan.round_plan import lane_tables, pack
from tokendance_jax.plan.shapes import Shapes
from tokendance_jax.plan.tiles import row_tiles
from tokendance_jax.policy.exact import Prefix

PAGE_SIZE = 16
BLOCK = KEY_BLOCK // PAGE_SIZE
# Budgets that are powers of two, and one that is not.
ROW_BUCKETS = st.sampled_from([Buckets(8, 64), Buckets(8, 100), Buckets(64, 1024)])


@st.composite
def rounds(draw):
    """Draws lanes that read pages of others in several frames and compute some rows of their own
    pages, always including the last token."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lanes, page = [], 20  # pages 1 .. 19 are read by everybody
    for _ in range(draw(st.integers(1, 6))):
        entries, mine = [], []
        for _ in range(random.integers(1, 12)):
            own = random.random() < 0.5
            first = int(random.integers(0, PAGE_SIZE))
            slots = int(random.integers(1, PAGE_SIZE - first + 1))
            source = page if own else int(random.integers(1, 20))
            page += own
            entries.append((source, int(random.choice([0, 5, -100])), first, slots))
            mine += [own] * slots
        entries.append((page, 0, 0, PAGE_SIZE))
        mine += [True] * PAGE_SIZE
        page += 1
        ahead = int(random.integers(0, PAGE_SIZE))
        position = np.flatnonzero(mine[: len(mine) - ahead])
        kept = random.random(len(position)) < random.choice([0.2, 1.0])
        kept[-1] = True
        tokens = random.integers(0, 1000, len(mine) - ahead).astype(np.int32)
        columns = np.array(entries, np.int32).T
        base = np.zeros(len(entries), np.int32)
        lanes.append(LanePlan(tokens, position[kept].astype(np.int32), *columns, base=base))
    shapes = Shapes(
        rows=draw(ROW_BUCKETS),
        lanes=Buckets(2, 6),
        entries=Buckets(4 * BLOCK, 16 * BLOCK),
        pages=page,
        page_size=PAGE_SIZE,
    )
    return lanes, shapes


def computed_rows(lanes):
    """Yields (lane, token, position, slot, canonical) of every computed row, from the entries."""
    for index, lane in enumerate(lanes):
        where = [
            (page * PAGE_SIZE + offset, frame)
            for page, frame, first, slots in zip(
                lane.page, lane.frame, lane.first, lane.slots, strict=True
            )
            for offset in range(first, first + slots)
        ]
        for position in lane.computed.tolist():
            slot, frame = where[position]
            yield index, lane.token_ids[position], position, slot, position - frame


@given(rounds())
def test_every_row_is_computed_once_in_lane_order(case):
    lanes, shapes = case
    plans = pack(lanes, shapes)
    found = []
    for plan in plans:
        rows, used = plan.rows, plan.lane < plan.tables.page.shape[0]
        assert int(plan.used) == used.sum() == np.flatnonzero(used)[-1] + 1
        columns = (plan.lane, rows.token, rows.position, rows.slot, rows.canonical)
        found += zip(*(column[used].tolist() for column in columns), strict=True)
        count = int(used.sum())
        assert used[:count].all()  # padding comes last
        assert (rows.slot[~used] == shapes.no_slot).all()
    assert found == list(computed_rows(lanes))
    slots = [slot for *_, slot, _ in found]
    assert len(set(slots)) == len(slots)
    assert PAGE_SIZE <= min(slots) <= max(slots) < shapes.pages * PAGE_SIZE == shapes.no_slot


@given(rounds())
def test_each_lane_ends_once(case):
    lanes, shapes = case
    ends = []
    for plan in pack(lanes, shapes):
        rows = len(plan.lane)
        for lane in np.flatnonzero(plan.out_row < rows):
            row = plan.out_row[lane]
            assert plan.lane[row] == lane
            assert plan.rows.position[row] == len(lanes[lane].token_ids) - 1
            ends.append(int(lane))
        assert (plan.out_row[len(lanes) :] == rows).all()
    assert sorted(ends) == list(range(len(lanes)))


@given(rounds())
def test_all_shapes_are_buckets(case):
    lanes, shapes = case
    plans = pack(lanes, shapes)
    assert [len(plan.lane) for plan in plans] == shapes.rows.cover(len(list(computed_rows(lanes))))
    for plan in plans:
        rows, (lane_count, entries) = len(plan.lane), plan.tables.page.shape
        assert rows in shapes.rows.sizes
        assert lane_count in shapes.lanes.sizes
        assert entries in shapes.entries.sizes
        assert plan.out_row.shape == (lane_count,)
        assert plan.tiles.row.shape == (-(-rows // TILE_ROWS) + 2 * lane_count, TILE_ROWS)


@given(rounds())
def test_tiles_hold_each_row_once_and_one_lane_each(case):
    for plan in pack(*case):
        rows, count = len(plan.lane), int(plan.tiles.count)
        used = np.flatnonzero(plan.lane < plan.tables.page.shape[0])
        held = plan.tiles.row[plan.tiles.row < rows]
        np.testing.assert_array_equal(np.sort(held), used)
        assert (plan.tiles.row[count:] == rows).all()
        for row, lane in zip(plan.tiles.row[:count], plan.tiles.lane[:count], strict=True):
            assert (plan.lane[row[row < rows]] == lane).all()
            assert (row < rows).any()


def test_tiles_do_not_reach_across_a_gap_that_takes_a_key_block():
    wide, narrow = KEY_BLOCK + 1, KEY_BLOCK
    gaps = np.array([1, 1, wide, 1, 1, narrow, 1, wide - 1, 1])
    position = np.concatenate([[3], 3 + np.cumsum(gaps)]).astype(np.int32)
    lane = np.array([0] * 5 + [1] * 5, np.int32)
    tiles = row_tiles(lane, position, rows=16, lanes=2)
    held = [row[row < 16].tolist() for row in tiles.row[: int(tiles.count)]]
    assert held == [[0, 1, 2], [3, 4], [5, 6, 7, 8, 9]]
    assert tiles.lane[: int(tiles.count)].tolist() == [0, 0, 1]
    whole = row_tiles(lane, rows=16, lanes=2)
    assert int(whole.count) == 2


@given(rounds())
def test_tables_are_those_of_the_lanes(case):
    lanes, shapes = case
    tables = lane_tables(lanes, shapes)
    stacked = np.stack([tables.page, tables.frame, tables.first, tables.slots, tables.start])
    for index, lane in enumerate(lanes):
        table = lane.table(BLOCK)
        np.testing.assert_array_equal(stacked[:, index, : table.shape[1]], table)
        stacked[:, index, : table.shape[1]] = 0
    assert not stacked.any()


def test_chunks_in_order_give_the_logits_of_one_call():
    model = tiny.tiny_model()
    common = tiny.tokens(70)
    prompts = [np.concatenate([common, tiny.tokens(n, seed=n)]) for n in (90, 1, 33)]
    logits, calls = [], []
    for row_budget in (256, 64):
        programs = Programs(model, tiny.tiny_shapes(row_budget))
        pool = PagePool(64)
        policy = Prefix(pool, PrefixCache(pool, PAGE_SIZE, ""), PAGE_SIZE)
        lanes = [policy.open_lane(prompt, 0) for prompt in prompts]
        runner, hidden = tiny.prefill(programs, lanes)
        logits.append(np.asarray(runner.run(device.logits, hidden))[: len(lanes)])
        calls.append(len(pack(lanes, programs.shapes)))
    # The second and third lanes read pages that the first lane writes: in the same call, or two
    # calls earlier.
    assert calls == [1, 4]
    assert np.abs(logits[0]).max() > 1
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=1e-4)


@given(st.integers(1, 4000), st.integers(1, 300), st.integers(1, 5000), st.integers(2, 900))
@settings(max_examples=20)
def test_shapes_hold_what_they_are_made_for(row_budget, max_lanes, max_tokens, pages):
    shapes = Shapes.of(
        row_budget=row_budget,
        max_lanes=max_lanes,
        max_tokens=max_tokens,
        pages=pages,
        page_size=PAGE_SIZE,
    )
    assert (shapes.rows.budget, shapes.lanes.budget) == (row_budget, max_lanes)
    assert shapes.entries.budget * PAGE_SIZE >= max_tokens
    assert all(entries % BLOCK == 0 for entries in shapes.entries.sizes)

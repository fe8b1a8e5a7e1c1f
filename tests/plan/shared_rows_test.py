import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plan.groups_test import own_entries, shared_entries, slots_of, whole_entries
from tokendance_jax.kernels.lanes import KEY_BLOCK
from tokendance_jax.plan.buckets import Buckets
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.plan.round_plan import blank_plan, pack
from tokendance_jax.plan.shapes import PACKING, Shapes
from tokendance_jax.plan.tiles import row_tiles

PAGE_SIZE = 64
WIDTH = KEY_BLOCK // PAGE_SIZE
LANES, ROWS = 8, 256


def shapes_of(platform="gpu"):
    return Shapes(
        rows=Buckets(ROWS, ROWS),
        lanes=Buckets(LANES, LANES),
        entries=Buckets(64 * WIDTH, 64 * WIDTH),
        pages=10_000,
        page_size=PAGE_SIZE,
        packing=PACKING[platform],
    )


def lane_of(own, base, task, *, patch=()):
    """Returns a lane of `own` computed tokens, the base pages, and `task` computed tokens."""
    pages, page = [], 1000 * (1 + own)
    for tokens, computed in ((own, True), (0, False), (task, True)):
        if not computed:
            pages += [
                (page + 500 + shown if shown in patch else shown, own, 0, PAGE_SIZE, False)
                for shown in base
            ]
        while tokens:
            slots, page = min(tokens, PAGE_SIZE), page + 1
            pages.append((page, 0, 0, slots, True))
            tokens -= slots
    computed = np.concatenate([np.full(slots, mine) for *_, slots, mine in pages])
    columns = np.array([entry[:4] for entry in pages], np.int32).T
    position = np.flatnonzero(computed).astype(np.int32)
    tokens = np.zeros(len(computed), np.int32)
    return LanePlan(tokens, position, *columns, base=np.zeros_like(columns[0]))


def plans_of(lanes, platform="gpu"):
    """Yields each plan with its shared rows."""
    for plan in pack(lanes, shapes_of(platform)):
        assert plan.shared is not None
        yield plan, plan.shared


def packed(shared):
    """Returns the number of packed rows by lane, for lanes that have some."""
    used = shared.row < ROWS
    return Counter(shared.lane[used].tolist())


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_short_ends_of_lanes_meet_their_base_together(platform):
    base = range(1, 33)
    lanes = [lane_of(3 + index, base, 9, patch=[index + 1]) for index in range(5)]
    ((_, shared),) = plans_of(lanes, platform)
    assert packed(shared) == dict.fromkeys(range(5), 9)
    # Each lane shares all base pages except the one that it patches.
    held = shared.groups.member.sum(axis=(0, 2))
    assert (held[:5] == 31).all()
    assert not held[5:].any()


@pytest.mark.parametrize(
    "lanes",
    [
        # One lane.
        [lane_of(3, range(1, 33), 9)],
        # Each lane has another base.
        [lane_of(3 + index, range(40 * index + 1, 40 * index + 33), 9) for index in range(5)],
        # The rows of each lane fill whole tiles: packing saves nothing.
        [lane_of(3 + index, range(1, 33), 16) for index in range(3)],
        # Too little is shared to pay for reading queries twice.
        [lane_of(3, [1, 2], 9), lane_of(4, [1, 2], 9)],
        # The ends of lanes are too long.
        [lane_of(3 + index, range(1, 33), PACKING["gpu"].most + 1) for index in range(3)],
        # No base lies in front of the rows.
        [lane_of(9 + index, [], 9) for index in range(5)],
    ],
    ids=["alone", "others", "full", "little", "long", "nothing"],
)
def test_what_does_not_pay_is_not_shared(lanes):
    for plan, shared in plans_of(lanes):
        assert not packed(shared)
        assert not shared.groups.count
        lanes = len(plan.tables.page)
        lane = np.asarray(plan.lane)
        whole = row_tiles(lane[lane < lanes], rows=len(lane), lanes=lanes)
        np.testing.assert_array_equal(shared.tiles.count, whole.count)
        assert shared.tiles.lane.max() < lanes


@st.composite
def rounds(draw):
    """Draws lanes that show most of one base behind private text, with tasks of several lengths."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lanes = []
    for index in range(random.integers(1, LANES + 1)):
        base = np.arange(1, 33)[random.random(32) < 0.9].tolist()
        task = int(random.choice([1, 5, 9, 12, 30, 80]))
        lanes.append(lane_of(3 + index, base, task, patch=random.integers(1, 33, 2).tolist()))
    return lanes


def test_a_lane_that_fills_the_smallest_tile_is_not_packed_on_a_tpu():
    lanes = [lane_of(3 + index, range(1, 33), 32) for index in range(5)]
    ((_, shared),) = plans_of(lanes, "tpu")
    assert not packed(shared)


def test_xla_code_packs_long_ends_but_not_in_small_calls():
    lanes = [lane_of(3 + index, range(1, 33), 60) for index in range(5)]
    shapes = dataclasses.replace(shapes_of("cpu"), rows=Buckets(64, ROWS))
    large, small = pack(lanes, shapes)
    assert large.shared is not None
    # The call ends within the fourth lane: each lane also has 3 to 6 rows in front of the base.
    assert packed(large.shared) == {0: 60, 1: 60, 2: 60, 3: 58}
    assert len(small.lane) < ROWS
    assert small.shared is None
    # Four lanes would fill two packed tiles, which take as long as one tile for each lane.
    large, _ = pack([lane_of(3 + index, range(1, 33), 80) for index in range(4)], shapes)
    assert large.shared is not None
    assert not packed(large.shared)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@given(lanes=rounds())
@settings(max_examples=15)
def test_rows_see_what_their_lane_holds(platform, lanes):
    rows_of = Counter()
    for plan, shared in plans_of(lanes, platform):
        rows = len(plan.lane)
        tables, tiles, count = shared.tables, shared.tiles, int(shared.tiles.count)
        in_lanes = packed(shared)
        member = shared.groups.member
        assert set(np.flatnonzero(member.any(axis=(0, 2)))) == set(in_lanes)
        # An entry of the groups is used if and only if some lane holds it.
        np.testing.assert_array_equal(member.any(axis=1), shared.groups.slots > 0)
        for index, lane in enumerate(lanes):
            whole = whole_entries(lane)
            assert own_entries(tables, index) == whole
            if not in_lanes[index]:
                continue
            together = shared_entries(shared.groups, index)
            rest = own_entries(tables, index + LANES)
            held = slots_of(together) + slots_of(entry[:4] for entry in rest)
            assert Counter(held) == Counter(slots_of(entry[:4] for entry in whole))
            # Shared entries end before the first packed row, so no later call writes them.
            stop = {tuple(entry[:4]): entry[4] + entry[3] for entry in whole}
            mine = shared.row[(shared.row < rows) & (shared.lane == index)]
            first = plan.rows.position[mine].min()
            assert all(stop[page, frame, at, n] <= first for page, frame, at, n in together)
        # Every row is in one tile. Packed rows are in tiles of lanes in the second half.
        found = [row[row < rows] for row in tiles.row[:count]]
        used = np.flatnonzero(plan.lane < LANES)
        np.testing.assert_array_equal(np.sort(np.concatenate(found)), used)
        for row, lane in zip(found, tiles.lane, strict=False):
            np.testing.assert_array_equal(plan.lane[row], lane % LANES)
            np.testing.assert_array_equal(np.isin(row, shared.row), lane >= LANES)
        rows_of.update(plan.lane[used].tolist())
    assert rows_of == {index: len(lane.computed) for index, lane in enumerate(lanes)}


def test_shapes_do_not_depend_on_what_is_shared():
    shapes = shapes_of()
    blank = blank_plan(rows=ROWS, lanes=LANES, seats=LANES, entries=64 * WIDTH, shapes=shapes)
    some = [lane_of(3 + index, range(1, 33), 9) for index in range(5)]
    for lanes in (some, some[:1]):
        (plan,) = pack(lanes, shapes)
        assert jax.tree.map(np.shape, plan) == jax.tree.map(np.shape, blank)

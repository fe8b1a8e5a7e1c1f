from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokendance_jax.kernels.lanes import KEY_BLOCK
from tokendance_jax.plan.buckets import Buckets
from tokendance_jax.plan.groups import group_tables, shared_block_cost
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.plan.round_plan import lane_tables
from tokendance_jax.plan.shapes import Shapes

PAGE_SIZE = 64
WIDTH = KEY_BLOCK // PAGE_SIZE
SEEDS = st.integers(0, 2**32 - 1)


def shapes_of(*, lanes=8, least=4 * WIDTH):
    return Shapes(
        rows=Buckets(64, 64),
        lanes=Buckets(min(4, lanes), lanes),
        entries=Buckets(least, 512),
        pages=10_000,
        page_size=PAGE_SIZE,
    )


def lane_of(entries, ahead=0):
    """Returns a lane of entries (page, frame, first, slots) with room for `ahead` answer tokens."""
    page, frame, first, slots = np.array(entries, np.int32).reshape(-1, 4).T
    tokens = np.zeros(int(slots.sum()) - ahead, np.int32)
    last = np.array([len(tokens) - 1], np.int32)
    return LanePlan(tokens, last, page, frame, first, slots, base=np.zeros_like(page))


def random_lanes(seed):
    """Returns lanes that hold most pages of one run, each lane with its own frames and gaps."""
    random = np.random.default_rng(seed)
    run = [(page, 0, PAGE_SIZE) for page in range(1, random.integers(2, 30))]
    # Some pages are cut into several entries, or have slots that no lane holds.
    for page in random.integers(1, len(run) + 1, 3).tolist():
        cut = int(random.integers(1, PAGE_SIZE - 1))
        parts = [(page, 0, cut), (page, cut, PAGE_SIZE - cut), (page, 1, cut)]
        run[page - 1 : page] = parts[: random.integers(1, 4)]
    lanes, fresh = [], iter(range(100, 10_000))
    for _ in range(random.integers(1, 9)):
        entries, frame = [], int(random.choice([0, 3, 500]))
        order = run if random.random() < 0.8 else [run[i] for i in random.permutation(len(run))]
        for page, first, slots in order:
            chance = random.random()
            if chance < 0.1:  # a patch
                entries.append((next(fresh), 0, first, slots))
            elif chance < 0.2:  # left out
                frame -= slots
            else:
                entries.append((page, frame, first, slots))
        if random.random() < 0.2:  # repeats the beginning of the run
            entries += [(page, 9_000, first, slots) for page, first, slots in run[:5]]
        own = [(next(fresh), 0, 0, PAGE_SIZE) for _ in range(random.integers(1, 4))]
        before = int(random.integers(0, len(own)))
        entries = [*own[:before], *entries, *own[before:]]
        lanes.append(lane_of(entries, ahead=int(random.integers(0, PAGE_SIZE))))
    return lanes


def slots_of(entries):
    """Returns (slot, frame) of every slot of entries (page, frame, first, slots)."""
    return [
        (page * PAGE_SIZE + offset, frame)
        for page, frame, first, slots in entries
        for offset in range(first, first + slots)
    ]


def shared_entries(groups, lane):
    """Returns the entries (page, frame, first, slots) that a lane holds in the groups."""
    block, place = np.nonzero(groups.member[:, lane])
    frame = groups.frame[block, lane]
    at = groups.page[block, place], frame, groups.first[block, place], groups.slots[block, place]
    return np.stack(at, axis=1).tolist()


def own_entries(tables, lane):
    """Returns the entries (page, frame, first, slots, start) of a lane's own table, in order."""
    rows = np.stack([tables.page, tables.frame, tables.first, tables.slots, tables.start])[:, lane]
    return rows[:, rows[3] > 0].T.tolist()


def whole_entries(lane):
    start = np.cumsum(lane.slots) - lane.slots
    return np.stack([lane.page, lane.frame, lane.first, lane.slots, start], axis=1).tolist()


def check(lanes, shapes, cost=shared_block_cost):
    """Splits lanes into groups and own tables, and asserts what must hold for every split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokendance_jax.plan.groups.shared_block_cost", cost)
        groups, tables = group_tables(lanes, shapes)
    for index, lane in enumerate(lanes):
        shared, own = shared_entries(groups, index), own_entries(tables, index)
        whole = whole_entries(lane)
        held = slots_of(shared) + slots_of(entry[:4] for entry in own)
        assert Counter(held) == Counter(slots_of(entry[:4] for entry in whole))
        # The remaining entries keep the table's order and their logical positions.
        left = iter(whole)
        assert all(entry in left for entry in own)
        prompt = {slot for slot, _ in slots_of(entry[:4] for entry in whole)[: len(lane.token_ids)]}
        assert all(slot in prompt for slot, _ in slots_of(shared))
    # The shapes are those of the whole tables.
    whole = lane_tables(lanes, shapes).page.shape
    assert {array.shape for array in (tables.page, tables.start, tables.slots)} == {whole}
    blocks = whole[1] // WIDTH
    assert groups.page.shape == groups.first.shape == groups.slots.shape == (blocks, WIDTH)
    assert groups.frame.shape == (blocks, whole[0])
    assert groups.member.shape == (blocks, whole[0], WIDTH)
    # Every shared block saves at least what it costs, and unused blocks are empty.
    count = int(groups.count)
    assert (groups.slots > 0).tolist() == groups.member.any(axis=1).tolist()
    assert groups.member[:count].any(axis=(1, 2)).all()
    assert not groups.slots[count:].any()
    assert not groups.page[groups.slots == 0].any()
    holders = groups.member[:count].any(axis=2).sum(axis=1)
    assert (holders >= cost(whole[0])).all()
    # Each key block of a table has one frame, and empty blocks come last.
    by_block = tables.frame.reshape(whole[0], blocks, WIDTH)
    assert (by_block == by_block[:, :, :1]).all()
    used = tables.slots.reshape(whole[0], blocks, WIDTH)
    assert (used[:, :, 0] > 0).tolist() == used.any(axis=2).tolist()
    assert (np.diff((used[:, :, 0] > 0).astype(int), axis=1) <= 0).all()
    return groups, tables


@given(SEEDS)
@settings(max_examples=40)
def test_groups_and_rest_hold_every_slot_once(seed):
    check(random_lanes(seed), shapes_of())


@given(SEEDS)
@settings(max_examples=20)
def test_whatever_several_lanes_hold_may_be_shared(seed):
    lanes = random_lanes(seed)
    groups, _ = check(lanes, shapes_of(least=512), cost=lambda _: 0.0)
    prompts = [Counter(), Counter()]
    for index, lane in enumerate(lanes):
        for page, _, first, slots, start in whole_entries(lane):
            if start + slots <= len(lane.token_ids):
                prompts[0][page, first, slots, index] += 1
        for page, _, first, slots in shared_entries(groups, index):
            prompts[1][page, first, slots, index] += 1
    # A lane shares an entry as many times as some other lane holds it too.
    for page, first, slots, index in prompts[0]:
        others = [prompts[0][page, first, slots, j] for j in range(len(lanes)) if j != index]
        often = min(prompts[0][page, first, slots, index], max(others, default=0))
        assert prompts[1][page, first, slots, index] == often


@given(SEEDS)
@settings(max_examples=15)
def test_the_same_lanes_give_the_same_tables(seed):
    lanes = random_lanes(seed)
    first, second = (group_tables(lanes, shapes_of()) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        for name in vars(a):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def usual_lanes(agents, pages):
    """Returns lanes of agents that see the same pages behind three or four private pages."""
    lanes, fresh = [], iter(range(1000, 10_000))
    for agent in range(agents):
        own = [(next(fresh), 0, 0, PAGE_SIZE) for _ in range(3 + agent % 2)]
        shared = [(page, (2 + agent % 2) * PAGE_SIZE, 0, PAGE_SIZE) for page in range(1, pages + 1)]
        lanes.append(lane_of([*own[:-1], *shared, own[-1]], ahead=5))
    return lanes


def test_agents_with_the_same_pages_share_full_blocks():
    groups, tables = check(usual_lanes(25, 50), shapes_of(lanes=32))
    assert groups.count == 13
    assert groups.page.reshape(-1)[:50].tolist() == list(range(1, 51))
    assert groups.member[:12, :25].all()
    assert not groups.member[:, 25:].any()
    assert (groups.frame[:13] == groups.frame[:1]).all()  # queries are rotated once
    # The private pages before and behind the run now lie in one key block.
    used = (tables.slots.reshape(32, -1, WIDTH) > 0).any(axis=2)
    assert used.sum(axis=1).tolist() == [1] * 25 + [0] * 7


def test_patched_pages_do_not_cut_blocks():
    lanes = usual_lanes(8, 16)
    for agent, lane in enumerate(lanes):
        lane.page[2 + agent % 2 + agent] = 500 + agent  # a patch in place of page agent + 1
        lane.frame[2 + agent % 2 + agent] = 0
    groups, _ = check(lanes, shapes_of())
    assert groups.count == 4
    assert groups.member.sum() == 8 * 16 - 8


def test_a_frame_that_changes_in_another_block_cuts_none():
    # The last lane leaves out page 5: its frame changes where the second block begins.
    run = [(page, 7, 0, PAGE_SIZE) for page in range(1, 9)]
    gap = [*run[:4], *((page, 7 - PAGE_SIZE, 0, PAGE_SIZE) for page in range(6, 9))]
    groups, _ = check([*(lane_of(run) for _ in range(7)), lane_of(gap)], shapes_of())
    assert groups.count == 2
    assert groups.frame[:2, 7].tolist() == [7, 7 - PAGE_SIZE]


def test_what_few_lanes_hold_stays_with_them():
    shapes = shapes_of(lanes=32)
    few = int(shared_block_cost(32)) - 1
    lanes = [*usual_lanes(few, 16), *(lane_of([(2000 + i, 0, 0, 9)]) for i in range(20))]
    groups, tables = check(lanes, shapes)
    assert groups.count == 0
    whole = lane_tables(lanes, shapes)
    for name in vars(whole):
        np.testing.assert_array_equal(getattr(tables, name), getattr(whole, name))


def test_no_more_blocks_than_the_bucket_holds():
    # Three sets of lanes with 12 pages each need more blocks than a table of 16 entries has.
    lanes = []
    for agents, pages in ((6, range(1, 13)), (8, range(21, 33)), (7, range(41, 53))):
        lanes += [lane_of([(page, 7, 0, PAGE_SIZE) for page in pages], 0) for _ in range(agents)]
    groups, _ = check(lanes, shapes_of(lanes=32), cost=lambda _: 1.0)
    assert groups.count == 4  # 16 entries
    # The blocks that save most are those of the larger sets.
    assert set(groups.page[groups.slots > 0].tolist()) == {*range(21, 33), *range(41, 45)}


def test_only_written_slots_are_shared():
    # The prompt ends within the second page; the third page is room for the answer.
    entries = [(page, 0, 0, PAGE_SIZE) for page in (1, 2, 3)]
    groups, _ = check([lane_of(entries, ahead=PAGE_SIZE + 1) for _ in range(8)], shapes_of())
    assert groups.page[groups.slots > 0].tolist() == []
    groups, _ = check([lane_of(entries[:1] * 4 + entries, PAGE_SIZE + 1)] * 8, shapes_of())
    assert groups.page[groups.slots > 0].tolist() == [1] * 4


def test_more_lanes_or_entries_than_buckets_are_refused():
    with pytest.raises(ValueError, match="budget"):
        group_tables(usual_lanes(9, 4), shapes_of())
    with pytest.raises(ValueError, match="budget"):
        group_tables(usual_lanes(2, 512), shapes_of())

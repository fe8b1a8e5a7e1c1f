from itertools import pairwise

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tokendance_jax.kernels.lanes import LaneTables
from tokendance_jax.plan.lane import LanePlan

PAGE_SIZE = 4
# (page, frame, first, slots); few frames, so that runs of one frame are common
ENTRIES = st.lists(
    st.tuples(
        st.integers(1, 50),
        st.sampled_from([0, 3, -3, 100_000]),
        st.integers(0, PAGE_SIZE - 1),
        st.integers(1, PAGE_SIZE),
    ).map(lambda e: (*e[:3], min(e[3], PAGE_SIZE - e[2]))),
    min_size=1,
    max_size=12,
)


def plan(entries):
    page, frame, first, slots = np.array(entries, np.int32).T
    tokens = np.zeros(slots.sum(), np.int32)
    computed = np.arange(len(tokens), dtype=np.int32)
    return LanePlan(tokens, computed, page, frame, first, slots, base=np.zeros_like(page))


def naive(entries):
    """Returns (slot, canonical position) by logical position."""
    where, position = {}, 0
    for page, frame, first, slots in entries:
        for offset in range(first, first + slots):
            where[position] = (page * PAGE_SIZE + offset, position - frame)
            position += 1
    return where


@given(ENTRIES)
def test_locate_finds_slot_and_canonical_position(entries):
    where = naive(entries)
    slot, canonical = plan(entries).locate(np.arange(len(where), dtype=np.int32), PAGE_SIZE)
    assert list(zip(slot.tolist(), canonical.tolist(), strict=True)) == list(where.values())


@given(ENTRIES, st.data())
def test_locate_takes_any_order_and_shape(entries, data):
    where = naive(entries)
    some = data.draw(st.lists(st.sampled_from(sorted(where)), min_size=6, max_size=6))
    slot, canonical = plan(entries).locate(np.array(some, np.int32).reshape(2, 3), PAGE_SIZE)
    assert slot.shape == canonical.shape == (2, 3)
    found = zip(slot.ravel().tolist(), canonical.ravel().tolist(), strict=True)
    assert list(found) == [where[position] for position in some]


@given(
    ENTRIES,
    st.integers(0, PAGE_SIZE - 1),
    st.lists(st.integers(60, 90), max_size=4),
    st.none() | st.integers(0, PAGE_SIZE - 1),
)
def test_a_lane_grows_by_the_rest_of_its_last_page_and_by_pages(entries, last_first, pages, first):
    entries = [*entries, (55, 0, last_first, 1)]  # the lane's own, used in part
    lane = plan(entries)
    longer = lane.extended(np.array(pages, np.int32), PAGE_SIZE, first=first)
    if first is None:
        entries[-1] = (55, 0, last_first, PAGE_SIZE - last_first)
        assert lane.room(PAGE_SIZE) == sum(slots for *_, slots in entries)
    for page in pages:
        begin, first = first or 0, 0
        entries.append((page, 0, begin, PAGE_SIZE - begin))
    where = naive(entries)
    slot, canonical = longer.locate(np.arange(len(where), dtype=np.int32), PAGE_SIZE)
    assert list(zip(slot.tolist(), canonical.tolist(), strict=True)) == list(where.values())
    np.testing.assert_array_equal(longer.cut(2).page, longer.page[:2])


@given(ENTRIES, st.integers(1, 5))
def test_table_holds_the_same_slots_with_one_frame_to_a_block(entries, block):
    table = plan(entries).table(block)
    assert table.dtype == np.int32
    assert table.shape[1] % block == 0
    assert naive(table[:4].T.tolist()) == naive(entries)
    used = table[:, table[3] > 0]
    assert used[4].tolist() == (np.cumsum(used[3]) - used[3]).tolist()
    blocks = table.reshape(5, -1, block)
    assert (blocks[1] == blocks[1][:, :1]).all()
    assert blocks[3][:, 0].all()  # attention stops at the first empty block
    assert not table[0][table[3] == 0].any()  # empty entries point at page 0
    # No more blocks than the runs of one frame need.
    frames = [frame for _, frame, _, _ in entries]
    cuts = [0, *(i for i in range(1, len(frames)) if frames[i] != frames[i - 1]), len(frames)]
    needed = sum(-(-(b - a) // block) for a, b in pairwise(cuts))
    assert blocks.shape[1] == needed


slot_positions = jax.jit(lambda tables: tables.slot_positions(PAGE_SIZE))


@given(ENTRIES, ENTRIES)
@settings(max_examples=25)
def test_slot_positions_are_the_tables_positions(first_lane, second_lane):
    stacked = np.zeros((5, 3, 24), np.int32)  # the third lane is padding
    for index, entries in enumerate((first_lane, second_lane)):
        table = plan(entries).table(2)
        stacked[:, index, : table.shape[1]] = table
    position = np.asarray(slot_positions(LaneTables(*stacked)))
    expected = np.full_like(position, np.iinfo(np.int32).max)
    for index in range(2):
        at = 0
        for entry, (_, _, first, slots, _) in enumerate(stacked[:, index].T):
            expected[index, entry, first : first + slots] = np.arange(at, at + slots)
            at += slots
    np.testing.assert_array_equal(position, expected)


@given(st.integers(1, 40), st.integers(0, 9), st.data())
def test_contiguous_is_a_dense_sequence(tokens, room, data):
    pages = np.random.default_rng(0).permutation(np.arange(1, 30, dtype=np.int32))
    pages = pages[: -(-(tokens + room) // PAGE_SIZE)]
    start = data.draw(st.integers(0, tokens - 1))
    ids = np.arange(tokens, dtype=np.int32)
    lane = LanePlan.contiguous(ids, pages, computed_from=start, page_size=PAGE_SIZE)
    assert lane.computed.tolist() == list(range(start, tokens))
    position = np.arange(tokens + room, dtype=np.int32)
    slot, canonical = lane.locate(position, PAGE_SIZE)
    np.testing.assert_array_equal(slot, pages[position // 4] * 4 + position % 4)
    np.testing.assert_array_equal(canonical, position)

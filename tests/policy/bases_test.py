import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policy.device import Device, drawn, exact_sources
from tests.policy.rounds import PAGE_SIZE, TEXTS, ids
from tokendance_jax.paged import OutOfPages, PagePool
from tokendance_jax.policy.bases import BaseStore, content_key, paged
from tokendance_jax.policy.policy import NOBODY, Compute, OpenRound

A, B, C = ([letter] * count for letter, count in ((1, 9), (2, 6), (3, 5)))
CONTEXT = [7, 8, 9, 7, 8]


def store(pool, kind="joint", salt=b"", namespace="model"):
    return BaseStore(pool, PAGE_SIZE, namespace, kind=kind, salt=salt)


def make(bases, context, *segments, failed=False):
    """Opens and closes a base; returns its lane and the placements of the segments."""
    lane, placed = bases.open(ids(context), [ids(segment) for segment in segments])
    bases.close(lane, failed=failed)
    return lane, placed


def compute(device, lane):
    def steps():
        yield Compute([lane], [NOBODY])

    device.run(OpenRound([], [lane], [], 0, steps()), drawn(np.random.default_rng(0)))


# (store, context, segments, how it ends)
OPENINGS = st.tuples(
    st.integers(0, 1),
    st.sampled_from([[], CONTEXT, CONTEXT[:4]]),
    st.lists(TEXTS, min_size=1, max_size=4),
    st.sampled_from(["well", "well", "well", "failed", "evicted"]),
)


@given(st.lists(OPENINGS, max_size=10), st.sampled_from([9, 16, 40]))
@settings(max_examples=25)
def test_places_hold_what_was_written_there(openings, size):
    device = Device(size)
    stores = store(device.pool, "joint"), store(device.pool, "alone")
    segments = [segment for _, _, some, _ in openings for segment in some]
    for which, context, some, end in openings:
        try:
            lane, placed = stores[which].open(ids(context), [ids(segment) for segment in some])
        except OutOfPages:
            assert device.pool.live == 0
            device.pool.check()
            continue
        whole = context + [token for segment in some for token in segment]
        assert lane.token_ids.tolist() == whole
        assert not lane.frame.any()
        if end == "failed":
            device.rounds += 1
            stores[which].close(lane, failed=True)
        else:
            compute(device, lane)
            assert device.sources(lane) == exact_sources(whole)
            at = len(context)
            for segment, place in zip(some, placed, strict=True):
                assert place.canonical == at
                position = np.arange(at, at + len(segment), dtype=np.int32)
                slot, canonical = lane.locate(position, PAGE_SIZE)
                assert place.slot(PAGE_SIZE).tolist() == slot.tolist()
                assert canonical.tolist() == position.tolist()
                assert place.slots.sum() == len(segment)
                at += len(segment)
            stores[which].close(lane, failed=False)
        if end == "evicted":  # evicts all but a few pages
            device.pool.release(device.pool.allocate(max(0, size - 4)))
        assert device.pool.live == 0
        device.pool.check()
        for bases in stores:
            for segment in segments:
                check_found(device, bases, segment)


def check_found(device, bases, segment):
    """Checks that a placement that is found holds the segment's tokens, all of them written."""
    place = bases.find(ids(segment))
    if place is not None:
        assert set(place.page.tolist()) <= set(bases.pages().tolist())
        for step, (token, slot) in enumerate(
            zip(segment, place.slot(PAGE_SIZE).tolist(), strict=True)
        ):
            held = device.pool.slots[slot]
            assert (held.token, held.canonical) == (token, place.canonical + step)
            assert held.source is not None


def test_the_same_base_is_found_again():
    pool = PagePool(20)
    bases = store(pool)
    first, placed = make(bases, CONTEXT, A, B)
    assert len(first.computed) == len(CONTEXT) + len(A) + len(B)
    again, placed_again = make(bases, CONTEXT, A, B)
    assert again.page.tolist() == first.page.tolist()
    assert again.computed.tolist() == []
    for one, other in zip(placed, placed_again, strict=True):
        assert one.slot(PAGE_SIZE).tolist() == other.slot(PAGE_SIZE).tolist()
    assert (pool.live, pool.evictable) == (0, len(first.page))


def test_layouts_take_nothing_and_say_what_is_computed():
    pool = PagePool(40)
    bases = store(pool)
    make(bases, CONTEXT, A)
    layouts = [bases.lay_out(ids(CONTEXT), [ids(A), ids(B)])]
    layouts.append(bases.lay_out(ids(CONTEXT), [ids(B)], before=len(layouts[0].slots)))
    assert pool.live == 0
    assert bases.to_compute(layouts) == [1 + len(B), len(B)]
    taken = [bases.take(layout) for layout in layouts]
    assert [len(lane.computed) for lane, _ in taken] == [1 + len(B), len(B)]
    # Numbers below 0 in the layouts stand for the pages of all lanes, one lane after the other.
    pages = np.concatenate([lane.page for lane, _ in taken])
    for layout, (_, placed) in zip(layouts, taken, strict=True):
        for number, place in zip(layout.placed, placed, strict=True):
            assert paged(number.page, pages).tolist() == place.page.tolist()
    assert paged(ids([7, -1]), pages).tolist() == [7, pages[0]]


def test_the_first_segment_begins_a_page():
    lane, (a, b) = make(store(PagePool(20)), CONTEXT, A, B)
    # Five tokens of context fill two pages. Nine and six tokens fill four, one of which holds
    # tokens of both.
    assert lane.slots.tolist() == [4, 1, 4, 4, 4, 3]
    assert lane.page[2:5].tolist() == a.page.tolist()
    assert lane.page[4:].tolist() == b.page.tolist()
    assert (a.first.tolist(), a.slots.tolist()) == ([0, 0, 0], [4, 4, 1])
    assert (b.first.tolist(), b.slots.tolist()) == ([1, 0], [3, 3])
    assert (a.canonical, b.canonical) == (5, 14)


def test_a_bundle_that_goes_on_reuses_its_beginning():
    bases = store(PagePool(20))
    first, _ = make(bases, CONTEXT, A, B)
    more, _ = make(bases, CONTEXT, A, B, C)
    # It reuses all pages except the last one, which was not full.
    assert more.page[:5].tolist() == first.page[:5].tolist()
    assert more.page[5] != first.page[5]
    assert more.computed.tolist() == list(range(5 + 12, 5 + 20))
    # The last page of the shorter bundle is still cached.
    assert make(bases, CONTEXT, A, B)[0].computed.tolist() == []


def test_another_order_is_another_base():
    bases = store(PagePool(20))
    first, _ = make(bases, CONTEXT, A, B)
    other, _ = make(bases, CONTEXT, B, A)
    assert not set(first.page[2:].tolist()) & set(other.page[2:].tolist())
    assert other.page[:2].tolist() == first.page[:2].tolist()  # the context is the same


def test_the_cut_between_segments_does_not_matter():
    bases = store(PagePool(20))
    first, _ = make(bases, CONTEXT, A + B)
    other, (_, b) = make(bases, CONTEXT, A, B)
    assert other.computed.tolist() == []
    assert b.page.tolist() == first.page[4:].tolist()


@pytest.mark.parametrize(
    "other", [{"kind": "alone"}, {"salt": b"tenant"}, {"namespace": "another"}], ids=str
)
def test_other_kinds_salts_and_namespaces_find_nothing(other):
    pool = PagePool(40)
    one, two = store(pool), store(pool, **other)
    first, _ = make(one, CONTEXT, A)
    assert two.find(ids(A)) is None
    second, _ = make(two, CONTEXT, A)
    assert len(second.computed) == len(second.token_ids)
    assert not set(first.page.tolist()) & set(second.page.tolist())


def test_another_context_is_another_base():
    bases = store(PagePool(40))
    make(bases, CONTEXT, A)
    longer, _ = make(bases, [*CONTEXT, 1], A)
    # Only the first page of the context is found.
    assert longer.computed.tolist() == list(range(4, len(longer.token_ids)))
    moved, _ = make(bases, [], A)
    assert len(moved.computed) == len(A)


def test_a_context_that_ends_with_the_segment_is_not_taken_for_it():
    # The tokens are the same, but the cut differs: the segment begins a page of its own.
    bases = store(PagePool(40))
    make(bases, [1, 1, 1], [1] * 9)
    other, (place,) = make(bases, [1, 1, 1, 1], [1] * 8)
    assert place.canonical == 4
    assert len(other.computed) == 12


def test_a_failed_base_is_forgotten():
    pool = PagePool(20)
    bases = store(pool)
    lane, _ = make(bases, CONTEXT, A, failed=True)
    assert bases.find(ids(A)) is None
    assert bases.pages().tolist() == []
    assert (pool.live, pool.evictable) == (0, 0)
    again, _ = make(bases, CONTEXT, A)
    assert len(again.computed) == len(lane.token_ids)


def test_a_failure_keeps_what_an_earlier_round_wrote():
    bases = store(PagePool(20))
    make(bases, CONTEXT, A, B)
    make(bases, CONTEXT, A, B, C, failed=True)
    assert bases.find(ids(C)) is None
    assert make(bases, CONTEXT, A, B)[0].computed.tolist() == []
    assert bases.find(ids(A)) is not None


def test_the_newest_place_is_found():
    bases = store(PagePool(40))
    _, (old,) = make(bases, CONTEXT, A)
    assert bases.find(ids(A)) is old
    _, (_, new) = make(bases, CONTEXT, B, A)
    assert bases.find(ids(A)) is new
    assert bases.find(ids(C)) is None


def test_what_is_evicted_in_part_is_not_found():
    pool = PagePool(8)
    bases = store(pool)
    lane, _ = make(bases, [], A, B)
    assert len(lane.page) == 4
    pool.release(pool.allocate(4))  # three free pages, and the end of the base
    assert bases.find(ids(A)) is not None
    assert bases.find(ids(B)) is None
    again, _ = make(bases, [], A, B)
    assert again.computed.tolist() == list(range(12, 15))


def test_a_refused_base_leaves_everything_as_it_was():
    pool = PagePool(6)
    bases = store(pool)
    make(bases, [], A)
    with pytest.raises(OutOfPages):
        bases.open(ids([]), [ids(A), ids(B * 3)])
    assert (pool.live, pool.evictable) == (0, 3)
    assert bases.find(ids(A)) is not None


def test_keys_are_those_of_the_content():
    assert content_key(ids(A)) == content_key(ids(list(A)))
    strided = np.repeat(ids(A), 2)[::2]
    assert content_key(strided) == content_key(ids(A))
    assert content_key(ids(A)) != content_key(ids(A[:-1]))
    assert len(content_key(ids(A))) * 8 >= 128

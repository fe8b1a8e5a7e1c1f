import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mirror.rounds import lane_plan, samples
from tokendance_jax.mirror import MirrorError, MirrorLayout

PRIVATE, BASE, PATCH = 100, 200, 300  # first ids of the pages in the examples


def layout_of(*lanes):
    lanes = [lane_plan(entries, tokens=2) for entries in lanes]
    return MirrorLayout.of_lanes(lanes, [int(lane.slots.sum()) for lane in lanes])


@given(samples())
@settings(max_examples=50)
def test_pages_are_stored_once_and_where_they_belong(sample):
    layout = MirrorLayout.of_lanes(sample.lanes, sample.lengths)
    entries = list(sample.entries())
    held = {page for _, page, *_ in entries}
    lanes_of = Counter(page for _, page in {entry[:2] for entry in entries})
    bases = {base for *_, base in entries}
    shared = {page for page in held if lanes_of[page] > 1 or page in bases}
    first_use = list(dict.fromkeys(page for _, page, *_ in entries if page in shared))
    assert layout.base_pages.tolist() == first_use
    absent = list(dict.fromkeys(e[-1] for e in entries if e[-1] not in held and e[-1] != 0))
    for index, table in enumerate(layout.tables):
        mine = [entry[1:] for entry in entries if entry[0] == index]
        assert layout.pages(index).tolist() == [page for page, *_ in mine]
        assert table.frame.tolist() == [frame for _, frame, *_ in mine]
        assert table.first.tolist() == [first for _, _, first, *_ in mine]
        assert table.tokens == sample.lengths[index]
        np.testing.assert_array_equal(table.token_ids, sample.lanes[index].token_ids)
        own = {page: base for page, _, _, _, base in mine if page not in shared}
        assert layout.private_pages[index].tolist() == [page for page in own if own[page] == 0]
        assert layout.patch_pages[index].tolist() == [page for page in own if own[page] != 0]
        for entry, (page, _, _, _, base) in enumerate(mine):
            # Numbers from 0 on are stored base pages, -1 is private, others are not stored.
            number = table.base[entry]
            if number >= 0:
                assert layout.base_pages[number] == base
            elif number == -1:
                assert base == 0
            else:
                assert absent[-2 - number] == base
            patched = table.patch_index[entry] >= 0
            assert patched == (base != 0 and page not in shared)
            assert (table.source[entry] == -1) == patched


@given(samples(), st.randoms(use_true_random=False))
def test_numbers_do_not_depend_on_page_ids(sample, random):
    ids = list(range(1, 64))
    random.shuffle(ids)
    renamed = np.array([0, *ids], np.int32)
    layout = MirrorLayout.of_lanes(sample.lanes, sample.lengths)
    lanes = [
        lane_plan(
            np.stack([renamed[x.page], x.frame, x.first, x.slots, renamed[x.base]], axis=1),
            len(x.token_ids),
        )
        for x in sample.lanes
    ]
    other = MirrorLayout.of_lanes(lanes, sample.lengths)
    for one, two in zip(layout.tables, other.tables, strict=True):
        for name in ("source", "base", "patch_index", "frame", "first", "slots", "token_ids"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name), name)
    np.testing.assert_array_equal(renamed[layout.base_pages], other.base_pages)


def test_an_agent_that_shows_and_patches_a_base():
    # Two private pages, then a base of three pages. The agent replaces the first base page.
    agents = [
        [
            (PRIVATE + 10 * agent, 0, 0, 16, 0),
            (PRIVATE + 10 * agent + 1, 0, 0, 9, 0),
            (PATCH + agent, 25, 0, 16, BASE),
            (BASE + 1, 25, 0, 16, BASE + 1),
            (BASE + 2, 25, 0, 5, BASE + 2),
        ]
        for agent in range(3)
    ]
    layout = layout_of(*agents)
    assert layout.base_pages.tolist() == [BASE + 1, BASE + 2]  # no lane reads the first
    table = layout.tables[1]
    assert table.source.tolist() == [2, 3, -1, 0, 1]
    assert table.base.tolist() == [-1, -1, -2, 0, 1]
    assert table.patch_index.tolist() == [-1, -1, 0, -1, -1]

    index_bytes = 6 * 5 * 4 + 2 * 4
    one = layout.mirror_compression(page_size=16, page_bytes=1000)[1]
    assert (one.dense_bytes, one.base_bytes, one.patch_bytes) == (4000, 2000, 1000)
    assert (one.private_bytes, one.index_bytes) == (2000, index_bytes)
    assert one.mirror_ratio == 4000 / (3000 + index_bytes)
    assert one.round_ratio == 4000 / (5000 + index_bytes)
    whole = layout.compression(page_size=16, page_bytes=1000)
    assert whole.own_bytes == 3 * (3000 + index_bytes)
    assert whole.mirror_ratio == 12_000 / (9000 + 3 * index_bytes)
    assert whole.round_ratio == 12_000 / (2000 + 9000 + 3 * index_bytes)


def test_a_base_page_that_one_lane_reads_is_stored_for_all():
    layout = layout_of([(PATCH, 0, 0, 16, BASE)], [(BASE, 0, 0, 16, BASE)])
    assert layout.base_pages.tolist() == [BASE]
    assert layout.tables[0].base.tolist() == layout.tables[1].base.tolist() == [0]
    assert layout.patch_pages[0].tolist() == [PATCH]


def test_another_agents_private_page_can_be_the_base():
    layout = layout_of([(7, 0, 0, 16, 0)], [(PATCH, 0, 0, 16, 7), (8, 0, 0, 1, 0)])
    assert layout.base_pages.tolist() == [7]
    assert layout.tables[0].base.tolist() == [-1]
    assert layout.tables[1].base.tolist() == [0, -1]


def test_a_page_that_one_lane_reads_in_several_entries_is_stored_once_as_its_own():
    # The task continues in the page where the private text ended; the base stands in between.
    private = [(PRIVATE, 0, 0, 16, 0), (PRIVATE + 1, 0, 0, 5, 0)]
    task = [(PRIVATE + 1, 0, 5, 11, 0), (PRIVATE + 2, 0, 0, 3, 0)]
    patches = [(PATCH, 9, 0, 7, BASE), (PATCH, 4, 7, 9, BASE + 1)]
    layout = layout_of(
        [*private, *patches, (BASE + 2, 9, 0, 16, BASE + 2), *task],
        [(BASE + 2, 0, 0, 16, BASE + 2), (PATCH + 1, 0, 0, 8, BASE + 3), (PATCH + 1, 0, 8, 8, 0)],
    )
    assert layout.base_pages.tolist() == [BASE + 2]
    table = layout.tables[0]
    assert table.source.tolist() == [1, 2, -1, -1, 0, 2, 3]
    assert table.base.tolist() == [-1, -1, -2, -3, 0, -1, -1]
    assert table.patch_index.tolist() == [-1, -1, 0, 0, -1, -1, -1]
    assert layout.private_pages[0].tolist() == [PRIVATE, PRIVATE + 1, PRIVATE + 2]
    assert layout.patch_pages[0].tolist() == [PATCH]
    # A page that is a patch in one entry is a patch in all entries.
    assert layout.patch_pages[1].tolist() == [PATCH + 1]
    assert layout.tables[1].base.tolist() == [0, -4, -1]
    assert layout.tables[1].patch_index.tolist() == [-1, 0, 0]
    whole = layout.compression(page_size=16, page_bytes=1000)
    assert (whole.base_bytes, whole.private_bytes, whole.patch_bytes) == (1000, 3000, 2000)


def test_large_rounds_are_quick():
    page_size, tokens, agents = 16, 7_000, 100
    pages = -(-tokens // page_size)
    lanes = []
    for agent in range(agents):
        private = np.arange(60) + 10_000 + 1_000 * agent
        base = np.arange(pages - 60) + 1
        shown = np.where(np.arange(len(base)) < 4, 500_000 + 1_000 * agent + base, base)
        entries = np.zeros((pages, 5), np.int32)
        entries[:, 0] = np.concatenate([private, shown])
        entries[:, 3] = page_size
        entries[60:, 4] = base
        lanes.append(lane_plan(entries, tokens))
    start = time.perf_counter()
    layout = MirrorLayout.of_lanes(lanes, [tokens] * agents)
    whole = layout.compression(page_size=page_size, page_bytes=196_608)
    assert time.perf_counter() - start < 0.8
    assert len(layout.base_pages) == pages - 64
    index = 6 * 4 * pages + 4 * tokens
    assert whole.round_ratio == agents * pages * 196_608 / (
        (pages - 64 + agents * 64) * 196_608 + agents * index
    )


@pytest.mark.parametrize(
    ("entries", "lengths", "message"),
    [
        ([(1, 0, 0, 4, 0)], [], "lengths: number: 0 lengths for 1 lanes"),
        ([(1, 0, 0, 4, 0)], [0], "lengths: number: 1 lengths for 1 lanes, 0 tokens in all"),
        ([(1, 0, 0, 4, 0)], [5], "lengths: tokens: 5 tokens in a lane of 4 slots"),
        ([(1, 0, 0, 4, 0)], [-1], "lengths: tokens: -1 tokens in a lane of 4 slots"),
        ([(0, 0, 0, 4, 0)], [4], "lanes: page: an entry in use has none"),
    ],
)
def test_bad_lengths_are_refused(entries, lengths, message):
    with pytest.raises(MirrorError) as error:
        MirrorLayout.of_lanes([lane_plan(entries)], lengths)
    assert str(error.value).startswith(message)

from itertools import count, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.policy.rounds import PAGE_SIZE, ids, made, prompt, rounds
from tokendance_jax.policy.bases import Placed, content_key
from tokendance_jax.policy.parts import TAIL_TOKENS, asked_until, parts_of, run_of, shared_keys


def lay_out(segments, canonical, pages):
    """Places segments end to end in pages from `pages`; also returns the placements by token."""
    placed, where, page = {}, {}, {}
    offset = 0
    for segment in segments:
        at = range(offset, offset + len(segment))
        offset = at.stop
        for index in at:
            if index // PAGE_SIZE not in page:
                page[index // PAGE_SIZE] = next(pages)
        slots = [(page[i // PAGE_SIZE], i % PAGE_SIZE) for i in at]
        where[bytes(segment)] = [(*s, canonical + i) for s, i in zip(slots, at, strict=True)]
        entries = list(dict.fromkeys(p for p, _ in slots))
        placed[bytes(segment)] = Placed(
            ids(segment),
            ids(entries),
            ids([min(o for p, o in slots if p == entry) for entry in entries]),
            ids([sum(p == entry for p, _ in slots) for entry in entries]),
            canonical + at.start,
        )
    return placed, where


PLACINGS = st.tuples(rounds(most=1), st.randoms(use_true_random=False))


def placing(case):
    """Returns a prompt, and placements of its shared text in up to two bundles, also by token."""
    (recipes,), random = case
    whole = made(recipes)[0]
    segments = {
        bytes(some)
        for span in whole.spans
        if span.kind in ("shared", "history") and random.random() < 0.8
        for some in [whole.token_ids[span.start : span.stop].tolist()]
    }
    order = sorted(segments)
    random.shuffle(order)
    middle = random.randint(0, len(order))
    pages = count(random.randint(1, 9), random.choice([1, 3]))
    placed, where = {}, {}
    for some in (order[:middle], order[middle:]):
        one, two = lay_out([list(s) for s in some], random.randint(0, 30), pages)
        placed.update(one)
        where.update(two)
    return whole, placed, where


def cut(whole, placed):
    def place(span, key, token_ids):
        assert key == content_key(token_ids)
        assert span.kind != "markup"
        shared = span.kind in ("shared", "history")
        return placed.get(bytes(token_ids.tolist())) if shared else None

    return parts_of(whole, place)


@given(PLACINGS)
def test_parts_cover_the_prompt(case):
    whole, placed, _ = placing(case)
    parts = cut(whole, placed)
    assert parts[0].start == 0
    assert parts[-1].stop == len(whole.token_ids)
    assert all(left.stop == right.start for left, right in pairwise(parts))
    assert all(part.start < part.stop for part in parts)
    own = [part.placed is None for part in parts]
    assert own[-1]
    assert not any(left and right for left, right in pairwise(own))
    assert len(whole.token_ids) - parts[-1].start >= min(TAIL_TOKENS, asked_until(whole))
    for part in parts:
        if part.placed is not None:
            some = whole.token_ids[part.start : part.stop]
            assert some.tolist() == part.placed.token_ids[: len(some)].tolist()
            # Only the tail cuts a part.
            uncut = part.stop - part.start == len(part.placed.token_ids)
            assert uncut or part.stop == asked_until(whole) - TAIL_TOKENS


@given(PLACINGS)
def test_parts_place_all_they_can(case):
    whole, placed, _ = placing(case)
    taken = {at for p in cut(whole, placed) if p.placed for at in range(p.start, p.stop)}
    expected = {
        at
        for span in whole.spans
        if span.kind in ("shared", "history")
        and bytes(whole.token_ids[span.start : span.stop].tolist()) in placed
        for at in range(span.start, min(span.stop, asked_until(whole) - TAIL_TOKENS))
    }
    assert taken == expected


@given(PLACINGS)
def test_a_run_shows_every_placed_token_once_in_order(case):
    whole, placed, where = placing(case)
    parts = cut(whole, placed)
    run = run_of(parts)
    expected, mine, offset = {}, {}, {}
    for index, part in enumerate(parts):
        if part.placed is None:
            continue
        if index == 0 or parts[index - 1].placed is None:
            begin = part.start
        key = bytes(part.placed.token_ids.tolist())
        for at in range(part.start, part.stop):
            expected[at] = where[key][at - part.start]
            mine[at] = part.mine
            offset[at] = at - begin
    shown = []
    entries = zip(run.page, run.frame, run.first, run.slots, run.start, strict=True)
    for page, frame, first, slots, start in entries:
        assert slots > 0
        for step in range(slots):
            at = int(start + step)
            shown.append((at, (int(page), int(first + step), at - int(frame))))
    assert shown == list(expected.items())
    for entry, start in enumerate(run.start.tolist()):
        assert run.offset[entry] == offset[start]
        tokens = range(start, start + int(run.slots[entry]))
        assert run.mine[entry] == any(mine[at] for at in tokens)
        # Neighbouring slots that fit into one entry are in one entry.
        if entry and run.offset[entry]:
            assert (run.page[entry], run.frame[entry]) != (
                run.page[entry - 1],
                run.frame[entry - 1],
            )


@given(rounds(most=1))
def test_only_the_agents_own_shared_block_is_its_own(drawn):
    for whole in made(drawn[0]):
        pages, placed = count(1), {}
        for span in whole.spans:
            some = whole.token_ids[span.start : span.stop].tolist()
            placed.update(lay_out([some], 0, pages)[0])
        by_start = {span.start: span for span in whole.spans}
        for part in cut(whole, placed):
            span = by_start.get(part.start)
            own = span is not None and (span.kind, span.id) == ("shared", f"out/{whole.agent}")
            assert part.mine == (own and part.placed is not None)


TASK = ("task", "t", [9] * 10)


def placed_bundle(*segments):
    placed, _ = lay_out(list(segments), 20, count(5))
    return placed


def columns(run):
    return [column.tolist() for column in (run.page, run.frame, run.first, run.slots, run.start)]


def test_neighbours_in_order_are_one_run_of_whole_pages():
    a, b = [1] * 6, [2] * 6
    whole = prompt("x", ("system", "s", [0] * 3), ("shared", "a", a), ("shared", "b", b), TASK)
    run = run_of(cut(whole, placed_bundle(a, b)))
    # The page in which one block ends and the other begins is one entry.
    assert columns(run) == [[5, 6, 7], [-17] * 3, [0, 0, 0], [4, 4, 4], [3, 7, 11]]
    assert run.offset.tolist() == [0, 4, 8]


def test_an_entry_that_holds_some_of_the_own_block_is_its_own():
    a, b = [1] * 6, [2] * 6
    for mine, expected in (("a", [True, True, False]), ("b", [False, True, True])):
        whole = prompt(mine, ("shared", "out/a", a), ("shared", "out/b", b), TASK)
        assert run_of(cut(whole, placed_bundle(a, b))).mine.tolist() == expected


def test_another_order_shows_the_page_in_between_twice():
    a, b = [1] * 6, [2] * 6
    whole = prompt("x", ("shared", "b", b), ("shared", "a", a), TASK)
    run = run_of(cut(whole, placed_bundle(a, b)))
    assert columns(run) == [
        [6, 7, 5, 6],
        [-26, -26, -14, -14],
        [2, 0, 0, 0],
        [2, 4, 4, 2],
        [0, 2, 6, 10],
    ]
    assert run.offset.tolist() == [0, 2, 6, 10]


def test_the_same_block_twice_is_shown_twice():
    a = [1] * 4
    whole = prompt("x", ("shared", "a", a), ("shared", "a", a), ("shared", "a", a), TASK)
    run = run_of(cut(whole, placed_bundle(a)))
    assert columns(run) == [[5] * 3, [-20, -16, -12], [0] * 3, [4] * 3, [0, 4, 8]]


def test_text_in_between_begins_another_run():
    a, b = [1] * 6, [2] * 6
    whole = prompt("x", ("shared", "a", a), ("history", "h", [0] * 2), ("shared", "b", b), TASK)
    run = run_of(cut(whole, placed_bundle(a, b)))
    assert run.page.tolist() == [5, 6, 6, 7]
    assert run.offset.tolist() == [0, 4, 0, 2]


def test_text_as_long_as_a_hole_in_the_base_is_no_part_of_an_entry():
    # The own text between the two blocks is as long as the block between them in the base.
    a, b, c = [1] * 2, [2] * 1, [3] * 1
    whole = prompt("x", ("shared", "a", a), ("history", "h", [0]), ("shared", "c", c), TASK)
    run = run_of(cut(whole, placed_bundle(a, b, c)))
    assert columns(run) == [[5, 5], [-20, -20], [0, 3], [2, 1], [0, 3]]


def test_the_last_tokens_are_the_agents_own():
    a = [1] * 6
    whole = prompt("x", ("shared", "a", a), ("task", "t", [9] * 3), ("markup", "m", [8] * 5))
    parts = cut(whole, placed_bundle(a))
    # The tail is the eight tokens up to the end of the task; the markup behind it does not count.
    assert [(part.start, part.stop, part.placed is None) for part in parts] == [
        (0, 1, False),
        (1, 14, True),
    ]


def test_a_prompt_without_shared_text_is_one_part():
    whole = prompt("x", ("system", "s", [1, 2]), TASK)
    (part,) = cut(whole, {})
    assert (part.start, part.stop) == (0, 12)
    run = run_of([part])
    assert len(run.page) == len(run.mine) == 0
    assert run.page.dtype == np.int32


def key(*tokens):
    return content_key(ids(tokens))


def test_the_bundle_holds_shared_text_and_tasks_that_several_agents_have():
    question = ("task", "q", [7] * 9)
    prompts = [
        prompt("x", ("shared", "a", [1]), ("task", "t", [5] * 9), question),
        prompt("y", ("history", "a", [1]), ("shared", "b", [2]), question),
        prompt("z", ("shared", "b", [2]), ("shared", "a", [1]), ("task", "t", [6] * 9)),
    ]
    assert shared_keys(prompts) == [
        [key(1), key(*[7] * 9)],
        [key(2), key(*[7] * 9)],
        [key(2), key(1)],
    ]


def test_a_task_that_one_agent_asks_twice_is_its_own():
    question = ("task", "q", [7] * 9)
    assert shared_keys([prompt("x", question, question)]) == [[]]

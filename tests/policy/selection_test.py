import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policy.rounds import PAGE_SIZE, ids
from tokendance_jax.policy.parts import Run
from tokendance_jax.policy.selection import SELECTIONS, Scored, deviations, make_selection


def run(page, *, slots=None, frame=0, offset=None, mine=()):
    """Returns a run of entries, by default whole pages one after the other from position 0."""
    slots = ids([PAGE_SIZE] * len(page) if slots is None else slots)
    start = np.cumsum(slots, dtype=np.int32) - slots
    return Run(
        page=ids(page),
        frame=np.full(len(page), frame, np.int32),
        first=np.zeros(len(page), np.int32),
        slots=slots,
        start=start + np.int32(frame),
        offset=start if offset is None else ids(offset),
        mine=np.isin(np.arange(len(page)), mine),
    )


def picked(name, pages, some):
    return np.flatnonzero(make_selection(name, pages).pick(some, PAGE_SIZE)).tolist()


def test_selections_without_scores():
    some = run([5, 6, 7, 8, 9], mine=[3])
    assert picked("none", 2, some) == []
    assert picked("all", 2, some) == [0, 1, 2, 3, 4]
    assert picked("head", 2, some) == [0, 1]
    assert picked("head", 0, some) == []
    assert picked("head", 9, some) == [0, 1, 2, 3, 4]
    assert picked("own", 2, some) == [0, 1, 3]
    assert picked("own", 0, some) == [3]
    assert picked("deviation", 2, some) == picked("query", 2, some) == []


def test_every_run_has_a_head():
    assert picked("head", 1, run([5, 6, 7, 8], offset=[0, 4, 0, 4])) == [0, 2]


def test_a_head_is_counted_in_slots():
    # Entries are parts of pages. The last entry of a head is the last that begins within its slots.
    assert picked("head", 1, run([5, 6, 7], slots=[1, 2, 4])) == [0, 1, 2]
    assert picked("head", 1, run([5, 6, 7], slots=[2, 2, 4])) == [0, 1]


def scored(pages):
    selection = make_selection("deviation", pages)
    assert isinstance(selection, Scored)
    return selection


def pick_pages(pages, *agents):
    """Returns the chosen pages of each agent. Agents are given as {page: score}."""
    runs = [run(list(agent)) for agent in agents]
    scores = [np.array(list(agent.values()), np.float32) for agent in agents]
    chosen = scored(pages).pick_scored(runs, scores)
    return [some.page[pick].tolist() for some, pick in zip(runs, chosen, strict=True)]


def test_the_pages_of_the_highest_mean_are_chosen_for_all():
    one, other = {5: 1.0, 6: 9.0, 7: 2.0}, {5: 5.0, 6: 0.0, 8: 4.0}
    # The means are 3, 4.5, 2 and 4: they leave out agents that do not see the page.
    assert pick_pages(2, one, other) == [[6], [6, 8]]
    assert pick_pages(0, one, other) == [[], []]
    assert pick_pages(9, one, other) == [[5, 6, 7], [5, 6, 8]]


def test_of_equal_pages_the_first_in_the_base_is_chosen():
    assert pick_pages(1, {9: 1.0, 4: 1.0}) == [[9]]
    assert pick_pages(1, {9: 1.0}, {4: 1.0}) == pick_pages(1, {4: 1.0}, {9: 1.0})[::-1]
    shifted = run([9, 4], frame=100)
    assert scored(1).pick_scored([shifted], [np.ones(2, np.float32)])[0].tolist() == [True, False]


def test_a_page_that_is_shown_twice_is_chosen_twice():
    assert pick_pages(1, {5: 1.0}, {5: 1.0}) == [[5], [5]]
    twice = run([5, 6, 5])
    score = np.array([3.0, 1.0, 3.0], np.float32)
    assert scored(1).pick_scored([twice], [score])[0].tolist() == [True, False, True]


SCORES = st.floats(0, 1e6, width=32)
AGENTS = st.lists(st.dictionaries(st.integers(1, 9), SCORES, min_size=1), min_size=1, max_size=6)


@settings(max_examples=40)
@given(AGENTS, st.integers(0, 4), st.randoms(use_true_random=False))
def test_the_choice_does_not_depend_on_the_order_of_the_agents(agents, pages, random):
    agents = [dict(sorted(agent.items())) for agent in agents]
    order = list(range(len(agents)))
    random.shuffle(order)
    before = pick_pages(pages, *agents)
    after = pick_pages(pages, *(agents[seat] for seat in order))
    assert after == [before[seat] for seat in order]
    assert len(set().union(*before)) == min(pages, len(set().union(*agents)))


def test_deviations_weigh_keys_as_much_as_values():
    squares = np.array([[1e6, 3e6, 2e6], [3e-6, 2e-6, 1e-6]], np.float32)
    (score,) = deviations([squares])
    np.testing.assert_allclose(score, [0.5 + 1.5, 1.5 + 1.0, 1.0 + 0.5], rtol=1e-6)
    assert score.dtype == np.float32


def test_deviations_of_nothing_are_zero():
    (score,) = deviations([np.zeros((2, 4), np.float32)])
    assert score.tolist() == [0.0] * 4
    assert [len(score) for score in deviations([np.zeros((2, 0), np.float32)])] == [0]


@given(
    st.lists(st.lists(SCORES, min_size=1, max_size=5), min_size=1),
    st.randoms(use_true_random=False),
)
def test_deviations_do_not_depend_on_the_order_of_the_agents(rows, random):
    squares = [np.array([row, row[::-1]], np.float32) for row in rows]
    order = list(range(len(squares)))
    random.shuffle(order)
    before, after = deviations(squares), deviations([squares[seat] for seat in order])
    for seat, score in zip(order, after, strict=True):
        assert score.tolist() == before[seat].tolist()
    total = math.fsum(value for score in before for value in score.tolist())
    assert total <= 2 * sum(map(len, rows)) * (1 + 1e-3)


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_are_made_by_name(name):
    assert type(make_selection(name, 3)) is SELECTIONS[name]
    assert make_selection(name, 3).pages == 3

"""Whatever breaks in a round: no page is lost, and the next round gives the right tokens."""

import contextlib
import dataclasses
import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.rounds import gathering, small_engine
from tokendance_jax.collector.policies import PolicyOptions
from tokendance_jax.paged import OutOfPages

POLICIES: dict[str, dict[str, Any]] = {
    "dense": {},
    "prefix": {},
    "blend": {},
    "blend-batched": {},
    "epic": {},
    "tokendance": {},
    "tokendance none": {"selection": "none"},
    "tokendance deviation": {"selection": "deviation"},
    "tokendance query": {"selection": "query"},
    "tokendance joint-agent": {"base": "joint-agent", "selection": "own"},
}
NAMES = "abcd"


class Broken(Exception):
    pass


def engine_of(policy):
    return small_engine(policy.split()[0], PolicyOptions(**POLICIES[policy]))


def moment(names, limit=7):
    whole = gathering(NAMES)
    agents = tuple(agent for agent in whole.agents if agent.agent in names)
    return dataclasses.replace(whole, agents=agents, max_new_tokens=limit)


def ids(result):
    return {a.agent: a.token_ids for a in result.agents}


@functools.cache
def expected(policy, names):
    return ids(engine_of(policy).serve(moment(names), chat=False))


@contextlib.contextmanager
def breaking(engine, how, when):
    """Breaks the engine's `when`-th call of a program; gives a callback that may break too."""
    calls = iter(range(10_000))
    inner, programs = engine.programs._call, engine.programs

    def call(name, *arguments):
        mine = how in ("before", "after") and next(calls) == when
        if mine and how == "before":
            raise Broken
        result = inner(name, *arguments)
        if mine:  # what was donated is gone, what came back is lost
            raise KeyboardInterrupt
        return result

    def heard(*_):
        if how in ("callback", "interrupt") and next(calls) == when:
            raise Broken if how == "callback" else KeyboardInterrupt

    programs._call = call
    try:
        yield heard
    finally:
        programs._call = inner


ACTIONS = st.tuples(
    st.sets(st.sampled_from(NAMES), min_size=1).map(lambda names: "".join(sorted(names))),
    st.sampled_from(["before", "before", "after", "callback", "interrupt", "too long"]),
    st.integers(0, 9),
)


@pytest.mark.parametrize("policy", POLICIES)
@given(actions=st.lists(ACTIONS, min_size=2, max_size=5))
@settings(max_examples=3)
def test_no_page_is_lost_and_the_next_round_is_right(policy, actions):
    engine = engine_of(policy)

    def serve(names, on_token=None, limit=7):
        try:
            found = engine.serve(moment(names, limit), chat=False, on_token=on_token)
        except OutOfPages:
            assert limit > 7
        else:
            assert ids(found) == expected(policy, names)
        assert engine.pool.live == 0
        engine.pool.check()

    for names, how, when in actions:
        with breaking(engine, how, when) as heard:
            try:
                serve(names, heard, 8000 if how == "too long" else 7)
            except (Broken, KeyboardInterrupt):
                assert how != "too long"
        assert engine.pool.live == 0
        engine.pool.check()
        serve(names)

"""Whatever fails in a round, no page is lost and the next round returns the right tokens."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.rounds import (
    SMALL,
    Broken,
    breaking,
    gathering,
    small_engine,
    small_programs,
    tiny,
)
from tokendance_jax.engine.compiling import Programs
from tokendance_jax.engine.errors import NotFiniteError
from tokendance_jax.engine.rounds import RoundEngine
from tokendance_jax.paged import OutOfPages
from tokendance_jax.policy.policies import PolicyOptions
from tokendance_jax.prompt import tokenize_round
from tokendance_jax.study.quality import compare
from tokendance_jax.study.scoring import follow, score

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
# `interleaving_test` breaks the calls of the other policies. Together, `QUICK` and `LONG`, which is
# slow, call every program.
QUICK = ("blend",)
LONG = ("tokendance query",)
NAMES = "abcd"
SWEEP = pytest.mark.sweep


def engine_of(policy):
    return small_engine(policy.split()[0], PolicyOptions(**POLICIES[policy]))


def round_(names, limit=7):
    whole = gathering(NAMES)
    agents = tuple(agent for agent in whole.agents if agent.agent in names)
    return dataclasses.replace(whole, agents=agents, max_new_tokens=limit)


def tokens_of(names):
    """Returns the token ids of these agents' prompts, agent by agent."""
    segments = [segment for agent in round_(names).agents for segment in agent.segments]
    return [token for segment in segments for token in segment.token_ids or ()]


def ids(result):
    return {a.agent: a.token_ids for a in result.agents}


@functools.cache
def expected(policy, names):
    return ids(engine_of(policy).serve(round_(names), chat=False))


ACTIONS = st.tuples(
    st.sets(st.sampled_from(NAMES), min_size=1).map(lambda names: "".join(sorted(names))),
    st.sampled_from(["before", "before", "after", "callback", "interrupt", "too long"]),
    st.integers(0, 9),
)


@pytest.mark.parametrize(
    "policy",
    [
        name
        if name in QUICK
        else pytest.param(name, marks=pytest.mark.slow if name in LONG else pytest.mark.sweep)
        for name in POLICIES
    ],
)
@given(actions=st.lists(ACTIONS, min_size=2, max_size=5))
@settings(max_examples=3)
def test_no_page_is_lost_and_the_next_round_is_right(policy, actions):
    engine = engine_of(policy)

    def serve(names, on_token=None, limit=7):
        try:
            found = engine.serve(round_(names, limit), chat=False, on_token=on_token)
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


def broken_engine(policy, *path, rows):
    """An engine of the tiny model with NaN in rows of a matrix. It shares the compiled programs."""
    flat = dict(nnx.to_flat_state(tiny().state))
    broken = flat[path].get_value().at[jnp.asarray(rows)].set(jnp.nan)
    flat[path] = flat[path].replace(broken)
    model = dataclasses.replace(tiny(), state=nnx.from_flat_state(flat))
    programs = Programs(model, small_programs().shapes)
    programs._compiled = small_programs()._compiled
    options = PolicyOptions(**POLICIES[policy], least_saving=None)
    return RoundEngine(model, policy=policy.split()[0], options=options, programs=programs, **SMALL)


def assert_idle(engine):
    assert engine.pool.live == 0
    engine.pool.check()


@pytest.mark.parametrize(
    "policy",
    [
        name if name in ("dense", "tokendance", "epic") else pytest.param(name, marks=SWEEP)
        for name in POLICIES
    ],
)
def test_an_agent_whose_logits_are_not_finite_fails_its_round_by_name(policy):
    # A token that only b's text has, so that the results of the others do not change.
    others = set(tokens_of("acd"))
    own = next(token for token in tokens_of("b") if token not in others)
    engine = broken_engine(policy, "embed_tokens", "weight", rows=[own])
    assert ids(engine.serve(round_("acd"), chat=False)) == expected(policy, "acd")
    heard: list[str] = []
    for _ in range(2):
        with pytest.raises(NotFiniteError, match=r"^round 0: agent 'b': the logits of token 0 of"):
            engine.serve(round_("abcd"), chat=False, on_token=lambda name, *_: heard.append(name))
        assert set(heard) <= {"a"}
        assert_idle(engine)
    assert ids(engine.serve(round_("acd"), chat=False)) == expected(policy, "acd")


def test_logits_that_are_not_finite_behind_some_tokens_of_an_answer():
    answers = expected("prefix", "ab")
    seen = set(tokens_of("ab"))
    name, step = next(
        (name, step)
        for step in range(1, 6)
        for name in "ab"
        if (token := answers[name][step]) not in seen
        and all(token not in tokens[: step + 1] for n, tokens in answers.items() if n != name)
        and token not in answers[name][:step]
    )
    engine = broken_engine("prefix", "embed_tokens", "weight", rows=[answers[name][step]])
    heard: dict[str, list[int]] = {"a": [], "b": []}
    with pytest.raises(
        NotFiniteError, match=f"agent '{name}': the logits of token {step + 1} of its answer"
    ):
        engine.serve(
            round_("ab"), chat=False, on_token=lambda name, token, _: heard[name].append(token)
        )
    for agent, tokens in heard.items():
        assert tuple(tokens) == answers[agent][: len(tokens)]
    assert len(heard[name]) == step + 1
    assert_idle(engine)


def test_scores_that_are_not_finite_are_refused():
    engine = broken_engine("prefix", "lm_head", "weight", rows=[7])
    prompts = tokenize_round(round_("a"), engine.model.tokenizer, chat=False)
    answers = [np.array([10, 1005, 12], np.int32)]
    streams, _ = follow(engine, prompts, answers)
    with pytest.raises(NotFiniteError, match=r"^logits: rows: row 0 of 4 has NaN or infinite"):
        score(engine, prompts, answers)
    with pytest.raises(ValueError, match=r"^other: logits are NaN or infinite"):
        compare(streams[0], streams[0] * np.float32(np.inf))
    engine = broken_engine("prefix", "embed_tokens", "weight", rows=[1005])
    with pytest.raises(NotFiniteError, match=r"^agent 'a': residual stream: row \d of 4 has NaN"):
        follow(engine, prompts, answers)
    assert_idle(engine)
    assert engine.pool.evictable == 0

"""In any interleaving of additions, aborts and failures, answers are those of being alone."""

import contextlib
import dataclasses
import functools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.engine.rounds import (
    POLICIES,
    Broken,
    block,
    breaking,
    gathering,
    member,
    mixed,
    small_engine,
)
from tokendance_jax.paged import OutOfPages
from tokendance_jax.policy.policies import PolicyOptions
from tokendance_jax.prompt import Round

QUICK = ("tokendance",)
SLOW = ("prefix", "blend")
LONGEST = 50
ROUNDS = (
    gathering("abc"),
    gathering("de"),
    mixed(),
    Round((member("s", block("s"), private=70),)),
    Round((member("t", block("s"), private=70, fidelity="exact"),)),
)
NEWCOMER = member("x", *(block(name) for name in "abc"), private=25)


def engine_of(policy):
    return small_engine(policy.split()[0], PolicyOptions(**POLICIES[policy]), answer_room=4)


@functools.cache
def alone(policy, round_):
    """Each agent's answer to a round that is served alone."""
    engine = engine_of(policy)
    handle = engine.add(
        dataclasses.replace(round_, max_new_tokens=LONGEST), chat=False, reserve=True
    )
    while not engine.idle:
        engine.step()
    return {some.prompt.agent: some.answer.chosen for some in handle.sequences}


@functools.cache
def exact(policy):
    """The exact agent of the mixed round, served densely."""
    agent = next(agent for agent in mixed().agents if agent.fidelity == "exact")
    return alone("dense", Round((agent,)))[agent.agent]


class Interleaving(RuleBasedStateMachine):
    """Sequences come, go and fail in a pool that is too small for all of them."""

    policy: str

    def __init__(self):
        super().__init__()
        self.engine = engine_of(self.policy)
        self.pool = None
        self.occupied = 0  # pages that nobody can have
        self.handles = []  # with the round whose answers are expected

    def occupy(self):
        """Takes pages away, again after the pool was lost."""
        if self.pool is not self.engine.pool:
            self.pool = self.engine.pool
            free = self.pool.free + self.pool.evictable
            self.occupied = min(self.occupied, free)
            self.pool.allocate(self.occupied)

    def add(self, round_, together=None, **options):
        """Adds a round, or a newcomer whose answer is that of a round with everybody."""
        self.occupy()
        with contextlib.suppress(OutOfPages):  # too large for the pool
            handle = self.engine.add(round_, chat=False, **options)
            self.handles.append((handle, together or round_))

    @initialize(limit=st.integers(10, LONGEST), occupied=st.integers(10, 60))
    def begin(self, limit, occupied):
        self.occupied = occupied
        self.add(ROUNDS[0], max_new_tokens=limit)

    @rule(
        which=st.integers(0, len(ROUNDS) - 1),
        limit=st.integers(1, LONGEST),
        priority=st.integers(0, 2),
        answers=st.sampled_from([1, 1, 1, 2]),
        reserve=st.booleans(),
    )
    def add_round(self, which, limit, priority, answers, reserve):
        round_ = ROUNDS[which]
        if len(self.handles) < 5 and answers * len(round_.agents) <= 8:
            self.add(
                round_,
                max_new_tokens=limit,
                priority=priority,
                answers=answers,
                reserve=reserve,
            )

    @rule(limit=st.integers(1, LONGEST), which=st.integers(0, 9))
    def join(self, limit, which):
        """A newcomer joins a round that everybody is in, while it is served."""
        rounds = [
            handle for handle, _ in self.handles if len(handle.sequences) == 3 and not handle.done
        ]
        if rounds and len(self.handles) < 6:
            together = Round((*ROUNDS[0].agents, NEWCOMER))
            handle = rounds[which % len(rounds)]
            self.add(Round((NEWCOMER,)), together, max_new_tokens=limit, join=handle)

    @rule(count=st.integers(1, 12))
    def step(self, count):
        for _ in range(count):
            self.engine.step()

    @rule(which=st.integers(0, 20))
    def abort(self, which):
        if which < len(self.handles):
            self.engine.abort(self.handles[which][0])

    @rule(how=st.sampled_from(["before", "after"]), at=st.integers(0, 9))
    def fail(self, how, at):
        with breaking(self.engine, how, at):
            for _ in range(3):
                with contextlib.suppress(KeyboardInterrupt):
                    self.engine.step()

    @invariant()
    def nothing_leaks(self):
        self.engine.pool.check()
        for handle, round_ in self.handles:
            expected = alone(self.policy, round_)
            for sequence in handle.sequences:
                chosen, agent, opened = (
                    sequence.answer.chosen,
                    sequence.prompt.agent,
                    sequence.opened,
                )
                if "tokendance" in self.policy and opened and not opened.bases:
                    # The pool could not hold the round with its bases.
                    expected = alone("dense", round_)
                assert chosen == expected[agent][: len(chosen)]
                if sequence.prompt.fidelity == "exact" and agent == "e":
                    assert chosen == exact(self.policy)[: len(chosen)]
                if sequence.status == "finished":
                    assert len(chosen) == min(sequence.answer.limit, len(expected[agent]))
                if sequence.ended and sequence.opened:
                    assert sequence.seat not in sequence.opened.held

    def teardown(self):
        self.occupy()
        while not self.engine.idle:
            self.engine.step()
        self.nothing_leaks()
        for handle, _ in self.handles:
            assert handle.done
            for sequence in handle.sequences:
                if not isinstance(sequence.error, Broken | KeyboardInterrupt | OutOfPages | None):
                    raise sequence.error
        assert self.engine.pool.live == self.occupied


@pytest.mark.parametrize(
    "policy",
    [
        name
        if name in QUICK
        else pytest.param(name, marks=pytest.mark.slow if name in SLOW else pytest.mark.sweep)
        for name in POLICIES
    ],
)
def test_any_interleaving(policy):
    machine = type("Machine", (Interleaving,), {"policy": policy})
    few = settings(max_examples=4, stateful_step_count=12)
    run_state_machine_as_test(machine, settings=few)

"""Authors of shared blocks: found or refused, so that no recorded answer is served as live."""

import dataclasses

import pytest

from tokendance_jax.demo import demo_trace, harbour_trace
from tokendance_jax.prompt import (
    AgentPrompt,
    Author,
    PromptError,
    Round,
    Segment,
    Trace,
    gather,
    name_authors,
    put_answers,
    relive,
)

TASK = Segment("task", "t", text="go\n")


def block(id, text, author=None):
    return Segment("shared", id, text=text, author=author and Author(*author))


def round_(index, said, *blocks, prompts=None):
    """Returns a round of agents who answer `said`. Agents see `blocks`, or their own `prompts`."""
    views = prompts or [blocks] * len(said)
    agents = (
        AgentPrompt(agent, (*view, TASK), recorded_output=answer)
        for (agent, answer), view in zip(said.items(), views, strict=True)
    )
    return Round(tuple(agents), index=index)


def authors(*rounds):
    """Returns the author of each block of the last round, by id."""
    named = name_authors(Trace("x", rounds)).rounds[-1]
    shared = (s for prompt in named.agents for s in prompt.segments if s.kind == "shared")
    return {s.id: s.author and (s.author.round, s.author.agent) for s in shared}


SAID = {"Ann": "I agree.\n", "Bob": "I agree.\n", "Cyd": "No.\n"}
FIRST = round_(0, SAID)
NUMBERED = [block(f"r0/{i}", text) for i, text in enumerate(SAID.values())]


@pytest.mark.parametrize("trace", [demo_trace(), harbour_trace()], ids=lambda trace: trace.name)
def test_every_block_of_the_shipped_traces_has_its_author(trace):
    for round_ in name_authors(trace).rounds:
        for prompt in round_.agents:
            for segment in prompt.segments:
                if segment.kind == "shared":
                    assert segment.author is not None
                    assert segment.author.round == round_.index - 1
                    assert segment.id.endswith(segment.author.agent)


def test_white_space_around_an_answer_does_not_matter():
    first = round_(0, {"Ann": " one", "Bob": "two\n\n"})
    assert authors(first, round_(1, {"Ann": "x"}, block("a", "one\n"), block("b", "two\n"))) == {
        "a": (0, "Ann"),
        "b": (0, "Bob"),
    }


def test_ids_tell_whose_answers_are_that_were_not_recorded():
    first = round_(0, {"Ann": None, "Bob": None, "Mary Ann": None})
    blocks = block("out/r0/Ann", "1\n"), block("said/Bob", "2\n"), block("by Mary Ann", "3\n")
    rule = block("rule", "be kind\n")
    assert authors(first, round_(1, {"Ann": "x"}, *blocks, rule)) == {
        "out/r0/Ann": (0, "Ann"),
        "said/Bob": (0, "Bob"),
        "by Mary Ann": (0, "Mary Ann"),
        "rule": None,
    }
    with pytest.raises(PromptError, match="round 1: shared segment 'rule' may be the answer of 'M"):
        authors(first, round_(1, {"Ann": "x"}, *blocks[:2], rule))


def test_what_the_trace_names_counts():
    first = round_(0, {"Ann": None, "Bob": "two"})
    blocks = block("x", "Ann said one\n", (0, "Ann")), block("y", "two\n", (0, "Ann"))
    found = authors(first, round_(1, {"Ann": "x"}, *blocks, block("z", "rules\n")))
    assert found == {"x": (0, "Ann"), "y": (0, "Ann"), "z": None}


def test_equal_answers_stand_in_the_order_of_the_agents():
    found = {"r0/0": (0, "Ann"), "r0/1": (0, "Bob"), "r0/2": (0, "Cyd")}
    assert authors(FIRST, round_(1, SAID, *NUMBERED)) == found
    one, two, three = NUMBERED
    assert authors(FIRST, round_(1, SAID, prompts=[[one, two], [three], [two]])) == found


@pytest.mark.parametrize(
    "prompts",
    [
        [NUMBERED[1:]] * 3,  # one of the two is missing
        [NUMBERED, NUMBERED, NUMBERED[1::-1]],  # the orders differ
        [[NUMBERED[1]], [NUMBERED[0]], []],  # no order: each agent's own is left out
        [[NUMBERED[2], *NUMBERED[:2]]] * 3,  # not the agents' order
        [[*NUMBERED, block("r0/3", "I agree.\n")]] * 3,  # one too many
    ],
)
def test_equal_answers_that_cannot_be_told_apart_are_refused(prompts):
    message = (
        "round 1: shared segment 'r0/.' may be an answer of 'Ann' in round 0 or 'Bob' in .*autho"
    )
    with pytest.raises(PromptError, match=message):
        authors(FIRST, round_(1, SAID, prompts=prompts))


def test_an_unknown_answer_may_equal_a_known_one():
    first = round_(0, {"Ann": "yes", "Bob": None})
    blocks = block("r0/0", "yes\n"), block("r0/1", "yes\n")
    with pytest.raises(PromptError, match="may be an answer of 'Ann' in round 0 or 'Bob' in roun"):
        authors(first, round_(1, SAID, *blocks))


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        (block("out/r0/Ann", "Ann agrees.\n"), "named after 'Ann' in round 0, whose recorded"),
        (block("out/r0/Cyd", "I agree.\n"), "named after 'Cyd' in round 0, whose recorded"),
        (block("to/Cyd", "I agree.\n"), "named after 'Cyd', but has the text of 'Ann'"),
        (block("out/r0/Dan", "Well.\n"), "is named as an answer, but the trace has no such"),
        (block("out/r7/Ann", "Well.\n"), "is named as an answer, but the trace has no such"),
        (block("log", "Eve: I am tired of waiting.\n"), "quotes 'Eve' in round 0, but is not"),
        (block("cut", "I am tired of"), "quotes 'Eve' in round 0, but is not"),
        (Segment("shared", "ids", token_ids=(1, 2)), "holds token ids"),
    ],
)
def test_what_looks_like_an_answer_and_is_none_is_refused(shared, message):
    first = round_(0, {**SAID, "Eve": "I am tired of waiting."})
    with pytest.raises(PromptError, match=f"round 1: shared segment {shared.id!r} .*{message}"):
        authors(first, round_(1, SAID, shared))


def test_what_was_there_before_is_nobodys_answer():
    rule = block("rule", "No.\n")
    first = round_(0, SAID, rule)
    assert authors(first, round_(1, SAID, rule, *NUMBERED[:2])) == {
        "rule": None,
        "r0/0": (0, "Ann"),
        "r0/1": (0, "Bob"),
    }


def test_blocks_of_older_rounds_keep_their_author():
    said = {"Ann": "one", "Bob": "two"}
    blocks = block("m0", "one\n"), block("m1", "two\n"), block("m2", "one\n"), block("m3", "six\n")
    rounds = round_(0, said), round_(1, {"Ann": "one", "Bob": "six"}, *blocks[:2])
    assert authors(*rounds, round_(2, said, *blocks)) == {
        "m0": (0, "Ann"),
        "m1": (0, "Bob"),
        "m2": (1, "Ann"),
        "m3": (1, "Bob"),
    }
    late = block("late", "two\n")
    assert authors(*rounds, round_(2, said, late, block("out/r0/Ann", "one\n"))) == {
        "late": (0, "Bob"),
        "out/r0/Ann": (0, "Ann"),
    }


def test_an_id_may_stand_for_another_answer_in_every_round():
    first = {"Ann": "yes", "Bob": "one"}
    rounds = (
        round_(0, first),
        round_(1, {"Ann": "yes", "Bob": "two"}, block("/Ann", "yes\n"), block("/Bob", "one\n")),
    )
    last = round_(2, first, block("/Ann", "yes\n"), block("/Bob", "two\n"))
    assert authors(*rounds, last) == {"/Ann": (1, "Ann"), "/Bob": (1, "Bob")}
    unclear = round_(2, first, block("/Ann", "yes\n"))
    with pytest.raises(PromptError, match="'/Ann' stood in an earlier round, and may be a new"):
        authors(*rounds, unclear)


def test_live_answers_of_all_rounds_are_put_in_the_place_of_recorded_ones():
    blocks = *gather({"Ann": "a"}, 0), *gather({"Ann": "b"}, 1), block("rule", "be kind\n")
    served = put_answers(round_(2, {"Ann": "c"}, *blocks), [{"Ann": "A"}, {"Ann": "B\0\n\n"}])
    shared = served.agents[0].segments[:-1]
    assert [s.text for s in shared] == ["A\n", "B\ufffd\n", "be kind\n"]
    assert [s.id for s in shared] == ["live/out/r0/Ann", "live/out/r1/Ann", "rule"]
    with pytest.raises(PromptError, match="by agent 'Ann', who has no answer in round 1; run the"):
        put_answers(round_(2, {"Ann": "c"}, *blocks), [{"Ann": "A"}])


def test_relive_knows_the_round_before():
    later = dataclasses.replace(round_(1, SAID, *NUMBERED), index=3)
    live = {"Ann": "A", "Bob": "B", "Cyd": "C"}
    shared = relive(later, live, SAID).agents[0].segments[:-1]
    assert [s.text for s in shared] == ["A\n", "B\n", "C\n"]
    old = round_(3, SAID, *gather(SAID, 1))
    with pytest.raises(PromptError, match="'out/r1/Ann' is by agent 'Ann', who has no answer in"):
        relive(old, live, SAID)
    first = round_(0, SAID, *NUMBERED)
    assert relive(first, {}, {}) == first
    with pytest.raises(PromptError, match="round 0 has no round before it"):
        relive(first, live, SAID)

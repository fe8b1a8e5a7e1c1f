"""Which rounds, prompts and segments are valid, and which are refused."""

import dataclasses
import math

import jaxtyping
import pytest

from tokendance_jax.prompt import AgentPrompt, PromptError, Round, Sampling, Segment

TASK = Segment("task", "t", text="go\n")


@pytest.fixture(autouse=True)
def _unhooked():
    """The product runs without the tests' import hook, which would refuse wrong types first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def _prompt(agent: str = "a", *before: Segment, **fields) -> AgentPrompt:
    return AgentPrompt(agent, (*before, TASK), **fields)


def test_a_round_keeps_what_it_was_given():
    system = Segment("system", "s", text="")
    shared = Segment("shared", "b", token_ids=(1, 2))
    prompt = _prompt("a", system, shared, max_new_tokens=3, recorded_output="done\n")
    round_ = Round((prompt, _prompt("b", shared)), max_new_tokens=7, index=2)
    assert round_.agents[0].segments == (system, shared, TASK)
    assert round_.sampling == Sampling()
    assert system.empty
    assert not shared.empty
    assert prompt.fidelity == "collective"
    assert _prompt(fidelity="exact").fidelity == "exact"
    with pytest.raises(dataclasses.FrozenInstanceError):
        round_.index = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_several_tasks_may_stand_at_the_end():
    rule = Segment("task", "rule", text="be brief\n")
    assert _prompt("a", rule).segments == (rule, TASK)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "privat", "id": "x", "text": ""}, "'x': kind 'privat' is none of system"),
        ({"kind": "task", "id": "", "text": ""}, "id of a segment is empty"),
        ({"kind": "task", "id": 3, "text": ""}, "id of a segment: expected a string"),
        ({"kind": "task", "id": "x\0", "text": ""}, "NUL character at position 1"),
        ({"kind": "task", "id": "x"}, "exactly one of text and token_ids"),
        ({"kind": "task", "id": "x", "text": "", "token_ids": ()}, "exactly one"),
        ({"kind": "task", "id": "x", "text": "a\0"}, "'x': text: NUL character at position 1"),
        ({"kind": "task", "id": "x", "text": "\udc80"}, r"lone surrogate U\+DC80 at position 0"),
        ({"kind": "task", "id": "x", "text": 5}, "text: expected a string, got int"),
        ({"kind": "shared", "id": "x", "text": "", "author": "Ann"}, "author must be an Author"),
        ({"kind": "task", "id": "x", "token_ids": [1]}, "token_ids must be a tuple of int"),
        ({"kind": "task", "id": "x", "token_ids": (-1,)}, "from 0 to 2147483647, got -1"),
        ({"kind": "task", "id": "x", "token_ids": (True,)}, "a token id must be an integer"),
    ],
)
def test_bad_segments_are_refused(fields, message):
    with pytest.raises(PromptError, match=message):
        Segment(**fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _prompt(""), "name of an agent is empty"),
        (lambda: _prompt("a\ud800"), "name of an agent: lone surrogate"),
        (lambda: AgentPrompt("a", ()), "'a': the last segment must be a task"),
        (lambda: AgentPrompt("a", (Segment("history", "h", text="x"),)), "must be a task"),
        (lambda: _prompt("a", Segment("task", "u", text="")), "task segment 'u' is empty"),
        (
            lambda: _prompt("a", TASK, Segment("shared", "b", text="x")),
            "shared segment 'b' stands after a task",
        ),
        (lambda: AgentPrompt("a", [TASK]), "segments must be a tuple of Segment"),  # pyright: ignore
        (lambda: AgentPrompt("a", ("go",)), "segments must be a tuple of Segment"),  # pyright: ignore
        (lambda: _prompt(max_new_tokens=0), "'a': max_new_tokens must be an integer >= 1"),
        (lambda: _prompt(recorded_output="\0"), "recorded_output: NUL"),
        (
            lambda: _prompt(fidelity="precise"),
            "'a': fidelity 'precise' is none of collective, exact",
        ),
    ],
)
def test_bad_prompts_are_refused(make, message):
    with pytest.raises(PromptError, match=message):
        make()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature must be >= 0"),
        ({"temperature": math.nan}, "temperature must be a finite number"),
        ({"temperature": math.inf}, "temperature must be a finite number"),
        ({"temperature": True}, "temperature must be a finite number"),
        ({"top_k": -1}, "top_k must be an integer from 0 to 2147483647, got -1"),
        ({"top_k": 1.0}, "top_k must be an integer from 0"),
        ({"top_k": 2**31}, "top_k must be an integer from 0 to 2147483647, got 2147483648"),
        ({"temperature": 10**400}, "temperature must be at most 3.4e"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"seed": 2**32}, "seed must be an integer from 0"),
        ({"stop": ("",)}, "a stop string is empty"),
        ({"stop": "end"}, "stop must be a tuple of str"),
        ({"stop_token_ids": (-1,)}, "a stop token id must be"),
        ({"min_p": -0.1}, "min_p must be from 0 to 1, got -0.1"),
        ({"min_p": 1.5}, "min_p must be from 0 to 1"),
        ({"min_p": math.nan}, "min_p must be a finite number"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"repetition_penalty": 10**400}, "repetition_penalty must be above 0 and at most 3.4e"),
        ({"presence_penalty": 2.1}, "presence_penalty must be from -2 to 2, got 2.1"),
        ({"frequency_penalty": -2.1}, "frequency_penalty must be from -2 to 2"),
        ({"frequency_penalty": "1"}, "frequency_penalty must be a finite number"),
        ({"logit_bias": {3: 1.0}}, "logit_bias must be a tuple of tuple"),
        ({"logit_bias": ((3, 1.0, 2),)}, "logit_bias must hold pairs of token id and bias"),
        ({"logit_bias": ((-1, 1.0),)}, "a token id of logit_bias must be an integer from 0"),
        ({"logit_bias": ((3, 101.0),)}, "logit_bias of token 3 must be from -100 to 100"),
        ({"logit_bias": ((3, math.inf),)}, "logit_bias of token 3 must be a finite number"),
        ({"logit_bias": ((3, 1), (3, 2))}, "logit_bias names token 3 twice"),
        ({"logit_bias": tuple((i, 0) for i in range(301))}, "301 entries; give at most 300"),
        ({"ignore_eos": 1}, "ignore_eos must be a bool, got 1"),
        ({"logprobs": 21}, "logprobs must be an integer from 0 to 20, got 21"),
        ({"logprobs": True}, "logprobs must be an integer from 0"),
    ],
)
def test_bad_sampling_is_refused(fields, message):
    with pytest.raises(PromptError, match=message):
        Sampling(**fields)


def test_whole_numbers_are_good_temperatures():
    assert Sampling(temperature=1, top_p=1).temperature == 1


@pytest.mark.parametrize(
    ("fields", "adjusts"),
    [
        ({}, False),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.5, "min_p": 0.5}, False),
        ({"stop": ("x",), "stop_token_ids": (3,), "ignore_eos": True}, False),
        ({"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}, False),
        ({"repetition_penalty": 0.9}, True),
        ({"presence_penalty": -2}, True),
        ({"frequency_penalty": 2}, True),
        ({"logit_bias": ((3, -100),)}, True),
        ({"logprobs": 0}, True),
    ],
)
def test_which_settings_adjust_logits_or_report_them(fields, adjusts):
    assert Sampling(**fields).adjusts == adjusts


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Round(()), "round 0: no agents"),
        (lambda: Round([_prompt()]), "agents must be a tuple of AgentPrompt"),  # pyright: ignore
        (lambda: Round((_prompt(), _prompt()), index=4), "round 4: agent 'a' occurs twice"),
        (lambda: Round((_prompt(),), max_new_tokens=0), "max_new_tokens must be an integer >= 1"),
        (lambda: Round((_prompt(),), index=-1), "index must be an integer >= 0"),
        (
            lambda: Round(
                (
                    _prompt("a", Segment("shared", "b", text="x")),
                    _prompt("c", Segment("shared", "b", text="y")),
                )
            ),
            "agent 'c': shared segment 'b' had another content",
        ),
    ],
)
def test_bad_rounds_are_refused(make, message):
    with pytest.raises(PromptError, match=message):
        make()

import copy

import pytest

from tokendance_jax.prompt import PromptError
from tokendance_jax.prompt.recording import trace_of

RECORDING = {
    "name": "harbour",
    "max_new_tokens": 9,
    "agents": {
        "Ann": {"persona": "You are Ann.", "task": "What now?"},
        "Bo": {"task": "And you?"},
        "Cy": {"persona": "You are Cy.\n\n", "task": "Well?"},
    },
    "rounds": [
        {"Ann": {"history": "Nets.", "output": "To the quay."}, "Bo": {"output": "I wait."}},
        {
            "Bo": {"task": "Who comes?", "output": "Ann does."},
            "Ann": {"history": "The quay."},
            "Cy": {},
        },
    ],
}


def texts(prompt):
    return [(segment.kind, segment.text) for segment in prompt.segments]


def test_answers_become_blocks_of_the_next_round():
    trace = trace_of(RECORDING)
    first, second = trace.rounds
    assert first.max_new_tokens == 9
    assert [prompt.agent for prompt in first.agents] == ["Ann", "Bo"]
    assert texts(first.agents[1]) == [("task", "And you?\n")]
    assert first.agents[0].recorded_output == "To the quay."
    bo, ann, cy = second.agents
    blocks = [("shared", "To the quay.\n"), ("shared", "I wait.\n")]
    assert texts(bo) == [*blocks, ("task", "Who comes?\n")]
    private = [("system", "You are Ann.\n"), ("history", "Nets.\n"), ("history", "The quay.\n")]
    assert texts(ann) == [*private, *blocks, ("task", "What now?\n")]
    assert texts(cy)[0] == ("system", "You are Cy.\n")
    assert [s.author.agent for s in cy.segments if s.author] == ["Ann", "Bo"]


@pytest.mark.parametrize(
    ("blocks", "bo", "cy"),
    [("own_first", ["Bo", "Ann"], ["Ann", "Bo"]), ("others", ["Ann"], ["Ann", "Bo"])],
)
def test_agents_see_the_blocks_that_are_asked_for(blocks, bo, cy):
    seen = {
        prompt.agent: [s.author.agent for s in prompt.segments if s.author]
        for prompt in trace_of(RECORDING, blocks=blocks).rounds[1].agents
    }
    assert (seen["Bo"], seen["Cy"]) == (bo, cy)


def changed(change):
    recording = copy.deepcopy(RECORDING)
    change(recording)
    return recording


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("name"), "recording: name is missing"),
        (lambda r: r.update(rounds={}), "recording: rounds: {} is not of type list"),
        (lambda r: r.update(turns=[]), "recording: unknown key 'turns'; known are name"),
        (lambda r: r["agents"].update(Di=3), "agent 'Di': 3 is not a JSON object"),
        (lambda r: r["agents"]["Bo"].pop("task"), "round 0: agent 'Bo': no task; give one"),
        (lambda r: r["rounds"][0].update(Eve={}), "round 0: unknown agent 'Eve'; known are Ann"),
        (lambda r: r["rounds"][1]["Cy"].update(output=4), "'Cy': output: 4 is not of type str"),
        (lambda r: r.update(max_new_tokens=0), "max_new_tokens must be an integer >= 1"),
        (lambda r: r.update(rounds=[]), "at least one Round"),
    ],
)
def test_names_what_is_wrong(change, message):
    with pytest.raises(PromptError, match=message):
        trace_of(changed(change))

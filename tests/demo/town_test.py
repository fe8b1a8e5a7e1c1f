"""Each town probe has one right answer, which follows from its prompt; splits are disjoint."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokendance_jax.demo.town import (
    GUIDE,
    KINDS,
    MAX_NEW_TOKENS,
    Probe,
    ProbeKind,
    View,
    draw_town,
    drifting_rounds,
    probe_round,
    probes,
    prompt_of,
    story,
    view_of,
    words,
)
from tokendance_jax.prompt import AgentPrompt

SEEDS = st.integers(0, 10**6)
SIZES = st.integers(2, 16)
KINDS_OF_TEXT = "system", "history", "shared", "task"
_PLAN = r"at (\w+) (\w+) (?:visits (\w+ \w+)|joins (\w+))"


def text_of(prompt: AgentPrompt, *kinds: str) -> str:
    return "".join(s.text or "" for s in prompt.segments if s.kind in kinds)


def plans_in(text: str) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Maps (person, time) to the plans in a text: (place, leader), one of which is empty."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for time, person, place, leader in re.findall(_PLAN, text):
        found.setdefault((person, time), []).append((place, leader))
    return found


def read_answer(prompt: AgentPrompt) -> str:
    """Derives the answer from the prompt's text alone."""
    question = text_of(prompt, "task").strip()
    said = [s for s in prompt.segments if s.id.startswith("said/")]
    shared = "".join(s.text or "" for s in said)  # in this round or in earlier ones
    private = "".join(s.text or "" for s in prompt.segments[:-1] if s not in said)
    if asked := re.fullmatch(r"Where does (\w+) go at (\w+)\?", question):
        plans, parts = plans_in(private + shared), []
        person, time = asked.groups()
        while True:
            # In a story, others may tell a plan that the agent also remembers.
            match list(set(plans.get((person, time), []))):
                case []:
                    parts.append(f"at {time} {person} goes, nobody said where")
                    break
                case [(place, "")]:
                    parts.append(f"at {time} {person} visits {place}")
                    break
                case [("", leader)]:
                    parts.append(f"at {time} {person} joins {leader}")
                    person = leader
                case more:
                    raise AssertionError(f"{question}: {more}")
        return f"So {', so '.join(parts)}."
    if asked := re.fullmatch(r"Where did (\w+) \w+ the (\w+)\?", question):
        (clause,) = re.findall(rf"Once ({asked[1]} \w+ the {asked[2]} at \w+ \w+)\.", private)
        return f"So {clause}."
    if asked := re.fullmatch(r"Repeat what (\w+) says\.", question):
        (block,) = re.findall(rf"^(Then {asked[1]} says: .*\.)$", shared, re.MULTILINE)
        return block
    ((name, mood),) = re.findall(r"You are (\w+), a \w+, and you feel (\w+)\.", private)
    if asked := re.fullmatch(r"What does \w+ say about (.*)\?", question):
        plans = plans_in(private)
        clauses = [
            f"at {time} {name} visits {plans[name, time][0][0]}" for time in asked[1].split(" and ")
        ]
    elif asked := re.fullmatch(r"What did (\w+) tell \w+ about (\w+) at (\w+)\?", question):
        (block,) = re.findall(rf"^Then {asked[1]} says: .*$", shared, re.MULTILINE)
        (clause,) = re.findall(rf"at {asked[3]} {asked[2]} (?:visits|joins) [^,.]*", block)
        clauses = [f"{asked[1]} told {name} that {clause}"]
    else:
        clauses = [question.removeprefix("Tell that ").removesuffix(".")]
    return f"Then {name} says: {', '.join(clauses)}, and {name} feels {mood}."


def a_view(seed: int, agents: int, split: words.Split) -> View:
    rng = random.Random(seed)
    town = draw_town(rng, agents, split)
    seen = rng.sample(range(agents), rng.randint(1, agents))
    return view_of(town, rng.randrange(agents), seen)


def sources(prompt: AgentPrompt, probe: Probe) -> tuple[int, int]:
    """Counts the shared blocks and the private lines that contain a clause of the answer."""
    clauses = re.findall(rf"{_PLAN}|(\w+ \w+ the \w+ at \w+ \w+)", probe.answer)
    texts = [" ".join(filter(None, clause)) for clause in clauses]
    assert len(set(texts)) == len(texts)
    where = [re.escape(m.group()) for m in re.finditer(_PLAN, probe.answer)]
    where += [re.escape(clause[-1]) for clause in clauses if clause[-1]]
    shared = [s.text or "" for s in prompt.segments if s.kind == "shared"]
    private = text_of(prompt, "history").splitlines()
    pattern = re.compile("|".join(where) or r"(?!)")
    return sum(bool(pattern.search(b)) for b in shared), sum(
        bool(pattern.search(line)) for line in private
    )


@given(SEEDS, SIZES, st.sampled_from(["train", "held_out"]))
def test_every_probe_has_the_one_answer_that_its_text_gives(seed, agents, split):
    view = a_view(seed, agents, split)
    asked = set()
    for kind in KINDS:
        for probe in probes(view, kind, random.Random(seed)):
            prompt = prompt_of(view, probe)
            assert read_answer(prompt) == probe.answer == prompt.recorded_output
            assert probe.kind == kind
            assert probe.right(probe.answer)
            assert probe.right(f" {probe.answer}\n")
            assert probe.right(probe.answer.replace("So", "I think").upper())
            assert not probe.right(probe.answer[:-2])
            assert not probe.right(f"Well.\n{probe.answer}")
            assert probe.question not in asked, "two kinds ask the same"
            asked.add(probe.question)


@given(SEEDS, SIZES)
def test_kinds_rest_on_what_they_say(seed, agents):
    view = a_view(seed, agents, "train")
    rests_on: dict[ProbeKind, tuple[int, int]]
    rests_on = {"retrieve": (1, 0), "recall": (0, 1), "abstain": (0, 0)}
    for kind, (shared, private) in rests_on.items():
        for probe in probes(view, kind, random.Random(seed)):
            if " joins " in probe.answer:
                continue  # the chain ends in an abstention
            assert sources(prompt_of(view, probe), probe) == (shared, private)
    for probe in probes(view, "combine", random.Random(seed)):
        first, second = probe.answer.split(", so ")
        assert " joins " in first
        assert " visits " in second


@given(SEEDS, SIZES)
def test_nothing_is_told_twice_and_nothing_in_a_view_begins_alike(seed, agents):
    town = draw_town(random.Random(seed), agents, "train")
    text = "\n".join(statement.text for statement in town.statements)
    assert all(len(found) == 1 for found in plans_in(text).values())
    names = [person.name for person in town.people] + list(town.absent)
    assert len({name[:3] for name in names}) == len(names)
    for seat in range(agents):
        view = view_of(town, seat, range(agents))
        said = [plan.place for plan in view.said.values() if plan.place]
        own = [plan.place for plan in view.secrets] + [memory.place for memory in view.memories]
        places = [place.split()[0] for place in said + own if place]
        assert len(set(places)) == len(places)


def test_splits_are_apart_and_share_their_pieces():
    for all_of in (words.names, words.places):
        train, held_out = all_of("train"), all_of("held_out")
        assert not set(train) & set(held_out)
        assert len(held_out) * 6 < len(train) < len(held_out) * 8
    assert {name[:3] for name in words.names("held_out")} == set(words.NAME_STARTS)
    assert {name[3:] for name in words.names("held_out")} == set(words.NAME_ENDS)
    assert {p.split()[0] for p in words.places("held_out")} == set(words.ADJECTIVES)
    assert {p.split()[1] for p in words.places("held_out")} == set(words.NOUNS)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_rounds_keep_to_their_split(split):
    names, places = set(words.names(split)), set(words.places(split))
    for seed in range(30):
        round_, _ = probe_round(seed, 9, split=split)
        text = "".join(text_of(prompt, "history", "shared") for prompt in round_.agents)
        assert {prompt.agent for prompt in round_.agents} <= names
        for (person, _), found in plans_in(text).items():
            assert person in names
            assert {place for place, _ in found if place} <= places


def test_rounds_follow_their_arguments():
    round_, asked = probe_round(1, 16)
    again = probe_round(1, 16)
    assert (round_, asked) == again
    assert round_ != probe_round(2, 16)[0]
    assert {probe.kind for probe in asked} == set(KINDS[:5])
    blocks = [[s.id for s in p.segments if s.kind == "shared"] for p in round_.agents]
    assert all(block == blocks[0] for block in blocks)
    assert len(blocks[0]) == 16
    round_, asked = probe_round(1, 10, ["retrieve"], own=False, keep=0.5, shuffled=True)
    assert {probe.kind for probe in asked} == {"retrieve"}
    for prompt in round_.agents:
        seen = [s.id for s in prompt.segments if s.kind == "shared"]
        assert len(seen) == 4
        assert f"said/{prompt.agent}" not in seen


@given(SEEDS, st.integers(2, 8), st.integers(1, 40))
def test_chunks_hold_the_same_text_and_questions(seed, agents, size):
    whole, asked = probe_round(seed, agents)
    cut, again = probe_round(seed, agents, chunk_words=size)
    assert asked == again
    for one, other in zip(whole.agents, cut.agents, strict=True):
        assert text_of(one, "shared") == text_of(other, "shared")
        chunks = [s.text or "" for s in other.segments if s.kind == "shared"]
        assert all(len(chunk.split()) == size for chunk in chunks[:-1])
        assert 0 < len(chunks[-1].split()) <= size
        assert chunks == [s.text for s in cut.agents[0].segments if s.kind == "shared"]


@pytest.mark.parametrize("agents", [3, 4, 8, 13])
def test_stories_are_an_all_gather_with_right_answers(agents):
    trace = story(agents, agents)
    assert trace == story(agents, agents)
    outputs: list[str] = []
    for round_ in trace.rounds:
        assert len(round_.agents) == agents
        for prompt in round_.agents:
            assert text_of(prompt, "shared") == "".join(f"{output}\n" for output in outputs)
            assert read_answer(prompt) == prompt.recorded_output
            assert prompt.max_new_tokens == MAX_NEW_TOKENS
        outputs = [prompt.recorded_output or "" for prompt in round_.agents]
    for before, after in zip(trace.rounds, trace.rounds[1:], strict=False):
        for old, new in zip(before.agents, after.agents, strict=True):
            history = text_of(old, "history")
            assert text_of(new, "history").startswith(history)
            assert len(text_of(new, "history")) > len(history)


def test_what_a_round_shares_is_history_in_the_next():
    rounds = drifting_rounds(3, 5, 4)
    assert rounds == drifting_rounds(3, 5, 4)
    for index, (round_, asked) in enumerate(rounds):
        assert round_.index == index
        for prompt, probe in zip(round_.agents, asked, strict=True):
            assert read_answer(prompt) == probe.answer
            said = [s for s in prompt.segments if s.id.startswith("said/")]
            assert [s.kind for s in said] == ["history"] * 3 * index + ["shared"] * 3
        if index:
            before = text_of(rounds[index - 1][0].agents[0], "history", "shared")
            assert text_of(round_.agents[0], "history") == before


def test_a_guide_stands_in_front_and_changes_nothing_else():
    plain, asked = probe_round(5, 4)
    guided, again = probe_round(5, 4, guide=GUIDE)
    assert asked == again
    for one, other in zip(plain.agents, guided.agents, strict=True):
        assert text_of(other, *KINDS_OF_TEXT) == GUIDE + text_of(one, *KINDS_OF_TEXT)

"""The town as rounds of the project: prompts in segments, rounds of probes, stories."""

import dataclasses
import random
import re
from collections.abc import Sequence

from tokendance_jax.demo.town import words
from tokendance_jax.demo.town.probes import (
    KINDS,
    Probe,
    ProbeKind,
    probes,
    tell_follow,
    tell_heard,
    tell_plans,
)
from tokendance_jax.demo.town.town import (
    Clause,
    Plan,
    Statement,
    Town,
    View,
    draw_quiet_town,
    draw_town,
    view_of,
)
from tokendance_jax.prompt import AgentPrompt, Round, Segment, Trace

# Enough for the longest answer: a block, word for word, of two plans passed on and a mood.
MAX_NEW_TOKENS = 64
# The five graded kinds. Probes of the kind "tell" make up stories.
GRADED = KINDS[:5]
GUIDE = """\
Answer with one sentence, in the words of what was said. Here are four examples.
Where does Ann go at noon? So at noon Ann visits Blue Gate.
Where does Bob go at noon? So at noon Bob joins Ann, so at noon Ann visits Blue Gate.
Where does Ann go at dusk? So at dusk Ann goes, nobody said where.
Repeat what Bob says. Then Bob says: at noon Bob joins Ann, and Bob feels sad.
"""
_SAID_A_ROUND = 3


def prompt_of(
    view: View, probe: Probe, *, guide: str = "", older: int = 0, chunk_words: int = 0
) -> AgentPrompt:
    """Makes an agent's prompt: persona, memories, everybody's statements, and the question.

    Args:
      view: what the agent sees.
      probe: the question and its answer.
      guide: text at the beginning. `GUIDE` explains the town to models that were not trained on it.
      older: number of statements that come first, as history: earlier rounds shared them.
      chunk_words: if positive, the shared text is cut into blocks of this many words, also in the
        middle of sentences, as documents are cut for retrieval. If 0, each block is a statement.
        The text is the same in both cases.
    """
    person = view.person
    name = person.name
    persona = (
        "In a small town by the sea, everybody tells the others who is where, and when.\n"
        f"You are {name}, a {person.trade}, and you feel {person.mood}.\n"
    )
    memories = [f"Today {plan.text}.\n" for plan in view.secrets]
    memories += [f"Once {memory.text}.\n" for memory in view.memories]
    said = [(f"said/{s.speaker}", f"{s.text}\n") for s in view.statements]
    shared = said[older:]
    if chunk_words:
        shared = _chunks("".join(text for _, text in shared), chunk_words)
    segments = [
        Segment("system", f"persona/{name}", guide + persona),
        *(Segment("history", f"memory/{name}/{i}", text) for i, text in enumerate(memories)),
        *(Segment("history", at, text) for at, text in said[:older]),
        *(Segment("shared", at, text) for at, text in shared),
        Segment("task", f"task/{name}", probe.question),
    ]
    return AgentPrompt(name, tuple(segments), MAX_NEW_TOKENS, probe.answer)


def _chunks(text: str, size: int) -> list[tuple[str, str]]:
    """Cuts a text before spaces into blocks of `size` words, which keep the text's tokens."""
    words_in = re.findall(r"\s*\S+(?:\s+\Z)?", text)
    cut = range(0, len(words_in), size)
    return [(f"chunk/{at // size}", "".join(words_in[at : at + size])) for at in cut]


def probe_round(
    seed: int,
    agents: int,
    kinds: Sequence[ProbeKind] = GRADED,
    *,
    split: words.Split = "held_out",
    own: bool = True,
    keep: float = 1.0,
    shuffled: bool = False,
    guide: str = "",
    chunk_words: int = 0,
) -> tuple[Round, tuple[Probe, ...]]:
    """Draws a round in which every agent gets one probe.

    Args:
      seed: the same seed gives the same round.
      agents: number of agents, at least 2.
      kinds: kinds of the probes, assigned to the agents in turn. An agent whose view allows no
        probe of its kind gets the next kind that the view allows.
      split: which names and places occur.
      own: whether agents see their own statement.
      keep: share of the other statements that each agent sees.
      shuffled: whether each agent sees the statements in an order of its own.
      guide: text at the beginning of every prompt.
      chunk_words: as for `prompt_of`.

    Returns:
      The round, and the probes in the order of its agents.
    """
    rng = random.Random(seed)
    town = draw_town(rng, agents, split)
    turns = []
    for seat in range(agents):
        others = [other for other in range(agents) if other != seat]
        seen = rng.sample(others, max(1, round(keep * len(others)))) + [seat] * own
        rng.shuffle(seen)
        view = view_of(town, seat, seen if shuffled else sorted(seen))
        turns.append((view, _first_of(view, kinds, seat, rng)))
    return _round_of(turns, guide=guide, chunk_words=chunk_words)


def drifting_rounds(
    seed: int,
    agents: int,
    rounds: int,
    kinds: Sequence[ProbeKind] = GRADED,
    *,
    guide: str = "",
) -> list[tuple[Round, tuple[Probe, ...]]]:
    """Draws rounds in which shared text becomes history, with probes about all of it.

    Each round shares three statements of a held-out town. They are part of the history in all later
    rounds.

    Args:
      seed: the same seed gives the same rounds.
      agents: number of agents, at most three times the number of rounds.
      rounds: number of rounds.
      kinds: as for `probe_round`.
      guide: text at the beginning of every prompt.
    """
    rng = random.Random(seed)
    town = draw_town(rng, _SAID_A_ROUND * rounds, "held_out")
    found = []
    for index in range(rounds):
        older = _SAID_A_ROUND * index
        turns = []
        for seat in range(agents):
            view = view_of(town, seat, range(older + _SAID_A_ROUND))
            turns.append((view, _first_of(view, kinds, seat + index, rng)))
        found.append(_round_of(turns, index=index, guide=guide, older=older))
    return found


def story(seed: int, agents: int, *, split: words.Split = "train") -> Trace:
    """Draws three rounds of one town: agents tell plans, pass them on or join, then are asked.

    The recorded outputs are the right answers. The answers of a round are the shared blocks of the
    next round. Histories grow by one memory each round.

    Args:
      seed: the same seed gives the same story.
      agents: number of agents, at least 3.
      split: which names and places occur.
    """
    rng = random.Random(seed)
    town = draw_quiet_town(rng, agents, split)
    told = tuple(
        Statement(p.name, tuple(Clause(plan) for plan in town.secrets[p.name]), p.mood)
        for p in town.people
    )
    passed_on = tuple(_pass_on(town, seat) for seat in range(agents))
    rounds = []
    for index, blocks in enumerate(((), told, passed_on)):
        turns = []
        for seat in range(agents):
            view = view_of(dataclasses.replace(town, statements=blocks), seat, range(len(blocks)))
            view = dataclasses.replace(view, memories=view.memories[: index + 1])
            if index == 0:
                probe = tell_plans(view, view.secrets)
            elif index == 1:
                probe = _retell(view, passed_on[seat].clauses[0])
            else:
                probe = _first_of(view, GRADED, seat, rng)
            turns.append((view, probe))
        rounds.append(_round_of(turns, index=index)[0])
    return Trace(f"town-{seed}", tuple(rounds))


def _round_of(
    turns: Sequence[tuple[View, Probe]],
    *,
    index: int = 0,
    guide: str = "",
    older: int = 0,
    chunk_words: int = 0,
) -> tuple[Round, tuple[Probe, ...]]:
    """Makes a round from the view and the probe of each agent; returns it with the probes."""
    prompts = tuple(
        prompt_of(*turn, guide=guide, older=older, chunk_words=chunk_words) for turn in turns
    )
    round_ = Round(prompts, max_new_tokens=MAX_NEW_TOKENS, index=index)
    return round_, tuple(probe for _, probe in turns)


def _first_of(view: View, kinds: Sequence[ProbeKind], seat: int, rng: random.Random) -> Probe:
    """Returns a probe of the seat's kind, or of the next kind that the view allows."""
    start = seat % len(kinds)
    turns = (*kinds[start:], *kinds[:start])
    return next(found[0] for kind in turns if (found := probes(view, kind, rng)))


def _pass_on(town: Town, seat: int) -> Statement:
    """Makes an agent's statement about somebody else's plan.

    Of two neighbours, one passes on the plan of a person and the other joins that person. If the
    other has a plan of its own at that time, it passes on the person's other plan instead.
    """
    person = town.people[seat]
    subject = town.people[(seat - seat % 2 + 2) % len(town.people)].name
    plan, other = town.secrets[subject]
    if seat % 2 == 0:
        clause = Clause(plan, subject)
    elif plan.time in {own.time for own in town.secrets[person.name]}:
        clause = Clause(other, subject)
    else:
        clause = Clause(Plan(person.name, plan.time, leader=subject))
    return Statement(person.name, (clause,), person.mood)


def _retell(view: View, clause: Clause) -> Probe:
    """Makes the probe that an agent answers with this clause."""
    plan = clause.plan
    if plan.leader:
        return tell_follow(view, view.said[plan.leader, plan.time])
    speaker = next(s for s in view.statements if s.speaker == clause.teller)
    return tell_heard(view, speaker, plan)

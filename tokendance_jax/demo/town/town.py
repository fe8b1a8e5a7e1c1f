"""A small town: people, what they say about who is where and when, and what each keeps private.

All choices are drawn from a `random.Random`, so the same seed gives the same town.
"""

import dataclasses
import functools
import random
from collections.abc import Mapping, Sequence

from tokendance_jax.demo.town import words

# Number of people who are talked about but do not speak.
_ABSENT = 2
# Probability that a clause joins somebody, and that it passes on what somebody told. Other clauses
# state the speaker's own plan.
_FOLLOWS, _HEARD = 0.3, 0.25
# Others tell a plan of a person only while more than this many of the person's times are free.
_OWN_TIMES = 3
_SAYS_MOOD = 0.4


@dataclasses.dataclass(frozen=True, slots=True)
class Person:
    """Somebody of the town."""

    name: str
    trade: str
    mood: str


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """Where somebody is at one time: at a place, or wherever a leader is.

    Attributes:
      person: name of the person.
      time: the time of day.
      place: the place; None if there is a leader.
      leader: whom the person joins; None if there is a place.
    """

    person: str
    time: str
    place: str | None = None
    leader: str | None = None

    @property
    def text(self) -> str:
        """The plan as a clause."""
        where = f"visits {self.place}" if self.leader is None else f"joins {self.leader}"
        return f"at {self.time} {self.person} {where}"


@dataclasses.dataclass(frozen=True, slots=True)
class Clause:
    """A plan as somebody says it: the speaker's own plan, or one that a teller told the speaker."""

    plan: Plan
    teller: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Statement:
    """What one person says in a round: the text of a shared block.

    Attributes:
      speaker: who says it.
      clauses: the plans in it.
      mood: how the speaker feels; None: not said.
    """

    speaker: str
    clauses: tuple[Clause, ...]
    mood: str | None = None

    @property
    def text(self) -> str:
        """One sentence, without a newline."""
        parts = [
            f"{c.teller} told {self.speaker} that {c.plan.text}" if c.teller else c.plan.text
            for c in self.clauses
        ]
        if self.mood:
            parts.append(f"and {self.speaker} feels {self.mood}")
        return f"Then {self.speaker} says: {', '.join(parts)}."


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """What a person did with a thing, and where."""

    person: str
    verb: str
    thing: str
    place: str

    @property
    def text(self) -> str:
        """The memory as a clause."""
        return f"{self.person} {self.verb} the {self.thing} at {self.place}"


@dataclasses.dataclass(frozen=True, slots=True)
class Town:
    """The people of a town, what they say in one round, and what they keep private.

    Attributes:
      people: the agents, in order.
      absent: names of people who are only talked about.
      statements: one per agent, in the order of the agents.
      memories: agent to the memories that only this agent has.
      secrets: agent to the agent's own plans that nobody told.
    """

    people: tuple[Person, ...]
    absent: tuple[str, ...]
    statements: tuple[Statement, ...]
    memories: Mapping[str, tuple[Memory, ...]]
    secrets: Mapping[str, tuple[Plan, ...]]


@dataclasses.dataclass(frozen=True)
class View:
    """What one agent sees of a town.

    Attributes:
      person: the agent.
      memories: its own.
      secrets: its own.
      statements: the shared blocks that it sees, in its order.
      names: names of everybody whom a question may be about.
    """

    person: Person
    memories: tuple[Memory, ...]
    secrets: tuple[Plan, ...]
    statements: tuple[Statement, ...]
    names: tuple[str, ...]

    @functools.cached_property
    def said(self) -> dict[tuple[str, str], Plan]:
        """The plans that the statements tell, by person and time."""
        plans = [clause.plan for statement in self.statements for clause in statement.clauses]
        return {(plan.person, plan.time): plan for plan in plans}


def draw_town(rng: random.Random, agents: int, split: words.Split) -> Town:
    """Draws a town in which everybody has spoken, and no plan is told twice.

    Args:
      rng: source of all random choices.
      agents: number of people who speak.
      split: which names and places occur. No two names have the same beginning, nor do two places
        in one view.
    """
    people, absent = _draw_people(rng, agents, split)
    names = [person.name for person in people] + list(absent)
    places = _draw_places(rng, split)
    plans: dict[tuple[str, str], Plan] = {}
    statements = []
    for person in people:
        clauses = [
            _draw_clause(rng, person.name, names, plans, places) for _ in range(rng.choice((1, 2)))
        ]
        mood = person.mood if rng.random() < _SAYS_MOOD else None
        statements.append(Statement(person.name, tuple(clauses), mood))
    memories, secrets = {}, {}
    for name in names[:agents]:
        # Private places of different people may be equal, because no view contains both.
        mine = rng.sample(places, 5)
        memories[name] = _draw_memories(rng, name, mine, rng.choice((1, 2, 3)))
        free = [time for time in words.TIMES if (name, time) not in plans]
        times = rng.sample(free, min(len(free), rng.choice((0, 1, 2))))
        secrets[name] = tuple(Plan(name, time, mine.pop()) for time in times)
    return Town(people, absent, tuple(statements), memories, secrets)


def draw_quiet_town(rng: random.Random, agents: int, split: words.Split) -> Town:
    """Draws a town before anybody speaks, with two secrets and three memories per person."""
    people, absent = _draw_people(rng, agents, split)
    places = _draw_places(rng, split)
    secrets = {
        person.name: tuple(
            Plan(person.name, time, places.pop()) for time in rng.sample(words.TIMES, 2)
        )
        for person in people
    }
    memories = {
        person.name: _draw_memories(rng, person.name, rng.sample(places, 3), 3) for person in people
    }
    return Town(people, absent, (), memories, secrets)


def view_of(town: Town, seat: int, seen: Sequence[int]) -> View:
    """Returns what an agent sees of a town.

    Args:
      town: the town.
      seat: number of the agent.
      seen: numbers of the agents whose statements it sees, in its order.
    """
    person = town.people[seat]
    return View(
        person,
        town.memories[person.name],
        town.secrets[person.name],
        tuple(town.statements[other] for other in seen),
        tuple(p.name for p in town.people) + town.absent,
    )


def _draw_people(
    rng: random.Random, agents: int, split: words.Split
) -> tuple[tuple[Person, ...], tuple[str, ...]]:
    """Draws the agents, and the names of people who are only talked about."""
    starts = rng.sample(range(len(words.NAME_STARTS)), agents + _ABSENT)
    names = _complete(rng, starts, words.NAME_STARTS, words.NAME_ENDS, "", split)
    people = tuple(
        Person(name, rng.choice(words.TRADES), rng.choice(words.MOODS)) for name in names[:agents]
    )
    return people, tuple(names[agents:])


def _draw_places(rng: random.Random, split: words.Split) -> list[str]:
    """Draws one place for every adjective, in random order."""
    starts = rng.sample(range(len(words.ADJECTIVES)), len(words.ADJECTIVES))
    return _complete(rng, starts, words.ADJECTIVES, words.NOUNS, " ", split)


def _complete(
    rng: random.Random,
    starts: Sequence[int],
    first: Sequence[str],
    second: Sequence[str],
    seam: str,
    split: words.Split,
) -> list[str]:
    """Draws a second piece for each numbered first piece."""
    ends = range(len(second))
    drawn = [rng.choice([j for j in ends if words.in_split(i, j, split)]) for i in starts]
    return [first[i] + seam + second[j] for i, j in zip(starts, drawn, strict=True)]


def _draw_memories(
    rng: random.Random, name: str, places: list[str], count: int
) -> tuple[Memory, ...]:
    """Draws memories, and removes their places from `places`."""
    return tuple(
        Memory(name, rng.choice(tuple(words.VERBS)), thing, places.pop())
        for thing in rng.sample(words.OBJECTS, count)
    )


def _draw_clause(
    rng: random.Random,
    speaker: str,
    names: Sequence[str],
    plans: dict[tuple[str, str], Plan],
    places: list[str],
) -> Clause:
    """Draws a clause about a plan that nobody has told, and removes its place from `places`."""
    kind = rng.random()
    free = [time for time in words.TIMES if (speaker, time) not in plans]
    if kind < _FOLLOWS:
        leads = [
            plan
            for plan in plans.values()
            if plan.place and plan.person != speaker and plan.time in free
        ]
        if leads:
            lead = rng.choice(leads)
            plan = Plan(speaker, lead.time, leader=lead.person)
            plans[speaker, lead.time] = plan
            return Clause(plan)
    elif kind < _FOLLOWS + _HEARD:
        person, teller = rng.choice(names), rng.choice(names)
        free_of_person = [time for time in words.TIMES if (person, time) not in plans]
        if speaker not in (person, teller) and len(free_of_person) > _OWN_TIMES:
            plan = Plan(person, rng.choice(free_of_person), places.pop())
            plans[person, plan.time] = plan
            return Clause(plan, teller)
    plan = Plan(speaker, rng.choice(free), places.pop())
    plans[speaker, plan.time] = plan
    return Clause(plan)

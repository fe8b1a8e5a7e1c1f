"""Questions to one agent of the town, each with exactly one right answer.

An answer repeats the words of the text that it depends on, so lookup and copying suffice. An answer
that depends on two blocks repeats both, one after the other.
"""

import dataclasses
import random
from typing import Literal, get_args

from tokendance_jax.demo.town import words
from tokendance_jax.demo.town.town import Memory, Plan, Statement, View

ProbeKind = Literal["retrieve", "combine", "recall", "abstain", "repeat", "tell"]
KINDS: tuple[ProbeKind, ...] = get_args(ProbeKind)
NOBODY = "nobody said where"


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """A question and its answer.

    Attributes:
      kind: where the answer is. "retrieve": in one shared block; "combine": in two of them;
        "recall": in the agent's own private text; "abstain": nowhere; "repeat": it is a block, word
        for word; "tell": the agent tells its private plans or what it heard, to make up stories.
      question: the text of the task.
      answer: the right answer, without a newline.
      target: the part that every right answer contains: a place, that nobody said it, or the
        clauses of a block.
    """

    kind: ProbeKind
    question: str
    answer: str
    target: str

    def right(self, text: str) -> bool:
        """Whether the first line of an answer contains the target, among any other words."""
        first, *_ = text.strip().split("\n")
        return self.target.lower() in first.lower()


def probes(view: View, kind: ProbeKind, rng: random.Random) -> list[Probe]:
    """Lists the probes of one kind that a view allows, in random order.

    Args:
      view: what the agent sees.
      kind: the kind.
      rng: draws the order, and a few of the many questions without an answer.
    """
    found = _MAKERS[kind](view, rng)
    rng.shuffle(found)
    return found


def answer_where(view: View, person: str, time: str) -> str:
    """Answers where a person is at a time, from the statements and the agent's own secrets.

    If the person joins a leader, the answer continues with the leader's plan. A leader's plan has a
    place, so there is no cycle.
    """
    plan = _known(view).get((person, time))
    if plan is None:
        return f"at {time} {person} goes, {NOBODY}"
    if plan.leader is None:
        return plan.text
    return f"{plan.text}, so {answer_where(view, plan.leader, time)}"


def tell_plans(view: View, plans: tuple[Plan, ...]) -> Probe:
    """Makes a probe in which the agent tells one or two of its secrets and how it feels."""
    times = " and ".join(plan.time for plan in plans)
    name = view.person.name
    parts = [plan.text for plan in plans]
    return _tell(view, f"What does {name} say about {times}?", ", ".join(parts))


def tell_heard(view: View, statement: Statement, plan: Plan) -> Probe:
    """Makes a probe in which the agent passes on a plan that somebody else told."""
    name = view.person.name
    question = f"What did {statement.speaker} tell {name} about {plan.person} at {plan.time}?"
    return _tell(view, question, f"{statement.speaker} told {name} that {plan.text}")


def tell_follow(view: View, plan: Plan) -> Probe:
    """Makes a probe in which the agent says that it joins somebody."""
    name = view.person.name
    follow = Plan(name, plan.time, leader=plan.person)
    return _tell(view, f"Tell that {follow.text}.", follow.text)


def _tell(view: View, question: str, clauses: str) -> Probe:
    name, mood = view.person.name, view.person.mood
    answer = f"Then {name} says: {clauses}, and {name} feels {mood}."
    return Probe("tell", f"{question}\n", answer, answer[:-1])


def _known(view: View) -> dict[tuple[str, str], Plan]:
    return view.said | {(plan.person, plan.time): plan for plan in view.secrets}


def _where(kind: ProbeKind, view: View, person: str, time: str) -> Probe:
    answer = f"So {answer_where(view, person, time)}."
    target = NOBODY if kind == "abstain" else answer[:-1].rpartition(" visits ")[2]
    return Probe(kind, f"Where does {person} go at {time}?\n", answer, target)


def _retrieve(view: View, rng: random.Random) -> list[Probe]:
    return [_where("retrieve", view, *key) for key, plan in view.said.items() if plan.place]


def _combine(view: View, rng: random.Random) -> list[Probe]:
    followed = [plan for plan in view.said.values() if (plan.leader, plan.time) in view.said]
    return [_where("combine", view, plan.person, plan.time) for plan in followed]


def _recall(view: View, rng: random.Random) -> list[Probe]:
    found = [_where("recall", view, plan.person, plan.time) for plan in view.secrets]
    return found + [_recall_thing(memory) for memory in view.memories]


def _recall_thing(memory: Memory) -> Probe:
    question = f"Where did {memory.person} {words.VERBS[memory.verb]} the {memory.thing}?\n"
    return Probe("recall", question, f"So {memory.text}.", memory.place)


def _abstain(view: View, rng: random.Random) -> list[Probe]:
    known = _known(view)
    blind = [
        (plan.person, plan.time) for plan in known.values() if plan.leader and _misses(view, plan)
    ]
    told = {person for person, _ in known}
    never = [
        key for name in view.names for time in words.TIMES if (key := (name, time)) not in known
    ]
    # Most of these questions are about people whose plans at other times are told, so that only the
    # time shows that there is no answer.
    near = [key for key in never if key[0] in told]
    far = [key for key in never if key[0] not in told]
    keys = blind + rng.sample(near, min(len(near), 4)) + rng.sample(far, min(len(far), 1))
    return [_where("abstain", view, *key) for key in keys]


def _misses(view: View, plan: Plan) -> bool:
    return (plan.leader, plan.time) not in _known(view)


def _repeat(view: View, rng: random.Random) -> list[Probe]:
    return [
        Probe("repeat", f"Repeat what {s.speaker} says.\n", s.text, s.text[:-1].partition(": ")[2])
        for s in view.statements
    ]


def _tells(view: View, rng: random.Random) -> list[Probe]:
    name = view.person.name
    found = [tell_plans(view, (plan,)) for plan in view.secrets]
    if len(view.secrets) == 2:
        found.append(tell_plans(view, view.secrets))
    for statement in view.statements:
        for clause in statement.clauses:
            plan = clause.plan
            if name in (statement.speaker, plan.person):
                continue
            found.append(tell_heard(view, statement, plan))
            if plan.place and (name, plan.time) not in _known(view):
                found.append(tell_follow(view, plan))
    return found


_MAKERS = {
    "retrieve": _retrieve,
    "combine": _combine,
    "recall": _recall,
    "abstain": _abstain,
    "repeat": _repeat,
    "tell": _tells,
}

"""Converts a plain recording of agents to a trace of rounds.

The recording names the agents and, for every round, each agent's new memories, its task and its
answer. All answers of a round become shared blocks of the next round:

  {
    "name": "harbour",
    "max_new_tokens": 64,
    "agents": {"Ann": {"persona": "You are Ann.", "task": "What do you do now?"}},
    "rounds": [
      {"Ann": {"history": "Ann mended nets.", "output": "I go to the quay."}},
      {"Ann": {"task": "And then?", "output": "I go home."}}
    ]
  }

`history` is what is new in a round; it stays in the agent's later prompts. A `task` in a round
replaces the agent's own task for that round. An agent that a round does not name does not take part
in it. The `output` becomes a shared block of the next round. All keys of an agent are optional, but
it needs a task in every round, from the agent or from the round.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tokendance_jax.prompt.live import gather
from tokendance_jax.prompt.round import AgentPrompt, PromptError, Round, Segment
from tokendance_jax.prompt.trace import Trace

BLOCKS = ("all", "own_first", "others")

_AGENT = {"persona": str, "task": str}
_TURN = {"history": str, "task": str, "output": str}


def trace_of(recording: Any, *, blocks: str = "all") -> Trace:
    """Converts a recording to a trace.

    Args:
      recording: the parsed JSON in this module's format.
      blocks: which shared blocks an agent sees, one of `BLOCKS`. "all": all blocks, in the same
        order for every agent; "own_first": all blocks, the agent's own first; "others": all but
        the agent's own.

    Raises:
      PromptError: the recording does not have this format; names round, agent and key.
    """
    known = {"name": str, "max_new_tokens": int, "agents": dict, "rounds": list}
    _check(recording, known, "recording", needed=("name", "agents", "rounds"))
    agents, memories = recording["agents"], dict[str, list[Segment]]()
    for name, agent in agents.items():
        _check(agent, _AGENT, f"agent {name!r}")
    limit = {key: value for key, value in recording.items() if key == "max_new_tokens"}
    rounds, shown = [], ()
    for index, turns in enumerate(recording["rounds"]):
        _check(turns, {name: dict for name in agents}, f"round {index}", what="agent")
        prompts = []
        for name, turn in turns.items():
            where = f"round {index}: agent {name!r}"
            _check(turn, _TURN, where)
            task = turn.get("task", agents[name].get("task"))
            if not task:
                raise PromptError(f"{where}: no task; give one here or with the agent")
            memory = memories.setdefault(name, [])
            if turn.get("history"):
                text = _line(turn["history"])
                memory.append(Segment("history", f"history/r{index}/{name}", text=text))
            persona = agents[name].get("persona")
            system = [Segment("system", f"persona/{name}", text=_line(persona))] if persona else []
            asked = Segment("task", f"task/r{index}/{name}", text=_line(task))
            prompts.append(
                AgentPrompt(
                    name,
                    (*system, *memory, *_seen(shown, name, blocks), asked),
                    recorded_output=turn.get("output"),
                )
            )
        rounds.append(Round(tuple(prompts), index=index, **limit))
        outputs = {name: turn["output"] for name, turn in turns.items() if turn.get("output")}
        shown = gather(outputs, index)
    return Trace(recording["name"], tuple(rounds))


def _seen(shown: Sequence[Segment], agent: str, blocks: str) -> list[Segment]:
    """Returns the blocks that an agent sees, in the order in which it sees them."""
    own = [block for block in shown if block.author and block.author.agent == agent]
    others = [block for block in shown if block not in own]
    return {"all": list(shown), "own_first": own + others, "others": others}[blocks]


def _line(text: str) -> str:
    """Ends a text with exactly one newline, so that texts have the same tokens apart and joined."""
    return text.rstrip("\n") + "\n"


def _check(
    value: Any,
    kinds: Mapping[str, type],
    where: str,
    *,
    needed: Sequence[str] = (),
    what: str = "key",
) -> None:
    """Raises a `PromptError` unless `value` is a JSON object with these keys and types."""
    if not isinstance(value, dict):
        raise PromptError(f"{where}: {value!r:.60} is not a JSON object")
    for key in needed:
        if key not in value:
            raise PromptError(f"{where}: {key} is missing")
    for key, found in value.items():
        if key not in kinds:
            raise PromptError(f"{where}: unknown {what} {key!r}; known are {', '.join(kinds)}")
        if type(found) is not kinds[key]:
            raise PromptError(f"{where}: {key}: {found!r:.60} is not of type {kinds[key].__name__}")

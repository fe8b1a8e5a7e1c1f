"""From answers to the shared segments of the next round."""

import dataclasses
from collections.abc import Mapping

from tokendance_jax.prompt.round import AgentPrompt, PromptError, Round, Segment


def gather(outputs: Mapping[str, str], round_index: int) -> tuple[Segment, ...]:
    """Makes the shared segments of the next round out of the answers of a round.

    Args:
      outputs: agent name to answer, in the order in which the blocks shall stand.
      round_index: number of the round that gave the answers; part of the ids.

    Returns:
      One shared segment per agent, each ended by exactly one newline.

    Raises:
      PromptError: an empty name, or text that no prompt may hold.
    """
    return tuple(
        Segment("shared", f"out/r{round_index}/{agent}", text=_block(output))
        for agent, output in outputs.items()
    )


def relive(moment: Round, previous: Mapping[str, str], recorded: Mapping[str, str]) -> Round:
    """Puts the answers of a live run into a recorded round.

    A shared segment whose text is an answer of the recorded round before is replaced by what the
    same agent answered in the live run. Its id gets the prefix "live/", so that one id keeps one
    text. All other segments stay: histories are the recording's.

    Args:
      moment: the recorded round.
      previous: agent name to live answer of the round before.
      recorded: agent name to recorded answer of the round before.

    Returns:
      The round with live shared blocks.

    Raises:
      PromptError: `previous` lacks an agent whose block the round holds.
    """
    authors: dict[str, list[str]] = {}
    for agent, text in recorded.items():
        authors.setdefault(text, []).append(agent)

    def revive(segment: Segment) -> Segment:
        if segment.kind != "shared" or segment.text not in authors:
            return segment
        agent = _author(segment.id, authors[segment.text])
        if agent not in previous:
            raise PromptError(
                f"round {moment.index}: segment {segment.id!r} is by agent {agent!r}, who has no "
                "answer in the round before; run the rounds in order"
            )
        return Segment("shared", f"live/{segment.id}", text=_block(previous[agent]))

    def revive_all(prompt: AgentPrompt) -> AgentPrompt:
        return dataclasses.replace(prompt, segments=tuple(map(revive, prompt.segments)))

    return dataclasses.replace(moment, agents=tuple(map(revive_all, moment.agents)))


def _author(segment_id: str, agents: list[str]) -> str:
    """Of agents with equal answers, the one whose name ends the id, else the first."""
    named = [agent for agent in agents if segment_id.endswith(agent)]
    # "Ann" ends "out/Joann" too: the longest name is meant.
    return max(named, key=len) if named else agents[0]


def _block(output: str) -> str:
    """An answer as a block: one newline at its end, and no NUL, which a model may well emit."""
    return output.replace("\0", "\N{REPLACEMENT CHARACTER}").rstrip("\n") + "\n"

"""Turns answers into the shared segments of the next round."""

import dataclasses
from collections.abc import Mapping, Sequence

from tokendance_jax.prompt.authors import Namer
from tokendance_jax.prompt.round import AgentPrompt, Author, PromptError, Round, Segment


def gather(outputs: Mapping[str, str], round_index: int) -> tuple[Segment, ...]:
    """Makes the shared segments of the next round out of the answers of a round.

    Args:
      outputs: agent name to answer, in the order of the blocks.
      round_index: number of the round of these answers; part of the ids and of the authors.

    Returns:
      One shared segment per agent. Each ends with exactly one newline.

    Raises:
      PromptError: an empty name, a negative number, or text that no prompt may hold.
    """
    return tuple(
        Segment(
            "shared",
            f"out/r{round_index}/{agent}",
            text=_block(output),
            author=Author(round_index, agent),
        )
        for agent, output in outputs.items()
    )


def put_answers(round_: Round, answers: Sequence[Mapping[str, str]]) -> Round:
    """Replaces the recorded answers in a round by those of a live run.

    The text of a shared segment with an author becomes this author's live answer. Its id gets the
    prefix "live/", so that one id always has one text. All other segments stay as recorded,
    including histories.

    Args:
      round_: the recorded round, with authors (see `name_authors`).
      answers: agent name to live answer, for each round before this one.

    Returns:
      The round with live shared blocks.

    Raises:
      PromptError: the answer of an author is missing.
    """

    def live(segment: Segment) -> Segment:
        author = segment.author
        if author is None:
            return segment
        given = answers[author.round] if author.round < len(answers) else {}
        if author.agent not in given:
            raise PromptError(
                f"round {round_.index}: segment {segment.id!r} is by agent {author.agent!r}, who "
                f"has no answer in round {author.round}; run the rounds in order"
            )
        return Segment(
            "shared", f"live/{segment.id}", text=_block(given[author.agent]), author=author
        )

    def all_live(prompt: AgentPrompt) -> AgentPrompt:
        return dataclasses.replace(prompt, segments=tuple(map(live, prompt.segments)))

    return dataclasses.replace(round_, agents=tuple(map(all_live, round_.agents)))


def relive(round_: Round, previous: Mapping[str, str], recorded: Mapping[str, str | None]) -> Round:
    """Replaces the recorded answers in a round, given the answers of the previous round only.

    For whole traces, prefer `name_authors` and `put_answers`: they also find the authors of blocks
    from older rounds.

    Args:
      round_: the recorded round.
      previous: agent name to live answer of the previous round.
      recorded: agent name to recorded answer of the previous round; None for an unknown answer.

    Returns:
      The round with live shared blocks, like `put_answers`.

    Raises:
      PromptError: the author of a block cannot be determined, or `previous` lacks its answer.
    """
    if round_.index == 0:
        if previous or recorded:
            raise PromptError("round 0 has no round before it; number the rounds from 0 in order")
        return round_
    older: list[Mapping[str, str]] = [{}] * (round_.index - 1)
    named = Namer([*older, recorded]).name(round_)
    return put_answers(named, [*older, previous])


def _block(output: str) -> str:
    """Returns an answer as a block: one newline at the end, and no NUL, which models may emit."""
    return output.replace("\0", "\N{REPLACEMENT CHARACTER}").rstrip("\n") + "\n"

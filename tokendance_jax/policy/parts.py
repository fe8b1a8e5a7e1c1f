"""An agent's prompt as parts: text of its own, and segments that lie in a base."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int32

from tokendance_jax.policy.bases import Placed, content_key
from tokendance_jax.prompt.tokenized import TokenizedPrompt, TokenSpan

# Tokens at the end of a prompt that its agent always computes, shared or not: the first answer
# token comes from the last of them.
TAIL_TOKENS = 8


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Consecutive tokens of a prompt.

    Attributes:
      start: logical position of its first token.
      stop: logical position after its last token.
      placed: where it lies in a base; None: the agent's own text.
      mine: whether it is the agent's own block of the previous round.
    """

    start: int
    stop: int
    placed: Placed | None
    mine: bool = False


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Run:
    """The table entries of a prompt's shared text, in logical order.

    Attributes:
      page: base pages.
      frame: logical minus canonical positions.
      first: first slot in use.
      slots: slots in use.
      start: logical position of the first slot in use.
      offset: tokens between the beginning of the entry's run and the entry. A run is shared text
        without text of the agent's own in between.
      mine: whether the entry holds tokens of the agent's own block.
    """

    page: Int32[np.ndarray, " entries"]
    frame: Int32[np.ndarray, " entries"]
    first: Int32[np.ndarray, " entries"]
    slots: Int32[np.ndarray, " entries"]
    start: Int32[np.ndarray, " entries"]
    offset: Int32[np.ndarray, " entries"]
    mine: Bool[np.ndarray, " entries"]

    @property
    def stop(self) -> int:
        """Logical position after the last token."""
        return int(self.start[-1] + self.slots[-1])

    def positions(
        self, pick: Bool[np.ndarray, " entries"] | None = None
    ) -> Int32[np.ndarray, " tokens"]:
        """Returns the logical positions of all tokens, or of the tokens of picked entries."""
        start, slots = (
            (self.start, self.slots) if pick is None else (self.start[pick], self.slots[pick])
        )
        offset = np.arange(slots.sum()) - np.repeat(np.cumsum(slots) - slots, slots)
        return (np.repeat(start, slots) + offset).astype(np.int32)


def shared_keys(prompts: Sequence[TokenizedPrompt]) -> list[list[bytes]]:
    """Returns the keys of each prompt's segments for the round's bundle, in the prompt's order.

    These are the shared segments, and the task segments that another agent has word for word.
    Segments that begin in the last `TAIL_TOKENS` tokens are left out: the agent computes them
    anyway.
    """
    found = [
        [
            (span.kind, _key(prompt, span))
            for span in prompt.spans
            if span.kind in ("shared", "task") and span.start < end
        ]
        for prompt in prompts
        for end in [asked_until(prompt) - TAIL_TOKENS]
    ]
    tasks = Counter(key for some in found for kind, key in set(some) if kind == "task")
    return [[key for kind, key in some if kind == "shared" or tasks[key] > 1] for some in found]


def parts_of(
    prompt: TokenizedPrompt,
    place: Callable[[TokenSpan, bytes, Int32[np.ndarray, " _"]], Placed | None],
) -> list[Part]:
    """Cuts a prompt into parts.

    Args:
      prompt: the prompt.
      place: returns where a span's segment lies, given the span, its key and its tokens; None if
        it lies nowhere.

    Returns:
      Parts that cover the prompt. No two neighbours are both the agent's own text; the last part
      is the agent's own text.
    """
    end = asked_until(prompt) - TAIL_TOKENS
    parts: list[Part] = []

    def own(start: int, stop: int) -> None:
        if parts and parts[-1].placed is None:
            parts[-1] = dataclasses.replace(parts[-1], stop=stop)
        elif stop > start:
            parts.append(Part(start, stop, None))

    for span in prompt.spans:
        token_ids = prompt.token_ids[span.start : span.stop]
        placed = None if span.kind == "markup" else place(span, _key(prompt, span), token_ids)
        stop = max(span.start, min(span.stop, end))
        if placed is None or stop == span.start:
            own(span.start, span.stop)
        else:
            mine = span.kind == "shared" and span.id.rsplit("/", 1)[-1] == prompt.agent
            parts.append(Part(span.start, stop, placed, mine))
            own(stop, span.stop)
    return parts


def asked_until(prompt: TokenizedPrompt) -> int:
    """Returns where a prompt's segments end; markup or the beginning of an answer may follow."""
    return max(span.stop for span in prompt.spans if span.kind != "markup")


def run_of(parts: Sequence[Part]) -> Run:
    """Lists the entries of all placed parts; neighbours in one page and frame become one entry."""
    rows: list[list[int]] = []
    begin = 0
    for index, part in enumerate(parts):
        if part.placed is None:
            continue
        if index == 0 or parts[index - 1].placed is None:
            begin = part.start
        frame, at = part.start - part.placed.canonical, part.start
        columns = (part.placed.page, part.placed.first, part.placed.slots)
        for page, first, slots in zip(*(column.tolist() for column in columns), strict=True):
            used = min(slots, part.stop - at)
            if used <= 0:
                break
            last = rows[-1] if rows else [0] * 7
            follows = last[4] + last[3] == at and last[2] + last[3] == first
            if follows and last[:2] == [page, frame] and at > begin:
                last[3] += used
                last[6] |= part.mine
            else:
                rows.append([page, frame, first, used, at, at - begin, part.mine])
            at += used
    columns = np.array(rows, np.int32).reshape(-1, 7).T
    return Run(*columns[:6], mine=columns[6].astype(np.bool_))


def _key(prompt: TokenizedPrompt, span: TokenSpan) -> bytes:
    return content_key(prompt.token_ids[span.start : span.stop])

"""Sequences: one request each, with its state, and the handles under which they were added."""

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int32, UInt32

from tokendance_jax.engine.answer import Answer
from tokendance_jax.engine.clock import Clock
from tokendance_jax.engine.prefill import Cost
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.policy.policy import OpenRound
from tokendance_jax.prompt.round import Sampling
from tokendance_jax.prompt.tokenized import TokenizedPrompt

# waiting: holds no pages yet. prefilling: its prompt is being computed. running: decodes. stalled:
# gave up its own pages and waits for free ones. finished: its answer has ended. aborted: ended
# without a complete answer, by `Engine.abort` or an error.
Status = Literal["waiting", "prefilling", "running", "stalled", "finished", "aborted"]

# Returns which tokens may come next, given the answer so far.
Mask = Callable[[list[int]], Bool[np.ndarray, " vocab"]]


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """One request: a prompt, how its answer is sampled, and how far it is.

    Attributes:
      prompt: the prompt.
      answer: the answer so far.
      sampling: how the answer is sampled.
      key: random key; with the position in the answer, it determines all draws.
      names: name the sequence in errors: its round and its agent.
      handle: what it was added with.
      copies: the sequence whose prompt this one shares, for further answers to one prompt.
      mask: says which tokens may come next; None: all may.
      allowed: what it said last.
      status: its state.
      opened: the open round in which it holds a seat.
      seat: its seat there.
      computed_tokens: prompt tokens that were computed for it, after a stall also those of its
        answer again. All other prompt tokens were read from pages.
      error: why it was aborted; None: by request.
    """

    prompt: TokenizedPrompt
    answer: Answer
    sampling: Sampling
    key: UInt32[np.ndarray, "2"]
    names: tuple[str, str]
    handle: "Handle"
    copies: "Sequence | None" = None
    mask: Mask | None = None
    allowed: Bool[np.ndarray, " vocab"] | None = None
    status: Status = "waiting"
    opened: OpenRound | None = None
    seat: int = -1
    computed_tokens: int = 0
    error: BaseException | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to the sequence."""
        return self.status in ("finished", "aborted")

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts sequences by priority, then by arrival."""
        return -self.handle.priority, self.handle.arrival, self.seat

    @property
    def lane(self) -> LanePlan:
        """The lane of its seat."""
        assert self.opened is not None
        return self.opened.lanes[self.seat]

    @property
    def length(self) -> int:
        """Number of tokens whose keys and values are computed once it runs.

        These are prompt and answer without the last token chosen.
        """
        return len(self.prompt.token_ids) + max(0, len(self.answer.chosen) - 1)

    @property
    def remaining(self) -> int:
        """Most tokens whose keys and values are still to be computed behind `length`."""
        return self.answer.limit - max(1, len(self.answer.chosen))

    @property
    def room(self) -> int:
        """Number of tokens behind `length` whose pages the sequence takes at once."""
        return min(self.remaining, self.handle.answer_room or self.remaining)

    @property
    def written(self) -> Int32[np.ndarray, " length"]:
        """The tokens whose keys and values are computed once it runs."""
        return np.concatenate([self.prompt.token_ids, np.array(self.answer.chosen[:-1], np.int32)])

    def ask_mask(self) -> None:
        """Asks the mask, if there is one, which tokens may come next.

        Raises:
          ValueError: it allows none.
        """
        if self.mask is not None:
            self.allowed = self.mask(list(self.answer.chosen))
            if not self.allowed.any():
                raise ValueError(f"{': '.join(self.names)}: mask allows no token; allow one")

    def continued(self) -> TokenizedPrompt:
        """Returns the prompt to compute when a stalled sequence resumes."""
        chosen = np.array(self.answer.chosen[:-1], np.int32)
        return dataclasses.replace(self.prompt.followed_by(chosen), answer_tokens=0)


@dataclasses.dataclass(slots=True, eq=False)
class Handle:
    """The sequences that were added together, which wait and take their pages together.

    Attributes:
      clock: wall time since they were added.
      priority: of waiting sequences, higher priorities come first, and they are stalled last.
      arrival: when they were added, as a number; of equal priorities, lower numbers come first.
      answer_room: they take the pages of this many answer tokens at a time; None: of their longest
        answers at once, and they are never stalled.
      hold: whether they keep their pages when they end, until `Engine.release`.
      joins: the handle whose bases they read; None: they lay bases of their own.
      sequences: the sequences, in the order of the prompts; further answers to a prompt follow it.
      opened: the open round that holds their seats.
      events: what happened to the sequences and was not read by `Engine.stream` yet.
      cost: the work of the prefill.
      plan_s: seconds until they had their pages: waiting, matching and planning.
      prefill_s: seconds of the prefill from then on.
      first_token_s: seconds until all had their first tokens.
      decode_s: seconds from then on, until the last has ended.
    """

    clock: Clock
    priority: int = 0
    arrival: int = 0
    answer_room: int | None = None
    hold: bool = False
    joins: "Handle | None" = None
    sequences: list[Sequence] = dataclasses.field(default_factory=list)
    opened: OpenRound | None = None
    events: "deque[Event]" = dataclasses.field(default_factory=deque)
    cost: Cost | None = None
    plan_s: float = 0.0
    prefill_s: float = 0.0
    first_token_s: float = 0.0
    decode_s: float = 0.0

    @property
    def done(self) -> bool:
        """Whether all sequences have ended."""
        return all(sequence.ended for sequence in self.sequences)


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of a token, in the model's own distribution.

    Attributes:
      chosen: that of the token.
      best: token id and log-probability of the most probable tokens, the best first.
    """

    chosen: float
    best: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a sequence in a step.

    Attributes:
      sequence: the sequence.
      token: the next token of its answer; None: it ended without a further token.
      text: the text that is now certain to be part of the answer.
      last: whether the sequence has ended; its `status`, `error` and `answer` say how.
      logprobs: log-probabilities of the token, if the sampling asks for them.
    """

    sequence: Sequence
    token: int | None
    text: str = ""
    last: bool = False
    logprobs: TokenLogprobs | None = None

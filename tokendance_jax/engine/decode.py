"""The host side of decoding: text pieces, stop strings, callbacks, and which answers are live."""

from collections.abc import Callable, Sequence

import numpy as np

from tokendance_jax.engine.errors import NotFiniteError
from tokendance_jax.engine.programs import DecodeState, decode
from tokendance_jax.engine.result import FinishReason
from tokendance_jax.engine.runner import Runner
from tokendance_jax.engine.sampling import NOT_FINITE, SamplingArrays
from tokendance_jax.plan.groups import group_tables
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.prompt.tokenizer import Tokenizer

# Called with agent, token id and the text that the token completes. A stop token is reported only
# if it completes text.
OnToken = Callable[[str, int, str], None]


class Answer:
    """One agent's answer while it is generated."""

    def __init__(
        self,
        agent: str,
        tokenizer: Tokenizer,
        *,
        limit: int,
        stop: Sequence[str],
        stop_ids: frozenset[int],
        on_token: OnToken | None,
    ):
        self.agent = agent
        self.chosen: list[int] = []  # the stop token included
        self.finish_reason: FinishReason | None = None
        self.limit = limit
        self._stream = tokenizer.stream()
        self._stop = stop
        self._stop_ids = stop_ids
        self._on_token = on_token
        self._text = ""
        self._shown = 0  # characters passed to `on_token`
        self._pieces = [(0, 0)]  # counts of tokens and characters after each piece of text
        self._kept = 0  # tokens before the stop token or string

    @property
    def live(self) -> bool:
        """Whether the answer is still being generated."""
        return self.finish_reason is None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The answer's tokens, without the stop token and those that overlap a stop string."""
        return tuple(self.chosen[: self._kept])

    @property
    def text(self) -> str:
        """The answer, cut before a stop string. While it is live, complete characters only."""
        return self._text

    def add(self, token: int) -> None:
        """Adds the next token; does nothing if the answer has ended.

        `on_token` receives text as soon as it is certain to be part of the answer: not while
        bytes of a character are missing, and not while the text may be the beginning of a stop
        string.
        """
        if not self.live:
            return
        self.chosen.append(token)
        is_stop = token in self._stop_ids
        if not is_stop:
            self._kept += 1
            piece = self._stream.push(token)
            if piece:
                self._text += piece
                self._pieces.append((self._kept, len(self._text)))
        if is_stop or len(self.chosen) >= self.limit:
            self.finish_reason = "stop" if is_stop else "length"
            self._text += self._stream.finish()
        found = [index for index in map(self._text.find, self._stop) if index >= 0]
        if found:
            self.finish_reason = "stop"
            self._text = self._text[: min(found)]
            self._kept = max(n for n, characters in self._pieces if characters <= min(found))
        sure = len(self._text) - (_begun(self._text, self._stop) if self.live else 0)
        fresh, self._shown = self._text[self._shown : sure], sure
        if self._on_token is not None and (fresh or not is_stop):
            self._on_token(self.agent, token, fresh)


def _begun(text: str, stop: Sequence[str]) -> int:
    """Returns how many characters at the end of a text may be the beginning of a stop string."""
    lengths = (n for string in stop for n in range(1, len(string)) if text.endswith(string[:n]))
    return max(lengths, default=0)


def take(answers: Sequence[Answer], tokens: np.ndarray, *, round_index: int) -> None:
    """Adds the tokens of one call to the answers, step by step.

    Args:
      answers: the answers.
      tokens: i32 [answers, steps]; negative where an answer has ended.
      round_index: number of the round.

    Raises:
      NotFiniteError: the logits of a live answer's next token are not finite.
    """
    for step in range(tokens.shape[1]):
        for answer, token in zip(answers, tokens[:, step].tolist(), strict=True):
            if token == NOT_FINITE and answer.live:
                problem = (
                    f"the logits of token {len(answer.chosen)} of its answer are NaN or infinite"
                )
                raise NotFiniteError(f"round {round_index}", f"agent {answer.agent!r}", problem)
            if token >= 0:
                answer.add(token)


def generate(
    runner: Runner,
    lanes: Sequence[LanePlan],
    answers: Sequence[Answer],
    sampling_of: Callable[[Sequence[int]], SamplingArrays],
    *,
    steps: int,
    round_index: int,
) -> None:
    """Runs decode calls until every answer has ended.

    Lanes whose answers have ended are dropped as soon as the live lanes fit a smaller bucket, so
    the last agents do not pay for finished ones.

    Args:
      runner: runs the decode calls.
      lanes: the lanes; the KV of their prompts is written.
      answers: the answers, one per lane, each with its first token.
      sampling_of: returns the sampling settings of the lanes with the given indices, in bucket
        shapes.
      steps: tokens per lane and call; the host reads the tokens only between calls.
      round_index: number of the round.

    Raises:
      NotFiniteError: the model's logits are not finite.
    """
    shapes, seats = runner.shapes, list[int]()
    while live := [lane for lane, answer in enumerate(answers) if answer.live]:
        if not seats or shapes.lanes.fit(len(live)) < shapes.lanes.fit(len(seats)):
            seats = live
            groups, tables = group_tables([lanes[lane] for lane in seats], shapes)
            sampling = sampling_of(seats)
        seated = tables.page.shape[0]
        token, position = np.zeros(seated, np.int32), np.zeros(seated, np.int32)
        alive, generated = np.zeros(seated, np.bool_), np.zeros(seated, np.int32)
        slot = np.full((seated, steps), shapes.no_slot, np.int32)
        for seat, lane in enumerate(seats):
            plan, answer = lanes[lane], answers[lane]
            token[seat] = answer.chosen[-1]
            position[seat] = len(plan.token_ids) + len(answer.chosen) - 1
            alive[seat] = answer.live
            generated[seat] = len(answer.chosen)
            ahead = np.arange(min(steps, answer.limit - len(answer.chosen)), dtype=np.int32)
            slot[seat, : len(ahead)], _ = plan.locate(position[seat] + ahead, shapes.page_size)
        state = DecodeState(token, position, alive, generated)
        tokens = np.asarray(runner.run(decode, state, tables, groups, slot, sampling))
        take([answers[lane] for lane in seats], tokens[: len(seats)], round_index=round_index)

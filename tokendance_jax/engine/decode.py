"""The host's side of decoding: text pieces, stop strings, callbacks, and who is still live."""

from collections.abc import Callable, Sequence

import numpy as np

from tokendance_jax.collector.groups import group_tables
from tokendance_jax.collector.lane import LanePlan
from tokendance_jax.collector.shapes import Shapes
from tokendance_jax.engine.programs import DecodeState
from tokendance_jax.engine.result import FinishReason
from tokendance_jax.engine.sampling import SamplingArrays
from tokendance_jax.kernels.lanes import GroupTables, LaneTables
from tokendance_jax.prompt.tokenizer import Tokenizer

# (agent, token id, the text that the token completes)
OnToken = Callable[[str, int, str], None]
# One decode call: (state, tables, groups, slot i32 [lanes, steps], sampling)
# -> tokens i32 [lanes, steps]
DecodeCall = Callable[
    [DecodeState, LaneTables, GroupTables, np.ndarray, SamplingArrays], np.ndarray
]


class Answer:
    """One agent's answer as it grows."""

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
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream()
        self._stop = stop
        self._stop_ids = stop_ids
        self._on_token = on_token
        self._text = ""
        self._kept = 0  # tokens before the stop token or string

    @property
    def live(self) -> bool:
        """Whether the answer goes on."""
        return self.finish_reason is None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The answer's tokens, without stop token or the tokens of a stop string."""
        return tuple(self.chosen[: self._kept])

    @property
    def text(self) -> str:
        """The answer, cut before a stop string."""
        text = self._tokenizer.decode(self.chosen[: self._kept])
        return _cut(text, self._stop) if self._stop else text

    def add(self, token: int) -> None:
        """Takes the next token, unless the answer has ended."""
        if not self.live:
            return
        self.chosen.append(token)
        if token in self._stop_ids:
            self.finish_reason = "stop"
            return
        self._kept += 1
        piece = self._stream.push(token)
        self._text += piece
        if self._on_token is not None:
            self._on_token(self.agent, token, piece)
        if self._stop and _cut(self._text, self._stop) != self._text:
            self.finish_reason = "stop"
        elif len(self.chosen) >= self.limit:
            self.finish_reason = "length"


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    found = [index for index in map(text.find, stop) if index >= 0]
    return text[: min(found)] if found else text


def generate(
    call: DecodeCall,
    lanes: Sequence[LanePlan],
    answers: Sequence[Answer],
    sampling_of: Callable[[Sequence[int]], SamplingArrays],
    shapes: Shapes,
    *,
    steps: int,
) -> None:
    """Makes decode calls until every answer has ended.

    Lanes whose answers have ended are dropped as soon as the rest fits a smaller bucket, so that
    the last agents do not pay for those that are done.

    Args:
      call: one decode call of `steps` tokens.
      lanes: the lanes, their prompts written.
      answers: the answers, one per lane, each with its first token.
      sampling_of: how the lanes of the given indices sample, in bucket shapes.
      shapes: the static shapes.
      steps: tokens per call; the host looks at the tokens only between two calls.
    """
    seats: list[int] = []
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
        tokens = call(state, tables, groups, slot, sampling)
        for step in range(steps):
            for seat, lane in enumerate(seats):
                if tokens[seat, step] >= 0:
                    answers[lane].add(int(tokens[seat, step]))

"""The batch of sequences that decode together."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Float, Int32

from tokendance_jax.engine.adjust import Adjustments, LaneAdjustment, Logprobs, adjustments
from tokendance_jax.engine.programs import (
    DecodeState,
    decode,
    decode_adjusted,
    first_token,
    first_token_adjusted,
)
from tokendance_jax.engine.runner import Runner
from tokendance_jax.engine.sampling import LaneSampling, SamplingArrays, sampling_arrays
from tokendance_jax.engine.sequence import Sequence, TokenLogprobs
from tokendance_jax.kernels.lanes import GroupTables, LaneTables
from tokendance_jax.plan.groups import group_tables
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.prompt.round import Sampling

_NO_TOKENS = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True, slots=True)
class Chosen:
    """The tokens that one call chose.

    Attributes:
      sequences: the sequences of the call.
      tokens: i32 [sequences, steps]; -1 where a sequence had ended, `sampling.NOT_FINITE` where its
        logits were not finite.
      logprobs: log-probabilities; None: no sequence asked for them.
    """

    sequences: list[Sequence]
    tokens: Int32[np.ndarray, "sequences steps"]
    logprobs: Logprobs | None = None

    @classmethod
    def nothing(cls) -> "Chosen":
        """Returns no tokens of no sequences."""
        return cls([], np.zeros((0, 0), np.int32))

    def logprobs_of(self, row: int, step: int) -> TokenLogprobs | None:
        """Returns the log-probabilities of a token, if its sequence asked for them."""
        best = self.sequences[row].sampling.logprobs
        if self.logprobs is None or best is None:
            return None
        ids, values = self.logprobs.ids[row, step], self.logprobs.values[row, step]
        pairs = zip(ids[:best].tolist(), values[:best].tolist(), strict=True)
        return TokenLogprobs(float(self.logprobs.chosen[row, step]), tuple(pairs))


class Batch:
    """Decodes sequences, and keeps the tables of its seats from call to call.

    Tables and settings are made anew only if a sequence joins, its lane has grown, or the sequences
    fit a smaller bucket. A seat whose sequence has left idles until then.
    """

    def __init__(self, runner: Runner, *, steps: int):
        """Starts empty.

        Args:
          runner: runs the calls.
          steps: tokens per sequence and call; the host reads them only between calls.
        """
        self._runner = runner
        self._steps = steps
        self.reset()

    def reset(self) -> None:
        """Forgets all seats."""
        self._seats: list[Sequence] = []
        self._lanes: list[LanePlan] = []
        self._tables: tuple[GroupTables, LaneTables]
        self._sampling: SamplingArrays

    def first_tokens(
        self, sequences: list[Sequence], hidden: Float[jax.Array, "lanes width"]
    ) -> Chosen:
        """Chooses the first token of sequences.

        Args:
          sequences: sequences whose prompts are computed.
          hidden: residual stream at their last tokens, in a bucket of lanes.
        """
        lanes = hidden.shape[0]
        sampling = _sampling(sequences, lanes)
        if adjusting := self._adjusting(sequences, lanes):
            tokens, logprobs = self._runner.run(first_token_adjusted, hidden, sampling, adjusting)
        else:
            tokens, logprobs = self._runner.run(first_token, hidden, sampling), None
        return self._chosen(sequences, tokens, logprobs)

    def run(self, running: list[Sequence]) -> Chosen:
        """Makes one call for the running sequences, whose lanes have room for its tokens."""
        steps = 1 if any(sequence.mask for sequence in running) else self._steps
        shapes = self._runner.shapes
        self._seat(running)
        groups, tables = self._tables
        seated = tables.page.shape[0]
        token, position = np.zeros(seated, np.int32), np.zeros(seated, np.int32)
        alive, generated = np.zeros(seated, np.bool_), np.zeros(seated, np.int32)
        slot = np.full((seated, steps), shapes.no_slot, np.int32)
        live = set(map(id, running))
        for seat, (sequence, lane) in enumerate(zip(self._seats, self._lanes, strict=True)):
            if id(sequence) not in live:
                continue
            chosen = sequence.answer.chosen
            token[seat], position[seat] = chosen[-1], sequence.length
            alive[seat], generated[seat] = True, len(chosen)
            ahead = np.arange(min(steps, sequence.remaining), dtype=np.int32)
            slot[seat, : len(ahead)], _ = lane.locate(position[seat] + ahead, shapes.page_size)
        state = DecodeState(token, position, alive, generated)
        arguments = (state, tables, groups, slot, self._sampling)
        if adjusting := self._adjusting(self._seats, seated):
            tokens, logprobs = self._runner.run(decode_adjusted, *arguments, adjusting)
        else:
            tokens, logprobs = self._runner.run(decode, *arguments), None
        return self._chosen(self._seats, tokens, logprobs)

    def _seat(self, running: list[Sequence]) -> None:
        """Makes tables and settings anew if the present ones do not serve the running sequences."""
        fit = self._runner.shapes.lanes.fit
        seated = {id(some): lane for some, lane in zip(self._seats, self._lanes, strict=True)}
        current = all(seated.get(id(some)) is some.lane for some in running)
        if current and fit(len(running)) == fit(len(self._seats)):
            return
        self._seats, self._lanes = list(running), [some.lane for some in running]
        self._tables = group_tables(self._lanes, self._runner.shapes)
        self._sampling = _sampling(self._seats, fit(len(running)))

    def _adjusting(self, sequences: list[Sequence], lanes: int) -> Adjustments | None:
        """Returns what adjusts the logits of sequences that go on; None if nothing does."""
        settings = [
            LaneAdjustment(Sampling(), _NO_TOKENS)
            if sequence.ended or sequence.status == "stalled"
            else LaneAdjustment(
                sequence.sampling,
                sequence.prompt.token_ids,
                sequence.answer.chosen,
                sequence.allowed,
            )
            for sequence in sequences
        ]
        if all(own.neutral for own in settings):
            return None
        return adjustments(lanes, self._runner.model.config.vocab_size, settings)

    def _chosen(
        self, sequences: list[Sequence], tokens: jax.Array, logprobs: Logprobs | None
    ) -> Chosen:
        """Waits for the results of a call."""
        self._runner.wait((tokens, logprobs))
        found = np.asarray(tokens)[: len(sequences)]
        logprobs = jax.tree.map(np.asarray, logprobs)
        return Chosen(sequences, found.reshape(len(sequences), -1), logprobs)


def _sampling(sequences: list[Sequence], lanes: int) -> SamplingArrays:
    settings = [
        LaneSampling(some.sampling, some.key, some.answer.limit, tuple(some.answer.stop_ids))
        for some in sequences
    ]
    return sampling_arrays(lanes, settings)

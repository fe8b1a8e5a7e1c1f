"""Carries out what the scheduler chose, and counts it."""

from tokendance_jax.engine.clock import Clock
from tokendance_jax.engine.counters import Counters
from tokendance_jax.engine.decode import Batch, Chosen
from tokendance_jax.engine.prefill import Prefill
from tokendance_jax.engine.runner import Runner
from tokendance_jax.engine.scheduler import Admission
from tokendance_jax.engine.sequence import Sequence


class Executor:
    """Makes the calls of prefills and of the running batch.

    Attributes:
      counts: the sums of what it did.
    """

    def __init__(self, runner: Runner, *, decode_steps: int):
        """Starts with an empty batch.

        Args:
          runner: runs the calls.
          decode_steps: tokens per sequence and decode call.
        """
        self.counts = Counters()
        self._runner = runner
        self._batch = Batch(runner, steps=decode_steps)

    def reset(self) -> None:
        """Forgets the batch, whose pages are lost."""
        self._batch.reset()

    def prefill(self, admission: Admission, clock: Clock) -> Chosen | None:
        """Makes the next call of a prefill. After the last, chooses the first tokens.

        Args:
          admission: its sequences hold their pages.
          clock: started at the beginning of the step.

        Returns:
          The first tokens, none for a sequence that resumes; None: further calls follow.
        """
        counts = self.counts
        prefill = admission.prefill
        if prefill is None:
            assert admission.steps is not None
            seats = [sequence.seat for sequence in admission.own]
            prefill = admission.prefill = Prefill(self._runner, admission.steps, seats=seats)
            counts.plan_s += clock.lap()
        last = prefill.call()
        self._runner.wait(prefill.hidden)
        counts.prefill_calls += 1
        counts.prefill_s += clock.lap()
        if not last:
            return None
        counts.prefill_rows += prefill.rows
        for sequence, computed in zip(admission.own, prefill.cost.tokens.tolist(), strict=True):
            sequence.computed_tokens += computed
        counts.computed_tokens += int(prefill.cost.tokens.sum())
        counts.base_tokens += prefill.cost.base_tokens
        if admission.resumes:
            return Chosen.nothing()
        return self._first_tokens(admission, prefill, clock)

    def decode(self, running: list[Sequence], clock: Clock) -> Chosen:
        """Makes one decode call for the running sequences."""
        chosen = self._batch.run(running)
        self.counts.decode_calls += 1
        self.counts.decode_lanes += len(running)
        self.counts.decode_s += clock.lap()
        return chosen

    def _first_tokens(self, admission: Admission, prefill: Prefill, clock: Clock) -> Chosen:
        handle, sequences, own = admission.handle, admission.sequences, admission.own
        handle.cost, handle.prefill_s = prefill.cost, handle.clock.lap()
        assert handle.opened is not None
        prompt = sum(len(sequence.prompt.token_ids) for sequence in own)
        exact = sum(handle.opened.exact_hits[sequence.seat] for sequence in own)
        self.counts.prompt_tokens += prompt
        self.counts.exact_tokens += exact
        self.counts.shared_tokens += prompt - exact - int(prefill.cost.tokens.sum())
        hidden = prefill.hidden
        if len(own) < len(sequences):
            place = {id(sequence): index for index, sequence in enumerate(own)}
            rows = [place[id(sequence.copies or sequence)] for sequence in sequences]
            hidden = self._runner.gather(hidden, rows)
        chosen = self._batch.first_tokens(sequences, hidden)
        handle.first_token_s = handle.clock.total()
        handle.clock.lap()
        self.counts.first_token_s += clock.lap()
        return chosen

"""From the tokens of calls to events: answers grow and end."""

from tokendance_jax.engine.counters import Counters
from tokendance_jax.engine.decode import Chosen
from tokendance_jax.engine.errors import NotFiniteError
from tokendance_jax.engine.sampling import NOT_FINITE
from tokendance_jax.engine.scheduler import Scheduler
from tokendance_jax.engine.sequence import Event, Sequence, TokenLogprobs


class Outputs:
    """Adds tokens to answers, and ends sequences."""

    def __init__(self, scheduler: Scheduler, counts: Counters):
        self._scheduler = scheduler
        self._counts = counts

    def take(self, chosen: Chosen) -> list[Event]:
        """Adds the tokens of a call to the answers, step by step."""
        events = []
        for step in range(chosen.tokens.shape[1]):
            for row, (sequence, token) in enumerate(
                zip(chosen.sequences, chosen.tokens[:, step].tolist(), strict=True)
            ):
                if sequence.status != "running" or token == -1:
                    continue
                answer = sequence.answer
                if token == NOT_FINITE:
                    number = len(answer.chosen)
                    problem = f"the logits of token {number} of its answer are NaN or infinite"
                    error = NotFiniteError(*sequence.names, problem)
                    events.append(self.end(sequence, "", error=error))
                    continue
                text = answer.add(token)
                self._counts.decoded_tokens += 1
                logprobs = chosen.logprobs_of(row, step)
                if not answer.live:
                    events.append(self.end(sequence, text, token=token, logprobs=logprobs))
                    continue
                events.append(Event(sequence, token, text, logprobs=logprobs))
                try:
                    sequence.ask_mask()
                except Exception as error:  # whatever the caller's function raises
                    events.append(self.end(sequence, "", error=error))
        return events

    def drained(self) -> list[Event]:
        """Ends the sequences that the scheduler could not serve, or not to their end."""
        ended, self._scheduler.ended = self._scheduler.ended, []
        return [
            self.end(some, "" if some.error else some.answer.cut(), error=some.error)
            for some in ended
        ]

    def end(
        self,
        sequence: Sequence,
        text: str,
        *,
        token: int | None = None,
        logprobs: TokenLogprobs | None = None,
        error: BaseException | None = None,
    ) -> Event:
        """Ends a sequence, and releases its pages unless its handle holds them."""
        handle, scheduler = sequence.handle, self._scheduler
        sequence.error = error
        sequence.status = "aborted" if error else "finished"
        if error:
            self._counts.aborted += 1
            scheduler.release(sequence, keep=False)
        else:
            self._counts.finished += 1
            if handle.hold:
                scheduler.leave(sequence)
                scheduler.held.append(sequence)
            else:
                scheduler.release(sequence, keep=True)
        if handle.done:
            handle.decode_s = handle.clock.lap()
        return Event(sequence, token, text, last=True, logprobs=logprobs)

"""What an engine has done so far, as numbers."""

import dataclasses


@dataclasses.dataclass(slots=True)
class Counters:
    """Sums since the engine was made, and its present state.

    The difference of two is what happened between them. Its fields of the present state are those
    of the later one.

    Attributes:
      steps: steps that had something to do.
      prefill_calls: prefill calls.
      decode_calls: decode calls.
      prefill_rows: rows of the prefill calls, without padding.
      decode_lanes: sequences of the decode calls, summed up.
      added: sequences that were added.
      finished: sequences whose answers have ended.
      aborted: sequences that were aborted or failed.
      stalled: how often a sequence gave up its own pages.
      prompt_tokens: tokens of the prompts that were prefilled.
      exact_tokens: those that were read from exact pages.
      shared_tokens: those that were read from bases or copied from them.
      computed_tokens: tokens that were computed for prompts.
      base_tokens: tokens that were computed for bases.
      decoded_tokens: tokens of answers.
      plan_s: seconds of planning, for all that was admitted.
      prefill_s: seconds of prefill calls.
      first_token_s: seconds of choosing first tokens.
      decode_s: seconds of decode calls.
      host_s: seconds of steps in which the host did not wait for the device.
      waiting: sequences that hold no pages of their own, now.
      running: sequences that are prefilled or decode, now.
      pages_free: pages that hold nothing, now.
      pages_cached: pages that may be found again and that nothing holds, now.
      pages_held: pages that sequences or bases hold, now.
    """

    steps: int = 0
    prefill_calls: int = 0
    decode_calls: int = 0
    prefill_rows: int = 0
    decode_lanes: int = 0
    added: int = 0
    finished: int = 0
    aborted: int = 0
    stalled: int = 0
    prompt_tokens: int = 0
    exact_tokens: int = 0
    shared_tokens: int = 0
    computed_tokens: int = 0
    base_tokens: int = 0
    decoded_tokens: int = 0
    plan_s: float = 0.0
    prefill_s: float = 0.0
    first_token_s: float = 0.0
    decode_s: float = 0.0
    host_s: float = 0.0
    waiting: int = 0
    running: int = 0
    pages_free: int = 0
    pages_cached: int = 0
    pages_held: int = 0

    def __sub__(self, before: "Counters") -> "Counters":
        """Returns what happened between two of an engine's counters."""
        present = ("waiting", "running", "pages_free", "pages_cached", "pages_held")
        found = {
            field.name: getattr(self, field.name)
            - (0 if field.name in present else getattr(before, field.name))
            for field in dataclasses.fields(self)
        }
        return Counters(**found)

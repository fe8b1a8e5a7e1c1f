"""What waits for pages, or is being prefilled."""

import dataclasses

import numpy as np
from jaxtyping import Int32

from tokendance_jax.engine.prefill import Prefill
from tokendance_jax.engine.sequence import Handle, Sequence
from tokendance_jax.paged.page_pool import OutOfPages
from tokendance_jax.policy.policy import Steps


class QueueFull(RuntimeError):
    """The queue of waiting requests is full. Nothing was added."""


@dataclasses.dataclass(slots=True, eq=False)
class Admission:
    """Sequences that take their pages together: those of a handle, or one that was stalled.

    Attributes:
      sequences: the sequences.
      handle: their handle.
      opens: whether they opened a round, so that they compute its bases.
      steps: what the device has to do before they decode.
      prefill: carries out the steps, once begun.
      resumes: whether the sequence was stalled.
      spare: pages for lanes that copy another lane's prompt.
      refusal: why the pages could not be taken when they were tried last.
      available: number of pages that were available then.
    """

    sequences: list[Sequence]
    handle: Handle
    opens: bool = False
    steps: Steps | None = None
    prefill: Prefill | None = None
    resumes: bool = False
    spare: list[Int32[np.ndarray, " pages"]] = dataclasses.field(default_factory=list)
    refusal: OutOfPages | None = None
    available: int = 0

    @property
    def order(self) -> tuple[int, int]:
        """Sorts admissions by priority, then by arrival."""
        return -self.handle.priority, self.handle.arrival

    @property
    def own(self) -> list[Sequence]:
        """The sequences whose prompts are computed; the others copy one of them."""
        return [some for some in self.sequences if self.resumes or some.copies is None]

    @property
    def ready(self) -> bool:
        """Whether the round to join, if any, has its pages, or has ended."""
        joins = self.handle.joins
        return joins is None or joins.opened is not None or joins.done

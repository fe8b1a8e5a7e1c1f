"""Which pages of the shared text an agent computes itself."""

import abc
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32

from tokendance_jax.policy.parts import Run


class Selection(abc.ABC):
    """Picks entries of shared text to be patched, page by page.

    Attributes:
      look: what the device has to score before the choice; None: the choice needs no scores.
      pages: pages that each agent computes, as far as the selection is limited.
      head: pages that each agent computes at the beginning of every run of shared text.
    """

    look: Literal["deviation", "attention"] | None = None

    def __init__(self, pages: int):
        self.pages = pages
        self.head = 0

    @abc.abstractmethod
    def pick(self, run: Run, page_size: int) -> Bool[np.ndarray, " entries"]:
        """Chooses an agent's entries before anything is computed."""


class Nothing(Selection):
    """Nothing: every shared token is read from the base."""

    def pick(self, run: Run, page_size: int) -> Bool[np.ndarray, " entries"]:
        """No entry; see `Selection.pick`."""
        del page_size
        return np.zeros(len(run.page), np.bool_)


class Head(Selection):
    """The first pages of every run of shared text, next to the agent's own text.

    That is where a base differs most from what the agent would have computed. The first run's head
    continues the agent's own prefix, so it is exact.
    """

    def __init__(self, pages: int):
        super().__init__(pages)
        self.head = pages

    def pick(self, run: Run, page_size: int) -> Bool[np.ndarray, " entries"]:
        """The entries that begin within so many pages; see `Selection.pick`."""
        return run.offset < self.pages * page_size


class Own(Head):
    """The head, and the agent's own block of the round before."""

    def pick(self, run: Run, page_size: int) -> Bool[np.ndarray, " entries"]:
        """The head's entries and the own block's; see `Selection.pick`."""
        return super().pick(run, page_size) | run.mine


class All(Selection):
    """Everything: as dense, over the same tables."""

    def pick(self, run: Run, page_size: int) -> Bool[np.ndarray, " entries"]:
        """Every entry; see `Selection.pick`."""
        del page_size
        return np.ones(len(run.page), np.bool_)


class Scored(Selection):
    """The pages of the highest scores, the same for all agents of the round."""

    def pick(self, run: Run, page_size: int) -> Bool[np.ndarray, " entries"]:
        """No entry yet; see `Selection.pick`."""
        del page_size
        return np.zeros(len(run.page), np.bool_)

    def pick_scored(
        self, runs: Sequence[Run], scores: Sequence[Float32[np.ndarray, " _"]]
    ) -> list[Bool[np.ndarray, " entries"]]:
        """Chooses for all agents together.

        A page's score is its mean over the agents that see it, whatever their order. Of equal
        pages the first in the base is taken.

        Args:
          runs: the agents' shared text.
          scores: the score of each entry.
        """
        found: dict[int, list[float]] = defaultdict(list)
        canonical: dict[int, int] = {}
        for run, score in zip(runs, scores, strict=True):
            where = (run.start - run.frame).tolist()
            for page, value, at in zip(run.page.tolist(), score.tolist(), where, strict=True):
                found[page].append(value)
                canonical[page] = min(at, canonical.get(page, at))
        # Sums without rounding do not depend on the order of the agents.
        mean = {page: math.fsum(values) / len(values) for page, values in found.items()}
        # Bases of single segments begin at the same position: of their pages the first is taken.
        ranked = sorted(mean, key=lambda page: (-mean[page], canonical[page], page))
        chosen = np.array(ranked[: self.pages], np.int32)
        return [np.isin(run.page, chosen) for run in runs]


def deviations(squares: Sequence[Float32[np.ndarray, "2 _"]]) -> list[Float32[np.ndarray, " _"]]:
    """One score for each row out of the squared changes of its K and V, each over its mean."""
    whole = np.concatenate(squares, axis=1)
    # Sums without rounding do not depend on the order of the agents.
    mean = np.array([[math.fsum(part.tolist()) / max(1, len(part))] for part in whole], np.float32)
    mean = np.maximum(mean, np.finfo(np.float32).tiny)
    return [(square / mean).sum(axis=0) for square in squares]


class Deviation(Scored):
    """The pages whose K and V differ most from the agents' own at layer 1, as in CacheBlend."""

    look = "deviation"


class Query(Scored):
    """The pages that the agents' own text behind them attends to most."""

    look = "attention"


SELECTIONS: dict[str, type[Selection]] = {
    "head": Head,
    "none": Nothing,
    "deviation": Deviation,
    "query": Query,
    "own": Own,
    "all": All,
}


def make_selection(name: str, pages: int) -> Selection:
    """Builds a selection by its name.

    Args:
      name: one of `SELECTIONS`.
      pages: pages that each agent computes.

    Raises:
      ValueError: if there is no such selection, or the number of pages is negative.
    """
    if name not in SELECTIONS:
        raise ValueError(f"selection: {name!r} is unknown; choose one of {', '.join(SELECTIONS)}")
    if pages < 0:
        raise ValueError(f"head_pages: {pages} is negative; give 0 or more")
    return SELECTIONS[name](pages)

"""Selects the pages of shared text that an agent computes itself."""

import abc
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32

from tokendance_jax.policy.parts import Run


class Selection(abc.ABC):
    """Chooses which entries of shared text, page by page, are replaced by patches.

    Attributes:
      look: the kind of scores that the choice needs (see `Look`); None: it needs no scores.
      pages: number of pages that each agent computes, if the selection is limited.
      head: number of pages that each agent computes at the beginning of every run of shared text.
    """

    look: Literal["deviation", "attention"] | None = None

    def __init__(self, pages: int):
        self.pages = pages
        self.head = 0

    @abc.abstractmethod
    def pick(self, run: Run, page_size: int) -> Bool[np.ndarray, " entries"]:
        """Chooses an agent's entries before anything is computed."""


class Nothing(Selection):
    """Selects nothing: every shared token is read from the base."""

    def pick(self, run: Run, page_size: int) -> Bool[np.ndarray, " entries"]:
        """Chooses no entry; see `Selection.pick`."""
        del page_size
        return np.zeros(len(run.page), np.bool_)


class Head(Selection):
    """Selects the first pages of every run of shared text, behind the agent's own text.

    A base differs most there from what the agent itself would have computed. The head of the first
    run continues the agent's own prefix, so it is exact.
    """

    def __init__(self, pages: int):
        super().__init__(pages)
        self.head = pages

    def pick(self, run: Run, page_size: int) -> Bool[np.ndarray, " entries"]:
        """Chooses entries that begin in the first `pages` pages of a run; see `Selection.pick`."""
        return run.offset < self.pages * page_size


class Own(Head):
    """Selects the head, and the agent's own block of the previous round."""

    def pick(self, run: Run, page_size: int) -> Bool[np.ndarray, " entries"]:
        """Chooses the entries of the head and of the own block; see `Selection.pick`."""
        return super().pick(run, page_size) | run.mine


class All(Selection):
    """Selects everything.

    Agents compute as in `dense`, over the same tables as with other selections.
    """

    def pick(self, run: Run, page_size: int) -> Bool[np.ndarray, " entries"]:
        """Chooses every entry; see `Selection.pick`."""
        del page_size
        return np.ones(len(run.page), np.bool_)


class Scored(Selection):
    """Selects the pages with the highest scores, the same for all agents of the round."""

    def pick(self, run: Run, page_size: int) -> Bool[np.ndarray, " entries"]:
        """Chooses no entry yet; see `Selection.pick`."""
        del page_size
        return np.zeros(len(run.page), np.bool_)

    def pick_scored(
        self, runs: Sequence[Run], scores: Sequence[Float32[np.ndarray, " _"]]
    ) -> list[Bool[np.ndarray, " entries"]]:
        """Chooses entries for all agents together.

        A page's score is the mean over the agents that read it, and does not depend on their
        order. Of pages with equal scores, the first in the base is chosen.

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
        # Bases of single segments begin at the same position; ties between their pages go to the
        # lowest page id.
        ranked = sorted(mean, key=lambda page: (-mean[page], canonical[page], page))
        chosen = np.array(ranked[: self.pages], np.int32)
        return [np.isin(run.page, chosen) for run in runs]


def deviations(squares: Sequence[Float32[np.ndarray, "2 _"]]) -> list[Float32[np.ndarray, " _"]]:
    """Returns one score for each row, from the squared changes of its K and V.

    The score is the sum of both changes, each divided by its mean over all rows.
    """
    whole = np.concatenate(squares, axis=1)
    # Sums without rounding do not depend on the order of the agents.
    mean = np.array([[math.fsum(part.tolist()) / max(1, len(part))] for part in whole], np.float32)
    mean = np.maximum(mean, np.finfo(np.float32).tiny)
    return [(square / mean).sum(axis=0) for square in squares]


class Deviation(Scored):
    """Selects pages whose K and V differ most from agents' own at layer 1, as in CacheBlend."""

    look = "deviation"


class Query(Scored):
    """Selects the pages that the agents' own text behind them attends to most."""

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
      ValueError: the selection is unknown, or the number of pages is negative.
    """
    if name not in SELECTIONS:
        raise ValueError(f"selection: {name!r} is unknown; choose one of {', '.join(SELECTIONS)}")
    if pages < 0:
        raise ValueError(f"head_pages: {pages} is negative; give 0 or more")
    return SELECTIONS[name](pages)

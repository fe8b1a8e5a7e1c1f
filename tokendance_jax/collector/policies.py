"""The exact policies: which pages a lane takes, and which tokens it computes."""

import abc

import numpy as np
from jaxtyping import Int32

from tokendance_jax.collector.lane import LanePlan
from tokendance_jax.paged.page_pool import PagePool
from tokendance_jax.paged.prefix_cache import PrefixCache


class Policy(abc.ABC):
    """Opens the lanes of a round and closes them; between the two, a lane holds its pages."""

    @abc.abstractmethod
    def open(self, token_ids: Int32[np.ndarray, " tokens"], room: int) -> LanePlan:
        """Takes pages for a prompt and `room` more tokens.

        Raises:
          OutOfPages: if the pool cannot give them; nothing is held then.
        """

    @abc.abstractmethod
    def close(self, lane: LanePlan, written: Int32[np.ndarray, " written"] | None) -> None:
        """Gives a lane's pages back.

        Args:
          lane: an open lane.
          written: the tokens whose K and V were written, in logical order; None if the round failed
            and the pages may hold anything.
        """


class Dense(Policy):
    """Every agent computes its whole prompt into pages of its own."""

    def __init__(self, pool: PagePool, page_size: int):
        self._pool = pool
        self._page_size = page_size

    def open(self, token_ids: Int32[np.ndarray, " tokens"], room: int) -> LanePlan:
        """Takes fresh pages; see `Policy.open`."""
        pages = self._pool.allocate(_pages(len(token_ids) + room, self._page_size))
        return LanePlan.contiguous(token_ids, pages, computed_from=0, page_size=self._page_size)

    def close(self, lane: LanePlan, written: Int32[np.ndarray, " written"] | None) -> None:
        """Frees the pages; see `Policy.close`."""
        del written
        self._pool.release(lane.page)


class Prefix(Policy):
    """Exact reuse of full pages by their whole prefix, across agents and rounds.

    As in vLLM's automatic prefix caching. Blocks are registered when a lane opens, before they are
    computed: an agent of the same round may point its table at a page that an earlier agent's rows
    write in the same call, for at each layer all rows write before any row attends.
    """

    def __init__(self, pool: PagePool, cache: PrefixCache, page_size: int):
        self._pool = pool
        self._cache = cache
        self._page_size = page_size

    def open(self, token_ids: Int32[np.ndarray, " tokens"], room: int) -> LanePlan:
        """Takes the longest cached prefix and fresh pages after it; see `Policy.open`."""
        hit = self._cache.match(token_ids)
        try:
            fresh = self._pool.allocate(_pages(len(token_ids) + room, self._page_size) - len(hit))
        except BaseException:
            self._pool.release(hit)
            raise
        pages = np.concatenate([hit, fresh])
        self._cache.insert(token_ids, pages)
        return LanePlan.contiguous(
            token_ids,
            pages,
            computed_from=len(hit) * self._page_size,
            page_size=self._page_size,
        )

    def close(self, lane: LanePlan, written: Int32[np.ndarray, " written"] | None) -> None:
        """Keeps full written pages for later rounds; see `Policy.close`."""
        if written is None:
            self._cache.forget(lane.page[lane.computed[0] // self._page_size :])
        else:
            self._cache.insert(written, lane.page)
        self._pool.release(lane.page)


POLICIES = ("dense", "prefix")


def make_policy(name: str, pool: PagePool, page_size: int, namespace: str) -> Policy:
    """Builds a policy by its name.

    Args:
      name: one of `POLICIES`.
      pool: the page pool.
      page_size: token slots in a page.
      namespace: what K and V depend on beside the tokens (model, precision, rotary embedding).

    Raises:
      ValueError: if there is no such policy.
    """
    if name == "dense":
        return Dense(pool, page_size)
    if name == "prefix":
        return Prefix(pool, PrefixCache(pool, page_size, namespace), page_size)
    raise ValueError(f"policy: {name!r} is unknown; choose one of {', '.join(POLICIES)}")


def _pages(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)

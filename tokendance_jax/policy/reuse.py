"""The common part of all policies that keep shared text in bases."""

import abc
import dataclasses
from collections.abc import Collection

import numpy as np
from jaxtyping import Int32

from tokendance_jax.paged.page_pool import PagePool
from tokendance_jax.paged.prefix_cache import PrefixCache
from tokendance_jax.policy.bases import BaseStore
from tokendance_jax.policy.exact import Prefix
from tokendance_jax.policy.policy import OpenRound, Policy


class BaseReuse(Policy):
    """Keeps bases for shared text and a prefix cache for exact text."""

    def __init__(
        self, pool: PagePool, page_size: int, namespace: str, *, kind: str, salt: bytes = b""
    ):
        """Starts with empty caches.

        Args:
          pool: the page pool.
          page_size: token slots in a page.
          namespace: what K and V depend on besides the tokens.
          kind: how bases are conditioned; see `BaseStore`.
          salt: secret of a tenant.
        """
        super().__init__(pool, page_size)
        self._cache = PrefixCache(pool, page_size, namespace, salt)
        self._exact = Prefix(pool, self._cache, page_size)
        self._store = BaseStore(pool, page_size, namespace, kind=kind, salt=salt)

    def _release_lane(
        self, opened: OpenRound, seat: int, written: Int32[np.ndarray, " _"] | None
    ) -> None:
        """Releases a lane; later rounds can still find its exact pages."""
        lane = opened.lanes[seat]
        if seat not in self._reusing(opened):
            self._exact.close_lane(lane, written)
            return
        if written is None:
            slot, _ = lane.locate(lane.computed, self._page_size)
            self._cache.forget(np.unique(slot // self._page_size))
        self._pool.release(lane.page)

    def _suspend(self, opened: OpenRound, seat: int, written: Int32[np.ndarray, " _"]) -> None:
        """Releases the lane's own pages; patches stay, as scores may have chosen them."""
        lane = opened.lanes[seat]
        if seat not in self._reusing(opened):
            opened.lanes[seat] = self._exact.suspend_lane(lane, written)
            return
        own = lane.base == 0
        self._pool.release(lane.page[own])
        opened.lanes[seat] = dataclasses.replace(lane, page=np.where(own, 0, lane.page))

    def _release_bases(self, opened: OpenRound) -> None:
        """Releases the bases; later rounds can still find them."""
        for lane in opened.bases:
            self._store.close(lane, failed=opened.failed, left=opened.left)

    def base_pages(self) -> Int32[np.ndarray, " pages"]:
        """Returns the pages of the bases that later rounds may read; see `Policy.base_pages`."""
        return self._store.pages()

    @abc.abstractmethod
    def _reusing(self, opened: OpenRound) -> Collection[int]:
        """Returns the seats whose lanes read shared text from bases or from copies of bases."""

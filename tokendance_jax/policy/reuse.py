"""What policies have in common that keep shared text in bases, whoever reads them and how."""

import abc
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Int32

from tokendance_jax.paged.page_pool import PagePool
from tokendance_jax.paged.prefix_cache import PrefixCache
from tokendance_jax.policy.bases import BaseStore
from tokendance_jax.policy.exact import Prefix
from tokendance_jax.policy.policy import OpenRound, Policy


class BaseReuse(Policy):
    """Bases for shared text, a prefix cache for exact text, and how a round gives them back."""

    def __init__(
        self, pool: PagePool, page_size: int, namespace: str, *, kind: str, salt: bytes = b""
    ):
        """Starts with empty caches.

        Args:
          pool: the page pool.
          page_size: token slots in a page.
          namespace: what K and V depend on beside the tokens.
          kind: how bases are conditioned; see `BaseStore`.
          salt: secret of a tenant.
        """
        self._pool = pool
        self._page_size = page_size
        self._cache = PrefixCache(pool, page_size, namespace, salt)
        self._exact = Prefix(pool, self._cache, page_size)
        self._store = BaseStore(pool, page_size, namespace, kind=kind, salt=salt)

    def close(self, opened: OpenRound, written: Sequence[Int32[np.ndarray, " _"]] | None) -> None:
        """Keeps bases and exact pages findable, and gives every reference back."""
        reusing = self._reusing(opened)
        for seat, lane in enumerate(opened.lanes):
            if seat not in reusing:
                self._exact.close_lane(lane, None if written is None else written[seat])
                continue
            if written is None:
                slot, _ = lane.locate(lane.computed, self._page_size)
                self._cache.forget(np.unique(slot // self._page_size))
            self._pool.release(lane.page)
        for lane in opened.bases:
            self._store.close(lane, failed=written is None, left=opened.left)

    def base_pages(self) -> Int32[np.ndarray, " pages"]:
        """Pages of the bases that later rounds may read; see `Policy.base_pages`."""
        return self._store.pages()

    @abc.abstractmethod
    def _reusing(self, opened: OpenRound) -> Collection[int]:
        """Seats whose lanes read shared text from bases, or from copies of them."""

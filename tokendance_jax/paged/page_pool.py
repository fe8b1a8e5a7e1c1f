"""Reference counts of the KV pages: who may write a page, and which page is evicted next."""

from collections import Counter, OrderedDict
from collections.abc import Callable

import numpy as np
from jaxtyping import Int, Int32


class OutOfPages(RuntimeError):
    """More pages were requested than are free or evictable. The pool is unchanged.

    Attributes:
      requested: pages requested.
      free: pages that hold nothing.
      evictable: pages that hold cached content without a reference.
      total: pages of the pool, the reserved page 0 included.
    """

    def __init__(self, requested: int, free: int, evictable: int, total: int):
        super().__init__(
            f"{requested} KV pages requested, but of {total} only {free} are free and {evictable} "
            "evictable: raise kv_memory, serve fewer agents, or shorten the prompts"
        )
        self.requested = requested
        self.free = free
        self.evictable = evictable
        self.total = total


class PagePool:
    """Hands out page ids 1 .. pages - 1 and counts the references to them.

    A page is *live* (referenced), *evictable* (unreferenced, but its cached content may still be
    reused), or *free*. Page 0 is reserved: padding entries of block tables point to it, and it is
    never read. Every operation costs O(1) per page that it handles, and a refused batch changes
    nothing. The order of eviction is that of vLLM's automatic prefix caching: least recently
    released first. Of pages that are released together, the last is evicted first, because the
    end of a chain is useless without its beginning.
    """

    def __init__(self, pages: int):
        """Starts with every page free.

        Args:
          pages: size of the pool, the reserved page 0 included.

        Raises:
          ValueError: there is no page besides page 0.
        """
        if pages < 2:
            raise ValueError(f"a pool needs page 0 and at least one more, got {pages} pages")
        self._counts = [0] * pages
        self._free = list(range(pages - 1, 0, -1))  # a stack: the lowest id is handed out first
        self._evictable: OrderedDict[int, None] = OrderedDict()  # in the order of eviction
        self._on_evict: dict[int, Callable[[int], None]] = {}  # of all cached pages, live or not

    @property
    def total(self) -> int:
        """Pages of the pool, page 0 included."""
        return len(self._counts)

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def evictable(self) -> int:
        """Cached pages without a reference."""
        return len(self._evictable)

    @property
    def live(self) -> int:
        """Pages with at least one reference."""
        return self.total - 1 - self.free - self.evictable

    def refcount(self, page: int) -> int:
        """Returns the number of references to one page.

        Raises:
          ValueError: the page is 0 or not in this pool.
        """
        self._check_ids([page])
        return self._counts[page]

    def allocate(self, count: int) -> Int32[np.ndarray, " count"]:
        """Allocates pages to write to: free ones, then the least recently released cached ones.

        Args:
          count: number of pages.

        Returns:
          Distinct page ids, each with one reference, which the caller owns.

        Raises:
          OutOfPages: fewer than `count` pages are free or evictable.
          ValueError: `count` is negative.
        """
        if count < 0:
            raise ValueError(f"cannot allocate {count} pages")
        if count > self.free + self.evictable:
            raise OutOfPages(count, self.free, self.evictable, self.total)
        pages = [self._free.pop() for _ in range(min(count, self.free))]
        evicted = [self._evictable.popitem(last=False)[0] for _ in range(count - len(pages))]
        pages += evicted
        for page in pages:
            self._counts[page] = 1
        # Notify the owners only when the pool is consistent again.
        for page in evicted:
            self._on_evict.pop(page)(page)
        return np.array(pages, np.int32)

    def extend(self, held: Int32[np.ndarray, " n"], count: int) -> Int32[np.ndarray, " total"]:
        """Allocates further pages for a sequence; if that fails, releases the pages it holds.

        Args:
          held: page ids that the caller holds, one reference each.
          count: number of further pages.

        Returns:
          `held` and the new pages, one reference each.

        Raises:
          OutOfPages: as `allocate`; the references to `held` are released then.
        """
        try:
            return np.concatenate([held, self.allocate(count)])
        except BaseException:
            self.release(held)
            raise

    def retain(self, pages: Int[np.ndarray, " n"]) -> None:
        """Adds one reference per entry; an evictable page becomes live again.

        Args:
          pages: page ids; an id that occurs twice gets two references.

        Raises:
          ValueError: an entry is page 0, not in this pool, or free.
        """
        ids = pages.tolist()
        self._check_ids(ids)
        for page in ids:
            if self._counts[page] == 0 and page not in self._evictable:
                raise ValueError(f"page {page} is free: only allocate() may hand it out")
        for page in ids:
            self._counts[page] += 1
            self._evictable.pop(page, None)

    def release(self, pages: Int[np.ndarray, " n"]) -> None:
        """Drops one reference per entry; a page without references becomes evictable or free.

        Args:
          pages: page ids in the order of their sequence (or several sequences, one after the
            other): the last page of a sequence is evicted before the first.

        Raises:
          ValueError: an entry is page 0 or not in this pool, or a page occurs more often than it
            has references.
        """
        ids = pages.tolist()
        self._check_ids(ids)
        for page, times in Counter(ids).items():
            if times > self._counts[page]:
                raise ValueError(
                    f"page {page} has {self._counts[page]} references, {times} were released"
                )
        for page in reversed(ids):
            self._counts[page] -= 1
            if self._counts[page] == 0:
                if page in self._on_evict:
                    self._evictable[page] = None
                else:
                    self._free.append(page)

    def mark_cached(self, pages: Int[np.ndarray, " n"], on_evict: Callable[[int], None]) -> None:
        """Marks pages as cached: they keep their content when their last reference is released.

        A page has one owner at a time, but owners may share a pool.

        Args:
          pages: distinct live page ids.
          on_evict: called with a page id when `allocate` hands the page out again. It must forget
            the page and must not call the pool.

        Raises:
          ValueError: an entry is page 0, not in this pool, not live, cached already, or repeated.
        """
        ids = pages.tolist()
        self._check_ids(ids)
        if len(set(ids)) < len(ids):
            raise ValueError("a page cannot be marked twice")
        for page in ids:
            if self._counts[page] == 0 or page in self._on_evict:
                state = "cached already" if page in self._on_evict else "free"
                raise ValueError(f"page {page} is {state} and cannot be marked")
        self._on_evict.update(dict.fromkeys(ids, on_evict))

    def unmark_cached(self, pages: Int[np.ndarray, " n"]) -> None:
        """Removes the mark without calling `on_evict`; evictable pages become free.

        Args:
          pages: distinct cached page ids.

        Raises:
          ValueError: an entry is page 0, not in this pool, not cached, or repeated.
        """
        ids = pages.tolist()
        self._check_ids(ids)
        if len(set(ids)) < len(ids) or not self._on_evict.keys() >= set(ids):
            raise ValueError(f"pages {ids} are not distinct cached pages")
        for page in ids:
            del self._on_evict[page]
            if self._counts[page] == 0:
                del self._evictable[page]
                self._free.append(page)

    def check(self) -> None:
        """Asserts that every page but page 0 is exactly one of free, evictable and live.

        Raises:
          AssertionError: the pool is inconsistent (a bug in this class).
        """
        free, evictable = set(self._free), set(self._evictable)
        live = {page for page, count in enumerate(self._counts) if count}
        assert min(self._counts) >= 0, "negative reference count"
        assert len(free) == len(self._free), "a page is in the free list twice"
        assert free | evictable | live == set(range(1, self.total)), "a page is lost"
        counted = self.free + self.evictable + len(live)
        assert counted + 1 == self.total, "a page has two states"
        assert evictable == self._on_evict.keys() - live, "an unreferenced cached page is lost"

    def _check_ids(self, ids: list[int]) -> None:
        for page in ids:
            if not 0 < page < self.total:
                raise ValueError(f"page {page} is not one of 1 .. {self.total - 1}")

"""Bases: the canonical pages of shared segments, found again by content across rounds."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from tokendance_jax.paged.page_pool import PagePool
from tokendance_jax.paged.prefix_cache import PrefixCache
from tokendance_jax.plan.lane import LanePlan


def content_key(token_ids: Int32[np.ndarray, " tokens"]) -> bytes:
    """Returns the digest that identifies a segment: 128 bits over the token ids."""
    return hashlib.blake2b(np.ascontiguousarray(token_ids).tobytes(), digest_size=16).digest()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """Where a segment lies in its base.

    Attributes:
      token_ids: the segment.
      page: pages that hold it, in order; the first and the last may hold other segments too.
      first: its first slot in each page.
      slots: number of its slots in each page.
      canonical: canonical position of its first token.
    """

    token_ids: Int32[np.ndarray, " tokens"]
    page: Int32[np.ndarray, " entries"]
    first: Int32[np.ndarray, " entries"]
    slots: Int32[np.ndarray, " entries"]
    canonical: int

    def slot(self, page_size: int) -> Int32[np.ndarray, " tokens"]:
        """Returns the slot (page * page_size + offset) of each token."""
        start = np.cumsum(self.slots) - self.slots
        entry = np.repeat(np.arange(len(self.page)), self.slots)
        offset = np.arange(len(self.token_ids)) - start[entry] + self.first[entry]
        return (self.page[entry] * page_size + offset).astype(np.int32)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A base that has no pages yet: segments that are computed together, one after the other.

    Attributes:
      token_ids: the context, then the segments.
      blocks: the content of each page, as bytes.
      keys: the key of each page. Pages of different bases with the same key are one page.
      slots: number of slots in use in each page.
      placed: the place of each segment. Negative numbers stand in for page ids that are not known
        yet: -1 - (`before` + the page's index in the base).
      before: number of pages in the round's earlier layouts, so that the negative numbers of one
        round are distinct.
    """

    token_ids: Int32[np.ndarray, " tokens"]
    blocks: list[bytes]
    keys: list[bytes]
    slots: Int32[np.ndarray, " pages"]
    placed: list[Placed]
    before: int


def paged(
    number: Int32[np.ndarray, " entries"], page: Int32[np.ndarray, " pages"]
) -> Int32[np.ndarray, " entries"]:
    """Replaces the negative numbers of layouts by page ids; page ids stay as they are.

    Args:
      number: page ids, or negative numbers as in `Layout.placed`.
      page: the page ids of all layouts, one layout after the other.
    """
    known = number.copy()
    known[number < 0] = page[-1 - number[number < 0]]
    return known


class BaseStore:
    """Lays out segments in base pages, and remembers them until their pages are evicted.

    A base page depends only on what its key is computed from: the namespace, the kind, the salt,
    the context and the token ids up to its end. So the pages of equal bases are found again by the
    chain of their blocks, and no base contains private text of an agent.
    """

    def __init__(
        self, pool: PagePool, page_size: int, namespace: str, *, kind: str, salt: bytes = b""
    ):
        """Starts empty.

        Args:
          pool: the page pool; it evicts bases when it runs out of free pages.
          page_size: token slots in a page.
          namespace: what K and V depend on besides the tokens.
          kind: how bases are conditioned; bases of other kinds are never found.
          salt: secret of a tenant.
        """
        self._pool = pool
        self._page_size = page_size
        self._cache = PrefixCache(pool, page_size, namespace, salt, kind=f"base/{kind}")
        self._placed: dict[bytes, tuple[Placed, list[bytes | None]]] = {}

    def open(
        self, context: Int32[np.ndarray, " context"], segments: Sequence[Int32[np.ndarray, " _"]]
    ) -> tuple[LanePlan, list[Placed]]:
        """Takes pages for segments that are computed together, one after the other.

        The first segment begins a new page, so that no segment shares a page with the context.

        Args:
          context: tokens before the segments, at positions from 0.
          segments: the segments in order; none is empty.

        Returns:
          The base's lane, which computes only tokens that no earlier base holds, and each
          segment's place. The lane holds a reference to every page until `close`.

        Raises:
          OutOfPages: the pool cannot allocate the pages; no reference is held then.
        """
        return self.take(self.lay_out(context, segments))

    def lay_out(
        self,
        context: Int32[np.ndarray, " context"],
        segments: Sequence[Int32[np.ndarray, " _"]],
        *,
        before: int = 0,
    ) -> Layout:
        """Lays segments out as `open` does, without taking a page.

        Args:
          context: see `open`.
          segments: see `open`.
          before: number of pages in the round's earlier layouts.
        """
        size, whole = self._page_size, np.concatenate(segments)
        runs = [part[i : i + size] for part in (context, whole) for i in range(0, len(part), size)]
        skip = -(-len(context) // size)
        placed, start = [], 0
        for segment in segments:
            stop = start + len(segment)
            entry = np.arange(start // size, -(-stop // size), dtype=np.int32)
            first = np.maximum(start - entry * size, 0).astype(np.int32)
            last = np.minimum(stop - entry * size, size).astype(np.int32)
            number = np.int32(-1 - before - skip) - entry
            placed.append(Placed(segment, number, first, last - first, len(context) + start))
            start = stop
        blocks = [run.tobytes() for run in runs]
        return Layout(
            token_ids=np.concatenate([context, whole]),
            blocks=blocks,
            keys=list(self._cache.keys(blocks)),
            slots=np.array([len(run) for run in runs], np.int32),
            placed=placed,
            before=before,
        )

    def to_compute(self, layouts: Sequence[Layout]) -> list[int]:
        """Returns the tokens that each lane would compute if `take` took the layouts in order."""
        hits = self._cache.count(layout.keys for layout in layouts)
        return [int(layout.slots[hit:].sum()) for layout, hit in zip(layouts, hits, strict=True)]

    def take(self, layout: Layout) -> tuple[LanePlan, list[Placed]]:
        """Takes the pages of a layout; see `open`."""
        hit = self._cache.match_blocks(layout.blocks)
        page = self._pool.extend(hit, len(layout.blocks) - len(hit))
        self._cache.insert_blocks(layout.blocks, page)
        placed = []
        for place in layout.placed:
            pages = paged(place.page + np.int32(layout.before), page)
            placed.append(dataclasses.replace(place, page=pages))
            keys = [self._cache.held(int(p)) for p in pages]
            self._placed[content_key(place.token_ids)] = (placed[-1], keys)
        zeros, tokens = np.zeros_like(page), layout.token_ids
        computed = np.arange(layout.slots[: len(hit)].sum(), len(tokens), dtype=np.int32)
        lane = LanePlan(tokens, computed, page, zeros, zeros, layout.slots, base=zeros)
        return lane, placed

    def find(self, token_ids: Int32[np.ndarray, " tokens"]) -> Placed | None:
        """Returns a segment's newest place if all its pages are cached, and takes no reference."""
        place, keys = self._placed.get(content_key(token_ids), (None, []))
        if place is None or not self._alive(place, keys):
            return None
        return place if np.array_equal(place.token_ids, token_ids) else None

    def key(self, page: int) -> bytes | None:
        """Returns the key of a page of a place that `find` returned."""
        return self._cache.held(page)

    def close(self, lane: LanePlan, *, failed: bool, left: int = 0) -> None:
        """Releases a base lane's references; its pages can be found again until they are evicted.

        Args:
          lane: a lane that `open` returned.
          failed: whether the round failed. The computed pages may then hold anything, and are not
            found again.
          left: number of leading entries whose pages were released earlier.
        """
        if failed:
            computed, _ = lane.locate(lane.computed, self._page_size)
            self._cache.forget(np.unique(computed // self._page_size))
        self._pool.release(lane.page[left:])
        alive = {key: held for key, held in self._placed.items() if self._alive(*held)}
        self._placed = alive

    def pages(self) -> Int32[np.ndarray, " pages"]:
        """Returns the pages of all segments that can be found."""
        held = [place.page for place, keys in self._placed.values() if self._alive(place, keys)]
        return np.unique(np.concatenate([np.zeros(0, np.int32), *held]))

    def _alive(self, place: Placed, keys: Sequence[bytes | None]) -> bool:
        held = [self._cache.held(int(page)) for page in place.page]
        return None not in held and held == list(keys)

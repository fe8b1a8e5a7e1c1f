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
    """The digest by which equal segments are found: 128 bits over the token ids."""
    return hashlib.blake2b(np.ascontiguousarray(token_ids).tobytes(), digest_size=16).digest()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """Where a segment lies in its base.

    Attributes:
      token_ids: the segment.
      page: pages that hold it, in order; the first and the last may hold other segments too.
      first: its first slot in each page.
      slots: its slots in each page.
      canonical: canonical position of its first token.
    """

    token_ids: Int32[np.ndarray, " tokens"]
    page: Int32[np.ndarray, " entries"]
    first: Int32[np.ndarray, " entries"]
    slots: Int32[np.ndarray, " entries"]
    canonical: int

    def slot(self, page_size: int) -> Int32[np.ndarray, " tokens"]:
        """Slot (page * page_size + offset) of each token."""
        start = np.cumsum(self.slots) - self.slots
        entry = np.repeat(np.arange(len(self.page)), self.slots)
        offset = np.arange(len(self.token_ids)) - start[entry] + self.first[entry]
        return (self.page[entry] * page_size + offset).astype(np.int32)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A base before it has pages: segments that are computed together, one after the other.

    Attributes:
      token_ids: the context and the segments behind it.
      blocks: the content of each page, as bytes.
      keys: the key of each page: pages of several bases that have one key are one.
      slots: slots in use of each page.
      placed: the place of each segment. Its pages are still numbers below 0, counted down:
        -1 - (`before` + the page's index in the base).
      before: pages of the layouts before this one, so that numbers of one round differ.
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
    """Puts pages in place of the numbers of layouts; pages that are known already stay.

    Args:
      number: pages, or numbers below 0.
      page: the pages of all layouts, one after the other.
    """
    known = number.copy()
    known[number < 0] = page[-1 - number[number < 0]]
    return known


class BaseStore:
    """Lays segments into base pages, and remembers them for as long as their pages live.

    A base is a function of its key alone: the namespace, the kind, the salt, the context and the
    token ids before. So the pages of equal bases are found again by the chain of their blocks, and
    no private text of an agent is ever part of one.
    """

    def __init__(
        self, pool: PagePool, page_size: int, namespace: str, *, kind: str, salt: bytes = b""
    ):
        """Starts empty.

        Args:
          pool: the pool of the pages; it evicts bases when it runs short.
          page_size: token slots in a page.
          namespace: what K and V depend on beside the tokens.
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

        The first segment begins a page, so that no segment shares a page with the context.

        Args:
          context: tokens before the segments, at positions from 0.
          segments: the segments in order; none is empty.

        Returns:
          The base's lane, which computes what no earlier base holds, and each segment's place. The
          lane holds a reference to every page until `close`.

        Raises:
          OutOfPages: if the pool cannot give the pages; nothing is held then.
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
          before: pages of the round's layouts before this one.
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
        """Tokens that each lane would compute if these layouts were taken one after the other."""
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
        """The newest place of a segment whose pages are all still held; no reference is taken."""
        place, keys = self._placed.get(content_key(token_ids), (None, []))
        if place is None or not self._alive(place, keys):
            return None
        return place if np.array_equal(place.token_ids, token_ids) else None

    def key(self, page: int) -> bytes | None:
        """The key of a page that a place which was found names."""
        return self._cache.held(page)

    def close(self, lane: LanePlan, *, failed: bool, left: int = 0) -> None:
        """Gives a base lane's references back; its pages stay findable until they are evicted.

        Args:
          lane: a lane of `open`.
          failed: whether its computed pages may hold anything, so that none may be found again.
          left: leading entries whose pages were given back before.
        """
        if failed:
            computed, _ = lane.locate(lane.computed, self._page_size)
            self._cache.forget(np.unique(computed // self._page_size))
        self._pool.release(lane.page[left:])
        alive = {key: held for key, held in self._placed.items() if self._alive(*held)}
        self._placed = alive

    def pages(self) -> Int32[np.ndarray, " pages"]:
        """Pages of all segments that can be found."""
        held = [place.page for place, keys in self._placed.values() if self._alive(place, keys)]
        return np.unique(np.concatenate([np.zeros(0, np.int32), *held]))

    def _alive(self, place: Placed, keys: Sequence[bytes | None]) -> bool:
        held = [self._cache.held(int(page)) for page in place.page]
        return None not in held and held == list(keys)

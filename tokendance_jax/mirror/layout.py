"""The structure of a round at rest: which pages are stored once, and which belong to one mirror.

The structure is derived from the block tables of the round's lanes, without reading K or V.
"""

import dataclasses
from collections.abc import Sequence
from typing import no_type_check

import jax
import numpy as np
from jaxtyping import Bool, Int, Int32

from tokendance_jax.mirror.compression import Compression
from tokendance_jax.mirror.errors import MirrorError
from tokendance_jax.mirror.pages import Array, Quantised
from tokendance_jax.plan.lane import LanePlan


@no_type_check  # JAX also builds pytrees of placeholders that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MirrorTable:
    """The block table of one agent at rest: the entries of its lane, with pages renumbered.

    Attributes:
      token_ids: i32 [prompt]; the tokens of the agent's prompt.
      source: i32 [entries]; number of the page that an entry reads. Base pages come first, then the
        mirror's private pages. -1 if the entry reads a patch page.
      base: i32 [entries]; number of the base page that an entry shows or replaces; -1 if the entry
        is private. Base pages that no entry reads are not stored, and numbered -2, -3, and so on.
      patch_index: i32 [entries]; number of the mirror's patch page that an entry reads, or -1.
      frame: i32 [entries]; logical minus canonical positions.
      first: i32 [entries]; first valid slot.
      slots: i32 [entries]; valid slots, at least one.
    """

    token_ids: Array
    source: Array
    base: Array
    patch_index: Array
    frame: Array
    first: Array
    slots: Array

    @property
    def tokens(self) -> int:
        """Tokens whose K and V the mirror holds."""
        return int(np.asarray(self.slots).sum())

    @property
    def nbytes(self) -> int:
        """Bytes of the columns and the token ids."""
        return sum(column.nbytes for column in jax.tree.leaves(self))

    def tokens_at(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Locates the tokens, in logical order.

        Returns:
          Three arrays i32 [tokens]: the entry of each token, its slot in the page, and its
          canonical position. Positions are not stored, because the tables determine them, for base
          pages too.
        """
        first, slots, frame = (np.asarray(x) for x in (self.first, self.slots, self.frame))
        entry = np.repeat(np.arange(len(slots), dtype=np.int32), slots)
        position = np.arange(len(entry), dtype=np.int32)
        inside = position - (np.cumsum(slots, dtype=np.int32) - slots)[entry]
        return entry, first[entry] + inside, position - frame[entry]

    def base_reads(self, base_pages: int) -> np.ndarray:
        """Returns the base pages that entries read, in the order of the entries.

        Args:
          base_pages: number of stored base pages.
        """
        source = np.asarray(self.source)
        return source[(source >= 0) & (source < base_pages)]

    def pages(self, base: np.ndarray, private: np.ndarray, patch: np.ndarray) -> np.ndarray:
        """Returns each entry's page id, given the ids of base, private and patch pages."""
        behind = len(base) + len(private)
        number = np.where(self.patch_index >= 0, behind + self.patch_index, self.source)
        return np.concatenate([base, private, patch])[number]


@dataclasses.dataclass(frozen=True, slots=True)
class MirrorLayout:
    """The pages that a round's mirrors hold.

    Base pages are the pages that are the `base` of some entry or that several lanes read. A base
    page that is replaced wherever it occurs is not stored, because no lane reads it. All other
    pages belong to the one lane that reads them, in one entry or in several: as a patch page if one
    of these entries names a base, otherwise as a private page. Base pages are numbered by their
    first use in the lanes, private and patch pages by their first use in their own lane, so that
    nothing depends on page ids.

    Attributes:
      base_pages: page id of every base page.
      tables: one table for each lane.
      private_pages: page ids of the private pages of each lane.
      patch_pages: page ids of the patch pages of each lane.
    """

    base_pages: Int32[np.ndarray, " base_pages"]
    tables: tuple[MirrorTable, ...]
    private_pages: tuple[Int32[np.ndarray, " _"], ...]
    patch_pages: tuple[Int32[np.ndarray, " _"], ...]

    @classmethod
    def of_lanes(cls, lanes: Sequence[LanePlan], lengths: Sequence[int]) -> "MirrorLayout":
        """Derives the layout of a round from its lanes.

        Args:
          lanes: the lanes of a round.
          lengths: number of tokens of each lane with written K and V; slots after them are cut off.

        Raises:
          MirrorError: the number of lengths is not that of the lanes, a length is negative or
            exceeds the lane's slots, all lengths are 0, or an entry in use has no page.
        """
        if len(lanes) != len(lengths) or not any(lengths):
            problem = f"{len(lengths)} lengths for {len(lanes)} lanes, {sum(lengths)} tokens in all"
            raise MirrorError("lengths", "number", problem, "name the written tokens of each lane")
        lanes = [cut(lane, length) for lane, length in zip(lanes, lengths, strict=True)]
        if any((lane.page <= 0).any() for lane in lanes):
            problem = "an entry in use has none"
            raise MirrorError("lanes", "page", problem, "encode a round while it holds its pages")

        # The rank of a page among all pages that occur is a small number that can index arrays.
        occurring = [lane.page for lane in lanes] + [lane.base for lane in lanes]
        ids, rank = np.unique(np.concatenate(occurring), return_inverse=True)
        of_page, of_base = np.split(rank, 2)
        entries = [len(lane.page) for lane in lanes]
        lane_of = np.repeat(np.arange(len(lanes)), entries)
        reader = np.full(len(ids), -1)  # any one of the lanes that read the page
        reader[of_page] = lane_of
        several = _marked(of_page[reader[of_page] != lane_of], len(ids))
        named = _marked(of_base, len(ids)) & (ids != 0)
        read = reader >= 0
        own = read & ~several & ~named
        patched = own & _marked(of_page[ids[of_base] != 0], len(ids))
        shared = _by_first_use(of_page, read & ~own)
        absent = _by_first_use(of_base, named & ~read)

        base, patch_index = np.full((2, len(ids)), -1, np.int32)
        base[shared] = np.arange(len(shared))
        base[absent] = -2 - np.arange(len(absent))
        source = base.copy()
        stops = np.cumsum(entries)[:-1]
        tables, private_pages, patch_pages = [], [], []
        for lane, page, shown in zip(
            lanes, np.split(of_page, stops), np.split(of_base, stops), strict=True
        ):
            private, patch = _by_first_use(page, own & ~patched), _by_first_use(page, patched)
            source[private] = len(shared) + np.arange(len(private))
            patch_index[patch] = np.arange(len(patch))
            tables.append(
                MirrorTable(
                    token_ids=lane.token_ids,
                    source=source[page],
                    base=base[shown],
                    patch_index=patch_index[page],
                    frame=lane.frame,
                    first=lane.first,
                    slots=lane.slots,
                )
            )
            private_pages.append(ids[private])
            patch_pages.append(ids[patch])
        return cls(ids[shared], tuple(tables), tuple(private_pages), tuple(patch_pages))

    def pages(self, index: int) -> Int32[np.ndarray, " entries"]:
        """Returns the page ids of one lane's entries."""
        return self.tables[index].pages(
            self.base_pages, self.private_pages[index], self.patch_pages[index]
        )

    def mirror_compression(
        self, *, page_size: int, page_bytes: int, form: Quantised | None = None
    ) -> tuple[Compression, ...]:
        """Computes the size of each mirror by itself.

        Args:
          page_size: slots of a page.
          page_bytes: bytes of a page of the pool, K and V of all layers (`KVSpec.page_bytes`).
          form: how pages are stored; None: exactly as in the pool.
        """
        stored = len(self.base_pages)
        return tuple(
            _compression(
                dense=-(-table.tokens // page_size),
                base=len(np.unique(table.base_reads(stored))),
                patch=len(patch),
                private=len(private),
                index_bytes=table.nbytes,
                page_size=page_size,
                page_bytes=page_bytes,
                form=form,
            )
            for table, private, patch in zip(
                self.tables, self.private_pages, self.patch_pages, strict=True
            )
        )

    def compression(
        self, *, page_size: int, page_bytes: int, form: Quantised | None = None
    ) -> Compression:
        """Computes the size of the whole round. `stored_bytes` equals the mirrors' `nbytes`.

        Args:
          page_size: slots of a page.
          page_bytes: bytes of a page of the pool, K and V of all layers (`KVSpec.page_bytes`).
          form: how pages are stored; None: exactly as in the pool.
        """
        return _compression(
            dense=sum(-(-table.tokens // page_size) for table in self.tables),
            base=len(self.base_pages),
            patch=sum(map(len, self.patch_pages)),
            private=sum(map(len, self.private_pages)),
            index_bytes=sum(table.nbytes for table in self.tables),
            page_size=page_size,
            page_bytes=page_bytes,
            form=form,
        )


def _compression(
    *,
    dense: int,
    base: int,
    patch: int,
    private: int,
    index_bytes: int,
    page_size: int,
    page_bytes: int,
    form: Quantised | None,
) -> Compression:
    """Converts numbers of pages to bytes."""
    stored = page_bytes if form is None else form.page_bytes(page_size)
    return Compression(
        dense_bytes=dense * page_bytes,
        base_bytes=base * stored + (0 if form is None else form.nbytes),
        patch_bytes=patch * stored,
        private_bytes=private * stored,
        index_bytes=index_bytes,
        exact_bytes=(base + patch + private) * page_bytes + index_bytes,
    )


def cut(lane: LanePlan, length: int) -> LanePlan:
    """Returns the lane with its table cut off after the first `length` tokens.

    Raises:
      MirrorError: the length is negative or exceeds the number of slots in the table.
    """
    if not 0 <= length <= lane.slots.sum():
        problem = f"{length} tokens in a lane of {lane.slots.sum()} slots"
        raise MirrorError("lengths", "tokens", problem, "count the tokens with written K and V")
    start = np.cumsum(lane.slots) - lane.slots
    slots = np.minimum(lane.slots, length - start).astype(np.int32)
    used = slots > 0
    columns = {name: getattr(lane, name)[used] for name in ("page", "frame", "first", "base")}
    return dataclasses.replace(lane, slots=slots[used], **columns)


def _marked(numbers: Int[np.ndarray, " some"], count: int) -> Bool[np.ndarray, " count"]:
    """Marks which of the numbers below `count` occur in `numbers`."""
    marked = np.zeros(count, np.bool_)
    marked[numbers] = True
    return marked


def _by_first_use(
    use: Int[np.ndarray, " entries"], chosen: Bool[np.ndarray, " ids"]
) -> Int[np.ndarray, " some"]:
    """Returns the chosen numbers in the order of their first occurrence in `use`."""
    found, first = np.unique(use[chosen[use]], return_index=True)
    return found[np.argsort(first)]

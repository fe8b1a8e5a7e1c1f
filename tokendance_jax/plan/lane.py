"""A lane: the rows that one sequence computes, and the slots that hold its context."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int, Int32


@dataclasses.dataclass(frozen=True, slots=True)
class LanePlan:
    """One sequence of a round: its tokens, the positions to compute, and its block table.

    The table lists the slots of the whole context, room for the answer included, in logical order
    and without gaps. It determines where rows write as well as what they read: a row at logical
    position p writes the slot that the table holds for p.

    Attributes:
      token_ids: the prompt.
      computed: logical positions to compute, ascending; all others are read from their pages.
      page: page of each table entry.
      frame: logical minus canonical positions of each entry.
      first: first valid slot of each entry.
      slots: valid slots of each entry.
      base: the base page that each entry reads or replaces; 0 in private entries. An entry with a
        base page is a patch if `page` is another page.
    """

    token_ids: Int32[np.ndarray, " tokens"]
    computed: Int32[np.ndarray, " computed"]
    page: Int32[np.ndarray, " entries"]
    frame: Int32[np.ndarray, " entries"]
    first: Int32[np.ndarray, " entries"]
    slots: Int32[np.ndarray, " entries"]
    base: Int32[np.ndarray, " entries"]

    @classmethod
    def contiguous(
        cls,
        token_ids: Int32[np.ndarray, " tokens"],
        pages: Int32[np.ndarray, " entries"],
        *,
        computed_from: int,
        page_size: int,
    ) -> "LanePlan":
        """Returns a lane with the given pages in logical order: frame 0, every slot valid."""
        zeros = np.zeros(len(pages), np.int32)
        return cls(
            token_ids=token_ids,
            computed=np.arange(computed_from, len(token_ids), dtype=np.int32),
            page=pages,
            frame=zeros,
            first=zeros,
            slots=np.full(len(pages), page_size, np.int32),
            base=zeros,
        )

    def locate(
        self, position: Int32[np.ndarray, "*shape"], page_size: int
    ) -> tuple[Int32[np.ndarray, "*shape"], Int32[np.ndarray, "*shape"]]:
        """Returns each position's slot (page * page_size + offset) and canonical position."""
        entry, offset, canonical = self.entry_of(position)
        return (self.page[entry] * page_size + offset).astype(np.int32), canonical

    def entry_of(self, position: Int32[np.ndarray, "*shape"] | int) -> tuple[Any, Any, Any]:
        """Returns each position's entry, its slot in the entry's page, and canonical position."""
        stop = np.cumsum(self.slots)
        entry = np.searchsorted(stop, position, side="right")
        start = stop[entry] - self.slots[entry]
        offset = self.first[entry] + position - start
        return entry, offset, (position - self.frame[entry]).astype(np.int32)

    def room(self, page_size: int) -> int:
        """Returns how many tokens the lane can hold, if all of its last page is used."""
        return int(self.slots[:-1].sum() + page_size - self.first[-1])

    def cut(self, entries: int) -> "LanePlan":
        """Returns the same lane with the first `entries` entries of its table."""
        names = ("page", "frame", "first", "slots", "base")
        kept = {name: getattr(self, name)[:entries] for name in names}
        return dataclasses.replace(self, **kept)

    def extended(
        self, pages: Int32[np.ndarray, " more"], page_size: int, *, first: int | None = None
    ) -> "LanePlan":
        """Returns the lane with further pages of its own at the end, in frame 0.

        Args:
          pages: the pages.
          page_size: token slots in a page.
          first: first slot to use in the first of them; None: slot 0, and the page of the last
            entry, which must be the lane's own, is used to its end as well.
        """
        slots = self.slots.copy()
        if first is None:
            slots[-1] = page_size - self.first[-1]
        zeros = np.zeros_like(pages)
        firsts = zeros.copy()
        firsts[:1] = first or 0
        more = (pages, zeros, firsts, page_size - firsts, zeros)
        columns = (self.page, self.frame, self.first, slots, self.base)
        joined = [np.concatenate(pair) for pair in zip(columns, more, strict=True)]
        page, frame, first_slot, slots, base = joined
        return dataclasses.replace(
            self, page=page, frame=frame, first=first_slot, slots=slots, base=base
        )

    def entries(self) -> Int32[np.ndarray, "5 entries"]:
        """Returns rows page, frame, first, slots, start (logical position of the first slot)."""
        start = (np.cumsum(self.slots) - self.slots).astype(np.int32)
        return np.stack([self.page, self.frame, self.first, self.slots, start])

    def table(self, block_entries: int) -> Int32[np.ndarray, "5 padded_entries"]:
        """Returns the entries in key blocks of one frame each.

        Args:
          block_entries: entries of a key block.

        Returns:
          i32 [5, entries], where the number of entries is a multiple of `block_entries`. Empty
          entries pad a block where the frame changes, and at the end.
        """
        column = key_block_columns(np.zeros_like(self.page), self.frame, block_entries)
        size = -(-(int(column.max(initial=-1)) + 1) // block_entries) * block_entries
        return fill_key_blocks(self.entries(), column, size, block_entries)


def key_block_columns(
    owner: Int[np.ndarray, " entries"], frame: Int[np.ndarray, " entries"], block_entries: int
) -> Int[np.ndarray, " entries"]:
    """Returns each entry's column in its owner's table; a new frame begins a new key block.

    Args:
      owner: number of the table that each entry belongs to, ascending.
      frame: frame of each entry.
      block_entries: entries of a key block.
    """
    fresh = np.ones(len(owner), np.bool_)
    fresh[1:] = (np.diff(owner) != 0) | (np.diff(frame) != 0)
    begin = np.flatnonzero(fresh)
    length = np.diff(begin, append=len(owner))
    padded = -(-length // block_entries) * block_entries
    column = np.arange(len(owner)) + np.repeat(np.cumsum(padded) - padded - begin, length)
    return column - column[np.searchsorted(owner, owner)]


def fill_key_blocks(
    entries: Int[np.ndarray, "5 entries"],
    column: Int[np.ndarray, " entries"],
    size: int,
    block_entries: int,
) -> Int32[np.ndarray, "5 size"]:
    """Writes entries, as `LanePlan.entries` returns them, into columns of a new table.

    An empty entry has the frame of its key block and is 0 otherwise.
    """
    table = np.zeros((5, size), np.int32)
    table[1].reshape(-1, block_entries)[column // block_entries] = entries[1, :, None]
    table[:, column] = entries
    return table


def with_rows(lane: LanePlan, positions: Int[np.ndarray, " computed"]) -> LanePlan:
    """Returns the same lane with other positions to compute."""
    return dataclasses.replace(lane, computed=positions.astype(np.int32))

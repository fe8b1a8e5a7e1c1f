"""A lane: what one sequence computes, and where its context lies."""

import dataclasses

import numpy as np
from jaxtyping import Int, Int32


@dataclasses.dataclass(frozen=True, slots=True)
class LanePlan:
    """One sequence of a round: its tokens, the positions to compute, and its block table.

    The table lists the slots of the whole context in logical order without gaps, room for the
    answer included. It says where rows write as well as what they read: a row at logical position
    p writes the slot that the table holds for p.

    Attributes:
      token_ids: the prompt.
      computed: logical positions to compute, ascending; all others are read from their pages.
      page: page of each table entry.
      frame: logical minus canonical positions of each entry.
      first: first valid slot of each entry.
      slots: valid slots of each entry.
      base: the base page that each entry shows or replaces; 0 where it is private. An entry is a
        patch where its page is another one.
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
        """A lane whose pages are its own positions in order: frame 0, every slot valid."""
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
        """Finds the slot (page * page_size + offset) and the canonical position of positions."""
        stop = np.cumsum(self.slots)
        entry = np.searchsorted(stop, position, side="right")
        start = stop[entry] - self.slots[entry]
        slot = self.page[entry] * page_size + self.first[entry] + position - start
        return slot.astype(np.int32), (position - self.frame[entry]).astype(np.int32)

    def entries(self) -> Int32[np.ndarray, "5 entries"]:
        """The table as rows page, frame, first, slots, start: logical position of the first."""
        start = (np.cumsum(self.slots) - self.slots).astype(np.int32)
        return np.stack([self.page, self.frame, self.first, self.slots, start])

    def table(self, block_entries: int) -> Int32[np.ndarray, "5 padded_entries"]:
        """The entries with one frame to a key block.

        Args:
          block_entries: entries of a key block.

        Returns:
          i32 [5, entries], a multiple of `block_entries` long; empty entries fill up a block where
          the frame changes and at the end.
        """
        column = key_block_columns(np.zeros_like(self.page), self.frame, block_entries)
        size = -(-(int(column.max(initial=-1)) + 1) // block_entries) * block_entries
        return fill_key_blocks(self.entries(), column, size, block_entries)


def key_block_columns(
    owner: Int[np.ndarray, " entries"], frame: Int[np.ndarray, " entries"], block_entries: int
) -> Int[np.ndarray, " entries"]:
    """Column of each entry in its owner's table: a new key block where the frame changes.

    Args:
      owner: whose table each entry is of; entries of one owner stand together.
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
    """Puts entries of `LanePlan.entries` into columns of a table of this size.

    An empty entry has the frame of its key block, and is zero but for that.
    """
    table = np.zeros((5, size), np.int32)
    table[1].reshape(-1, block_entries)[column // block_entries] = entries[1, :, None]
    table[:, column] = entries
    return table


def with_rows(lane: LanePlan, positions: Int[np.ndarray, " computed"]) -> LanePlan:
    """The same lane, with other positions to compute."""
    return dataclasses.replace(lane, computed=positions.astype(np.int32))

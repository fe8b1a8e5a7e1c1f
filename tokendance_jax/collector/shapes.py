"""The static shapes that programs are compiled for."""

import dataclasses

from tokendance_jax.collector.buckets import Buckets
from tokendance_jax.kernels.flash import block_pages


@dataclasses.dataclass(frozen=True, slots=True)
class Shapes:
    """The static shapes that programs are compiled for.

    Attributes:
      rows: buckets of rows computed in one call; a round above the budget takes several calls.
      lanes: buckets of lanes.
      entries: buckets of table entries, each a multiple of a key block.
      pages: pages of the pool.
      page_size: token slots in a page.
      packed_rows: rows of a lane that the kernel attends to at a time, where plans say which rows
        of many lanes are packed; 0: they pack none.
    """

    rows: Buckets
    lanes: Buckets
    entries: Buckets
    pages: int
    page_size: int
    packed_rows: int = 0

    @classmethod
    def of(
        cls,
        *,
        row_budget: int,
        max_lanes: int,
        max_tokens: int,
        pages: int,
        page_size: int,
        packed_rows: int = 0,
    ) -> "Shapes":
        """Buckets up to the given budgets, for contexts of at most `max_tokens`."""
        block = block_pages(page_size)
        most = cls.entries_of(max_tokens, page_size)
        return cls(
            rows=Buckets(min(64, row_budget), row_budget),
            # Four lanes decode in the time of one: one-row bfloat16 products are slow on CPU.
            lanes=Buckets(min(4, max_lanes), max_lanes),
            entries=Buckets(min(4 * block, most), most),
            pages=pages,
            page_size=page_size,
            packed_rows=packed_rows,
        )

    @staticmethod
    def entries_of(tokens: int, page_size: int) -> int:
        """Table entries that hold so many tokens in one frame: whole key blocks."""
        block = block_pages(page_size)
        return -(-tokens // (block * page_size)) * block

    @property
    def no_slot(self) -> int:
        """The write slot of rows that write nothing: past the pool."""
        return self.pages * self.page_size

"""The static shapes that programs are compiled for."""

import dataclasses

from tokendance_jax.kernels.lanes import SHARED_TILE_ROWS, TILE_ROWS, block_pages
from tokendance_jax.plan.buckets import Buckets


@dataclasses.dataclass(frozen=True, slots=True)
class Packing:
    """How plans pack the rows at the ends of lanes, so that they read shared pages together.

    Attributes:
      visit: rows of one lane that read a key block at a time if they are not packed.
      tile: packed rows that read a key block at a time; they take as long as `tile` / `visit`
        visits.
      most: most rows at the end of a lane that are packed; longer ends are not.
      least: plans of fewer rows do not pack any.
    """

    visit: int
    tile: int
    most: int
    least: int = 0


# By platform (GPUs have two names). The values for CPUs were tuned on a CPU, where XLA code takes
# long for a tile, however small. The other values are the tiles of the platform's kernels: on a
# GPU, those for up to 8 query heads per KV head; on a TPU, the smallest ones.
PACKING = {
    "cpu": Packing(TILE_ROWS, SHARED_TILE_ROWS, most=2 * TILE_ROWS, least=SHARED_TILE_ROWS),
    "gpu": Packing(visit=8, tile=8, most=64),
    "cuda": Packing(visit=8, tile=8, most=64),
    "tpu": Packing(visit=32, tile=32, most=64),
}


# Key blocks of a table beyond those that a whole context fills in one frame. A prompt has three
# parts that each can leave their last key block partly empty: private text, shared text, and the
# task with room for an answer up to the end of the context.
SPARE_BLOCKS = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Shapes:
    """The static shapes that programs are compiled for.

    Attributes:
      rows: buckets of rows computed in one call; a round above the budget takes several calls.
      lanes: buckets of lanes.
      entries: buckets of table entries, each a multiple of a key block.
      pages: pages of the pool.
      page_size: token slots in a page.
      packing: how plans pack rows of many lanes; None: they do not.
    """

    rows: Buckets
    lanes: Buckets
    entries: Buckets
    pages: int
    page_size: int
    packing: Packing | None = None

    @classmethod
    def of(
        cls,
        *,
        row_budget: int,
        max_lanes: int,
        max_tokens: int,
        pages: int,
        page_size: int,
        packing: Packing | None = None,
    ) -> "Shapes":
        """Returns shapes with buckets up to the given budgets and contexts up to `max_tokens`."""
        block = block_pages(page_size)
        most = cls.most_entries(max_tokens, page_size)
        return cls(
            rows=Buckets(min(64, row_budget), row_budget),
            # Tuned on a CPU: four lanes decode in the time of one, because products of a single
            # bfloat16 row are slow there.
            lanes=Buckets(min(4, max_lanes), max_lanes),
            entries=Buckets(min(4 * block, most), most),
            pages=pages,
            page_size=page_size,
            packing=packing,
        )

    @staticmethod
    def entries_of(tokens: int, page_size: int) -> int:
        """Returns how many table entries, in whole key blocks, `tokens` need in one frame."""
        block = block_pages(page_size)
        return -(-tokens // (block * page_size)) * block

    @staticmethod
    def most_entries(max_tokens: int, page_size: int) -> int:
        """Returns the largest bucket of table entries for contexts of at most `max_tokens`."""
        entries = Shapes.entries_of(max_tokens, page_size)
        return entries + SPARE_BLOCKS * block_pages(page_size)

    def packing_of(self, rows: int) -> Packing | None:
        """Returns how a plan of so many rows packs them; None if it packs none."""
        return self.packing if self.packing and rows >= self.packing.least else None

    @property
    def no_slot(self) -> int:
        """The write slot of rows that write nothing; it lies past the pool."""
        return self.pages * self.page_size

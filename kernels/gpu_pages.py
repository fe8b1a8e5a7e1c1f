"""What the Mosaic GPU kernels that turn keys share: a block of threads takes one part of a page."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tokendance_jax.kernels import rope
from tokendance_jax.kernels.lanes import Array

# Threads of a block: a tile of registers has a multiple of as many numbers.
THREADS = 128
# Numbers of one half of the heads that a block has in registers at a time.
CHUNK = 1024
# Bytes of keys of one part of a page. A restore has a part's keys, its values, two stages of
# rotated keys and the tables of angles in shared memory: five blocks then fit an H100's 227 KiB,
# and three of those that restore pages at rest, which take float32 keys and another copy of the
# values. A page diff has two parts and two siblings ahead: three blocks fit.
PART_BYTES = 8 * 1024

PARAMETERS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    # Angles lie in [-pi, pi), where the fast sine and cosine are good to 2^-20.
    approx_math=True,
)

Ref = Any
Pair = tuple[jax.Array, jax.Array]


def part_slots(page_size: int, slot_bytes: int) -> int:
    """Slots of a page that one block takes: a divisor of the page's slots.

    Args:
      page_size: slots of a page.
      slot_bytes: bytes of one slot's keys in the pool.
    """
    slots = page_size
    while slots % 2 == 0 and slots * slot_bytes > PART_BYTES:
        slots //= 2
    return slots


@dataclasses.dataclass(frozen=True)
class PageParts:
    """How pages are cut. A row is one head of one slot; pools are arrays [rows, head_dim].

    Attributes:
      layers: layers of a pool.
      page_size: slots of a page.
      slots: slots of a part.
      kv_heads: rows of a slot.
      head_dim: numbers of a row.
    """

    layers: int
    page_size: int
    slots: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, pool: jax.Array) -> "PageParts":
        """The parts of a pool's pages.

        Raises:
          NotImplementedError: the kernels do not take such pages.
        """
        layers, _, page_size, kv_heads, head_dim = pool.shape
        slots = part_slots(page_size, kv_heads * head_dim * pool.dtype.itemsize)
        parts = cls(layers, page_size, slots, kv_heads, head_dim)
        tiled = parts.rows % parts.chunk == 0 and parts.chunk * parts.half % THREADS == 0
        if head_dim not in (64, 128) or parts.rows > 256 or not tiled:
            raise NotImplementedError(
                f"pages of {page_size} slots with {kv_heads} heads of {head_dim}: the kernel takes "
                f"heads of 64 or 128 and parts of {parts.chunk} to 256 rows"
            )
        return parts

    @property
    def of_page(self) -> int:
        """Parts of a page."""
        return self.page_size // self.slots

    @property
    def rows(self) -> int:
        """Rows of a part."""
        return self.slots * self.kv_heads

    @property
    def half(self) -> int:
        """The width of a half head: the rotary embedding pairs its numbers with the other half."""
        return self.head_dim // 2

    @property
    def chunk(self) -> int:
        """Rows that are in registers at a time."""
        return min(self.rows, CHUNK // self.half)

    def flat(self, pool: Array) -> jax.Array:
        """Pages of all layers as [rows, head_dim]."""
        return jnp.asarray(pool).reshape(-1, self.head_dim)

    def mesh(self, pages: int) -> plgpu.Mesh:
        """A block for each part of so many pages in each layer."""
        grid = pages, self.of_page, self.layers
        return plgpu.Mesh(grid=grid, grid_names=("page", "part", "layer"))

    def first_row(
        self, flat: Ref, layer: jax.Array, page: jax.Array | int, part: jax.Array
    ) -> jax.Array:
        """Where a part begins in pages of all layers, [rows, head_dim]."""
        slot = page * self.page_size + part * self.slots
        return layer * (flat.shape[0] // self.layers) + slot * self.kv_heads

    def turn_tables(self, theta: float) -> jax.Array:
        """`rope.turn_tables` for each row of a chunk, i32 [3, chunk, half]."""
        tables = rope.turn_tables(theta, self.head_dim)
        return jnp.asarray(np.broadcast_to(tables[:, None], (3, self.chunk, self.half)))

    def halves(self, of: Ref, rows: Any) -> Pair:
        """Both halves of some rows, f32 [rows, half]."""
        first, second = (of[rows, pl.ds(start, self.half)] for start in (0, self.half))
        return first.astype(jnp.float32), second.astype(jnp.float32)


def rotation(tables: Ref, position: jax.Array) -> Pair:
    """Cosines and sines f32 [chunk, half] of positions, i32 [] or as many."""
    angle = rope.angles(position, *(tables[index] for index in range(3)))
    return jnp.cos(angle), jnp.sin(angle)


def rotate(halves: Pair, turn: Pair) -> Pair:
    """Both halves of rows, rotated by cosines and sines."""
    (first, second), (cos, sin) = halves, turn
    return first * cos - second * sin, second * cos + first * sin

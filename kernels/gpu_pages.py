"""Shared code of the Mosaic GPU kernels that rotate keys.

A thread block works on one part of a page.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tokendance_jax.kernels import storage
from tokendance_jax.kernels.lanes import Array
from tokendance_jax.kernels.rope import Rope, angles

# Threads per block. A tile in registers must have a multiple of this many numbers.
THREADS = 128
# How many numbers of one half of the heads a block holds in registers at a time.
CHUNK = 1024
# Bytes of keys in one part of a page. A restore holds a part's keys and values, two stages of
# rotated keys and the tables of angles in shared memory: five blocks then fit an H100's 227 KiB.
# Restoring pages at rest also needs float32 keys and another copy of the values: three blocks fit.
# A page diff holds the keys and values of a base page's part and of two siblings: three blocks fit.
PART_BYTES = 8 * 1024

PARAMETERS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    # Angles are in [-pi, pi), where the fast sine and cosine are accurate to 2^-20.
    approx_math=True,
)

Ref = Any
Pair = tuple[jax.Array, jax.Array]


def part_slots(page_size: int, slot_bytes: int) -> int:
    """Returns how many slots of a page one block works on, a divisor of `page_size`.

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
    """How pages are divided into parts, for pools viewed as [rows, head_dim].

    A row is one head of one slot.

    Attributes:
      layers: layers of a pool.
      page_size: slots of a page.
      slots: slots of a part.
      kv_heads: rows of a slot.
      head_dim: width of a row.
    """

    layers: int
    page_size: int
    slots: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, pool: jax.Array) -> "PageParts":
        """Returns the parts of a pool's pages.

        Raises:
          NotImplementedError: the kernels do not support pages of this shape or dtype.
        """
        layers, _, page_size, kv_heads, head_dim = pool.shape
        storage.check_numbers(pool)
        slots = part_slots(page_size, kv_heads * head_dim * pool.dtype.itemsize)
        parts = cls(layers, page_size, slots, kv_heads, head_dim)
        tiled = parts.rows % parts.chunk == 0 and parts.chunk * parts.half % THREADS == 0
        if head_dim not in (64, 128) or parts.rows > 256 or not tiled:
            raise NotImplementedError(
                f"pages of {page_size} slots with {kv_heads} heads of {head_dim}: the kernel "
                f"supports heads of 64 or 128 and parts of {parts.chunk} to 256 rows"
            )
        return parts

    @property
    def of_page(self) -> int:
        """How many parts a page has."""
        return self.page_size // self.slots

    @property
    def rows(self) -> int:
        """How many rows a part has."""
        return self.slots * self.kv_heads

    @property
    def half(self) -> int:
        """Half the width of a head. The rotary embedding pairs numbers of the two halves."""
        return self.head_dim // 2

    @property
    def chunk(self) -> int:
        """How many rows are in registers at a time."""
        return min(self.rows, CHUNK // self.half)

    def flat(self, pool: Array) -> jax.Array:
        """Returns the pages of all layers as [rows, head_dim]."""
        return jnp.asarray(pool).reshape(-1, self.head_dim)

    def mesh(self, pages: int) -> plgpu.Mesh:
        """Returns a grid with one block per layer, page and part of a page, for `pages` pages."""
        grid = pages, self.of_page, self.layers
        return plgpu.Mesh(grid=grid, grid_names=("page", "part", "layer"))

    def first_row(
        self, flat: Ref, layer: jax.Array, page: jax.Array | int, part: jax.Array
    ) -> jax.Array:
        """Returns the first row of a part in `flat`, the pages of all layers [rows, head_dim]."""
        slot = page * self.page_size + part * self.slots
        return layer * (flat.shape[0] // self.layers) + slot * self.kv_heads

    def turn_tables(self, rope: Rope) -> jax.Array:
        """Returns `rope.turn_tables`, repeated for each row of a chunk, i32 [3, chunk, half]."""
        tables = rope.turn_tables(self.head_dim)
        return jnp.asarray(np.broadcast_to(tables[:, None], (3, self.chunk, self.half)))

    def halves(self, of: Ref, rows: Any) -> Pair:
        """Returns both halves of the given rows, each f32 [rows, half]."""
        first, second = (of[rows, pl.ds(start, self.half)] for start in (0, self.half))
        return first.astype(jnp.float32), second.astype(jnp.float32)


def rotation(tables: Ref, position: jax.Array) -> Pair:
    """Returns the cosines and sines, f32 [chunk, half], of positions, i32 [] or [chunk, half]."""
    angle = angles(position, *(tables[index] for index in range(3)))
    return jnp.cos(angle), jnp.sin(angle)


def rotate(halves: Pair, turn: Pair) -> Pair:
    """Rotates both halves of rows by cosines and sines."""
    (first, second), (cos, sin) = halves, turn
    return first * cos - second * sin, second * cos + first * sin

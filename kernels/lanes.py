"""The arrays of one call: its rows, and the block tables by which attention finds their pages.

A lane is one sequence of rows of the round's ragged batch. Its table lists, in logical order, the
slots that hold the lane's context. An entry names a page, the frame (logical minus canonical
positions of that page), the first valid slot, the number of valid slots, and the logical position
of the first of them.

Entries are grouped into key blocks of `KEY_BLOCK` slots, and the entries of one block share one
frame, so that a query is rotated once per block. Where the frame changes, code that writes a table
must fill up the block with empty entries (page 0, no slots).

A group is a set of lanes that hold the same entries. These entries may be in group tables instead
of the lanes' own tables: in key blocks that all lanes of the group read at once, each lane with its
own frame.
"""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np

# NumPy arrays when the host plans a call, JAX arrays when the device reads them.
Array = jax.Array | np.ndarray

# Slots per key block, on every platform. Tuned on a CPU: 256 keys against a tile of 128 rows keep
# XLA's products near their peak while scores and values stay in the L2 cache.
KEY_BLOCK = 256
# Rows per tile of prefill attention, on every platform. Tuned on a CPU, with `KEY_BLOCK`.
TILE_ROWS = 128
# Packed rows per tile in the XLA code. Tuned on a CPU: with twice the rows of `TILE_ROWS`, a key
# block takes less than twice the time, and tiles of packed rows need not end where a lane ends.
SHARED_TILE_ROWS = 256


def block_pages(page_size: int) -> int:
    """Entries of a key block."""
    return max(1, KEY_BLOCK // page_size)


@no_type_check  # JAX also builds these pytrees with leaves that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The tokens that a forward pass computes.

    Attributes:
      token: i32 [rows]; token ids.
      position: i32 [rows]; logical positions, at which queries are rotated.
      canonical: i32 [rows]; canonical positions, at which keys are rotated.
      slot: i32 [rows]; page * page_size + offset; past the pool for rows that are not written.
    """

    token: Array
    position: Array
    canonical: Array
    slot: Array


@no_type_check  # JAX also builds these pytrees with leaves that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LaneTables:
    """Block tables of all lanes.

    Attributes:
      page: i32 [lanes, entries]; 0 in unused entries.
      frame: i32 [lanes, entries]; equal within a key block.
      first: i32 [lanes, entries]; first valid slot.
      slots: i32 [lanes, entries]; valid slots, 0 in unused entries.
      start: i32 [lanes, entries]; logical position of the first valid slot; ascending among the
        entries in use.
    """

    page: Array
    frame: Array
    first: Array
    slots: Array
    start: Array

    def slot_positions(self, page_size: int) -> jax.Array:
        """Returns the logical position of every slot; int32's maximum if the slot is not valid.

        Returns:
          i32 [lanes, entries, page_size].
        """
        offset = jnp.arange(page_size, dtype=jnp.int32)[None, None, :]
        inside = offset - self.first[:, :, None]
        valid = (inside >= 0) & (inside < self.slots[:, :, None])
        return jnp.where(valid, self.start[:, :, None] + inside, jnp.iinfo(jnp.int32).max)


@no_type_check  # JAX also builds these pytrees with leaves that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupTables:
    """Key blocks that several lanes read, in addition to the blocks of their own tables.

    A lane sees all valid slots of the entries that it holds. The tables must therefore contain
    only slots before the positions of all rows that will read them.

    Attributes:
      page: i32 [blocks, block_entries]; 0 in unused entries.
      first: i32 [blocks, block_entries]; first valid slot.
      slots: i32 [blocks, block_entries]; valid slots, 0 in unused entries.
      frame: i32 [blocks, lanes]; frame of a block's entries in each lane; undefined if the lane
        holds none of them.
      member: bool [blocks, lanes, block_entries]; whether the lane holds the entry.
      count: i32 []; number of blocks in use, which come first.
    """

    page: Array
    first: Array
    slots: Array
    frame: Array
    member: Array
    count: Array

    def valid(self, page_size: int) -> jax.Array:
        """Returns whether each slot is valid in its entry.

        Returns:
          bool [blocks, block_entries, page_size].
        """
        offset = jnp.arange(page_size, dtype=jnp.int32)[None, None, :]
        inside = offset - self.first[:, :, None]
        return (inside >= 0) & (inside < self.slots[:, :, None])


@no_type_check  # JAX also builds these pytrees with leaves that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowTiles:
    """Rows grouped into tiles of one lane each.

    Attributes:
      row: i32 [tiles, TILE_ROWS]; places without a row hold the number of rows.
      lane: i32 [tiles].
      count: i32 []; number of tiles in use.
    """

    row: Array
    lane: Array
    count: Array


@no_type_check  # JAX also builds these pytrees with leaves that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedRows:
    """Packed rows: rows of many lanes that together read what several of these lanes hold.

    Attributes:
      row: i32 [shared rows]; the packed rows of all lanes end to end; unused places after them
        hold the number of rows.
      lane: i32 [shared rows]; the lane of each packed row, as `groups` numbers lanes.
      groups: the key blocks that these lanes share, all before their packed rows.
      tables: tables of [2 * lanes] lanes: first the lanes' whole tables, then their tables without
        the shared entries, for packed rows.
      tiles: all rows of the call, grouped by lane; packed rows use the lanes of the second half.
    """

    row: Array
    lane: Array
    groups: GroupTables
    tables: LaneTables
    tiles: RowTiles

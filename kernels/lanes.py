"""The arrays of one call: its rows, and the tables by which attention reads pages for them.

A lane is one sequence of rows of the round's ragged batch. Its table lists, in logical order, the
slots that hold the lane's context. An entry names a page, the frame (logical minus canonical
positions of that page), the first valid slot, the number of valid slots, and the logical position
of the first of them.

Entries are grouped into key blocks of `KEY_BLOCK` slots, and the entries of one block share one
frame, so that a query is rotated once per block. Whoever writes a table fills up a block with empty
entries (page 0, no slots) where the frame changes.

A group is a set of lanes that hold the same entries. Its entries may stand in group tables in place
of the lanes' own: key blocks that all members read at once, each under its own frame.
"""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np

# Planned on the host, read on the device.
Array = jax.Array | np.ndarray

# Slots per key block, on every platform. Tuned on a CPU: 256 keys against a tile of 128 rows keep
# XLA's products near their peak while scores and values stay in the L2 cache.
KEY_BLOCK = 256
# Rows per tile of prefill attention, on every platform. Tuned on a CPU, with `KEY_BLOCK`.
TILE_ROWS = 128
# Rows of many lanes in a tile of XLA code. Tuned on a CPU: twice the rows of `TILE_ROWS` meet a key
# block in less than twice the time, and these rows need not end where a lane ends.
SHARED_TILE_ROWS = 256


def block_pages(page_size: int) -> int:
    """Entries of a key block."""
    return max(1, KEY_BLOCK // page_size)


@no_type_check  # JAX also builds pytrees of stand-ins that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The tokens that a forward pass computes.

    Attributes:
      token: i32 [rows]; token ids.
      position: i32 [rows]; logical positions, at which queries are rotated.
      canonical: i32 [rows]; canonical positions, at which keys are rotated.
      slot: i32 [rows]; page * page_size + offset; past the pool where nothing is to be written.
    """

    token: Array
    position: Array
    canonical: Array
    slot: Array


@no_type_check  # JAX also builds pytrees of stand-ins that are no arrays
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
        """Logical position of every slot, and int32's maximum where the slot is not valid.

        Returns:
          i32 [lanes, entries, page_size].
        """
        offset = jnp.arange(page_size, dtype=jnp.int32)[None, None, :]
        inside = offset - self.first[:, :, None]
        valid = (inside >= 0) & (inside < self.slots[:, :, None])
        return jnp.where(valid, self.start[:, :, None] + inside, jnp.iinfo(jnp.int32).max)


@no_type_check  # JAX also builds pytrees of stand-ins that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupTables:
    """Key blocks that several lanes read, beside what their own tables hold.

    A lane sees all valid slots of the entries that it holds: whoever writes these tables puts into
    them only slots that lie before the positions of the rows that will read them.

    Attributes:
      page: i32 [blocks, block_entries]; 0 in unused entries.
      first: i32 [blocks, block_entries]; first valid slot.
      slots: i32 [blocks, block_entries]; valid slots, 0 in unused entries.
      frame: i32 [blocks, lanes]; frame of a block's entries in each lane, anything where the lane
        holds none of them.
      member: bool [blocks, lanes, block_entries]; whether the lane holds the entry.
      count: i32 []; blocks in use, which stand first.
    """

    page: Array
    first: Array
    slots: Array
    frame: Array
    member: Array
    count: Array

    def valid(self, page_size: int) -> jax.Array:
        """Whether a slot belongs to its entry.

        Returns:
          bool [blocks, block_entries, page_size].
        """
        offset = jnp.arange(page_size, dtype=jnp.int32)[None, None, :]
        inside = offset - self.first[:, :, None]
        return (inside >= 0) & (inside < self.slots[:, :, None])


@no_type_check  # JAX also builds pytrees of stand-ins that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowTiles:
    """Rows grouped into tiles of one lane each.

    Attributes:
      row: i32 [tiles, TILE_ROWS]; the number of rows where a tile is not full.
      lane: i32 [tiles].
      count: i32 []; tiles in use.
    """

    row: Array
    lane: Array
    count: Array


@no_type_check  # JAX also builds pytrees of stand-ins that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedRows:
    """Rows of many lanes that meet together what several of their lanes hold.

    Attributes:
      row: i32 [shared rows]; rows of the lanes end to end, and the number of rows behind the last.
      lane: i32 [shared rows]; their lanes in the groups.
      groups: what these lanes share, all of it behind all of their rows.
      tables: of [2 * lanes] lanes: the whole tables, and what is left of them for these rows.
      tiles: all rows, grouped by lane: these by those of the second half.
    """

    row: Array
    lane: Array
    groups: GroupTables
    tables: LaneTables
    tiles: RowTiles

"""The work of the TPU kernel of round attention: tiles, and the key blocks that each tile reads.

A stretch is a list of key blocks that neighbouring rows of a tile read one after the other. A tile
of one lane has a single stretch: the lane's blocks. A tile of packed rows begins with a stretch of
the groups' blocks, which all its rows read, each in its lane's frame. One stretch per lane follows,
in which the lane's rows read the blocks that remain in the lane's own table.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tokendance_jax.kernels import flash
from tokendance_jax.kernels.lanes import GroupTables, LaneTables, RowTiles, SharedRows, block_pages

# Sizes of windows smaller than a tile, in rows: a lane often has few rows after its full tiles.
SMALL_TILES = (32, 64)
# Windows begin at multiples of this: the rows of a tile of bfloat16 numbers in VMEM.
WINDOW = 16
# Bits of a word; each bit says whether a row sees one entry of a block.
WORD = 32
# The logical position at which entries of groups start: in front of all rows.
IN_FRONT = -(1 << 20)

Arrays = dict[str, jax.Array]


def window_sizes(tile_rows: int) -> tuple[int, ...]:
    """Sizes of windows: numbers of rows that can read a block together, ascending."""
    return (*(size for size in SMALL_TILES if size < tile_rows), tile_rows)


def stretches(
    layer: int | jax.Array,
    position: jax.Array,
    tables: LaneTables,
    tiles: RowTiles,
    shared: SharedRows | None,
    page_size: int,
) -> tuple[Arrays, Arrays]:
    """Prepares tables and tiles. All but the layer's index is the same computation in all layers.

    Args:
      layer: index of the layer.
      position: i32 [rows].
      tables: block tables of all lanes.
      tiles: the rows, grouped by lane.
      shared: the packed rows; if given, its tables and tiles replace `tables` and `tiles`.
      page_size: slots of a page.

    Returns:
      Flat columns of numbers for SMEM, and arrays. The columns are:

      For the call: the layer, and the numbers of tiles and stretches in use.
      For each tile: its rows, their number, and its first stretch.
      For each stretch: its first block; the number of its blocks, at least one, so that the copies
      of the next stretch can start during the last block; the number of blocks of all stretches
      before it; the places `from` and `to` of its rows in the tile, and the last position of these
      rows; size and offset of a window of the tile that contains these rows; its first reading, or
      -1.
      For each block, those of lanes before those of groups: the frame, and whether it differs from
      the frame of the block before.
      For each entry: page, first slot, number of slots, and position of the first slot.

      The arrays are the positions of slots i32 [blocks, 1, slots]; the positions of rows i32
      [tiles, tile_rows], -1 in places without a row; and, if rows are packed, readings i32
      [readings, 1 + words, tile_rows]. A reading says how a tile's packed rows read a block of
      groups: the block's frame in each row's lane, and the bits of the entries that each row sees.
    """
    if shared is not None:
        tables, tiles = shared.tables, shared.tiles
    position, (most, tile_rows) = jnp.asarray(position), tiles.row.shape
    of_blocks = _lane_blocks(tables, page_size)
    block_start = of_blocks["slot_position"].min(axis=(1, 2)).reshape(tables.page.shape[0], -1)
    of_tiles, found = _single(tiles, position, block_start, packed=shared is not None)
    arrays = {}
    if shared is not None:
        packed_tiles, packed = _packed(shared, position, block_start, tile_rows)
        arrays["reading"] = _readings(shared.groups, packed_tiles.pop("lane"))
        of_tiles, found = _joined(of_tiles, packed_tiles), _joined(found, packed)
        of_blocks = _joined(of_blocks, _group_blocks(shared.groups, page_size))
        # Each packed tile adds a stretch for groups, each lane adds one, and each tile that
        # continues a lane adds one more.
        most += 2 * len(packed_tiles["row"]) + shared.groups.frame.shape[1]

    stretch_used, tile_used = found.pop("used"), of_tiles["stretches"] > 0
    of_tiles = _in_use(of_tiles, tile_used, len(tile_used))
    found = _in_use(found, stretch_used, most)
    arrays["slot_position"] = of_blocks.pop("slot_position")
    arrays["row_position"] = of_tiles["position"]

    sizes = np.array(window_sizes(tile_rows), np.int32)
    offset = jnp.minimum(found["from"][:, None] // WINDOW * WINDOW, (tile_rows - sizes)[None])
    window = jnp.argmax(found["to"][:, None] - offset <= sizes[None], axis=1)
    columns = {
        "layer": jnp.asarray(layer),
        "tiles": tile_used.sum(),
        "row": of_tiles["row"],
        "rows": (of_tiles["position"] >= 0).sum(axis=1),
        "stretch": jnp.pad(jnp.cumsum(of_tiles["stretches"]), (1, 0)),
        "stretches": stretch_used.sum(),
        "begin": jnp.cumsum(found["blocks"]) - found["blocks"],
        "window": window,
        "offset": jnp.take_along_axis(offset, window[:, None], axis=1),
    }
    columns = columns | found | of_blocks
    return {name: x.reshape(-1).astype(jnp.int32) for name, x in columns.items()}, arrays


def _lane_blocks(tables: LaneTables, page_size: int) -> Arrays:
    """The blocks of all lanes' tables, and their entries."""
    slots, frame = block_pages(page_size) * page_size, flash.block_frames(tables, page_size)
    return {
        **{name: jnp.asarray(x).reshape(-1) for name, x in vars(tables).items()},
        "frame": frame.reshape(-1),
        "moved": flash.moved(frame).reshape(-1),
        "slot_position": tables.slot_positions(page_size).reshape(-1, 1, slots),
    }


def _group_blocks(groups: GroupTables, page_size: int) -> Arrays:
    """The blocks of groups, and their entries, which lie in front of all rows."""
    page, frame = jnp.asarray(groups.page), jnp.asarray(groups.frame)
    never = jnp.iinfo(jnp.int32).max
    return {
        "page": page.reshape(-1),
        "first": jnp.asarray(groups.first).reshape(-1),
        "slots": jnp.asarray(groups.slots).reshape(-1),
        "start": jnp.full(page.size, IN_FRONT),
        "frame": jnp.zeros_like(frame[:, 0]),  # each row has its own
        "moved": flash.moved(frame.T).any(axis=0),
        "slot_position": jnp.where(groups.valid(page_size), 0, never).reshape(len(page), 1, -1),
    }


def _single(
    tiles: RowTiles, position: jax.Array, block_start: jax.Array, *, packed: bool
) -> tuple[Arrays, Arrays]:
    """Tiles of one lane, and their stretches; if rows are packed, for the first half of lanes."""
    row, lane = jnp.asarray(tiles.row), jnp.asarray(tiles.lane)
    used = jnp.arange(len(lane), dtype=jnp.int32) < tiles.count
    if packed:
        used = used & (lane < len(block_start) // 2)
    limit = _positions(row, position)
    found = {
        "used": used,
        "from": jnp.zeros_like(lane),
        "to": (limit >= 0).sum(axis=1, dtype=jnp.int32),
        "reading": jnp.full_like(lane, -1),
    }
    found |= _own_blocks(block_start, lane, limit.max(axis=1))
    return {"row": row, "position": limit, "stretches": used.astype(jnp.int32)}, found


def _packed(
    shared: SharedRows, position: jax.Array, block_start: jax.Array, tile_rows: int
) -> tuple[Arrays, Arrays]:
    """Tiles of packed rows with the lane of each row, and the stretches of these tiles."""
    room = -len(shared.row) % tile_rows
    row = jnp.pad(shared.row, (0, room), constant_values=len(position)).reshape(-1, tile_rows)
    lane = jnp.pad(shared.lane, (0, room)).reshape(row.shape)
    limit = _positions(row, position)
    used, at = limit >= 0, jnp.broadcast_to(jnp.arange(tile_rows, dtype=jnp.int32), row.shape)
    mates = used[:, :, None] & used[:, None, :] & (lane[:, :, None] == lane[:, None, :])
    found = {
        "used": used & (jnp.argmax(mates, axis=2) == at),
        "from": at,
        "to": at + mates.sum(axis=2, dtype=jnp.int32),
        "reading": jnp.full_like(row, -1),
    }
    last = jnp.where(mates, limit[:, None, :], -1).max(axis=2)
    found |= _own_blocks(block_start, lane + len(block_start) // 2, last)

    each, nothing = used.sum(axis=1, dtype=jnp.int32), jnp.zeros_like(row[:, 0])
    blocks = len(shared.groups.page)
    together = {
        "used": each > 0,
        "from": nothing,
        "to": each,
        "reading": jnp.arange(len(row), dtype=jnp.int32) * blocks,
        "last": nothing,
        "block": nothing + block_start.size,
        "blocks": nothing + jnp.maximum(shared.groups.count, 1),
    }
    found = _joined({name: x[:, None] for name, x in together.items()}, found, axis=1)
    stretches = found["used"].sum(axis=1, dtype=jnp.int32)
    tiles = {"row": row, "position": limit, "stretches": stretches}
    return tiles | {"lane": lane}, {name: x.reshape(-1) for name, x in found.items()}


def _own_blocks(block_start: jax.Array, lane: jax.Array, last: jax.Array) -> Arrays:
    """The blocks of lanes i32 [...] that rows at positions up to `last`, i32 [...], see."""
    seen = (block_start[lane] <= last[..., None]).sum(axis=-1, dtype=jnp.int32)
    return {"last": last, "block": lane * block_start.shape[1], "blocks": jnp.maximum(seen, 1)}


def _readings(groups: GroupTables, lane: jax.Array) -> jax.Array:
    """How rows of lanes i32 [tiles, tile_rows] read each block of the groups."""
    frame, member = jnp.asarray(groups.frame), jnp.asarray(groups.member)
    blocks, lanes, entries = member.shape
    bits = jnp.pad(member, ((0, 0), (0, 0), (0, -entries % WORD)))
    bits = bits.reshape(blocks, lanes, -1, WORD).astype(jnp.uint32)
    bits = bits << jnp.arange(WORD, dtype=jnp.uint32).reshape(1, 1, 1, WORD)
    reading = jax.lax.bitcast_convert_type(bits.sum(axis=3, dtype=jnp.uint32), jnp.int32)
    reading = jnp.concatenate([frame[:, :, None], reading], axis=2)
    # [blocks, tiles, tile_rows, 1 + words]
    return reading[:, lane].transpose(1, 0, 3, 2).reshape(-1, reading.shape[2], lane.shape[1])


def _positions(row: jax.Array, position: jax.Array) -> jax.Array:
    """Positions of rows i32 [...], -1 in places without a row."""
    return jnp.where(row < len(position), jnp.take(position, row, mode="clip"), -1)


def _joined(one: Arrays, other: Arrays, axis: int = 0) -> Arrays:
    return {name: jnp.concatenate([x, other[name]], axis=axis) for name, x in one.items()}


def _in_use(arrays: Arrays, used: jax.Array, most: int) -> Arrays:
    """Moves the items in use to the front, in order; pads to `most` items with copies of item 0."""
    number = jnp.flatnonzero(used, size=most, fill_value=0)
    return {name: x[number] for name, x in arrays.items()}

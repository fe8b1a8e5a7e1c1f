"""Groups the rows of a lane into tiles, which attend together."""

import numpy as np
from jaxtyping import Int32

from tokendance_jax.kernels.lanes import KEY_BLOCK, TILE_ROWS, RowTiles


def row_tiles(
    lane: Int32[np.ndarray, " used"],
    position: Int32[np.ndarray, " used"] | None = None,
    *,
    rows: int,
    lanes: int,
) -> RowTiles:
    """Groups rows into tiles of one lane each.

    Args:
      lane: lane of each row; rows of one lane are neighbours.
      position: logical position of each row. If a key block fits into a lane's widest gap, the
        rows before and behind the gap get tiles of their own. In one tile, rows in front of shared
        text would keep the rows behind it from reading its key blocks whole, without a mask. None:
        gaps are ignored.
      rows: number of rows of the plan, padding included; it marks the unused places of a tile.
      lanes: lanes of the plan.
    """
    most = -(-rows // TILE_ROWS) + (lanes if position is None else 2 * lanes)
    row = np.full((most, TILE_ROWS), rows, np.int32)
    tile_lane = np.zeros(most, np.int32)
    count = 0
    for group in np.split(np.arange(len(lane), dtype=np.int32), np.flatnonzero(np.diff(lane)) + 1):
        for run in [group] if position is None else _around_gap(group, position[group]):
            for start in range(0, len(run), TILE_ROWS):
                part = run[start : start + TILE_ROWS]
                row[count, : len(part)] = part
                tile_lane[count] = lane[part[0]]
                count += 1
    return RowTiles(row=row, lane=tile_lane, count=np.asarray(count, np.int32))


def _around_gap(group: np.ndarray, position: np.ndarray) -> list[np.ndarray]:
    """Splits rows of one lane at their widest gap, if a key block fits into it."""
    gaps = np.diff(position)
    if not len(gaps) or gaps.max() <= KEY_BLOCK:
        return [group]
    return np.split(group, [gaps.argmax() + 1])

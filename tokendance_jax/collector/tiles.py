"""Rows of one lane that attend together."""

import numpy as np
from jaxtyping import Int32

from tokendance_jax.kernels.lanes import TILE_ROWS, RowTiles


def row_tiles(lane: Int32[np.ndarray, " used"], *, rows: int, lanes: int) -> RowTiles:
    """Groups rows into tiles of one lane each.

    Args:
      lane: lane of each row; rows of one lane stand together.
      rows: rows of the plan, padding included: the number that marks an unused place.
      lanes: lanes of the plan.
    """
    most = -(-rows // TILE_ROWS) + lanes
    row = np.full((most, TILE_ROWS), rows, np.int32)
    tile_lane = np.zeros(most, np.int32)
    count = 0
    for group in np.split(np.arange(len(lane), dtype=np.int32), np.flatnonzero(np.diff(lane)) + 1):
        for start in range(0, len(group), TILE_ROWS):
            part = group[start : start + TILE_ROWS]
            row[count, : len(part)] = part
            tile_lane[count] = lane[part[0]]
            count += 1
    return RowTiles(row=row, lane=tile_lane, count=np.asarray(count, np.int32))

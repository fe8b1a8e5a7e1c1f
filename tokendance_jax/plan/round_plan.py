"""Packs the lanes of a round, as one ragged batch, into the arrays of prefill calls."""

import dataclasses
from collections.abc import Sequence
from typing import no_type_check

import jax
import numpy as np
from jaxtyping import Int32

from tokendance_jax.kernels.lanes import Array, LaneTables, Rows, RowTiles, SharedRows, block_pages
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.plan.shapes import Shapes as Shapes
from tokendance_jax.plan.shared_rows import blank_rows, share_rows
from tokendance_jax.plan.tiles import row_tiles as row_tiles


@no_type_check  # JAX also builds this pytree with placeholders that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoundPlan:
    """The rows of one prefill call and what they read. All arrays have bucket shapes.

    Attributes:
      rows: tokens, logical and canonical positions, write slots.
      used: number of rows in use; they come first, and the others are padding.
      lane: lane of each row; for padding, the number of lanes.
      tables: block tables of all lanes.
      tiles: the rows, grouped into tiles of one lane each.
      out_row: for each seat, the row of its lane's last token if this call computes it; else the
        number of rows.
      shared: the packed rows and the pages that they read together; None: no rows are packed.
    """

    rows: Rows
    used: Int32[Array, ""]
    lane: Int32[Array, " rows"]
    tables: LaneTables
    tiles: RowTiles
    out_row: Int32[Array, " seats"]
    shared: SharedRows | None = None


def lane_tables(lanes: Sequence[LanePlan], shapes: Shapes, *, least: int = 1) -> LaneTables:
    """Stacks the lanes' block tables in bucket shapes, with room for at least `least` lanes."""
    block = block_pages(shapes.page_size)
    tables = [lane.table(block) for lane in lanes]
    entries = shapes.entries.fit(max(table.shape[1] for table in tables))
    stacked = np.zeros((5, shapes.lanes.fit(max(least, len(lanes))), entries), np.int32)
    for index, table in enumerate(tables):
        stacked[:, index, : table.shape[1]] = table
    page, frame, first, slots, start = stacked
    return LaneTables(page=page, frame=frame, first=first, slots=slots, start=start)


def pack(
    lanes: Sequence[LanePlan],
    shapes: Shapes,
    *,
    seats: Sequence[int] | None = None,
    seated: int | None = None,
) -> list[RoundPlan]:
    """Lays the computed rows of all lanes end to end and splits them into calls.

    Rows keep the order of the lanes, so a page that a lane writes for a later lane is written in
    the same call or in an earlier one.

    Args:
      lanes: at least one lane and at most the largest bucket; each computes at least one row.
      shapes: the static shapes.
      seats: seat of each lane's agent; negative for a lane of no agent; None: 0, 1, 2, ...
      seated: number of seats (a bucket of lanes); None: the bucket of these lanes.

    Returns:
      One plan per call, to be run in order.
    """
    seats = range(len(lanes)) if seats is None else seats
    tables = lane_tables(lanes, shapes, least=seated or 1)
    lane_count = tables.page.shape[0]
    seat_count = lane_count if seated is None else seated
    lane = np.repeat(np.arange(len(lanes), dtype=np.int32), [len(p.computed) for p in lanes])
    position = np.concatenate([p.computed for p in lanes])
    token = np.concatenate([p.token_ids[p.computed] for p in lanes])
    located = [p.locate(p.computed, shapes.page_size) for p in lanes]
    slot = np.concatenate([slot for slot, _ in located])
    canonical = np.concatenate([canonical for _, canonical in located])
    row = np.cumsum([len(p.computed) for p in lanes]) - 1
    last = {
        seat: int(end)
        for p, seat, end in zip(lanes, seats, row, strict=True)
        if seat >= 0 and p.computed[-1] == len(p.token_ids) - 1
    }
    sizes = shapes.rows.cover(len(token))
    packing = shapes.packing_of(max(sizes))
    share = share_rows(lanes, tables, shapes, packing) if packing else None
    plans, start = [], 0
    for size in sizes:
        stop = min(start + size, len(token))

        def padded(values: np.ndarray, fill: int, start=start, stop=stop, size=size) -> np.ndarray:
            out = np.full(size, fill, np.int32)
            out[: stop - start] = values[start:stop]
            return out

        out_row = np.full(seat_count, size, np.int32)
        for seat, end in last.items():
            if start <= end < stop:
                out_row[seat] = end - start
        rows = Rows(
            token=padded(token, 0),
            position=padded(position, 0),
            canonical=padded(canonical, 0),
            slot=padded(slot, shapes.no_slot),
        )
        tiles = row_tiles(lane[start:stop], position[start:stop], rows=size, lanes=lane_count)
        shared = None
        if share and shapes.packing_of(size):
            shared = share.of_rows(lane[start:stop], position[start:stop], rows=size)
        used = np.asarray(stop - start, np.int32)
        plans.append(
            RoundPlan(rows, used, padded(lane, lane_count), tables, tiles, out_row, shared)
        )
        start = stop
    return plans


def blank_plan(*, rows: int, lanes: int, seats: int, entries: int, shapes: Shapes) -> RoundPlan:
    """Returns a plan of padding alone in the given bucket shapes, to compile programs for."""

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.int32)

    table, packing = zeros(lanes, entries), shapes.packing_of(rows)
    tables = LaneTables(page=table, frame=table, first=table, slots=table, start=table)
    nowhere = np.full(rows, shapes.no_slot, np.int32)
    return RoundPlan(
        rows=Rows(token=zeros(rows), position=zeros(rows), canonical=zeros(rows), slot=nowhere),
        used=np.asarray(0, np.int32),
        lane=np.full(rows, lanes, np.int32),
        tables=tables,
        tiles=row_tiles(zeros(0), zeros(0), rows=rows, lanes=lanes),
        out_row=np.full(seats, rows, np.int32),
        shared=packing
        and blank_rows(tables, rows=rows, page_size=shapes.page_size, packing=packing),
    )

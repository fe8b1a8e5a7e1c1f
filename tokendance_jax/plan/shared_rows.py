"""Decides which rows of a prefill are packed, to read their lanes' shared pages together.

Many lanes end with a few rows behind a base that all of these lanes read. Such rows of one lane
are too few to fill a tile. Packed end to end, those of many lanes read the base once per tile.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from tokendance_jax.kernels.lanes import GroupTables, LaneTables, SharedRows
from tokendance_jax.plan.groups import empty_groups, group_tables
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.plan.shapes import Packing, Shapes
from tokendance_jax.plan.tiles import row_tiles

# The cost of packing rows, in key blocks that they read: their queries are read once more, and
# their results are written and read again, except on TPUs. An estimate, used on every platform.
PACKING_COST = 0.5


@dataclasses.dataclass(frozen=True)
class Sharing:
    """What the rows at the ends of lanes share.

    Attributes:
      behind: i64 [lanes]; logical position of each lane's first such row; int64's maximum in lanes
        that share nothing.
      groups: the key blocks that these rows share.
      tables: see `SharedRows`.
      most: most rows of one lane that are packed.
    """

    behind: np.ndarray
    groups: GroupTables
    tables: LaneTables
    most: int

    def of_rows(
        self, lane: Int32[np.ndarray, " used"], position: Int32[np.ndarray, " used"], *, rows: int
    ) -> SharedRows:
        """Returns the packed rows of one call, and what they read.

        Args:
          lane: lane of each row; rows of one lane are neighbours.
          position: logical position of each row.
          rows: rows of the plan, padding included.
        """
        lanes = len(self.behind)
        packed = position >= self.behind[lane]
        used = np.flatnonzero(packed).astype(np.int32)
        row = np.full(min(rows, lanes * self.most), rows, np.int32)
        row_lane = np.zeros_like(row)
        row[: len(used)], row_lane[: len(used)] = used, lane[used]
        # Entries that only lanes of later calls hold are left out: they may not be written yet.
        present = np.zeros(lanes, np.bool_)
        present[row_lane[: len(used)]] = True
        member = self.groups.member & present[None, :, None]
        held = np.any(member, axis=1)
        groups = dataclasses.replace(
            self.groups,
            member=member,
            page=np.where(held, self.groups.page, 0),
            slots=np.where(held, self.groups.slots, 0),
        )
        tiles = row_tiles(lane + packed.astype(np.int32) * lanes, rows=rows, lanes=2 * lanes)
        return SharedRows(row, row_lane, groups, self.tables, tiles)


def share_rows(
    lanes: Sequence[LanePlan], tables: LaneTables, shapes: Shapes, packing: Packing
) -> Sharing:
    """Finds what the rows at the ends of lanes share, if sharing saves more than it costs.

    Args:
      lanes: at least one, each with at least one row.
      tables: the lanes' whole block tables.
      shapes: the static shapes.
      packing: how rows are packed.
    """
    seats = len(tables.page)
    begin = np.array([_last_run(lane.computed) for lane in lanes])
    rows = np.array([len(lane.computed) for lane in lanes]) - begin
    behind = np.array([lane.computed[at] for lane, at in zip(lanes, begin, strict=True)])
    few = (rows <= packing.most) & (behind > 0)
    # A lane that is not packed gets position 0, in front of which there is nothing to share.
    behind, rows = behind * few, rows * few
    visits = -(-rows // packing.visit)

    def split(cost: float) -> tuple[GroupTables, LaneTables]:
        return group_tables(
            lanes, shapes, behind=behind.tolist(), visits=visits.tolist(), cost=cost, least=seats
        )

    together = float(-(-rows.sum() // packing.tile) * packing.tile / packing.visit)
    groups, rest = split(together)
    held = np.any(groups.member[:, : len(lanes)], axis=2)
    if (held @ visits).sum() - together * groups.count <= PACKING_COST * together:
        groups, rest = split(np.inf)
    packed = np.full(seats, np.iinfo(np.int64).max)
    shares = np.flatnonzero(np.any(groups.member, axis=(0, 2)))
    packed[shares] = behind[shares]
    return Sharing(packed, groups, _stacked(tables, rest), packing.most)


def blank_rows(tables: LaneTables, *, rows: int, page_size: int, packing: Packing) -> SharedRows:
    """Returns the shared rows of a plan of padding alone."""
    lanes, entries = tables.page.shape
    groups = empty_groups(lanes=lanes, entries=entries, page_size=page_size)
    nothing = np.zeros(0, np.int32)
    behind = np.zeros(lanes, np.int64)
    sharing = Sharing(behind, groups, _stacked(tables, tables), packing.most)
    return sharing.of_rows(nothing, nothing, rows=rows)


def _stacked(whole: LaneTables, rest: LaneTables) -> LaneTables:
    return LaneTables(
        **{name: np.concatenate([part, getattr(rest, name)]) for name, part in vars(whole).items()}
    )


def _last_run(computed: Int32[np.ndarray, " computed"]) -> int:
    """Returns the index at which the last run of consecutive positions begins."""
    breaks = np.flatnonzero(np.diff(computed) != 1)
    return int(breaks[-1]) + 1 if len(breaks) else 0

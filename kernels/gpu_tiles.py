"""The work of thread blocks in the Mosaic GPU attention kernels: tiles of rows, and steps."""

import dataclasses
from collections.abc import Sequence
from typing import no_type_check

import jax
import jax.numpy as jnp

from tokendance_jax.kernels import flash
from tokendance_jax.kernels.lanes import GroupTables, LaneTables

# Queries of a tile: the rows of one tensor core instruction.
QUERIES = 64
# Slots of a step.
SLOTS = 64


@no_type_check  # JAX also builds these pytrees with leaves that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """Lists of steps, and the list that each tile of queries goes through.

    Attributes:
      page: i32 [lists, steps * pages_of_a_step].
      slot_position: i32 [lists, steps, SLOTS]; int32's maximum where a slot is not valid.
      frame: i32 [lists, steps], one for all queries; or [tiles, steps, QUERIES], one per query.
      held: i32 [tiles, steps, QUERIES]; bit i is set if the query sees the i-th page of the step.
        None: all queries see all pages.
      moved: i32 [tiles, steps]; whether the frame of any query differs from its frame in the step
        before. None if the queries have one frame.
      of_tile: i32 [tiles]; the list that the tile goes through.
      count: i32 [tiles]; number of steps of the list that the tile sees.
      last: i32 [tiles]; the greatest position that a query of the tile sees.
    """

    page: jax.Array
    slot_position: jax.Array
    frame: jax.Array
    held: jax.Array | None
    moved: jax.Array | None
    of_tile: jax.Array
    count: jax.Array
    last: jax.Array


@no_type_check  # JAX also builds these pytrees with leaves that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows whose queries attend together. A row's query heads for one KV head are all in one tile.

    Attributes:
      row: i32 [tiles, rows of a tile]; places without a row hold the number of rows.
      place: i32 [tiles]; number of places of the tile in front of its first row.
      limit: i32 [tiles, QUERIES]; the last position that each query sees, -1 if it sees none.
    """

    row: jax.Array
    place: jax.Array
    limit: jax.Array

    @classmethod
    def of(cls, row: jax.Array, place: jax.Array, limit: jax.Array, group: int) -> "Tiles":
        """Makes tiles of rows with `group` heads each and limits i32 [tiles, rows of a tile]."""
        query = jnp.arange(QUERIES, dtype=jnp.int32)[None, :] - place[:, None] * group
        inside = (query >= 0) & (query < row.shape[1] * group)
        index = jnp.clip(query // group, 0, row.shape[1] - 1)
        return cls(row, place, jnp.where(inside, jnp.take_along_axis(limit, index, axis=1), -1))


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """Attention results of rows over other slots; each part is normalised on its own.

    Attributes:
      out: [parts, rows, heads, head_dim], in the pool's precision; zero where a row saw nothing of
        a part.
      lse: f32 [parts, tiles, kv_heads, QUERIES]; `flash.MASKED` where a query saw nothing of a
        part.
      of_tile: i32 [tiles of the reader]; the tile of `lse` that has the same rows at the same
        places.
      count: i32 [tiles of the reader]; number of parts that the tile reads, which come first.
    """

    out: jax.Array
    lse: jax.Array
    of_tile: jax.Array
    count: jax.Array


def rows_of_tiles(row: jax.Array, group: int, rows: int) -> jax.Array:
    """Splits rows i32 [tiles, n] among thread blocks, i32 [tiles, blocks, rows of a block].

    Args:
      row: the rows; places without a row hold `rows`.
      group: query heads per KV head.
      rows: number of rows.

    Raises:
      NotImplementedError: the heads of a row that share a KV head do not fit into a tile.
    """
    if group > QUERIES:
        raise NotImplementedError(f"{group} heads share a KV head: a tile has {QUERIES} queries")
    width = min(QUERIES // group, row.shape[1])
    row = jnp.pad(row, [(0, 0), (0, -row.shape[1] % width)], constant_values=rows)
    return row.reshape(len(row), -1, width)


def lane_steps(tables: LaneTables, page_size: int, lane: jax.Array, last: jax.Array) -> Steps:
    """Lists the steps of the lanes' own tables.

    Args:
      tables: the tables.
      page_size: slots of a page.
      lane: i32 [tiles]; the lane of each tile.
      last: i32 [tiles]; the greatest position that a query of the tile sees.
    """
    lanes = tables.page.shape[0]
    slot_position = tables.slot_positions(page_size).reshape(lanes, -1, SLOTS)
    start = slot_position.min(axis=2)
    # Steps without a valid slot come from the padding of key blocks; move them after all others.
    order = jnp.argsort(start, axis=1)

    def in_order(x: jax.Array) -> jax.Array:
        index = order.reshape(*order.shape, *[1] * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1)

    pages = SLOTS // page_size
    page = in_order(jnp.asarray(tables.page).reshape(lanes, -1, pages))
    seen = start[lane] <= last[:, None]
    return Steps(
        page=page.reshape(lanes, -1),
        slot_position=in_order(slot_position),
        frame=in_order(jnp.asarray(tables.frame)[:, ::pages]),
        held=None,
        moved=None,
        of_tile=lane,
        count=jnp.sum(seen.astype(jnp.int32), axis=1),
        last=last,
    )


def group_steps(groups: GroupTables, row: jax.Array, group: int, page_size: int) -> Steps:
    """Lists the steps of the groups' key blocks.

    Args:
      groups: the groups.
      row: i32 [tiles, rows of a tile]; the lane of each row; places without a row hold the number
        of lanes.
      group: query heads per KV head.
      page_size: slots of a page.
    """
    pages = SLOTS // page_size
    blocks, lanes, entries = groups.member.shape
    steps = entries // pages
    valid = groups.valid(page_size).reshape(1, blocks * steps, SLOTS)
    bit = jnp.left_shift(1, jnp.arange(pages, dtype=jnp.int32))
    held = jnp.asarray(groups.member).reshape(blocks, lanes, steps, pages).astype(jnp.int32)
    held = jnp.sum(held * bit[None, None, None, :], axis=3)
    frame = jnp.broadcast_to(jnp.asarray(groups.frame)[:, :, None], held.shape)

    def of_queries(x: jax.Array) -> jax.Array:
        """Rearranges [blocks, lanes, steps] to [tiles, steps, QUERIES]."""
        x = jnp.moveaxis(x, 1, 0).reshape(lanes, blocks * steps)
        x = jnp.repeat(jnp.take(x, row, axis=0, mode="fill", fill_value=0), group, axis=1)
        x = jnp.pad(x, [(0, 0), (0, QUERIES - x.shape[1]), (0, 0)])
        return jnp.moveaxis(x, 1, 2)

    frame = of_queries(frame)
    moved = jnp.any(frame != jnp.roll(frame, 1, axis=1), axis=2).astype(jnp.int32)
    none = jnp.zeros(len(row), jnp.int32)
    return Steps(
        page=jnp.asarray(groups.page).reshape(1, -1),
        slot_position=jnp.where(valid, 0, jnp.iinfo(jnp.int32).max),
        frame=frame,
        held=of_queries(held),
        moved=moved,
        of_tile=none,
        count=jnp.where(jnp.any(row < lanes, axis=1), jnp.asarray(groups.count) * steps, 0),
        last=none,
    )


def scores_of_rows(lse: jax.Array, row: jax.Array, group: int, rows: int) -> jax.Array:
    """Rearranges log-sum-exps f32 [tiles, kv_heads, QUERIES] by row, [rows, heads].

    Rows that are in no tile get `flash.MASKED`.

    Args:
      lse: log-sum-exps of tiles whose first row is at their first place.
      row: i32 [tiles, rows of a tile]; places without a row hold `rows`.
      group: query heads per KV head.
      rows: number of rows.
    """
    tiles, kv_heads, _ = lse.shape
    lse = lse[:, :, : row.shape[1] * group].reshape(tiles, kv_heads, row.shape[1], group)
    lse = jnp.moveaxis(lse, 1, 2).reshape(-1, kv_heads * group)
    masked = jnp.full((rows, lse.shape[1]), flash.MASKED)
    return masked.at[row.reshape(-1)].set(lse, mode="drop")


def scores_of_tiles(lse: jax.Array, row: jax.Array, kv_heads: int) -> jax.Array:
    """The inverse of `scores_of_rows`; places without a row get `flash.MASKED`."""
    tiles, width = row.shape
    lse = jnp.take(lse, row.reshape(-1), axis=0, mode="fill", fill_value=flash.MASKED)
    lse = jnp.moveaxis(lse.reshape(tiles, width, kv_heads, -1), 2, 1).reshape(tiles, kv_heads, -1)
    room = QUERIES - lse.shape[2]
    return jnp.pad(lse, [(0, 0), (0, 0), (0, room)], constant_values=flash.MASKED)


def merge_parts(parts: Sequence[Parts], place: jax.Array) -> jax.Array:
    """Merges the attention results of rows over several sets of slots.

    Args:
      parts: the results, one `Parts` per set; the reader's tiles have one row each, in order.
      place: i32 [rows]; the place of each row in its tile, the same in all sets.

    Returns:
      The output f32 [rows, heads, head_dim] over all slots; zero where a row saw none.
    """
    rows, heads, _ = parts[0].out.shape[1:]
    outs, scores = [], []
    for part in parts:
        most, _, kv_heads, _ = part.lse.shape
        group = heads // kv_heads
        query = (place * group)[:, None] + jnp.arange(group, dtype=jnp.int32)[None, :]
        lse = jnp.take(part.lse, part.of_tile, axis=1)
        lse = jnp.take_along_axis(lse, query[None, :, None, :], axis=3).reshape(most, rows, heads)
        used = jnp.arange(most, dtype=jnp.int32)[:, None] < part.count[None, :]
        scores.append(jnp.where(used[:, :, None], lse, flash.MASKED))
        outs.append(part.out.astype(jnp.float32))
    out, lse = jnp.concatenate(outs), jnp.concatenate(scores)
    saw = lse > flash.MASKED
    share = jnp.where(saw, jnp.exp(lse - lse.max(axis=0)[None]), jnp.zeros_like(lse))
    total = share.sum(axis=0)
    total = jnp.where(total > 0, total, jnp.ones_like(total))
    # Parts not in use may hold anything.
    weighted = jnp.where(saw[..., None], out, jnp.zeros_like(out)) * share[..., None]
    return weighted.sum(axis=0) / total[..., None]

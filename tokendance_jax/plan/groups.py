"""Finds the table entries that several lanes hold, so that attention reads them only once.

Groups are never declared. Lanes share a page if their block tables name it, and this module
compares the tables. A prefix that lanes have in common, a base that each lane reads in its own
frame, and a base with some pages patched all appear as equal entries in several tables.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from tokendance_jax.kernels.lanes import GroupTables, LaneTables, block_pages
from tokendance_jax.plan.lane import LanePlan, fill_key_blocks, key_block_columns
from tokendance_jax.plan.shapes import Shapes


def group_tables(
    lanes: Sequence[LanePlan],
    shapes: Shapes,
    *,
    behind: Sequence[int] | None = None,
    visits: Sequence[int] | None = None,
    cost: float | None = None,
    least: int = 1,
) -> tuple[GroupTables, LaneTables]:
    """Splits the lanes' block tables into key blocks that several lanes read, and the rest.

    Entries of different lanes are equal if page, first slot and number of slots agree. Shared
    entries fill key blocks in the order in which the lanes first name them; a new block begins
    where the frame of a lane changes. A block goes into the groups if it saves at least what it
    costs; otherwise its entries stay in the lanes' tables. Only slots in front of the rows that
    read them are shared.

    Args:
      lanes: the lanes, at least one.
      shapes: the static shapes.
      behind: for each lane, a lower bound of the positions of its rows that read the groups;
        None: the end of its prompt, for rows that decode.
      visits: for each lane, how often it would read a key block from its own table; None: once.
      cost: cost of a shared key block, in key blocks that lanes read for themselves; None:
        `shared_block_cost`.
      least: the returned tables have room for at least this many lanes.

    Returns:
      The shared key blocks, and tables of all other entries. Both have the bucket shape of the
      lanes' whole tables, so that how much lanes share never leads to another compilation.

    Raises:
      ValueError: there are more lanes or entries than the largest buckets hold.
    """
    width, seats = block_pages(shapes.page_size), shapes.lanes.fit(max(least, len(lanes)))
    owner = np.repeat(np.arange(len(lanes)), [len(lane.page) for lane in lanes])
    table = np.concatenate([lane.entries() for lane in lanes], axis=1)
    last = key_block_columns(owner, table[1], width).max(initial=-1)
    entries = shapes.entries.fit(int(last) + 1)

    behind = [len(lane.token_ids) for lane in lanes] if behind is None else behind
    held, number = _shared(np.asarray(behind), owner, table, shapes.page_size)
    member = np.zeros((number.max(initial=-1) + 1, seats), np.bool_)
    member[number, owner[held]] = True
    frame = np.zeros(member.shape, np.int32)
    frame[number, owner[held]] = table[1, held]
    column, frame = _key_blocks(frame, member, width)
    weight = np.zeros(seats, np.int64)
    weight[: len(lanes)] = 1 if visits is None else visits
    chosen = _worthwhile(
        column // width,
        frame,
        member,
        weight,
        width=width,
        cost=shared_block_cost(seats) if cost is None else cost,
        most=entries // width,
    )

    groups = empty_groups(lanes=seats, entries=entries, page_size=shapes.page_size)
    groups = dataclasses.replace(groups, count=np.asarray(len(chosen), np.int32))
    groups.frame[: len(chosen)] = frame[chosen]
    target = np.full(len(frame), -1)
    target[chosen] = np.arange(len(chosen))
    block, place = target[column // width][number], (column % width)[number]
    held, block, place = held[block >= 0], block[block >= 0], place[block >= 0]
    groups.member[block, owner[held], place] = True
    for array, row in ((groups.page, 0), (groups.first, 2), (groups.slots, 3)):
        array[block, place] = table[row, held]

    rest = np.ones(len(owner), np.bool_)
    rest[held] = False
    owner, table = owner[rest], table[:, rest]
    column = owner * entries + key_block_columns(owner, table[1], width)
    tables = fill_key_blocks(table, column, seats * entries, width)
    return groups, LaneTables(*tables.reshape(5, seats, entries))


def empty_groups(*, lanes: int, entries: int, page_size: int) -> GroupTables:
    """Returns group tables that share nothing, in bucket shapes."""
    width = block_pages(page_size)
    blocks = entries // width
    return GroupTables(
        page=np.zeros((blocks, width), np.int32),
        first=np.zeros((blocks, width), np.int32),
        slots=np.zeros((blocks, width), np.int32),
        frame=np.zeros((blocks, lanes), np.int32),
        member=np.zeros((blocks, lanes, width), np.bool_),
        count=np.asarray(0, np.int32),
    )


def _shared(
    behind: Int[np.ndarray, " lanes"],
    owner: Int[np.ndarray, " entries"],
    table: Int[np.ndarray, "5 entries"],
    page_size: int,
) -> tuple[Int[np.ndarray, " held"], Int[np.ndarray, " held"]]:
    """Finds the entries in front of `behind` that several lanes hold.

    If a lane names an entry several times, its second occurrence equals the second occurrence in
    other lanes, and so on.

    Returns:
      Indices of these entries in `table`, and the number of the shared entry that each stands
      for. Shared entries are numbered in the order in which the lanes first name them.
    """
    page, _, first, slots, start = table
    written = np.flatnonzero(start + slots <= behind[owner])
    key = (page.astype(np.int64) * page_size + first) * (page_size + 1) + slots
    owner, key = owner[written], key[written]

    order = np.lexsort((owner, key))
    fresh = np.ones(len(order), np.bool_)
    fresh[1:] = (np.diff(owner[order]) != 0) | (np.diff(key[order]) != 0)
    index = np.arange(len(order))
    time = np.empty_like(index)
    time[order] = index - np.maximum.accumulate(np.where(fresh, index, 0))
    key = key * (time.max(initial=0) + 1) + time

    _, at, name, holders = np.unique(
        key, return_index=True, return_inverse=True, return_counts=True
    )
    several = np.flatnonzero(holders > 1)
    number = np.full(len(at), -1)
    number[several[np.argsort(at[several])]] = np.arange(len(several))
    number = number[name]
    return written[number >= 0], number[number >= 0]


def _key_blocks(
    frame: Int[np.ndarray, "shared lanes"], member: Bool[np.ndarray, "shared lanes"], width: int
) -> tuple[Int[np.ndarray, " shared"], Int[np.ndarray, "blocks lanes"]]:
    """Fills key blocks with shared entries in order; within a block each lane has one frame.

    Returns:
      The column of each entry, with all blocks in one row, and the lanes' frames in each block. A
      lane that holds no entry of a block keeps its frame from the blocks before, so that its
      queries are rotated again as rarely as possible.
    """
    index = np.arange(len(frame))
    last = np.maximum.accumulate(np.where(member, index[:, None], -1), axis=0)
    before = np.full_like(last, -1)
    before[1:] = last[:-1]
    moved = member & (frame != np.take_along_axis(frame, np.maximum(before, 0), axis=0))
    # For each entry, the last entry before it that it cannot share a block with.
    clash = np.where(moved, before, -1).max(axis=1, initial=-1)
    begins, begin = [0], 0
    for entry in np.flatnonzero(clash >= 0).tolist():
        begin += (entry - begin) // width * width
        if clash[entry] >= begin:
            begin = entry
            begins.append(begin)
    run = np.searchsorted(begins, index, side="right")
    column = key_block_columns(np.zeros_like(run), run, width)
    newest = last[np.flatnonzero(np.diff(column // width, append=-1))]
    frame = np.take_along_axis(frame, np.maximum(newest, 0), axis=0)
    return column, np.where(newest >= 0, frame, np.zeros_like(frame))


def _worthwhile(
    block: Int[np.ndarray, " shared"],
    frame: Int[np.ndarray, "blocks lanes"],
    member: Bool[np.ndarray, "shared lanes"],
    visits: Int[np.ndarray, " lanes"],
    *,
    width: int,
    cost: float,
    most: int,
) -> Int[np.ndarray, " chosen"]:
    """Returns blocks that save at least their cost: up to `most`, those that save most."""
    held = np.zeros(frame.shape, np.int64)
    np.add.at(held, block, member)
    # In a lane's table, entries in another frame than their neighbours take a whole key block.
    saved = np.where(frame != 0, np.minimum(held, 1), held / width) @ visits
    chosen = np.flatnonzero(saved >= cost)
    best = np.argsort(-saved[chosen], kind="stable")[:most]
    return np.sort(chosen[best])


def shared_block_cost(lanes: int) -> float:
    """Returns the cost of a shared key block, in key blocks that one lane reads for itself.

    Fitted on a CPU, used on every platform. The fit compares processor times of decode attention
    at the sizes of the 0.5B model (24 layers): 17 key blocks that all lanes share, against the
    same pages in every lane's own table. For 4, 8, 16, 32, 64 and 128 lanes the cost was 2.7, 4.9,
    7.0, 10.7, 17.7 and 30.1 blocks in float32, and 2.6, 4.0, 5.2, 10.8, 18.0 and 28.5 in bfloat16.
    """
    return 2 + lanes / 4

"""From lanes to the arrays of decode attention: what several lanes hold is found and read once.

Nobody declares groups: lanes share a page because their tables name it, and this file looks for it
there. A prefix that lanes have in common, a base that each sees under its own frame, a base with
some pages patched: all are the same entries in several tables.
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
    """Splits the lanes' block tables into key blocks that several lanes read and the rest.

    Entries of several lanes are one if page, first slot and slots agree. In the order in which the
    lanes name them they fill key blocks, a new one where the frame of a lane changes. A block
    stands in the groups if it saves more than it costs, else in the lanes' tables. Only slots in
    front of the rows that read them are shared.

    Args:
      lanes: the lanes, at least one.
      shapes: the static shapes.
      behind: for each lane, a position that no row of it which reads the groups lies in front of;
        None: the end of its prompt, for rows that decode.
      visits: for each lane, how often it would read a key block of its own; None: once.
      cost: what a shared key block costs, in key blocks that lanes read for themselves; None:
        `shared_block_cost`.
      least: the tables are of at least so many lanes.

    Returns:
      The shared key blocks, and the tables of all else. Both have the bucket that the lanes' whole
      tables take, so that no program is compiled for how much lanes share.

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
    """Group tables in which nothing is shared, in bucket shapes."""
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

    Where a lane names one several times, its second time is one with the second time of others.

    Returns:
      The entries, and what they share: numbers in the order in which the lanes first name it.
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
      The column of each entry, where all blocks stand in one row, and the lanes' frames in each
      block: a lane that holds nothing of it keeps the one of the blocks before, so that queries are
      rotated anew as seldom as may be.
    """
    index = np.arange(len(frame))
    last = np.maximum.accumulate(np.where(member, index[:, None], -1), axis=0)
    before = np.full_like(last, -1)
    before[1:] = last[:-1]
    moved = member & (frame != np.take_along_axis(frame, np.maximum(before, 0), axis=0))
    # The newest entry that each one cannot share a block with.
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
    """The blocks that save more than they cost, at most so many of them, the best first choice."""
    held = np.zeros(frame.shape, np.int64)
    np.add.at(held, block, member)
    # Entries of another frame than their neighbours' take a key block of their own.
    saved = np.where(frame != 0, np.minimum(held, 1), held / width) @ visits
    chosen = np.flatnonzero(saved >= cost)
    best = np.argsort(-saved[chosen], kind="stable")[:most]
    return np.sort(chosen[best])


def shared_block_cost(lanes: int) -> float:
    """The cost of a key block that all lanes meet, in key blocks that one lane reads for itself.

    Tuned on a CPU, used on every platform. Fitted to the processor time of decode attention at the
    sizes of the 0.5B model (24 layers): 17 shared blocks against the same pages in every lane's own
    table. For 4, 8, 16, 32, 64 and 128 lanes the cost was 2.7, 4.9, 7.0, 10.7, 17.7 and 30.1 blocks
    in float32, and 2.6, 4.0, 5.2, 10.8, 18.0 and 28.5 in bfloat16.
    """
    return 2 + lanes / 4

"""The block table of an agent whose prompt alternates between own text and text of bases."""

from collections.abc import Collection, Sequence
from itertools import chain, pairwise

import numpy as np
from jaxtyping import Int32

from tokendance_jax.kernels.lanes import block_pages
from tokendance_jax.policy.parts import Part, Run


def fitting_parts(
    parts: Sequence[Part], *, room: int, least: int, entries: int, page_size: int
) -> list[Part]:
    """Turns shared text that is too short to be read from a base into the agent's own text.

    First it turns runs of fewer than `least` tokens into own text. Then, because every frame takes
    key blocks of its own, it turns the shortest texts of one frame into own text until the table
    fits. A table of own text alone always fits, because own text has one frame.

    Args:
      parts: the prompt.
      room: further tokens behind the last part.
      least: number of tokens of the shortest run that is read from a base.
      entries: number of entries of the largest table, in whole key blocks.
      page_size: token slots in a page.

    Returns:
      Parts of the same prompt. Parts that are read from a base were read from it before. If there
      are any, the table of the returned parts never has more than `entries` entries, wherever in a
      page its own text begins.
    """
    most = entries // block_pages(page_size)
    while True:
        runs = _neighbours(parts, one_frame=False)
        parts = _without(parts, [run for run in runs if _tokens(parts, run) < least])
        over = _most_blocks(parts, room, page_size) - most
        texts = _neighbours(parts, one_frame=True)
        if not texts or over <= 0:
            return parts
        # A text frees at most two key blocks: one itself, and one by joining own text around it.
        texts.sort(key=lambda text: _tokens(parts, text))
        parts = _without(parts, texts[: -(-over // 2)])


def _neighbours(parts: Sequence[Part], *, one_frame: bool) -> list[range]:
    """Returns ranges of neighbouring parts that lie in bases, of one frame each if `one_frame`."""

    def frame(part: Part) -> int | None:
        return None if part.placed is None else part.start - part.placed.canonical

    frames = [frame(part) for part in parts]
    cuts = [
        index + 1
        for index, (one, other) in enumerate(pairwise(frames))
        if one is None or other is None or (one_frame and one != other)
    ]
    runs = (range(*ends) for ends in pairwise([0, *cuts, len(parts)]))
    return [run for run in runs if frames[run.start] is not None]


def _tokens(parts: Sequence[Part], run: range) -> int:
    return parts[run.stop - 1].stop - parts[run.start].start


def _without(parts: Sequence[Part], runs: Collection[range]) -> list[Part]:
    """Returns the same prompt with some parts as own text; neighbouring own parts are joined."""
    own = set(chain.from_iterable(runs))
    kept: list[Part] = []
    for index, part in enumerate(parts):
        if part.placed is not None and index not in own:
            kept.append(part)
        elif kept and kept[-1].placed is None:
            kept[-1] = Part(kept[-1].start, part.stop, None)
        else:
            kept.append(Part(part.start, part.stop, None))
    return kept


def _most_blocks(parts: Sequence[Part], room: int, page_size: int) -> int:
    """Returns the most key blocks that the table of these parts can have."""
    width, blocks = block_pages(page_size), 0
    for part in parts:
        if part.placed is None:
            tokens = part.stop - part.start + (room if part is parts[-1] else 0)
            # Own text may begin anywhere in a page.
            blocks += -(-((tokens + 2 * page_size - 2) // page_size) // width)
    for text in _neighbours(parts, one_frame=True):
        places = [parts[index].placed for index in text]
        blocks += -(-sum(len(place.page) for place in places if place is not None) // width)
    return blocks


def agent_table(
    parts: Sequence[Part],
    run: Run,
    shown: Int32[np.ndarray, " entries"],
    own_page: Int32[np.ndarray, " own"],
    *,
    room: int,
    gap_at: int,
    gap: int,
    page_size: int,
) -> tuple[Int32[np.ndarray, "5 all"], Int32[np.ndarray, " entries"]]:
    """Lays out a lane's table: own text in successive own pages, and the run's entries in between.

    Args:
      parts: the prompt.
      run: its shared text.
      shown: the page of each entry of `run`: the base page or a patch.
      own_page: the agent's own pages.
      room: further tokens behind the last part, which is the agent's own.
      gap_at: number of own tokens before the gap.
      gap: number of slots that own text skips.
      page_size: token slots in a page.

    Returns:
      Rows page, frame, first, slots and base of the table, and the index of each entry of `run`.
    """
    pieces: list[np.ndarray] = []
    own, entry, count = 0, 0, 0
    at = np.zeros(len(run.page), np.int32)
    for index, part in enumerate(parts):
        if part.placed is None:
            tokens = part.stop - part.start + (room if index == len(parts) - 1 else 0)
            start = own + (gap if own >= gap_at else 0)
            page = np.arange(start // page_size, -(-(start + tokens) // page_size))
            first = np.maximum(start - page * page_size, 0)
            slots = np.minimum(start + tokens - page * page_size, page_size) - first
            zeros = np.zeros_like(page)
            pieces.append(np.stack([own_page[page], zeros, first, slots, zeros]))
            own += tokens
        elif index == 0 or parts[index - 1].placed is None:
            stop = entry + 1
            while stop < len(run.page) and run.offset[stop] > 0:
                stop += 1
            some = slice(entry, stop)
            at[some] = count + np.arange(stop - entry)
            columns = (shown, run.frame, run.first, run.slots, run.page)
            pieces.append(np.stack([column[some] for column in columns]))
            entry = stop
        else:
            continue
        count += pieces[-1].shape[1]
    return np.concatenate(pieces, axis=1).astype(np.int32), at

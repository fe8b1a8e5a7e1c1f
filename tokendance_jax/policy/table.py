"""The block table of an agent whose prompt is its own text and text of a base in turns."""

from collections.abc import Collection, Sequence
from itertools import chain, pairwise

import numpy as np
from jaxtyping import Int32

from tokendance_jax.kernels.lanes import block_pages
from tokendance_jax.policy.parts import Part, Run


def fitting_parts(
    parts: Sequence[Part], *, room: int, least: int, entries: int, page_size: int
) -> list[Part]:
    """Leaves shared text to the agent that is too short to be read from a base.

    First these are the runs of fewer than `least` tokens. Then, as every frame takes key blocks of
    its own, they are the shortest texts of one frame, until the table fits. That is always
    possible: what an agent computes itself has one frame.

    Args:
      parts: the prompt.
      room: further tokens behind the last part.
      least: tokens of the shortest run that is read from a base.
      entries: entries of the largest table, whole key blocks.
      page_size: token slots in a page.

    Returns:
      Parts of the same prompt: those that are read from a base were so before. If there are any, no
      table of these parts has more entries, wherever its own text begins in a page.
    """
    most = entries // block_pages(page_size)
    while True:
        runs = _neighbours(parts, one_frame=False)
        parts = _without(parts, [run for run in runs if _tokens(parts, run) < least])
        over = _most_blocks(parts, room, page_size) - most
        texts = _neighbours(parts, one_frame=True)
        if not texts or over <= 0:
            return parts
        # Each of them frees two key blocks at most: one, and one where own text grows together.
        texts.sort(key=lambda text: _tokens(parts, text))
        parts = _without(parts, texts[: -(-over // 2)])


def _neighbours(parts: Sequence[Part], *, one_frame: bool) -> list[range]:
    """Where parts of bases stand side by side, or those of one frame."""

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
    """The same prompt, some parts of bases the agent's own; no two neighbours are both its own."""
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
    """Key blocks of the largest table of these parts."""
    width, blocks = block_pages(page_size), 0
    for part in parts:
        if part.placed is None:
            tokens = part.stop - part.start + (room if part is parts[-1] else 0)
            # It may begin anywhere in a page.
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
    """Lays out a lane's table: own text in own pages one after the other, between it the run.

    Args:
      parts: the prompt.
      run: its shared text.
      shown: the page of each entry of `run`: the base page or a patch.
      own_page: the agent's own pages.
      room: further tokens behind the last part, which is the agent's own.
      gap_at: own tokens before the gap.
      gap: slots that own text leaves out.
      page_size: token slots in a page.

    Returns:
      Rows page, frame, first, slots, base, and the index of each entry of `run`.
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

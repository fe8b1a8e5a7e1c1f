"""The block table of an agent whose prompt is its own text and text of a base in turns."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from tokendance_jax.collector.parts import Part, Run


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

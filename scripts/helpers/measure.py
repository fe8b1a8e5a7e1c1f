"""Helpers of the measuring scripts: errors, results, timing of calls in turns, tables."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app
from rich import box
from rich.console import Console
from rich.table import Table

from scripts.helpers import common, terminal
from tokendance_jax import host
from tokendance_jax.engine.programs import DecodeState
from tokendance_jax.engine.sampling import LaneSampling, SamplingArrays, sampling_arrays
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.plan.shapes import Shapes
from tokendance_jax.prompt.round import Sampling


def run(
    argv: Sequence[str],
    measure: Callable[[Console], Iterator[dict[str, Any]]],
    *,
    json: str | None,
    width: int | None = None,
) -> int:
    """Runs a measurement and writes its results to a file as they come.

    Args:
      argv: the script's name; flag parsing must have left no other arguments.
      measure: prints its results, and yields all results so far whenever there are new ones.
      json: the file; None: the results are not written.
      width: columns of the console; None: those of the terminal.

    Returns:
      The exit status: 0, 1 after an error, or 130 after Ctrl-C. Of an error, only the message is
      printed.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    common.quiet_logs()
    host.tune_allocator()
    console = terminal.console(width=width)
    status, written = 0, False
    try:
        common.check_json_path(json)
        for found in measure(console):
            if json:
                common.write_json(json, found)
                written = True
    except KeyboardInterrupt:
        status = common.INTERRUPTED
    except common.ERRORS as error:
        terminal.complain(Path(argv[0]).stem, error)
        status = 1
    if json and written:
        console.print(f"Written: {terminal.markup(json)}")
    return status


def in_turns(
    calls: Sequence[Callable[[], Any]], *, turns: int, parts: int = 1
) -> list[list[float]]:
    """Times calls in turns, so that a busy machine slows all of them alike.

    Every call runs once before the first turn, without being timed.

    Args:
      calls: the calls to time, each until the arrays that it returns are ready.
      turns: how often each call is timed.
      parts: how many equal parts a call has.

    Returns:
      For each call, the seconds of one part in every turn.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(turns + 1):
        for call, found in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                found.append((time.perf_counter() - started) / parts)
    return seconds


def table(first: str, *others: str, title: str | None = None, caption: str | None = None) -> Table:
    """Makes an empty table with a column of names and right-aligned columns of figures."""
    made = Table(
        title=title and terminal.markup(title),
        caption=caption and terminal.markup(caption),
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    made.add_column(first, no_wrap=True)
    for column in others:
        made.add_column(column, justify="right", no_wrap=True)
    return made


def greedy(seats: int, agents: int) -> SamplingArrays:
    """Makes sampling arrays of `seats` seats for agents that decode greedily and never stop."""
    settings = LaneSampling(Sampling(), key=np.zeros(2, np.uint32), limit=1 << 20)
    return sampling_arrays(seats, [settings] * agents)


def behind_prompts(
    lanes: Sequence[LanePlan], steps: int, *, seats: int, shapes: Shapes
) -> tuple[DecodeState, np.ndarray]:
    """Makes the decode state of lanes after their prompts, and the slots of their next tokens.

    Returns:
      The state, and the slots i32 [seats, steps].
    """
    position = np.full(seats, -1, np.int32)
    slot = np.full((seats, steps), shapes.no_slot, np.int32)
    for seat, lane in enumerate(lanes):
        position[seat] = len(lane.token_ids)
        ahead = position[seat] + np.arange(steps, dtype=np.int32)
        slot[seat], _ = lane.locate(ahead, shapes.page_size)
    state = DecodeState(
        token=np.zeros(seats, np.int32),
        position=position,
        live=position >= 0,
        generated=np.ones(seats, np.int32),
    )
    return state, slot

"""Compiles all programs that rounds of a given size may need, before the first round."""

import jax
import numpy as np
from jaxtyping import Float

from tokendance_jax.engine import programs
from tokendance_jax.engine.programs import DecodeState
from tokendance_jax.engine.runner import Runner
from tokendance_jax.engine.sampling import SamplingArrays, sampling_arrays
from tokendance_jax.kernels.lanes import GroupTables, LaneTables, block_pages
from tokendance_jax.kernels.sparse_restore import RestorePlan
from tokendance_jax.plan.groups import empty_groups
from tokendance_jax.plan.round_plan import blank_plan
from tokendance_jax.plan.shapes import Shapes
from tokendance_jax.policy.policy import Policy


def warm_up(runner: Runner, policy: Policy, *, agents: int, tokens: int, steps: int) -> None:
    """Compiles the programs for rounds of up to `agents` agents and `tokens` positions.

    Args:
      runner: runs the programs.
      policy: plans the rounds.
      agents: maximum number of agents.
      tokens: maximum number of positions in a lane, the answer included.
      steps: tokens of a decode call.

    Raises:
      ValueError: the runner cannot serve rounds of this size.
    """
    shapes = runner.shapes
    entries = shapes.entries_of(tokens, shapes.page_size)
    # A new key block begins where the frame changes.
    blocks = policy.frames * block_pages(shapes.page_size)
    room = max(0, min(blocks, shapes.entries.budget - entries))
    most = shapes.entries.fit(entries + room)
    for rows in shapes.rows.sizes if "link" in policy.programs else ():
        nothing = np.zeros(0, np.int32)
        plan = RestorePlan.of_slots(nothing, nothing, nothing, page_size=shapes.page_size)
        runner.prepare(programs.link, plan.padded(rows, rows))
    for lanes in shapes.lanes.upto(agents):
        hidden = runner.new_hidden(lanes)
        runner.prepare(programs.first_token, hidden, blank_sampling(lanes))
        for entries in shapes.entries.upto(most):
            for rows in shapes.rows.sizes:
                _warm_up_prefill(runner, policy, agents, hidden, rows, entries)
            idle = blank_decode(lanes=lanes, entries=entries, steps=steps, shapes=shapes)
            runner.prepare(programs.decode, *idle)


def _warm_up_prefill(
    runner: Runner,
    policy: Policy,
    agents: int,
    hidden: Float[jax.Array, "seats width"],
    rows: int,
    entries: int,
) -> None:
    """Compiles the programs that take plans of these shapes. Bases may add lanes to a prefill."""
    shapes, seats = runner.shapes, len(hidden)
    most = min(min(agents, seats) + policy.bases, shapes.lanes.budget)
    for lanes in shapes.lanes.upto(max(seats, most)):
        if lanes < seats:
            continue
        plan = blank_plan(rows=rows, lanes=lanes, seats=seats, entries=entries, shapes=shapes)
        runner.prepare(programs.prefill, hidden, plan)
        if lanes > seats:
            continue
        nowhere = np.full(rows, shapes.no_slot, np.int32)
        x = np.zeros((rows, hidden.shape[1]), np.float32)
        if "deviation" in policy.programs:
            runner.prepare(programs.deviation, plan, nowhere)
        if "attention" in policy.programs:
            runner.prepare(programs.attention, plan)
        if "rest" in policy.programs:
            runner.prepare(programs.rest, hidden, x, plan)


def blank_decode(
    *, lanes: int, entries: int, steps: int, shapes: Shapes
) -> tuple[DecodeState, LaneTables, GroupTables, np.ndarray, SamplingArrays]:
    """Returns the arguments of a decode call after the pool, for idle lanes, to compile for."""
    idle = np.zeros(lanes, np.int32)
    plan = blank_plan(rows=1, lanes=lanes, seats=lanes, entries=entries, shapes=shapes)
    return (
        DecodeState(idle, idle, np.zeros(lanes, np.bool_), idle),
        plan.tables,
        empty_groups(lanes=lanes, entries=entries, page_size=shapes.page_size),
        np.full((lanes, steps), shapes.no_slot, np.int32),
        blank_sampling(lanes),
    )


def blank_sampling(lanes: int) -> SamplingArrays:
    """Returns greedy settings of lanes that generate nothing, to compile for."""
    return sampling_arrays(lanes, [])

"""Runs the steps of a prefill on the device, one call after the other."""

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Float32

from tokendance_jax.engine import programs
from tokendance_jax.engine.runner import Runner
from tokendance_jax.kernels.sparse_restore import RestorePlan
from tokendance_jax.models.decoder.config import DecoderConfig
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.plan.round_plan import RoundPlan, pack
from tokendance_jax.policy.policy import NOBODY, Compute, Link, Look, Rest, Scores, Steps

R = TypeVar("R")
Calls = Generator[bool, None, R]  # yields False before each call


@dataclasses.dataclass(slots=True)
class Cost:
    """The work of a prefill.

    Attributes:
      tokens: prompt tokens that each agent computed through all layers. For a `Rest` step, the
        `Look` before has run layer 0.
      base_tokens: tokens computed for bases.
      token_layers: tokens times the layers that each ran through, looks included. The layer that
        a look inspects counts as the share of its weights that the look uses.
      attended: keys that the rows attended to, summed over the layers that they ran through.
    """

    tokens: np.ndarray
    base_tokens: int = 0
    token_layers: float = 0.0
    attended: int = 0


class Prefill:
    """One prefill: runs the policy's steps.

    Attributes:
      hidden: residual stream at the last prompt tokens, f32 [seats, width], in the order of
        `seats`.
      cost: the work so far.
      rows: rows of all calls so far, without padding.
    """

    def __init__(
        self,
        runner: Runner,
        steps: Steps,
        *,
        seats: Sequence[int],
        wanted: Sequence[int] | None = None,
    ):
        """Starts before the first call.

        Args:
          runner: runs the calls.
          steps: the steps of a policy.
          seats: the seats that the steps compute.
          wanted: for each of them, the first position whose residual stream is kept for `streams`;
            None: none is kept.
        """
        self._runner = runner
        self._place = {NOBODY: NOBODY, **{seat: place for place, seat in enumerate(seats)}}
        self._wanted = wanted
        self._streams: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._resumed: tuple[Sequence[LanePlan], np.ndarray] = ((), np.zeros((0, 0)))
        self.hidden = runner.new_hidden(runner.shapes.lanes.fit(len(seats)))
        self.cost = Cost(np.zeros(len(seats), np.int64))
        self.rows = 0
        self._calls = self._all_calls(steps)
        next(self._calls, None)

    def call(self) -> bool:
        """Makes the next call; returns whether it was the last.

        What the host prepares for the call after it is prepared too, so that the device need not
        wait for it.
        """
        return next(self._calls, True)

    def run(self) -> None:
        """Makes all calls."""
        while not self.call():
            pass
        jax.block_until_ready(self.hidden)

    def _all_calls(self, steps: Steps) -> Iterator[bool]:
        """Carries out the steps; yields False before each call."""
        scores: Scores | None = None
        while True:
            try:
                step = steps.send(scores)
            except StopIteration:
                return
            scores = None
            match step:
                case Compute():
                    yield from self._compute(step)
                case Link():
                    yield from self._link(step)
                case Look():
                    scores = yield from self._look(step)
                case Rest():
                    yield from self._rest(step)

    def streams(self) -> list[Float32[np.ndarray, "_ width"]]:
        """Returns the residual stream at each agent's wanted positions, in order."""
        seat, position, x = (np.concatenate(column) for column in zip(*self._streams, strict=True))
        order = np.lexsort((position, seat))
        counts = np.bincount(seat, minlength=len(self.cost.tokens))
        return np.split(x[order], np.cumsum(counts)[:-1])

    def _compute(self, step: Compute) -> Calls[None]:
        for plan, seats in self._plans(step.lanes, step.seats):
            yield False
            self.hidden, x = self._runner.run(programs.prefill, self.hidden, plan)
            self._keep(plan, seats, x)
        self._count(step.lanes, step.seats, float(self._runner.layers))

    def _link(self, step: Link) -> Calls[None]:
        shapes, start = self._runner.shapes, 0
        plan = RestorePlan.of_slots(
            step.source, step.target, step.shift, page_size=shapes.page_size
        )
        for size in shapes.rows.cover(len(plan.first)):
            stop = min(start + size, len(plan.first))
            yield False
            self._runner.run(programs.link, plan.cut(start, stop).padded(size, size))
            start = stop

    def _look(self, step: Look) -> Calls[Scores]:
        self._count(step.lanes, [], look_layers(self._runner.model.config, step.what))
        if step.what == "attention":
            return (yield from self._mass(step))
        return (yield from self._deviation(step))

    def _mass(self, step: Look) -> Calls[Scores]:
        """Returns the attention mass on each lane's table entries."""
        mass = np.zeros((), np.float32)
        for plan, _ in self._plans(step.lanes, step.seats):
            yield False
            found = self._runner.run(programs.attention, plan)
            mass = mass + np.asarray(found)
        # In the tables of calls, empty entries pad the key blocks between a lane's own entries.
        used = np.asarray(plan.tables.slots) > 0
        return [mass[index][used[index]] for index in range(len(step.lanes))]

    def _deviation(self, step: Look) -> Calls[Scores]:
        """Returns the squared changes of K and V for each lane's rows."""
        squares, streams = [], []
        bases = np.concatenate([np.repeat(p.base, p.slots)[p.computed] for p in step.lanes])
        for plan, _ in self._plans(step.lanes, step.seats):
            yield False
            shown = np.asarray(plan.rows.slot)
            used = int(plan.used)
            slot = shown.copy()
            slot[:used][bases[:used] > 0] = self._runner.shapes.no_slot
            bases = bases[used:]
            plan = dataclasses.replace(plan, rows=dataclasses.replace(plan.rows, slot=slot))
            x, square = self._runner.run(programs.deviation, plan, shown)
            squares.append(np.asarray(square)[:, :used])
            if step.resume:
                streams.append(np.asarray(x)[:used])
        if step.resume:
            self._resumed = step.lanes, np.concatenate(streams)
        stops = np.cumsum([len(lane.computed) for lane in step.lanes])
        return np.split(np.concatenate(squares, axis=1), stops[:-1], axis=1)

    def _rest(self, step: Rest) -> Calls[None]:
        looked, streams = self._resumed
        starts = np.cumsum([0, *(len(lane.computed) for lane in looked)])[:-1]
        rows = [
            start + np.searchsorted(before.computed, lane.computed)
            for start, before, lane in zip(starts, looked, step.lanes, strict=True)
        ]
        chosen = streams[np.concatenate(rows)]
        for plan, seats in self._plans(step.lanes, step.seats):
            yield False
            used = int(plan.used)
            x = np.zeros((len(plan.lane), chosen.shape[1]), np.float32)
            x[:used], chosen = chosen[:used], chosen[used:]
            self.hidden, x = self._runner.run(programs.rest, self.hidden, x, plan)
            self._keep(plan, seats, x)
        self._count(step.lanes, step.seats, self._runner.layers - 1.0)

    def _plans(
        self, lanes: Sequence[LanePlan], seats: Sequence[int]
    ) -> Iterator[tuple[RoundPlan, np.ndarray]]:
        """Yields plans of the lanes that have rows to compute, each with its lanes' places."""
        shapes = self._runner.shapes
        pairs = zip(lanes, (self._place[seat] for seat in seats), strict=True)
        busy = [pair for pair in pairs if len(pair[0].computed)]
        for start in range(0, len(busy), shapes.lanes.budget):
            some, places = zip(*busy[start : start + shapes.lanes.budget], strict=True)
            for plan in pack(some, shapes, seats=places, seated=len(self.hidden)):
                self.rows += int(plan.used)
                yield plan, np.array(places)

    def _keep(self, plan: RoundPlan, seats: np.ndarray, x: jax.Array) -> None:
        """Keeps the residual stream of wanted rows."""
        if self._wanted is None:
            return
        used = int(plan.used)
        seat, position = seats[plan.lane[:used]], np.asarray(plan.rows.position)[:used]
        first = np.array([*self._wanted, np.iinfo(np.int32).max])  # the last one is for `NOBODY`
        kept = position >= first[seat]
        self._streams.append((seat[kept], position[kept], np.asarray(x)[:used][kept]))

    def _count(self, lanes: Sequence[LanePlan], seats: Sequence[int], layers: float) -> None:
        """Adds rows to the cost. Looks pass no seats: they compute no token through all layers."""
        self.cost.token_layers += layers * sum(len(lane.computed) for lane in lanes)
        # A row attends to its own key too. The partial layer at the end of a look is not counted.
        self.cost.attended += int(layers) * sum(int((lane.computed + 1).sum()) for lane in lanes)
        for lane, seat in zip(lanes, seats, strict=False):
            if seat == NOBODY:
                self.cost.base_tokens += len(lane.computed)
            else:
                self.cost.tokens[self._place[seat]] += len(lane.computed)


def look_layers(config: DecoderConfig, what: str) -> float:
    """Returns the layers that a look runs rows through, as a fractional number.

    The layer that the look inspects counts as the share of its weights that the look uses.
    """
    heads = config.num_attention_heads, config.num_key_value_heads
    q, kv = (count * config.head_dim for count in heads)
    if what == "deviation":
        return 1 + config.hidden_size * 2 * kv / config.layer_weights
    return config.num_hidden_layers // 2 + config.hidden_size * (q + 2 * kv) / config.layer_weights

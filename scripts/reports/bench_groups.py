"""Times a decode step whose agents share pages against the same step with copies of these pages.

  python -m scripts.reports.bench_groups
  python -m scripts.reports.bench_groups --agents=25 --shared=2000 --private=200 --dtype=bfloat16

Both steps read the same K and V. In the first one, the tables of all agents name the same pages,
each under its own frame, and a page is read once for the queries of all agents. In the second one,
every agent has its own copy. Whole steps, and attention alone, are timed in turns; the ratio is the
median over the turns.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.console import Console

from scripts.helpers import common, measure
from tokendance_jax.engine.compiling import Programs
from tokendance_jax.engine.programs import decode
from tokendance_jax.engine.runner import Runner
from tokendance_jax.kernels import storage
from tokendance_jax.kernels.decode_attention import decode_attention
from tokendance_jax.kernels.lanes import GroupTables, LaneTables
from tokendance_jax.model import Model
from tokendance_jax.paged.kv import PagedKV
from tokendance_jax.plan.groups import group_tables
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.plan.shapes import Shapes

_MODEL = flags.DEFINE_string("model", "0.5B", "Model, as for bench_engine.")
_DTYPE = flags.DEFINE_multi_enum(
    "dtype",
    ["float32", "bfloat16"],
    ["float32", "bfloat16"],
    "Precisions of weights and KV to time.",
)
_AGENTS = flags.DEFINE_integer("agents", 25, "Number of agents that decode.", lower_bound=2)
_SHARED = flags.DEFINE_integer(
    "shared", 2000, "Number of tokens that all agents share.", lower_bound=1
)
_PRIVATE = flags.DEFINE_integer(
    "private", 200, "Number of tokens of each agent's own text.", lower_bound=32
)
_STEPS = flags.DEFINE_integer(
    "steps", 4, "Number of steps of a decode call, of one token per agent each.", lower_bound=1
)
_TURNS = flags.DEFINE_integer(
    "turns", 7, "How often each step is timed; the median counts.", lower_bound=1
)
_JSON = flags.DEFINE_string("json", None, "JSON file to write the results to.")

_PAGE_SIZE = 16


@dataclasses.dataclass(frozen=True)
class Result:
    """Seconds of a step with shared pages and with copies, one pair per turn.

    Attributes:
      what: what was timed.
      dtype: precision of weights and KV.
      shared_s: seconds with shared pages.
      copied_s: seconds with copies.
      difference: largest difference between the two attention outputs, divided by the largest
        output.
    """

    what: str
    dtype: str
    shared_s: list[float]
    copied_s: list[float]
    difference: float

    @property
    def ratio(self) -> float:
        """Median over the turns of the time with copies to the time with shared pages."""
        pairs = zip(self.copied_s, self.shared_s, strict=True)
        return statistics.median(copied / shared for copied, shared in pairs)


def main(argv: Sequence[str]) -> int:
    """Measures and prints; returns the exit status."""
    return measure.run(argv, _measure, json=_JSON.value)


def _measure(console: Console) -> Iterator[dict[str, Any]]:
    results: list[Result] = []
    for dtype in _DTYPE.value:
        model = common.sized_model(_MODEL.value, dtype)
        results += time_steps(model)
        yield {"timings": [{**dataclasses.asdict(r), "ratio": r.ratio} for r in results]}
        del model
    title = f"{_AGENTS.value} agents, {_SHARED.value} shared and {_PRIVATE.value} own tokens"
    columns = "precision", "shared, ms", "copies, ms", "ratio", "difference"
    table = measure.table("what", *columns, title=title)
    for result in results:
        table.add_row(
            result.what,
            result.dtype,
            f"{1e3 * statistics.median(result.shared_s):.1f}",
            f"{1e3 * statistics.median(result.copied_s):.1f}",
            f"{result.ratio:.2f}",
            f"{result.difference:.1e}",
        )
    console.print(table)


def time_steps(model: Model) -> list[Result]:
    """Times attention alone and whole steps."""
    shared, copied, shapes, copies = _rounds(model)
    spec = model.kv_spec(pages=shapes.pages, page_size=_PAGE_SIZE)
    draw = np.random.default_rng(0)

    def pool() -> jax.Array:
        shape = spec.pages, spec.page_size, spec.kv_heads, spec.head_dim
        content = draw.standard_normal(shape, np.float32)
        content[copies[:, 0]] = content[copies[:, 1]]
        stored = storage.store(jnp.asarray(content), spec.storage)
        return jnp.broadcast_to(stored[None], (spec.layers, *shape)).copy()

    kv = PagedKV(k=pool(), v=pool())
    tables = [group_tables(lanes, shapes) for lanes in (shared, copied)]
    seats = tables[0][1].page.shape[0]
    ahead = [
        measure.behind_prompts(lanes, _STEPS.value, seats=seats, shapes=shapes)
        for lanes in (shared, copied)
    ]
    state = ahead[0][0]
    shape = seats, model.config.num_attention_heads, model.config.head_dim
    q = jnp.asarray(draw.standard_normal(shape, np.float32))
    layers, rope = model.config.num_hidden_layers, model.config.rope

    @jax.jit
    def attention(q: jax.Array, kv: PagedKV, tables: LaneTables, groups: GroupTables) -> jax.Array:
        # Each layer depends on the one before, so that layers run in order as they do in a step.
        x, at = q, jnp.asarray(state.position)
        for layer in range(layers):
            x = q + decode_attention(x, kv, layer, at, tables, groups, rope=rope)
        return x

    calls = [lambda t=t, g=g: attention(q, kv, t, g) for g, t in tables]
    outputs = [np.asarray(call())[: _AGENTS.value] for call in calls]
    difference = float(np.abs(outputs[0] - outputs[1]).max() / np.abs(outputs[0]).max())
    results = [_in_turns("attention of a step", model, calls, 1, difference)]

    runner = Runner(Programs(model, shapes), spec, kv)
    sampling = measure.greedy(seats, _AGENTS.value)

    def step(index: int) -> jax.Array:
        (groups, own), (_, slot) = tables[index], ahead[index]
        return runner.run(decode, state, own, groups, slot, sampling)

    steps = [lambda: step(0), lambda: step(1)]
    results.append(_in_turns("decode step", model, steps, _STEPS.value, difference))
    return results


def _rounds(model: Model) -> tuple[list[LanePlan], list[LanePlan], Shapes, np.ndarray]:
    """Returns lanes with shared pages, lanes with copies, shapes, and pairs (copy, original)."""
    agents = _AGENTS.value
    own = -(-(_PRIVATE.value + _STEPS.value) // _PAGE_SIZE)
    common_pages = -(-_SHARED.value // _PAGE_SIZE)
    pages = 1 + common_pages + agents * (own + common_pages)
    base = 1 + np.arange(common_pages, dtype=np.int32)
    slots = np.full(own + common_pages, _PAGE_SIZE, np.int32)
    tokens = int(slots.sum()) - _STEPS.value
    shared, copied, copies = [], [], []
    for agent in range(agents):
        begin = 1 + common_pages + agent * (own + common_pages)
        mine = begin + np.arange(own, dtype=np.int32)
        copy = begin + own + np.arange(common_pages, dtype=np.int32)
        copies.append(np.stack([copy, base], axis=1))
        before = own // 2 + agent % 3 - 1  # so that every agent has its own frame
        frame = np.zeros(len(slots), np.int32)
        frame[before : before + common_pages] = before * _PAGE_SIZE + agent
        for lanes, middle in ((shared, base), (copied, copy)):
            page = np.concatenate([mine[:before], middle, mine[before:]])
            lanes.append(
                LanePlan(
                    token_ids=np.zeros(tokens, np.int32),
                    computed=np.array([tokens - 1], np.int32),
                    page=page,
                    frame=frame,
                    first=np.zeros_like(frame),
                    slots=slots,
                    base=np.zeros_like(frame),
                )
            )
    shapes = Shapes.of(
        row_budget=64,
        max_lanes=max(4, agents),
        max_tokens=2 * len(slots) * _PAGE_SIZE,
        pages=pages,
        page_size=_PAGE_SIZE,
    )
    return shared, copied, shapes, np.concatenate(copies)


def _in_turns(
    what: str,
    model: Model,
    calls: Sequence[Callable[[], jax.Array]],
    parts: int,
    difference: float,
) -> Result:
    """Times two calls in turns; a call has `parts` steps."""
    shared, copied = measure.in_turns(calls, turns=_TURNS.value, parts=parts)
    return Result(what, model.dtype.name, shared, copied, difference)


if __name__ == "__main__":
    app.run(main)

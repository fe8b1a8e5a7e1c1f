"""Times a prefill call and a decode step against their matrix products alone.

  python -m scripts.reports.bench_engine
  python -m scripts.reports.bench_engine --model=model.gguf --dtype=bfloat16

The baseline has only the products with the model's matrices, at the same shapes and precision. The
time beyond the baseline goes into attention, norms, rotary embedding, sampling, and reading and
writing pages. Both are timed in turns, so that a busy machine slows both alike; the ratio is the
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
from flax import nnx
from rich.console import Console

from scripts.helpers import common, measure
from tokendance_jax.engine import programs
from tokendance_jax.engine.compiling import Programs
from tokendance_jax.engine.programs import DecodeState
from tokendance_jax.engine.runner import Runner
from tokendance_jax.model import Model
from tokendance_jax.models.product import matmul
from tokendance_jax.paged import PagePool
from tokendance_jax.plan.groups import empty_groups
from tokendance_jax.plan.round_plan import pack
from tokendance_jax.plan.shapes import Shapes
from tokendance_jax.policy.exact import Dense

_MODEL = flags.DEFINE_string(
    "model",
    "0.5B",
    "Model to time: a published size with random weights ('0.5B', '1.5B', ...), or any model that "
    "serve_round accepts. Times do not depend on the weights.",
)
_DTYPE = flags.DEFINE_multi_enum(
    "dtype",
    ["float32", "bfloat16"],
    ["float32", "bfloat16"],
    "Precisions of weights and KV to time.",
)
_ROWS = flags.DEFINE_integer(
    "rows", 2048, "Number of rows of the prefill call, over all agents.", lower_bound=1
)
_AGENTS = flags.DEFINE_integer("agents", 8, "Number of agents in both measurements.", lower_bound=1)
_CONTEXT = flags.DEFINE_integer(
    "context", 1024, "Number of tokens of each agent before decode.", lower_bound=1
)
_STEPS = flags.DEFINE_integer(
    "steps", 8, "Number of steps of a decode call, of one token per agent each.", lower_bound=1
)
_TURNS = flags.DEFINE_integer(
    "turns", 5, "How often each program is timed; the median counts.", lower_bound=1
)
_JSON = flags.DEFINE_string("json", None, "JSON file to write the results to.")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of a program and of its matrix products alone, one pair per turn."""

    what: str
    dtype: str
    program_s: list[float]
    products_s: list[float]
    tokens: int

    @property
    def ratio(self) -> float:
        """Median over the turns of program time to products time."""
        pairs = zip(self.program_s, self.products_s, strict=True)
        return statistics.median(program / products for program, products in pairs)

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of the program, at the median."""
        return self.tokens / statistics.median(self.program_s)


def main(argv: Sequence[str]) -> int:
    """Measures and prints; returns the exit status."""
    return measure.run(argv, _measure, json=_JSON.value)


def _measure(console: Console) -> Iterator[dict[str, Any]]:
    timings: list[Timing] = []
    for dtype in _DTYPE.value:
        model = common.sized_model(_MODEL.value, dtype)
        for time in (time_prefill, time_decode):
            timings.append(time(model))
            yield {"timings": [{**dataclasses.asdict(t), "ratio": t.ratio} for t in timings]}
        del model
    table = measure.table("what", "precision", "ms", "products\nalone, ms", "ratio", "tokens/s")
    for timing in timings:
        table.add_row(
            timing.what,
            timing.dtype,
            f"{1e3 * statistics.median(timing.program_s):.1f}",
            f"{1e3 * statistics.median(timing.products_s):.1f}",
            f"{timing.ratio:.2f}",
            f"{timing.tokens_per_s:,.0f}",
        )
    console.print(table)


class Bench:
    """A model's programs, a pool, and lanes of random tokens in it."""

    def __init__(self, model: Model, *, agents: int, prompt: int, room: int):
        config = model.config
        page_size = 16
        pages = 1 + agents * -(-(prompt + room) // page_size)
        self.model = model
        self.shapes = Shapes.of(
            row_budget=max(64, agents * prompt),
            max_lanes=max(4, agents),
            max_tokens=prompt + room,
            pages=pages,
            page_size=page_size,
        )
        spec = model.kv_spec(pages=pages, page_size=page_size)
        self.runner = Runner(Programs(model, self.shapes), spec)
        policy = Dense(PagePool(pages), page_size)
        draw = np.random.default_rng(0)
        self.lanes = [
            policy.open_lane(draw.integers(0, config.vocab_size, prompt, dtype=np.int32), room)
            for _ in range(agents)
        ]
        (self.plan,) = pack(self.lanes, self.shapes)
        self.seats = self.plan.out_row.shape[0]
        self.groups = empty_groups(
            lanes=self.seats, entries=self.plan.tables.page.shape[1], page_size=page_size
        )
        self.sampling = measure.greedy(self.seats, agents)

    def prefill(self) -> jax.Array:
        """Computes all prompts and chooses the first tokens."""
        hidden = self.runner.new_hidden(self.seats)
        hidden, _ = self.runner.run(programs.prefill, hidden, self.plan)
        return self.runner.run(programs.first_token, hidden, self.sampling)

    def decode(self, state: DecodeState, slot: np.ndarray) -> jax.Array:
        """Generates as many tokens per agent as `slot` has columns."""
        return self.runner.run(
            programs.decode, state, self.plan.tables, self.groups, slot, self.sampling
        )


def time_prefill(model: Model) -> Timing:
    """Times one packed prefill call, up to the first token of every agent."""
    agents, each = _AGENTS.value, _ROWS.value // _AGENTS.value
    bench = Bench(model, agents=agents, prompt=each, room=0)
    products = matrix_products(model, rows=agents * each, head_rows=bench.seats, repeat=1)
    what = f"prefill of {agents} x {each} rows"
    return _in_turns(what, model, bench.prefill, products, tokens=agents * each, parts=1)


def time_decode(model: Model) -> Timing:
    """Times one decode step, as the mean over a call of several steps."""
    agents, context, steps = _AGENTS.value, _CONTEXT.value, _STEPS.value
    bench = Bench(model, agents=agents, prompt=context, room=steps)
    bench.prefill()
    state, slot = measure.behind_prompts(bench.lanes, steps, seats=bench.seats, shapes=bench.shapes)
    products = matrix_products(model, rows=bench.seats, head_rows=bench.seats, repeat=steps)
    what = f"decode step of {agents} agents at {context} tokens"
    program = lambda: bench.decode(state, slot)  # noqa: E731
    return _in_turns(what, model, program, products, tokens=agents, parts=steps)


def matrix_products(
    model: Model, *, rows: int, head_rows: int, repeat: int
) -> Callable[[], list[jax.Array]]:
    """Makes a function that computes only the model's own products, `repeat` times.

    It runs one program per layer. Inputs are prepared in the matrices' precision, and results are
    dropped, so that no cast, no dependency between products and no other operation takes part.
    """
    config, qwen = model.config, nnx.merge(model.graph, model.state)
    head = qwen.embed_tokens if qwen.lm_head is None else qwen.lm_head

    def ones(rows: int, width: int) -> jax.Array:
        return jnp.ones((rows, width), model.dtype)

    @jax.jit
    def products(pairs: list[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
        return [matmul(x, weight) for x, weight in pairs]

    narrow, wide = ones(rows, config.hidden_size), ones(rows, config.intermediate_size)
    attended = ones(rows, config.num_attention_heads * config.head_dim)
    calls = []
    for block in qwen.layers:
        attention, mlp = block.self_attn, block.mlp
        inputs = [
            (narrow, attention.q_proj),
            (narrow, attention.k_proj),
            (narrow, attention.v_proj),
            (attended, attention.o_proj),
            (narrow, mlp.gate_proj),
            (narrow, mlp.up_proj),
            (wide, mlp.down_proj),
        ]
        calls.append([(x, linear.weight[...]) for x, linear in inputs])
    calls.append([(ones(head_rows, config.hidden_size), head.weight[...])])

    def run() -> list[jax.Array]:
        results: list[jax.Array] = []
        for _ in range(repeat):
            for call in calls:
                results = products(call)
        return results

    return run


def _in_turns(
    what: str,
    model: Model,
    program: Callable[[], jax.Array],
    products: Callable[[], list[jax.Array]],
    *,
    tokens: int,
    parts: int,
) -> Timing:
    """Times a program and its products in turns; a call has `parts` steps."""
    program_s, products_s = measure.in_turns([program, products], turns=_TURNS.value, parts=parts)
    return Timing(what, model.dtype.name, program_s, products_s, tokens)


if __name__ == "__main__":
    app.run(main)

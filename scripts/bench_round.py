"""Times the prefill of one round under several policies, beside the work that each does.

  python -m scripts.bench_round --model=model.gguf --trace=rounds.jsonl.gz --agents=5 --agents=25

Every policy serves the rounds before the measured one first, so that its caches hold what they
would. The ratio of two policies' times stands beside the ratio of their token-layers: tokens times
the layers that they ran through. These do not hold attention, which is more for a row at the end of
a long prompt than for one in the middle: the ratio of all operations stands beside them too.

A machine may be a third slower half an hour later, so each policy is timed between two runs of the
first, and its time stands over the mean of theirs. Compilation is left out. A program's first
execution is slower than later ones, so the least of several turns counts; what takes long runs its
programs many times in one turn, and is timed once.
"""

import dataclasses
import gc
from collections.abc import Iterator, Sequence
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table

from scripts.helpers import common, measure
from tokendance_jax import host
from tokendance_jax.engine.compiling import Programs
from tokendance_jax.engine.engine import RoundEngine
from tokendance_jax.engine.result import RoundLedger
from tokendance_jax.model import Model
from tokendance_jax.models.qwen2.config import Qwen2Config
from tokendance_jax.policy.policies import POLICIES, PolicyOptions
from tokendance_jax.prompt import PromptError, Trace

_MODEL = flags.DEFINE_string("model", common.DEMO, "Model, as for serve_round.")
_TRACE = flags.DEFINE_string("trace", common.DEMO, "Trace, as for serve_round.")
_TRACE_NAME = flags.DEFINE_string("trace_name", None, "Which trace of a file with several.")
_ROUND = flags.DEFINE_integer("round", 1, "The round to measure.", lower_bound=0)
_AGENTS = flags.DEFINE_multi_integer(
    "agents", [0], "The first so many agents; 0: all; repeat.", lower_bound=0
)
_POLICY = flags.DEFINE_multi_enum(
    "policy",
    ["tokendance", "epic", "blend", "blend-batched", "prefix", "dense"],
    POLICIES,
    "Policies to measure; repeat the flag.",
)
_HEAD_PAGES = flags.DEFINE_multi_integer(
    "head_pages",
    [0, common.HEAD_PAGES],
    "Heads of tokendance; 0: none; repeat the flag.",
    lower_bound=0,
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Precision.")
_ROW_BUDGET = flags.DEFINE_integer(
    "row_budget", 2048, "Most rows computed in one prefill call.", lower_bound=1
)
_TURNS = flags.DEFINE_integer("turns", 2, "How often each is timed.", lower_bound=1)
_LONG = flags.DEFINE_float("long", 20, "Seconds of prefill from which one turn is enough.")
_JSON = flags.DEFINE_string("json", None, "File to write the results to.")


def main(argv: Sequence[str]) -> int:
    """Measures and prints; returns the exit status: 0, or 1 after an error."""
    return measure.run(argv, _measure, json=_JSON.value, width=100)


def _measure(console: Console) -> Iterator[dict[str, Any]]:
    host.cache_compilations(None)
    rows: list[dict[str, Any]] = []
    whole = common.trace_of(_TRACE.value, _TRACE_NAME.value)
    if _ROUND.value >= len(whole.rounds):
        raise PromptError(f"round: the trace ends before round {_ROUND.value}")
    model = common.model_of(_MODEL.value, _DTYPE.value)
    for agents in _AGENTS.value:
        trace = common.cut_trace(whole, rounds=_ROUND.value + 1, agents=agents, max_new_tokens=1)
        measured = time_policies(model, trace)
        console.print(_table(trace, measured))
        rows += measured
        yield {"prefill": rows}


def time_policies(model: Model, trace: Trace) -> list[dict[str, Any]]:
    """Times the last round of a trace under all policies, in turns.

    Args:
      model: the model.
      trace: rounds up to the measured one, of one token each.

    Returns:
      For each policy its name, the least seconds of prefill, `time`: these over what the first
      policy took before and after, token-layers, and rows with padding.
    """
    memory = common.needed_kv_memory(model, trace, page_size=16, chat=False)
    variants = [
        (policy, pages)
        for policy in dict.fromkeys(_POLICY.value)
        for pages in (_HEAD_PAGES.value if policy == "tokendance" else [0])
    ]
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    programs: Programs | None = None

    def prefill(variant: tuple[str, int]) -> float:
        """Serves the trace; returns the seconds of its last prefill."""
        nonlocal programs
        policy, pages = variant
        engine = RoundEngine(
            model,
            policy=policy,
            options=PolicyOptions(
                selection="head" if pages else "none", head_pages=pages, least_saving=None
            ),
            kv_memory=memory,
            row_budget=_ROW_BUDGET.value,
            programs=programs,
        )
        programs = engine.programs
        # Dense keeps nothing between rounds.
        served = trace.rounds[-1:] if policy == "dense" else trace.rounds
        *_, result = (engine.serve(round_, chat=False) for round_ in served)
        seconds = result.timings.prefill_s
        row = rows.setdefault(variant, {"prefill_s": seconds, "time": 1.0})
        row |= {
            "policy": policy,
            "head_pages": pages if policy == "tokendance" else None,
            "trace": trace.name,
            "agents": len(trace.rounds[-1].agents),
            "prefill_s": min(seconds, row["prefill_s"]),
            "plan_s": result.timings.plan_s,
            "operations": operations(model.config, result.ledger),
            **dataclasses.asdict(result.ledger),
        }
        del engine
        gc.collect()
        return seconds

    first, *others = variants
    prefill(first)  # finds every program new
    before = prefill(first)
    ratios: dict[tuple[str, int], list[float]] = {variant: [] for variant in others}
    for variant in others * _TURNS.value:
        found = ratios[variant]
        if found and rows[variant]["prefill_s"] > _LONG.value:
            continue
        seconds, after = prefill(variant), prefill(first)
        found.append(2 * seconds / (before + after))
        rows[variant]["time"] = min(found)
        before = after
    return list(rows.values())


def operations(config: Qwen2Config, ledger: RoundLedger) -> float:
    """Operations of a prefill: products with the matrices of the layers, and attention."""
    token_layers, attended = (
        x * config.num_hidden_layers for x in (ledger.token_layers, ledger.attended)
    )
    q = config.num_attention_heads * config.head_dim
    return 2 * token_layers * config.layer_weights + 4 * attended * q


def _table(trace: Trace, rows: Sequence[dict[str, Any]]) -> Table:
    first = _name(rows[0])
    columns = "token-layers", "prefill s", "work", "operations", "time", "time / work"
    table = measure.table(
        "policy",
        *columns,
        "time / op.",
        title=f"{trace.name}, round {_ROUND.value}, {rows[0]['agents']} agents",
        caption=f"work: token-layers over those of {first}; operations, time: likewise",
    )
    for row in rows:
        work = row["token_layers"] / rows[0]["token_layers"]
        operated = row["operations"] / rows[0]["operations"]
        time = row["time"]
        table.add_row(
            _name(row),
            f"{row['token_layers']:,.0f}",
            f"{row['prefill_s']:.2f}",
            *(f"{ratio:.2f}" for ratio in (work, operated, time, time / work, time / operated)),
        )
    return table


def _name(row: dict[str, Any]) -> str:
    pages = row["head_pages"]
    return row["policy"] if pages is None else f"tokendance {f'head {pages}' if pages else 'none'}"


if __name__ == "__main__":
    app.run(main)

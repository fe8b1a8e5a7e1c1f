"""Times the prefill of one round under several policies, and compares time with work.

  python -m scripts.bench_round --model=model.gguf --trace=rounds.jsonl.gz --agents=5 --agents=25

Every policy first serves the rounds before the measured one, to fill its caches as in a run of the
whole trace. The table shows the ratio of two policies' times, and the ratio of their token-layers:
tokens times the layers that they ran through. Token-layers do not include attention, which costs
more for a row at the end of a long prompt than for one in the middle; the table therefore also
shows the ratio of all operations.

A machine may be a third slower half an hour later, so each policy is timed between two runs of the
first policy, and its time is divided by the mean of these two. Times leave out compilation. A
program's first execution is slower than later ones, so the minimum over several turns counts. A
long prefill runs its programs many times in one turn, so it is timed once.
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
from tokendance_jax.engine.result import RoundLedger
from tokendance_jax.engine.rounds import RoundEngine
from tokendance_jax.model import Model
from tokendance_jax.models.decoder.config import DecoderConfig
from tokendance_jax.policy.policies import POLICIES, PolicyOptions
from tokendance_jax.prompt import PromptError, Trace

_MODEL = flags.DEFINE_string("model", common.DEMO, "Model, as for serve_round.")
_TRACE = flags.DEFINE_string("trace", common.DEMO, "Trace, as for serve_round.")
_TRACE_NAME = flags.DEFINE_string("trace_name", None, "Trace of a file, as for serve_round.")
_ROUND = flags.DEFINE_integer("round", 1, "Number of the round to measure, from 0.", lower_bound=0)
_AGENTS = flags.DEFINE_multi_integer(
    "agents", [0], "Numbers of agents to measure, the first of the round; 0: all.", lower_bound=0
)
_POLICY = flags.DEFINE_multi_enum(
    "policy",
    ["tokendance", "epic", "blend", "blend-batched", "prefix", "dense"],
    POLICIES,
    "Policies to measure; all are compared with the first.",
)
_HEAD_PAGES = flags.DEFINE_multi_integer(
    "head_pages",
    [0, common.HEAD_PAGES],
    "Numbers of head pages of tokendance to measure; 0: no head.",
    lower_bound=0,
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Precision of weights and KV."
)
_ROW_BUDGET = flags.DEFINE_integer(
    "row_budget", 2048, "Maximum number of rows that one prefill call computes.", lower_bound=1
)
_TURNS = flags.DEFINE_integer(
    "turns", 2, "How often each policy is timed; the minimum counts.", lower_bound=1
)
_LONG = flags.DEFINE_float("long", 20, "Seconds of prefill above which a policy is timed once.")
_JSON = flags.DEFINE_string("json", None, "JSON file to write the results to.")


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
    """Times the prefill of a trace's last round under all policies, in turns.

    Args:
      model: the model.
      trace: the rounds up to the measured one, with answers of one token.

    Returns:
      For each policy its name, the minimum seconds of prefill, `time` (seconds of prefill over the
      mean of the first policy's before and after), its operations, and the fields of its ledger.
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
        # The dense policy keeps nothing between rounds, so it needs only the last one.
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
    prefill(first)  # not timed: the first execution of its programs
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


def operations(config: DecoderConfig, ledger: RoundLedger) -> float:
    """Counts the operations of a prefill: products with the layers' matrices, and attention."""
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

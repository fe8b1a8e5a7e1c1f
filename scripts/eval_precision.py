"""Measures what precision costs: a model's logits in float32 and in bfloat16, teacher-forced.

  python -m scripts.eval_precision --model=model.gguf --trace=rounds.jsonl

The reference is the dense policy in float32, along a trace's prompts and their recorded answers.
The first row of the table compares float32 with itself in another bucket of rows. It is the noise
floor of the arithmetic: differences below it mean nothing.
"""

import dataclasses
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import app, flags
from rich.console import Console

from scripts.helpers import common, measure
from tokendance_jax.engine.rounds import RoundEngine
from tokendance_jax.prompt import Trace, tokenize_round
from tokendance_jax.study.quality import agreement
from tokendance_jax.study.scoring import score

_MODEL = flags.DEFINE_string("model", common.DEMO, "Model, as for serve_round.")
_TRACE = flags.DEFINE_string("trace", common.DEMO, "Trace, as for serve_round.")
_TRACE_NAME = flags.DEFINE_string("trace_name", None, "Trace of a file, as for serve_round.")
_ROUNDS = flags.DEFINE_integer(
    "rounds", 3, "Number of rounds, from the first on; 0: all.", lower_bound=0
)
_AGENTS = flags.DEFINE_integer(
    "agents", 4, "Number of agents in each round, from the first on; 0: all.", lower_bound=0
)
_TOKENS = flags.DEFINE_integer(
    "tokens", 64, "Maximum number of tokens of each recorded answer to compare.", lower_bound=1
)
_JSON = flags.DEFINE_string("json", None, "JSON file to write the results to.")


def main(argv: Sequence[str]) -> int:
    """Measures and prints; returns the exit status."""
    return measure.run(argv, _measure, json=_JSON.value)


def _measure(console: Console) -> Iterator[dict[str, Any]]:
    trace = common.cut_trace(
        common.trace_of(_TRACE.value, _TRACE_NAME.value),
        rounds=_ROUNDS.value,
        agents=_AGENTS.value,
        max_new_tokens=0,
    )
    variants = {
        "float32": ("float32", "float32", 2048),
        "float32, rows in smaller calls": ("float32", "float32", 256),
        "float32, KV in bfloat16": ("float32", "bfloat16", 2048),
        "bfloat16": ("bfloat16", "bfloat16", 2048),
    }
    columns = "positions", "mean KL", "p95 KL", "top-1"
    table = measure.table("against dense float32", *columns)
    reference: list[np.ndarray] = []
    rows = []
    for name, (dtype, kv_dtype, row_budget) in variants.items():
        console.print(f"Computing: {name}")
        logits = _logits(trace, dtype, kv_dtype, row_budget)
        if name == "float32":
            reference = logits
            continue
        result = agreement(reference, logits)
        rows.append({"variant": name, **dataclasses.asdict(result)})
        yield {"trace": trace.name, "precision": rows}
        table.add_row(
            name,
            str(result.positions),
            f"{result.kl_mean:.2e}",
            f"{result.kl_p95:.2e}",
            f"{result.top1:.4f}",
        )
    console.print(table)


def _logits(trace: Trace, dtype: str, kv_dtype: str, row_budget: int) -> list[np.ndarray]:
    """Computes the logits at the tokens of all recorded answers, round by round."""
    model = common.model_of(_MODEL.value, dtype)
    engine = RoundEngine(model, policy="dense", kv_dtype=kv_dtype, row_budget=row_budget)
    found = []
    for round_ in trace.rounds:
        prompts = tokenize_round(round_, model.tokenizer, chat=False)
        answers = common.recorded_answers(round_, model.tokenizer, most=_TOKENS.value)
        found += score(engine, prompts, answers)[0]
    del engine, model
    gc.collect()
    return found


if __name__ == "__main__":
    app.run(main)

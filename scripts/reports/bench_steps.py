"""Measures what the host does in each step of the engine.

Sequences of a round share a text, and their answers end at different lengths, so that the engine
makes its tables anew again and again. `host` is the part of a decode call in which the device waits
for the host: planning, growing tables, packing arguments, reading tokens, building texts.

    python -m scripts.reports.bench_steps --model=0.5B --dtype=bfloat16
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import app, flags
from rich.console import Console

from scripts.helpers import common, measure
from tokendance_jax.engine.engine import Engine
from tokendance_jax.model import Model
from tokendance_jax.prompt import AgentPrompt, Round, Sampling, Segment

_MODEL = flags.DEFINE_string(
    "model", "0.5B", "Model to time: a published size with random weights, or as for serve_round."
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["float32", "bfloat16"], "Precision of weights and KV."
)
_SEQUENCES = flags.DEFINE_multi_integer(
    "sequences", [25, 100], "Numbers of sequences that decode together.", lower_bound=1
)
_SHARED = flags.DEFINE_integer("shared", 1024, "Tokens that all prompts share.", lower_bound=1)
_OWN = flags.DEFINE_integer("own", 64, "Further tokens of each prompt.", lower_bound=2)
_ANSWER = flags.DEFINE_integer("answer", 64, "Tokens of the longest answer.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", 8, "Tokens per sequence and decode call.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "JSON file to write the results to.")


@dataclasses.dataclass(frozen=True)
class Steps:
    """Decode calls of an engine: their number, and seconds of all of them.

    Attributes:
      sequences: sequences at the beginning.
      calls: decode calls.
      call_s: seconds of the calls.
      host_s: seconds of them in which the host did not wait for the device.
    """

    sequences: int
    calls: int
    call_s: float
    host_s: float


def main(argv: Sequence[str]) -> int:
    """Measures and prints; returns the exit status."""
    return measure.run(argv, _measure, json=_JSON.value)


def _measure(console: Console) -> Iterator[dict[str, Any]]:
    model = common.sized_model(_MODEL.value, _DTYPE.value)
    found: list[Steps] = []
    for sequences in _SEQUENCES.value:
        found.append(time_steps(model, sequences))
        yield {"steps": [dataclasses.asdict(steps) for steps in found]}
    table = measure.table("sequences", "calls", "call,\nms", "host,\nms", "host,\n%")
    for steps in found:
        table.add_row(
            str(steps.sequences),
            str(steps.calls),
            f"{1e3 * steps.call_s / steps.calls:.1f}",
            f"{1e3 * steps.host_s / steps.calls:.2f}",
            f"{100 * steps.host_s / steps.call_s:.1f}",
        )
    console.print(table)


def time_steps(model: Model, sequences: int) -> Steps:
    """Serves a round twice, compiles in the first, and measures the decode calls of the second."""
    engine = Engine(
        model,
        kv_memory=_pool_bytes(model, sequences),
        max_agents=sequences,
        decode_steps=_STEPS.value,
    )
    found = engine.counters
    for seed in range(2):
        handle = engine.add(_round(model, sequences, seed), chat=False)
        while any(sequence.status != "running" for sequence in handle.sequences):
            engine.step()
        before = engine.counters
        while not engine.idle:
            engine.step()
        found = engine.counters - before
    return Steps(sequences, found.decode_calls, found.decode_s, found.host_s)


def _round(model: Model, sequences: int, seed: int) -> Round:
    """A round of random tokens, with answers of random lengths."""
    draw = np.random.default_rng(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.integers(0, model.config.vocab_size, count).tolist())

    shared = Segment("shared", "shared", token_ids=tokens(_SHARED.value))
    half = _OWN.value // 2
    agents = tuple(
        AgentPrompt(
            f"agent {index}",
            (
                Segment("system", f"system/{index}", token_ids=tokens(half)),
                shared,
                Segment("task", f"task/{index}", token_ids=tokens(_OWN.value - half)),
            ),
            max_new_tokens=int(draw.integers(_ANSWER.value // 2, _ANSWER.value + 1)),
        )
        for index in range(sequences)
    )
    return Round(agents, sampling=Sampling(ignore_eos=True))


def _pool_bytes(model: Model, sequences: int) -> int:
    """Bytes of a pool in which every sequence has its longest prompt to itself."""
    page = model.kv_spec(pages=1, page_size=16).page_bytes
    each = -(-(_OWN.value + _ANSWER.value) // 16) + 16
    return page * 2 * (sequences * each + _SHARED.value // 16 + 32)


if __name__ == "__main__":
    app.run(main)

"""Reports on whole programs of rounds, compiled for accelerators that need not be present.

  python -m scripts.reports.program_report --model=7B --model=14B --agents=25 --agents=50

The programs are compiled from shapes alone. For prefill and decode, the report shows what fills
the device's memory, and the part of the pool that the round needs; the operations and bytes of a
prefill call and of a decode step; and the time that both take at the target's published rate and
bandwidth. That time is a bound, not a measurement. XLA cannot count the work of the attention
kernels; for them, the report counts what the round needs. Needs the `aot` extra.
"""

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any

# Otherwise the compilers look for devices, and complain that there are none.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from absl import app, flags
from rich import box
from rich.table import Table

from scripts.helpers import common, terminal
from tokendance_jax import targets
from tokendance_jax.engine.ahead import NAMES, RoundSize, compile_round
from tokendance_jax.models.families.qwen2 import preset

_MODEL = flags.DEFINE_multi_string(
    "model", ["7B", "14B"], "Published model sizes of the programs, such as '7B'."
)
_TARGET = flags.DEFINE_multi_enum(
    "target", ["h100"], list(targets.TARGETS), "Accelerators to compile for."
)
_AGENTS = flags.DEFINE_multi_integer(
    "agents", [10, 25, 50], "Numbers of agents in the round.", lower_bound=1
)
_PROGRAM = flags.DEFINE_multi_enum("program", list(NAMES), list(NAMES), "Programs to compile.")
_SHARED = flags.DEFINE_integer(
    "shared", 2048, "Number of tokens that all agents share.", lower_bound=1
)
_OWN = flags.DEFINE_integer("own", 256, "Number of tokens of each agent's own text.", lower_bound=1)
_ANSWER = flags.DEFINE_integer(
    "answer", 256, "Maximum number of tokens of an answer.", lower_bound=1
)
_ROWS = flags.DEFINE_integer(
    "row_budget", 2048, "Number of rows that one prefill call computes.", lower_bound=64
)
_KV = flags.DEFINE_string(
    "kv_memory",
    None,
    "Size of the KV pool in bytes, KiB, MiB or GiB, such as '40GiB'; default: the memory that "
    "weights and a reserve leave.",
)
_JSON = flags.DEFINE_string("json", None, "JSON file to write the results to.")


def main(argv: Sequence[str]) -> int:
    """Compiles and prints; returns the exit status: 0, or 1 after an error."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    common.quiet_logs()
    console = terminal.console(width=140)  # as wide as the Markdown
    rows: list[dict[str, Any]] = []
    try:
        common.check_json_path(_JSON.value)
        kv_memory = None if _KV.value is None else common.parse_bytes(_KV.value)
        for name in _TARGET.value:
            found = [
                report(program, model, targets.TARGETS[name], agents, kv_memory)
                for model in _MODEL.value
                for agents in _AGENTS.value
                for program in _PROGRAM.value
            ]
            console.print(_table(name, found))
            for row in found:
                if "refused" in row:
                    refused = f"{row['model']} {row['program']}: {row['refused']}"
                    console.print(terminal.markup(refused))
            rows += found
            if _JSON.value:
                common.write_json(_JSON.value, {"programs": rows})
    except common.ERRORS as error:
        terminal.complain("program_report", error)
        return 1
    if _JSON.value:
        console.print(f"Written: {terminal.markup(_JSON.value)}")
    return 0


def report(
    program: Any, model: str, target: targets.Target, agents: int, kv_memory: int | None
) -> dict[str, Any]:
    """Compiles one program.

    Returns:
      The fields of `Compiled`, the processor time of compilation, and `bound_s`. If the program
      does not fit the device, `refused` in place of these fields has the reason.
    """
    size = RoundSize(agents, _SHARED.value, _OWN.value, _ANSWER.value)
    row = {"program": program, "model": model, "target": target.name, "agents": agents}
    started = time.process_time()
    try:
        compiled = compile_round(
            program,
            preset(model),
            target,
            size,
            kv_memory=kv_memory,
            row_budget=_ROWS.value,
        )
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        return row | {"refused": str(error).splitlines()[0]}
    seconds = time.process_time() - started
    bound = None
    if compiled.moved is not None and compiled.operations is not None:
        bound = max(compiled.moved / target.bandwidth, compiled.operations / target.rate)
    return row | dataclasses.asdict(compiled) | {"compile_s": seconds, "bound_s": bound}


def _table(target: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"Programs on {target}", box=box.MARKDOWN, show_edge=True)
    for column in ("program", "model"):
        table.add_column(column, no_wrap=True)
    columns = {
        "agents": ("agents", 1, 0),
        "rows": ("rows", 1, 0),
        "weights GB": ("weights", 1e9, 1),
        "pool GB": ("pool", 1e9, 1),
        "the round's": ("round_pool", 1e9, 2),
        "temporaries": ("temporaries", 1e9, 2),
        "in all GB": ("memory", 1e9, 1),
        "TFLOP": ("operations", 1e12, 2),
        "GB moved": ("moved", 1e9, 1),
        "bound ms": ("bound_s", 1e-3, 1),
        "compiled s": ("compile_s", 1, 0),
    }
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        numbers = [
            "-" if row.get(name) is None else f"{row[name] / scale:,.{digits}f}"
            for name, scale, digits in columns.values()
        ]
        table.add_row(row["program"], row["model"], *numbers)
    return table


if __name__ == "__main__":
    app.run(main)

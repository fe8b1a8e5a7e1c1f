"""Whole programs of rounds, compiled for accelerators that need not be present, from shapes alone.

  python -m scripts.reports.program_report --model=7B --model=14B --agents=25 --agents=50

For prefill and decode: what fills the device's memory, beside what the round needs of the pool; the
operations and bytes of a prefill call and of a decode step; and the time that both would take at
the target's published rate and bandwidth. That time is a bound, not a measurement. XLA knows
nothing of what the attention kernels do: of them, what the round needs is counted. Needs the `aot`
extra.
"""

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any

# The compilers would look for devices, and complain that there are none.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from absl import app, flags
from rich import box
from rich.table import Table

from scripts.helpers import common, terminal
from tokendance_jax import targets
from tokendance_jax.engine.ahead import NAMES, RoundSize, compile_round
from tokendance_jax.models.qwen2.config import Qwen2Config

_MODEL = flags.DEFINE_multi_string("model", ["7B", "14B"], "Published sizes; repeat.")
_TARGET = flags.DEFINE_multi_enum("target", ["h100"], list(targets.TARGETS), "Targets; repeat.")
_AGENTS = flags.DEFINE_multi_integer("agents", [10, 25, 50], "Agents; repeat.", lower_bound=1)
_PROGRAM = flags.DEFINE_multi_enum("program", list(NAMES), list(NAMES), "Programs; repeat.")
_SHARED = flags.DEFINE_integer("shared", 2048, "Tokens that all agents share.", lower_bound=1)
_OWN = flags.DEFINE_integer("own", 256, "Tokens of each agent's own.", lower_bound=1)
_ANSWER = flags.DEFINE_integer("answer", 256, "Most tokens of an answer.", lower_bound=1)
_ROWS = flags.DEFINE_integer("row_budget", 2048, "Rows of a prefill call.", lower_bound=64)
_KV = flags.DEFINE_string("kv_memory", None, "Size of the pool, such as 40GiB; all that is left.")
_JSON = flags.DEFINE_string("json", None, "File to write the results to.")


def main(argv: Sequence[str]) -> int:
    """Compiles and prints; returns the exit status: 0, or 1 after an error."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    common.quiet_logs()
    console = terminal.console(width=140)  # Markdown, as wide as it is
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
      The fields of `Compiled`, processor time of compilation, and `bound_s`; or, where the program
      does not fit the device, why as `refused`.
    """
    size = RoundSize(agents, _SHARED.value, _OWN.value, _ANSWER.value)
    row = {"program": program, "model": model, "target": target.name, "agents": agents}
    started = time.process_time()
    try:
        compiled = compile_round(
            program,
            Qwen2Config.preset(model),
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

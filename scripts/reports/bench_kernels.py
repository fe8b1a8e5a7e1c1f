"""Times the kernels on the device that is present, and other ways to do the same work.

  python -m scripts.reports.bench_kernels
  python -m scripts.reports.bench_kernels --model=7B --kernel=decode_attention --dtype=bfloat16

Each implementation of a kernel is timed, including XLA code, and JAX's own Pallas ops where they
can do the work. Values are checked first: a way whose values differ from the reference is not
timed. All ways of a kernel are timed in turns, and ratios are medians over the turns. Bytes are the
minimum that any way could move in one call. Bytes and operations per second are also shown as
shares of the device's published bandwidth and rate where these are known. A kernel that reads one
layer is called for all layers, one after another.
"""

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import app, flags
from rich.console import Console
from rich.table import Table

from scripts.helpers import measure, terminal
from scripts.reports import kernel_report
from scripts.reports.kernel_subjects import SUBJECTS, Program, Subject
from scripts.reports.kernel_work import Work
from tokendance_jax import targets
from tokendance_jax.kernels.dispatch import IMPLEMENTATIONS
from tokendance_jax.kernels.lanes import KEY_BLOCK
from tokendance_jax.models.families.qwen2 import preset
from tokendance_jax.plan.shapes import PACKING

FLAGS = flags.FLAGS
# kernel_report defines the flags for the sizes of a round, and counts bytes and operations.
for _name in ("model", "dtype", "agents", "shared", "own", "rows", "page_size", "json"):
    flags.declare_key_flag(_name)
FLAGS.set_default("model", ["0.5B"])
FLAGS.set_default("rows", [128])
_KERNEL = flags.DEFINE_multi_enum("kernel", list(SUBJECTS), list(SUBJECTS), "Kernels to time.")
_IMPLEMENTATION = flags.DEFINE_multi_enum(
    "implementation",
    None,
    [name for name in IMPLEMENTATIONS if name != "interpret"],
    "Implementations to time; default: XLA code and the kernels for the device.",
)
_LAYERS = flags.DEFINE_integer(
    "layers", 0, "Number of layers of the pool; 0: as many as the model has.", lower_bound=0
)
_TURNS = flags.DEFINE_integer(
    "turns", 5, "How often each implementation is timed; the median counts.", lower_bound=1
)

# The largest allowed difference from the reference, divided by the reference's largest number.
# bfloat16 rounds a number of the pool by up to 2**-9, a rotated key once more, and likewise the
# queries and weights that it is multiplied with. Tensor cores take a float32 number as two planes
# of bfloat16, whose products are accurate to about 2**-16.
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}


class WrongValues(ValueError):
    """The values of a kernel are not those of its reference."""


def main(argv: Sequence[str]) -> int:
    """Times and prints; returns the exit status: 0, or 1 after an error."""
    return measure.run(argv, _measure, json=FLAGS.json, width=110)


def _measure(console: Console) -> Iterator[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    for size in FLAGS.model:
        config = preset(size)
        layers = min(_LAYERS.value, config.num_hidden_layers) or config.num_hidden_layers
        config = dataclasses.replace(config, num_hidden_layers=layers)
        for dtype in FLAGS.dtype:
            shared, own = (-(-x // KEY_BLOCK) * KEY_BLOCK for x in (FLAGS.shared, FLAGS.own))
            each, page_size = FLAGS.rows[0], int(FLAGS.page_size)
            work = Work(config, dtype, page_size, FLAGS.agents, shared, own, each)
            # The report has one case for each number of rows; the first is timed here.
            cases = {}
            packing = PACKING.get(jax.default_backend())
            for case in kernel_report.cases(config, dtype, packing=packing):
                cases.setdefault(case["name"].partition(",")[0], case)
            found: list[dict[str, Any]] = []
            for kernel in dict.fromkeys(_KERNEL.value):
                subject = SUBJECTS[kernel](work, cases)
                timed = time_subject(subject, _implementations(), TOLERANCE[dtype], _TURNS.value)
                names = {"kernel": kernel, "model": size, "dtype": dtype}
                found += [names | row for row in timed]
            _print(console, found)
            rows += found
            wrong += [
                f"{row['kernel']} by {row['implementation']}"
                for row in found
                if row["wrong"] and row["implementation"] in IMPLEMENTATIONS
            ]
            if not wrong:
                yield {"device": jax.devices()[0].device_kind, "kernels": rows}
    if wrong:
        raise WrongValues(f"{', '.join(wrong)}: not the values of the reference; no time is shown")


def _implementations() -> list[str]:
    platform = {"gpu": ["mosaic_gpu"], "tpu": ["mosaic_tpu"]}.get(jax.default_backend(), [])
    return _IMPLEMENTATION.value or ["xla", *platform]


def time_subject(
    subject: Subject, implementations: Sequence[str], tolerance: float, turns: int
) -> list[dict[str, Any]]:
    """Checks all ways to do a kernel's work, and times those whose values are right.

    Args:
      subject: the kernel and its work.
      implementations: the implementations to time.
      tolerance: the largest error of right values.
      turns: how often each way is timed.

    Returns:
      For each way its name, its error, the seconds of a call in every turn, and the median over the
      turns of the ratio of its time to that of the first way. For a way that was not timed, the
      reason, and whether its values are wrong.
    """
    rows, ready = [], []
    ways = [name for name in implementations if name in subject.implementations]
    for name in [*ways, *subject.rivals]:
        row: dict[str, Any] = {"implementation": name, "what": subject.what}
        row |= {"reason": None, "wrong": False}
        rows.append(row)
        error, program = _checked(subject, name)
        if isinstance(program, str):
            row["reason"] = program
        elif error <= tolerance:  # false if the error is NaN
            row["error"] = error
            ready.append((row, program))
        else:
            row |= {"reason": f"wrong values: an error of {error:.1e}", "wrong": True}
    calls = [program.timed for _, program in ready]
    seconds = measure.in_turns(calls, turns=turns, parts=subject.calls)
    for (row, _), found in zip(ready, seconds, strict=True):
        pairs = zip(found, seconds[0], strict=True)
        median = statistics.median(found)
        row |= {
            "seconds": found,
            "ratio": statistics.median(mine / first for mine, first in pairs),
            "bytes": subject.bytes,
            "operations": subject.operations,
            "bytes_per_s": subject.bytes / median,
            "operations_per_s": subject.operations / median,
        }
    return rows


def _checked(subject: Subject, name: str) -> tuple[float, Program | str]:
    """Returns the error of a way to do the work and its program, or 0 and why it can't do it."""
    rival = subject.rivals.get(name)
    if isinstance(rival, str):
        return 0.0, rival
    # JAX's ops raise errors of any kind for arguments that they do not support.
    unfit = NotImplementedError if rival is None else Exception
    try:
        program = subject.program(name) if rival is None else rival()
        return subject.error(jax.block_until_ready(program.check())), program
    except unfit as error:
        return 0.0, f"{type(error).__name__}: {error}".splitlines()[0]


def _print(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    console.print(_table(rows))
    for row in rows:
        if row["reason"]:
            name = f"{row['kernel']}, {row['implementation']}"
            console.print(terminal.markup(f"{name}: {row['reason']}"))


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    present, device = targets.present(), jax.devices()[0].device_kind
    bandwidth = present.bandwidth if present else None
    # The published rate holds for bfloat16 products.
    rate = present.rate if present and rows[0]["dtype"] == "bfloat16" else None
    model, dtype = rows[0]["model"], rows[0]["dtype"]
    columns = "ms", "/ first", "GB/s", "of peak", "GFLOP/s", "of peak", "error"
    title = f"{model}, {dtype}, on {device}: one call"
    table = measure.table("kernel", "by", *columns, title=title)

    def share(value: float, most: float | None) -> str:
        return "-" if most is None else f"{value / most:.0%}"

    for row in rows:
        if row["reason"]:
            continue
        table.add_row(
            row["kernel"],
            row["implementation"],
            f"{1e3 * statistics.median(row['seconds']):,.3f}",
            f"{row['ratio']:.2f}",
            f"{row['bytes_per_s'] / 1e9:,.1f}",
            share(row["bytes_per_s"], bandwidth),
            f"{row['operations_per_s'] / 1e9:,.1f}",
            share(row["operations_per_s"], rate),
            f"{row['error']:.1e}",
        )
    return table


if __name__ == "__main__":
    app.run(main)

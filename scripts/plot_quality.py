"""Plots quality against work from files that eval_quality wrote, one column of plots per file.

python -m scripts.eval_quality --trace=rounds.jsonl.gz --json=rounds.json
python -m scripts.plot_quality --out=quality.png --kl=0.02 --top1=0.97 rounds.json others.json
"""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from scripts.helpers import common, terminal
from scripts.helpers.pareto import Rows, plot

_OUT = flags.DEFINE_string("out", "quality.png", "PNG file to write.")
_KL = flags.DEFINE_float(
    "kl", None, "Mean KL, in nats, at which to draw a horizontal line, such as a target."
)
_TOP1 = flags.DEFINE_float(
    "top1", None, "Top-1 agreement, from 0 to 1, at which to draw a horizontal line."
)


def main(argv: Sequence[str]) -> int:
    """Plots the files in `argv`; returns the exit status: 0, or 1 after an error."""
    if len(argv) < 2:
        raise app.UsageError("name at least one file that eval_quality --json wrote")
    try:
        common.check_file(_OUT.value, "out")
        plot([read(Path(name)) for name in argv[1:]], _OUT.value, kl=_KL.value, top1=_TOP1.value)
    except common.ERRORS as error:
        terminal.complain(Path(argv[0]).stem, error)
        return 1
    terminal.console().print(f"Written: {terminal.markup(_OUT.value)}", soft_wrap=True)
    return 0


def read(path: Path) -> Rows:
    """Reads the rows of a file; the first one is the dense policy's.

    Raises:
      OSError: the file can't be read.
      ValueError: the file holds no comparison with dense along a trace.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["policies"]
        if rows[0]["policy"] == "dense" and all("kl_mean" in row for row in rows):
            return rows
    except (ValueError, KeyError, IndexError, TypeError):
        pass
    raise ValueError(f"{path}: not what eval_quality --json writes for a trace")


if __name__ == "__main__":
    app.run(main)

"""Plots of quality against work."""

from collections.abc import Sequence
from typing import Any

from tokendance_jax.study.variants import NOISE, SHUFFLED

# The rows that eval_quality writes for a trace; the first one is the dense policy's.
Rows = Sequence[dict[str, Any]]


def plot(
    traces: Sequence[Rows], path: str, *, kl: float | None = None, top1: float | None = None
) -> None:
    """Plots mean KL and top-1 over token-layers, one line per policy and base; needs matplotlib.

    Args:
      traces: the rows of each trace, the dense policy's first.
      path: the PNG file to write.
      kl: mean KL, in nats, at which to draw a horizontal line.
      top1: top-1 agreement at which to draw a horizontal line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = 5 * len(traces), 7
    figure, axes = pyplot.subplots(2, len(traces), figsize=size, sharex="col", squeeze=False)
    for (upper, lower), rows in zip(axes.T, traces, strict=True):
        for label, points in lines(rows).items():
            work, names = [100 * x["work"] for x in points], [x["name"] for x in points]
            for axis, key in ((upper, "kl_mean"), (lower, "top1")):
                values = [x[key] for x in points]
                axis.plot(work, values, "o-", markersize=4, label=label)
                for x, y, name in zip(work, values, names, strict=True):
                    axis.annotate(name, (x, y), (3, 3), textcoords="offset points", fontsize=6)
        for axis, aim in ((upper, kl), (lower, top1)):
            if aim is not None:
                axis.axhline(aim, color="gray", linestyle=":")
        upper.set_yscale("log")
        upper.set_title(f"{rows[0]['trace']}, {rows[0]['positions']} positions", fontsize=9)
        lower.set_xlabel("token-layers, % of dense")
    axes[0, 0].set_ylabel("mean KL against dense, nats")
    axes[1, 0].set_ylabel("top-1 as dense")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def lines(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """Returns the points of each line, each with a short name, in the order of their work.

    Leaves out the rows that check the measurement, and rows with numbers that were not finite.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows[1:]:
        if row["policy"] in (NOISE, SHUFFLED, "dense") or None in (row["kl_mean"], row["top1"]):
            continue
        label = row["policy"] if row["base"] is None else f"{row['policy']}, {row['base']}"
        name = row["name"].removeprefix("tokendance ").split(",")[0]
        work = row["token_layers"] / rows[0]["token_layers"]
        found.setdefault(label, []).append({**row, "name": name, "work": work})
    return {label: sorted(points, key=lambda x: x["work"]) for label, points in found.items()}

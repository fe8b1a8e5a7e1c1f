"""Tables of graded probes."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from scripts.helpers import measure
from tokendance_jax.demo.town import GRADED
from tokendance_jax.study.probes import SETTINGS


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Makes one table of accuracies and their intervals per setting and round."""
    places = list(dict.fromkeys((row["setting"], row["round"]) for row in rows))
    drawn = []
    for place in places:
        kept = [row for row in rows if (row["setting"], row["round"]) == place]
        title = place[0] if SETTINGS[place[0]].rounds == 1 else f"{place[0]}, round {place[1]}"
        columns = [f"{kind}\n{kept[0]['asked'][kind]}" for kind in GRADED]
        table = measure.table("policy", *columns, "token-layers\nof dense", title=title)
        for row in kept:
            cells = [
                f"{row['probes'][kind]:.3f} {row['intervals'][kind][0]:.2f}-"
                f"{row['intervals'][kind][1]:.2f}"
                if kind in row["probes"]
                else "-"
                for kind in GRADED
            ]
            work = row["token_layers"] / kept[0]["token_layers"]
            table.add_row(row["name"], *cells, f"{work:.1%}")
        drawn.append(table)
    return drawn

"""How often a model's greedy answers to probes of the town are right."""

from pathlib import Path
from typing import Any

from tokendance_jax.demo.town import GRADED, probe_round
from tokendance_jax.engine.engine import RoundEngine
from tokendance_jax.model import load_model

SIZES = (2, 4, 8, 16)


def score(model: Path, *, rounds: int, dtype: str = "float32") -> dict[str, Any]:
    """Serves held-out rounds with the dense policy and grades the answers.

    Args:
      model: a folder that `load_model` takes.
      rounds: how many rounds of each size.
      dtype: precision of the engine.

    Returns:
      `probes`: kind to accuracy, over all sizes; `by_agents`: number of agents to the same;
      `asked`: kind to the number of probes.
    """
    engine = RoundEngine(load_model(model, dtype=dtype), policy="dense", kv_memory=256 << 20)
    right: dict[tuple[int, str], list[bool]] = {}
    for agents in SIZES:
        for seed in range(rounds):
            moment, asked = probe_round(seed, agents, GRADED, shuffled=True)
            answers = engine.serve(moment).texts
            for prompt, probe in zip(moment.agents, asked, strict=True):
                graded = right.setdefault((agents, probe.kind), [])
                graded.append(probe.right(answers[prompt.agent]))
    kinds = {
        kind: [hit for (_, k), hits in right.items() if k == kind for hit in hits]
        for kind in GRADED
    }
    return {
        "probes": {kind: _share(hits) for kind, hits in kinds.items()},
        "by_agents": {
            str(agents): {kind: _share(right.get((agents, kind), [])) for kind in GRADED}
            for agents in SIZES
        },
        "asked": {kind: len(hits) for kind, hits in kinds.items()},
    }


def table(found: dict[str, Any]) -> str:
    """What `score` found, as lines of text."""
    lines = ["agents  " + "".join(f"{kind:>10}" for kind in GRADED)]
    for name, row in [*found["by_agents"].items(), ("all", found["probes"])]:
        cells = [
            f"{row[kind]:>10.3f}" if row[kind] is not None else f"{'-':>10}" for kind in GRADED
        ]
        lines.append(f"{name:<8}" + "".join(cells))
    return "\n".join(lines)


def _share(hits: list[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None

"""Grades answers to probes of the town, under policies and in settings of rounds."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tokendance_jax.demo.town import (
    GRADED,
    GUIDE,
    Probe,
    ProbeKind,
    drifting_rounds,
    probe_round,
)
from tokendance_jax.engine.rounds import RoundEngine
from tokendance_jax.model import Model
from tokendance_jax.prompt import Round
from tokendance_jax.study.audit import shuffle_bases
from tokendance_jax.study.variants import SHUFFLED, Variant, audited

_PAGES = 2048
_CHUNK_WORDS = 12
_DRAWS, _BOUNDS = 1000, (0.025, 0.975)


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """How rounds of probes are drawn.

    Attributes:
      agents: number of agents.
      own: whether each agent sees its own block.
      keep: share of the other blocks that each agent sees.
      shuffled: whether each agent sees the blocks in an order of its own.
      chunk_words: if positive, blocks are chunks of this many words, cut in the middle of
        sentences.
      rounds: number of consecutive rounds; text shared in one round is history in the next.
    """

    agents: int
    own: bool = True
    keep: float = 1.0
    shuffled: bool = False
    chunk_words: int = 0
    rounds: int = 1

    def draw(
        self, seed: int, kinds: Sequence[ProbeKind], guide: str
    ) -> list[tuple[Round, tuple[Probe, ...]]]:
        """Draws consecutive rounds, with held-out names, and their probes."""
        if self.rounds > 1:
            return drifting_rounds(seed, self.agents, self.rounds, kinds, guide=guide)
        return [
            probe_round(
                seed,
                self.agents,
                kinds,
                own=self.own,
                keep=self.keep,
                shuffled=self.shuffled,
                guide=guide,
                chunk_words=self.chunk_words,
            )
        ]


SETTINGS = {
    "5 agents": Setting(5),
    "10 agents": Setting(10),
    "16 agents": Setting(16),
    "own omitted": Setting(10, own=False),
    "subset": Setting(10, keep=0.5),
    "shuffled": Setting(10, shuffled=True),
    "chunks": Setting(10, chunk_words=_CHUNK_WORDS),
    "drift": Setting(5, rounds=5),
}


class Graded:
    """Graded answers to probes, by kind and draw, and the work of their prompts.

    Attributes:
      token_layers: computed tokens times the share of the layers that each ran through.
    """

    def __init__(self) -> None:
        self.token_layers = 0.0
        self._draws: list[dict[str, list[bool]]] = []

    def add(self, probes: Sequence[Probe], answers: Sequence[str], token_layers: float) -> None:
        """Grades the answers of a round."""
        found = defaultdict(list)
        for probe, answer in zip(probes, answers, strict=True):
            found[probe.kind].append(probe.right(answer))
        self._draws.append(found)
        self.token_layers += token_layers

    def asked(self, kind: ProbeKind) -> int:
        """Returns the number of probes of a kind."""
        return sum(len(draw[kind]) for draw in self._draws)

    def accuracy(self, kind: ProbeKind) -> float:
        """Returns the share of right answers to a kind; NaN if there are no probes of it."""
        asked = self.asked(kind)
        return sum(sum(draw[kind]) for draw in self._draws) / asked if asked else float("nan")

    def interval(self, kind: ProbeKind) -> tuple[float, float]:
        """Returns the middle 95 % of the accuracy over bootstrap samples of the draws.

        The bootstrap resamples whole rounds, because probes of one round depend on the same text.
        """
        counts = np.array([(sum(draw[kind]), len(draw[kind])) for draw in self._draws])
        drawn = np.random.default_rng(0).integers(len(counts), size=(_DRAWS, len(counts)))
        right, asked = np.moveaxis(counts[drawn].sum(axis=1), 1, 0)
        low, high = np.quantile(right[asked > 0] / asked[asked > 0], _BOUNDS)
        return float(low), float(high)


def ask(
    engine: RoundEngine,
    setting: Setting,
    seeds: Sequence[int],
    *,
    kinds: Sequence[ProbeKind] = GRADED,
    guide: str = "",
    shuffle: bool = False,
) -> list[Graded]:
    """Serves rounds of probes and grades the answers.

    Args:
      engine: the engine that answers, with its policy.
      setting: how rounds are drawn.
      seeds: one seed per draw of rounds.
      kinds: kinds of probes.
      guide: text in front of every prompt.
      shuffle: whether to shuffle the bases' pages before the answers are generated (an audit).

    Returns:
      The graded answers of every round of the setting, over all draws.
    """
    found = [Graded() for _ in range(setting.rounds)]
    for seed in seeds:
        for graded, (round_, probes) in zip(found, setting.draw(seed, kinds, guide), strict=True):
            round_ = dataclasses.replace(
                round_, sampling=dataclasses.replace(round_.sampling, stop=("\n",))
            )
            result = engine.serve(round_, chat=True)
            work = result.ledger.token_layers
            if shuffle:
                shuffle_bases(engine, seed)
                result = engine.serve(round_, chat=True)
            graded.add(probes, [result.texts[p.agent] for p in round_.agents], work)
    return found


def measure_variants(
    model: Model,
    variants: Sequence[Variant],
    settings: Sequence[str],
    *,
    draws: int,
    guided: bool = False,
    audit: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Grades every variant in every setting, with a new engine for each pair.

    Args:
      model: the model.
      variants: the variants to measure; `dense` is always measured first.
      settings: names of `SETTINGS`.
      draws: number of draws of rounds.
      guided: whether prompts explain the town, for a model that was not trained on it.
      audit: whether to measure the first variant that reads bases again, with shuffled bases.
      progress: called with a description of each measurement before it starts.

    Yields:
      After each variant and setting, the rows so far: one per variant, setting and round.
    """
    dense = Variant("dense")
    others = [variant for variant in variants if variant.policy != "dense"]
    todo = [(variant.name, variant) for variant in (dense, *others)]
    if audit and (collective := audited(variants)) is not None:
        todo.append((SHUFFLED, collective))
    memory = _PAGES * model.kv_spec(pages=1, page_size=16).page_bytes
    programs = None
    rows: list[dict[str, Any]] = []
    for (name, variant), setting in itertools.product(todo, settings):
        if progress:
            progress(f"{setting}: {name}")
        # Settings share their towns: with a new engine, none finds pages of another setting.
        engine = RoundEngine(
            model,
            policy=variant.policy,
            options=variant.options,
            kv_memory=memory,
            max_agents=16,
            programs=programs,
        )
        programs = engine.programs
        graded = ask(
            engine,
            SETTINGS[setting],
            range(draws),
            guide=GUIDE if guided else "",
            shuffle=name == SHUFFLED,
        )
        rows += [{**row, **variant.choices, "name": name} for row in _rows(setting, graded)]
        yield rows


def _rows(setting: str, graded: Sequence[Graded]) -> Iterator[dict[str, Any]]:
    for index, found in enumerate(graded):
        yield {
            "setting": setting,
            "round": index,
            "agents": SETTINGS[setting].agents,
            "probes": {kind: found.accuracy(kind) for kind in GRADED if found.asked(kind)},
            "intervals": {kind: found.interval(kind) for kind in GRADED if found.asked(kind)},
            "asked": {kind: found.asked(kind) for kind in GRADED},
            "token_layers": found.token_layers,
        }

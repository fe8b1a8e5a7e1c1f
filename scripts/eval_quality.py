"""Measures what KV reuse costs in quality, and what it saves in work.

  python -m scripts.eval_quality --model=model.gguf --trace=rounds.jsonl.gz --rounds=1
  python -m scripts.eval_quality --policy=tokendance --selection=head --head_pages=2 --head_pages=8

For every round of a trace, each prompt gets a continuation: by default the dense policy samples it
(see `--continuation`). Along these texts, the next-token distributions of every other policy are
compared with those of the dense policy (teacher forcing). Two checks of the measurement itself are
reported too: the noise floor (dense against itself, with rows in other buckets) and the audit
(bases whose pages are in a wrong order, which must score far worse).

  python -m scripts.eval_quality --probes --draws=40 --setting='10 agents' --json=probes.json

With `--probes`, agents are asked questions about the demo's town that have one right answer each,
and the answers are graded. A model that was not trained in the town needs `--guide`.
"""

import dataclasses
import gc
import importlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from scripts.helpers import common, measure, pareto, probe_tables, terminal
from tokendance_jax import host
from tokendance_jax.engine.compiling import Programs
from tokendance_jax.engine.rounds import RoundEngine
from tokendance_jax.model import Model
from tokendance_jax.policy.policies import BASES, POLICIES, SELECTIONS, PolicyOptions
from tokendance_jax.prompt import (
    PromptError,
    Round,
    Sampling,
    TokenizedPrompt,
    Trace,
    tokenize_round,
)
from tokendance_jax.study import probes
from tokendance_jax.study.audit import shuffle_bases
from tokendance_jax.study.quality import Comparison, compare, summarise
from tokendance_jax.study.scoring import follow, logits, score
from tokendance_jax.study.variants import NOISE, SHUFFLED, UNLIMITED, Variant, audited

_MODEL = flags.DEFINE_string("model", common.DEMO, "Model, as for serve_round.")
_TRACE = flags.DEFINE_string("trace", common.DEMO, "Trace, as for serve_round.")
_TRACE_NAME = flags.DEFINE_string("trace_name", None, "Trace of a file, as for serve_round.")
_FIRST_ROUND = flags.DEFINE_integer(
    "first_round", 1, "Number of the first round to measure, from 0.", lower_bound=0
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 0, "Number of rounds to measure; 0: all that follow.", lower_bound=0
)
_AGENTS = flags.DEFINE_integer(
    "agents", 4, "Number of agents in each round, from the first on; 0: all.", lower_bound=0
)
_TOKENS = flags.DEFINE_integer(
    "tokens", 32, "Maximum number of tokens of each continuation.", lower_bound=1
)
_CONTINUATION = flags.DEFINE_enum(
    "continuation",
    "sampled",
    ["sampled", "greedy", "recorded"],
    "Texts along which to compare. 'sampled': drawn by the dense policy at temperature 1; "
    "'greedy': the dense policy's greedy answers; 'recorded': the recorded answers of the trace.",
)
_POLICY = flags.DEFINE_multi_enum(
    "policy", ["blend", "epic", "tokendance"], POLICIES, "Policies to measure."
)
_BASE = flags.DEFINE_multi_enum(
    "base", ["joint"], BASES, "Bases of tokendance to measure, as for serve_round."
)
_SELECTION = flags.DEFINE_multi_enum(
    "selection",
    ["none", "head"],
    list(SELECTIONS),
    "Selections of tokendance to measure, as for serve_round.",
)
_HEAD_PAGES = flags.DEFINE_multi_integer(
    "head_pages",
    [common.HEAD_PAGES],
    "Numbers of pages that --selection chooses, as for serve_round.",
    lower_bound=0,
)
_PREAMBLE = flags.DEFINE_string("preamble", None, common.PREAMBLE_HELP)
_BLEND_RATIO = flags.DEFINE_float(
    "blend_ratio",
    0.15,
    "Share of shared tokens, from 0 to 1, that 'blend' and 'blend-batched' recompute.",
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Precision of weights and KV."
)
_ROW_BUDGET = flags.DEFINE_integer(
    "row_budget", 2048, "Maximum number of rows that one prefill call computes.", lower_bound=4
)
_PROBES = flags.DEFINE_bool(
    "probes", False, "Whether to grade answers to probes of the town, in place of a trace."
)
_SETTING = flags.DEFINE_multi_enum(
    "setting",
    list(probes.SETTINGS),
    list(probes.SETTINGS),
    "With --probes: kinds of rounds to draw.",
)
_DRAWS = flags.DEFINE_integer(
    "draws", 20, "With --probes: number of draws in each setting.", lower_bound=1
)
_GUIDE = flags.DEFINE_bool("guide", False, "With --probes: whether prompts explain the town.")
_AUDIT = flags.DEFINE_bool(
    "audit", True, "Whether to also measure bases whose pages are in a wrong order."
)
_PLOT = flags.DEFINE_string("plot", None, "PNG file to write a plot to; needs matplotlib.")
_JSON = flags.DEFINE_string("json", None, "JSON file to write the results to.")


@dataclasses.dataclass
class Measured:
    """The results of a variant.

    Attributes:
      lanes: the comparison of each lane, by (round, agent).
      token_layers: token-layers of the prompts, for each round.
    """

    lanes: dict[tuple[int, str], Comparison] = dataclasses.field(default_factory=dict)
    token_layers: list[float] = dataclasses.field(default_factory=list)


_WIDE = 130


def main(argv: Sequence[str]) -> int:
    """Measures and prints; returns the exit status: 0, or 1 after an error."""
    if _PROBES.value:
        return measure.run(argv, _grade, json=_JSON.value, width=_WIDE)
    return measure.run(argv, _measure, json=_JSON.value)


def _grade(console: Console) -> Iterator[dict[str, Any]]:
    _check_flags()
    rows: list[dict[str, Any]] = []
    try:
        for rows in probes.measure_variants(
            common.model_of(_MODEL.value, _DTYPE.value),
            _variants(),
            _SETTING.value,
            draws=_DRAWS.value,
            guided=_GUIDE.value,
            audit=_AUDIT.value,
            progress=console.print,
        ):
            yield {"policies": rows}
    finally:  # after an error too
        for table in probe_tables.tables(rows):
            console.print(table)


def _check_flags() -> None:
    """Checks flag values before anything is loaded, and sets up the compilation cache."""
    for variant in _variants():
        common.check_policies([variant.policy], variant.options)
    common.preamble_of(_PREAMBLE.value)
    if _PLOT.value:
        importlib.import_module("matplotlib")
        common.check_file(_PLOT.value, "plot")
    host.cache_compilations(None)


def _measure(console: Console) -> Iterator[dict[str, Any]]:
    _check_flags()
    trace = common.trace_of(_TRACE.value, _TRACE_NAME.value)
    stop = _FIRST_ROUND.value + _ROUNDS.value if _ROUNDS.value else 0
    trace = common.cut_trace(trace, rounds=stop, agents=_AGENTS.value, max_new_tokens=0)
    rounds = trace.rounds[_FIRST_ROUND.value :]
    if not rounds:
        raise PromptError(f"first_round: the trace ends before round {_FIRST_ROUND.value}")
    model = common.model_of(_MODEL.value, _DTYPE.value)
    rows: list[dict[str, Any]] = []
    try:
        for measured in compare_variants(model, trace, rounds, _variants(), console):
            rows = _rows(trace.name, measured)
            yield {"policies": rows}
    finally:  # after an error too
        if rows:
            console.print(_table(rows))
            console.print(_detail(rows))
    if _PLOT.value:
        pareto.plot([rows], _PLOT.value)
        console.print(f"Written: {terminal.markup(_PLOT.value)}")


def _variants() -> list[Variant]:
    variants = []
    for policy in dict.fromkeys(_POLICY.value):
        if policy != "tokendance":
            variants.append(Variant(policy, PolicyOptions(blend_ratio=_BLEND_RATIO.value)))
            continue
        for base, selection in itertools.product(_BASE.value, _SELECTION.value):
            for pages in _HEAD_PAGES.value[: 1 if selection in UNLIMITED else None]:
                options = PolicyOptions(
                    base=base, selection=selection, head_pages=pages, least_saving=None
                )
                variants.append(Variant(policy, options))
    return variants


def compare_variants(
    model: Model,
    trace: Trace,
    rounds: Sequence[Round],
    variants: Sequence[Variant],
    console: Console,
) -> Iterator[dict[Variant | str, Measured]]:
    """Measures variants over rounds of a trace.

    Each variant has one engine, whose caches persist from round to round.

    Args:
      model: the model.
      trace: the trace.
      rounds: the rounds of the trace to measure.
      variants: what to measure.
      console: where to print progress.

    Yields:
      After each variant, the results of all variants so far. The keys of the noise floor and of the
      audit are their names.
    """
    prompts = [tokenize_round(round_, model.tokenizer, chat=False) for round_ in rounds]
    most = max(len(p.token_ids) + _TOKENS.value for round_ in prompts for p in round_)
    memory = common.needed_kv_memory(model, trace, page_size=16, chat=False)
    memory += max(map(len, prompts)) * -(-(_TOKENS.value + most) // 16) * _page_bytes(model)
    preamble = common.preamble_of(_PREAMBLE.value)
    programs: Programs | None = None

    def engine(variant: Variant, row_budget: int = _ROW_BUDGET.value) -> RoundEngine:
        nonlocal programs
        made = RoundEngine(
            model,
            policy=variant.policy,
            options=variant.options,
            preamble=preamble,
            kv_memory=memory,
            row_budget=row_budget,
            programs=programs if row_budget == _ROW_BUDGET.value else None,
        )
        if row_budget == _ROW_BUDGET.value:
            programs = made.programs
        return made

    dense = Variant("dense")
    reference = engine(dense)
    console.print(f"{terminal.markup(trace.name)}: dense")
    answers = [_continuations(reference, round_) for round_ in rounds]
    results: dict[Variant | str, Measured] = {dense: Measured()}
    streams = []
    for round_, prompt, answer in zip(rounds, prompts, answers, strict=True):
        streams.append(_score(reference, results[dense], round_, prompt, answer, None))
    del reference
    yield results
    everything = list(zip(rounds, prompts, answers, streams, strict=True))

    todo: list[tuple[Variant | str, Variant]] = [(variant, variant) for variant in variants]
    if all(variant.policy != "dense" for variant in variants):
        todo.append((NOISE, dense))
    if _AUDIT.value and (collective := audited(variants)) is not None:
        todo.append((SHUFFLED, collective))
    for key, variant in todo:
        name = key if isinstance(key, str) else key.name
        console.print(f"{terminal.markup(trace.name)}: {name}")
        results[key] = Measured()
        budget = _ROW_BUDGET.value // 4 if key == NOISE else _ROW_BUDGET.value
        made = engine(variant, budget)
        for round_, prompt, answer, expected in everything:
            if key == SHUFFLED:
                score(made, prompt, answer)
                shuffle_bases(made, seed=0)
            _score(made, results[key], round_, prompt, answer, expected)
        del made
        gc.collect()
        yield results


def _page_bytes(model: Model) -> int:
    return model.kv_spec(pages=1, page_size=16).page_bytes


def _continuations(engine: RoundEngine, round_: Round) -> list[np.ndarray]:
    """Returns the texts along which a round is compared."""
    if _CONTINUATION.value == "recorded":
        return common.recorded_answers(round_, engine.model.tokenizer, most=_TOKENS.value)
    agents = tuple(
        dataclasses.replace(agent, max_new_tokens=_TOKENS.value) for agent in round_.agents
    )
    sampling = Sampling(temperature=float(_CONTINUATION.value == "sampled"))
    round_ = dataclasses.replace(round_, agents=agents, sampling=sampling)
    result = engine.serve(round_, chat=False)
    return [np.array(agent.token_ids, np.int32) for agent in result.agents]


def _score(
    engine: RoundEngine,
    measured: Measured,
    round_: Round,
    prompts: Sequence[TokenizedPrompt],
    answers: Sequence[np.ndarray],
    expected: Sequence[np.ndarray] | None,
) -> list[np.ndarray]:
    """Follows a round and adds its comparisons, and the cost of the prompts without the answers."""
    streams, cost = follow(engine, prompts, answers)
    layers = engine.model.config.num_hidden_layers
    answered = sum(map(len, answers))
    measured.token_layers.append(cost.token_layers - answered * layers)
    for index, (agent, found) in enumerate(zip(round_.agents, streams, strict=True)):
        against = found if expected is None else expected[index]
        measured.lanes[round_.index, agent.agent] = compare(
            logits(engine, against), logits(engine, found)
        )
    return streams


def _rows(trace: str, measured: dict[Variant | str, Measured]) -> list[dict[str, Any]]:
    noise = measured.get(NOISE)
    floor = summarise(list(noise.lanes.values())).kl_mean if noise else 0.0
    rows = []
    for key, result in measured.items():
        variant = key if isinstance(key, Variant) else Variant(key)
        rounds = sorted({index for index, _ in result.lanes})
        agents = sorted({agent for _, agent in result.lanes})

        def mean(kept: Sequence[tuple[int, str]], result: Measured = result) -> float:
            return summarise([result.lanes[at] for at in kept]).kl_mean

        rows.append(
            {
                **variant.choices,
                "trace": trace,
                **dataclasses.asdict(summarise(list(result.lanes.values()))),
                "token_layers": sum(result.token_layers),
                "noise_floor": floor,
                "kl_by_round": {i: mean([at for at in result.lanes if at[0] == i]) for i in rounds},
                "kl_by_agent": {a: mean([at for at in result.lanes if at[1] == a]) for a in agents},
            }
        )
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    dense = rows[0]["token_layers"]
    title = f"{rows[0]['trace']}: {rows[0]['positions']} positions against dense"
    columns = "mean\nKL", "p95\nKL", "top-1", "first\ndivergence", "token-layers\nof dense"
    table = measure.table("policy", *columns, title=title)
    for row in rows[1:]:
        table.add_row(
            row["name"],
            f"{row['kl_mean']:.2g}",
            f"{row['kl_p95']:.2g}",
            f"{row['top1']:.3f}",
            f"{row['first_divergence']:.1f}",
            f"{row['token_layers'] / dense:.1%}",
        )
    return table


def _detail(rows: Sequence[dict[str, Any]]) -> Table:
    """Makes a table of mean KL by round and by agent: whether errors grow, and whom they affect."""
    by_round, by_agent = rows[0]["kl_by_round"], rows[0]["kl_by_agent"]
    table = measure.table("policy", title="mean KL")
    for name in [*(f"round {index}" for index in by_round), *by_agent]:
        table.add_column(terminal.markup(name), justify="right", overflow="fold")
    for row in rows[1:]:
        values = [*row["kl_by_round"].values(), *row["kl_by_agent"].values()]
        table.add_row(row["name"], *(f"{value:.2g}" for value in values))
    return table


if __name__ == "__main__":
    app.run(main)

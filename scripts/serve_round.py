"""Serves the rounds of a trace and shows what each agent said, and what it cost.

  python -m scripts.serve_round
  python -m scripts.serve_round --model=model.gguf --trace=rounds.jsonl.gz
  python -m scripts.serve_round --policy=dense --policy=prefix --policy=tokendance

Without flags it serves an embedded trace of four agents with a small embedded model of random
weights: it shows that everything runs, not that the model makes sense.
"""

import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import app, flags
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from scripts import common
from tokendance_jax import host
from tokendance_jax.collector.policies import BASES, POLICIES, SELECTIONS, PolicyOptions
from tokendance_jax.engine.engine import RoundEngine
from tokendance_jax.engine.result import RoundResult
from tokendance_jax.model import Model
from tokendance_jax.models.loading import CheckpointError
from tokendance_jax.paged import OutOfPages
from tokendance_jax.prompt import PromptError, Round, Sampling, Trace, tokenize_round
from tokendance_jax.quality import Comparison, compare, summarise

_MODEL = flags.DEFINE_string(
    "model",
    common.DEMO,
    "Model: 'demo', a Hugging Face folder, a hub id, a .gguf file, or a folder of convert_weights.",
)
_TRACE = flags.DEFINE_string("trace", common.DEMO, "Trace: 'demo', or a .jsonl or .jsonl.gz file.")
_TRACE_NAME = flags.DEFINE_string(
    "trace_name", None, "Which trace of a file with several; the first by default."
)
_REPLAY = flags.DEFINE_bool(
    "replay",
    True,
    "Whether shared blocks are the recorded answers (--replay) or this run's own (--noreplay).",
)
_CHAT = flags.DEFINE_enum(
    "chat",
    "auto",
    ["auto", "yes", "no"],
    "Whether prompts are set into the model's chat markup; auto: in live runs (--noreplay).",
)
_POLICY = flags.DEFINE_multi_enum(
    "policy", ["prefix"], POLICIES, "Which KV is reused. Repeat the flag to compare policies."
)
_BASE = flags.DEFINE_enum(
    "base", PolicyOptions().base, BASES, "How tokendance conditions the KV of shared text."
)
_SELECTION = flags.DEFINE_enum(
    "selection",
    PolicyOptions().selection,
    list(SELECTIONS),
    "Which pages of shared text the agents of tokendance compute themselves.",
)
_HEAD_PAGES = flags.DEFINE_integer(
    "head_pages",
    common.HEAD_PAGES,
    "How many pages these are, but for none and all.",
    lower_bound=0,
)
_BLEND_RATIO = flags.DEFINE_float(
    "blend_ratio", PolicyOptions().blend_ratio, "Share of shared tokens that blend recomputes."
)
_QUALITY = flags.DEFINE_bool(
    "quality",
    True,
    "Whether policies are compared by quality too, in replays: 16 tokens of 8 agents a round.",
)
_ROUNDS = flags.DEFINE_integer("rounds", 0, "Serve this many rounds; 0: all.", lower_bound=0)
_AGENTS = flags.DEFINE_integer(
    "agents", 0, "Serve the first so many agents of each round; 0: all.", lower_bound=0
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 0, "Most tokens of an answer; 0: as the trace says.", lower_bound=0
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["float32", "bfloat16"], "Precision of weights and KV."
)
_PAGE_SIZE = flags.DEFINE_integer("page_size", 16, "Token slots in a KV page.")
_KV_MEMORY = flags.DEFINE_string(
    "kv_memory", "auto", "Size of the KV pool ('512MiB', '2GiB'); auto: as the trace needs."
)
_ROW_BUDGET = flags.DEFINE_integer("row_budget", 2048, "Most rows computed in one prefill call.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the most probable token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from this many best tokens; 0: from all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the best tokens of this probability mass.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws.")
_COLD = flags.DEFINE_bool("cold", False, "Count compilation in the times.")
_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    "auto",
    "Folder that keeps compiled programs between runs; auto: in the user's cache folder; 'off'.",
)
_JSON = flags.DEFINE_string("json", None, "File to write configuration and results to.")

_QUALITY_TOKENS, _QUALITY_AGENTS = 16, 8
_INTERRUPTED = 130  # what a shell reports for Ctrl-C


@dataclasses.dataclass
class _Run:
    """What was served so far, and whether something is left to serve.

    Attributes:
      results: policy to the results of its rounds.
      compared: policy to comparisons with the first policy, of all rounds.
      interrupted: whether something is left.
    """

    results: dict[str, list[RoundResult]]
    compared: dict[str, list[Comparison]]
    interrupted: bool = True


def main(argv: Sequence[str]) -> int:
    """Serves; returns the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    common.quiet_logs()
    host.tune_allocator()
    if _COMPILATION_CACHE.value != "off":
        folder = _COMPILATION_CACHE.value
        host.cache_compilations(None if folder == "auto" else folder)
    console = Console(highlight=False)
    try:
        common.check_json_path(_JSON.value)
        trace = _trace()
        model = common.model_of(_MODEL.value, _DTYPE.value)
        run = _serve(model, trace, console)
    except (CheckpointError, PromptError, OutOfPages, OSError, ValueError) as error:
        print(f"serve_round: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while loading, or the second one
        return _INTERRUPTED
    if any(run.results.values()):
        console.print(_table(run.results))
        console.print(_work(run))
        console.print(_comparison(run))
    if _JSON.value:
        common.write_json(_JSON.value, _json(run))
        console.print(f"Written: {escape(_JSON.value)}")
    if run.interrupted:
        console.print("Interrupted: what is shown is what was done.")
        return _INTERRUPTED
    return 0


def _trace() -> Trace:
    trace = common.cut_trace(
        common.trace_of(_TRACE.value, _TRACE_NAME.value),
        rounds=_ROUNDS.value,
        agents=_AGENTS.value,
        max_new_tokens=_MAX_NEW_TOKENS.value,
    )
    sampling = Sampling(
        temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value, seed=_SEED.value
    )
    rounds = tuple(dataclasses.replace(moment, sampling=sampling) for moment in trace.rounds)
    return dataclasses.replace(trace, rounds=rounds)


def _serve(model: Model, trace: Trace, console: Console) -> _Run:
    """Serves the trace under every policy."""
    chat = {"yes": True, "no": False, "auto": None}[_CHAT.value]
    if _KV_MEMORY.value == "auto":
        kv_memory = common.needed_kv_memory(
            model, trace, page_size=_PAGE_SIZE.value, chat=bool(chat) or not _REPLAY.value
        )
    else:
        kv_memory = common.parse_bytes(_KV_MEMORY.value)
    console.print(
        f"[bold]{escape(trace.name)}[/]: {len(trace.rounds)} rounds of up to "
        f"{max(len(moment.agents) for moment in trace.rounds)} agents; "
        f"[bold]{escape(model.name)}[/] in {model.dtype.name}; "
        f"KV pool {kv_memory / 2**20:,.0f} MiB"
    )
    policies = list(dict.fromkeys(_POLICY.value))
    run = _Run({policy: [] for policy in policies}, {policy: [] for policy in policies[1:]})
    options = PolicyOptions(
        base=_BASE.value,
        selection=_SELECTION.value,
        head_pages=_HEAD_PAGES.value,
        blend_ratio=_BLEND_RATIO.value,
    )
    programs = None
    streams: list[list[np.ndarray]] = []  # what the first policy computed along its own answers
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        bar = progress.add_task("", total=None)

        def on_token(*_: object) -> None:
            check()
            progress.advance(bar)

        with _deferred_interrupt(console) as check, contextlib.suppress(KeyboardInterrupt):
            for policy in policies:
                engine = RoundEngine(
                    model,
                    policy=policy,
                    options=options,
                    page_size=_PAGE_SIZE.value,
                    kv_memory=kv_memory,
                    row_budget=_ROW_BUDGET.value,
                    max_agents=max(len(moment.agents) for moment in trace.rounds),
                    cold=_COLD.value,
                    programs=programs,
                )
                programs = engine.programs
                served = engine.run(
                    trace,
                    replay=_REPLAY.value,
                    chat=chat,
                    on_token=on_token,
                )
                for moment in trace.rounds:
                    most = sum(a.max_new_tokens or moment.max_new_tokens for a in moment.agents)
                    progress.reset(bar, total=most, description=f"{policy}, round {moment.index}")
                    check()
                    result = next(served)
                    run.results[policy].append(result)
                    _tell(console, policy, result, run.results[policies[0]])
                    if _QUALITY.value and _REPLAY.value and len(policies) > 1:
                        check()
                        found = _follow(engine, moment, run.results[policies[0]])
                        if policy == policies[0]:
                            streams.append(found)
                        else:
                            pairs = zip(streams[moment.index], found, strict=True)
                            run.compared[policy] += [
                                compare(engine.logits(a), engine.logits(b)) for a, b in pairs
                            ]
                del engine, served  # its pool, before the next one is made
            run.interrupted = False
    return run


def _follow(engine: RoundEngine, moment: Round, first: Sequence[RoundResult]) -> list[np.ndarray]:
    """The engine's residual streams along the beginnings of the first policy's answers."""
    answers = {r.index: r for r in first}[moment.index].agents
    prompts = tokenize_round(moment, engine.model.tokenizer, chat=_CHAT.value == "yes")
    ids = [np.array(answer.token_ids[:_QUALITY_TOKENS], np.int32) for answer in answers]
    return engine.follow(prompts, ids)[0][:_QUALITY_AGENTS]


@contextlib.contextmanager
def _deferred_interrupt(console: Console) -> Iterator[Callable[[], None]]:
    """Turns Ctrl-C into a KeyboardInterrupt from the function that it gives.

    Python raises it wherever it stands, in callbacks of XLA too, which lose it or crash. A second
    Ctrl-C does that.
    """
    asked = threading.Event()

    def ask(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, previous)
        console.print("Stopping at the next token; Ctrl-C again stops at once.")

    def check() -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)


def _tell(console: Console, policy: str, result: RoundResult, first: Sequence[RoundResult]) -> None:
    """Prints the answers, or how many are those of the first policy."""
    console.print(f"\n[bold]Round {result.index}, {policy}[/]")
    reference = {r.index: r for r in first}[result.index]
    if reference is not result:
        same = sum(a.text == b.text for a, b in zip(result.agents, reference.agents, strict=True))
        console.print(f"{same} of {len(result.agents)} answers equal those of the first policy.")
        return
    for agent in result.agents:
        console.print(f"[cyan]{escape(agent.agent)}[/]: {escape(agent.text.strip())}")


def _table(results: dict[str, list[RoundResult]]) -> Table:
    title = "Tokens, seconds and KV bytes" + ("" if _COLD.value else " (compilation left out)")
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for column in ("policy", "round"):
        table.add_column(column, no_wrap=True)
    # Two lines each, so that the table fits 80 columns.
    tokens = ("prompt\ntokens", "computed", "reused")
    times = ("prefill\ns", "decode\ns", "decode\ntok/s")
    for column in (*tokens, *times, "KV MiB\nheld", "KV MiB\ndense"):
        table.add_column(column, justify="right", no_wrap=True)
    for policy, rounds in results.items():
        for result in rounds:
            ledger, timings = result.ledger, result.timings
            later = ledger.decoded_tokens - len(result.agents)  # the first tokens are prefill's
            table.add_row(
                policy,
                str(result.index),
                f"{ledger.prompt_tokens:,}",
                f"{ledger.computed_tokens:,}",
                f"{ledger.reused_tokens / ledger.prompt_tokens:.1%}",
                f"{timings.prefill_s:.2f}",
                f"{timings.decode_s:.2f}",
                f"{later / timings.decode_s:,.0f}" if later else "-",
                f"{ledger.kv_bytes_held / 2**20:,.1f}",
                f"{ledger.kv_bytes_dense / 2**20:,.1f}",
            )
    return table


def _work(run: _Run) -> Table:
    """What each policy computed over all its rounds, beside what it had to and what it could."""
    table = Table(title="Work of all rounds", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("policy", no_wrap=True)
    columns = ("prompt\ntokens", "computed", "unique", "prompt /\ncomputed", "collective\nceiling")
    for column in (*columns, "token-\nlayers"):
        table.add_column(column, justify="right", no_wrap=True)
    for policy, values in _summaries(run).items():
        prompt = values["prompt_tokens"]
        table.add_row(
            policy,
            f"{prompt:,}",
            f"{values['computed_tokens']:,}",
            f"{values['unique_tokens']:,}",
            f"{prompt / values['computed_tokens']:.2f}",
            f"{prompt / values['distinct_tokens']:.2f}",
            f"{values['token_layers']:,.0f}",
        )
    return table


def _comparison(run: _Run) -> Table:
    """What that took and held, and how near the answers are to the first policy's."""
    title = "Time, bytes" + (f", quality against {next(iter(run.results))}" if run.compared else "")
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("policy", no_wrap=True)
    columns = ("prefill\ns", "KV MiB\nheld", "at\nrest", "dense")
    for column in (*columns, "mean\nKL", "top-1", "first\ndiverg."):
        table.add_column(column, justify="right", no_wrap=True)
    for policy, values in _summaries(run).items():
        agreed = values["agreement"]
        quality = ("-", "-", "-")
        if agreed is not None:
            kl, top1, first = agreed["kl_mean"], agreed["top1"], agreed["first_divergence"]
            quality = (f"{kl:.2g}", f"{top1:.3f}", f"{first:.1f}")
        table.add_row(
            policy,
            f"{values['prefill_s']:.2f}",
            *(f"{values[f'kv_bytes_{what}'] / 2**20:,.0f}" for what in ("held", "rest", "dense")),
            *quality,
        )
    return table


def _summaries(run: _Run) -> dict[str, dict[str, Any]]:
    """Sums over the rounds of each policy, and how it agrees with the first."""
    fields = ("prompt", "distinct", "unique", "computed")
    kinds = ("held", "rest", "dense")
    summaries = {}
    for policy, results in run.results.items():
        ledgers = [result.ledger for result in results]
        names = [*(f"{field}_tokens" for field in fields), *(f"kv_bytes_{kind}" for kind in kinds)]
        if not ledgers:
            continue
        compared = run.compared.get(policy)
        summaries[policy] = {
            **{name: sum(getattr(ledger, name) for ledger in ledgers) for name in names},
            "token_layers": sum(ledger.token_layers for ledger in ledgers),
            "prefill_s": sum(result.timings.prefill_s for result in results),
            "agreement": dataclasses.asdict(summarise(compared)) if compared else None,
        }
    return summaries


def _json(run: _Run) -> dict[str, Any]:
    own = flags.FLAGS.get_flags_for_module(sys.modules[__name__])
    config = {flag.name: flag.value for flag in own}
    rows = [
        {
            "policy": policy,
            "round": result.index,
            "agents": len(result.agents),
            **dataclasses.asdict(result.ledger),
            **dataclasses.asdict(result.timings),
            "outputs": result.texts,
            "output_ids": {agent.agent: list(agent.token_ids) for agent in result.agents},
            "finish_reasons": {agent.agent: agent.finish_reason for agent in result.agents},
        }
        for policy, rounds in run.results.items()
        for result in rounds
    ]
    return {"config": config, "rounds": rows, "policies": _summaries(run)}


if __name__ == "__main__":
    app.run(main)

"""Serves the rounds of a trace and prints each agent's answer and the cost of each policy.

  python -m scripts.serve_round
  python -m scripts.serve_round --model=model.gguf --trace=rounds.jsonl.gz
  python -m scripts.serve_round --policy=dense --policy=prefix --policy=tokendance

Without flags it serves the demo: eight agents of a small town, with a small model that was trained
to speak the town's language. It prints the answers of the dense policy and how many of them are
right, and compares what tokendance computes, holds in the KV cache and answers.
"""

import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from scripts.helpers import common, terminal
from scripts.helpers.served import Served, comparison_table, rounds_table, work_table
from tokendance_jax import host
from tokendance_jax.engine.limits import check_kv_memory, check_page_size
from tokendance_jax.engine.result import RoundResult
from tokendance_jax.engine.rounds import RoundEngine
from tokendance_jax.model import Model
from tokendance_jax.policy.policies import BASES, POLICIES, SELECTIONS, PolicyOptions
from tokendance_jax.prompt import Round, Sampling, Trace, tokenize_round
from tokendance_jax.study.quality import compare
from tokendance_jax.study.scoring import follow, logits

_MODEL = flags.DEFINE_string(
    "model",
    common.DEMO,
    "Model to serve: 'demo', a Hugging Face folder, a hub id, a .gguf file, or an Orbax folder "
    "that convert_weights wrote.",
)
_TRACE = flags.DEFINE_string(
    "trace", common.DEMO, "Trace to serve: 'demo', or a .jsonl or .jsonl.gz file."
)
_TRACE_NAME = flags.DEFINE_string(
    "trace_name", None, "Name of the trace to serve from a file with several; default: the first."
)
_REPLAY = flags.DEFINE_bool(
    "replay",
    True,
    "Whether shared blocks are the answers recorded in the trace (--replay) or the answers of this "
    "run (--noreplay).",
)
_CHAT = flags.DEFINE_enum(
    "chat",
    "auto",
    ["auto", "yes", "no"],
    "Whether to set prompts into the chat markup of the model's template. 'auto': in live runs "
    "(--noreplay) and for the demo trace, if the model has a template.",
)
_POLICY = flags.DEFINE_multi_enum(
    "policy",
    ["dense", "tokendance"],
    POLICIES,
    "KV reuse policy. 'dense': no reuse; 'prefix': exact prefixes; 'blend': CacheBlend, one "
    "request after another; 'blend-batched': CacheBlend, all requests of a round together; 'epic': "
    "EPIC; 'tokendance': shared text is computed once per round. Repeat the flag to compare other "
    "policies with the first.",
)
_BASE = flags.DEFINE_enum(
    "base",
    PolicyOptions().base,
    BASES,
    "Context in which tokendance computes the KV of shared text. 'joint': all shared segments as "
    "one text after the preamble; 'joint-agent': the same after the private text of the agent "
    "whose own KV deviates least from the joint base; 'alone': each segment by itself after the "
    "preamble; 'isolated': each segment by itself at position 0.",
)
_SELECTION = flags.DEFINE_enum(
    "selection",
    PolicyOptions().selection,
    list(SELECTIONS),
    "Pages of shared text that each agent of tokendance computes itself. 'head': the first pages "
    "of every run of shared text; 'none': no pages; 'deviation': the pages whose K and V at layer "
    "1 differ most from the agents' own; 'query': the pages that the agents' own text after them "
    "attends to most; 'own': the head and the agent's own block of the previous round; 'all': all "
    "pages.",
)
_HEAD_PAGES = flags.DEFINE_integer(
    "head_pages",
    common.HEAD_PAGES,
    "Number of pages that --selection chooses ('head' and 'own': in every run of shared text); "
    "ignored by 'none' and 'all'.",
    lower_bound=0,
)
_LEAST_SAVING = flags.DEFINE_float(
    "least_saving",
    PolicyOptions().least_saving,
    "Minimum share of tokens, from 0 to 1, that sharing must save compared with serving the round "
    "exactly. If it saves less, tokendance serves the round as 'prefix' does.",
    lower_bound=0.0,
    upper_bound=1.0,
)
_PREAMBLE = flags.DEFINE_string("preamble", None, common.PREAMBLE_HELP)
_BLEND_RATIO = flags.DEFINE_float(
    "blend_ratio",
    PolicyOptions().blend_ratio,
    "Share of shared tokens, from 0 to 1, that 'blend' and 'blend-batched' recompute.",
)
_QUALITY = flags.DEFINE_bool(
    "quality",
    True,
    "Whether to compare next-token distributions with those of the first policy, in replays: along "
    "the first 32 tokens of the first 8 answers of each round.",
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 0, "Number of rounds to serve, from the first on; 0: all.", lower_bound=0
)
_AGENTS = flags.DEFINE_integer(
    "agents",
    0,
    "Number of agents to serve in each round, from the first on; 0: all.",
    lower_bound=0,
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens",
    0,
    "Maximum number of tokens of an answer; 0: the limits in the trace.",
    lower_bound=0,
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["float32", "bfloat16"], "Precision of weights and KV."
)
_PAGE_SIZE = flags.DEFINE_integer(
    "page_size", 16, "Token slots in a KV page: a power of two of at most 256."
)
_KV_MEMORY = flags.DEFINE_string(
    "kv_memory",
    "auto",
    "Size of the KV pool in bytes, KiB, MiB or GiB, such as '512MiB'. 'auto': enough to hold the "
    "largest round of the trace twice.",
)
_ROW_BUDGET = flags.DEFINE_integer(
    "row_budget", 2048, "Maximum number of rows that one prefill call computes."
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "Sampling temperature; 0: always choose the most probable token."
)
_TOP_K = flags.DEFINE_integer(
    "top_k", 0, "Sample from this many most probable tokens; 0: from all."
)
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Sample from the smallest set of tokens with this probability, in (0, 1]."
)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed for sampling.")
_COLD = flags.DEFINE_bool("cold", False, "Whether reported times include compilation.")
_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    "auto",
    "Folder that keeps compiled programs between runs. 'auto': JAX_COMPILATION_CACHE_DIR, or else "
    "tokendance-jax/xla in the user's cache folder; 'off': set up none.",
)
_JSON = flags.DEFINE_string("json", None, "JSON file to write the flags and the results to.")

_QUALITY_TOKENS, _QUALITY_AGENTS = 32, 8


def main(argv: Sequence[str]) -> int:
    """Serves the trace; returns the exit status: 0, 1 after an error, or 130 after Ctrl-C."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    common.quiet_logs()
    host.tune_allocator()
    console = terminal.console()
    served = Served.under(_POLICY.value)
    error: BaseException | None = None
    try:
        _check_flags()
        trace = _trace()
        if _TRACE.value == common.DEMO and _REPLAY.value:
            served.asked = trace
        _serve(common.model_of(_MODEL.value, _DTYPE.value), trace, served, console)
    except (*common.ERRORS, KeyboardInterrupt) as raised:
        error = raised
    interrupted = isinstance(error, KeyboardInterrupt)
    done = any(served.results.values())
    if done:
        console.print(rounds_table(served, cold=_COLD.value))
        console.print(work_table(served))
        console.print(comparison_table(served))
    if _JSON.value and (done or interrupted):
        try:
            _write(served)
            console.print(f"Written: {terminal.markup(_JSON.value)}")
        except OSError as raised:
            error = error or raised
    if interrupted:
        console.print("Interrupted: the results cover only the rounds served so far.")
        return common.INTERRUPTED
    if error is not None:
        terminal.complain("serve_round", error)
    return int(error is not None)


def _check_flags() -> None:
    """Checks flag values before anything is loaded, and sets up the compilation cache."""
    common.check_json_path(_JSON.value)
    check_page_size(_PAGE_SIZE.value)
    if _ROW_BUDGET.value < 1:
        raise ValueError(f"row_budget: {_ROW_BUDGET.value} is too small; give at least 1")
    if _KV_MEMORY.value != "auto":
        check_kv_memory(common.parse_bytes(_KV_MEMORY.value))
    common.check_policies(_POLICY.value, _options())
    common.preamble_of(_PREAMBLE.value)
    if _COMPILATION_CACHE.value != "off":
        folder = _COMPILATION_CACHE.value
        host.cache_compilations(None if folder == "auto" else folder)


def _options() -> PolicyOptions:
    return PolicyOptions(
        base=_BASE.value,
        selection=_SELECTION.value,
        head_pages=_HEAD_PAGES.value,
        least_saving=_LEAST_SAVING.value,
        blend_ratio=_BLEND_RATIO.value,
    )


def _trace() -> Trace:
    trace = common.cut_trace(
        common.trace_of(_TRACE.value, _TRACE_NAME.value),
        rounds=_ROUNDS.value,
        agents=_AGENTS.value,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        live=not _REPLAY.value,
    )
    sampling = Sampling(
        temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value, seed=_SEED.value
    )
    rounds = tuple(dataclasses.replace(round_, sampling=sampling) for round_ in trace.rounds)
    return dataclasses.replace(trace, rounds=rounds)


def _write(served: Served) -> None:
    """Writes the results so far to the file of `--json`, if it is given."""
    if _JSON.value is None:
        return
    own = flags.FLAGS.get_flags_for_module(sys.modules[__name__])
    common.write_json(_JSON.value, served.json({flag.name: flag.value for flag in own}))


def _chat(model: Model) -> bool:
    """Whether to set prompts into chat markup; under `auto`, replays of files stay as recorded."""
    if _CHAT.value != "auto":
        return _CHAT.value == "yes"
    wanted = not _REPLAY.value or _TRACE.value == common.DEMO
    return wanted and model.tokenizer.chat_template is not None


def _serve(model: Model, trace: Trace, served: Served, console: Console) -> None:
    """Serves the trace under every policy; adds results to `served` and writes them as they come.

    Raises:
      KeyboardInterrupt: after Ctrl-C.
    """
    chat = _chat(model)
    # Computed even if `--kv_memory` sets the size, because this also checks the prompts.
    kv_memory = common.needed_kv_memory(
        model, trace, page_size=_PAGE_SIZE.value, chat=chat, live=not _REPLAY.value
    )
    if _KV_MEMORY.value != "auto":
        kv_memory = common.parse_bytes(_KV_MEMORY.value)
    check_kv_memory(kv_memory)
    console.print(
        f"[bold]{terminal.markup(trace.name)}[/]: {len(trace.rounds)} rounds of up to "
        f"{max(len(round_.agents) for round_ in trace.rounds)} agents; "
        f"[bold]{terminal.markup(model.name)}[/] in {model.dtype.name}; "
        f"KV pool {kv_memory / 2**20:,.0f} MiB"
    )
    policies = list(served.results)
    first = served.results[served.first]
    options = _options()
    preamble = common.preamble_of(_PREAMBLE.value)
    programs = None
    streams: list[list[np.ndarray]] = []  # the first policy's residual streams, by round
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

        with _deferred_interrupt(console) as check:
            for policy in policies:
                engine = RoundEngine(
                    model,
                    policy=policy,
                    options=options,
                    preamble=preamble,
                    page_size=_PAGE_SIZE.value,
                    kv_memory=kv_memory,
                    row_budget=_ROW_BUDGET.value,
                    max_agents=max(len(round_.agents) for round_ in trace.rounds),
                    cold=_COLD.value,
                    programs=programs,
                )
                programs = engine.programs
                rounds = engine.run(
                    trace, replay=_REPLAY.value, chat=chat, on_token=on_token, at_rest=True
                )
                for round_ in trace.rounds:
                    most = sum(a.max_new_tokens or round_.max_new_tokens for a in round_.agents)
                    progress.reset(bar, total=most, description=f"{policy}, round {round_.index}")
                    check()
                    result = next(rounds)
                    served.results[policy].append(result)
                    _tell(console, policy, round_, result, served)
                    if _QUALITY.value and _REPLAY.value and len(policies) > 1:
                        check()
                        found = _follow(engine, round_, first[round_.index], chat=chat)
                        if policy == served.first:
                            streams.append(found)
                        else:
                            pairs = zip(streams[round_.index], found, strict=True)
                            served.compared[policy] += [
                                compare(logits(engine, a), logits(engine, b)) for a, b in pairs
                            ]
                    _write(served)
                del engine, rounds  # frees the pool before the next engine allocates its own


def _follow(
    engine: RoundEngine, round_: Round, first: RoundResult, *, chat: bool
) -> list[np.ndarray]:
    """Computes residual streams along the first tokens of the first policy's answers."""
    prompts = tokenize_round(round_, engine.model.tokenizer, chat=chat)
    ids = [np.array(answer.token_ids[:_QUALITY_TOKENS], np.int32) for answer in first.agents]
    return follow(engine, prompts, ids)[0][:_QUALITY_AGENTS]


@contextlib.contextmanager
def _deferred_interrupt(console: Console) -> Iterator[Callable[[], None]]:
    """Yields a function that raises KeyboardInterrupt if Ctrl-C was pressed before the call.

    By default, Python raises KeyboardInterrupt wherever execution is, including in callbacks of
    XLA, which lose it or crash. A second Ctrl-C has this default effect.
    """
    asked = threading.Event()

    def ask(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, previous)
        console.print("Stopping at the next token; press Ctrl-C again to stop at once.")

    def check() -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)


def _tell(
    console: Console, policy: str, round_: Round, result: RoundResult, served: Served
) -> None:
    """Prints the first policy's questions and answers, or how many answers of another are equal."""
    console.print(f"\n[bold]Round {result.index}, {policy}[/]")
    right = served.right(result)
    counts, of_all = [], f"of {len(result.agents)} answers"
    if policy == served.first:
        for index, (prompt, agent) in enumerate(zip(round_.agents, result.agents, strict=True)):
            question = "".join(s.text or "" for s in prompt.segments if s.kind == "task").strip()
            lines = [terminal.markup(agent.text.strip(), lines=True)]
            if right and not right[index]:
                expected = (prompt.recorded_output or "").strip()
                lines.append(f"[red]Right:[/] {terminal.markup(expected, lines=True)}")
            # A task of several lines is an instruction rather than a question, and is not shown.
            asked = question if "\n" not in question else ""
            name, asked = terminal.markup(agent.agent), terminal.markup(asked)
            console.print(f"[cyan]{name}[/]: [dim]{asked}[/]")
            console.print(Padding("\n".join(lines), (0, 0, 0, 2), expand=False))
    else:
        pairs = zip(result.agents, served.results[served.first][result.index].agents, strict=True)
        same = sum(one.text == other.text for one, other in pairs)
        counts.append(f"{same} {of_all} equal those of {served.first}")
    if right:
        counts.append(f"{sum(right)} {of_all} are right")
    if counts:
        console.print(f"{', '.join(counts)}.")


if __name__ == "__main__":
    app.run(main)

"""What the scripts share: models, traces and sizes by flag values, and writing JSON."""

import dataclasses
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging

from tokendance_jax.demo import demo_tokenizer_json, demo_trace
from tokendance_jax.demo.model import demo_model
from tokendance_jax.engine.limits import answer_limits, check_page_size
from tokendance_jax.model import Model, load_model
from tokendance_jax.models.loading import Checkpoint
from tokendance_jax.models.qwen2.config import Qwen2Config
from tokendance_jax.models.qwen2.random import random_parameters
from tokendance_jax.paged import PagePool
from tokendance_jax.policy.policies import PolicyOptions, make_policy
from tokendance_jax.prompt import (
    AgentPrompt,
    PromptError,
    Round,
    Segment,
    TokenizedPrompt,
    Tokenizer,
    Trace,
    name_authors,
    read_trace,
    tokenize_round,
)
from tokendance_jax.prompt.preamble import DEFAULT_PREAMBLE

DEMO = "demo"
PREAMBLE_HELP = "File with the text in front of bases where prompts have no beginning in common."
# What `head` computes unless told otherwise.
HEAD_PAGES = PolicyOptions().head_pages

# What a script shows as one line: wrong input, too little memory or disk, packages that are not
# installed. Anything else is a fault of the program, and shows where.
ERRORS = (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError, ImportError)
INTERRUPTED = 130  # what a shell reports for Ctrl-C

_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def quiet_logs() -> None:
    """Shows warnings only, unless --verbosity says otherwise.

    JAX logs the accelerators that it does not find as information, Orbax its every step.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)


def model_of(source: str, dtype: str) -> Model:
    """Loads the model that `--model` names: "demo", or whatever `load_model` takes."""
    if source == DEMO:
        return demo_model(dtype)
    return load_model(source, dtype=dtype, progress=True)


def path_of(text: str, flag: str) -> Path:
    """The path that a flag names, with the home folder in the place of `~`.

    Raises:
      PromptError: there is no such home folder.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise PromptError(f"{flag}: {text}: there is no such home folder; write it out") from None


def sized_model(source: str, dtype: str) -> Model:
    """A published size with random weights ("0.5B"), or any model that `model_of` takes."""
    try:
        config = Qwen2Config.preset(source)
    except ValueError:
        return model_of(source, dtype)
    checkpoint = Checkpoint(
        config=config,
        params=random_parameters(config, dtype),
        tokenizer_json=demo_tokenizer_json(),
        chat_template=None,
        stop_ids=(),
        name=source,
    )
    return Model.from_checkpoint(checkpoint, dtype)


def trace_of(path: str, name: str | None) -> Trace:
    """Reads the trace that `--trace` and `--trace_name` name: "demo", or a file.

    Raises:
      PromptError: it can't be read, or there is none of that name.
    """
    if path != DEMO:
        return read_trace(Path(path), name)
    trace = demo_trace()
    if name not in (None, trace.name):
        raise PromptError(f"trace_name: the demo has no trace {name!r}; name a file with --trace")
    return trace


def cut_trace(
    trace: Trace, *, rounds: int, agents: int, max_new_tokens: int, live: bool = False
) -> Trace:
    """Keeps the first rounds and the first agents of each, and limits the answers.

    Args:
      trace: the trace.
      rounds: how many rounds; 0: all.
      agents: how many agents of each round; 0: all.
      max_new_tokens: most tokens of an answer; 0: as the trace says.
      live: whether the trace is for a live run: its blocks get their authors, and those of agents
        that are left out go too, since nobody says them. Else they stay with the others.

    Raises:
      PromptError: in live runs, as `name_authors`.
    """
    trace = dataclasses.replace(trace, rounds=trace.rounds[: rounds or None])
    if live:
        trace = name_authors(trace)
    there = [{p.agent for p in round_.agents[: agents or None]} for round_ in trace.rounds]

    def heard(segments: Sequence[Segment]) -> Iterator[Segment]:
        for segment in segments:
            author = segment.author
            if author is None or author.agent in there[author.round]:
                yield segment
            elif not live:
                yield dataclasses.replace(segment, author=None)

    def cut_prompt(prompt: AgentPrompt) -> AgentPrompt:
        limit = None if max_new_tokens else prompt.max_new_tokens
        segments = tuple(heard(prompt.segments))
        return dataclasses.replace(prompt, segments=segments, max_new_tokens=limit)

    def cut(round_: Round) -> Round:
        return dataclasses.replace(
            round_,
            agents=tuple(map(cut_prompt, round_.agents[: agents or None])),
            max_new_tokens=max_new_tokens or round_.max_new_tokens,
        )

    return dataclasses.replace(trace, rounds=tuple(map(cut, trace.rounds)))


def recorded_answers(round_: Round, tokenizer: Tokenizer, *, most: int) -> list[np.ndarray]:
    """Token ids of the recorded answers of a round, the first so many of each."""
    texts = [agent.recorded_output or "" for agent in round_.agents]
    return [np.array(tokenizer.encode_text(text)[:most], np.int32) for text in texts]


def preamble_of(path: str | None) -> str:
    """The text of a file, or the default preamble.

    Raises:
      PromptError: if the file cannot be read as text.
    """
    if path is None:
        return DEFAULT_PREAMBLE
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"preamble: {path} is no readable text file ({error})") from error


def parse_bytes(text: str) -> int:
    """Reads "1500000", "512MiB" or "1.5GiB" as bytes.

    Raises:
      ValueError: if the text is none of these.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*(|KiB|MiB|GiB)", text, re.ASCII)
    if match is None:
        raise ValueError(f"kv_memory: {text!r} is not a size; write 'auto', '512MiB' or '2GiB'")
    return int(float(match[1]) * _UNITS[match[2]])


def check_policies(policies: Sequence[str], options: PolicyOptions) -> None:
    """Refuses options that one of the policies does not take, before any of them serves.

    Raises:
      ValueError: names the option.
    """
    for policy in policies:
        make_policy(policy, PagePool(2), 16, "", options=options)


def needed_kv_memory(
    model: Model, trace: Trace, *, page_size: int, chat: bool, live: bool = False
) -> int:
    """Bytes that hold the largest round of a trace twice: once in use, once kept for reuse.

    Bases count as one more agent, whose segments begin pages of their own.

    Args:
      model: the model.
      trace: the rounds; in live runs with the authors of their blocks (`name_authors`).
      page_size: token slots in a page.
      chat: whether prompts are set into chat markup.
      live: whether blocks that have an author are as long as an answer may be; what does not fit
        the context then shows in the run.

    Raises:
      PromptError: a round can't be served.
    """
    check_page_size(page_size)
    context, pages = model.config.max_position_embeddings, 1
    for round_ in trace.rounds:
        prompts = tokenize_round(round_, model.tokenizer, chat=chat)
        blocks = {
            prompt.token_ids[span.start : span.stop].tobytes(): span.stop - span.start
            for prompt in prompts
            for span in prompt.spans
            if span.kind == "shared"
        }
        shared = list(blocks.values())
        if live:
            more = _growth(trace, round_, prompts)
            shared += more.values()
            tokens = [
                len(prompt.token_ids)
                + sum(more.get(span.id, 0) for span in prompt.spans)
                + (agent.max_new_tokens or round_.max_new_tokens)
                for agent, prompt in zip(round_.agents, prompts, strict=True)
            ]
        else:
            limits = answer_limits(round_, prompts, model.config)
            tokens = [len(p.token_ids) + limit for p, limit in zip(prompts, limits, strict=True)]
        preamble = 2 + 512 // page_size
        filled = [math.ceil(min(count, context) / page_size) for count in tokens]
        bases = [math.ceil(min(count, context) / page_size) + 1 for count in shared]
        pages = max(pages, 1 + 2 * (sum(filled) + sum(bases) + preamble))
    return pages * model.kv_spec(pages=1, page_size=page_size).page_bytes


def _growth(trace: Trace, round_: Round, prompts: Sequence[TokenizedPrompt]) -> dict[str, int]:
    """By id, how many tokens longer than recorded a block may become in a live run."""
    limits = [
        {prompt.agent: prompt.max_new_tokens or earlier.max_new_tokens for prompt in earlier.agents}
        for earlier in trace.rounds
    ]
    recorded = {span.id: span.stop - span.start for prompt in prompts for span in prompt.spans}
    return {
        segment.id: max(0, limits[author.round][author.agent] + 1 - recorded.get(segment.id, 0))
        for prompt in round_.agents
        for segment in prompt.segments
        if (author := segment.author) is not None
    }


def write_json(path: str, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all; numbers that are not finite become null.

    Raises:
      OSError: the file can't be written.
    """
    text = json.dumps(_finite(content), ensure_ascii=False, indent=1, allow_nan=False)
    target = Path(path).resolve()
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        # Names of files may hold bytes that are no text: those stay as JSON's escapes.
        temporary.write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_json_path(path: str | None) -> None:
    """As `check_file`, of `--json`."""
    if path is not None:
        check_file(path, "json")


def check_file(path: str, flag: str) -> None:
    """Refuses a path that a file could not be written to, before any work is done.

    Args:
      path: the path.
      flag: the flag that names it.

    Raises:
      PromptError: the folder does not exist or can't be written to, or the path is no file's.
    """
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise PromptError(f"{flag}: the folder {target.parent} does not exist; make it first")
    if not path or (target.exists() and not target.is_file()):
        raise PromptError(f"{flag}: {path!r} is no file; name one in a folder")
    trial = target.with_name(f"{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise PromptError(
            f"{flag}: {path!r} can't be written ({error.strerror}); name a file in another folder"
        ) from None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

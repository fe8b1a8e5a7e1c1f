"""Helpers of all scripts: models, traces and sizes from flag values, and JSON output."""

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
from tokendance_jax.engine.limits import check_page_size
from tokendance_jax.engine.requests import requests_of
from tokendance_jax.model import Model, load_model
from tokendance_jax.models.decoder.random import random_parameters
from tokendance_jax.models.families.qwen2 import preset
from tokendance_jax.models.loading import Checkpoint
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
PREAMBLE_HELP = (
    "Text file with the preamble in front of bases, for prompts that have no beginning in common; "
    "default: a built-in text."
)
# Default number of pages that the selection `head` computes.
HEAD_PAGES = PolicyOptions().head_pages

# Errors that a script reports in one line: wrong input, too little memory or disk space, packages
# that are not installed. Any other error is a bug in the program and shows its traceback.
ERRORS = (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError, ImportError)
INTERRUPTED = 130  # the exit status that shells report after Ctrl-C

_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def quiet_logs() -> None:
    """Shows only warnings and errors, unless --verbosity is given.

    At level INFO, JAX logs the accelerators that it does not find, and Orbax logs its every step.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)


def model_of(source: str, dtype: str) -> Model:
    """Loads the model that `--model` names: "demo", or any source that `load_model` accepts."""
    if source == DEMO:
        return demo_model(dtype)
    return load_model(source, dtype=dtype, progress=True)


def path_of(text: str, flag: str) -> Path:
    """Returns the path that a flag names, with `~` replaced by the home folder.

    Raises:
      PromptError: the home folder does not exist.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise PromptError(
            f"{flag}: {text}: there is no such home folder; give the full path"
        ) from None


def sized_model(source: str, dtype: str) -> Model:
    """Makes a model of a published size ("0.5B") with random weights, or loads one (`model_of`)."""
    try:
        config = preset(source)
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
      PromptError: the file can't be read, or holds no trace of that name.
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
    """Keeps the first rounds of a trace and the first agents of each, and limits the answers.

    Args:
      trace: the trace.
      rounds: how many rounds; 0: all.
      agents: how many agents of each round; 0: all.
      max_new_tokens: most tokens of an answer; 0: the limits in the trace.
      live: whether the trace is for a live run. Its blocks then get their authors, and blocks of
        agents that are left out are dropped, because no agent says them. In a replay they stay.

    Raises:
      PromptError: for live runs, see `name_authors`.
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
    """Returns the token ids of a round's recorded answers, at most `most` of each."""
    texts = [agent.recorded_output or "" for agent in round_.agents]
    return [np.array(tokenizer.encode_text(text)[:most], np.int32) for text in texts]


def preamble_of(path: str | None) -> str:
    """Reads the preamble from a text file; None: the default preamble.

    Raises:
      PromptError: if the file cannot be read as text.
    """
    if path is None:
        return DEFAULT_PREAMBLE
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"preamble: {path} is not a readable text file ({error})") from error


def parse_bytes(text: str) -> int:
    """Parses a size such as "1500000", "512MiB" or "1.5GiB" to a number of bytes.

    Raises:
      ValueError: if the text is not such a size.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*(|KiB|MiB|GiB)", text, re.ASCII)
    if match is None:
        raise ValueError(f"kv_memory: {text!r} is not a size; write 'auto', '512MiB' or '2GiB'")
    return int(float(match[1]) * _UNITS[match[2]])


def check_policies(policies: Sequence[str], options: PolicyOptions) -> None:
    """Checks that every policy accepts the options, before any of them serves.

    Raises:
      ValueError: a policy does not accept an option; the message names the option.
    """
    for policy in policies:
        make_policy(policy, PagePool(2), 16, "", options=options)


def needed_kv_memory(
    model: Model, trace: Trace, *, page_size: int, chat: bool, live: bool = False
) -> int:
    """Computes the bytes of a pool that holds a trace's largest round twice.

    One copy is in use while the other is kept for reuse. Bases count as one more agent, each of
    whose segments begins a new page.

    Args:
      model: the model.
      trace: the rounds; for live runs, with the authors of their blocks (`name_authors`).
      page_size: token slots in a page.
      chat: whether prompts are set into chat markup.
      live: whether blocks that have an author may be as long as the longest allowed answer. A
        prompt that then exceeds the context is an error only when its round is served.

    Raises:
      PromptError: a round can't be served.
    """
    check_page_size(page_size)
    context, pages = model.config.max_position_embeddings, 1
    for round_ in trace.rounds:
        requests = [] if live else requests_of(model, round_, chat=chat)
        prompts = [own.prompt for own in requests] or tokenize_round(
            round_, model.tokenizer, chat=chat
        )
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
            tokens = [len(own.prompt.token_ids) + own.limit for own in requests]
        preamble = 2 + 512 // page_size
        filled = [math.ceil(min(count, context) / page_size) for count in tokens]
        bases = [math.ceil(min(count, context) / page_size) + 1 for count in shared]
        pages = max(pages, 1 + 2 * (sum(filled) + sum(bases) + preamble))
    return pages * model.kv_spec(pages=1, page_size=page_size).page_bytes


def _growth(trace: Trace, round_: Round, prompts: Sequence[TokenizedPrompt]) -> dict[str, int]:
    """Returns, by block id, how many tokens longer than recorded a block may be in a live run."""
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
    """Writes a JSON file completely or not at all; numbers that are not finite become null.

    Raises:
      OSError: the file can't be written.
    """
    text = json.dumps(_finite(content), ensure_ascii=False, indent=1, allow_nan=False)
    target = Path(path).resolve()
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        # File names may hold bytes that are not valid text; these are written as JSON escapes.
        temporary.write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_json_path(path: str | None) -> None:
    """Checks the path of `--json`, if it is given; see `check_file`."""
    if path is not None:
        check_file(path, "json")


def check_file(path: str, flag: str) -> None:
    """Checks that a file can be written to a path, before any work is done.

    Args:
      path: the path.
      flag: the flag that names it.

    Raises:
      PromptError: the folder does not exist or can't be written to, or the path is not a file's.
    """
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise PromptError(f"{flag}: the folder {target.parent} does not exist; make it first")
    if not path or (target.exists() and not target.is_file()):
        raise PromptError(f"{flag}: {path!r} is not a file; name a file in a folder")
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

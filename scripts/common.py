"""What the scripts share: loading models and traces by flag values, and writing JSON."""

import dataclasses
import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging

from tokendance_jax.collector.policies import PolicyOptions
from tokendance_jax.demo import demo_tokenizer_json, demo_trace
from tokendance_jax.demo.model import demo_model
from tokendance_jax.model import Model, load_model
from tokendance_jax.models.loading import Checkpoint
from tokendance_jax.models.qwen2.config import Qwen2Config
from tokendance_jax.models.qwen2.random import random_parameters
from tokendance_jax.prompt import (
    PromptError,
    Round,
    Tokenizer,
    Trace,
    read_trace,
    tokenize_round,
)
from tokendance_jax.prompt.preamble import DEFAULT_PREAMBLE

DEMO = "demo"
PREAMBLE_HELP = "File with the text in front of bases where prompts have no beginning in common."
# What `head` computes unless told otherwise.
HEAD_PAGES = PolicyOptions().head_pages

_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def quiet_logs() -> None:
    """Shows warnings only, unless --verbosity says otherwise.

    JAX logs the accelerators that it does not find as information, Orbax its every step.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)


def model_of(source: str, dtype: str) -> Model:
    """Loads the model that `--model` names: "demo", or whatever `load_model` takes."""
    return demo_model(dtype) if source == DEMO else load_model(source, dtype=dtype, progress=True)


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
    """Reads the trace that `--trace` and `--trace_name` name: "demo", or a file."""
    return demo_trace() if path == DEMO else read_trace(Path(path), name)


def cut_trace(trace: Trace, *, rounds: int, agents: int, max_new_tokens: int) -> Trace:
    """Keeps the first rounds and the first agents of each, and limits the answers.

    The shared blocks of agents that are left out stay in the prompts of the others. Zero keeps all.
    """
    kept = trace.rounds[: rounds or None]
    kept = [dataclasses.replace(r, agents=r.agents[: agents or None]) for r in kept]
    if max_new_tokens:
        kept = [
            dataclasses.replace(
                moment,
                max_new_tokens=max_new_tokens,
                agents=tuple(
                    dataclasses.replace(agent, max_new_tokens=None) for agent in moment.agents
                ),
            )
            for moment in kept
        ]
    return dataclasses.replace(trace, rounds=tuple(kept))


def recorded_answers(moment: Round, tokenizer: Tokenizer, *, most: int) -> list[np.ndarray]:
    """Token ids of the recorded answers of a round, the first so many of each."""
    texts = [agent.recorded_output or "" for agent in moment.agents]
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
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|KiB|MiB|GiB)", text)
    if match is None:
        raise ValueError(f"kv_memory: {text!r} is not a size; write 'auto', '512MiB' or '2GiB'")
    return int(float(match[1]) * _UNITS[match[2]])


def needed_kv_memory(model: Model, trace: Trace, *, page_size: int, chat: bool) -> int:
    """Bytes that hold the largest round of a trace twice: once in use, once kept for reuse.

    Bases count as one more agent, whose segments begin pages of their own.
    """
    pages = 1
    for moment in trace.rounds:
        prompts = tokenize_round(moment, model.tokenizer, chat=chat)
        limits = [agent.max_new_tokens or moment.max_new_tokens for agent in moment.agents]
        tokens = [len(p.token_ids) + limit for p, limit in zip(prompts, limits, strict=True)]
        shared = {
            prompt.token_ids[span.start : span.stop].tobytes(): span.stop - span.start
            for prompt in prompts
            for span in prompt.spans
            if span.kind == "shared"
        }
        preamble = 2 + 512 // page_size
        filled = [math.ceil(count / page_size) for count in tokens]
        bases = [math.ceil(count / page_size) + 1 for count in shared.values()]
        pages = max(pages, 1 + 2 * (sum(filled) + sum(bases) + preamble))
    return pages * model.kv_spec(pages=1, page_size=page_size).page_bytes


def write_json(path: str, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    target = Path(path)
    with tempfile.NamedTemporaryFile(
        "w", dir=target.parent, prefix=target.name, delete=False, encoding="utf-8"
    ) as file:
        json.dump(content, file, ensure_ascii=False, indent=1)
        file.write("\n")
    os.replace(file.name, target)


def check_json_path(path: str | None) -> None:
    """Refuses a `--json` that could not be written, before any work is done.

    Raises:
      PromptError: if the folder does not exist.
    """
    if path and not Path(path).parent.is_dir():
        raise PromptError(f"json: the folder {Path(path).parent} does not exist; make it first")

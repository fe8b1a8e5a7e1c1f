"""The demo that ships in the package: a small town, and a small model that speaks its language.

`checkpoint/` is a Hugging Face folder exported by `scripts.demo.train_demo_model`.
"""

import importlib.resources
from importlib.resources.abc import Traversable

from tokendance_jax.demo.town import story
from tokendance_jax.prompt import Trace, read_trace


def demo_trace() -> Trace:
    """Makes the demo's trace: 8 agents and 3 rounds, with names and places held out of training.

    The recorded outputs are the right answers. The demo's model expects prompts in chat markup.
    """
    return story(0, 8, split="held_out")


def harbour_trace() -> Trace:
    """Reads a trace of ordinary English: 4 agents, 3 rounds, All-Gather."""
    with importlib.resources.as_file(importlib.resources.files(__name__) / "harbour.jsonl") as path:
        return read_trace(path)


def demo_tokenizer_json() -> str:
    """Reads the demo's `tokenizer.json`: a byte-level BPE of 1024 ids."""
    return _read("tokenizer.json")


def demo_chat_template() -> str:
    """Reads the demo's chat template: ChatML, as in Qwen2.5."""
    return _read("chat_template.jinja")


def demo_checkpoint() -> Traversable:
    """Returns the folder of the demo's model."""
    return importlib.resources.files(__name__) / "checkpoint"


def _read(name: str) -> str:
    return (demo_checkpoint() / name).read_text(encoding="utf-8")

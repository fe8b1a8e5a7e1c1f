"""The demo that ships in the package: four people of a harbour town, three rounds, All-Gather."""

import importlib.resources

from tokendance_jax.prompt import Trace, read_trace


def demo_trace() -> Trace:
    """Reads the demo's trace: 4 agents, 3 rounds, answers of at most 32 tokens."""
    with importlib.resources.as_file(importlib.resources.files(__name__) / "trace.jsonl") as path:
        return read_trace(path)


def demo_tokenizer_json() -> str:
    """Reads the demo's `tokenizer.json`: a byte-level BPE of 1024 ids."""
    return _read("tokenizer.json")


def demo_chat_template() -> str:
    """Reads the demo's chat template: ChatML, as Qwen2.5 has it."""
    return _read("chat_template.jinja")


def _read(name: str) -> str:
    return (importlib.resources.files(__name__) / name).read_text(encoding="utf-8")

"""Prompts on the host: rounds, segments, tokenizer, chat markup and traces. No device work."""

from tokendance_jax.prompt.authors import name_authors
from tokendance_jax.prompt.chat import chat_markup
from tokendance_jax.prompt.live import gather, put_answers, relive
from tokendance_jax.prompt.round import (
    AgentPrompt,
    Author,
    Kind,
    PromptError,
    Round,
    Sampling,
    Segment,
)
from tokendance_jax.prompt.separator import SEPARATOR, escape, split_prompt
from tokendance_jax.prompt.tokenized import (
    SpanKind,
    TokenizedPrompt,
    TokenSpan,
    tokenize_prompt,
    tokenize_round,
)
from tokendance_jax.prompt.tokenizer import TextStream, Tokenizer
from tokendance_jax.prompt.trace import Trace, read_trace, read_traces, write_trace

__all__ = [
    "SEPARATOR",
    "AgentPrompt",
    "Author",
    "Kind",
    "PromptError",
    "Round",
    "Sampling",
    "Segment",
    "SpanKind",
    "TextStream",
    "TokenSpan",
    "TokenizedPrompt",
    "Tokenizer",
    "Trace",
    "chat_markup",
    "escape",
    "gather",
    "name_authors",
    "put_answers",
    "read_trace",
    "read_traces",
    "relive",
    "split_prompt",
    "tokenize_prompt",
    "tokenize_round",
    "write_trace",
]

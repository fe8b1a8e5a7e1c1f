"""Prompts as token ids, with the span of every segment."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int32

from tokendance_jax.prompt.chat import chat_markup
from tokendance_jax.prompt.round import AgentPrompt, Fidelity, PromptError, Round, Segment
from tokendance_jax.prompt.tokenizer import Tokenizer

SpanKind = Literal["system", "history", "shared", "task", "markup"]


@dataclasses.dataclass(frozen=True, slots=True)
class TokenSpan:
    """A segment's place in a prompt.

    Attributes:
      kind: the segment's kind, or "markup" for text of the chat template, which is private.
      id: the segment's id. Markup is numbered "markup/0", "markup/1", ...
      start: index of its first token.
      stop: index after its last token.
    """

    kind: SpanKind
    id: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TokenizedPrompt:
    """An agent's prompt as token ids.

    Attributes:
      agent: name of the agent.
      token_ids: int32 [tokens], not writable.
      spans: cover the tokens in order and without gaps; none is empty.
      fidelity: what the agent may read; see `AgentPrompt`.
      answer_tokens: number of tokens at the end that belong to a given answer. They are always
        computed, even if pages with them exist.
    """

    agent: str
    token_ids: Int32[np.ndarray, " tokens"]
    spans: tuple[TokenSpan, ...]
    fidelity: Fidelity = "collective"
    answer_tokens: int = 0

    def followed_by(self, token_ids: Int32[np.ndarray, " more"]) -> "TokenizedPrompt":
        """Returns the prompt with an answer, or the beginning of one, appended as markup."""
        start = len(self.token_ids)
        more = TokenSpan("markup", "answer", start, start + len(token_ids))
        spans = (*self.spans, more) if len(token_ids) else self.spans
        ids = np.concatenate([self.token_ids, token_ids])
        return dataclasses.replace(
            self, token_ids=ids, spans=spans, answer_tokens=self.answer_tokens + len(token_ids)
        )


def tokenize_round(round_: Round, tokenizer: Tokenizer, *, chat: bool) -> list[TokenizedPrompt]:
    """Tokenizes the prompts of a round and encodes every distinct text once.

    Args:
      round_: the round.
      tokenizer: the model's tokenizer.
      chat: whether to wrap the segments in the model's chat markup: the system segments form the
        system message, all others one user turn, and the markup then opens the assistant's answer.
        Otherwise the prompt consists of the segments only.

    Returns:
      One prompt per agent, in the round's order.

    Raises:
      PromptError: a token id is outside the vocabulary, or the tasks have no tokens. With `chat`
        also: the model has no chat template or one that fails, or a system segment follows another
        kind.
    """
    encoder = _Encoder(tokenizer)
    return [encoder.prompt(prompt, chat) for prompt in round_.agents]


def tokenize_prompt(prompt: AgentPrompt, tokenizer: Tokenizer, *, chat: bool) -> TokenizedPrompt:
    """Tokenizes one agent's prompt, as `tokenize_round` does.

    Args:
      prompt: the agent's prompt.
      tokenizer: the model's tokenizer.
      chat: whether to wrap the segments in the model's chat markup.

    Returns:
      The ids and spans. Segments are encoded one by one and their ids concatenated, so that a
      shared segment has the same ids in every prompt.

    Raises:
      PromptError: as `tokenize_round`.
    """
    return _Encoder(tokenizer).prompt(prompt, chat)


class _Encoder:
    """Encodes texts and markup, each distinct string once."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._texts: dict[str, list[int]] = {}
        self._markups: dict[str, list[int]] = {}

    def prompt(self, prompt: AgentPrompt, chat: bool) -> TokenizedPrompt:
        segments = prompt.segments
        markups = self._around(prompt) if chat else ("",) * (len(segments) + 1)
        ids: list[int] = []
        spans: list[TokenSpan] = []

        def append(kind: SpanKind, id: str, new: list[int] | tuple[int, ...]) -> None:
            if new:
                spans.append(TokenSpan(kind, id, len(ids), len(ids) + len(new)))
                ids.extend(new)

        for number, markup in enumerate(markups):
            append("markup", f"markup/{number}", self._markup(markup))
            if number < len(segments):
                segment = segments[number]
                append(segment.kind, segment.id, self._content(segment, prompt.agent))
        if not any(span.kind == "task" for span in spans):
            raise PromptError(f"agent {prompt.agent!r}: the task tokenizes to no tokens")
        token_ids = np.array(ids, np.int32)
        token_ids.flags.writeable = False
        return TokenizedPrompt(prompt.agent, token_ids, tuple(spans), prompt.fidelity)

    def _around(self, prompt: AgentPrompt) -> tuple[str, ...]:
        """Returns the markup before, between and after the segments."""
        where = f"agent {prompt.agent!r}"
        template = self._tokenizer.chat_template
        if template is None:
            raise PromptError(f"{where}: the model has no chat template; use raw prompts")
        kinds = [segment.kind for segment in prompt.segments]
        system = kinds.count("system")
        if "system" in kinds[system:]:
            raise PromptError(f"{where}: a system segment follows another kind; put it first")
        special_tokens = self._tokenizer.special_tokens
        return chat_markup(template, system, len(kinds) - system, special_tokens)

    def _content(self, segment: Segment, agent: str) -> list[int] | tuple[int, ...]:
        if segment.text is not None:
            if segment.text not in self._texts:
                self._texts[segment.text] = self._tokenizer.encode_text(segment.text)
            return self._texts[segment.text]
        ids = segment.token_ids or ()
        # The device would silently clamp such an id.
        if ids and max(ids) >= self._tokenizer.vocab_size:
            raise PromptError(
                f"agent {agent!r}: segment {segment.id!r}: token id {max(ids)} is outside the "
                f"vocabulary of {self._tokenizer.vocab_size}; use the model's own tokenizer"
            )
        return ids

    def _markup(self, markup: str) -> list[int]:
        if markup not in self._markups:
            self._markups[markup] = self._tokenizer.encode_markup(markup)
        return self._markups[markup]

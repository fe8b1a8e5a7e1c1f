"""Converts text to token ids and back, with agents' texts strictly separate from chat markup."""

import json
from collections.abc import Iterable, Mapping, Set
from typing import Any

import tokenizers
from tokenizers import decoders, pre_tokenizers

from tokendance_jax.prompt.chat import SpecialToken
from tokendance_jax.prompt.round import PromptError, check_integer, check_text

_BYTES = frozenset(pre_tokenizers.ByteLevel.alphabet())
# BPE fields that produce tokens other than bytes and the results of merges.
_WHOLE_VOCABULARY = ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
# Characters of one to four bytes.
_PROBE = "a é\n漁 🐟"


class Tokenizer:
    """A byte-level BPE tokenizer with the model's chat template and stop tokens.

    Agents' texts may contain `<|im_end|>`, `<tool_call>` or the string of any other added token. If
    such a string became its token, an agent could end its own turn inside another agent's prompt.
    So texts go through `encode_text`, whose tokenizer has no added tokens, and only markup from the
    chat template goes through `encode_markup`.

    Attributes:
      chat_template: source of the Jinja template; None if the model has none.
      stop_ids: tokens that end the model's answer.
      special_tokens: strings of special tokens, by the names that the chat template uses.
      control_ids: ids of all added tokens, special or not; `encode_text` never returns one of them.
      vocab_size: the highest id plus one.
    """

    chat_template: str | None
    stop_ids: tuple[int, ...]
    special_tokens: dict[str, SpecialToken]
    control_ids: frozenset[int]
    vocab_size: int

    def __init__(
        self,
        tokenizer_json: str,
        chat_template: str | None = None,
        stop_ids: tuple[int, ...] = (),
        special_tokens: Mapping[str, SpecialToken] | None = None,
    ):
        """Builds both tokenizers.

        Args:
          tokenizer_json: the text of a `tokenizer.json`.
          chat_template: source of the model's Jinja chat template.
          stop_ids: tokens that end the model's answer.
          special_tokens: strings of special tokens, by the names that the chat template uses.

        Raises:
          PromptError: the JSON is invalid or not a byte-level BPE, plain text could become a
            control token, or a stop id is outside the vocabulary.
        """
        model = _bpe_model(tokenizer_json)
        try:
            self._full = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # The library raises bare Exception.
            raise PromptError(f"tokenizer JSON: {error}; give a whole tokenizer.json") from None
        # Encoding is complete and deterministic, even if the file asks for truncation or dropout.
        self._full.no_truncation()
        self._full.no_padding()
        self._full.model.dropout = None
        # The same BPE without added tokens and without a post-processor.
        self._text = tokenizers.Tokenizer(self._full.model)
        self._text.normalizer = self._full.normalizer
        self._text.pre_tokenizer = self._full.pre_tokenizer
        self.control_ids = frozenset(self._full.get_added_tokens_decoder())
        self.vocab_size = 1 + max(*model["vocab"].values(), *self.control_ids)
        if self.decode(self.encode_text(_PROBE)) != _PROBE:
            raise PromptError(
                "tokenizer JSON: text does not come back unchanged; give a byte-level BPE"
            )
        for token in _reachable(model):
            if model["vocab"].get(token) in self.control_ids:
                raise PromptError(
                    f"tokenizer JSON: the text {token!r} would become a control token; "
                    "take it out of added_tokens or out of merges"
                )
        for stop_id in stop_ids:
            check_integer(stop_id, "tokenizer: a stop id", 0, self.vocab_size - 1)
        self.chat_template = chat_template
        self.stop_ids = stop_ids
        self.special_tokens = dict(special_tokens or {})

    def encode_text(self, text: str) -> list[int]:
        """Encodes an agent's text. Strings of control tokens in it are ordinary characters.

        Args:
          text: any text without lone surrogates.

        Returns:
          The ids, none of them in `control_ids`.

        Raises:
          PromptError: NUL character or lone surrogate.
        """
        check_text(text, "text to encode")
        return self._text.encode(text, add_special_tokens=False).ids

    def encode_markup(self, text: str) -> list[int]:
        """Encodes chat markup. Strings of control tokens in it become these tokens.

        Args:
          text: trusted text, never from an agent.

        Returns:
          The ids.

        Raises:
          PromptError: NUL character or lone surrogate.
        """
        check_text(text, "markup to encode")
        return self._full.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids, with control tokens as their strings.

        Args:
          ids: token ids. Invalid UTF-8 bytes become U+FFFD; ids without a token are skipped.

        Returns:
          The text. For ids from `encode_text` it is the encoded text in the tokenizer's normal
          form.
        """
        return self._full.decode(list(ids), skip_special_tokens=False)

    def stream(self) -> "TextStream":
        """Starts to decode one answer token by token."""
        return TextStream(self._full)


class TextStream:
    """Decodes one answer token by token. The pieces of text add up to the decoded answer."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        # By keyword, because the first positional argument changed in tokenizers 0.22.
        self._stream = decoders.DecodeStream(skip_special_tokens=False)
        self._ids: list[int] = []
        self._given = 0

    def push(self, token_id: int) -> str:
        """Decodes the next token.

        Args:
          token_id: its id.

        Returns:
          The text that this token completes; empty while bytes of a character are missing.
        """
        self._ids.append(token_id)
        piece = self._stream.step(self._tokenizer, token_id) or ""
        self._given += len(piece)
        return piece

    def finish(self) -> str:
        """Ends the answer.

        Returns:
          The remaining text: U+FFFD for the bytes of a character that was never completed.
        """
        return self._tokenizer.decode(self._ids, skip_special_tokens=False)[self._given :]


def _bpe_model(tokenizer_json: str) -> dict[str, Any]:
    """Returns the model in a `tokenizer.json`; raises unless it has a token for every byte."""
    try:
        fields = json.loads(tokenizer_json)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"tokenizer JSON: {error}; give a tokenizer.json's text") from None
    match fields:
        case {"model": {"vocab": dict(vocabulary), "merges": list()} as model}:
            # The library silently drops characters that it has no token for.
            if missing := sorted(_BYTES - vocabulary.keys()):
                raise PromptError(
                    f"tokenizer JSON: {len(missing)} of 256 bytes have no token, {missing[0]!r} "
                    "among them; give a byte-level BPE"
                )
            return model
    raise PromptError("tokenizer JSON: no BPE model; give one with vocab and merges")


def _reachable(model: dict[str, Any]) -> Set[str]:
    """Returns the tokens that plain text may become: the bytes and the results of merges."""
    if any(model.get(field) for field in _WHOLE_VOCABULARY):
        return model["vocab"].keys()
    # Old files write a merge as one string.
    merged = {m.replace(" ", "", 1) if isinstance(m, str) else "".join(m) for m in model["merges"]}
    return _BYTES | merged

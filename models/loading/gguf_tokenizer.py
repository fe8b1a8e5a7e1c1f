"""Builds a Hugging Face tokenizer and the stop ids from the metadata of a GGUF file."""

import os
from collections.abc import Mapping

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from tokendance_jax.models.qwen2.errors import CheckpointError

# The published pre-tokenizer of Qwen2: contractions, letters, single digits, punctuation, space.
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")


def tokenizer_from_gguf(fields: Mapping[str, object], where: str | os.PathLike[str]) -> str:
    """Returns the `tokenizer.json` of a GGUF file's byte-level BPE vocabulary.

    Args:
      fields: The file's metadata.
      where: The file, for error messages.

    Raises:
      CheckpointError: The vocabulary is missing, malformed or of another kind.
    """
    for key, supported in (("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "qwen2")):
        if fields.get(key) != supported:
            problem = f"is {fields[key]!r}" if key in fields else "the field is missing"
            raise CheckpointError(where, key, problem, f"only {supported!r} is supported")
    tokens = _list(fields, "tokenizer.ggml.tokens", where)
    kinds = _token_types(fields, where)
    merges = _list(fields, "tokenizer.ggml.merges", where)
    # Control and user-defined tokens stay in the vocabulary: as added tokens they keep their ids.
    vocab = {token: i for i, token in enumerate(tokens) if kinds[i] != _UNUSED}
    try:
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        tokenizer = Tokenizer(BPE(vocab=vocab, merges=pairs))
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(
            where, "tokenizer.ggml.merges", f"no valid BPE ({error})", "the file is damaged"
        ) from None
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kinds[i] == _CONTROL, normalized=False)
            for i, token in enumerate(tokens)
            if kinds[i] in (_CONTROL, _USER_DEFINED)
        ]
    )
    return tokenizer.to_str()


def stop_ids_from_gguf(
    fields: Mapping[str, object], where: str | os.PathLike[str]
) -> tuple[int, ...]:
    """Returns the end-of-sequence id and the control tokens that end a turn or a document.

    Raises:
      CheckpointError: The end-of-sequence id or the vocabulary is missing.
    """
    eos = fields.get("tokenizer.ggml.eos_token_id")
    if not isinstance(eos, int):
        raise CheckpointError(
            where,
            "tokenizer.ggml.eos_token_id",
            "the field is missing" if eos is None else f"is {eos!r}",
            "it must be the id of the token that ends a generation",
        )
    tokens = _list(fields, "tokenizer.ggml.tokens", where)
    kinds = _token_types(fields, where)
    ends = {i for i, token in enumerate(tokens) if token in _STOP_TOKENS and kinds[i] == _CONTROL}
    return tuple(sorted({eos} | ends))


def _list(fields: Mapping[str, object], key: str, where: str | os.PathLike[str]) -> list:
    value = fields.get(key)
    if not isinstance(value, list) or not value:
        raise CheckpointError(
            where, key, "the tokenizer is missing", "use a GGUF file that contains its tokenizer"
        )
    return value


def _token_types(fields: Mapping[str, object], where: str | os.PathLike[str]) -> list[int]:
    key = "tokenizer.ggml.token_type"
    kinds = _list(fields, key, where)
    tokens = _list(fields, "tokenizer.ggml.tokens", where)
    if len(kinds) != len(tokens):
        raise CheckpointError(
            where, key, f"has {len(kinds)} entries", f"there are {len(tokens)} tokens"
        )
    unknown = set(kinds) - {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED}
    if unknown:
        raise CheckpointError(
            where,
            key,
            f"token type {min(unknown)}",
            "normal (1), control (3), user-defined (4) and unused (5) tokens are supported",
        )
    return kinds

"""Builds a Hugging Face tokenizer, stop ids and special tokens from a GGUF file's metadata."""

import os
from collections.abc import Mapping

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from tokendance_jax.models.errors import CheckpointError

# The published pre-tokenizer of Qwen2: contractions, letters, single digits, punctuation, space.
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names for this pre-tokenizer.
_QWEN2_NAMES = ("qwen2", "deepseek-r1-qwen", "f2llmv2", "kormo", "megrez")
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
# Tokens that end a turn or a document in llama.cpp, except those specific to another model family.
_END_TOKENS = frozenset(
    {
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<eos>",
        "</s>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)
_EOS = "tokenizer.ggml.eos_token_id"
_END_IDS = (_EOS, "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
# GGUF fields by the names that chat templates use. The format misspells "separator".
_SPECIAL_IDS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": _EOS,
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "sep_token": "tokenizer.ggml.seperator_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
    "cls_token": "tokenizer.ggml.cls_token_id",
    "mask_token": "tokenizer.ggml.mask_token_id",
}


def tokenizer_from_gguf(fields: Mapping[str, object], where: str | os.PathLike[str]) -> str:
    """Returns the `tokenizer.json` of a GGUF file's byte-level BPE vocabulary.

    Args:
      fields: The file's metadata.
      where: The file, for error messages.

    Raises:
      CheckpointError: The vocabulary is missing, malformed or of another kind.
    """
    for key, supported in (
        ("tokenizer.ggml.model", ("gpt2",)),
        ("tokenizer.ggml.pre", _QWEN2_NAMES),
    ):
        if fields.get(key) not in supported:
            problem = f"is {fields[key]!r}" if key in fields else "the field is missing"
            names = ", ".join(map(repr, supported))
            raise CheckpointError(where, key, problem, f"only {names} is supported")
    tokens = _list(fields, "tokenizer.ggml.tokens", where)
    kinds = _token_types(fields, where)
    merges = _list(fields, "tokenizer.ggml.merges", where)
    # The vocabulary includes control and user-defined tokens, so that they keep their ids when they
    # are added below.
    vocab = {token: i for i, token in enumerate(tokens) if kinds[i] != _UNUSED}
    try:
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        tokenizer = Tokenizer(BPE(vocab=vocab, merges=pairs))
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(
            where, "tokenizer.ggml.merges", f"not a valid BPE ({error})", "the file is damaged"
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
    """Returns the ids that end a generation in llama.cpp, in ascending order.

    These are the ids of end of sequence, turn and message, and of the control and user-defined
    tokens whose text marks the end of a turn or a document.

    Raises:
      CheckpointError: The end-of-sequence id or the vocabulary is missing, or an id has no token.
    """
    tokens = _list(fields, "tokenizer.ggml.tokens", where)
    ends = set()
    for key in _END_IDS:
        token_id = fields.get(key)
        if key in fields or key == _EOS:
            if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
                raise CheckpointError(
                    where,
                    key,
                    f"is {token_id!r}" if key in fields else "the field is missing",
                    f"it must be the id of one of {len(tokens)} tokens, which ends a generation",
                )
            ends.add(token_id)
    kinds = _token_types(fields, where)
    ends |= {i for i, token in enumerate(tokens) if token in _END_TOKENS and kinds[i] == _CONTROL}
    return tuple(sorted(ends))


def special_tokens_from_gguf(
    fields: Mapping[str, object], where: str | os.PathLike[str]
) -> dict[str, str]:
    """Returns the special tokens by the names that chat templates use.

    Leaves out ids outside the vocabulary, which some files use for a special token that is absent.

    Raises:
      CheckpointError: The vocabulary is missing.
    """
    tokens = _list(fields, "tokenizer.ggml.tokens", where)
    special = {}
    for name, key in _SPECIAL_IDS.items():
        token_id = fields.get(key)
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            special[name] = tokens[token_id]
    return special


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
    # llama.cpp treats end tokens as control tokens, whatever their type in the file. An end token
    # that merges produce stays a word, because it could not be told from text.
    merges = _list(fields, "tokenizer.ggml.merges", where)
    words = {merge.replace(" ", "", 1) for merge in merges}
    return [
        _CONTROL
        if token in _END_TOKENS and kind in (_NORMAL, _USER_DEFINED) and token not in words
        else kind
        for token, kind in zip(tokens, kinds, strict=True)
    ]

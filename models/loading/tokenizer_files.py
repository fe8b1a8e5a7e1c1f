"""Reads tokenizer, added and special tokens, chat template and end tokens from a folder.

These are spread over several files, with repetitions: `tokenizer.json`, `tokenizer_config.json`,
`special_tokens_map.json`, `added_tokens.json`, `config.json` and `generation_config.json`. The
files are merged as in transformers. If they contradict each other, the folder is refused.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from tokendance_jax.models.decoder.config import DecoderConfig
from tokendance_jax.models.errors import CheckpointError
from tokendance_jax.models.loading.sidecars import LISTED, SPECIAL_NAMES, read_json, read_text

_TOKENIZER, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_SPECIAL, _ADDED = "special_tokens_map.json", "added_tokens.json"
_DECODER = "added_tokens_decoder"
# `extra_special_tokens` may also be an object of tokens by name.
_LISTS = (LISTED, "extra_special_tokens")
_FIELDS = {"content", "single_word", "lstrip", "rstrip", "normalized", "special"}
# The token that Qwen2's tokenizer in transformers uses for these names if no file defines them.
_DEFAULT_NAMES, _DEFAULT = ("eos_token", "unk_token", "pad_token"), "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class TextTools:
    """The fields of a `Checkpoint` that concern text, under the same names."""

    tokenizer_json: str
    chat_template: str | None
    stop_ids: tuple[int, ...]
    special_tokens: dict[str, str | tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class _Claim:
    """A token as a file describes it, with its id in this file, if the file has one."""

    file: Path
    token: AddedToken
    id: int | None = None


def read_text_tools(folder: Path, config: DecoderConfig) -> TextTools:
    """Reads tokenizer, chat template, end tokens and special tokens from a folder.

    Added tokens are, in this order, those of `tokenizer.json`; those of `added_tokens_decoder` in
    `tokenizer_config.json` by ascending id, or of `added_tokens.json` if there is no decoder; and
    the special tokens. Special tokens are those of `tokenizer_config.json`. If there is no decoder,
    `special_tokens_map.json` overrides them. End tokens are all that any file names: `eos_token_id`
    in `config.json` and `generation_config.json`, `eos_token` in `tokenizer_config.json` and
    `special_tokens_map.json`.

    Args:
      folder: The folder.
      config: The model's configuration.

    Raises:
      CheckpointError: A file is missing or malformed, files contradict each other, a token has no
        row in the embedding, or no file names an end token.
    """
    text = read_text(folder / _TOKENIZER, "the tokenizer", "save the model with its fast tokenizer")
    tokenizer = parse_tokenizer(folder, text)
    settings, special = (_optional(folder / name) for name in (_SETTINGS, _SPECIAL))
    sources = [(folder / _SETTINGS, settings), (folder / _SPECIAL, special)]
    read = sources[:1] if _DECODER in settings else sources
    named, listed = _special_tokens(read)
    if _add_tokens(tokenizer, folder, settings, [*named.values(), *listed], config):
        text = tokenizer.to_str()
    check_ids(folder, tokenizer, (), config)
    ends = [_named(*source).get("eos_token") for source in sources]
    end_ids = [tokenizer.token_to_id(claim.token.content) for claim in ends if claim]
    stop_ids = _stop_ids(folder, {i for i in end_ids if i is not None}, config)
    told = {name for _, fields in read for name in fields}
    special_tokens: dict[str, str | tuple[str, ...]] = {
        name: _DEFAULT
        for name in _DEFAULT_NAMES
        if name not in told and tokenizer.token_to_id(_DEFAULT) is not None
    }
    special_tokens |= {name: claim.token.content for name, claim in named.items()}
    if listed:
        special_tokens[LISTED] = tuple(claim.token.content for claim in listed)
    return TextTools(text, _chat_template(folder, settings), stop_ids, special_tokens)


def parse_tokenizer(where: str | os.PathLike[str], tokenizer_json: str) -> Tokenizer:
    """Returns the tokenizer of a `tokenizer.json`.

    Raises:
      CheckpointError: The text is malformed.
    """
    try:
        return Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(
            where, "tokenizer", f"malformed ({error})", "a Hugging Face tokenizer.json is needed"
        ) from None


def check_ids(
    where: str | os.PathLike[str],
    tokenizer: Tokenizer,
    stop_ids: tuple[int, ...],
    config: DecoderConfig,
) -> None:
    """Checks that every id of the tokenizer and in `stop_ids` has a row in the embedding.

    Raises:
      CheckpointError: An id has no row, because the tokenizer belongs to another model.
    """
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    last = max(vocab, key=vocab.__getitem__)
    if vocab[last] >= config.vocab_size:
        raise CheckpointError(
            where,
            "tokenizer",
            f"token {last!r} has id {vocab[last]}",
            f"the embedding has {config.vocab_size} rows: the tokenizer belongs to another model",
        )
    for stop in stop_ids:
        _check_end(where, "eos_token_id", stop, config)


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _special_tokens(
    sources: list[tuple[Path, dict[str, Any]]],
) -> tuple[dict[str, _Claim], list[_Claim]]:
    """Returns the special tokens by name, in transformers' order, and those without a name."""
    named: dict[str, _Claim | None] = {}
    listed: list[_Claim] = []
    for file, fields in sources:
        named |= _named(file, fields)
        for key in _LISTS:
            tokens = fields.get(key)
            if isinstance(tokens, list) and not listed:
                listed = [_Claim(file, _special(file, key, token)) for token in tokens]
    first = {name: named[name] for name in SPECIAL_NAMES if name in named} | named
    return {name: claim for name, claim in first.items() if claim}, listed


def _named(file: Path, fields: dict[str, Any]) -> dict[str, _Claim | None]:
    """Returns the tokens that a file names; None for names that it sets to null or empty."""
    models = fields.get("extra_special_tokens")
    models = models if isinstance(models, dict) else {}
    named: dict[str, _Claim | None] = {}
    for name, value in (fields | models).items():
        # Other fields, such as `add_bos_token`, end in `_token` too.
        model = name in models or (name.endswith("_token") and isinstance(value, str | dict))
        if name in SPECIAL_NAMES and value in (None, ""):
            named[name] = None
        elif name in SPECIAL_NAMES or model:
            named[name] = _Claim(file, _special(file, name, value))
    return named


def _special(file: Path, name: str, value: object) -> AddedToken:
    fields = {"content": value} if isinstance(value, str) else value
    return _added_token(file, name, fields, special=True)


def _added_token(file: Path, name: str, fields: Any, **fixed: Any) -> AddedToken:
    """Returns a token as a file describes it. Properties in `fixed` override the file's."""
    if isinstance(fields, dict) and isinstance(fields.get("content"), str) and fields["content"]:
        known = {key: value for key, value in fields.items() if key in _FIELDS}
        try:
            return AddedToken(**(known | fixed))
        except TypeError:
            pass
    raise CheckpointError(
        file, name, f"is {fields!r}", "must be a token's text, or an object with its content"
    )


def _add_tokens(
    tokenizer: Tokenizer,
    folder: Path,
    settings: dict[str, Any],
    special: list[_Claim],
    config: DecoderConfig,
) -> bool:
    """Adds the tokens that `tokenizer.json` lacks. Returns whether it lacked any."""
    names = {claim.token.content for claim in special}
    numbered = _numbered(folder / _ADDED, _optional(folder / _ADDED), names)
    present = tokenizer.get_added_tokens_decoder().values()
    if _DECODER in settings:
        adding, stale = _decoder(folder / _SETTINGS, settings[_DECODER]), numbered
        # A token that differs only in how it is matched in text is set again.
        known = {repr(token) for token in present}
        lacking = [claim for claim in adding if repr(claim.token) not in known]
    else:
        adding, stale = numbered, []
        known = {token.content for token in present}
        lacking = [claim for claim in adding if claim.token.content not in known]
    changed = bool(lacking)
    tokenizer.add_tokens(
        [claim.token for claim in sorted(lacking, key=lambda claim: claim.id or 0)]
    )
    for claim in adding:
        _check_claim(tokenizer, claim, folder)
    for claim in special:
        content = claim.token.content
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        # A special token that is also a word of the vocabulary keeps the word's id.
        if content not in added and not _is_word(tokenizer, content):
            changed = True
            tokenizer.add_tokens([claim.token])
    for claim in stale:
        _check_claim(tokenizer, claim, folder)
    for claim in (*adding, *special):
        token_id = tokenizer.token_to_id(claim.token.content)
        if token_id is not None and token_id >= config.vocab_size:
            raise CheckpointError(
                claim.file,
                claim.token.content,
                f"the token has id {token_id} after those of {_TOKENIZER}",
                f"the embedding has {config.vocab_size} rows: save model and tokenizer together",
            )
    return changed


def _is_word(tokenizer: Tokenizer, content: str) -> bool:
    token_id = tokenizer.token_to_id(content)
    return token_id is not None and tokenizer.encode(content, add_special_tokens=False).ids == [
        token_id
    ]


def _decoder(file: Path, decoder: object) -> list[_Claim]:
    if not isinstance(decoder, dict) or not all(key.isdecimal() for key in decoder):
        raise CheckpointError(
            file, _DECODER, "is not an object of tokens by id", "save the tokenizer again"
        )
    return [
        _Claim(file, _added_token(file, f"{_DECODER}: {key}", fields), int(key))
        for key, fields in decoder.items()
    ]


def _numbered(file: Path, ids: dict[str, Any], special: set[str]) -> list[_Claim]:
    for content, token_id in ids.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise CheckpointError(file, content, f"is {token_id!r}", "must be the token's id")
    return [
        _Claim(
            file, _added_token(file, content, {"content": content}, special=content in special), i
        )
        for content, i in ids.items()
    ]


def _check_claim(tokenizer: Tokenizer, claim: _Claim, folder: Path) -> None:
    token_id = tokenizer.token_to_id(claim.token.content)
    if token_id != claim.id:
        others = " and ".join(
            str(folder / name)
            for name in (_TOKENIZER, _SETTINGS)
            if (folder / name).exists() and folder / name != claim.file
        )
        raise CheckpointError(
            claim.file,
            claim.token.content,
            f"the token has id {claim.id} here, and "
            f"{'none' if token_id is None else token_id} after {others}",
            "save the tokenizer again, so that its files agree",
        )


def _stop_ids(folder: Path, ends: set[int], config: DecoderConfig) -> tuple[int, ...]:
    """Merges the end tokens of the tokenizer's files, `ends`, with those of the model's files."""
    stops = set(ends)
    for name in ("generation_config.json", "config.json"):
        ids = _optional(folder / name).get("eos_token_id")
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise CheckpointError(
                folder / name, "eos_token_id", f"is {ids!r}", "must be one id or a list"
            )
        for stop in ids:
            _check_end(folder / name, "eos_token_id", stop, config)
        stops |= set(ids)
    if not stops:
        raise CheckpointError(
            folder,
            "eos_token_id",
            "no file names the token that ends a generation",
            "set eos_token_id in generation_config.json",
        )
    return tuple(sorted(stops))


def _check_end(
    where: str | os.PathLike[str], field: str, token_id: int, config: DecoderConfig
) -> None:
    if not 0 <= token_id < config.vocab_size:
        raise CheckpointError(
            where, field, f"is {token_id}", f"the embedding has {config.vocab_size} rows"
        )


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """Returns the chat template from its own file or from the settings, if there is one."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return read_text(file, "chat_template", "it must be UTF-8 text")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict)]
        defaults = [item.get("template") for item in named if item.get("name") == "default"]
        template = defaults[0] if defaults else template
    if template is None or isinstance(template, str):
        return template
    raise CheckpointError(
        folder / _SETTINGS,
        "chat_template",
        "no default template",
        "it must be a string or a list with a template named 'default'",
    )

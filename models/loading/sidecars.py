"""The small files beside the weights: configuration, tokenizer, chat template and stop ids."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tokendance_jax.models.loading.checkpoint import Checkpoint
from tokendance_jax.models.qwen2.config import Qwen2Config
from tokendance_jax.models.qwen2.errors import CheckpointError


def read_config(folder: Path) -> Qwen2Config:
    """Reads `config.json`.

    Raises:
      CheckpointError: It is missing, malformed or describes a model that is not supported.
    """
    file = folder / "config.json"
    return Qwen2Config.from_hf(read_json(file), str(file))


def read_tokenizer(folder: Path) -> str:
    """Returns the content of `tokenizer.json`.

    Raises:
      CheckpointError: It is missing.
    """
    return _read_text(
        folder / "tokenizer.json", "the tokenizer", "save the model with its fast tokenizer"
    )


def read_chat_template(folder: Path) -> str | None:
    """Returns the chat template of its own file or of `tokenizer_config.json`, if there is one.

    Raises:
      CheckpointError: The template is malformed, or none of several named ones is the default.
    """
    file = folder / "chat_template.jinja"
    if file.exists():
        return _read_text(file, "chat_template", "it must be a UTF-8 text")
    file = folder / "tokenizer_config.json"
    template = read_json(file).get("chat_template") if file.exists() else None
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict)]
        defaults = [item.get("template") for item in named if item.get("name") == "default"]
        template = defaults[0] if defaults else template
    if template is None or isinstance(template, str):
        return template
    raise CheckpointError(
        file, "chat_template", "no default template", "a string or one named 'default' is supported"
    )


def read_stop_ids(folder: Path, tokenizer_json: str) -> tuple[int, ...]:
    """Returns the ids that end a generation, in ascending order.

    The first of these that has any: `generation_config.json`, `config.json` (`eos_token_id`, one
    id or a list) and `tokenizer_config.json` (`eos_token`).

    Raises:
      CheckpointError: None of them names an end token.
    """
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        ids = read_json(file).get("eos_token_id") if file.exists() else None
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise CheckpointError(file, "eos_token_id", f"is {ids!r}", "must be one id or a list")
        return tuple(sorted(set(ids)))
    file = folder / "tokenizer_config.json"
    token = read_json(file).get("eos_token") if file.exists() else None
    content = token.get("content") if isinstance(token, dict) else token
    stop = parse_tokenizer(folder, tokenizer_json).token_to_id(content) if content else None
    if stop is None:
        raise CheckpointError(
            folder,
            "eos_token_id",
            "no file names the token that ends a generation",
            "set eos_token_id in generation_config.json",
        )
    return (stop,)


def check_ids(
    where: str | os.PathLike[str],
    tokenizer_json: str,
    stop_ids: tuple[int, ...],
    config: Qwen2Config,
) -> None:
    """Checks that the tokenizer parses and that every id has a row in the embedding.

    Raises:
      CheckpointError: The tokenizer is malformed or belongs to another model.
    """
    vocab = parse_tokenizer(where, tokenizer_json).get_vocab_size(with_added_tokens=True)
    if vocab > config.vocab_size:
        raise CheckpointError(
            where,
            "tokenizer",
            f"has {vocab} tokens",
            f"the embedding has {config.vocab_size} rows: the tokenizer is of another model",
        )
    for stop in stop_ids:
        if not 0 <= stop < config.vocab_size:
            raise CheckpointError(
                where, "eos_token_id", f"is {stop}", f"the embedding has {config.vocab_size} rows"
            )


def parse_tokenizer(where: str | os.PathLike[str], tokenizer_json: str) -> Tokenizer:
    """Returns the tokenizer of a `tokenizer.json`.

    Raises:
      CheckpointError: It is malformed.
    """
    try:
        return Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(
            where, "tokenizer", f"malformed ({error})", "a Hugging Face tokenizer.json is needed"
        ) from None


def read_json(file: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
      CheckpointError: The file is missing, or holds no JSON object.
    """
    text = _read_text(file, file.name, "the folder must hold it")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            file, file.name, f"malformed JSON ({error})", "download it again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(file, file.name, "is no JSON object", "download it again")
    return value


def check_target(target: str | os.PathLike[str]) -> None:
    """Checks, before long work, that a folder can be written to a target.

    Raises:
      CheckpointError: The target exists.
    """
    if Path(target).exists():
        raise CheckpointError(target, "target", "exists already", "name a new folder")


@contextlib.contextmanager
def new_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Makes a folder that appears at the target when the block ends well, and else not at all.

    Args:
      target: A folder that does not exist yet. Missing parents are made.

    Raises:
      CheckpointError: The target exists.
    """
    target = Path(target).absolute()
    check_target(target)
    # A sibling, so that the last step is a rename on one file system.
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_config(folder: Path, fields: Mapping[str, object], name: str = "config.json") -> None:
    """Writes a JSON object as one of a checkpoint's small files."""
    (folder / name).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def write_sidecars(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes `generation_config.json`, `tokenizer.json`, and the chat template if there is one."""
    write_config(folder, {"eos_token_id": list(checkpoint.stop_ids)}, "generation_config.json")
    (folder / "tokenizer.json").write_text(checkpoint.tokenizer_json, encoding="utf-8")
    if checkpoint.chat_template is not None:
        (folder / "chat_template.jinja").write_text(
            checkpoint.chat_template, encoding="utf-8", newline=""
        )


def _read_text(file: Path, subject: str, remedy: str) -> str:
    try:
        return file.read_bytes().decode("utf-8")  # text mode would change line ends
    except FileNotFoundError:
        raise CheckpointError(file, subject, "the file is missing", remedy) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(file, subject, f"is not UTF-8 ({error})", remedy) from None

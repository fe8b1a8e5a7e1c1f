"""The small files next to the weights: reads `config.json`, and writes all of them or none."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokendance_jax.models.decoder.config import DecoderConfig
from tokendance_jax.models.errors import CheckpointError
from tokendance_jax.models.families.registry import family_of
from tokendance_jax.models.loading.checkpoint import Checkpoint

# Names of special tokens, in the order in which transformers adds them.
SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# The list of special tokens without a name.
LISTED = "additional_special_tokens"


def read_config(folder: Path) -> DecoderConfig:
    """Reads `config.json`.

    Raises:
      CheckpointError: The file is missing, malformed or describes a model that is not supported.
    """
    file = folder / "config.json"
    fields = read_json(file)
    return family_of(fields, "model_type", str(file)).from_hf(fields, str(file))


def read_json(file: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
      CheckpointError: The file is missing or does not hold a JSON object.
    """
    text = read_text(file, file.name, "the folder must hold it")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            file, file.name, f"malformed JSON ({error})", "download it again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(file, file.name, "is not a JSON object", "download it again")
    return value


def check_target(target: str | os.PathLike[str]) -> None:
    """Checks that a target does not exist yet. Call this before long work.

    Raises:
      CheckpointError: The target exists.
    """
    if Path(target).exists():
        raise CheckpointError(target, "target", "exists already", "name a new folder")


@contextlib.contextmanager
def new_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Creates a folder that appears at the target only if the `with` block succeeds.

    Args:
      target: A folder that does not exist yet. Missing parents are created.

    Yields:
      A temporary folder to write to. It is renamed to the target, or deleted after an error.

    Raises:
      CheckpointError: The target exists.
    """
    target = Path(target).absolute()
    check_target(target)
    # Next to the target, so that the last step is a rename within one file system.
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_config(folder: Path, fields: Mapping[str, object], name: str = "config.json") -> None:
    """Writes a JSON object to one of a checkpoint's small files."""
    (folder / name).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def write_sidecars(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the files of the tokenizer and chat template.

    These are `generation_config.json`, `tokenizer.json`, `tokenizer_config.json`, and
    `chat_template.jinja` if there is a template.
    """
    write_config(folder, {"eos_token_id": list(checkpoint.stop_ids)}, "generation_config.json")
    (folder / "tokenizer.json").write_text(checkpoint.tokenizer_json, encoding="utf-8")
    special = dict(checkpoint.special_tokens)
    settings: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    # Null says that there is no such token. Some names would have a default otherwise.
    settings |= {name: special.pop(name, None) for name in SPECIAL_NAMES}
    if LISTED in special:
        settings[LISTED] = special.pop(LISTED)
    if special:
        settings["extra_special_tokens"] = special
    # Other loaders read the template from here.
    settings["chat_template"] = checkpoint.chat_template
    write_config(folder, settings, "tokenizer_config.json")
    if checkpoint.chat_template is not None:
        (folder / "chat_template.jinja").write_text(
            checkpoint.chat_template, encoding="utf-8", newline=""
        )


def read_text(file: Path, subject: str, remedy: str) -> str:
    """Returns the text of a file.

    Raises:
      CheckpointError: The file is missing or not UTF-8.
    """
    try:
        return file.read_bytes().decode("utf-8")  # text mode would convert line ends
    except FileNotFoundError:
        raise CheckpointError(file, subject, "the file is missing", remedy) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(file, subject, f"is not UTF-8 ({error})", remedy) from None

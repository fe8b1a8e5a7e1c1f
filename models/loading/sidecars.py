"""The small files beside the weights: reads `config.json`, writes all, whole or not at all."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokendance_jax.models.loading.checkpoint import Checkpoint
from tokendance_jax.models.qwen2.config import Qwen2Config
from tokendance_jax.models.qwen2.errors import CheckpointError

# Special tokens with a name, in the order in which transformers adds them.
SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Those without.
LISTED = "additional_special_tokens"


def read_config(folder: Path) -> Qwen2Config:
    """Reads `config.json`.

    Raises:
      CheckpointError: It is missing, malformed or describes a model that is not supported.
    """
    file = folder / "config.json"
    return Qwen2Config.from_hf(read_json(file), str(file))


def read_json(file: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
      CheckpointError: The file is missing, or holds no JSON object.
    """
    text = read_text(file, file.name, "the folder must hold it")
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
    """Writes the files about text.

    These are `generation_config.json`, `tokenizer.json`, `tokenizer_config.json`, and the chat
    template's if there is one.
    """
    write_config(folder, {"eos_token_id": list(checkpoint.stop_ids)}, "generation_config.json")
    (folder / "tokenizer.json").write_text(checkpoint.tokenizer_json, encoding="utf-8")
    special = dict(checkpoint.special_tokens)
    settings: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    # Null says that there is none: some names have defaults.
    settings |= {name: special.pop(name, None) for name in SPECIAL_NAMES}
    if LISTED in special:
        settings[LISTED] = special.pop(LISTED)
    if special:
        settings["extra_special_tokens"] = special
    # Other loaders take the template from here.
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
        return file.read_bytes().decode("utf-8")  # text mode would change line ends
    except FileNotFoundError:
        raise CheckpointError(file, subject, "the file is missing", remedy) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(file, subject, f"is not UTF-8 ({error})", remedy) from None

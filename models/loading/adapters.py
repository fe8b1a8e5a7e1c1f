"""Recognises adapters, such as LoRA, and refuses them by name."""

import os
from collections.abc import Iterable
from pathlib import Path

from tokendance_jax.models.errors import CheckpointError
from tokendance_jax.models.loading.sidecars import read_json

_CONFIG = "adapter_config.json"
_FILES = (_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
# In tensor names: the prefix of a model that PEFT wrapped, and the infix of LoRA's own parameters.
_PREFIX, _INFIX = "base_model.model.", ".lora_"


def refuse_adapter_folder(folder: Path) -> None:
    """Checks that a folder holds no adapter. transformers would apply one found next to a model.

    Raises:
      CheckpointError: The folder holds an adapter.
    """
    for name in _FILES:
        if (folder / name).exists():
            config = read_json(folder / _CONFIG) if (folder / _CONFIG).exists() else {}
            base = config.get("base_model_name_or_path") or "its base model"
            raise adapter_error(folder, name, f"an adapter of {base}")


def refuse_adapter_tensors(names: Iterable[str], where: str | os.PathLike[str]) -> None:
    """Checks that no tensor belongs to an adapter.

    Raises:
      CheckpointError: A tensor belongs to an adapter or to a model wrapped for training one.
    """
    for name in names:
        if name.startswith(_PREFIX) or _INFIX in name:
            raise adapter_error(where, name, "a tensor of an adapter")


def adapter_error(where: str | os.PathLike[str], subject: str, problem: str) -> CheckpointError:
    """Returns the error for an adapter that is passed as a model."""
    return CheckpointError(
        where,
        subject,
        problem,
        "only whole models are supported: merge the adapter into its base model first "
        "(merge_and_unload in PEFT, llama-export-lora for GGUF) and load the result",
    )

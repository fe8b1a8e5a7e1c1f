"""Detects the format of a source and loads it."""

import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tokendance_jax.models.errors import CheckpointError
from tokendance_jax.models.loading.checkpoint import Checkpoint
from tokendance_jax.models.loading.gguf_checkpoint import load_gguf
from tokendance_jax.models.loading.huggingface import load_huggingface
from tokendance_jax.models.loading.orbax_folder import PARAMS, load_orbax

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors"]


def load_checkpoint(
    source: str | os.PathLike[str], *, dtype: jax.typing.DTypeLike, progress: bool = False
) -> Checkpoint:
    """Loads a model of a known family onto the default device.

    All names, shapes and sizes are checked before any weight is read. Loading needs little memory
    besides the arrays: weights are read and converted in slices.

    Args:
      source: A folder with `config.json` and safetensors files, a GGUF file, a folder that
        `save_orbax` wrote, or a Hugging Face hub id `organisation/name`.
      dtype: Dtype of the matrices: float32 or bfloat16. Norm weights and biases become float32.
      progress: Whether to show a progress bar on stderr.

    Raises:
      CheckpointError: The source does not exist, or is damaged, incomplete or not supported.
      ValueError: `dtype` is neither float32 nor bfloat16.
    """
    dtype = np.dtype(dtype)
    if dtype not in (np.float32, jnp.bfloat16):
        raise ValueError(f"load_checkpoint: dtype is {dtype}; float32 and bfloat16 are supported")
    try:
        path = Path(source).expanduser()
    except RuntimeError:
        raise CheckpointError(
            os.fspath(source), "source", "there is no such home folder", "write the path in full"
        ) from None
    if path.is_file():
        return load_gguf(path, dtype=dtype, progress=progress)
    if not path.exists():
        folder, name = _download(os.fspath(source)), os.fspath(source)
        return load_huggingface(folder, name, dtype=dtype, progress=progress)
    if (path / PARAMS).is_dir():
        return load_orbax(path, dtype=dtype, progress=progress)
    return load_huggingface(path, path.resolve().name, dtype=dtype, progress=progress)


def _download(source: str) -> Path:
    if source.endswith(".gguf") or not _HUB_ID.fullmatch(source):
        raise CheckpointError(
            source,
            "source",
            "there is no such file or folder",
            "a model folder, a .gguf file or a hub id like Qwen/Qwen2.5-0.5B-Instruct is supported",
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise CheckpointError(
            source,
            "source",
            "there is no such folder, and the hub's client is not installed",
            "pip install 'tokendance-jax[hub]' to download models",
        ) from None
    try:
        return Path(snapshot_download(source, allow_patterns=_HUB_FILES))
    # OSError covers the hub's own errors and those of the disk.
    except (OSError, HFValidationError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            source,
            "source",
            f"there is no such folder, and the hub cannot provide it ({reason})",
            "check the path or hub id, the network and your access to the model",
        ) from error

"""The real model and the data in the shared folder beside the repository."""

import functools
import subprocess
from pathlib import Path

import pytest

from tokendance_jax.models.loading import Checkpoint, load_checkpoint

_SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared_dir() -> Path:
    """Returns the shared folder, or skips the test if it does not exist."""
    if not (_SHARED / "fetch_qwen.sh").is_file():
        pytest.skip(f"needs the shared folder: {_SHARED} has no fetch_qwen.sh")
    return _SHARED


def real_gguf() -> Path:
    """Returns the verified file of Qwen2.5-Coder-0.5B-Instruct; fetches it if needed."""
    return _fetch(shared_dir())


@functools.cache
def real_checkpoint(dtype: str) -> Checkpoint:
    """Returns the real model, loaded once per process and dtype of its matrices."""
    return load_checkpoint(real_gguf(), dtype=dtype)


@functools.cache
def _fetch(shared: Path) -> Path:
    command = ["bash", str(shared / "fetch_qwen.sh")]
    return Path(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout[:-1])

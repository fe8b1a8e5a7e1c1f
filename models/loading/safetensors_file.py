"""Tensors of a safetensors file."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from tokendance_jax.models.errors import CheckpointError
from tokendance_jax.models.loading.stored import StoredTensor

_DTYPES = ("F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class _SafetensorsTensor(StoredTensor):
    def slices(self, size: int) -> Iterator[np.ndarray]:
        rows = max(1, size // math.prod(self.shape[1:]))
        for start in range(0, self.shape[0], rows):
            # The package maps the file, and mapped pages count as this process's memory until the
            # file is closed. Opening it for every slice also detects truncation in the meantime.
            with _opened(self.file) as content:
                stored = content.get_slice(self.name)
                yield stored[start : min(start + rows, self.shape[0])].reshape(-1)


def read_safetensors_header(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a safetensors file by name, without reading their values.

    Raises:
      CheckpointError: The file is truncated or damaged, or a tensor's type is not supported.
    """
    with _opened(file) as content:
        names = content.keys()
        return {name: _stored(content, file, name) for name in names}


def _stored(content: safe_open, file: Path, name: str) -> StoredTensor:
    tensor = content.get_slice(name)
    if tensor.get_dtype() not in _DTYPES:
        raise CheckpointError(
            file, name, f"has type {tensor.get_dtype()}", f"{', '.join(_DTYPES)} are supported"
        )
    return _SafetensorsTensor(tuple(tensor.get_shape()), file, name)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="numpy") as content:
            yield content
    except SafetensorError as error:
        raise CheckpointError(
            file,
            "safetensors",
            f"the file cannot be read ({error})",
            "it is truncated or damaged: download it again",
        ) from None

"""Tensors at known byte ranges of files, checked as a whole and then read slice by slice."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import jax
import numpy as np

from tokendance_jax.models.loading.progress import byte_progress
from tokendance_jax.models.qwen2.config import Qwen2Config
from tokendance_jax.models.qwen2.errors import CheckpointError
from tokendance_jax.models.qwen2.parameters import parameter_dtype, parameter_shapes

# Values converted at a time: small enough for the caches, large enough to hide Python's cost.
# A multiple of every block size.
_SLICE_VALUES = 1 << 18
# XLA's CPU client takes a NumPy buffer without a copy only at this alignment.
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, as the file's header describes it.

    Attributes:
      file: The file.
      offset: The tensor's first byte in it.
      shape: Row-major shape.
      dtype: Type of the values, after dequantisation if there is any.
      block_values: Values in the smallest unit that can be decoded by itself.
      block_bytes: Bytes of that unit.
      dequantize: Turns the bytes of whole blocks into values; None if the bytes are the values.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    block_values: int
    block_bytes: int
    dequantize: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) // self.block_values * self.block_bytes


def match_parameters(
    config: Qwen2Config,
    shapes: Mapping[str, tuple[int, ...]],
    name_of: Callable[[str], str],
    ignorable: re.Pattern[str],
    where: str | os.PathLike[str],
) -> dict[str, str]:
    """Checks that a checkpoint has exactly the tensors of its configuration.

    Args:
      config: The configuration.
      shapes: Shape of each tensor of the checkpoint by its name there.
      name_of: Gives a parameter path's name in the checkpoint.
      ignorable: Matches names of superfluous tensors that are harmless.
      where: File or folder, for error messages.

    Returns:
      Tensor name by parameter path.

    Raises:
      CheckpointError: A tensor is missing, unknown or of another shape.
    """
    names = {path: name_of(path) for path in parameter_shapes(config)}
    for path, shape in parameter_shapes(config).items():
        name = names[path]
        if name not in shapes:
            missing = sum(name not in shapes for name in names.values())
            raise CheckpointError(
                where,
                name,
                f"the tensor is missing ({missing} of {len(names)} are)",
                "the checkpoint must hold every tensor of its configuration",
            )
        if shapes[name] != shape:
            raise CheckpointError(
                where,
                name,
                f"has shape {list(shapes[name])}",
                f"the configuration asks for {list(shape)}",
            )
    unknown = sorted(
        name for name in shapes.keys() - set(names.values()) if not ignorable.fullmatch(name)
    )
    if unknown:
        raise CheckpointError(
            where,
            unknown[0],
            f"unknown tensor ({len(unknown)} in all)",
            "only the tensors of a dense Qwen2 model are supported",
        )
    return names


def read_parameters(
    tensors: Mapping[str, StoredTensor], dtype: np.dtype, *, progress: bool
) -> dict[str, jax.Array]:
    """Reads tensors one after the other onto the default device.

    Needs little memory beyond the arrays themselves: each file range is read and converted in
    slices, straight into the array's own buffer.

    Args:
      tensors: Where each parameter is stored, by its path.
      dtype: Type of the matrices; vectors become float32.
      progress: Whether to show a progress bar on stderr.

    Raises:
      CheckpointError: A file ends early.
    """
    total = sum(tensor.nbytes for tensor in tensors.values())
    params = {}
    with byte_progress(total, shown=progress) as advance:
        for path, tensor in tensors.items():
            target = parameter_dtype(tensor.shape, dtype)
            params[path] = jax.device_put(_read(tensor, target, advance))
    return params


def _read(tensor: StoredTensor, dtype: np.dtype, advance: Callable[[int], None]) -> np.ndarray:
    values = _aligned_empty(math.prod(tensor.shape), dtype)
    as_stored = tensor.dequantize is None and tensor.dtype == dtype
    scratch = np.empty(_SLICE_VALUES // tensor.block_values * tensor.block_bytes, np.uint8)
    # Plain reads: pages of a memory map would count as this process's memory.
    with open(tensor.file, "rb", buffering=0) as file:
        file.seek(tensor.offset)
        for start in range(0, values.size, _SLICE_VALUES):
            part = values[start : start + _SLICE_VALUES]
            count = part.size // tensor.block_values * tensor.block_bytes
            raw = part.view(np.uint8) if as_stored else scratch[:count]
            _read_exactly(file, raw, tensor.file)
            if tensor.dequantize is not None:
                part[:] = tensor.dequantize(raw)
            elif not as_stored:
                part[:] = raw.view(tensor.dtype)
            advance(count)
    return values.reshape(tensor.shape)


def _read_exactly(file: BinaryIO, buffer: np.ndarray, where: Path) -> None:
    view = buffer.data
    while view:
        count = file.readinto(view)  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise CheckpointError(
                where, "tensor data", "the file became shorter while it was read", "load it again"
            )
        view = view[count:]


def _aligned_empty(size: int, dtype: np.dtype) -> np.ndarray:
    buffer = np.empty(size * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size * dtype.itemsize].view(dtype)

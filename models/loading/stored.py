"""Tensors of checkpoint files: checked against the configuration, then read slice by slice."""

import abc
import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from tokendance_jax.models.decoder.config import DecoderConfig
from tokendance_jax.models.decoder.parameters import parameter_dtype, parameter_shapes
from tokendance_jax.models.errors import CheckpointError
from tokendance_jax.models.loading.progress import byte_progress

# Values converted at a time: small enough for the caches, large enough to hide Python's overhead.
# A multiple of every block size.
_SLICE_VALUES = 1 << 18
# XLA's CPU client uses a NumPy buffer without a copy only at this alignment.
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class StoredTensor(abc.ABC):
    """One tensor of a file, as the file's header describes it.

    Attributes:
      shape: Row-major shape.
      file: The file.
      name: The tensor's name in the file.
    """

    shape: tuple[int, ...]
    file: Path
    name: str

    @abc.abstractmethod
    def slices(self, size: int) -> Iterator[np.ndarray]:
        """Reads the tensor in parts.

        Args:
          size: About how many values to read at a time; a multiple of every block size.

        Yields:
          Consecutive values in row-major order, as flat arrays.

        Raises:
          CheckpointError: The file changed since its header was read.
        """


def match_parameters(
    config: DecoderConfig,
    shapes: Mapping[str, tuple[int, ...]],
    name_of: Callable[[str], str],
    ignorable: re.Pattern[str],
    where: str | os.PathLike[str],
) -> dict[str, str]:
    """Checks that a checkpoint has exactly the tensors of its configuration.

    Args:
      config: The configuration.
      shapes: Shape of each tensor of the checkpoint by its name there.
      name_of: Returns the name that a parameter path has in the checkpoint.
      ignorable: Matches names of extra tensors that can be ignored.
      where: File or folder, for error messages.

    Returns:
      Tensor name by parameter path.

    Raises:
      CheckpointError: A tensor is missing, unknown or has another shape.
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
            "only the tensors of a dense model of its family are supported",
        )
    return names


def equal_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Returns whether two tensors of the same shape hold the same values, whatever their types.

    Reads slice by slice and stops at the first difference.

    Raises:
      CheckpointError: A file changed since its header was read.
    """
    pairs = zip(one.slices(_SLICE_VALUES), other.slices(_SLICE_VALUES), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def read_parameters(
    tensors: Mapping[str, StoredTensor], dtype: np.dtype, *, progress: bool
) -> dict[str, jax.Array]:
    """Reads tensors one after the other onto the default device.

    Needs little memory beyond the arrays themselves: each tensor is read and converted in slices,
    straight into the array's own buffer.

    Args:
      tensors: Stored tensors by parameter path.
      dtype: Type of the matrices; vectors become float32.
      progress: Whether to show a progress bar on stderr.

    Raises:
      CheckpointError: A file changed since its header was read, or a number is not finite.
    """
    shapes = [tensor.shape for tensor in tensors.values()]
    total = sum(math.prod(shape) * parameter_dtype(shape, dtype).itemsize for shape in shapes)
    with byte_progress(total, shown=progress) as advance:
        return {
            path: jax.device_put(_read(tensor, parameter_dtype(tensor.shape, dtype), advance))
            for path, tensor in tensors.items()
        }


def _read(tensor: StoredTensor, dtype: np.dtype, advance: Callable[[int], None]) -> np.ndarray:
    values = _aligned_empty(math.prod(tensor.shape), dtype)
    start = 0
    with np.errstate(over="ignore", invalid="ignore"):  # reported by name below
        for part in tensor.slices(_SLICE_VALUES):
            converted = values[start : start + part.size]
            converted[:] = part
            if not _finite(converted):
                raise not_finite(tensor.file, tensor.name, dtype)
            start += part.size
            advance(part.size * dtype.itemsize)
    return values.reshape(tensor.shape)


def not_finite(where: str | os.PathLike[str], name: str, dtype: np.dtype) -> CheckpointError:
    """Returns the error for a tensor with NaN or infinite numbers after conversion to `dtype`."""
    return CheckpointError(
        where,
        name,
        f"holds NaN or infinite numbers in {dtype}",
        "get the file again; if it is complete, its training diverged, or its numbers are too "
        f"large for {dtype}",
    )


def _finite(values: np.ndarray) -> bool:
    """Returns whether all numbers are finite, that is, none has all bits of its exponent set.

    `np.isfinite` is slow for bfloat16.
    """
    bits = np.dtype(f"u{values.itemsize}")
    exponent = np.array(np.inf, values.dtype).view(bits)
    return not (values.view(bits) & exponent == exponent).any()


def _aligned_empty(size: int, dtype: np.dtype) -> np.ndarray:
    buffer = np.empty(size * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size * dtype.itemsize].view(dtype)

"""The header of a GGUF file: metadata and tensor descriptions, without the tensor data.

This reader needs less memory and time than `gguf.GGUFReader`, which maps the whole file and keeps
several objects for each of the 300,000 strings of a vocabulary. It also bounds every read by the
size of the file. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import dataclasses
import math
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tokendance_jax.models.errors import CheckpointError

_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING = 8
_ARRAY = 9
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Description of one tensor.

    Attributes:
      shape: Row-major shape, the file's dimensions reversed.
      type: Number of its ggml type.
      offset: First byte, from the start of the file.
    """

    shape: tuple[int, ...]
    type: int
    offset: int


@dataclasses.dataclass(frozen=True)
class GgufHeader:
    """Content of a GGUF file's header.

    Attributes:
      fields: Metadata values by key: Python scalars, strings and lists of them.
      tensors: Descriptions by tensor name.
    """

    fields: dict[str, object]
    tensors: dict[str, GgufTensor]


def read_gguf_header(file: Path) -> GgufHeader:
    """Reads the header of a GGUF file of version 2 or 3.

    Raises:
      CheckpointError: The file is not a GGUF file, has another version, or ends in its header.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        reader = _Reader(stream, file, size)
        if reader.take(4) != b"GGUF":
            raise CheckpointError(file, "magic", "not a GGUF file", "it must begin with GGUF")
        version = reader.number(4)
        if version not in (2, 3):
            raise CheckpointError(
                file,
                "version",
                f"is {version}",
                "little-endian GGUF of version 2 or 3 is supported",
            )
        tensor_count, field_count = reader.number(8), reader.number(8)
        fields: dict[str, object] = {}
        for _ in range(field_count):
            key = reader.string()
            fields[key] = reader.value(reader.number(4))
        described = [reader.tensor() for _ in range(tensor_count)]
        alignment = fields.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(
                file, "general.alignment", f"is {alignment!r}", "must be a positive integer"
            )
        start = math.ceil(stream.tell() / alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, tensor in described:
        if name in tensors:
            raise CheckpointError(file, name, "two tensors have this name", "the file is damaged")
        tensors[name] = dataclasses.replace(tensor, offset=start + tensor.offset)
    return GgufHeader(fields, tensors)


class _Reader:
    """Reads little-endian values, never past the end of the file."""

    def __init__(self, stream: BinaryIO, file: Path, size: int) -> None:
        self._stream = stream
        self._file = file
        self._left = size

    def take(self, count: int) -> bytes:
        if count > self._left:
            raise CheckpointError(
                self._file, "header", "the file ends inside its header", "download it again"
            )
        self._left -= count
        return self._stream.read(count)

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def string(self) -> str:
        data = self.take(self.number(8))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(
                self._file, "header", f"a string is not UTF-8 ({error})", "the file is damaged"
            ) from None

    def value(self, kind: int) -> object:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.number(4), self.number(8)
            if item in _SCALARS:
                dtype = np.dtype(_SCALARS[item])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
            return [self.value(item) for _ in range(count)]
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
        raise CheckpointError(
            self._file, "header", f"unknown value type {kind}", "the file is damaged or too new"
        )

    def tensor(self) -> tuple[str, GgufTensor]:
        name = self.string()
        rank = self.number(4)
        if rank > _MAX_DIMENSIONS:
            raise CheckpointError(
                self._file, name, f"has {rank} dimensions", f"GGUF has up to {_MAX_DIMENSIONS}"
            )
        shape = tuple(self.number(8) for _ in range(rank))[::-1]
        return name, GgufTensor(shape, self.number(4), self.number(8))

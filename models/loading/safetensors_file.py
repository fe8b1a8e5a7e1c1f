"""The header of a safetensors file, without the tensor data.

The `safetensors` package maps the file, so that its pages count as this process's memory, and does
not tell where a tensor lies. Format: https://github.com/huggingface/safetensors#format.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tokendance_jax.models.loading.stored import StoredTensor
from tokendance_jax.models.qwen2.errors import CheckpointError

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}


def read_safetensors_header(file: Path) -> dict[str, StoredTensor]:
    """Returns where each tensor of a safetensors file lies, by name.

    Raises:
      CheckpointError: The file is cut or damaged, or a tensor's type is not supported.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                file, "header", "the file ends inside its header", "download it again"
            )
        text = stream.read(length)
    try:
        header = json.loads(text)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        start = 8 + length
        tensors = {name: _stored(file, name, start, entry) for name, entry in entries.items()}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            file, "header", f"malformed ({error!r})", "download the file again"
        ) from None
    end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=start)
    if end != size:
        raise CheckpointError(
            file,
            "tensor data",
            f"the header describes {end} bytes and the file has {size}",
            "the file is truncated or damaged: download it again",
        )
    return tensors


def _stored(file: Path, name: str, start: int, entry: dict[str, Any]) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        raise CheckpointError(
            file, name, f"has type {entry['dtype']}", f"{', '.join(_DTYPES)} are supported"
        )
    dtype = _DTYPES[entry["dtype"]]
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            file,
            name,
            f"{end - begin} bytes for shape {list(shape)} of {entry['dtype']}",
            "the header is damaged: download the file again",
        )
    return StoredTensor(
        file=file,
        offset=start + begin,
        shape=shape,
        dtype=dtype,
        block_values=1,
        block_bytes=dtype.itemsize,
    )

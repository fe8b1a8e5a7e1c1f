"""Loads a GGUF file, quantised or not."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tokendance_jax.models.errors import CheckpointError
from tokendance_jax.models.families.registry import family_of
from tokendance_jax.models.loading.adapters import adapter_error, refuse_adapter_tensors
from tokendance_jax.models.loading.checkpoint import Checkpoint
from tokendance_jax.models.loading.gguf_file import GgufTensor, read_gguf_header
from tokendance_jax.models.loading.gguf_tokenizer import (
    special_tokens_from_gguf,
    stop_ids_from_gguf,
    tokenizer_from_gguf,
)
from tokendance_jax.models.loading.stored import StoredTensor, match_parameters, read_parameters
from tokendance_jax.models.loading.tokenizer_files import check_ids, parse_tokenizer

# llama.cpp ignores these tensors for this architecture: it computes the rotary frequencies from the
# metadata alone.
_IGNORABLE = re.compile(r"rope_freqs\.weight|blk\.\d+\.rope_freqs\.weight")


@dataclasses.dataclass(frozen=True)
class _GgufTensor(StoredTensor):
    """A tensor stored in blocks, the smallest units that can be decoded separately.

    Attributes:
      offset: The tensor's first byte in the file.
      block_values: Values in a block.
      block_bytes: Bytes of a block.
      dequantize: Converts the bytes of whole blocks to values.
    """

    offset: int
    block_values: int
    block_bytes: int
    dequantize: Callable[[np.ndarray], np.ndarray]

    @property
    def end(self) -> int:
        """The first byte in the file after the tensor."""
        return self.offset + self._bytes(math.prod(self.shape))

    def slices(self, size: int) -> Iterator[np.ndarray]:
        step = self._bytes(size)
        # Plain reads, because pages of a memory map would count as this process's memory.
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            for start in range(self.offset, self.end, step):
                count = min(step, self.end - start)
                data = np.fromfile(file, np.uint8, count)
                if data.size < count:
                    raise CheckpointError(
                        self.file,
                        "tensor data",
                        "the file became shorter while it was read",
                        "load it again",
                    )
                yield self.dequantize(data)

    def _bytes(self, values: int) -> int:
        return values // self.block_values * self.block_bytes


def load_gguf(file: Path, *, dtype: np.dtype, progress: bool) -> Checkpoint:
    """Loads the checkpoint in one GGUF file.

    Args:
      file: The file.
      dtype: Type of the matrices: float32 or bfloat16.
      progress: Whether to show a progress bar on stderr.

    Raises:
      CheckpointError: The file is damaged, incomplete or not supported, or the `gguf` package is
        not installed.
    """
    header = read_gguf_header(file)
    fields, where = header.fields, str(file)
    kind = fields.get("general.type", "model")
    if kind == "adapter":
        raise adapter_error(file, "general.type", "an adapter")
    if kind != "model":
        raise CheckpointError(file, "general.type", f"is {kind!r}", "only 'model' is supported")
    refuse_adapter_tensors(header.tensors, file)
    if fields.get("split.count", 1) != 1:
        raise CheckpointError(
            file,
            "split.count",
            f"is one of {fields['split.count']} parts",
            "join them with llama-gguf-split --merge",
        )
    # The embedding's number of rows is the vocabulary size. If the embedding is missing,
    # `match_parameters` below reports it by name.
    embedding = header.tensors.get("token_embd.weight")
    family = family_of(fields, "general.architecture", where)
    config = family.from_gguf(
        fields,
        where,
        tied="output.weight" not in header.tensors,
        vocab_size=embedding.shape[0] if embedding and embedding.shape else 1,
    )
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    names = match_parameters(config, shapes, family.gguf_name, _IGNORABLE, file)
    tensors = {
        path: _stored(file, name, header.tensors[name], file.stat().st_size)
        for path, name in names.items()
    }
    stop_ids = stop_ids_from_gguf(fields, file)
    tokenizer_json = tokenizer_from_gguf(fields, file)
    check_ids(file, parse_tokenizer(file, tokenizer_json), stop_ids, config)
    template = fields.get("tokenizer.chat_template")
    name = fields.get("general.name")
    return Checkpoint(
        config=config,
        params=read_parameters(tensors, dtype, progress=progress),
        tokenizer_json=tokenizer_json,
        chat_template=template if isinstance(template, str) else None,
        stop_ids=stop_ids,
        name=name if isinstance(name, str) else file.stem,
        special_tokens=special_tokens_from_gguf(fields, file),
    )


def _stored(file: Path, name: str, tensor: GgufTensor, file_size: int) -> StoredTensor:
    kind, block_values, block_bytes, dequantize = _encoding(file, name, tensor.type)
    if tensor.shape[-1] % block_values:
        raise CheckpointError(
            file,
            name,
            f"rows of {tensor.shape[-1]} values",
            f"{kind} needs multiples of {block_values}",
        )
    stored = _GgufTensor(
        shape=tensor.shape,
        file=file,
        name=name,
        offset=tensor.offset,
        block_values=block_values,
        block_bytes=block_bytes,
        dequantize=dequantize,
    )
    if stored.end > file_size:
        raise CheckpointError(
            file,
            name,
            f"its data end at byte {stored.end}, the file at {file_size}",
            "the file is truncated: download it again",
        )
    return stored


def _encoding(
    file: Path, name: str, number: int
) -> tuple[str, int, int, Callable[[np.ndarray], np.ndarray]]:
    """Returns the type's name, values and bytes per block, and its dequantiser."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            file,
            "gguf",
            "the package that reads GGUF tensors is not installed",
            "pip install 'tokendance-jax[gguf]'",
        ) from None
    try:
        kind = gguf.GGMLQuantizationType(number)
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        # `gguf` converts 16 rows at a time. A slice is flat, so that it counts as a single row.
        dequantize = functools.partial(gguf.quants.dequantize, qtype=kind)
        dequantize(np.zeros(block_bytes, np.uint8))
    except (ValueError, KeyError, NotImplementedError):
        raise CheckpointError(
            file,
            name,
            f"tensor type {number} cannot be dequantised",
            "F32, F16, BF16 and every type that gguf.quants dequantises are supported",
        ) from None
    return kind.name, block_values, block_bytes, dequantize

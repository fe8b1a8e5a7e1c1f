"""Loads and writes Hugging Face folders: `config.json`, safetensors and tokenizer files."""

import dataclasses
import os
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from tokendance_jax.models.errors import CheckpointError
from tokendance_jax.models.families.registry import FAMILIES
from tokendance_jax.models.loading.adapters import refuse_adapter_folder, refuse_adapter_tensors
from tokendance_jax.models.loading.checkpoint import Checkpoint
from tokendance_jax.models.loading.safetensors_file import read_safetensors_header
from tokendance_jax.models.loading.sidecars import (
    new_folder,
    read_config,
    read_json,
    write_config,
    write_sidecars,
)
from tokendance_jax.models.loading.stored import (
    StoredTensor,
    equal_values,
    match_parameters,
    read_parameters,
)
from tokendance_jax.models.loading.tokenizer_files import parse_tokenizer, read_text_tools

_INDEX = "model.safetensors.index.json"
# Old exports contain the rotary frequencies, which follow from the configuration.
_IGNORABLE = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"


def load_huggingface(folder: Path, name: str, *, dtype: np.dtype, progress: bool) -> Checkpoint:
    """Loads a folder in the format of `save_pretrained`.

    A tied model may repeat its embedding as the output matrix. If the output matrix has other
    values, it is used and the model is untied, as in transformers.

    Args:
      folder: The folder.
      name: Name of the model.
      dtype: Type of the matrices: float32 or bfloat16.
      progress: Whether to show a progress bar on stderr.

    Raises:
      CheckpointError: A file is missing, damaged or not supported.
    """
    refuse_adapter_folder(folder)
    config = read_config(folder)
    hf_name = FAMILIES[config.family].hf_name
    tensors = _read_headers(folder)
    refuse_adapter_tensors(tensors, folder)
    tied = config.tie_word_embeddings
    if tied and hf_name(_HEAD) in tensors:
        config = dataclasses.replace(config, tie_word_embeddings=False)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    names = match_parameters(config, shapes, hf_name, _IGNORABLE, folder)
    text = read_text_tools(folder, config)
    stored = {path: tensors[name] for path, name in names.items()}
    if tied and _HEAD in stored and equal_values(stored[_HEAD], stored[_EMBEDDING]):
        del stored[_HEAD]
        config = dataclasses.replace(config, tie_word_embeddings=True)
    return Checkpoint(
        config=config,
        params=read_parameters(stored, dtype, progress=progress),
        name=name,
        **vars(text),
    )


def save_huggingface(checkpoint: Checkpoint, target: str | os.PathLike[str]) -> None:
    """Writes a checkpoint in the format of `save_pretrained`, with all tensors in bfloat16.

    The target appears only once everything is written.

    Args:
      checkpoint: The checkpoint to write.
      target: A folder that does not exist yet. Missing parents are created.

    Raises:
      CheckpointError: The target exists.
    """
    if checkpoint.stop_ids:
        # Other loaders read the token that ends an answer from the tokenizer's files.
        tokenizer = parse_tokenizer(target, checkpoint.tokenizer_json)
        last = {"eos_token": tokenizer.id_to_token(checkpoint.stop_ids[-1])}
        checkpoint = dataclasses.replace(
            checkpoint, special_tokens=last | dict(checkpoint.special_tokens)
        )
    config = checkpoint.config
    family = FAMILIES[config.family]
    tensors = {
        family.hf_name(path): np.asarray(array).astype(jnp.bfloat16)
        for path, array in checkpoint.params.items()
    }
    with new_folder(target) as folder:
        # Other loaders of this architecture look for these fields.
        ours = {"architectures": [family.architecture], "hidden_act": "silu"}
        ours |= {"torch_dtype": "bfloat16", "eos_token_id": list(checkpoint.stop_ids)}
        write_config(folder, family.to_hf(config) | ours)
        write_sidecars(folder, checkpoint)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _read_headers(folder: Path) -> dict[str, StoredTensor]:
    if (folder / _INDEX).exists():
        return _read_sharded(folder)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise CheckpointError(
            folder,
            "*.safetensors",
            f"{len(files)} files and no {_INDEX}",
            f"one file, or several with {_INDEX}, are supported",
        )
    return read_safetensors_header(files[0])


def _read_sharded(folder: Path) -> dict[str, StoredTensor]:
    index = folder / _INDEX
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(
        isinstance(shard, str) for shard in shard_of.values()
    ):
        raise CheckpointError(
            index, "weight_map", "is not a map to file names", "download it again"
        )
    headers = {}
    for shard in sorted(set(shard_of.values())):
        if not (folder / shard).is_file():
            raise CheckpointError(
                index, shard, "the file is missing", "download every shard of the model"
            )
        headers[shard] = read_safetensors_header(folder / shard)
    for name, shard in shard_of.items():
        if name not in headers[shard]:
            raise CheckpointError(
                folder / shard, name, "the tensor is missing", f"{index.name} places it there"
            )
    return {name: headers[shard][name] for name, shard in shard_of.items()}

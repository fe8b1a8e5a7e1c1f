"""Writes and loads the project's own format: Orbax arrays next to Hugging Face's small files."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from tokendance_jax.models.decoder.config import DecoderConfig
from tokendance_jax.models.decoder.parameters import parameter_dtype, parameter_shapes
from tokendance_jax.models.errors import CheckpointError
from tokendance_jax.models.families.registry import FAMILIES
from tokendance_jax.models.loading.checkpoint import Checkpoint
from tokendance_jax.models.loading.progress import byte_progress
from tokendance_jax.models.loading.sidecars import (
    new_folder,
    read_config,
    write_config,
    write_sidecars,
)
from tokendance_jax.models.loading.stored import match_parameters, not_finite
from tokendance_jax.models.loading.tokenizer_files import read_text_tools

PARAMS = "params"
_NOTHING = re.compile(r"(?!)")


def save_orbax(checkpoint: Checkpoint, target: str | os.PathLike[str]) -> None:
    """Writes a checkpoint to a new folder, which appears only once everything is written.

    The folder holds `config.json`, `generation_config.json`, `tokenizer.json`,
    `tokenizer_config.json`, `chat_template.jinja` if there is a template, and the arrays in
    `params/`.

    Args:
      checkpoint: The checkpoint to write. The arrays keep their dtypes.
      target: A folder that does not exist yet. Missing parents are created.

    Raises:
      CheckpointError: The target exists.
    """
    with new_folder(target) as folder:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / PARAMS, checkpoint.params)
        config = checkpoint.config
        write_config(folder, FAMILIES[config.family].to_hf(config))
        write_sidecars(folder, checkpoint)


def load_orbax(folder: Path, *, dtype: np.dtype, progress: bool) -> Checkpoint:
    """Loads a folder that `save_orbax` wrote.

    Args:
      folder: The folder.
      dtype: Type of the matrices: float32 or bfloat16.
      progress: Whether to show a progress bar on stderr.

    Raises:
      CheckpointError: A file is missing or damaged, or the arrays do not match the configuration.
    """
    config = read_config(folder)
    text = read_text_tools(folder, config)
    where = folder.absolute() / PARAMS
    try:
        params = _restore(where, config, dtype, progress=progress)
    except CheckpointError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many types for damaged files
        raise CheckpointError(
            where, "arrays", f"cannot be restored ({error})", "convert the model again"
        ) from error
    return Checkpoint(
        config=config,
        params=params,
        name=folder.name,
        **vars(text),
    )


def _restore(
    where: Path, config: DecoderConfig, dtype: np.dtype, *, progress: bool
) -> dict[str, jax.Array]:
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(where).item_metadata.tree
        shapes = {path: tuple(array.shape) for path, array in metadata.items()}
        match_parameters(config, shapes, str, _NOTHING, where)
        sharding = jax.device_put(np.float32(0)).sharding
        params = {}
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        with byte_progress(total, shown=progress) as advance:
            for group in _groups(shapes):
                abstract = {
                    path: jax.ShapeDtypeStruct(
                        shapes[path], parameter_dtype(shapes[path], dtype), sharding=sharding
                    )
                    for path in group
                }
                restore = ocp.args.PyTreeRestore(
                    item=abstract,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                    partial_restore=True,
                )
                restored = checkpointer.restore(where, args=restore)
                for path, array in restored.items():
                    if not _finite(array):
                        raise not_finite(where, path, array.dtype)
                params |= restored
                advance(sum(math.prod(shapes[path]) for path in group) * dtype.itemsize)
    return {path: params[path] for path in parameter_shapes(config)}


@jax.jit
def _finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def _groups(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """Groups parameters by layer, each other parameter alone, with the largest group first.

    Orbax holds a stored and a converted copy of everything that one call restores. In this order
    peak memory stays close to the size of the weights, and the parameters of a layer are still read
    in parallel.
    """
    groups: dict[str, list[str]] = {}
    for path in shapes:
        layer = re.match(r"layers\.\d+\.", path)
        groups.setdefault(layer.group() if layer else path, []).append(path)
    return sorted(
        groups.values(), key=lambda group: -sum(math.prod(shapes[path]) for path in group)
    )

"""Mirrors on disk: Orbax arrays and a manifest with the digest of every array."""

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from tokendance_jax.identity import ModelIdentity
from tokendance_jax.kernels.rope import Rope, Yarn
from tokendance_jax.mirror.errors import MirrorError
from tokendance_jax.mirror.layout import MirrorTable
from tokendance_jax.mirror.master_mirror import MasterMirror, Mirror
from tokendance_jax.mirror.pages import Quantised, StoredPages

ARRAYS = "arrays"
MANIFEST = "manifest.json"
# Up to format 2, files did not name the model that computed the mirrors; format 3 knew no YaRN.
FORMAT = 4
_REMEDY = "save the mirrors again, to a new folder"


def save_mirrors(path: str | os.PathLike[str], mirrors: MasterMirror) -> None:
    """Writes mirrors to a new folder atomically: the folder appears complete or not at all.

    The folder holds the arrays in `arrays/`, and `manifest.json`. The manifest records the format,
    the number of mirrors, the identity of the model, the rope of quantised pages, and the shape,
    dtype and SHA-256 of every array. It also has a SHA-256 of all these fields but the format.

    Args:
      path: a folder that does not exist yet. Missing parent folders are created.
      mirrors: the mirrors to write.

    Raises:
      MirrorError: the folder exists.
    """
    target = Path(path).absolute()
    if target.exists():
        raise MirrorError(target, "path", "exists already", "name a new folder")
    arrays = _flat(mirrors)
    content = {
        "mirrors": len(mirrors.mirrors),
        "identity": dataclasses.asdict(mirrors.identity),
        "quantised": None if mirrors.form is None else dataclasses.asdict(mirrors.form.rope),
        "arrays": {name: _description(array) for name, array in arrays.items()},
    }
    digest = _digest(json.dumps(content).encode())
    manifest = {"format": FORMAT, "sha256": digest, "content": content}
    # Write to a sibling folder, so that the last step is a rename within one file system.
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            # Orbax cannot save empty arrays. Restoring creates them from the manifest.
            filled = {name: array for name, array in arrays.items() if array.size}
            checkpointer.save(partial / ARRAYS, filled)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def restore_mirrors(path: str | os.PathLike[str]) -> MasterMirror:
    """Reads a folder that `save_mirrors` wrote.

    Returns:
      The same mirrors, bit for bit, as arrays on the host.

    Raises:
      MirrorError: the folder, or a file in it, is missing, damaged or in another format.
    """
    folder = Path(path).absolute()
    content = _read_manifest(folder / MANIFEST)
    described = content["arrays"]
    empty = {
        name: np.zeros(array["shape"], jnp.dtype(array["dtype"]))
        for name, array in described.items()
        if 0 in array["shape"]
    }
    filled = described.keys() - empty.keys()
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            restore = ocp.args.PyTreeRestore(
                item=dict.fromkeys(filled, 0),
                restore_args=dict.fromkeys(filled, ocp.RestoreArgs(restore_type=np.ndarray)),
            )
            arrays = checkpointer.restore(folder / ARRAYS, args=restore) | empty
    except Exception as error:  # Orbax and TensorStore raise many types for damaged files
        problem = f"cannot be restored ({error})"
        raise MirrorError(folder / ARRAYS, "arrays", problem, _REMEDY) from error
    for name, expected in described.items():
        if _description(arrays[name]) != expected:
            problem = "is not the array that the manifest describes"
            raise MirrorError(folder / ARRAYS, name, problem, _REMEDY)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: arrays[_name(path)],
        _skeleton(content["mirrors"], _identity(content["identity"]), content["quantised"]),
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, digest, content = (manifest[key] for key in ("format", "sha256", "content"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MirrorError(path, "manifest", f"cannot be read ({error!r})", _REMEDY) from error
    if version != FORMAT:
        remedy = f"serve the round again and save its mirrors: this version reads format {FORMAT}"
        raise MirrorError(path, "format", f"is {version!r}", remedy)
    if digest != _digest(json.dumps(content).encode()):
        raise MirrorError(path, "sha256", "is not that of the content", _REMEDY)
    return content


def _flat(mirrors: MasterMirror) -> dict[str, np.ndarray]:
    """Returns all arrays by name, such as `mirrors.0.table.frame`."""
    return {
        _name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(mirrors)
    }


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _identity(fields: dict[str, Any]) -> ModelIdentity:
    return ModelIdentity(**{**fields, "rope": _rope(fields["rope"])})


def _rope(fields: dict[str, Any]) -> Rope:
    yarn = fields["yarn"]
    return Rope(fields["theta"], None if yarn is None else Yarn(**yarn))


def _skeleton(mirrors: int, identity: ModelIdentity, rope: dict[str, Any] | None) -> MasterMirror:
    """Returns the pytree of a round with this number of mirrors, without arrays."""
    leaf: Any = 0
    scale = None if rope is None else leaf
    pages = StoredPages(leaf, leaf, scale, scale)
    table = MirrorTable(**{field.name: leaf for field in dataclasses.fields(MirrorTable)})
    mirror = Mirror(table, pages, pages)
    quantised = None if rope is None else Quantised(leaf, _rope(rope))
    return MasterMirror(pages, (mirror,) * mirrors, identity, quantised)


def _description(array: np.ndarray) -> dict[str, Any]:
    digest = _digest(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": digest}


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()

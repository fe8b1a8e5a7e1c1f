"""Reading rotary embeddings and their scaling: YaRN, and no other."""

from collections.abc import Mapping

from tokendance_jax.kernels.rope import Rope, Yarn
from tokendance_jax.models.errors import CheckpointError
from tokendance_jax.models.families.fields import Fields, from_float32, malformed

# Fields of YaRN: theirs and ours.
_YARN = {
    "factor": "factor",
    "original_max_position_embeddings": "original",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
}


def rope_from_hf(fields: Mapping[str, object], where: str) -> Rope:
    """Reads the rotary embedding of a `config.json`.

    transformers 5 moved `rope_theta` and `rope_scaling` into one object, `rope_parameters`. It
    looks for the base in this object first, even if the object has the old name `rope_scaling`. If
    the object has no type, other fields in it are refused, because they cannot be ignored.

    Raises:
      CheckpointError: the scaling is not YaRN, or a field is missing or malformed.
    """
    theta, yarn = Fields(fields, where), None
    for key in ("rope_parameters", "rope_scaling"):
        rope = fields.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise malformed(where, key, rope, "an object or null")
        told = {name: value for name, value in rope.items() if value is not None}
        kinds = [told.pop(name) for name in ("rope_type", "type") if name in told]
        for kind in kinds:
            if kind not in ("default", "yarn") or kind != kinds[0]:
                raise _unsupported(where, key, " and ".join(map(repr, kinds)))
        if told.pop("rope_theta", None) is not None:
            theta = Fields(rope, f"{where}: {key}")
        if "yarn" in kinds:
            yarn = _yarn(told, fields, f"{where}: {key}")
        elif told and not kinds:
            raise _unsupported(where, key, f"by {', '.join(sorted(told))} without a rope_type")
    return Rope(theta.positive("rope_theta"), yarn)


def rope_to_hf(rope: Rope) -> dict[str, object]:
    """Returns the fields of a `config.json` that `rope_from_hf` reads back."""
    if rope.yarn is None:
        return {"rope_theta": rope.theta}
    names = {theirs: getattr(rope.yarn, ours) for theirs, ours in _YARN.items()}
    return {"rope_theta": rope.theta, "rope_scaling": {"rope_type": "yarn", **names}}


def rope_from_gguf(fields: Mapping[str, object], where: str, prefix: str) -> Rope:
    """Reads the rotary embedding of a GGUF file, whose keys begin with `prefix`.

    Raises:
      CheckpointError: the scaling is not YaRN, or a field is missing or malformed.
    """
    scaling = f"{prefix}.rope.scaling"
    kind = fields.get(f"{scaling}.type")
    if kind not in (None, "none", "yarn"):
        raise _unsupported(where, f"{scaling}.type", repr(kind))
    # llama.cpp scales linearly if there is a factor without a type. 0 and 1 mean no scaling.
    for key in (f"{scaling}.factor", f"{prefix}.rope.scale_linear"):
        if kind is None and fields.get(key, 0) not in (0, 1):
            raise _unsupported(where, key, f"by {fields[key]!r} without a type")
    read, yarn = Fields(fields, where), None
    if kind == "yarn":
        factor = from_float32(read.positive(f"{scaling}.factor"))
        yarn = Yarn(factor, read.size(f"{scaling}.original_context_length"))
    return Rope(from_float32(read.positive(f"{prefix}.rope.freq_base")), yarn)


def context(trained: int, rope: Rope) -> int:
    """Returns the longest context: files may give the one of the training, without the scaling."""
    yarn = rope.yarn
    return trained if yarn is None else max(trained, int(yarn.original * yarn.factor))


def _yarn(told: Mapping[str, object], fields: Mapping[str, object], where: str) -> Yarn:
    """Reads the scaling YaRN, and refuses variants of it."""
    for name in sorted(told.keys() - _YARN.keys()):
        if (name, told[name]) != ("truncate", True):
            raise _unsupported(where, name, f"'yarn' with {name} {told[name]!r}")
    original = told.get("original_max_position_embeddings", fields.get("max_position_embeddings"))
    read = Fields({"original_max_position_embeddings": original, **told}, where)
    betas = {name: read.positive(name) for name in ("beta_fast", "beta_slow") if name in told}
    return Yarn(read.positive("factor"), read.size("original_max_position_embeddings"), **betas)


def _unsupported(where: str, key: str, how: str) -> CheckpointError:
    return CheckpointError(
        where, key, f"rope scaling {how}", "only unscaled rotary embedding and YaRN are supported"
    )

"""The families that can be loaded, by name."""

from collections.abc import Mapping

from tokendance_jax.models.errors import CheckpointError
from tokendance_jax.models.families.family import Family
from tokendance_jax.models.families.qwen2 import QWEN2
from tokendance_jax.models.families.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {family.name: family for family in (QWEN2, QWEN3)}


def family_of(fields: Mapping[str, object], key: str, where: str) -> Family:
    """Returns the family that a field of a checkpoint names.

    Args:
      fields: The content of a `config.json`, or the metadata of a GGUF file.
      key: The field: `model_type`, or `general.architecture`.
      where: The file, for error messages.

    Raises:
      CheckpointError: The field is missing, or there is no such family.
    """
    name = fields.get(key)
    if not isinstance(name, str) or name not in FAMILIES:
        known = " and ".join(map(repr, FAMILIES))
        problem = f"is {name!r}" if key in fields else "the field is missing"
        raise CheckpointError(where, key, problem, f"only {known} are supported")
    return FAMILIES[name]

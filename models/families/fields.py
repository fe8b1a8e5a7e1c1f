"""Reading numbers out of the metadata of checkpoints, with errors that name file and field."""

from collections.abc import Mapping

import numpy as np

from tokendance_jax.models.errors import CheckpointError


class Fields:
    """Reads required numbers from metadata and raises errors that name file and field."""

    def __init__(self, fields: Mapping[str, object], where: str) -> None:
        self._fields = fields
        self._where = where

    def size(self, key: str) -> int:
        """Returns a positive integer."""
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise malformed(self._where, key, value, "a positive integer")
        return value

    def positive(self, key: str) -> float:
        """Returns a positive number."""
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise malformed(self._where, key, value, "a positive number")
        return float(value)

    def head_dim(self, key: str, hidden: int, heads: int, hidden_key: str) -> int:
        """Returns the head width, which both formats may omit when it is hidden / heads."""
        if self._fields.get(key) is not None:
            return self.size(key)
        if hidden % heads:
            raise CheckpointError(
                self._where,
                hidden_key,
                f"{hidden} is not divisible by {heads} attention heads",
                f"set {key} if the head width is not the quotient",
            )
        return hidden // heads

    def _get(self, key: str) -> object:
        if key not in self._fields:
            raise CheckpointError(
                self._where, key, "the field is missing", "every checkpoint must have it"
            )
        return self._fields[key]


def from_float32(value: float) -> float:
    """Returns the shortest decimal of a float32: 9.99999997e-07 is the published 1e-6."""
    return float(str(np.float32(value)))


def malformed(where: str, key: str, value: object, expected: str) -> CheckpointError:
    """The error of a field with a wrong value."""
    return CheckpointError(where, key, f"is {value!r}", f"must be {expected}")

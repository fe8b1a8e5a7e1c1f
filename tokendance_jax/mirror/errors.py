"""The error raised when mirrors cannot be encoded, decoded, written or read."""

from tokendance_jax.errors import LocatedError


class MirrorError(LocatedError):
    """An argument or a file from which mirrors cannot be made."""

"""The error of every checkpoint that cannot be loaded or written."""

from tokendance_jax.errors import LocatedError


class CheckpointError(LocatedError):
    """A checkpoint, or one of its files, that is damaged, incomplete or not supported.

    Its subject is a field or a tensor; its remedy, what is supported or helps.
    """

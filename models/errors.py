"""The error for checkpoints that cannot be loaded or written."""

from tokendance_jax.errors import LocatedError


class CheckpointError(LocatedError):
    """A checkpoint, or one of its files, is damaged, incomplete or not supported.

    The error's subject is a field or a tensor. Its remedy says what is supported or what helps.
    """

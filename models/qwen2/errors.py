"""The error of every checkpoint that cannot be loaded or written."""

import os


class CheckpointError(ValueError):
    """A checkpoint, or one of its files, that is damaged, incomplete or not supported.

    Its message reads `<file>: <field or tensor>: <what is wrong>; <what is supported or helps>`.
    """

    def __init__(
        self, where: str | os.PathLike[str], subject: str, problem: str, remedy: str
    ) -> None:
        # All four are in `args`, so that the error survives pickling between processes.
        super().__init__(os.fspath(where), subject, problem, remedy)

    def __str__(self) -> str:
        where, subject, problem, remedy = self.args
        return f"{where}: {subject}: {problem}; {remedy}"

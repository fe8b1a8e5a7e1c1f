"""The error of mirrors that cannot be encoded, decoded, written or read."""

import os


class MirrorError(ValueError):
    """An argument or a file from which no mirrors can be made.

    Its message reads `<file or argument>: <field>: <what is wrong>; <what helps>`.
    """

    def __init__(
        self, where: str | os.PathLike[str], subject: str, problem: str, remedy: str
    ) -> None:
        # All four are in `args`, so that the error survives pickling between processes.
        super().__init__(os.fspath(where), subject, problem, remedy)

    def __str__(self) -> str:
        where, subject, problem, remedy = self.args
        return f"{where}: {subject}: {problem}; {remedy}"

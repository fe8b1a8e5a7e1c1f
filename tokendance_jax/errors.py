"""The base class of errors about files and arguments."""

import os


class LocatedError(ValueError):
    """An error that names the file or argument, the field, the problem and the remedy.

    Its message reads `<file or argument>: <field>: <problem>; <remedy>`.
    """

    def __init__(
        self, where: str | os.PathLike[str], subject: str, problem: str, remedy: str
    ) -> None:
        # All four are in `args`, so that the error survives pickling between processes.
        super().__init__(os.fspath(where), subject, problem, remedy)

    def __str__(self) -> str:
        where, subject, problem, remedy = self.args
        return f"{where}: {subject}: {problem}; {remedy}"

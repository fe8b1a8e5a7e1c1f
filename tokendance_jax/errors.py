"""What errors about files and arguments have in common."""

import os


class LocatedError(ValueError):
    """An error that says where something is wrong, what, why, and what helps.

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

r"""Showing text of others: names, questions, answers and messages may hold anything.

Control characters are shown as `\x1b` and the like, so that they never reach the terminal, and
characters that the terminal's encoding lacks likewise.
"""

import io
import re
import sys

from rich.console import Console
from rich.markup import escape

# C0 and C1, marks and overrides of direction, separators of lines, halves of characters.
_CONTROL = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_ALL = re.compile(f"[{_CONTROL}]")
_BUT_LINES = re.compile(f"(?![\n\t])[{_CONTROL}]")


def console(*, width: int | None = None) -> Console:
    """The console of a script.

    Args:
      width: its columns; None: the terminal's.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return Console(highlight=False, width=width)


def plain(text: str, *, lines: bool = False) -> str:
    """Text with its control characters written out.

    Args:
      text: any text.
      lines: whether the text may have lines and tabs of its own.
    """
    return (_BUT_LINES if lines else _ALL).sub(_written_out, text)


def markup(text: str, *, lines: bool = False) -> str:
    """`plain` for rich, which takes no part of the text for markup of its own."""
    return escape(plain(text, lines=lines))


def complain(script: str, error: BaseException) -> None:
    """Prints an error of a script as one line on stderr."""
    message = " ".join(str(error).split("\n")) or type(error).__name__
    print(f"{script}: {plain(message)}", file=sys.stderr)


def _written_out(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()

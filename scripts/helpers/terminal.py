r"""Printing of untrusted text: names, questions, answers and messages may hold any characters.

Control characters are printed as escapes such as `\x1b`, so that they never reach the terminal, and
so are characters that the terminal's encoding lacks.
"""

import io
import re
import sys

from rich.console import Console
from rich.markup import escape

# C0 and C1 controls, direction marks and overrides, line separators, surrogates.
_CONTROL = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_ALL = re.compile(f"[{_CONTROL}]")
_BUT_LINES = re.compile(f"(?![\n\t])[{_CONTROL}]")


def console(*, width: int | None = None) -> Console:
    """Makes the console of a script.

    Args:
      width: number of columns; None: that of the terminal.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return Console(highlight=False, width=width)


def plain(text: str, *, lines: bool = False) -> str:
    """Returns the text with its control characters escaped.

    Args:
      text: any text.
      lines: whether to keep newlines and tabs.
    """
    return (_BUT_LINES if lines else _ALL).sub(_written_out, text)


def markup(text: str, *, lines: bool = False) -> str:
    """As `plain`, and escapes the text so that rich does not read any of it as markup."""
    return escape(plain(text, lines=lines))


def complain(script: str, error: BaseException) -> None:
    """Prints the error of a script as one line on stderr."""
    message = " ".join(str(error).split("\n")) or type(error).__name__
    print(f"{script}: {plain(message)}", file=sys.stderr)


def _written_out(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()

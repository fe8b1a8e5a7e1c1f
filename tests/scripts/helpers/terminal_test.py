"""Untrusted text on the terminal."""

import io
import sys

import pytest

from scripts.helpers import terminal


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        *[(text, text) for text in ("Zo\u00eb", "\u963f", "\U0001f469\u200d\U0001f52c")],
        ("\x1b[2J\x07\r\x7f", r"\x1b[2J\x07\r\x7f"),
        ("\x9b31m\x85", r"\x9b31m\x85"),
        ("\u202eabc\u2066\u200f\u2028", r"\u202eabc\u2066\u200f\u2028"),
        ("\udcff", r"\udcff"),
        ("a\tb\nc", r"a\tb\nc"),
    ],
)
def test_control_characters_are_written_out(text, shown):
    assert terminal.plain(text) == shown


def test_lines_stay_where_they_may():
    assert terminal.plain("a\tb\n\x1bc", lines=True) == "a\tb\n\\x1bc"


def test_text_is_no_markup(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    console = terminal.console(width=60)
    console.print(f"[bold]{terminal.markup('[red]x[/]')}[/] {terminal.markup(chr(92))}[dim]y[/]")
    console.print(terminal.markup("\x1b[red]"))
    assert stream.getvalue() == "[red]x[/] \\y\n\\x1b[red]\n"


def test_a_terminal_that_lacks_a_character_is_no_error(monkeypatch):
    buffers = io.BytesIO(), io.BytesIO()
    out, error = (io.TextIOWrapper(b, encoding="ascii", write_through=True) for b in buffers)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", error)
    terminal.console().print("\u963f\u7f57")
    terminal.complain("script", ValueError("\u963f\n\x1b"))
    assert buffers[0].getvalue() == rb"\u963f\u7f57" + b"\n"
    assert buffers[1].getvalue() == rb"script: \u963f \x1b" + b"\n"


def test_an_error_without_words_has_a_name(capsys):
    terminal.complain("script", MemoryError())
    assert capsys.readouterr().err == "script: MemoryError\n"

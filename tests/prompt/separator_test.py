"""Prompts given as one string: pieces, escapes and ids."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokendance_jax.prompt import SEPARATOR, PromptError, escape, split_prompt

# Pieces of the separator and backslashes, so that near misses are common.
PIECES = st.lists(
    st.one_of(
        st.sampled_from(["<", "<T", "TTSEP>", ">", "\\", "<\\TTSEP>", SEPARATOR]),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4),
    ),
    max_size=6,
).map("".join)


@given(st.lists(PIECES, max_size=4), PIECES.filter(bool))
def test_escaped_pieces_come_back(context, task):
    pieces = [*context, task]
    prompt = split_prompt("a", SEPARATOR.join(map(escape, pieces)))
    assert [segment.text for segment in prompt.segments] == pieces


@given(st.lists(st.text("ab\\", max_size=6), max_size=4), st.text("ab\\", min_size=1))
def test_other_separators_do_too(context, task):
    pieces = [*context, task]
    prompt = split_prompt("x", "aab".join(escape(piece, "aab") for piece in pieces), "aab")
    assert [segment.text for segment in prompt.segments] == pieces


def test_kinds_and_ids():
    prompt = split_prompt("Ann", "me<TTSEP>one<TTSEP>two<TTSEP>one<TTSEP>go")
    assert [segment.kind for segment in prompt.segments] == [
        "history", "shared", "shared", "shared", "task",
    ]  # fmt: skip
    ids = [segment.id for segment in prompt.segments]
    assert ids[0] == "Ann/history"
    assert ids[1] == ids[3] != ids[2]
    assert ids[1] == split_prompt("Bob", "<TTSEP>one<TTSEP>go").segments[1].id


def test_a_string_without_separators_is_a_task():
    (task,) = split_prompt("a", "go").segments
    assert (task.kind, task.text) == ("task", "go")


def test_a_backslash_before_a_separator_is_text():
    prompt = split_prompt("a", "C:\\<TTSEP>go <\\TTSEP> on")
    assert [segment.text for segment in prompt.segments] == ["C:\\", "go <TTSEP> on"]


@pytest.mark.parametrize("separator", ["", "|", "--", "a\\b", "abca"])
def test_unfit_separators_are_refused(separator):
    with pytest.raises(PromptError, match="is unfit"):
        split_prompt("a", "text", separator)
    with pytest.raises(PromptError, match="is unfit"):
        escape("text", separator)


@pytest.mark.parametrize(
    ("text", "message"),
    [("me<TTSEP>", "task segment 'a/task' is empty"), ("\0", "agent 'a': the prompt: NUL")],
)
def test_bad_prompts_are_refused(text, message):
    with pytest.raises(PromptError, match=message):
        split_prompt("a", text)

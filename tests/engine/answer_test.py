"""Growing answers: when their text is streamed, and which text and tokens they keep."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokendance_jax.demo import demo_tokenizer_json
from tokendance_jax.engine.answer import Answer
from tokendance_jax.prompt import Tokenizer

TOKENIZER = Tokenizer(demo_tokenizer_json())
END = TOKENIZER.encode_markup("<|im_end|>")[0]
# The tokens of ASCII characters. Each of the other characters takes several tokens.
BYTE = {TOKENIZER.encode_text(c)[0]: c for c in map(chr, range(32, 127))}
IDS = {c: token for token, c in BYTE.items()}


def spell(text):
    """Encodes each ASCII character as one token, and each other character as several."""
    return [token for c in text for token in ([IDS[c]] if c in IDS else TOKENIZER.encode_text(c))]


def answer(tokens, *, stop=(), limit=1000):
    """Returns an answer with these tokens added, and the text that each made certain."""
    heard = []
    made = Answer(TOKENIZER, limit=limit, stop=stop, stop_ids=[END])
    for token in tokens:
        if made.live:
            heard.append((token, made.add(token)))
    return made, heard


def test_a_stop_string_is_never_shown():
    made, heard = answer(spell("no, STOP it"), stop=["STOP"])
    assert made.text == "no, "
    assert made.token_ids == tuple(spell("no, "))
    assert made.finish_reason == "stop"
    assert [piece for _, piece in heard] == ["n", "o", ",", " ", "", "", "", ""]
    assert [token for token, _ in heard] == made.chosen == spell("no, STOP")


def test_the_beginning_of_a_stop_string_is_shown_when_it_is_none():
    made, heard = answer(spell("ST STO STaSS"), stop=["STOP", "TaSSe"])
    assert made.live
    assert "".join(piece for _, piece in heard) == "ST STO S"
    heard.append((END, made.add(END)))
    assert "".join(piece for _, piece in heard) == made.text == "ST STO STaSS"
    assert heard[-1] == (END, "TaSS")
    assert made.token_ids == tuple(spell("ST STO STaSS"))
    assert made.finish_reason == "stop"


def test_the_limit_shows_what_was_held_back():
    made, heard = answer(spell("a STO"), stop=["STOP"], limit=5)
    assert "".join(piece for _, piece in heard) == made.text == "a STO"
    assert made.finish_reason == "length"
    assert len(made.token_ids) == len(heard) == 5


def test_a_character_is_shown_whole():
    tokens = spell("a漁b")
    made, heard = answer(tokens, limit=len(tokens))
    assert len(tokens) > 3
    assert [piece for _, piece in heard] == ["a", *[""] * (len(tokens) - 3), "漁", "b"]
    # A character that the limit cuts off appears as U+FFFD in both the text and the stream.
    made, heard = answer(tokens, limit=2)
    assert "".join(piece for _, piece in heard) == made.text == "a\ufffd"


@pytest.mark.parametrize("stop", ["漁b", "漁"])
def test_no_token_of_a_stop_string_is_kept(stop):
    # Not even the tokens of the first bytes of its first character.
    made, heard = answer(spell("a漁b"), stop=[stop])
    assert made.text == "a" == "".join(piece for _, piece in heard)
    assert made.token_ids == tuple(spell("a"))


def test_a_token_that_ends_in_a_stop_string_is_not_kept():
    (token,) = TOKENIZER.encode_text(" the")
    made, heard = answer([*spell("in"), token], stop=["he"])
    assert made.text == "in t" == "".join(piece for _, piece in heard)
    assert made.token_ids == tuple(spell("in"))


@given(st.text("abé", max_size=9), st.lists(st.text("abé", min_size=1, max_size=3), max_size=3))
def test_what_is_shown_is_the_answer(text, stop):
    made, heard = answer([*spell(text), END], stop=stop)
    found = [index for index in map(text.find, stop) if index >= 0]
    # The stop string that is complete first ends the answer. If several are complete by then, the
    # answer ends where the first of them begins.
    ends = [text.find(string) + len(string) for string in stop if string in text]
    seen = text[: min(ends)] if ends else text
    expected = seen[: min(i for i in map(seen.find, stop) if i >= 0)] if found else text
    assert made.text == expected == "".join(piece for _, piece in heard)
    assert made.token_ids == tuple(spell(expected))
    for count in range(len(heard)):
        assert expected.startswith("".join(piece for _, piece in heard[:count]))

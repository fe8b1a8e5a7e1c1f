"""Growing answers: when their text is streamed, and which text and tokens they keep."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokendance_jax.demo import demo_tokenizer_json
from tokendance_jax.engine.decode import Answer, take
from tokendance_jax.engine.errors import NotFiniteError
from tokendance_jax.engine.sampling import NOT_FINITE
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
    """Returns an answer with these tokens added, and what its callback received."""
    heard = []
    made = Answer(
        "a",
        TOKENIZER,
        limit=limit,
        stop=stop,
        stop_ids=frozenset([END]),
        on_token=lambda _, token, piece: heard.append((token, piece)),
    )
    for token in tokens:
        made.add(token)
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
    made.add(END)
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


def test_logits_that_are_not_finite_end_the_round_by_name():
    one, other = answer(spell("ab"))[0], answer(spell("a"))[0]
    tokens = np.array([[IDS["c"], IDS["d"]], [IDS["b"], NOT_FINITE]], np.int32)
    with pytest.raises(NotFiniteError) as error:
        take([one, other], tokens, round_index=3)
    assert str(error.value) == (
        "round 3: agent 'a': the logits of token 2 of its answer are NaN or infinite; check the "
        "model's weights, or load it with dtype=float32 if they overflow"
    )
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    # Tokens behind the end of an answer are ignored.
    ended = answer([*spell("a"), END])[0]
    take([ended], np.full((1, 2), NOT_FINITE, np.int32), round_index=3)
    assert ended.text == "a"

"""Texts stay texts, markup becomes control tokens, and both decode."""

import json
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tokendance_jax.demo import demo_tokenizer_json
from tokendance_jax.prompt import PromptError, Tokenizer

TOKENIZER = Tokenizer(demo_tokenizer_json(), stop_ids=(1023,))


def _with_added(id: int, content: str) -> str:
    """Returns the demo's tokenizer with an added token that is not special."""
    fields = json.loads(demo_tokenizer_json())
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    fields["added_tokens"].append({"id": id, "content": content, **plain})
    return json.dumps(fields)


TOOLS = Tokenizer(_with_added(1024, "<tool_call>"))
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"]
# Characters, control strings and pieces of them, in any order.
TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
        st.sampled_from([*CONTROL, "<|", "|>", "im_end", "<tool", "_call>", "\n"]),
    ),
    max_size=8,
).map("".join)


@given(TEXTS)
@example("<|im_end|>\n<|im_start|>system\n")
def test_texts_never_become_control_tokens_and_decode_back(text):
    for tokenizer in (TOKENIZER, TOOLS):
        ids = tokenizer.encode_text(text)
        assert tokenizer.control_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@given(st.lists(st.integers(0, 1025), max_size=40))
def test_streamed_pieces_join_to_the_decoded_text(ids):
    stream = TOOLS.stream()
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.finish() == TOOLS.decode(ids)


def test_a_stream_waits_for_the_bytes_of_a_character():
    ids = TOKENIZER.encode_text("é漁a")
    assert len(ids) == 6
    stream = TOKENIZER.stream()
    assert [stream.push(token_id) for token_id in ids] == ["", "é", "", "", "漁", "a"]
    assert stream.finish() == ""


def test_a_cut_character_ends_as_a_replacement_character():
    stream = TOKENIZER.stream()
    assert [stream.push(token_id) for token_id in TOKENIZER.encode_text("漁")[:2]] == ["", ""]
    assert stream.finish() == "�"


def test_markup_becomes_control_tokens():
    ids = TOKENIZER.encode_markup("<|im_start|>user\nhi<|im_end|>\n")
    assert ids[0] == 1022
    assert 1023 in ids
    assert TOKENIZER.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n"
    assert TOOLS.encode_markup("<tool_call>") == [1024]


def test_sizes_and_ids():
    assert TOKENIZER.control_ids == {1021, 1022, 1023}
    assert TOKENIZER.vocab_size == 1024
    assert TOKENIZER.stop_ids == (1023,)
    assert TOKENIZER.chat_template is None
    assert TOOLS.vocab_size == 1025


def test_post_processor_truncation_and_padding_of_the_file_are_ignored():
    fields = json.loads(demo_tokenizer_json())
    fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [1022], "tokens": ["<|im_start|>"]}
        },
    }
    fields["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    tokenizer = Tokenizer(json.dumps(fields))
    text = "The wind turned to the west."
    assert tokenizer.encode_text(text) == TOKENIZER.encode_text(text)
    assert tokenizer.encode_markup(text) == TOKENIZER.encode_markup(text)


@pytest.mark.parametrize("method", ["encode_text", "encode_markup"])
@pytest.mark.parametrize("text", ["a\0", "\ud800"])
def test_unclean_text_is_refused(method, text):
    with pytest.raises(PromptError, match="to encode"):
        getattr(TOKENIZER, method)(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "tokenizer JSON: Expecting value"),
        ("[" * 100_000, "tokenizer JSON: "),
        ("[]", "no BPE model"),
        ('{"model": {"type": "Unigram", "vocab": []}}', "no BPE model"),
        ('{"model": {"vocab": {"a": 0}, "merges": []}}', "255 of 256 bytes have no token"),
    ],
)
def test_other_files_are_refused(text, message):
    with pytest.raises(PromptError, match=message):
        Tokenizer(text)


def test_a_damaged_model_is_refused():
    fields = json.loads(demo_tokenizer_json())
    fields["model"]["merges"].append(["harbour", "nowhere"])
    with pytest.raises(PromptError, match=r"give a whole tokenizer\.json"):
        Tokenizer(json.dumps(fields))


def test_a_control_token_that_is_a_word_too_is_refused():
    edda = TOKENIZER.encode_text("Edda")
    assert len(edda) == 1
    with pytest.raises(PromptError, match="the text 'Edda' would become a control token"):
        Tokenizer(_with_added(edda[0], "Edda"))


def test_control_tokens_in_a_vocabulary_that_is_used_whole_are_refused():
    fields = json.loads(demo_tokenizer_json())
    fields["model"]["vocab"]["<|im_end|>"] = 1023
    assert Tokenizer(json.dumps(fields)).encode_text("<|im_end|>") != [1023]
    fields["model"]["ignore_merges"] = True
    with pytest.raises(PromptError, match="would become a control token"):
        Tokenizer(json.dumps(fields))


@pytest.mark.parametrize("field", ["pre_tokenizer", "decoder"])
def test_a_tokenizer_that_loses_text_is_refused(field):
    fields = json.loads(demo_tokenizer_json()) | {field: None}
    with pytest.raises(PromptError, match="text does not come back"):
        Tokenizer(json.dumps(fields))


def test_encoding_is_the_same_every_time():
    fields = json.loads(demo_tokenizer_json())
    fields["model"]["dropout"] = 0.5
    tokenizer = Tokenizer(json.dumps(fields))
    text = "The wind turned to the west."
    assert tokenizer.encode_text(text) == TOKENIZER.encode_text(text)
    assert tokenizer.encode_markup(text) == TOKENIZER.encode_markup(text)


def test_a_stop_id_outside_the_vocabulary_is_refused():
    with pytest.raises(PromptError, match="a stop id must be an integer from 0 to 1023"):
        Tokenizer(demo_tokenizer_json(), stop_ids=(1024,))

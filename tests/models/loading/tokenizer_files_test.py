"""Tokens read from a folder's files; the expected ids and names are those of transformers 5.24."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.models.loading import tiny
from tokendance_jax.models.loading import CheckpointError
from tokendance_jax.models.loading.tokenizer_files import TextTools, read_text_tools

EOT, START, END, TOOL = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
DECODER = {
    str(i): {"content": content, "special": i < 262, **FLAGS}
    for i, content in enumerate((EOT, START, END, TOOL), 259)
}


def write(folder: Path, *, known: int = 1, **files: dict[str, Any]) -> Path:
    """Writes a folder whose `tokenizer.json` holds the first `known` of the four added tokens.

    The keywords `settings`, `special`, `added`, `config` and `generation` write other files.
    """
    fields = json.loads(tiny.tokenizer_json())
    fields["added_tokens"] = fields["added_tokens"][:known]
    vocab = fields["model"]["vocab"]
    fields["model"]["vocab"] = {token: i for token, i in vocab.items() if i < 259}
    (folder / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    names = {
        "settings": "tokenizer_config.json",
        "special": "special_tokens_map.json",
        "added": "added_tokens.json",
        "config": "config.json",
        "generation": "generation_config.json",
    }
    for kind, content in ({"config": {"eos_token_id": 259}} | files).items():
        (folder / names[kind]).write_text(json.dumps(content), encoding="utf-8")
    return folder


def read(folder: Path, vocab_size: int = 272) -> TextTools:
    return read_text_tools(folder, dataclasses.replace(tiny.CONFIG, vocab_size=vocab_size))


def ids(tools: TextTools, text: str) -> list[int]:
    return Tokenizer.from_str(tools.tokenizer_json).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "files",
    [
        {"settings": {"added_tokens_decoder": DECODER}},
        {"added": {TOOL: 262, START: 260, END: 261}},
        {"settings": {"additional_special_tokens": [START, END, TOOL]}},
        {"settings": {"extra_special_tokens": [START, {"content": END}, TOOL]}},
        {"special": {"additional_special_tokens": [START, END, TOOL]}},
        {"special": {"bos_token": START, "eos_token": {"content": END}, "cls_token": TOOL}},
        {"settings": {"eos_token": END, "bos_token": START, "image_token": TOOL}},
        {"settings": {"added_tokens_decoder": DECODER}, "added": {TOOL: 262, EOT: 259}},
    ],
)
@pytest.mark.parametrize("known", [1, 4])
def test_added_tokens_of_every_file(tmp_path: Path, known: int, files: dict[str, Any]):
    folder = write(tmp_path, known=known, **files)
    tools = read(folder)
    assert ids(tools, f"{START}he{END}{TOOL}{EOT}") == [260, 256, 261, 262, 259]
    if known == 4:
        assert tools.tokenizer_json == (folder / "tokenizer.json").read_text()


def test_a_word_that_names_a_special_token_stays_a_word(tmp_path: Path):
    tools = read(write(tmp_path, settings={"pad_token": "he"}))
    assert ids(tools, "hell") == [258]
    assert tools.special_tokens["pad_token"] == "he"


def test_a_token_of_the_vocabulary_keeps_its_id(tmp_path: Path):
    folder = write(tmp_path, settings={"eos_token": END})
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["model"]["vocab"][END] = 265
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    tools = read(folder)
    assert ids(tools, END) == [265]
    assert tools.stop_ids == (259, 265)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"settings": {"added_tokens_decoder": {"264": DECODER["261"]}}},
            "tokenizer_config.json: <|im_end|>: the token has id 264 here, and 260 after "
            "{folder}/tokenizer.json; save the tokenizer again",
        ),
        (
            {"settings": {"added_tokens_decoder": {"260": DECODER["259"]}}},
            "tokenizer_config.json: <|endoftext|>: the token has id 260 here, and 259 after ",
        ),
        (
            {"settings": {"added_tokens_decoder": {"259": DECODER["260"]}}},
            "tokenizer_config.json: <|im_start|>: the token has id 259 here, and 260 after ",
        ),
        (
            {"added": {START: 262}},
            "added_tokens.json: <|im_start|>: the token has id 262 here, and 260 after ",
        ),
        (
            {"settings": {"added_tokens_decoder": DECODER}, "added": {START: 261}},
            "added_tokens.json: <|im_start|>: the token has id 261 here, and 260 after "
            "{folder}/tokenizer.json and {folder}/tokenizer_config.json; save",
        ),
        (
            {"settings": {"added_tokens_decoder": DECODER}, "added": {"<x>": 263}},
            "added_tokens.json: <x>: the token has id 263 here, and none after ",
        ),
        (
            {"settings": {"added_tokens_decoder": DECODER}},
            "tokenizer_config.json: <tool_call>: the token has id 262 after those of "
            "tokenizer.json; the embedding has 262 rows",
        ),
        (
            {"special": {"additional_special_tokens": ["<1>", "<2>", "<3>"]}},
            "special_tokens_map.json: <3>: the token has id 262 after ",
        ),
        ({"settings": {"added_tokens_decoder": []}}, "tokenizer_config.json: added_tokens_decoder"),
        ({"settings": {"added_tokens_decoder": {"a": {}}}}, "tokenizer_config.json: added_tokens"),
        (
            {"settings": {"added_tokens_decoder": {"260": {"special": True}}}},
            "tokenizer_config.json: added_tokens_decoder: 260: is {{'special': True}}; must be",
        ),
        (
            {"settings": {"added_tokens_decoder": {"260": DECODER["260"] | {"lstrip": 3}}}},
            "tokenizer_config.json: added_tokens_decoder: 260: is {{",
        ),
        ({"added": {START: "260"}}, "added_tokens.json: <|im_start|>: is '260'; must be the"),
        ({"settings": {"bos_token": 3}}, "tokenizer_config.json: bos_token: is 3; must be a"),
        (
            {"special": {"eos_token": {"content": ""}}},
            "special_tokens_map.json: eos_token: is {{'content': ''}}; must be a token's text",
        ),
        (
            {"settings": {"extra_special_tokens": {"fim": []}}},
            "tokenizer_config.json: fim: is []; must be a token's text",
        ),
        (
            {"special": {"additional_special_tokens": [START, 3]}},
            "special_tokens_map.json: additional_special_tokens: is 3; must be a token's text",
        ),
    ],
)
def test_contradictions_and_malformed_tokens(tmp_path: Path, files: dict[str, Any], message: str):
    write(tmp_path, **files)
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, vocab_size=262)
    assert str(error.value).startswith(f"{tmp_path}/" + message.format(folder=tmp_path))


DEFAULTS = {"eos_token": EOT, "unk_token": EOT, "pad_token": EOT}


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ({}, DEFAULTS),
        ({"settings": {"bos_token": START, "add_bos_token": True}}, {"bos_token": START}),
        (
            {"settings": {"bos_token": {"__type": "AddedToken", "content": START, **FLAGS}}},
            {"bos_token": START},
        ),
        ({"settings": {"bos_token": "", "eos_token": None}}, {"eos_token": None}),
        ({"special": {"bos_token": {"content": START}}}, {"bos_token": START}),
        (
            {"settings": {"bos_token": END, "eos_token": END}, "special": {"bos_token": START}},
            {"bos_token": START, "eos_token": END},
        ),
        (
            {
                "settings": {"bos_token": END, "added_tokens_decoder": DECODER},
                "special": {"bos_token": START, "eos_token": END},
            },
            {"bos_token": END},
        ),
        ({"settings": {"image_token": TOOL, "x_token": 1}}, {"image_token": TOOL}),
        ({"settings": {"extra_special_tokens": {"fim": TOOL}}}, {"fim": TOOL}),
        (
            {"settings": {"additional_special_tokens": [TOOL, {"content": START}]}},
            {"additional_special_tokens": (TOOL, START)},
        ),
    ],
)
def test_special_tokens_by_name(tmp_path: Path, files: dict[str, Any], names: dict[str, Any]):
    tools = read(write(tmp_path, known=4, **files))
    expected = {name: value for name, value in (DEFAULTS | names).items() if value is not None}
    assert tools.special_tokens == expected


@pytest.mark.parametrize(
    ("files", "stops"),
    [
        ({}, (259,)),
        ({"settings": {"eos_token": END}}, (259, 261)),
        ({"special": {"eos_token": {"content": END}}}, (259, 261)),
        ({"settings": {"eos_token": START}, "special": {"eos_token": END}}, (259, 260, 261)),
        (
            {
                "settings": {"eos_token": START, "added_tokens_decoder": DECODER},
                "special": {"eos_token": END},
            },
            (259, 260, 261),
        ),
        ({"generation": {"eos_token_id": [261, 260]}}, (259, 260, 261)),
        (
            {"config": {}, "generation": {"eos_token_id": 260}, "settings": {"eos_token": END}},
            (260, 261),
        ),
        ({"config": {"eos_token_id": None}, "settings": {"eos_token": END}}, (261,)),
    ],
)
def test_ends_of_all_files_together(tmp_path: Path, files: dict[str, Any], stops: tuple[int, ...]):
    assert read(write(tmp_path, known=4, **files)).stop_ids == stops


def test_no_file_names_an_end(tmp_path: Path):
    write(tmp_path, config={}, settings={"eos_token": None})
    with pytest.raises(CheckpointError, match="eos_token_id: no file names the token"):
        read(tmp_path)

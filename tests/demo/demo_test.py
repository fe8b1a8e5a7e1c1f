"""Checks the demo's stories, tokenizer and checkpoint."""

import json
from pathlib import Path

import pytest

import tokendance_jax.demo
from scripts.demo import tokenizer as demo_tokenizer
from scripts.demo.data import tokenizer_texts
from tokendance_jax.demo import (
    demo_chat_template,
    demo_tokenizer_json,
    demo_trace,
    harbour_trace,
)
from tokendance_jax.demo.model import demo_model
from tokendance_jax.demo.town import words
from tokendance_jax.prompt import Tokenizer, tokenize_round

HARBOUR = harbour_trace()
TOKENIZER = Tokenizer(demo_tokenizer_json(), demo_chat_template())
CHECKPOINT = Path(tokendance_jax.demo.__file__).parent / "checkpoint"


def test_the_demo_is_a_story_that_training_never_saw():
    trace = demo_trace()
    assert trace == demo_trace()
    assert [len(round_.agents) for round_ in trace.rounds] == [8, 8, 8]
    names = set(words.names("held_out"))
    assert names.issuperset(prompt.agent for prompt in trace.rounds[0].agents)


@pytest.mark.slow
def test_the_tokenizer_is_the_one_of_the_training():
    made, shipped = demo_tokenizer.train(tokenizer_texts()), demo_tokenizer_json()
    for part in ("model", "added_tokens", "pre_tokenizer", "normalizer", "decoder"):
        assert json.loads(made)[part] == json.loads(shipped)[part]
    assert TOKENIZER.vocab_size == demo_tokenizer.VOCAB_SIZE == 1024


def test_the_checkpoint_is_whole_and_small():
    sizes = {file.name: file.stat().st_size for file in CHECKPOINT.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(
        sizes
    )
    assert sum(sizes.values()) < 12_000_000
    settings = json.loads((CHECKPOINT / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == demo_chat_template()
    for dtype in ("bfloat16", "float32"):
        model = demo_model(dtype)
        assert (model.name, model.dtype.name) == ("demo", dtype)
        assert model.config.vocab_size == TOKENIZER.vocab_size
        assert model.tokenizer.chat_template == demo_chat_template()
        assert model.tokenizer.decode(list(model.tokenizer.stop_ids)) == "<|endoftext|><|im_end|>"


def test_the_harbour_is_an_all_gather():
    assert HARBOUR.name == "harbour"
    assert len(HARBOUR.rounds) == 3
    agents = [prompt.agent for prompt in HARBOUR.rounds[0].agents]
    assert len(agents) == 4
    outputs: list[str | None] = []
    for round_ in HARBOUR.rounds:
        assert [prompt.agent for prompt in round_.agents] == agents
        for prompt in round_.agents:
            shared = [segment.text for segment in prompt.segments if segment.kind == "shared"]
            assert shared == outputs
        outputs = [prompt.recorded_output for prompt in round_.agents]


def test_histories_of_the_harbour_only_grow():
    for before, after in zip(HARBOUR.rounds, HARBOUR.rounds[1:], strict=False):
        for old, new in zip(before.agents, after.agents, strict=True):
            histories = [
                [segment for segment in prompt.segments if segment.kind in ("system", "history")]
                for prompt in (old, new)
            ]
            assert histories[1][: len(histories[0])] == histories[0]
            assert len(histories[1]) == len(histories[0]) + 1


def test_texts_of_the_harbour_end_with_one_newline_and_prompts_are_short():
    for round_ in HARBOUR.rounds:
        for prompt in round_.agents:
            texts = [segment.text or "" for segment in prompt.segments]
            for text in [*texts, prompt.recorded_output or ""]:
                assert text == text.strip() + "\n"
            assert 150 <= len("".join(texts).split()) <= 400


def test_joined_text_encodes_like_the_segments():
    for round_ in (*HARBOUR.rounds, *demo_trace().rounds):
        for prompt, tokenized in zip(
            round_.agents, tokenize_round(round_, TOKENIZER, chat=False), strict=True
        ):
            joined = "".join(segment.text or "" for segment in prompt.segments)
            assert TOKENIZER.encode_text(joined) == tokenized.token_ids.tolist()


def test_every_right_answer_fits():
    for round_ in demo_trace().rounds:
        for prompt in round_.agents:
            answer = TOKENIZER.encode_text(prompt.recorded_output or "")
            assert len(answer) < (prompt.max_new_tokens or 0), prompt.recorded_output

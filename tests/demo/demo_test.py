"""The demo's data are what they claim to be."""

import json

from scripts import make_demo_tokenizer
from tokendance_jax.demo import demo_chat_template, demo_tokenizer_json, demo_trace
from tokendance_jax.prompt import Tokenizer, tokenize_round

TRACE = demo_trace()
TOKENIZER = Tokenizer(demo_tokenizer_json(), demo_chat_template())


def test_the_trace_is_an_all_gather():
    assert TRACE.name == "demo"
    assert len(TRACE.rounds) == 3
    agents = [prompt.agent for prompt in TRACE.rounds[0].agents]
    assert len(agents) == 4
    outputs: list[str | None] = []
    for moment in TRACE.rounds:
        assert [prompt.agent for prompt in moment.agents] == agents
        for prompt in moment.agents:
            shared = [segment.text for segment in prompt.segments if segment.kind == "shared"]
            assert shared == outputs
        outputs = [prompt.recorded_output for prompt in moment.agents]


def test_histories_only_grow():
    for before, after in zip(TRACE.rounds, TRACE.rounds[1:], strict=False):
        for old, new in zip(before.agents, after.agents, strict=True):
            histories = [
                [segment for segment in prompt.segments if segment.kind in ("system", "history")]
                for prompt in (old, new)
            ]
            assert histories[1][: len(histories[0])] == histories[0]
            assert len(histories[1]) == len(histories[0]) + 1


def test_every_text_ends_with_one_newline_and_prompts_are_short():
    for moment in TRACE.rounds:
        for prompt in moment.agents:
            texts = [segment.text or "" for segment in prompt.segments]
            for text in [*texts, prompt.recorded_output or ""]:
                assert text == text.strip() + "\n"
            assert 150 <= len("".join(texts).split()) <= 400


def test_every_recorded_answer_fits():
    for moment in TRACE.rounds:
        for prompt in moment.agents:
            assert prompt.max_new_tokens == 32
            assert len(TOKENIZER.encode_text(prompt.recorded_output or "")) <= 32


def test_joined_text_encodes_like_the_segments():
    for moment in TRACE.rounds:
        for prompt, tokenized in zip(
            moment.agents, tokenize_round(moment, TOKENIZER, chat=False), strict=True
        ):
            joined = "".join(segment.text or "" for segment in prompt.segments)
            assert TOKENIZER.encode_text(joined) == tokenized.token_ids.tolist()


def test_the_tokenizer_is_trained_on_the_trace():
    made = json.loads(make_demo_tokenizer.train(make_demo_tokenizer.texts_of(TRACE)))
    shipped = json.loads(demo_tokenizer_json())
    assert made["model"]["vocab"] == shipped["model"]["vocab"]
    assert made["model"]["merges"] == shipped["model"]["merges"]
    assert made["added_tokens"] == shipped["added_tokens"]
    assert TOKENIZER.vocab_size == make_demo_tokenizer.VOCAB_SIZE == 1024

"""Tokenized prompts: fields that they keep, and answers behind them."""

import numpy as np
import pytest

from tokendance_jax.demo import demo_chat_template, demo_tokenizer_json
from tokendance_jax.prompt import AgentPrompt, Round, Segment, Tokenizer, tokenize_round
from tokendance_jax.prompt.tokenized import TokenSpan

TOKENIZER = Tokenizer(demo_tokenizer_json(), demo_chat_template())
SEGMENTS = (
    Segment("shared", "out/a", text="The boats are in.\n"),
    Segment("task", "task", text="What now?\n"),
)
ANSWER = np.array([5, 6, 7], np.int32)


def tokenized(chat=False, **fields):
    round_ = Round((AgentPrompt("a", SEGMENTS, **fields),))
    return tokenize_round(round_, TOKENIZER, chat=chat)[0]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("fidelity", ["collective", "exact"])
def test_fidelity_is_carried_over(chat, fidelity):
    prompt = tokenized(chat, fidelity=fidelity)
    assert prompt.fidelity == fidelity
    assert prompt.followed_by(ANSWER).fidelity == fidelity


@pytest.mark.parametrize("chat", [True, False])
def test_an_answer_stands_behind_the_prompt_as_markup_does(chat):
    prompt = tokenized(chat)
    followed = prompt.followed_by(ANSWER)
    tokens = len(prompt.token_ids)
    assert followed.token_ids.tolist() == [*prompt.token_ids.tolist(), 5, 6, 7]
    assert followed.token_ids.dtype == np.int32
    assert followed.spans == (*prompt.spans, TokenSpan("markup", "answer", tokens, tokens + 3))
    assert (prompt.answer_tokens, followed.answer_tokens) == (0, 3)
    assert followed.agent == prompt.agent


def test_answers_add_up():
    prompt = tokenized()
    followed = prompt.followed_by(ANSWER).followed_by(ANSWER[:1])
    assert followed.answer_tokens == 4
    assert followed.token_ids.tolist()[len(prompt.token_ids) :] == [5, 6, 7, 5]
    assert [span.stop - span.start for span in followed.spans[-2:]] == [3, 1]


def test_no_answer_leaves_the_spans_as_they_are():
    prompt = tokenized()
    followed = prompt.followed_by(ANSWER[:0])
    assert followed.spans == prompt.spans
    assert followed.token_ids.tolist() == prompt.token_ids.tolist()
    assert followed.answer_tokens == 0

"""Rounds of a model of another family than the tests' usual one, with a scaled rotary embedding."""

import numpy as np
import pytest

from tests.engine.rounds import SMALL, gathering, mixed, tiny, words
from tests.models.decoder.tiny import QWEN3
from tokendance_jax.engine.rounds import RoundEngine
from tokendance_jax.kernels.rope import Rope, Yarn
from tokendance_jax.mirror import decode_dense
from tokendance_jax.policy.policies import PolicyOptions
from tokendance_jax.prompt import tokenize_round
from tokendance_jax.study.scoring import score


@pytest.fixture(scope="module")
def make():
    """Makes engines that share their programs."""
    model, programs = tiny(**QWEN3, rope=Rope(1e4, Yarn(4.0, 64))), None

    def make(policy, **options):
        nonlocal programs
        options = PolicyOptions(**options, least_saving=None)
        engine = RoundEngine(model, policy=policy, options=options, programs=programs, **SMALL)
        programs = engine.programs
        return engine

    return make


def logits(engine):
    prompts = tokenize_round(mixed(), engine.model.tokenizer, chat=False)
    answers = [np.array(words(3, seed=seat), np.int32) for seat in range(len(prompts))]
    return score(engine, prompts, answers)[0]


def test_recomputing_everything_equals_dense_and_reuse_is_near(make):
    dense = logits(make("dense"))
    for policy, options, limit in (
        ("prefix", {}, 1e-3),
        ("tokendance", {"selection": "all"}, 1e-3),
        ("epic", {"epic_tokens": 999}, 1e-3),
    ):
        for one, other in zip(logits(make(policy, **options)), dense, strict=True):
            assert np.abs(one - other).max() < limit
    reused = logits(make("tokendance", selection="none"))
    assert max(np.abs(one - other).max() for one, other in zip(reused, dense, strict=True)) > 1e-3


def test_int8_mirrors_need_no_key_bias(make):
    exact, int8 = (
        make("tokendance").serve(gathering(), chat=False, mirrors=form).mirrors
        for form in ("exact", "int8")
    )
    assert int8.form.rope == Rope(1e4, Yarn(4.0, 64))
    assert not int8.form.key_bias.any()
    for index in range(len(exact.mirrors)):
        for one, other in zip(
            *(decode_dense(x, index, rotate=False) for x in (int8, exact)), strict=True
        ):
            largest = np.linalg.norm(other, axis=-1, keepdims=True)
            assert (np.abs(one - other) <= largest / 127).all()
    lanes = make("tokendance").restore(int8)
    assert len(lanes) == len(exact.mirrors)

"""Collective reuse with the real model on a recorded round, compared with dense and rivals."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

from tests import shared_data
from tokendance_jax.engine.rounds import RoundEngine
from tokendance_jax.model import Model
from tokendance_jax.policy.policies import PolicyOptions
from tokendance_jax.prompt import read_trace, tokenize_round
from tokendance_jax.study.quality import agreement
from tokendance_jax.study.scoring import score as scores

pytestmark = pytest.mark.real_model
SIZES: dict[str, Any] = {"kv_memory": 256 << 20, "row_budget": 256, "max_agents": 2}


@pytest.fixture(scope="module")
def model():
    return Model.from_checkpoint(shared_data.real_checkpoint("float32"), "float32")


@pytest.fixture(scope="module")
def score(model):
    """Logits along the recorded answers of two agents of a round, by policy."""
    programs = RoundEngine(model, **SIZES).programs

    @functools.cache
    def run(policy, **options):
        path = shared_data.shared_dir() / "traces" / "ga-small.jsonl"
        round_ = read_trace(path, "ga-small-a").rounds[2]
        round_ = dataclasses.replace(round_, agents=round_.agents[:2])
        prompts = tokenize_round(round_, model.tokenizer, chat=False)
        answers = [
            np.array(model.tokenizer.encode_text(agent.recorded_output)[:24], np.int32)
            for agent in round_.agents
        ]
        chosen = PolicyOptions(**options, least_saving=None)
        engine = RoundEngine(model, policy=policy, options=chosen, programs=programs, **SIZES)
        return scores(engine, prompts, answers)[0]

    return run


@pytest.mark.sweep
def test_everything_recomputed_is_dense(score):
    for dense, other in zip(score("dense"), score("tokendance", selection="all"), strict=True):
        assert np.abs(dense - other).max() < 1e-3


def against_dense(score, policy, **options):
    return agreement(score("dense"), score(policy, **options))


# The program in which CacheBlend selects tokens takes long to compile.
@pytest.mark.parametrize("rival", ["epic", pytest.param("blend-batched", marks=pytest.mark.sweep)])
def test_the_collective_round_is_nearer_to_dense_than_its_rivals(score, rival):
    none = against_dense(score, "tokendance", selection="none")
    other = against_dense(score, rival)
    assert none.kl_mean < other.kl_mean
    assert none.top1 >= other.top1


def test_recomputed_heads_bring_it_nearer(score):
    none = against_dense(score, "tokendance", selection="none")
    head = against_dense(score, "tokendance", selection="head", head_pages=4)
    assert head.kl_mean < none.kl_mean
    assert head.top1 > 0.9

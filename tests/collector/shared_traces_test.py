"""Prefix reuse on recorded traces, counted by the planner alone."""

import functools
import json

import numpy as np
import pytest

from tests import shared_data
from tokendance_jax.collector.exact import Prefix
from tokendance_jax.models.loading.gguf_file import read_gguf_header
from tokendance_jax.models.loading.gguf_tokenizer import tokenizer_from_gguf
from tokendance_jax.paged import PagePool, PrefixCache
from tokendance_jax.prompt import Tokenizer, read_trace, tokenize_round

pytestmark = pytest.mark.real_model

TRACES = {
    "ga-small.jsonl": ("ga-small-a", "ga-small-c"),
    "ga-small-en.jsonl": ("ga-small-en-a", "ga-small-en-b2", "ga-small-en-d"),
    "ga-25-a.jsonl.gz": ("ga-25-a",),
    "as-50-d.jsonl.gz": ("as-50-d",),
}


@functools.cache
def tokenizer():
    file = shared_data.real_gguf()
    return Tokenizer(tokenizer_from_gguf(read_gguf_header(file).fields, file))


@pytest.mark.parametrize(("file", "name"), [(f, n) for f, names in TRACES.items() for n in names])
def test_the_prefix_policy_reuses_what_there_is(file, name):
    folder = shared_data.shared_dir() / "traces"
    stats = {entry["trace"]: entry for entry in json.loads((folder / "stats.json").read_text())}
    trace = read_trace(folder / file, name)
    pool = PagePool(1 << 17)
    policy = Prefix(pool, PrefixCache(pool, 16, "test"), 16)
    prompt_tokens = reused = 0
    for moment in trace.rounds:
        prompts = tokenize_round(moment, tokenizer(), chat=False)
        lanes = [policy.open_lane(prompt.token_ids, 0) for prompt in prompts]
        prompt_tokens += sum(len(lane.token_ids) for lane in lanes)
        reused += sum(len(lane.token_ids) - len(lane.computed) for lane in lanes)
        for lane in lanes:
            policy.close_lane(lane, np.asarray(lane.token_ids))
    assert prompt_tokens == stats[name]["tokens"]
    assert 100 * reused / prompt_tokens == pytest.approx(100 * stats[name]["prefix_round"], abs=1)

"""What policies compute and hold on recorded traces, counted by the planner alone.

The ceilings come from the traces' statistics, which count tokens and ignore pages. Run with `-s` to
see how much of each ceiling is reached.
"""

import dataclasses
import functools
import json

import jaxtyping
import numpy as np
import pytest

from tests import shared_data
from tokendance_jax.engine.ledger import distinct_tokens
from tokendance_jax.mirror import Compression, MirrorLayout
from tokendance_jax.models.loading.gguf_file import read_gguf_header
from tokendance_jax.models.loading.gguf_tokenizer import tokenizer_from_gguf
from tokendance_jax.paged import PagePool, PrefixCache
from tokendance_jax.policy.exact import Prefix
from tokendance_jax.policy.policies import PolicyOptions, make_policy
from tokendance_jax.prompt import Tokenizer, read_trace, tokenize_round
from tokendance_jax.prompt.preamble import DEFAULT_PREAMBLE

pytestmark = pytest.mark.real_model

IN_ONE_FILE = {"ga-small": "a b b2 c d", "ga-small-en": "a b b2 c d"}
IN_FILES = {"ga-25": "a b b2 c d thin-a", "as-50": "a b b2 c d", "as-100": "a b b2 c d thin-a"}
TRACES = {
    f"{data}-{variant}": file.format(data=data, variant=variant)
    for sets, file in ((IN_ONE_FILE, "{data}.jsonl"), (IN_FILES, "{data}-{variant}.jsonl.gz"))
    for data, variants in sets.items()
    for variant in variants.split()
}
LARGE = {f"{data}-{variant}" for data in ("as-50", "as-100") for variant in ["b", "b2", "c", "d"]}
PREFIX_TRACES = (
    "ga-small-a",
    "ga-small-c",
    "ga-small-en-a",
    "ga-small-en-b2",
    "ga-small-en-d",
    "ga-25-a",
    "as-50-d",
)
# Of the largest recordings only variant `a` is counted outside of the sweep.
COUNTED = [
    pytest.param(name, marks=pytest.mark.sweep) if name in LARGE else name for name in TRACES
]
PAGE_SIZE, PAGE_BYTES = 16, 196_608  # of the 0.5B model in bfloat16


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    # Checking annotations would take most of the time. Other tests check them for the same code.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@functools.cache
def tokenizer():
    file = shared_data.real_gguf()
    return Tokenizer(tokenizer_from_gguf(read_gguf_header(file).fields, file))


@functools.cache
def statistics():
    text = (shared_data.shared_dir() / "traces" / "stats.json").read_text()
    return {entry["trace"]: entry for entry in json.loads(text)}


@functools.cache
def rounds_of(name):
    """The tokenised prompts of each round."""
    trace = read_trace(shared_data.shared_dir() / "traces" / TRACES[name], name)
    return [tokenize_round(round_, tokenizer(), chat=False) for round_ in trace.rounds]


@pytest.mark.parametrize("name", PREFIX_TRACES)
def test_the_prefix_policy_reuses_what_there_is(name):
    pool = PagePool(1 << 17)
    policy = Prefix(pool, PrefixCache(pool, PAGE_SIZE, "test"), PAGE_SIZE)
    prompt_tokens = reused = 0
    for prompts in rounds_of(name):
        lanes = [policy.open_lane(prompt.token_ids, 0) for prompt in prompts]
        prompt_tokens += sum(len(lane.token_ids) for lane in lanes)
        reused += sum(len(lane.token_ids) - len(lane.computed) for lane in lanes)
        for lane in lanes:
            policy.close_lane(lane, np.asarray(lane.token_ids))
    assert prompt_tokens == statistics()[name]["tokens"]
    prefix = statistics()[name]["prefix_round"]
    assert 100 * reused / prompt_tokens == pytest.approx(100 * prefix, abs=1)


@dataclasses.dataclass(frozen=True)
class Counted:
    """What a collective round computes and holds for its prompts, without answers.

    Attributes:
      prompt_tokens: tokens of all prompts.
      computed: tokens that its agents and bases compute.
      hits: tokens of private text that are read from exact pages of earlier rounds or other agents.
      unique: tokens that the round must compute: private text without these hits, every shared text
        once, and the preamble.
      shares: whether its prompts have shared text.
      rest: bytes at rest.
      live_bytes: bytes of the pages that agents and bases hold.
    """

    prompt_tokens: int
    computed: int
    hits: int
    unique: int
    shares: bool
    rest: Compression
    live_bytes: int


@functools.cache
def collective(name):
    """Serves the rounds of a trace without a device, with a selection that recomputes nothing."""
    pool = PagePool(1 << 18)
    policy = make_policy(
        "tokendance",
        pool,
        PAGE_SIZE,
        "test",
        options=PolicyOptions(selection="none", least_saving=None),
        preamble=np.array(tokenizer().encode_text(DEFAULT_PREAMBLE), np.int32),
    )
    counted = []
    for prompts in rounds_of(name):
        written = [prompt.token_ids for prompt in prompts]
        lengths = [len(ids) for ids in written]
        opened = policy.open(prompts, [0] * len(prompts))
        for _ in opened.steps:  # the steps release the preamble
            pass
        lanes = [*opened.lanes, *opened.bases]
        held = np.concatenate([opened.base_pages, *(lane.page for lane in opened.lanes)])
        layout = MirrorLayout.of_lanes(opened.lanes, lengths)
        counted.append(
            Counted(
                prompt_tokens=sum(lengths),
                computed=sum(len(lane.computed) for lane in lanes),
                hits=sum(opened.exact_hits),
                unique=opened.preamble_tokens + distinct_tokens(prompts, opened.exact_hits),
                shares=any(span.kind == "shared" for prompt in prompts for span in prompt.spans),
                rest=layout.compression(page_size=PAGE_SIZE, page_bytes=PAGE_BYTES),
                live_bytes=len(np.unique(held)) * PAGE_BYTES,
            )
        )
        policy.close(opened, written)
    assert pool.live == 0
    return counted


@pytest.mark.parametrize("name", COUNTED)
def test_no_round_computes_more_than_prefix(name):
    # Both serve the same rounds, each with its own caches.
    preamble = np.array(tokenizer().encode_text(DEFAULT_PREAMBLE), np.int32)
    policies = [
        make_policy(policy, PagePool(1 << 18), PAGE_SIZE, "test", preamble=preamble)
        for policy in ("tokendance", "prefix")
    ]
    for prompts in rounds_of(name)[:3]:
        computed = []
        for policy in policies:
            opened = policy.open(prompts, [0] * len(prompts))
            computed.append(sum(len(p.computed) for p in [*opened.lanes, *opened.bases]))
            policy.close(opened, [prompt.token_ids for prompt in prompts])
        ours, exact = computed
        assert ours == exact or ours <= 0.8 * exact


def compare(name, what, reached, ceiling):
    """Prints a value beside its ceiling, and returns the value over the ceiling."""
    print(f"{name:15} {what:26} {reached:6.2f} of {ceiling:6.2f}: {reached / ceiling:.3f}")
    return reached / ceiling


def test_all_traces_are_served():
    assert statistics().keys() == TRACES.keys()


@pytest.mark.parametrize("name", COUNTED)
def test_rounds_compute_what_is_unique_and_no_more(name):
    rounds = collective(name)
    assert sum(x.prompt_tokens for x in rounds) == statistics()[name]["tokens"]
    for counted in rounds:
        assert counted.computed <= 1.02 * counted.unique


@pytest.mark.parametrize("name", COUNTED)
def test_shared_text_is_computed_once_in_a_round(name):
    rounds, ceiling = collective(name), statistics()[name]["collective"]
    prompt_tokens, computed, hits = (
        sum(getattr(x, field) for x in rounds) for field in ("prompt_tokens", "computed", "hits")
    )
    # The ceiling is that of a single round, so exact hits in earlier rounds exceed it.
    assert compare(name, "prompt / computed tokens", prompt_tokens / computed, ceiling) >= 0.97
    alone = prompt_tokens / (computed + hits)
    assert compare(name, "without exact hits", alone, ceiling) >= 0.97


@pytest.mark.parametrize("name", COUNTED)
def test_shared_text_is_stored_once_in_a_round(name):
    rounds, ceilings = [x for x in collective(name) if x.shares], statistics()[name]
    rest = np.mean([x.rest.round_ratio for x in rounds])
    assert compare(name, "dense / stored bytes", rest, ceilings["dedup_round"]) >= 0.95
    live = np.mean([x.rest.dense_bytes / x.live_bytes for x in rounds])
    assert compare(name, "dense / live bytes", live, ceilings["dedup_round"]) >= 0.95
    dense, own = (sum(getattr(x.rest, key) for x in rounds) for key in ("dense_bytes", "own_bytes"))
    assert compare(name, "dense / mirrors' own bytes", dense / own, ceilings["mirror"]) >= 0.95

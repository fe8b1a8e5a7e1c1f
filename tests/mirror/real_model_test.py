"""A round of the real model at rest, and back in pages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import shared_data
from tokendance_jax.collector.policies import PolicyOptions, make_policy
from tokendance_jax.engine.engine import DEFAULT_PREAMBLE, RoundEngine
from tokendance_jax.engine.prefill import Prefill
from tokendance_jax.engine.result import distinct_tokens
from tokendance_jax.kernels import storage
from tokendance_jax.mirror import MirrorLayout, decode_dense, decode_pages, encode
from tokendance_jax.model import load_model
from tokendance_jax.paged import PagePool
from tokendance_jax.prompt import read_trace, tokenize_round

pytestmark = pytest.mark.real_model

AGENTS = 5


def poisoned(spec):
    nan = storage.store(jnp.full((), jnp.nan), spec.storage)
    return jax.tree.map(lambda x: jnp.full_like(x, nan), spec.zeros())


def of_lane(lane, kv, tokens, page_size):
    """K and V of a lane's tokens, slot by slot from the pool."""
    slot, _ = lane.locate(np.arange(tokens, dtype=np.int32), page_size)
    layers, _, _, *head = kv.k.shape
    return [np.asarray(x).reshape(layers, -1, *head)[:, slot].tobytes() for x in (kv.k, kv.v)]


def test_a_round_at_rest_holds_shared_text_once_and_every_bit():
    model = load_model(shared_data.real_gguf(), dtype="bfloat16")
    programs = RoundEngine(model, kv_memory=96 << 20).programs
    size, theta = programs.shapes.page_size, model.config.rope_theta
    spec = model.kv_spec(pages=programs.shapes.pages, page_size=size)
    trace = read_trace(shared_data.shared_dir() / "traces" / "ga-25-thin-a.jsonl.gz")
    prompts = tokenize_round(trace.rounds[1], model.tokenizer, chat=False)[:AGENTS]
    policy = make_policy(
        "tokendance",
        PagePool(spec.pages),
        size,
        "test",
        options=PolicyOptions(selection="none"),
        preamble=np.array(model.tokenizer.encode_text(DEFAULT_PREAMBLE), np.int32),
    )
    opened = policy.open(prompts, [0] * AGENTS)
    prefill = Prefill(programs, poisoned(spec), agents=AGENTS)
    prefill.run(opened.steps)
    kv, lanes = prefill.kv, opened.lanes
    lengths = [len(prompt.token_ids) for prompt in prompts]
    mirrors = encode(lanes, lengths, kv)

    whole = MirrorLayout.of_lanes(lanes, lengths).compression(
        page_size=size, page_bytes=spec.page_bytes
    )
    assert mirrors.nbytes == whole.stored_bytes
    dense = sum(-(-tokens // size) for tokens in lengths) * spec.page_bytes
    ceiling = sum(lengths) / distinct_tokens(prompts)
    print(f"dense / stored bytes {dense / mirrors.nbytes:.2f} of {ceiling:.2f}")
    assert dense == whole.dense_bytes
    assert dense / mirrors.nbytes >= 0.95 * ceiling

    pages = PagePool(spec.pages)
    pages.allocate(7)  # other ids than before
    restored, back = decode_pages(mirrors, poisoned(spec), pages)
    for index, (lane, again, tokens) in enumerate(zip(lanes, back, lengths, strict=True)):
        held = of_lane(lane, kv, tokens, size)
        assert of_lane(again, restored, tokens, size) == held
        decoded = decode_dense(mirrors, index, rotate=False, theta=theta)
        assert [x.tobytes() for x in decoded] == held
        numbers = storage.load(jnp.asarray(decoded[1]))
        assert jnp.isfinite(numbers).all()
        assert jnp.abs(numbers).max() > 0
    assert (pages.live - 7) * spec.page_bytes == whole.stored_bytes - whole.index_bytes
    policy.close(opened, [prompt.token_ids for prompt in prompts])

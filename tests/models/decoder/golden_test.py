"""Compares the real model with reference activations of an independent implementation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import shared_data
from tokendance_jax.engine.rounds import RoundEngine
from tokendance_jax.kernels.round_attention import round_attention
from tokendance_jax.model import Model
from tokendance_jax.paged.page_pool import PagePool
from tokendance_jax.plan.round_plan import pack
from tokendance_jax.policy.exact import Dense
from tokendance_jax.prompt.round import AgentPrompt, Round, Segment

pytestmark = pytest.mark.real_model

PROMPTS = ("public_short", "public_round")


@pytest.fixture(scope="module")
def model():
    checkpoint = shared_data.real_checkpoint("float32")
    # The reference generates past end tokens, so the model must not stop at them.
    return Model.from_checkpoint(dataclasses.replace(checkpoint, stop_ids=()), jnp.float32)


@pytest.fixture(scope="module")
def programs(model):
    return RoundEngine(model, kv_memory=64 << 20).programs


def golden(name):
    return np.load(shared_data.shared_dir() / "golden" / f"{name}.npz")


@pytest.mark.parametrize("name", PROMPTS)
def test_activations_agree(model, programs, name):
    z = golden(name)
    shapes = programs.shapes
    lane = Dense(PagePool(shapes.pages), shapes.page_size).open_lane(z["input_ids"], 0)
    (plan,) = pack([lane], shapes)
    rope = model.config.rope
    streams = []

    def watch(x):
        jax.debug.callback(lambda x: streams.append(np.asarray(x)), x, ordered=True)

    @jax.jit
    def forward(state, kv, plan):
        qwen = nnx.merge(model.graph, state)

        def attend(q, kv, layer):
            return round_attention(
                q, kv, layer, plan.rows.position, plan.tables, plan.tiles, rope=rope
            )

        x, kv = qwen.hidden(plan.rows, kv, attend, rolled=True, watch=watch)
        x = x[jnp.asarray(z["pos"])]
        return jnp.linalg.norm(qwen.norm(x), axis=-1), qwen.logits(x), kv

    kv = model.kv_spec(pages=shapes.pages, page_size=shapes.page_size).zeros()
    final_norms, logits, kv = forward(model.state, kv, plan)
    jax.effects_barrier()

    hidden = np.stack(streams)[:, z["pos"]]
    np.testing.assert_allclose(np.linalg.norm(hidden, axis=-1), z["hidden_norms"], rtol=1e-4)
    np.testing.assert_allclose(hidden[:, -1], z["hidden_last"], atol=2e-3, rtol=1e-3)
    np.testing.assert_allclose(final_norms, z["final_norm_norms"], rtol=1e-4)
    np.testing.assert_allclose(logits[-1], z["last_logits"], atol=2e-3)
    np.testing.assert_allclose(
        jax.scipy.special.logsumexp(logits, axis=-1), z["logsumexp"], atol=2e-3
    )
    top = np.asarray(jax.lax.top_k(logits, 8)[1])
    apart = np.abs(np.diff(z["top8_logits"], axis=1)) > 1e-2
    clear = np.pad(apart, ((0, 0), (0, 1))) & np.pad(apart, ((0, 0), (1, 0)), constant_values=True)
    assert clear.sum() > 30
    np.testing.assert_array_equal(top[clear], z["top8_ids"][clear])

    slot, _ = lane.locate(z["pos"], shapes.page_size)
    page, offset = slot // shapes.page_size, slot % shapes.page_size
    for index, layer in enumerate(z["kv_layers"]):
        scale = np.abs(z["k_rope"][index]).max()
        keys = np.asarray(kv.k[layer])[page, offset]
        np.testing.assert_allclose(keys / scale, z["k_rope"][index] / scale, atol=1e-5)
        np.testing.assert_allclose(kv.v[layer][page, offset], z["v"][index], atol=1e-3)


@pytest.mark.parametrize(
    ("name", "policy"), [("public_short", "dense"), ("public_round", "prefix")]
)
def test_greedy_continuation_is_equal(model, programs, name, policy):
    z = golden(name)
    ids = tuple(int(token) for token in z["input_ids"])
    prompt = AgentPrompt("a", (Segment("task", "t", token_ids=ids),))
    engine = RoundEngine(model, policy=policy, kv_memory=64 << 20, programs=programs)
    for _ in range(1 if policy == "dense" else 2):  # the second `prefix` round reads cached pages
        result = engine.serve(Round((prompt,), max_new_tokens=32), chat=False)
        assert result.agents[0].token_ids == tuple(z["greedy_ids"].tolist())
    assert (result.ledger.reused_tokens > 0) == (policy == "prefix")

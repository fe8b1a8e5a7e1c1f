import dataclasses
import functools

import numpy as np
import pytest

import tokendance_jax as td
from tests.small_model import SMALL_CONFIG
from tokendance_jax.demo import demo_tokenizer_json
from tokendance_jax.engine import config
from tokendance_jax.kernels import storage
from tokendance_jax.model import Model
from tokendance_jax.models.decoder.random import random_parameters
from tokendance_jax.models.loading import Checkpoint
from tokendance_jax.plan import shared_rows
from tokendance_jax.plan.shapes import PACKING
from tokendance_jax.policy.policies import PolicyOptions

TALK = "the boats leave at dawn and the nets are dry, but the mill is closed until the rain ends; "


@functools.cache
def model_of(dtype, layers):
    """Returns a model whose heads the kernels support."""
    config = dataclasses.replace(SMALL_CONFIG, num_hidden_layers=layers, head_dim=64)
    return Model.from_checkpoint(
        Checkpoint(
            config=config,
            params=random_parameters(config, dtype),
            tokenizer_json=demo_tokenizer_json(),
            chat_template=None,
            stop_ids=(),
            name="tiny",
        ),
        dtype,
    )


def round_():
    """Two agents with own text of different lengths, two shared blocks and a question each."""
    blocks = tuple(
        td.Segment("shared", f"said/{name}", text=f"{name} said: {text}\n")
        for name, text in (
            ("Ann", "the boats leave at dawn and the nets are dry"),
            ("Bo", "the mill is closed until the rain is over"),
        )
    )
    prompts = []
    for name, mine in (("Ann", "I keep the lighthouse."), ("Bo", "I mend nets. I am old.")):
        own = td.Segment("history", f"own/{name}", text=mine + "\n")
        task = td.Segment("task", f"task/{name}", text=f"What now, {name}?\n")
        prompts.append(td.AgentPrompt(name, (own, *blocks, task)))
    return td.Round(tuple(prompts), max_new_tokens=3)


def engine_of(model, implementation, policy="tokendance"):
    return td.RoundEngine(
        model,
        policy=policy,
        options=PolicyOptions(selection="head", head_pages=1, least_saving=None),
        # Few rows and buckets: the simulator is slow for each row, XLA for each bucket.
        preamble="You live by the sea.\n",
        kv_memory=1 << 20,
        row_budget=64,
        max_agents=2,
        decode_steps=2,
        implementation=implementation,
    )


def crowd():
    """Six agents with own text of different lengths, and much text that all of them share."""
    names = "Ann", "Bo", "Cy", "Di", "Ed", "Flo"
    blocks = tuple(
        td.Segment("shared", f"said/{name}", text=f"{name} said: " + TALK * 2 + "\n")
        for name in names
    )
    prompts = []
    for number, name in enumerate(names):
        own = td.Segment("history", f"own/{name}", text="I mend nets. " * (number + 1))
        task = td.Segment("task", f"task/{name}", text=f"What now, {name}, and why?\n")
        prompts.append(td.AgentPrompt(name, (own, *blocks, task)))
    return td.Round(tuple(prompts), max_new_tokens=4)


@pytest.mark.slow
def test_packed_rows_give_the_tokens_of_single_lanes(small_model, monkeypatch):
    """XLA code serves plans that pack the ends of lanes as for a CPU, and as for a GPU."""
    packed, answers = [], []
    of_rows = shared_rows.Sharing.of_rows

    def spy(*arguments, **keywords):
        found = of_rows(*arguments, **keywords)
        packed.append(int(np.sum(found.groups.member)))
        return found

    monkeypatch.setattr(shared_rows.Sharing, "of_rows", spy)
    for packing in (None, PACKING["cpu"], PACKING["gpu"]):
        packed.clear()
        monkeypatch.setattr(config, "PACKING", {"cpu": packing})
        served = td.RoundEngine(
            small_model,
            policy="tokendance",
            kv_memory=8 << 20,
            row_budget=256,  # the fewest rows that a CPU packs
            max_agents=8,
            decode_steps=4,
        )
        answers.append([agent.token_ids for agent in served.serve(crowd()).agents])
        assert any(packed) == (packing is not None)
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "dtype", "layers"),
    # The simulator takes half a minute per layer. `blend` needs two: it selects at the second.
    [
        ("tokendance", "bfloat16", 1),
        pytest.param("blend", "bfloat16", 2, marks=pytest.mark.sweep),
        pytest.param("tokendance", "float32", 1, marks=pytest.mark.sweep),
    ],
)
def test_simulated_kernels_serve_the_tokens_of_xla_code(policy, dtype, layers, simulator):
    answers = {}
    for implementation in ("xla", "interpret"):
        result = engine_of(model_of(dtype, layers), implementation, policy).serve(round_())
        answers[implementation] = [agent.token_ids for agent in result.agents]
    assert len(answers["xla"][0]) == 3
    assert answers["interpret"] == answers["xla"]
    assert not simulator.races()


@pytest.mark.slow
def test_simulated_kernels_restore_the_int8_mirrors_of_xla_code(simulator):
    model = model_of("bfloat16", 2)
    xla = engine_of(model, "xla")
    mirrors = xla.serve(round_(), mirrors="int8").mirrors
    assert mirrors is not None
    restored = []
    # The pools differ in dtype: XLA code on a CPU stores bits.
    for engine in (xla, engine_of(model, "interpret")):
        lanes = engine.restore(mirrors)
        assert all(lane.slots.sum() > 0 for lane in lanes)
        slots = [lane.locate(np.arange(lane.slots.sum(), dtype=np.int32), 16)[0] for lane in lanes]
        for pool in (engine.runner.kv.k, engine.runner.kv.v):
            layers, _, _, *head = pool.shape
            numbers = np.asarray(storage.load(pool)).reshape(layers, -1, *head)
            restored.append(numbers[:, np.concatenate(slots)].astype(np.float32))
    for one, other in zip(restored[:2], restored[2:], strict=True):
        np.testing.assert_allclose(other, one, rtol=2**-7, atol=2e-5)
    assert not simulator.races()

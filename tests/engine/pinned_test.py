"""Pinned answers of all policies on three models, which no change of the code may alter.

Each digest is that of the token ids of all answers of some rounds. After a change that is meant to
alter answers, run `python -m tests.engine.pinned_test` to write new digests.
"""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import pytest

from tests import shared_data
from tests.engine.rounds import gathering, mixed, small_engine
from tokendance_jax.demo import demo_trace
from tokendance_jax.demo.model import demo_model
from tokendance_jax.engine.rounds import RoundEngine
from tokendance_jax.model import Model
from tokendance_jax.policy.policies import PolicyOptions
from tokendance_jax.prompt import read_trace

FILE = Path(__file__).with_suffix(".json")
POLICIES = {
    "dense": {},
    "prefix": {},
    "blend": {},
    "blend-batched": {},
    "epic": {},
    "tokendance": {},
    "tokendance none": {"selection": "none"},
    "tokendance deviation": {"selection": "deviation", "head_pages": 1},
    "tokendance query": {"selection": "query", "head_pages": 1},
    "tokendance alone": {"base": "alone"},
    "tokendance joint-agent": {"base": "joint-agent"},
}
# A selection of policies, for a model whose programs are large or where time is short.
FEW = ["dense", "prefix", "blend-batched", "epic", "tokendance"]


def digest(results):
    """Hashes the token ids of all answers."""
    ids = [[list(agent.token_ids) for agent in result.agents] for result in results]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def small(name):
    """The small random model: two rounds, each served twice."""
    engine = small_engine(name.split()[0], PolicyOptions(**POLICIES[name]))
    rounds = (mixed(), gathering(), mixed(), gathering())
    return digest(engine.serve(round_, chat=False) for round_ in rounds)


def demo(name):
    """The demo's model and its three rounds."""
    engine = RoundEngine(
        demo_model("float32"),
        policy=name.split()[0],
        options=PolicyOptions(**POLICIES[name]),
        kv_memory=64 << 20,
    )
    return digest(engine.run(demo_trace(), chat=True))


@functools.cache
def real_model():
    return Model.from_checkpoint(shared_data.real_checkpoint("float32"), "float32")


def real(name):
    """The real model and three rounds of two recorded agents."""
    engine = RoundEngine(
        real_model(),
        policy=name.split()[0],
        options=PolicyOptions(**POLICIES[name], least_saving=None),
        kv_memory=256 << 20,
        row_budget=256,
        max_agents=2,
    )
    trace = read_trace(shared_data.shared_dir() / "traces" / "ga-small.jsonl", "ga-small-a")
    rounds = [
        dataclasses.replace(
            round_,
            agents=tuple(
                dataclasses.replace(agent, max_new_tokens=12) for agent in round_.agents[:2]
            ),
        )
        for round_ in trace.rounds[:3]
    ]
    return digest(engine.serve(round_, chat=False) for round_ in rounds)


def pinned(of, name):
    return json.loads(FILE.read_text(encoding="utf-8"))[of][name]


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("blend-batched", "tokendance")
        else pytest.param(name, marks=pytest.mark.sweep)
        for name in POLICIES
    ],
)
def test_a_small_model_answers_as_before(name):
    assert small(name) == pinned("small", name)


@pytest.mark.sweep
@pytest.mark.parametrize("name", POLICIES)
def test_the_demo_answers_as_before(name):
    assert demo(name) == pinned("demo", name)


@pytest.mark.sweep
@pytest.mark.parametrize("name", FEW)
def test_the_real_model_answers_as_before(name):
    assert real(name) == pinned("real", name)


if __name__ == "__main__":
    cases = ((small, POLICIES), (demo, POLICIES), (real, FEW))
    found = {of.__name__: {name: of(name) for name in names} for of, names in cases}
    FILE.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

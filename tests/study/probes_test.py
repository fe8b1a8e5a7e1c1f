"""Probes of the town: how answers are graded, and what reuse costs the demo's model."""

import math
import random

import numpy as np
import pytest

from tokendance_jax.demo.model import demo_model
from tokendance_jax.demo.town import GRADED, probe_round
from tokendance_jax.engine.rounds import RoundEngine
from tokendance_jax.policy.policies import PolicyOptions
from tokendance_jax.prompt import tokenize_round
from tokendance_jax.study.probes import SETTINGS, Graded, Setting, ask


def graded(draws: int, share: float) -> Graded:
    """Grades ten probes per draw, each answered correctly with probability `share`."""
    rng = random.Random(0)
    found = Graded()
    for seed in range(draws):
        _, probes = probe_round(seed, 10, ["retrieve"])
        answers = [p.answer if rng.random() < share else "I know nothing." for p in probes]
        found.add(probes, answers, 5.0)
    return found


def test_right_answers_are_counted_by_kind():
    found = graded(4, 1.0)
    assert found.accuracy("retrieve") == 1.0
    assert found.interval("retrieve") == (1.0, 1.0)
    assert found.asked("retrieve") == 40
    assert found.token_layers == 20.0
    assert found.asked("repeat") == 0
    assert math.isnan(found.accuracy("repeat"))


@pytest.mark.sweep
def test_intervals_hold_the_accuracy_and_narrow_with_more_draws():
    few, many = graded(8, 0.7), graded(80, 0.7)
    widths = []
    for found in (few, many):
        low, high = found.interval("retrieve")
        assert low < found.accuracy("retrieve") < high
        assert low <= 0.7 <= high
        widths.append(high - low)
    # The width is inversely proportional to the square root of the number of independent draws.
    assert np.isclose(widths[0] / widths[1], 10**0.5, rtol=0.4)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_what_they_say(name):
    setting = SETTINGS[name]
    drawn = setting.draw(0, ["retrieve"], "")
    assert len(drawn) == setting.rounds
    assert drawn == setting.draw(0, ["retrieve"], "")
    for round_, probes in drawn:
        assert len(round_.agents) == len(probes) == setting.agents
        for prompt in round_.agents:
            seen = {s.id for s in prompt.segments if s.kind == "shared"}
            if setting.chunk_words:
                assert seen == {f"chunk/{index}" for index in range(len(seen))}
                continue
            own = f"said/{prompt.agent}" in seen
            if setting.rounds == 1:
                assert own == setting.own
                others = setting.agents - 1
                assert len(seen) - own == max(1, round(setting.keep * others))


@pytest.fixture(scope="module")
def engine_of():
    """Makes engines of the demo's model by policy. All engines share their programs."""
    model, programs = demo_model("float32"), None

    def make(policy, **options):
        nonlocal programs
        engine = RoundEngine(
            model,
            policy=policy,
            options=PolicyOptions(**options, least_saving=None),
            kv_memory=2048 * model.kv_spec(pages=1, page_size=16).page_bytes,
            row_budget=512,  # fewer programs
            max_agents=16,
            programs=programs,
        )
        programs = engine.programs
        return engine

    return make


@pytest.fixture(scope="module")
def answers(engine_of):
    """Grades probes about what others said, in draws of a setting."""

    def grade(setting, *, draws, policy="tokendance", shuffle=False, **options):
        engine = engine_of(policy, **options)
        (found,) = ask(engine, setting, range(draws), kinds=["retrieve"], shuffle=shuffle)
        return found

    return grade


@pytest.mark.slow
def test_reuse_costs_no_retrieval_and_wrong_pages_cost_it_all(answers):
    setting = Setting(16)
    dense = answers(setting, draws=2, policy="dense")
    assert dense.asked("retrieve") == 32
    assert dense.accuracy("retrieve") >= 0.95
    collective = answers(setting, draws=2)
    assert collective.accuracy("retrieve") >= dense.accuracy("retrieve") - 0.02
    assert collective.token_layers < 0.5 * dense.token_layers
    # About one in twenty places that a prompt names is the right one.
    shuffled = answers(setting, draws=1, shuffle=True, selection="none")
    assert shuffled.accuracy("retrieve") < 0.2


@pytest.mark.slow
def test_probes_see_where_a_block_was_computed(answers):
    # Sentences continue from one chunk to the next: what a chunk says may be about a person whom
    # only the chunk before names.
    setting = SETTINGS["chunks"]
    dense = answers(setting, draws=2, policy="dense").accuracy("retrieve")
    assert dense >= 0.95
    assert answers(setting, draws=2).accuracy("retrieve") >= dense - 0.02
    isolated = answers(setting, draws=2, base="isolated", selection="none")
    assert isolated.accuracy("retrieve") < dense - 0.15


def test_chunks_are_the_tokens_of_the_whole_text():
    tokenizer = demo_model("float32").tokenizer
    rounds = [probe_round(4, 6, chunk_words=words)[0] for words in (0, 12)]
    whole, cut = (tokenize_round(round_, tokenizer, chat=True) for round_ in rounds)
    for one, other in zip(whole, cut, strict=True):
        assert np.array_equal(one.token_ids, other.token_ids)
        assert len(other.spans) > len(one.spans)


@pytest.mark.slow
def test_the_demo_model_answers_all_kinds(engine_of):
    (found,) = ask(engine_of("dense"), Setting(16, shuffled=True), range(10))
    for kind in GRADED:
        assert found.accuracy(kind) >= (0.95 if kind == "retrieve" else 0.9), kind

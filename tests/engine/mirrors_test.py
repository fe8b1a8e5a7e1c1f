"""Mirrors of the engine's rounds: read from its pool, and restored into a pool."""

import dataclasses
from typing import Literal

import jax
import numpy as np
import pytest

from tests.engine.rounds import SMALL, gathering, mixed, small_engine, small_programs, tiny
from tokendance_jax.engine import runner as runner_module
from tokendance_jax.engine.rounds import RoundEngine
from tokendance_jax.mirror import MirrorError, decode_dense
from tokendance_jax.paged import OutOfPages
from tokendance_jax.policy.policies import POLICIES, PolicyOptions


def served(round_, policy="tokendance", mirrors: Literal["exact", "int8"] = "int8"):
    engine = small_engine(policy, PolicyOptions(head_pages=1))
    result = engine.serve(round_, chat=False, mirrors=mirrors)
    assert engine.pool.live == 0
    assert result.mirrors is not None
    return engine, result, result.mirrors


def dense_of(mirrors):
    return [decode_dense(mirrors, index, rotate=False) for index in range(len(mirrors.mirrors))]


@pytest.mark.parametrize("policy", POLICIES)
def test_int8_mirrors_of_every_policy_are_near_the_exact_ones(policy):
    # Whichever pages a round shares, copies or continues, their positions are known.
    _, exact, exact_mirrors = served(mixed(), policy, "exact")
    _, int8, int8_mirrors = served(mixed(), policy, "int8")
    assert int8.texts == exact.texts
    assert exact_mirrors.form is None
    assert int8_mirrors.form is not None
    bias = np.abs(int8_mirrors.form.key_bias).max(axis=-1)[:, None, :, None]
    for one, other in zip(dense_of(int8_mirrors), dense_of(exact_mirrors), strict=True):
        # A key without its rotation and bias has numbers of at most this size. A rotated number
        # combines two of them, each rounded by up to half a step.
        for found, held, shift in zip(one, other, (bias, 0), strict=True):
            largest = np.linalg.norm(held, axis=-1, keepdims=True) + shift
            assert (np.abs(found - held) <= largest / 127).all()
            assert (found != held).any()
    for result, mirrors in ((exact, exact_mirrors), (int8, int8_mirrors)):
        assert result.ledger.kv_bytes_rest == mirrors.nbytes
        own = sum(agent.ledger.kv_bytes_mirror or 0 for agent in result.agents)
        base = sum(x.nbytes for x in jax.tree.leaves((mirrors.base, mirrors.form)))
        assert own == mirrors.nbytes - base
    assert int8.ledger.kv_bytes_dense == exact.ledger.kv_bytes_dense


def test_bytes_at_rest_are_counted_where_they_are_asked_for():
    _, _, mirrors = served(gathering(), mirrors="exact")
    engine = small_engine("tokendance", PolicyOptions(head_pages=1))
    plain = engine.serve(gathering(), chat=False)
    assert plain.ledger.kv_bytes_rest is None
    assert all(agent.ledger.kv_bytes_mirror is None for agent in plain.agents)
    # A new engine, which has nothing of an earlier round in its cache.
    engine = small_engine("tokendance", PolicyOptions(head_pages=1))
    counted = engine.serve(gathering(), chat=False, at_rest=True)
    assert counted.mirrors is None
    assert counted.ledger.kv_bytes_rest == mirrors.nbytes
    assert counted.timings.mirror_s > 0
    assert counted.texts == plain.texts


@pytest.mark.parametrize("form", ["exact", "int8"])
def test_restored_pages_are_the_mirrors_and_are_given_back(form):
    round_ = gathering()
    _, _, mirrors = served(round_, mirrors=form)
    engine = small_engine("tokendance", PolicyOptions(head_pages=1))
    lanes = engine.restore(mirrors)
    layers, _, size, *head = engine.runner.kv.k.shape
    for lane, dense in zip(lanes, dense_of(mirrors), strict=True):
        slot, _ = lane.locate(np.arange(lane.slots.sum(), dtype=np.int32), size)
        for pool, expected in zip((engine.runner.kv.k, engine.runner.kv.v), dense, strict=True):
            found = np.asarray(pool).reshape(layers, -1, *head)[:, slot]
            assert found.tobytes() == expected.tobytes()
    pages = [m.private.count + m.patch.count for m in mirrors.mirrors]
    assert engine.pool.live == mirrors.base.count + sum(pages)
    # The engine can serve a round while the lanes hold these pages.
    assert engine.serve(round_, chat=False).texts == served(round_)[1].texts
    for lane in lanes:
        engine.pool.release(lane.page)
    assert engine.pool.live == 0
    engine.pool.check()


@pytest.mark.parametrize("form", ["exact", "int8"])
def test_mirrors_are_restored_by_the_weights_that_computed_them_alone(form):
    engine, _, mirrors = served(gathering(), mirrors=form)
    trained = jax.tree.map(lambda x: 1.5 * x, tiny().state)
    other = RoundEngine(dataclasses.replace(tiny(), state=trained), **SMALL)
    with pytest.raises(MirrorError, match=r"mirrors: identity: .* model: weights \w+\.\.\. and "):
        other.restore(mirrors)
    assert other.pool.live == 0
    config = dataclasses.replace(tiny().config, rms_norm_eps=1e-5)
    other = RoundEngine(dataclasses.replace(tiny(), config=config), **SMALL)
    with pytest.raises(MirrorError, match="model: norm_eps 1e-06 and not 1e-05; restore"):
        other.restore(mirrors)
    # Other arrays with the same numbers are the same model.
    again = dataclasses.replace(tiny(), state=jax.tree.map(lambda x: 1.0 * x, tiny().state))
    for lane in RoundEngine(again, **SMALL).restore(mirrors):
        assert lane.slots.sum() > 0
    for lane in engine.restore(mirrors):
        engine.pool.release(lane.page)


def test_programs_of_another_model_are_refused():
    trained = dataclasses.replace(tiny(), state=jax.tree.map(lambda x: 1.5 * x, tiny().state))
    with pytest.raises(ValueError, match="programs: they serve another model; leave the arg"):
        RoundEngine(trained, programs=small_programs(), **SMALL)


def test_unknown_mirrors_are_refused():
    engine = RoundEngine(tiny(), programs=small_programs(), **SMALL)
    with pytest.raises(ValueError, match="mirrors: 'int4' is unknown; choose exact or int8"):
        engine._mirror_form("int4")


def test_an_engine_that_cannot_restore_serves_on(monkeypatch):
    round_ = gathering()
    engine, expected, mirrors = served(round_)
    held = engine.pool.allocate(engine.pool.total - 4)
    with pytest.raises(OutOfPages):
        engine.restore(mirrors)
    engine.pool.release(held)
    other = jax.tree.map(lambda x: x[:1] if x.ndim > 2 else x, mirrors)
    with pytest.raises(MirrorError, match="kv: k: is"):
        engine.restore(other)
    assert engine.pool.live == 0

    def interrupted(mirrors, kv, pool, **_):
        pool.allocate(1)
        kv.k.delete()
        raise KeyboardInterrupt

    monkeypatch.setattr(runner_module, "decode_pages", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.restore(mirrors)
    assert engine.pool.live == 0
    assert engine.serve(round_, chat=False).texts == expected.texts

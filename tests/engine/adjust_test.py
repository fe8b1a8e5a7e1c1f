"""Biases, penalties, masks and log-probabilities against loops over tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokendance_jax.engine.adjust import (
    LaneAdjustment,
    adjust,
    adjustments,
    check_logit_bias,
    choose,
    expand,
)
from tokendance_jax.engine.sampling import (
    NOT_FINITE,
    LaneSampling,
    agent_key,
    sample,
    sampling_arrays,
)
from tokendance_jax.prompt.round import MAX_LOGPROBS, Sampling

LANES, VOCAB, STEPS = 4, 12, 3
TOKENS = st.integers(0, VOCAB - 1)
PROMPT = np.array([1, 1, 5], np.int32)
# All numbers are multiples or powers of a half, so float32 adjusts logits without rounding.
BIASES = st.dictionaries(TOKENS, st.sampled_from([-100, -1, 0.5, 2, 100]), max_size=4)
SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.0, 0.5, 1.0, 4.0]),
        "top_k": st.sampled_from([0, 0, 1, 3]),
        "top_p": st.sampled_from([1.0, 1.0, 0.7]),
        "min_p": st.sampled_from([0.0, 0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1, 2.0, 0.5]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 0.5, -1, 2]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.25, -0.5]),
        "logit_bias": BIASES.map(lambda biases: tuple(biases.items())),
        "logprobs": st.none() | st.integers(0, MAX_LOGPROBS),
    }
)
LANE = st.tuples(
    SETTINGS,
    st.lists(TOKENS, max_size=5),
    st.lists(TOKENS, max_size=4),
    st.none() | st.lists(st.booleans(), min_size=VOCAB, max_size=VOCAB).filter(any),
)
ALL = st.lists(LANE, min_size=LANES, max_size=LANES)
SEEDS = st.integers(0, 2**32 - 1)
LIVE = st.lists(st.booleans(), min_size=LANES, max_size=LANES)


@jax.jit
def run(logits, sampling, generated, live, adjustments):
    """Chooses tokens in steps, each from logits of its own, and returns the adjusted logits too."""
    expanded, steps = expand(adjustments, logits.shape[-1]), []
    for step in range(logits.shape[0]):
        assert expanded is not None
        adjusted = adjust(logits[step].T, expanded).T
        tokens, expanded, logprobs = choose(
            logits[step], sampling, generated + step, live, expanded
        )
        steps.append((adjusted, tokens, logprobs))
    return steps


def made(drawn):
    """Makes the lanes that a test has drawn."""
    return [
        LaneAdjustment(
            Sampling(**fields),
            np.array(prompt, np.int32),
            answer,
            None if allowed is None else np.array(allowed, np.bool_),
        )
        for fields, prompt, answer, allowed in drawn
    ]


def random_logits(seed):
    numbers = np.random.default_rng(seed).integers(-6, 7, (STEPS, LANES, VOCAB))
    return numbers.astype(np.float32) / 2


draw = jax.jit(sample)


def arrays_of(lanes):
    """The settings for `sample`; the stream of a lane does not depend on the other lanes."""
    own = [
        LaneSampling(lane.sampling, agent_key(len(lane.answer), lane.sampling.top_k, "a"), 100)
        for lane in lanes
    ]
    return sampling_arrays(len(lanes), own)


def run_lanes(logits, lanes, live=None):
    """Runs `run` with host arrays, and returns NumPy arrays."""
    live = np.ones(len(lanes), np.bool_) if live is None else np.array(live, np.bool_)
    generated = np.array([len(lane.answer) for lane in lanes], np.int32)
    host = adjustments(len(lanes), logits.shape[-1], lanes)
    return jax.device_get(run(logits, arrays_of(lanes), generated, live, host))


def expected(logits, lane, answer):
    """One lane's adjusted logits in float64."""
    sampling, x = lane.sampling, np.array(logits, np.float64)
    for token, bias in sampling.logit_bias:
        x[token] += bias
    for token in {*lane.prompt.tolist(), *answer}:
        penalty = sampling.repetition_penalty
        x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    for token in answer:
        x[token] -= sampling.frequency_penalty
    for token in set(answer):
        x[token] -= sampling.presence_penalty
    return x if lane.allowed is None else np.where(lane.allowed, x, -np.inf)


@given(ALL, SEEDS, LIVE)
@settings(max_examples=25)
def test_tokens_come_from_adjusted_logits_and_count_in_the_steps_behind(drawn, seed, live):
    lanes, logits = made(drawn), random_logits(seed)
    answers = [list(lane.answer) for lane in lanes]
    steps = run_lanes(logits, lanes, live)
    for step, (adjusted, tokens, _) in enumerate(steps):
        wanted = np.stack(list(map(expected, logits[step], lanes, answers)))
        np.testing.assert_array_equal(adjusted, wanted)
        # `sample` refuses infinite logits. Such small ones have the probability 0 too.
        finite = np.maximum(wanted, -1e30).astype(np.float32)
        generated = np.array([len(lane.answer) + step for lane in lanes], np.int32)
        chosen = np.asarray(draw(finite, arrays_of(lanes), generated))
        np.testing.assert_array_equal(tokens, np.where(live, chosen, -1))
        for lane, answer, token in zip(lanes, answers, tokens.tolist(), strict=True):
            assert token < 0 or lane.allowed is None or lane.allowed[token]
            answer += [token] * (token >= 0)


@given(ALL, SEEDS, LIVE)
def test_log_probabilities_are_those_of_the_model(drawn, seed, live):
    lanes, logits = made(drawn), random_logits(seed)
    for step, (_, tokens, found) in enumerate(run_lanes(logits, lanes, live)):
        x = logits[step].astype(np.float64)
        logprobs = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
        for lane, own in enumerate(lanes):
            best = own.sampling.logprobs if live[lane] else None
            if best is None:
                assert found.chosen[lane] == -np.inf
            else:
                wanted = logprobs[lane, tokens[lane]]
                np.testing.assert_allclose(found.chosen[lane], wanted, rtol=0, atol=1e-5)
            best = min(best or 0, VOCAB)
            order = np.argsort(-x[lane], kind="stable")[:best]
            assert found.ids[lane, :best].tolist() == order.tolist()
            np.testing.assert_allclose(
                found.values[lane, :best], logprobs[lane, order], rtol=0, atol=1e-5
            )
            assert (found.ids[lane, best:] == -1).all()
            assert (found.values[lane, best:] == -np.inf).all()


@given(ALL, SEEDS)
@settings(max_examples=20)
def test_a_lane_does_not_depend_on_the_others(drawn, seed):
    lanes, logits = made(drawn), random_logits(seed)
    together = run_lanes(logits, lanes)
    order = [2, 0, 3, 1]
    moved = run_lanes(logits[:, order], [lanes[lane] for lane in order])
    jax.tree.map(
        lambda one, other: np.testing.assert_array_equal(one[order], other), together, moved
    )
    alone = run_lanes(logits[:, :1], lanes[:1])
    for (_, one, own), (_, other, others) in zip(together, alone, strict=True):
        assert one[0] == other[0]
        assert own.ids[0].tolist() == others.ids[0].tolist()
        np.testing.assert_allclose(own.values[0], others.values[0], rtol=0, atol=1e-5)


@given(ALL, SEEDS)
@settings(max_examples=20)
def test_neutral_adjustments_change_no_token(drawn, seed):
    fields = ("temperature", "top_k", "top_p", "min_p")
    logits = random_logits(seed)
    lanes = [
        LaneAdjustment(Sampling(**{name: own[name] for name in fields}), PROMPT)
        for own, *_ in drawn
    ]
    assert all(lane.neutral for lane in lanes)
    for step, (adjusted, tokens, _) in enumerate(run_lanes(logits, lanes)):
        np.testing.assert_array_equal(adjusted, logits[step])
        generated = np.full(LANES, step, np.int32)
        np.testing.assert_array_equal(tokens, draw(logits[step], arrays_of(lanes), generated))


@given(ALL)
def test_tables_hold_what_loops_over_tokens_find(drawn):
    lanes = made(drawn)
    host = adjustments(LANES + 1, VOCAB, [*lanes])
    for index, lane in enumerate(lanes):
        sampling, found = lane.sampling, {}
        biases = dict(sampling.logit_bias)
        for token in range(VOCAB):
            count = list(lane.answer).count(token) if sampling.penalises else 0
            repeated = sampling.repetition_penalty != 1 and token in lane.prompt.tolist()
            if count or repeated or token in biases:
                found[token] = (count, count > 0 or repeated, float(biases.get(token, 0)))
        own = host.token[index].tolist()
        assert own == [*found, *[VOCAB] * (VOCAB - len(found))]
        columns = (host.count[index], host.seen[index], host.bias[index])
        values = list(zip(*(column.tolist() for column in columns), strict=True))
        assert values == [*found.values(), *[(0, False, 0.0)] * (VOCAB - len(found))]
        bits = [int(host.allowed[index, 0]) >> token & 1 for token in range(VOCAB)]
        assert bits == ([1] * VOCAB if lane.allowed is None else lane.allowed.astype(int).tolist())
    assert (host.token[LANES] == VOCAB).all()
    assert host.allowed[LANES].tolist() == [2**32 - 1]
    numbers = (host.repetition, host.presence, host.frequency, host.best)
    assert [column[LANES] for column in numbers] == [1, 0, 0, -1]


@pytest.mark.parametrize(
    ("distinct", "size"), [(0, 64), (64, 64), (65, 256), (257, 1000), (1000, 1000)]
)
def test_tables_have_few_sizes(distinct, size):
    prompt = np.repeat(np.arange(distinct, dtype=np.int32), 3)
    host = adjustments(2, 1000, [LaneAdjustment(Sampling(repetition_penalty=1.5), prompt)])
    assert host.token.shape == (2, size)
    assert host.token[0, :distinct].tolist() == list(range(distinct))
    assert host.allowed.shape == (2, 32)
    # Without this penalty, the prompt does not count.
    host = adjustments(2, 1000, [LaneAdjustment(Sampling(presence_penalty=1), prompt)])
    assert host.token.shape == (2, 64)


def test_the_models_logits_must_be_finite_and_adjusted_ones_need_not():
    only = np.arange(VOCAB) == 7
    lane = LaneAdjustment(Sampling(temperature=1, logprobs=2), PROMPT, allowed=only)
    logits = np.zeros((STEPS, LANES, VOCAB), np.float32)
    # The mask hides only one of the numbers.
    logits[:, 1, 3], logits[:, 2, 7], logits[:, 3, 0] = np.nan, np.inf, -np.inf
    for _, tokens, logprobs in run_lanes(logits, [lane] * LANES):
        assert tokens.tolist() == [7, NOT_FINITE, NOT_FINITE, NOT_FINITE]
        assert (logprobs.ids[1:] == -1).all()
        np.testing.assert_allclose(logprobs.chosen[0], -np.log(VOCAB), rtol=1e-6)


@pytest.mark.parametrize("penalty", [1e-60, 3e38])
def test_extreme_penalties_choose_a_token(penalty):
    sampling = Sampling(temperature=1, repetition_penalty=penalty, logit_bias=((3, 100),))
    logits = np.tile(np.array([1, -1, 0] * 4, np.float32), (STEPS, LANES, 1))
    for lane in (
        LaneAdjustment(sampling, np.arange(VOCAB, dtype=np.int32)),
        LaneAdjustment(sampling, PROMPT, allowed=np.arange(VOCAB) == 5),
    ):
        for adjusted, tokens, _ in run_lanes(logits, [lane] * LANES):
            allowed = slice(None) if lane.allowed is None else lane.allowed
            assert np.isfinite(adjusted[:, allowed]).all()
            assert lane.allowed is None or (tokens == 5).all()


def test_bad_adjustments_are_refused():
    def refused(match, **fields):
        lane = dataclasses.replace(LaneAdjustment(Sampling(), PROMPT), **fields)
        with pytest.raises(ValueError, match=match):
            adjustments(1, VOCAB, [lane])

    refused("the mask allows no token", allowed=np.zeros(VOCAB, np.bool_))
    refused(r"the shape is \(11,\); give one bool for each of 12", allowed=np.ones(11, np.bool_))
    bias = Sampling(logit_bias=((3, 1.0), (12, 1.0)))
    refused("logit_bias: token 12 is not one of the model's 12 tokens", sampling=bias)
    with pytest.raises(ValueError, match="logit_bias: token 12"):
        check_logit_bias(bias, VOCAB)
    check_logit_bias(bias, VOCAB + 1)


def test_words_of_a_mask_reach_their_tokens():
    """In a vocabulary that is no multiple of a word."""
    vocab = 70
    for place in (0, 31, 32, 69):
        lane = LaneAdjustment(Sampling(), PROMPT, allowed=np.arange(vocab) == place)
        expanded = spread(adjustments(1, vocab, [lane]), vocab)
        np.testing.assert_array_equal(np.asarray(expanded.allowed)[:, 0], np.arange(vocab) == place)
        assert expanded.count.shape == (vocab, 1)
        assert expanded.count.dtype == jnp.int32


spread = jax.jit(expand, static_argnums=1)

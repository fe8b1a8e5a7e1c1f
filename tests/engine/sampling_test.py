import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tokendance_jax.engine.sampling import (
    MAX_STOP_IDS,
    NOT_FINITE,
    LaneSampling,
    SamplingArrays,
    agent_key,
    is_stop,
    sample,
    sampling_arrays,
    stop_ids_of,
)
from tokendance_jax.prompt.round import Sampling

LANES, VOCAB, DRAWS = 4, 12, 4096
KEY = agent_key(0, 0, "a")
SEEDS = st.integers(0, 2**32 - 1)
# Halved integers: many ties and zeros, and probabilities that do not depend on the order.
LOGITS = st.lists(st.integers(-12, 12).map(lambda n: n / 2), min_size=VOCAB, max_size=VOCAB)
TOP_K = st.sampled_from([0, 1, 2, 3, 5, VOCAB - 1, VOCAB, VOCAB + 1, 2**31 - 1])
MIN_P = st.sampled_from([0.0, 0.0, 1.0, 0.5, 1e-3, 1e-60])
TOP_P = st.sampled_from([1.0, 0.999999, 1e-3, 1e-30, 1e-60]) | st.floats(0.05, 0.99)

run = jax.jit(sample)
draw_many = jax.jit(jax.vmap(sample, in_axes=(None, None, 0)))


def settings_of(lanes=LANES, *, temperature=1.0, seed=0, **fields):
    """Lanes with the same settings, each with a stream of its own."""
    sampling = Sampling(temperature=temperature, **fields)
    keys = [agent_key(seed, 0, f"agent {lane}") for lane in range(lanes)]
    return sampling_arrays(lanes, [LaneSampling(sampling, key, 100) for key in keys])


def draws(logits, sampling):
    """i32 [DRAWS, lanes]: one draw per step of each lane's stream."""
    steps = np.repeat(np.arange(DRAWS, dtype=np.int32)[:, None], len(logits), axis=1)
    return np.asarray(draw_many(np.asarray(logits, np.float32), sampling, steps))


def softmax(logits):
    weights = np.exp(logits - np.max(logits))
    return weights / weights.sum()


def support(logits, top_k, top_p, min_p=0.0):
    """Finds the tokens that may be drawn, by sorting. Ties at the cutoff are kept.

    Returns:
      bool [VOCAB], and the least distance of `top_p` to the mass of a set of the best tokens, or of
      `min_p` to a token's share. At a distance of zero, rounding decides.
    """
    distance = 1.0
    logits = np.asarray(logits, np.float64)
    share = np.exp(logits - logits.max())
    kept = share >= min_p
    if 0 < min_p < 1:
        distance = np.abs(share - min_p).min()
    if 0 < top_k < VOCAB:
        kept &= logits >= np.sort(logits)[-top_k]
    if top_p < 1:
        probability = softmax(np.where(kept, logits, -np.inf))
        order = np.argsort(-logits, kind="stable")
        mass = np.cumsum(probability[order])
        distance = min(distance, np.abs(mass - top_p).min())
        enough = mass >= top_p
        edge = logits[order[np.argmax(enough)]] if enough.any() else -np.inf
        kept &= logits >= edge
    return kept, distance


def random_logits(seed, lanes=LANES, vocab=VOCAB):
    return (3 * np.random.default_rng(seed).standard_normal((lanes, vocab))).astype(np.float32)


@given(SEEDS)
@settings(max_examples=20)
def test_temperature_zero_is_argmax(seed):
    logits = random_logits(seed)
    chosen = run(logits, settings_of(temperature=0.0, seed=seed), np.zeros(LANES, np.int32))
    assert chosen.dtype == jnp.int32
    np.testing.assert_array_equal(chosen, logits.argmax(axis=1))


@pytest.mark.parametrize("vocab", [1, 127, 128, 129, 700, 1024])
@pytest.mark.parametrize("values", [2, 1000])  # with few values, the largest occurs many times
def test_greedy_takes_the_first_of_the_largest_of_any_number_of_logits(vocab, values):
    draw = np.random.default_rng(vocab)
    logits = draw.integers(-values, 0, (LANES, vocab)).astype(np.float32)
    logits[0] = logits[0, 0]
    chosen = run(logits, settings_of(temperature=0.0), np.zeros(LANES, np.int32))
    np.testing.assert_array_equal(chosen, logits.argmax(axis=1))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 77, 129])  # in two blocks of 128, the second padded
def test_logits_that_are_not_finite_give_no_token(number, place):
    logits = random_logits(0, vocab=130)
    logits[1, place] = number
    steps = np.zeros(LANES, np.int32)
    for sampling in (
        settings_of(temperature=0.0),
        # Sampling sets excluded tokens to -inf, which must not count as bad logits.
        settings_of(top_k=1),
        settings_of(top_p=1e-9),
    ):
        chosen = np.asarray(run(logits, sampling, steps))
        assert chosen[1] == NOT_FINITE
        np.testing.assert_array_equal(np.delete(chosen, 1), np.delete(logits, 1, 0).argmax(axis=1))


# top_p keeps two of the top three tokens, but would keep three of all tokens.
@example([3, 2.5, 2, 1.5, 1, 0.5, 0, 0, 0, 0, 0, 0], 3, 0.6, 0.0)
# top_p keeps one of the two tokens that min_p leaves, but would keep three of all tokens.
@example([3, 2.5, 2, 1.5, 1, 0.5, 0, 0, 0, 0, 0, 0], 0, 0.6, 0.5)
@given(LOGITS, TOP_K, TOP_P, MIN_P)
@settings(max_examples=25)
def test_draws_come_from_min_p_then_top_k_then_top_p(logits, top_k, top_p, min_p):
    kept, distance = support(logits, top_k, top_p, min_p)
    assume(distance > 1e-6)
    drawn = draws([logits] * LANES, settings_of(top_k=top_k, top_p=top_p, min_p=min_p))
    seen = np.isin(np.arange(VOCAB), drawn)
    assert not (seen & ~kept).any()
    probability = softmax(np.where(kept, logits, -np.inf))
    # A token expected 30 times in all draws is missing with probability e**-30.
    assert seen[probability * drawn.size > 30].all()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.7, 0, 1.0, 0.0),
        (3.0, 0, 1.0, 0.2),
        (1.0, 5, 1.0, 0.0),
        (1.0, 0, 0.8, 0.0),
        (2.0, 6, 0.9, 0.1),
    ],
)
def test_frequencies_are_the_softmax(temperature, top_k, top_p, min_p):
    logits = random_logits(1, lanes=1)[0] / 2
    kept, distance = support(logits / temperature, top_k, top_p, min_p)
    assert distance > 1e-3
    probability = softmax(np.where(kept, logits / temperature, -np.inf))
    sampling = settings_of(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    drawn = draws([logits] * LANES, sampling)
    count = np.bincount(drawn.ravel(), minlength=VOCAB)
    assert not count[~kept].any()
    expected = probability[kept] * drawn.size
    freedom = kept.sum() - 1
    # Chi-square has mean `freedom` and variance 2 `freedom`: allow six standard deviations.
    assert np.sum((count[kept] - expected) ** 2 / expected) < freedom + 6 * np.sqrt(2 * freedom)


def test_steps_of_a_stream_are_independent():
    drawn = draws(np.zeros((LANES, VOCAB)), settings_of())
    pairs = np.bincount((drawn[:-1] * VOCAB + drawn[1:]).ravel(), minlength=VOCAB**2)
    expected, freedom = pairs.sum() / VOCAB**2, VOCAB**2 - 1
    assert np.sum((pairs - expected) ** 2 / expected) < freedom + 6 * np.sqrt(2 * freedom)


@given(SEEDS, st.permutations(range(LANES)), st.data())
@settings(max_examples=30)
def test_a_draw_depends_on_its_own_lane_alone(seed, order, data):
    random = np.random.default_rng(seed)
    temperature = st.sampled_from([0.0, 0.5, 1.0])

    def column(strategy, dtype):
        return np.array(data.draw(st.lists(strategy, min_size=LANES, max_size=LANES)), dtype)

    sampling = dataclasses.replace(
        settings_of(seed=seed),
        temperature=column(temperature, np.float32),
        top_k=column(TOP_K, np.int32),
        top_p=column(TOP_P, np.float32),
        min_p=column(MIN_P, np.float32),
    )
    logits, step = random_logits(seed), random.integers(0, 99, LANES).astype(np.int32)
    together = np.asarray(run(logits, sampling, step))
    # Other seats.
    order = np.array(order)
    moved = jax.tree.map(lambda field: np.asarray(field)[order], sampling)
    np.testing.assert_array_equal(run(logits[order], moved, step[order]), together[order])
    # Other neighbours, and a bucket of another size.
    for lane in range(LANES):
        alone = jax.tree.map(lambda field, lane=lane: np.asarray(field)[[lane]], sampling)
        assert int(run(logits[[lane]], alone, step[[lane]])[0]) == together[lane]


def test_greedy_lanes_stay_greedy_beside_others():
    sampling = dataclasses.replace(
        settings_of(), temperature=np.array([0, 1, 0, 5], np.float32), top_k=np.full(4, 3, np.int32)
    )
    logits = random_logits(0)
    drawn = draws(logits, sampling)
    assert (drawn[:, [0, 2]] == logits.argmax(axis=1)[[0, 2]]).all()
    assert len(set(drawn[:, 1].tolist())) == len(set(drawn[:, 3].tolist())) == 3


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-37, 1e-40])
def test_a_tiny_temperature_is_greedy(temperature):
    # logits / temperature overflows, which must not make all large logits equal.
    logits = np.tile(np.array([50, 300, 290, 310, -2, 0, 0, 0, 0, 0, 0, 0], np.float32), (LANES, 1))
    for top_k, top_p in ((0, 1.0), (3, 0.9)):
        sampling = settings_of(temperature=temperature, top_k=top_k, top_p=top_p)
        assert (np.asarray(run(logits, sampling, np.zeros(LANES, np.int32))) == 3).all()


def test_agents_rounds_and_seeds_have_streams_of_their_own():
    names = [(0, 0, "a"), (0, 0, "b"), (0, 1, "a"), (1, 0, "a")]
    keys = [agent_key(*name) for name in names]
    assert len({key.tobytes() for key in keys}) == len(names)
    assert agent_key(0, 0, "a").tobytes() == keys[0].tobytes()
    sampling = sampling_arrays(
        len(names), [LaneSampling(Sampling(temperature=1.0), key, 0) for key in keys]
    )
    drawn = draws(np.zeros((len(names), VOCAB)), sampling)
    for a in range(len(names)):
        for b in range(a):
            # Independent streams agree in one of VOCAB draws.
            assert abs(np.mean(drawn[:, a] == drawn[:, b]) - 1 / VOCAB) < 0.03


def test_sampling_arrays_fill_up_with_neutral_lanes():
    keys = [agent_key(3, 0, "a"), agent_key(3, 0, "b")]
    one = Sampling(temperature=0.5, top_k=7, top_p=0.25, min_p=0.125)
    other = Sampling(temperature=2, top_k=1)
    settings = [LaneSampling(one, keys[0], 5, (11, 3)), LaneSampling(other, keys[1], 6, (9,))]
    arrays = sampling_arrays(4, settings)
    assert isinstance(arrays, SamplingArrays)
    np.testing.assert_array_equal(arrays.key[:2], keys)
    assert arrays.limit.tolist() == [5, 6, 0, 0]
    assert arrays.stop_ids.shape == (4, MAX_STOP_IDS)
    assert arrays.stop_ids[:, :2].tolist() == [[11, 3], [9, -1], [-1, -1], [-1, -1]]
    assert (arrays.stop_ids[:, 2:] == -1).all()
    assert arrays.temperature.tolist() == [0.5, 2, 0, 0]
    assert arrays.top_k.tolist() == [7, 1, 0, 0]
    assert arrays.top_p.tolist() == [0.25, 1, 1, 1]
    assert arrays.min_p.tolist() == [0.125, 0, 0, 0]


def test_is_stop():
    arrays = dataclasses.replace(settings_of(), stop_ids=np.array([[3, 5]] * LANES, np.int32))
    assert is_stop(jnp.array([3, 4, 5, 0], jnp.int32), arrays).tolist() == [
        True,
        False,
        True,
        False,
    ]


def test_which_tokens_end_an_answer():
    assert stop_ids_of(Sampling(stop_token_ids=(3,)), [1, 2]) == (1, 2, 3)
    assert stop_ids_of(Sampling(stop_token_ids=(3,), ignore_eos=True), [1, 2]) == (3,)


def test_too_many_stop_tokens_are_refused():
    def arrays(count):
        return sampling_arrays(1, [LaneSampling(Sampling(), KEY, 1, tuple(range(count)))])

    assert arrays(MAX_STOP_IDS).stop_ids[0].tolist() == list(range(MAX_STOP_IDS))
    with pytest.raises(ValueError, match="stop_token_ids: 17 given, at most 16"):
        arrays(MAX_STOP_IDS + 1)

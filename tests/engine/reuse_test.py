"""Invariants of the policies that reuse shared text, tested with a model."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.rounds import SMALL, block, gathering, member, mixed, small_engine, tiny, words
from tokendance_jax.engine.rounds import RoundEngine
from tokendance_jax.policy.collective import BASES
from tokendance_jax.policy.policies import PolicyOptions
from tokendance_jax.policy.selection import SELECTIONS
from tokendance_jax.prompt import Round
from tokendance_jax.prompt.tokenized import tokenize_round
from tokendance_jax.study import scoring
from tokendance_jax.study.audit import shuffle_bases

PAIRS = [
    (base, selection)
    for base, selection in itertools.product(BASES, SELECTIONS)
    if base != "joint-agent" or SELECTIONS[selection].look is None
]
PAIRS_AND_RIVALS = [
    *(("tokendance", {"base": base, "selection": selection}) for base, selection in PAIRS),
    *((rival, {}) for rival in ("blend", "blend-batched", "epic")),
]


@pytest.fixture
def make():
    """Makes engines whose pools are full of NaN, and checks that they lose no page."""
    made = []

    def make(policy="tokendance", **options):
        engine = small_engine(policy, PolicyOptions(**options))
        made.append(engine)
        return engine

    yield make
    for engine in made:
        assert engine.pool.live == 0
        engine.pool.check()


def score(engine, round_):
    """Returns logits at the end of a round's prompts and of some tokens behind, and the cost."""
    prompts = tokenize_round(round_, engine.model.tokenizer, chat=False)
    answers = [np.array(words(3, seed=seat), np.int32) for seat in range(len(prompts))]
    logits, cost = scoring.score(engine, prompts, answers)
    return dict(zip([p.agent for p in prompts], logits, strict=True)), cost


def distance(some, other):
    return max(float(np.abs(some[agent] - other[agent]).max()) for agent in some)


@pytest.fixture(scope="module")
def dense():
    """Logits of `mixed` with nothing shared."""
    return score(small_engine("dense", PolicyOptions()), mixed())[0]


EVERYTHING = [
    *(("tokendance", {"base": base, "selection": "all"}) for base in BASES),
    ("tokendance", {"selection": "deviation", "head_pages": 99}),
    ("tokendance", {"selection": "query", "head_pages": 99}),
    ("tokendance", {"selection": "head", "head_pages": 99}),
    ("blend", {"blend_ratio": 1.0}),
    ("blend-batched", {"blend_ratio": 1.0}),
    ("epic", {"epic_tokens": 999}),
]


@pytest.mark.parametrize(("policy", "options"), EVERYTHING, ids=str)
def test_recomputing_everything_equals_dense(make, dense, policy, options):
    engine = make(policy, **options)
    for _ in range(2):  # the cache that the first round leaves behind changes nothing
        assert distance(score(engine, mixed())[0], dense) < 1e-3


def seen_scores(engine, round_):
    """Returns the scores by which a round's pages are chosen."""
    found = []
    pick = engine._policy._selection.pick_scored

    def watch(runs, scores):
        found.extend(scores)
        return pick(runs, scores)

    engine._policy._selection.pick_scored = watch
    score(engine, round_)
    engine._policy._selection.pick_scored = pick
    return found


@pytest.mark.parametrize("selection", ["deviation", "query"])
def test_a_look_sees_nothing_but_the_round(make, selection):
    poisoned, clean = (make(selection=selection) for _ in range(2))
    clean.runner.kv = jax.tree.map(jnp.zeros_like, clean.runner.kv)
    for one, other in zip(seen_scores(poisoned, mixed()), seen_scores(clean, mixed()), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_array_equal(one, other)
        assert (one > 0).all()


def ids(result):
    return {a.agent: a.token_ids for a in result.agents}


def serve(engine, round_):
    return ids(engine.serve(round_, chat=False))


def only(round_, names):
    return dataclasses.replace(round_, agents=tuple(a for a in round_.agents if a.agent in names))


def opened_rounds(engine):
    """Returns a list to which the engine adds every round that it opens from now on."""
    opened, open_round = [], engine._policy.open

    def watch(*arguments, **options):
        opened.append(open_round(*arguments, **options))
        return opened[-1]

    engine._policy.open = watch
    return opened


@pytest.mark.parametrize(("policy", "options"), PAIRS_AND_RIVALS, ids=str)
def test_the_same_round_again_and_in_another_order_gives_the_same_tokens(make, policy, options):
    engine = make(policy, **options)
    first = serve(engine, mixed())
    assert serve(engine, mixed()) == first
    turned = dataclasses.replace(mixed(), agents=mixed().agents[::-1])
    assert serve(make(policy, **options), turned) == first
    assert serve(engine, turned) == first
    assert len(set(first.values())) > 2


def test_blend_batched_gives_the_tokens_of_blend(make):
    assert serve(make("blend"), mixed()) == serve(make("blend-batched"), mixed())


@pytest.mark.parametrize("tokens", [16, 96])
def test_one_block_at_the_beginning_equals_the_prefix_cache_to_the_bit(make, tokens):
    # No private text, one segment, and nothing is recomputed. The segment fills whole pages, since
    # the prefix cache finds no others: both policies then compute the same rows in the same calls.
    round_ = Round(tuple(member(name, block("x", tokens), private=0) for name in "abc"))
    prefix, collective = make("prefix"), make(selection="none")
    for _ in range(2):
        expected, _ = score(prefix, round_)
        found, _ = score(collective, round_)
        for agent, logits in expected.items():
            np.testing.assert_array_equal(found[agent], logits)


@pytest.mark.parametrize(
    ("base", "selection"), [(b, s) for b, s in PAIRS if s != "none"], ids="-".join
)
def test_patches_equal_their_bases_at_layer_0_to_the_bit(make, base, selection):
    # At layer 0, K and V depend on the token alone.
    engine = make(base=base, selection=selection)
    opened = opened_rounds(engine)
    score(engine, mixed())
    pools, size, patches = (engine.runner.kv.k, engine.runner.kv.v), engine.shapes.page_size, 0
    for lane in opened[0].lanes:
        position = np.flatnonzero(
            np.repeat((lane.base != 0) & (lane.page != lane.base), lane.slots)
        ).astype(np.int32)
        replaced = dataclasses.replace(lane, page=lane.base)
        for pool in map(np.asarray, pools):
            layers = pool.reshape(pool.shape[0], -1, *pool.shape[3:])
            one, other = (layers[:, plan.locate(position, size)[0]] for plan in (lane, replaced))
            assert np.isfinite(one).all()
            np.testing.assert_array_equal(one[0], other[0])
            patches += len(position)
            if base == "isolated" and len(position):
                assert (one[1:] != other[1:]).any()
    assert patches


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("tokendance", {}),
        ("tokendance", {"base": "alone", "selection": "query"}),
        ("tokendance", {"base": "isolated", "selection": "deviation"}),
        ("tokendance", {"base": "joint-agent", "selection": "own"}),
        ("blend", {}),
        ("blend-batched", {}),
        ("epic", {}),
    ],
    ids=str,
)
def test_exact_agents_are_exact_whatever_the_others_do(make, dense, policy, options):
    engine = make(policy, **options)
    exact = dataclasses.replace(
        mixed(), agents=tuple(dataclasses.replace(a, fidelity="exact") for a in mixed().agents)
    )
    # After a collective round of the same prompts, exact agents find nothing approximate.
    for round_, names in ((mixed(), "e"), (exact, "abcde"), (mixed(), "e")):
        found, _ = score(engine, round_)
        assert distance({name: found[name] for name in names}, dense) < 1e-4


def test_a_round_that_is_too_small_to_share_is_that_of_prefix(make):
    prefix = make("prefix")
    # With the default least saving. The preamble has more tokens than these blocks save.
    engine = RoundEngine(tiny(), policy="tokendance", programs=prefix.programs, **SMALL)
    for index in range(2):
        round_ = dataclasses.replace(gathering(), index=index)
        found, expected = (some.serve(round_, chat=False) for some in (engine, prefix))
        assert ids(found) == ids(expected)
        assert found.ledger == expected.ledger


def test_reuse_is_not_exact_where_it_is_not_asked_for(make, dense):
    found, _ = score(make(selection="none"), mixed())
    assert distance({name: found[name] for name in "abcd"}, dense) > 1e-2


def test_an_agent_that_permutes_its_blocks_changes_nobody_else(make):
    round_ = gathering("abcd")
    first, *others = round_.agents
    system, *blocks, task = first.segments
    permuted = dataclasses.replace(first, segments=(system, *blocks[::-1], task))
    engines = make(), make()
    rounds = [opened_rounds(engine) for engine in engines]
    found = [
        score(engine, dataclasses.replace(round_, agents=(agent, *others)))[0]
        for engine, agent in zip(engines, (first, permuted), strict=True)
    ]
    bases = [opened[0].bases[0].token_ids for opened in rounds]
    np.testing.assert_array_equal(*bases)
    for other in others:
        np.testing.assert_array_equal(found[0][other.agent], found[1][other.agent])
    assert np.abs(found[0][first.agent] - found[1][first.agent]).max() > 1e-3


@pytest.mark.parametrize("selection", ["head", "none", "own"])
def test_those_who_stay_compute_the_same_bits_when_one_leaves_or_joins(make, selection):
    round_, stay = gathering("abc"), "ab"
    leaves, alone = make(selection=selection), make(selection=selection)
    score(leaves, round_)
    score(alone, only(round_, stay))
    expected, _ = score(alone, only(round_, stay))
    found, _ = score(leaves, only(round_, stay))
    joined, _ = score(alone, round_)
    for name in stay:
        np.testing.assert_array_equal(found[name], expected[name])
        np.testing.assert_array_equal(joined[name], expected[name])


def test_wrong_bases_change_the_logits(make):
    engine = make(selection="none")
    # Shuffled pages show slots that were never written: these must not be NaN.
    engine.runner.kv = jax.tree.map(jnp.zeros_like, engine.runner.kv)
    before, _ = score(engine, gathering())
    assert distance(score(engine, gathering())[0], before) < 1e-4
    assert shuffle_bases(engine, 0) >= 6
    assert distance(score(engine, gathering())[0], before) > 0.1


def base_content(engine, lane):
    """K and V of a base's segments in all layers."""
    position = np.arange(lane.computed[0], len(lane.token_ids), dtype=np.int32)
    slot, _ = lane.locate(position, engine.shapes.page_size)
    pools = map(np.asarray, (engine.runner.kv.k, engine.runner.kv.v))
    return [pool.reshape(pool.shape[0], -1, *pool.shape[3:])[:, slot] for pool in pools]


@pytest.mark.parametrize("base", BASES)
def test_bases_hold_no_private_text(make, base):
    content = []
    for private in (0, 1):
        engine = make(base=base, selection="none")
        opened = opened_rounds(engine)
        round_ = gathering("abc")
        if private:  # other words, the same number of them
            agents = tuple(
                dataclasses.replace(
                    agent,
                    segments=(
                        dataclasses.replace(agent.segments[0], token_ids=words(length, length)),
                        *agent.segments[1:],
                    ),
                )
                for agent in round_.agents
                for length in [len(agent.segments[0].token_ids or ())]
            )
            round_ = dataclasses.replace(round_, agents=agents)
        score(engine, round_)
        content.append([base_content(engine, lane) for lane in opened[0].bases])
    equal = [
        np.array_equal(one, other)
        for left, right in zip(*content, strict=True)
        for one, other in zip(left, right, strict=True)
    ]
    if base == "joint-agent":
        # K and V of the neutral base by which the Master is chosen, then of the Master's base.
        assert equal == [True, True, False, False]
    else:
        assert all(equal)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("tokendance", {}),
        pytest.param(
            "tokendance", {"base": "alone", "selection": "query"}, marks=pytest.mark.sweep
        ),
        pytest.param("blend", {}, marks=pytest.mark.sweep),
        pytest.param("epic", {}, marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_steady_state_traces_nothing(policy, options):
    options = PolicyOptions(**options, least_saving=None)
    engine = RoundEngine(tiny(), policy=policy, options=options, **SMALL)
    assert engine.warm_up(agents=4, tokens=300) > 0
    with jax.no_tracing(True):
        # `shuffled` makes tables whose frames change several times.
        for index, round_ in enumerate((gathering("abcd"), gathering("bc"), shuffled("abcd"))):
            round_ = dataclasses.replace(round_, index=index)
            assert engine.serve(round_, chat=False).timings.compile_s == 0


def shuffled(names):
    """A round in which each agent sees its own block first, and not that of the next agent."""
    whole = gathering(names)
    agents = []
    for place, agent in enumerate(whole.agents):
        system, *blocks, task = agent.segments
        others = [some for at, some in enumerate(blocks) if at not in (place, place + 1)]
        segments = (system, blocks[place], *others, task)
        agents.append(dataclasses.replace(agent, segments=segments))
    return dataclasses.replace(whole, agents=tuple(agents))

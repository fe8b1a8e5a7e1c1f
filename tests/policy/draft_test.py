"""Sharing never costs more than it saves, and every round that `dense` serves is served."""

import dataclasses
import itertools
from collections import Counter

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policy.device import Device, check_lanes, drawn, exact_sources, patches_of, serve
from tests.policy.rounds import PAGE_SIZE, common_round, ids, made, prompt, rounds
from tokendance_jax.paged import OutOfPages, PagePool
from tokendance_jax.plan.groups import group_tables
from tokendance_jax.plan.round_plan import pack
from tokendance_jax.plan.shapes import PACKING, Shapes
from tokendance_jax.policy.collective import BASES
from tokendance_jax.policy.parts import TAIL_TOKENS
from tokendance_jax.policy.policies import POLICIES, PolicyOptions, make_policy
from tokendance_jax.policy.policy import NOBODY, Compute, Link, Look
from tokendance_jax.policy.selection import SELECTIONS

PREAMBLE = np.array([9, 8, 7, 6, 5], np.int32)
CONTEXT = 512
PAIRS = [
    (base, selection)
    for base, selection in itertools.product(BASES, SELECTIONS)
    if base != "joint-agent" or SELECTIONS[selection].look is None
]
SEEDS = st.integers(0, 2**32 - 1)


def policy_of(pool, name="tokendance", *, preamble=PREAMBLE, context=CONTEXT, **options):
    return make_policy(
        name,
        pool,
        PAGE_SIZE,
        "model",
        options=PolicyOptions(**options),
        preamble=preamble,
        context=context,
    )


def options_of(pair, pages, least_saving):
    base, selection = pair
    return {
        "base": base,
        "selection": selection,
        "head_pages": pages,
        "least_saving": least_saving,
    }


@pytest.fixture(scope="module", autouse=True)
def unchecked():
    # Checking annotations would take most of the time. Other tests check them for the same code.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


def steps_of(opened):
    """Yields the steps of an open round, and sends random scores to its looks."""
    random, scores = np.random.default_rng(0), None
    while True:
        try:
            step = opened.steps.send(scores)
        except StopIteration:
            return
        yield step
        scores = None
        if isinstance(step, Look):
            attention = step.what == "attention"
            shapes = [len(p.page) if attention else (2, len(p.computed)) for p in step.lanes]
            scores = [random.random(shape).astype(np.float32) for shape in shapes]


def rows_of(opened):
    """Counts the computed rows by seat. Rows of bases count for `NOBODY`."""
    rows = Counter()
    for step in steps_of(opened):
        if isinstance(step, Compute):
            for lane, seat in zip(step.lanes, step.seats, strict=True):
                rows[seat] += len(lane.computed)
    return rows


def served(policy, prompts, answers=()):
    """Serves a round with the given answers; returns it and its rows by seat."""
    opened = policy.open(prompts, [len(some) for some in answers] or [0] * len(prompts))
    rows = rows_of(opened)
    tokens = [whole.token_ids for whole in prompts]
    pairs = itertools.zip_longest(tokens, answers, fillvalue=ids([]))
    policy.close(opened, [np.concatenate(pair) for pair in pairs])
    return opened, rows


def exact_rows(policy, prompts):
    """Counts the rows of a round that is served exactly, with the same caches."""
    exact = [dataclasses.replace(whole, fidelity="exact") for whole in prompts]
    opened = policy.open(exact, [0] * len(exact))
    assert opened.bases == []
    policy.close(opened, None)  # leaves the caches as they were
    return sum(len(lane.computed) for lane in opened.lanes)


def shares(opened):
    return any(lane.base.any() for lane in opened.lanes)


@given(
    rounds(),
    st.sampled_from(PAIRS),
    st.integers(0, 2),
    st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    SEEDS,
)
@settings(max_examples=18)
def test_a_round_computes_no_more_than_an_exact_one(recipes, pair, pages, least_saving, seed):
    random = np.random.default_rng(seed)
    policy = policy_of(PagePool(2000), **options_of(pair, pages, least_saving))
    rival = policy_of(PagePool(2000), "prefix")
    shared = False
    for prompts in map(made, recipes):
        exact = exact_rows(policy, prompts)
        answers = [random.integers(0, 5, random.integers(6)).astype(np.int32) for _ in prompts]
        opened, rows = served(policy, prompts, answers)
        _, expected = served(rival, prompts, answers)
        if shares(opened):
            assert rows.total() < exact
            assert rows.total() <= (1 - least_saving) * exact
        else:
            assert opened.bases == []
            assert opened.preamble_tokens == 0
            assert rows.total() == exact
        shared = shared or shares(opened)
        if not shared:  # row for row what `prefix` computes, as long as all rounds are exact
            assert rows == expected


@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from(PAIRS), SEEDS)
@settings(max_examples=10)
def test_new_blocks_behind_private_text_never_cost_more_than_prefix(agents, count, pair, seed):
    # In a usual round, every agent's private text has grown and the blocks are new. What `prefix`
    # finds of older rounds then ends within private text, which is exact under `tokendance` too.
    random = np.random.default_rng(seed)
    policy = policy_of(PagePool(4000), **options_of(pair, 1, random.choice([0.0, 0.2])))
    rival = policy_of(PagePool(4000), "prefix")
    fresh = iter(range(10, 100_000))

    def some(most):
        return [next(fresh) for _ in range(random.integers(1, most))]

    town = some(30)
    private = [town + some(20) for _ in range(agents)]
    for _ in range(3):
        blocks = [("shared", f"out/{index}", some(40)) for index in range(count)]
        prompts = []
        for index in range(agents):
            private[index] += some(9) if random.random() < 0.7 else []
            seen = [blocks[at] for at in random.permutation(count)[: random.integers(count + 1)]]
            system = ("system", "sys", list(private[index]))
            prompts.append(prompt(str(index), system, *seen, ("task", "t", some(20))))
        assert served(policy, prompts)[1].total() <= served(rival, prompts)[1].total()


@given(rounds(most=1), st.sampled_from(PAIRS), st.sampled_from([0.0, 0.2]), SEEDS)
@settings(max_examples=10)
def test_what_is_shared_does_not_depend_on_the_order_of_agents(recipes, pair, least_saving, seed):
    prompts = made(recipes[0])
    found = []
    for _ in range(2):
        policy = policy_of(PagePool(2000), **options_of(pair, 1, least_saving))
        opened = policy.open(prompts, [0] * len(prompts))
        found.append(
            {
                whole.agent: bool(lane.base.any())
                for whole, lane in zip(prompts, opened.lanes, strict=True)
            }
        )
        policy.close(opened, None)
        np.random.default_rng(seed).shuffle(prompts)
    assert found[0] == found[1]


def test_the_least_saving_is_a_share_of_what_an_exact_round_computes():
    prompts = common_round()
    always = served(policy_of(PagePool(1000), head_pages=1, least_saving=0.0), prompts)[1].total()
    exact = served(policy_of(PagePool(1000), "prefix"), prompts)[1].total()
    saving = 1 - always / exact
    assert 0.2 < saving < 0.9
    for least, expected in ((saving - 0.01, always), (saving + 0.01, exact)):
        policy = policy_of(PagePool(1000), head_pages=1, least_saving=least)
        assert served(policy, prompts)[1].total() == expected


def test_a_base_that_costs_more_than_it_saves_is_not_made():
    prompts = [
        prompt(name, ("system", "s", [n] * 20), ("shared", "b", [7, 8]), ("task", "t", [n] * 9))
        for n, name in enumerate("abc")
    ]
    for least_saving, bases in ((0.0, 0), (None, 1)):
        pool = PagePool(1000)
        policy = policy_of(pool, selection="none", least_saving=least_saving)
        opened = policy.open(prompts, [0] * 3)
        assert len(opened.bases) == bases
        policy.close(opened, None)
        assert (pool.live, pool.evictable) == (0, 0)


def test_an_agent_whose_prompt_is_found_whole_is_exact_among_others_that_share():
    prompts = common_round(4)
    device = Device(1000)
    policy = policy_of(device.pool, head_pages=1, least_saving=0.0)
    random = np.random.default_rng(0)
    (alone,) = serve(device, policy, prompts[:1], random).lanes
    assert not alone.base.any()
    opened = serve(device, policy, prompts, random, check=check_lanes(device))
    assert [bool(lane.base.any()) for lane in opened.lanes] == [False, True, True, True]
    assert device.computed[0] < PAGE_SIZE + 1


@pytest.mark.parametrize(("tokens", "reads"), [(23, False), (24, False), (25, True)])
def test_a_run_that_leaves_little_behind_its_head_is_computed_whole(tokens, reads):
    # Two runs: the long one is worth a base, the short one has a head of four pages and a rest.
    block, short = list(range(100, 300)), list(range(300, 300 + tokens))
    prompts = [
        prompt(
            name,
            ("system", "sys", [number] * 9),
            ("shared", "short", short),
            ("history", "own", [number] * 3),
            ("shared", "long", block),
            ("task", "t", [number] * 9),
        )
        for number, name in enumerate("abc")
    ]
    device = Device(1000)
    policy = policy_of(device.pool, context=4096, head_pages=4, least_saving=0.0)
    opened = serve(device, policy, prompts, np.random.default_rng(0), check=check_lanes(device))
    for lane, whole in zip(opened.lanes, prompts, strict=True):
        own = np.repeat(lane.base == 0, lane.slots)
        assert own[9 : 9 + tokens].all() == (not reads)
        # A run that is computed whole, behind private text, is exact.
        if not reads:
            exact = exact_sources(whole.token_ids.tolist())
            assert device.sources(lane)[: 12 + tokens] == exact[: 12 + tokens]


# The following rounds have prompts up to the context, in the `Shapes` that engines use: two key
# blocks and the spare ones.


@st.composite
def crowded(draw):
    """Draws a seed and sizes: blocks, most tokens of a block, agents, and whether answers are long.

    `crowd` draws the prompts from the seed, because the tests' type checker draws random numbers
    too, which a strategy must not do.
    """
    return (
        draw(SEEDS),
        draw(st.sampled_from([3, 12, 60])),
        draw(st.sampled_from([3, 9, 60, 300])),
        draw(st.integers(1, 4)),
        draw(st.booleans()),
    )


def crowd(case):
    """Returns the prompts of a round, and for each lane the room that its answer needs."""
    seed, count, length, agents, long = case
    random = np.random.default_rng(seed)
    blocks = [random.integers(10, 50, random.integers(1, length + 1)) for _ in range(count)]
    prompts, rooms = [], []
    for index in range(agents):
        segments = [("system", "sys", random.integers(10, 50, random.integers(0, 30)).tolist())]
        task = random.integers(10, 50, random.integers(1, 30)).tolist()
        left = CONTEXT - 1 - len(segments[0][2]) - len(task)
        for at in random.integers(0, count, 2 * count):
            kind = random.choice(["shared", "shared", "shared", "history", "own"])
            size = random.integers(1, 4)
            text = random.integers(10, 50, size) if kind == "own" else blocks[at]
            if len(text) <= left and random.random() < 0.8:
                kind = "history" if kind == "own" else str(kind)
                segments.append((kind, f"out/{at}", text.tolist()))
                left -= len(text)
        prompts.append(prompt(str(index), *segments, ("task", "t", task)))
        rooms.append(left if long else int(random.integers(0, left + 1)))
    return prompts, rooms


VARIANTS = [
    *((name, {}) for name in POLICIES if name != "tokendance"),
    *(
        ("tokendance", options_of(pair, 1, least_saving))
        for pair in PAIRS
        for least_saving in (None, 0.0)
    ),
]


@given(crowded(), st.sampled_from(VARIANTS))
@settings(max_examples=10)
def test_every_round_that_fits_the_context_is_served(case, variant):
    prompts, rooms = crowd(case)
    pages = 6000
    shapes = Shapes.of(
        row_budget=256,
        max_lanes=4,
        max_tokens=CONTEXT,
        pages=pages,
        page_size=PAGE_SIZE,
        packing=PACKING["gpu"],
    )
    pool, (name, options) = PagePool(pages), variant
    policy = policy_of(pool, name, **options)
    for _ in range(2):
        opened = policy.open(prompts, rooms)
        computed = [Counter() for _ in prompts]
        for step in steps_of(opened):
            if isinstance(step, Link):
                continue
            pairs = zip(step.lanes, step.seats, strict=True)
            busy = [pair for pair in pairs if len(pair[0].computed)]
            for start in range(0, len(busy), 4):
                lanes, seats = zip(*busy[start : start + 4], strict=True)
                plans = pack(lanes, shapes, seats=seats, seated=4)
                rows = sum(int((plan.rows.slot < shapes.no_slot).sum()) for plan in plans)
                assert rows == sum(len(lane.computed) for lane in lanes)
            for lane, seat in busy:
                if seat != NOBODY and not isinstance(step, Look):
                    computed[seat].update(lane.computed.tolist())
        group_tables(opened.lanes, shapes, least=4)
        for lane, whole, room, rows in zip(opened.lanes, prompts, rooms, computed, strict=True):
            assert set(rows.values()) <= {1}
            assert len(whole.token_ids) - 1 in rows
            assert lane.slots.sum() >= len(whole.token_ids) + room
        for lane in opened.bases:
            assert len(lane.token_ids) <= CONTEXT
        written = [whole.token_ids for whole in prompts]
        policy.close(opened, written)
        assert pool.live == 0


def test_answers_up_to_the_end_of_the_context_cost_no_sharing():
    prompts = common_round(3, 2, shared=40, private=30, task=20)
    rooms = [CONTEXT - len(whole.token_ids) - 1 for whole in prompts]
    policy = policy_of(PagePool(1000), head_pages=1)
    opened = policy.open(prompts, rooms)
    assert all(lane.base.any() for lane in opened.lanes)
    policy.close(opened, None)


def test_blocks_that_no_base_holds_together_lie_in_several():
    # 400 tokens of blocks fit the context. 800 do not, nor does the huge block with the preamble.
    preamble = np.full(40, 9, np.int32)
    blocks = [("shared", f"out/{n}", [100 * n + at for at in range(200)]) for n in range(1, 5)]
    huge = ("shared", "huge", list(range(1000, 1000 + CONTEXT - 20)))
    task = ("task", "t", [7] * TAIL_TOKENS)
    agents = [("a", blocks[:2]), ("b", blocks[2:]), ("c", [blocks[0], blocks[3]]), ("d", [huge])]
    prompts = [
        prompt(name, ("system", "s", [number]), *some, task)
        for number, (name, some) in enumerate(agents)
    ]
    for base in ("joint", "joint-agent", "alone"):
        device = Device(2000)
        policy = policy_of(
            device.pool, preamble=preamble, base=base, selection="none", least_saving=None
        )
        opened = policy.open(prompts, [0] * 4)
        held = [lane.token_ids[len(preamble) :].tolist() for lane in opened.bases]
        expected = [token for *_, block in blocks for token in block]
        assert sorted(itertools.chain.from_iterable(held)) == sorted(expected)
        assert len(opened.bases) == (4 if base == "alone" else 2)
        assert [bool(lane.base.any()) for lane in opened.lanes] == [True, True, True, False]
        device.run(opened, drawn(np.random.default_rng(0)))
        check_lanes(device)(opened, prompts, [0] * 4)
        policy.close(opened, None)
        assert device.pool.live == 0


def test_patches_are_reserved_for_every_time_that_a_page_is_shown():
    # Blocks that begin with the same tokens share pages, although each has a base of its own.
    stem = list(range(10, 10 + 2 * PAGE_SIZE))
    blocks = [("shared", f"out/{n}", [*stem, *[30 + n] * 5]) for n in range(3)]
    whole = prompt("a", ("system", "s", [1] * 9), *blocks, ("task", "t", [7] * 9))
    for later in (blocks, blocks[:2]):  # the second time the last block is a quote
        quote = [("history", "said", some[2]) for some in blocks if some not in later]
        again = prompt("a", ("system", "s", [1] * 9), *later, *quote, ("task", "t", [7] * 9))
        device = Device(1000)
        policy = policy_of(
            device.pool,
            context=4096,
            base="alone",
            selection="query",
            head_pages=1,
            least_saving=None,
        )
        random = np.random.default_rng(0)
        serve(device, policy, [whole], random)
        opened = policy.open([again], [0])
        base = opened.lanes[0].base
        first = int(np.argmax(base > 0))
        # All attention goes to the first page, so it is chosen all three times that it is shown.
        device.run(
            opened, lambda _, shape, at=first: (np.arange(shape[0]) == at).astype(np.float32)
        )
        check_lanes(device)(opened, [again], [0])
        assert (
            np.flatnonzero(patches_of(opened.lanes[0])).tolist()
            == np.flatnonzero(base == base[first]).tolist()
        )
        assert (base == base[first]).sum() == 3
        policy.close(opened, None)


def test_a_pool_that_does_not_hold_the_bases_serves_exactly():
    prompts = common_round(3)
    found = []
    for pages in range(165, 235, 7):
        dense = policy_of(PagePool(pages), "dense")
        try:
            dense.open(prompts, [5] * 3)
        except OutOfPages:
            continue
        device = Device(pages)
        policy = policy_of(device.pool, selection="all", least_saving=None)
        opened = serve(device, policy, prompts, np.random.default_rng(0))
        found.append(shares(opened))
    assert found == sorted(found)
    assert {True, False} <= set(found)

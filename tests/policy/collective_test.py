import contextlib
import dataclasses
import itertools
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policy.device import Device, check_lanes, drawn, patches_of, serve
from tests.policy.rounds import PAGE_SIZE, common_round, ids, made, prompt, rounds
from tokendance_jax.engine.ledger import distinct_tokens
from tokendance_jax.paged import OutOfPages
from tokendance_jax.policy.collective import BASES, Collective
from tokendance_jax.policy.parts import TAIL_TOKENS
from tokendance_jax.policy.policy import NOBODY
from tokendance_jax.policy.selection import SELECTIONS, make_selection

PREAMBLE = ids([9, 8, 7, 6, 5])
# joint-agent has a look of its own, so it excludes selections that look.
PAIRS = [
    (base, selection)
    for base, selection in itertools.product(BASES, SELECTIONS)
    if base != "joint-agent" or SELECTIONS[selection].look is None
]
SEEDS = st.integers(0, 2**32 - 1)


def collective(pool, pair=("joint", "head"), pages=2):
    base, selection = pair
    # Shares at any cost, because these rounds are tiny.
    return Collective(
        pool,
        PAGE_SIZE,
        "model",
        base=base,
        selection=make_selection(selection, pages),
        preamble=PREAMBLE,
        least_saving=None,
        context=4096,
    )


@given(
    rounds(), st.sampled_from(PAIRS), st.integers(0, 3), st.sampled_from([24, 48, 90, 1000]), SEEDS
)
@settings(max_examples=24)
def test_rounds_of_all_kinds_keep_every_promise(recipes, pair, pages, size, seed):
    random = np.random.default_rng(seed)
    device = Device(size)
    policy = collective(device.pool, pair, pages)
    for some in recipes:
        fails = random.random() < 0.25
        try:
            serve(device, policy, made(some), random, check=check_lanes(device), fails=bool(fails))
        except OutOfPages:
            assert size < 1000


def compute(
    prompts, base="joint", selection="head", *, pages=2, device=None, policy=None, score=None
):
    """Computes one round; returns it and the sources of each agent's prompt, by name."""
    device = device or Device(1000)
    policy = policy or collective(device.pool, (base, selection), pages)
    opened = policy.open(prompts, [0] * len(prompts))
    device.run(opened, score or drawn(np.random.default_rng(0)))
    found = {p.agent: device.sources(lane) for p, lane in zip(prompts, opened.lanes, strict=True)}
    policy.close(opened, [p.token_ids for p in prompts])
    return opened, found


def scores_by_content(prompts):
    """Returns a function of scores that depend on an agent's prompt and not on its seat."""

    def score(seat, shape):
        seed = zlib.crc32(prompts[seat].token_ids.tobytes())
        return np.random.default_rng(seed).random(shape).astype(np.float32)

    return score


@given(rounds(most=1), st.sampled_from(PAIRS), st.integers(0, 3), st.randoms(use_true_random=False))
@settings(max_examples=12)
def test_agents_in_another_order_read_the_same(recipes, pair, pages, random):
    prompts = made(recipes[0])
    _, found = compute(prompts, *pair, pages=pages, score=scores_by_content(prompts))
    random.shuffle(prompts)
    _, again = compute(prompts, *pair, pages=pages, score=scores_by_content(prompts))
    assert again == found


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_round_again_reads_the_same(pair):
    prompts, device = common_round(), Device(1000)
    policy, score = collective(device.pool, pair), scores_by_content(prompts)
    first, found = compute(prompts, device=device, policy=policy, score=score)
    before = device.computed.total()
    second, again = compute(prompts, device=device, policy=policy, score=score)
    assert again == found
    if pair[0] != "joint-agent":  # the Master's base is computed again
        assert device.computed[NOBODY] == 0
        assert device.computed.total() < before
        for one, other in zip(first.bases, second.bases, strict=True):
            assert one.page.tolist() == other.page.tolist()


@pytest.mark.parametrize("base", ["joint", "alone"])
def test_a_preamble_is_held_only_while_bases_are_computed(base):
    device = Device(1000)
    policy = collective(device.pool, (base, "none"))
    opened = policy.open(common_round(), [0] * 4)
    preamble = opened.bases[0].page[:2]  # five tokens in pages of four
    count = len(opened.bases)
    assert [device.pool.refcount(page) for page in preamble.tolist()] == [count] * 2
    device.run(opened, drawn(np.random.default_rng(0)))
    assert opened.left == 2
    assert [device.pool.refcount(page) for page in preamble.tolist()] == [0, 0]
    assert not np.isin(preamble, opened.base_pages).any()
    policy.close(opened, None)  # a failure later on leaves nothing behind either
    assert (device.pool.live, device.pool.evictable) == (0, 0)


@pytest.mark.parametrize("pair", [p for p in PAIRS if SELECTIONS[p[1]].look is None], ids="-".join)
def test_what_one_agent_does_to_its_own_prompt_is_its_own_matter(pair):
    prompts = common_round()
    _, found = compute(prompts, *pair)
    first, *others = prompts
    system, *blocks, task = first.spans
    for order in itertools.islice(itertools.permutations(blocks), 1, None, 5):
        spans = [system, *order, task]
        permuted = prompt(
            first.agent, *((s.kind, s.id, first.token_ids[s.start : s.stop]) for s in spans)
        )
        opened, again = compute([permuted, *others], *pair)
        if pair[0] != "joint-agent":  # there the Master may change
            assert {a: again[a] for a in "123"} == {a: found[a] for a in "123"}
            neutral = opened.bases[0].token_ids.tolist()
            assert neutral == compute(prompts, *pair)[0].bases[0].token_ids.tolist()


@pytest.mark.parametrize("base", ["joint", "alone", "isolated"])
def test_a_base_depends_on_no_private_text(base):
    prompts = common_round()
    device = Device(1000)
    policy = collective(device.pool, (base, "head"))
    random = np.random.default_rng(0)
    serve(device, policy, prompts, random)
    private = [
        prompt(
            whole.agent,
            ("system", "sys", whole.token_ids[: whole.spans[0].stop] + 5000),
            *((s.kind, s.id, whole.token_ids[s.start : s.stop]) for s in whole.spans[1:]),
        )
        for whole in prompts
    ]
    serve(device, policy, private, random)
    assert device.computed[NOBODY] == 0


@pytest.mark.parametrize("base", BASES)
def test_without_a_selection_every_distinct_token_is_computed_once(base):
    prompts, device = common_round(), Device(1000)
    opened, _ = compute(prompts, base, "none", device=device)
    preamble = 0 if base == "isolated" else len(PREAMBLE)
    assert opened.preamble_tokens == preamble
    shared = sum(span.stop - span.start for span in prompts[0].spans if span.kind == "shared")
    # The bundle is computed once more, behind the Master's private text.
    again = shared if base == "joint-agent" else 0
    assert device.computed[NOBODY] == preamble + shared + again
    assert device.computed.total() == preamble + distinct_tokens(prompts) + again


@pytest.mark.parametrize(("selection", "patches"), [("head", 2), ("own", 2), ("deviation", 2)])
def test_a_selection_costs_its_pages(selection, patches):
    prompts, device = common_round(), Device(1000)
    opened, _ = compute(prompts, "joint", selection, device=device, pages=patches)
    extra = device.computed.total() - distinct_tokens(prompts) - len(PREAMBLE)
    assert extra == sum(int(lane.slots[patches_of(lane)].sum()) for lane in opened.lanes)
    if selection == "own":
        patches += 11  # 40 to 43 tokens that begin anywhere in a page
    assert extra <= len(prompts) * patches * PAGE_SIZE


def test_the_preamble_is_the_system_text_that_all_agents_begin_with():
    town = [1] * 20
    shared, task = ("shared", "s", [3] * 9), ("task", "t", [4] * 9)

    def of(*systems, shared_first=False):
        prompts = [
            prompt(name, *([] if shared_first else [("system", "sys", some)]), shared, task)
            for name, some in zip("abc", systems, strict=False)
        ]
        opened, _ = compute(prompts, "joint", "none")
        (base,) = opened.bases
        return base.token_ids[: opened.preamble_tokens].tolist()

    assert of([*town, 5], [*town, 6], [*town, 7]) == town
    assert of([*town, 5], [*town, 5]) == [*town, 5]
    assert of([*town[:10], 5], [*town[:10], 6]) == PREAMBLE.tolist()  # too short
    assert of([*town, 5]) == PREAMBLE.tolist()  # one agent's text is not neutral
    assert of([], [], shared_first=True) == []


def sibling(history, tail):
    """Returns a prompt: private text, a short shared block, `history`, a long one, and `tail`."""
    return prompt(
        "a",
        ("system", "sys", [1] * 6),
        ("shared", "short", [2] * 4),
        ("history", "own", history),
        ("shared", "long", [3, 4] * 10),
        ("task", "task", tail),
    )


def test_a_head_behind_more_own_text_is_not_found_again():
    device = Device(1000)
    policy = collective(device.pool, ("joint", "head"), 3)
    random = np.random.default_rng(0)
    # Both histories have the same length, so the frames are the same. Only the private text and
    # the head of the first run are found again.
    for history, hits in (([5] * 7, 0), ([6] * 7, 6 + 4)):
        prompts = [sibling(history, [7] * 9)]
        opened = serve(device, policy, prompts, random, check=check_lanes(device))
        assert opened.exact_hits == [hits]


def test_heads_are_found_again_across_agents_and_rounds():
    device = Device(1000)
    policy = collective(device.pool, ("joint", "head"), 3)
    random = np.random.default_rng(0)
    prompts = [
        dataclasses.replace(sibling([5] * 7, [7, 7, 7, 7, 7, 7, 7, 7, seat]), agent=str(seat))
        for seat in range(3)
    ]
    for rounds_before in range(2):
        opened = serve(device, policy, prompts, random, check=check_lanes(device))
        assert opened.exact_hits == [10 if rounds_before else 0, 10, 10]
        # All agents share the page in which the private text ends: the text behind the shared block
        # continues in another page.
        ends = [lane.page[1] for lane in opened.lanes]
        assert len(set(ends)) == 1


def test_a_master_moves_the_frames_of_patches_that_are_not_found_again():
    # In each round the Master has private text of another length; the first agent is the same.
    agents = [
        prompt(
            name,
            ("system", "sys", [number] * (5 + number)),
            ("shared", "s", [8, 9] * 10),
            ("task", "t", [7] * 8 + [number]),
        )
        for number, name in enumerate("abc")
    ]
    device = Device(1000)
    policy = collective(device.pool, ("joint-agent", "head"))
    masters = []
    for lowest in (0, 1, 2):

        def score(seat, shape, lowest=lowest):
            return np.full(shape, 1.0 + (seat != lowest), np.float32)

        opened = policy.open(agents, [0] * 3)
        device.run(opened, score)
        check_lanes(device)(opened, agents, [0] * 3)
        masters.append(opened.bases[-1].token_ids.tolist())
        policy.close(opened, [agent.token_ids for agent in agents])
    for number, tokens in enumerate(masters):
        assert tokens == [number] * (5 + number) + [8, 9] * 10


def test_the_master_is_the_agent_of_the_lowest_sum_wherever_it_sits():
    prompts = common_round()
    for turn in range(4):
        turned = prompts[turn:] + prompts[:turn]

        def score(seat, shape, turned=turned):
            return np.full(shape, 1.0 + (turned[seat].agent != "2"), np.float32)

        opened, _ = compute(turned, "joint-agent", "none", score=score)
        private = prompts[2].token_ids[: prompts[2].spans[0].stop].tolist()
        assert opened.bases[-1].token_ids[: len(private)].tolist() == private


@pytest.mark.parametrize("base", BASES)
def test_quotes_of_older_rounds_are_read_from_their_bases(base):
    block, device = [5, 6] * 10, Device(1000)
    policy = collective(device.pool, (base, "none"))
    random = np.random.default_rng(0)
    task = ("task", "t", [7] * 9)
    first = prompt("a", ("system", "sys", [1] * 3), ("shared", "out/a", block), task)
    serve(device, policy, [first], random)
    quote = prompt("a", ("system", "sys", [1] * 3), ("history", "said", block), task)
    opened = serve(device, policy, [quote], random, check=check_lanes(device))
    assert opened.bases == []
    assert device.computed == {0: 3 + 9}
    assert opened.lanes[0].base.any()


def test_an_exact_agent_reads_private_text_of_others_and_nothing_approximate():
    device = Device(1000)
    policy = collective(device.pool, ("joint", "head"))
    random = np.random.default_rng(0)
    prompts = common_round(2)
    serve(device, policy, prompts, random)
    exact = [dataclasses.replace(p, fidelity="exact") for p in prompts]
    opened = serve(device, policy, exact, random, check=check_lanes(device))
    assert opened.bases == []
    # Only the full pages of the private texts are found.
    assert opened.exact_hits == [p.spans[0].stop // PAGE_SIZE * PAGE_SIZE for p in prompts]


def test_a_task_that_all_agents_have_is_computed_once():
    task = ("task", "t", list(range(100, 140)))
    prompts = [
        prompt(name, ("system", "sys", [number] * 9), ("shared", "s", [8, 9] * 10), task)
        for number, name in enumerate("abc")
    ]
    device = Device(1000)
    compute(prompts, "joint", "none", device=device)
    # Each agent computes the end of the task itself, as its first answer token comes from there.
    assert device.computed.total() == len(PREAMBLE) + 20 + 40 + 3 * (9 + TAIL_TOKENS)


def test_nothing_is_computed_for_a_base_that_nobody_reads():
    task = ("task", "t", [7] * TAIL_TOKENS)  # each agent computes it as its tail
    prompts = [prompt(name, ("system", "sys", [n] * 9), task) for n, name in enumerate("ab")]
    opened, _ = compute(prompts, "joint", "none")
    assert opened.bases == []


@pytest.mark.parametrize(
    "pair",
    [("joint", "head"), ("joint", "query"), ("alone", "none"), ("joint-agent", "own")],
    ids="-".join,
)
def test_a_round_that_the_pool_cannot_hold_leaves_everything_as_it_was(pair):
    small = common_round(2, 2, shared=9, private=9, task=9)
    large = common_round(3, 3, shared=9, private=11, task=9)
    fits = []
    for size in range(20, 90, 3):
        device = Device(size)
        policy = collective(device.pool, pair)
        try:
            serve(device, policy, small, np.random.default_rng(0))
        except OutOfPages:
            continue
        try:
            opened = policy.open(large, [3] * 3)
        except OutOfPages:
            assert device.pool.free + device.pool.evictable == size - 1
            fits.append(False)
        else:
            device.run(opened, drawn(np.random.default_rng(0)))
            check_lanes(device)(opened, large, [3] * 3)
            policy.close(opened, None)
            fits.append(True)
        # Pages that are found of the first round hold what the first round wrote.
        with contextlib.suppress(OutOfPages):
            serve(device, policy, small, np.random.default_rng(0), check=check_lanes(device))
    assert fits == sorted(fits)
    assert {True, False} <= set(fits)


def test_a_patch_is_never_the_page_that_it_replaces():
    # Quoted bases lie in pages that may be evicted while the agent allocates its own pages.
    block = [5, 6] * 10
    task = ("task", "t", [7] * 9)
    first = prompt("a", ("shared", "out/a", block), task)
    quote = prompt("a", ("system", "s", [1] * 9), ("history", "said", block), task)
    for size in range(12, 30):
        device = Device(size)
        policy = collective(device.pool, ("joint", "all"))
        random = np.random.default_rng(0)
        with contextlib.suppress(OutOfPages):
            serve(device, policy, [first], random)
            (lane,) = serve(device, policy, [quote], random).lanes
            assert patches_of(lane).sum() in (0, len(block) // PAGE_SIZE)

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policy.device import Device, checked_lanes, drawn, serve
from tests.policy.rounds import PAGE_SIZE, common_round, made, prompt, rounds
from tokendance_jax.paged import OutOfPages
from tokendance_jax.policy.policies import PolicyOptions, make_policy
from tokendance_jax.policy.policy import NOBODY, Link, Look

NAMES = ("blend", "blend-batched", "epic")


def rival(pool, name, **options):
    return make_policy(name, pool, PAGE_SIZE, "model", options=PolicyOptions(**options))


def shared_positions(whole):
    spans = [span for span in whole.spans if span.kind == "shared"]
    return {at for span in spans for at in range(span.start, span.stop)}


def check_lanes(device):
    """Returns a check of what holds for the lanes of any computed round."""

    def check(opened, prompts, rooms):
        held = [page for lane in opened.lanes for page in lane.page.tolist()]
        for lane, whole, hits, found, exact in checked_lanes(device, opened, prompts, rooms):
            shared = shared_positions(whole)
            assert set(range(hits, len(whole.token_ids))) - shared <= set(lane.computed.tolist())
            if whole.fidelity == "exact" or not shared:
                assert found == exact
                continue
            # Lanes are dense: no other lane holds the pages from the first shared token on.
            assert not lane.frame.any()
            assert not lane.base.any()
            private = min(shared) // PAGE_SIZE
            assert all(held.count(page) == 1 for page in lane.page.tolist()[private:])

    return check


@given(
    rounds(),
    st.sampled_from(NAMES),
    st.sampled_from([0.0, 0.15, 1.0]),
    st.integers(0, 6),
    st.sampled_from([40, 90, 1000]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=18)
def test_rounds_of_all_kinds_keep_every_promise(recipes, name, ratio, tokens, size, seed):
    random = np.random.default_rng(seed)
    device = Device(size)
    policy = rival(device.pool, name, blend_ratio=ratio, epic_tokens=tokens)
    for some in recipes:
        fails = random.random() < 0.25
        try:
            serve(device, policy, made(some), random, check=check_lanes(device), fails=bool(fails))
        except OutOfPages:
            assert size < 1000


def compute(prompts, name, *, device=None, policy=None, **options):
    """Computes one round; returns it and its steps."""
    device = device or Device(1000)
    policy = policy or rival(device.pool, name, **options)
    opened = policy.open(prompts, [0] * len(prompts))
    steps = []

    def watched(inner):
        scores = None
        while True:
            try:
                step = inner.send(scores)
            except StopIteration:
                return
            steps.append(step)
            scores = yield step

    opened.steps = watched(opened.steps)
    device.run(opened, drawn(np.random.default_rng(0)))
    check_lanes(device)(opened, prompts, [0] * len(prompts))
    policy.close(opened, [whole.token_ids for whole in prompts])
    return opened, steps


@pytest.mark.parametrize("name", ["blend", "blend-batched"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.15, 0.5, 1.0])
def test_blend_recomputes_its_share_of_the_shared_tokens(name, ratio):
    prompts = common_round()
    opened, _ = compute(prompts, name, blend_ratio=ratio)
    for lane, whole in zip(opened.lanes, prompts, strict=True):
        shared = shared_positions(whole)
        recomputed = shared & set(lane.computed.tolist())
        assert len(recomputed) == int(ratio * len(shared))


def test_blend_recomputes_what_deviates_most():
    whole = common_round(1)[0]
    device = Device(1000)
    policy = rival(device.pool, "blend", blend_ratio=0.1)
    opened = policy.open([whole], [0])
    shared = sorted(shared_positions(whole))
    most = shared[3::7][: int(0.1 * len(shared))]

    def score(seat, shape):
        squares = np.ones(shape, np.float32)
        # Own rows are compared with slots that are not written yet: their scores may even be NaN.
        squares[:, sorted(set(range(shape[1])) - set(shared))] = np.nan
        squares[:, most] = 2.0
        return squares

    device.run(opened, score)
    assert sorted(set(opened.lanes[0].computed.tolist()) & set(shared)) == most
    policy.close(opened, None)


@pytest.mark.parametrize(("name", "looks"), [("blend", 4), ("blend-batched", 1)])
def test_blend_goes_request_by_request_unless_batched(name, looks):
    _, steps = compute(common_round(4), name)
    found = [step for step in steps if isinstance(step, Look)]
    assert len(found) == sum(isinstance(step, Link) for step in steps) == looks
    assert [seat for look in found for seat in look.seats] == [0, 1, 2, 3]


@pytest.mark.parametrize("tokens", [0, 1, 5, 1000])
def test_epic_recomputes_the_head_of_every_segment(tokens):
    prompts = common_round()
    opened, steps = compute(prompts, "epic", epic_tokens=tokens)
    for lane, whole in zip(opened.lanes, prompts, strict=True):
        heads = {
            at
            for span in whole.spans
            if span.kind == "shared"
            for at in range(span.start, min(span.stop, span.start + tokens))
        }
        assert shared_positions(whole) & set(lane.computed.tolist()) == heads
    assert sum(isinstance(step, Link) for step in steps) == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_segment_is_computed_alone_and_once(name):
    prompts, device = common_round(), Device(1000)
    policy = rival(device.pool, name)
    opened, _ = compute(prompts, name, device=device, policy=policy)
    blocks = [span for span in prompts[0].spans if span.kind == "shared"]
    assert len(opened.bases) == len(blocks)
    for lane, span in zip(opened.bases, blocks, strict=True):
        assert lane.token_ids.tolist() == prompts[0].token_ids[span.start : span.stop].tolist()
    assert device.computed[NOBODY] == sum(span.stop - span.start for span in blocks)
    # The next round finds the segments, although their order differs.
    turned = [
        prompt(
            whole.agent,
            *(
                (s.kind, s.id, whole.token_ids[s.start : s.stop])
                for s in [whole.spans[0], *whole.spans[-2:0:-1], whole.spans[-1]]
            ),
        )
        for whole in prompts
    ]
    compute(turned, name, device=device, policy=policy)
    assert device.computed[NOBODY] == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_rotated_by_the_distance_it_moves(name):
    prompts = common_round(2)
    opened, steps = compute(prompts, name)
    links = [step for step in steps if isinstance(step, Link)]
    shifts = np.concatenate([link.shift for link in links])
    expected = np.concatenate(
        [
            np.full(span.stop - span.start, span.start)
            for whole in prompts
            for span in whole.spans
            if span.kind == "shared"
        ]
    )
    assert shifts.tolist() == expected.tolist()
    assert not any(lane.frame.any() for lane in opened.lanes)


@pytest.mark.parametrize("name", NAMES)
def test_exact_agents_and_others_read_each_others_private_text(name):
    # All agents have the same private text. Exact agents sit before, between and behind the others.
    block = ("shared", "s", [8, 9] * 10)
    prompts = [
        prompt(name, ("system", "sys", [1] * 11), block, ("task", "t", [7] * 8 + [number]))
        for number, name in enumerate("abcd")
    ]
    for exact in ("", "a", "b", "bd", "abcd"):
        some = [
            dataclasses.replace(p, fidelity="exact" if p.agent in exact else "collective")
            for p in prompts
        ]
        opened, _ = compute(some, name)
        assert sorted(opened.exact_hits)[0] == 0
        assert sorted(opened.exact_hits)[1] >= 8


@pytest.mark.parametrize("name", NAMES)
def test_a_round_without_shared_text_is_exact(name):
    prompts = [
        prompt(name, ("system", "sys", [1] * 9), ("task", "t", [number] * 9))
        for number, name in enumerate("ab")
    ]
    opened, steps = compute(prompts, name)
    assert opened.bases == []
    assert not any(isinstance(step, Link | Look) for step in steps)
    assert opened.exact_hits == [0, 8]

"""Chains of bundles: what stands in front of a round's base."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.collector.device import Device, drawn
from tests.collector.rounds import PAGE_SIZE, ids, prompt
from tokendance_jax.collector.chain import Chain
from tokendance_jax.collector.collective import Collective
from tokendance_jax.collector.policy import NOBODY
from tokendance_jax.collector.selection import make_selection

PREAMBLE = ids([9, 8, 7, 6, 5])
BUNDLES = st.lists(st.integers(1, 3), min_size=1, max_size=6)


def text_of(chain):
    return [part.tolist() for part in (*chain.contexts, chain.bundles[-1])]


def chained(*bundles, most=100):
    chain = Chain()
    for bundle in bundles:
        chain = chain.then(PREAMBLE, ids(bundle), most=most)
    return chain


def test_a_bundle_goes_on_from_those_before():
    assert text_of(chained([1])) == [PREAMBLE.tolist(), [1]]
    assert text_of(chained([1], [2, 2], [3])) == [PREAMBLE.tolist(), [1], [2, 2], [3]]


def test_a_long_chain_starts_anew_from_the_latest_bundle():
    assert text_of(chained([1], [2] * 4, [3], most=10)) == [PREAMBLE.tolist(), [2] * 4, [3]]
    assert text_of(chained([1], [2] * 4, [3] * 2, most=10)) == [PREAMBLE.tolist(), [3] * 2]
    # One bundle is no chain: it may be as long as it likes.
    assert text_of(chained([1] * 20, most=10)) == [PREAMBLE.tolist(), [1] * 20]


def test_another_preamble_keeps_the_latest_bundle():
    chain = chained([1], [2]).then(PREAMBLE[:2], ids([3]), most=100)
    assert text_of(chain) == [PREAMBLE[:2].tolist(), [2], [3]]


def test_a_round_again_keeps_its_place():
    chain = chained([1], [2], [3])
    for again in ([1], [2], [3]):
        assert text_of(chain.then(PREAMBLE, ids(again), most=100)) == text_of(
            chained(*[[n] for n in range(1, again[0] + 1)])
        )


@given(st.lists(BUNDLES, max_size=8), st.integers(5, 30))
def test_chains_are_never_too_long_and_end_with_the_round(bundles, most):
    chain = Chain()
    for bundle in bundles:
        chain = chain.then(PREAMBLE, ids(bundle), most=most)
        *before, last = text_of(chain)
        assert last == bundle
        assert len(before) == 1 or sum(map(len, before)) + len(last) <= most
        assert text_of(chain.then(PREAMBLE, ids(bundle), most=most)) == [*before, last]


def rounds_of(*blocks, private=((11, 12), (13,))):
    """Two agents' prompts of each round: private text, the round's block, a task."""
    return [
        [
            prompt(
                f"a{seat}",
                ("history", "memory", [*own]),
                ("shared", "out", block),
                ("task", "task", [30 + seat] * 10),
            )
            for seat, own in enumerate(private)
        ]
        for block in blocks
    ]


def serve(policy, device, prompts, *, fails=False):
    opened = policy.open(prompts, [0] * len(prompts))
    device.run(opened, drawn(np.random.default_rng(0)))
    (base,) = opened.bases
    policy.close(opened, None if fails else [p.token_ids for p in prompts])
    return base


def policy_of(device, **changes):
    selection = make_selection("none", 0)
    where = (device.pool, PAGE_SIZE, "model")
    return Collective(
        *where, base="chained", selection=selection, preamble=PREAMBLE, **changes
    )


A, B, C = [1] * 9, [2] * 6, [3] * 5


def test_bases_go_on_and_nothing_of_them_is_computed_again():
    device = Device(200)
    policy = policy_of(device)
    lanes, computed = [], []
    for prompts in rounds_of(A, B, C):
        lanes.append(serve(policy, device, prompts))
        computed.append(device.computed[NOBODY])
    assert lanes[2].token_ids.tolist() == [*PREAMBLE.tolist(), *A, *B, *C]
    assert computed == [len(PREAMBLE) + len(A), len(B), len(C)]
    first, second, _ = (lane.page.tolist() for lane in lanes)
    assert second[: len(first)] == first
    # Served again, a round reads the base that it had.
    again = serve(policy, device, rounds_of(B)[0])
    assert again.page.tolist() == second
    assert device.pool.live == 0
    device.pool.check()


def test_no_private_text_is_in_a_chain():
    pages = []
    for private in (((11, 12), (13,)), ((21, 22, 23), (24,) * 9)):
        device = Device(200)
        policy = policy_of(device)
        for prompts in rounds_of(A, B, C, private=private):
            lane = serve(policy, device, prompts)
        pages.append(device.sources(lane))
    assert pages[0] == pages[1]


def test_a_round_that_fails_is_not_in_the_chain():
    device = Device(200)
    policy = policy_of(device)
    first, second, third = rounds_of(A, B, C)
    serve(policy, device, first)
    serve(policy, device, second, fails=True)
    assert serve(policy, device, third).token_ids.tolist() == [*PREAMBLE.tolist(), *A, *C]


def test_a_chain_fits_the_model():
    device = Device(200)
    policy = policy_of(device, max_tokens=21)
    lengths = [len(serve(policy, device, prompts).token_ids) for prompts in rounds_of(A, B, C)]
    assert lengths == [14, 20, 16]

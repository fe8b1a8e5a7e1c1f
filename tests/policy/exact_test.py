import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokendance_jax.paged import OutOfPages, PagePool, PrefixCache
from tokendance_jax.policy.exact import Dense, Prefix

SIZE, PAGES = 2, 14


def ids(*values):
    return np.array(values, np.int32)


def prefix(pages=PAGES, size=SIZE):
    pool = PagePool(pages)
    cache = PrefixCache(pool, size, "model")
    return pool, cache, Prefix(pool, cache, size)


def references(pool):
    return [pool.refcount(page) for page in range(1, pool.total)]


# Few distinct tokens: prefixes often coincide. Few pages: the pool often runs short.
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)
AGENTS = st.lists(st.tuples(TOKENS, st.integers(0, 4), TOKENS), min_size=1, max_size=4)


@given(st.lists(st.tuples(AGENTS, st.booleans()), min_size=1, max_size=8))
@settings(max_examples=25)
def test_hits_hold_what_was_written(rounds):
    """Checks whole rounds against a dict from page to the tokens that its K and V come from."""
    pool, cache, policy = prefix()
    content = {}
    for agents, fails in rounds:
        lanes, written, failed = [], [], fails
        for tokens, room, answer in agents:
            before = pool.free, pool.evictable, references(pool), len(cache)
            try:
                lane = policy.open_lane(ids(*tokens), room)
            except OutOfPages:
                assert (pool.free, pool.evictable, references(pool), len(cache)) == before
                failed = True
                break
            start = int(lane.computed[0])
            assert start % SIZE == 0
            assert lane.computed.tolist() == list(range(start, len(tokens)))
            assert lane.slots.sum() >= len(tokens) + room
            # Pages that are hit were written by an earlier round, or will be written in this one.
            for end in range(SIZE, start + 1, SIZE):
                assert content[int(lane.page[end // SIZE - 1])] == tokens[:end]
            for index, page in enumerate(lane.page.tolist()[start // SIZE :], start // SIZE):
                content[page] = tokens[: (index + 1) * SIZE]
            lanes.append(lane)
            written.append(tokens + answer[:room])
            pool.check()
        assert sum(references(pool)) == sum(len(lane.page) for lane in lanes)
        for lane, tokens in zip(lanes, written, strict=True):
            own = range(int(lane.computed[0]) // SIZE, len(lane.page))
            for index in own:
                page = int(lane.page[index])
                content[page] = None if failed else tokens[: (index + 1) * SIZE]
        for lane, tokens in zip(lanes, written, strict=True):
            policy.close_lane(lane, None if failed else ids(*tokens))
            pool.check()
        assert not any(references(pool))
        if not failed:
            for tokens in written:
                hit = cache.match(ids(*tokens, 0))
                assert len(hit) == len(tokens) // SIZE
                pool.release(hit)


@given(AGENTS, st.booleans())
def test_dense_shares_nothing_and_keeps_nothing(agents, fails):
    pool = PagePool(PAGES)
    policy = Dense(pool, SIZE)
    lanes = []
    for tokens, room, _ in agents:
        try:
            lane = policy.open_lane(ids(*tokens), room)
        except OutOfPages:
            break
        assert lane.computed.tolist() == list(range(len(tokens)))
        assert len(lane.page) == -(-(len(tokens) + room) // SIZE)
        lanes.append(lane)
    held = [page for lane in lanes for page in lane.page.tolist()]
    assert len(set(held)) == len(held) == pool.live
    for lane in lanes:
        policy.close_lane(lane, None if fails else lane.token_ids)
    pool.check()
    assert pool.free == PAGES - 1


def test_prefix_reuses_pages_within_a_round():
    pool, _, policy = prefix()
    first = policy.open_lane(ids(1, 2, 3, 4, 5), 0)
    second = policy.open_lane(ids(1, 2, 3, 4, 6), 1)
    assert second.page[:2].tolist() == first.page[:2].tolist()
    assert second.page[2] != first.page[2]
    assert second.computed.tolist() == [4]
    assert [pool.refcount(page) for page in first.page.tolist()] == [2, 2, 1]
    policy.close_lane(first, first.token_ids)
    policy.close_lane(second, second.token_ids)
    assert not any(references(pool))


def test_the_same_prompt_computes_at_least_its_last_token():
    _, _, policy = prefix()
    first = policy.open_lane(ids(1, 2, 3, 4), 0)
    second = policy.open_lane(ids(1, 2, 3, 4), 0)
    assert second.computed.tolist() == [2, 3]
    assert second.page[0] == first.page[0]
    assert second.page[1] != first.page[1]


def test_prefix_reuses_prompts_and_answers_across_rounds():
    pool, cache, policy = prefix()
    lane = policy.open_lane(ids(1, 2, 3), 4)
    policy.close_lane(lane, ids(1, 2, 3, 7, 8))  # half of the second page is an answer
    assert (len(cache), pool.live, pool.evictable) == (2, 0, 2)
    again = policy.open_lane(ids(1, 2, 3, 7, 8, 9), 0)
    assert again.page[:2].tolist() == lane.page[:2].tolist()
    assert again.computed.tolist() == [4, 5]


def test_a_failed_round_forgets_what_it_did_not_write():
    pool, cache, policy = prefix()
    old = policy.open_lane(ids(1, 2), 0)
    policy.close_lane(old, old.token_ids)
    lanes = [policy.open_lane(ids(1, 2, 3, 4, 5), 2), policy.open_lane(ids(1, 2, 3, 4, 6, 7), 0)]
    assert [int(lane.computed[0]) for lane in lanes] == [2, 4]
    for lane in lanes:
        policy.close_lane(lane, None)
    assert len(cache) == 1  # the first page was written by an earlier round
    assert not any(references(pool))
    assert pool.free == PAGES - 2
    assert policy.open_lane(ids(1, 2, 3, 4, 5), 0).computed.tolist() == [2, 3, 4]


def test_a_refused_prompt_gives_its_hits_back():
    pool, cache, policy = prefix(pages=5)
    lane = policy.open_lane(ids(1, 2, 3, 4, 5), 0)
    with pytest.raises(OutOfPages):
        # Two pages are hits. Three more are needed, but only one is free.
        policy.open_lane(ids(1, 2, 3, 4, 5), 4)
    assert [pool.refcount(page) for page in lane.page.tolist()] == [1, 1, 1]
    assert (len(cache), pool.free) == (2, 1)

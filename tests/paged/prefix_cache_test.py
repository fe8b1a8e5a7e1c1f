import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tokendance_jax.paged import OutOfPages, PagePool, PrefixCache

SIZE = 2
PAGES = 11
# Few distinct tokens and short sequences: prefixes often coincide, and the pool often runs short.
SEQUENCES = st.lists(st.integers(0, 1), min_size=1, max_size=11).map(tuple)


def ids(*values):
    return np.array(values, np.int32)


def prefixes(tokens):
    """Returns what each full page of a sequence depends on: all tokens up to the page's end."""
    return [tokens[:end] for end in range(SIZE, len(tokens) + 1, SIZE)]


def blake2b(message):
    return hashlib.blake2b(message, digest_size=16).digest()


class CacheMachine(RuleBasedStateMachine):
    """Checks agents that join, share, insert and leave against a dict from prefix to page."""

    digest = staticmethod(blake2b)
    collides = False

    def __init__(self):
        super().__init__()
        self.pool = PagePool(PAGES)
        self.cache = PrefixCache(self.pool, SIZE, "model", digest=self.digest)
        self.tables = []  # (tokens, pages) of each agent
        self.content = {}  # page -> the prefix that was written to it
        self.cached = {}  # prefix -> page, as it should be without collisions

    def allocate(self, tokens, shared):
        """Adds new, written pages for the rest of a sequence; returns None if there are too few."""
        count = -(-len(tokens) // SIZE) - len(shared)
        before = self.pool.free, self.pool.evictable, self.pool.live
        try:
            fresh = self.pool.allocate(count)
        except OutOfPages:
            assert (self.pool.free, self.pool.evictable, self.pool.live) == before
            return None
        self.withdraw(fresh.tolist())
        table = np.concatenate([shared, fresh])
        for page, prefix in list(zip(table.tolist(), prefixes(tokens), strict=False))[
            len(shared) :
        ]:
            self.content[page] = prefix
        return table

    def withdraw(self, pages):
        self.cached = {prefix: page for prefix, page in self.cached.items() if page not in pages}

    def insert(self, tokens, table):
        self.cache.insert(ids(*tokens), table)
        for prefix, page in zip(prefixes(tokens), table.tolist(), strict=False):
            self.cached.setdefault(prefix, page)

    @rule(tokens=SEQUENCES, insert=st.booleans())
    def admit(self, tokens, insert):
        shared = self.cache.match(ids(*tokens))
        assert shared.dtype == np.int32
        assert len(shared) * SIZE <= len(tokens) - 1
        expected = prefixes(tokens)[: len(shared)]
        assert [self.content[page] for page in shared.tolist()] == expected
        if not self.collides:
            longest = []
            for prefix in prefixes(tokens[:-1]):
                if prefix not in self.cached:
                    break
                longest.append(self.cached[prefix])
            assert shared.tolist() == longest
        table = self.allocate(tokens, shared)
        if table is None:
            self.pool.release(shared)
            return
        self.tables.append((tokens, table))
        if insert:
            self.insert(tokens, table)

    @rule(tokens=SEQUENCES)
    def admit_without_matching(self, tokens):
        table = self.allocate(tokens, ids())
        if table is not None:
            self.tables.append((tokens, table))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def insert_late_and_twice(self, data):
        tokens, table = data.draw(st.sampled_from(self.tables))
        self.insert(tokens, table)
        size = len(self.cache)
        self.insert(tokens, table)
        assert len(self.cache) == size

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data):
        tokens, table = data.draw(st.sampled_from(self.tables))
        self.pool.retain(table)
        self.tables.append((tokens, table))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def leave(self, data):
        _, table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)

    @rule(batch=st.lists(st.integers(1, PAGES - 1), max_size=3))
    def forget(self, batch):
        self.cache.forget(ids(*batch))
        self.withdraw(batch)

    @rule(really=st.integers(0, 5))
    def clear(self, really):
        if really == 0:
            self.cache.clear()
            self.cached.clear()
            assert len(self.cache) == self.pool.evictable == 0

    @invariant()
    def is_consistent(self):
        self.pool.check()
        counts = [self.pool.refcount(page) for page in range(1, PAGES)]
        assert sum(counts) == sum(len(table) for _, table in self.tables)
        assert self.cache.hit_tokens <= self.cache.lookup_tokens
        if not self.collides:
            assert len(self.cache) == len(self.cached)


class WeakMachine(CacheMachine):
    digest = staticmethod(lambda message: bytes([blake2b(message)[0] % 5]))
    collides = True


class ConstantMachine(CacheMachine):
    digest = staticmethod(lambda message: b"")
    collides = True


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=25, stateful_step_count=40)
TestWeak = WeakMachine.TestCase
TestWeak.settings = TestCache.settings
TestConstant = ConstantMachine.TestCase
TestConstant.settings = settings(max_examples=10, stateful_step_count=30)


def make(pages=PAGES, **kwargs):
    pool = PagePool(pages)
    return pool, PrefixCache(pool, SIZE, "model", **kwargs)


@given(
    st.lists(st.lists(st.sampled_from([b"a", b"b"]), max_size=4), max_size=8),
    st.integers(0, 8),
)
def test_a_count_is_what_would_be_found_in_turn(chains, inserted):
    pool = PagePool(100)
    cache = PrefixCache(pool, 2, "model")

    def find(blocks):
        held = cache.match_blocks(blocks)
        pages = pool.extend(held, len(blocks) - len(held))
        cache.insert_blocks(blocks, pages)
        pool.release(pages)
        return len(held)

    for blocks in chains[:inserted]:
        find(blocks)
    before = len(cache), pool.free, pool.evictable
    keys = [list(cache.keys(blocks)) for blocks in chains]
    expected, alone = cache.count(keys), [cache.peek(chain) for chain in keys]
    assert (len(cache), pool.free, pool.evictable) == before
    for blocks, found in zip(chains, alone, strict=True):
        held = cache.match_blocks(blocks)
        assert len(held) == found
        pool.release(held)
    assert [find(blocks) for blocks in chains] == expected


def test_at_least_one_token_is_computed():
    pool, cache = make()
    pages = pool.allocate(2)
    cache.insert(ids(1, 2, 3, 4), pages)
    assert cache.match(ids(1, 2, 3, 4)).tolist() == pages[:1].tolist()
    assert cache.match(ids(1, 2, 3, 4, 5)).tolist() == pages.tolist()
    assert cache.match(ids(1, 2)).tolist() == []
    assert cache.match(ids()).tolist() == []
    assert (cache.hit_tokens, cache.lookup_tokens) == (6, 11)


def test_first_page_of_a_block_wins():
    pool, cache = make()
    first, second = pool.allocate(2), pool.allocate(2)
    cache.insert(ids(1, 2, 3, 4), first)
    cache.insert(ids(1, 2, 7, 8), second)
    shared = cache.match(ids(1, 2, 7, 8, 0))
    assert shared.tolist() == [first[0], second[1]]
    pool.release(shared)
    pool.release(second)
    assert (pool.free, pool.evictable) == (PAGES - 4, 1)  # second[0] was never cached


def test_children_of_an_evicted_parent_return_with_it():
    pool, cache = make(pages=5)
    parent, other, spare = pool.allocate(1), pool.allocate(1), pool.allocate(1)
    tokens = ids(1, 2, 3, 4, 5)
    cache.insert(tokens[:2], parent)
    cache.insert(tokens[:4], np.concatenate([other, spare]))  # `spare` is a child of `parent`
    pool.release(parent)
    pool.release(pool.allocate(2))  # evicts `parent`; its child is live
    assert cache.match(tokens).tolist() == []
    cache.insert(tokens[:2], other)
    assert cache.match(tokens).tolist() == [*other, *spare]


def depth(message):
    """A digest that gives every first block the key 1 and every second block the key 2."""
    return bytes([message[0] + 1]) if len(message) == 9 else bytes([0])


def test_a_child_never_follows_a_parent_of_other_tokens():
    pool, cache = make(digest=depth)
    first, second = pool.allocate(2), pool.allocate(2)
    cache.insert(ids(1, 1, 5, 5), first)
    cache.forget(first[:1])
    cache.insert(ids(2, 2), second[:1])  # gets the forgotten parent's key
    assert cache.match(ids(2, 2, 5, 5, 0)).tolist() == [second[0]]
    cache.insert(ids(2, 2, 5, 5), second)  # collides with the orphan, which stays
    assert cache.match(ids(2, 2, 5, 5, 0)).tolist() == [second[0]]
    cache.forget(second)
    cache.insert(ids(1, 1), first[:1])
    assert cache.match(ids(1, 1, 5, 5, 0)).tolist() == first.tolist()


def test_a_collision_ends_the_insertion():
    pool, cache = make(digest=depth)
    first, second = pool.allocate(1), pool.allocate(2)
    cache.insert(ids(1, 1), first)
    cache.insert(ids(2, 2, 5, 5), second)
    assert len(cache) == 1
    assert cache.match(ids(1, 1, 5, 5, 0)).tolist() == first.tolist()
    pool, cache = make(digest=lambda message: b"")
    pages = pool.allocate(2)
    cache.insert(ids(1, 2, 3, 4), pages)
    assert cache.match(ids(1, 2, 3, 4, 5)).tolist() == [pages[0]]


def test_tenants_and_namespaces_share_a_pool_but_no_pages():
    pool = PagePool(4)
    seen = []

    def spy(message):
        seen.append(blake2b(message))
        return seen[-1]

    caches = [
        PrefixCache(pool, SIZE, namespace, salt, digest=spy)
        for namespace, salt in [("model", b""), ("model", b"exact"), ("modelexact", b"")]
    ]
    for cache in caches:
        assert cache.match(ids(1, 2, 3)).tolist() == []
        cache.insert(ids(1, 2), pool.allocate(1))
    assert len(set(seen)) == 6  # a root and a block for each cache, in match as in insert
    for page, cache in enumerate(caches, start=1):
        assert cache.match(ids(1, 2, 3)).tolist() == [page]
        pool.release(ids(page, page))
    pool.allocate(3)
    assert [len(cache) for cache in caches] == [0, 0, 0]


def test_misuse_changes_nothing():
    pool, cache = make()
    pages = pool.allocate(2)
    with pytest.raises(ValueError, match="2 full pages of tokens, but 1"):
        cache.insert(ids(1, 2, 3, 4), pages[:1])
    with pytest.raises(ValueError, match="page 9 is free"):
        cache.insert(ids(1, 2, 3, 4), ids(pages[0], 9))
    with pytest.raises(ValueError, match="twice"):
        cache.insert(ids(1, 2, 3, 4), ids(1, 1))
    assert len(cache) == 0
    cache.insert(ids(1, 2), pages[:1])
    with pytest.raises(ValueError, match="page 1 is cached already"):
        cache.insert(ids(3, 4), pages[:1])
    assert len(cache) == 1
    with pytest.raises(ValueError, match="page_size"):
        PrefixCache(pool, 0, "model")


def test_a_long_orphaned_chain_is_compared_and_freed_without_recursion():
    pool, cache = make(pages=20_003)
    tokens = np.zeros(2 * 10_000 + 1, np.int32)
    first, second = pool.allocate(10_000), pool.allocate(10_000)
    cache.insert(tokens, first)
    cache.forget(first[:-1])
    cache.insert(tokens, second)
    assert cache.match(tokens).tolist() == [*second[:-1], first[-1]]
    cache.clear()
    assert len(cache) == 0

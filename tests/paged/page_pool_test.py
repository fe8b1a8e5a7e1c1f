from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tokendance_jax.paged import OutOfPages, PagePool

PAGES = 9


def ids(*pages):
    return np.array(pages, np.int32)


class PoolMachine(RuleBasedStateMachine):
    """Checks random legal and illegal operations against a dict of counts and a list of pages."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(PAGES)
        self.counts = dict.fromkeys(range(1, PAGES), 0)
        self.cached = set()
        self.evictable = []  # the next page to evict first
        self.evicted = []  # as reported by the hook

    def attempt(self, operation, legal):
        """Runs an operation. An illegal one must raise; the invariant then checks the state."""
        if legal:
            operation()
        else:
            with pytest.raises(ValueError, match="page"):
                operation()
        return legal

    @rule(count=st.integers(0, PAGES))
    def allocate(self, count):
        free = [p for p, n in self.counts.items() if n == 0 and p not in self.cached]
        if count > len(free) + len(self.evictable):
            with pytest.raises(OutOfPages) as error:
                self.pool.allocate(count)
            assert error.value.requested == count
            assert error.value.free == len(free)
            assert error.value.evictable == len(self.evictable)
            assert error.value.total == PAGES
            return
        self.evicted.clear()
        pages = self.pool.allocate(count)
        assert pages.dtype == np.int32
        assert pages.shape == (count,)
        gone = max(0, count - len(free))
        assert self.evicted == self.evictable[:gone]
        expected = set(self.evicted)
        assert set(pages.tolist()) - set(free) == expected
        assert len(set(pages.tolist())) == count
        del self.evictable[:gone]
        self.cached -= expected
        self.counts.update(dict.fromkeys(pages.tolist(), 1))

    @rule(batch=st.lists(st.integers(0, PAGES), max_size=6))
    def retain(self, batch):
        legal = all(self.counts.get(p, 0) or p in self.evictable for p in batch)
        if self.attempt(lambda: self.pool.retain(ids(*batch)), legal):
            for page in batch:
                self.counts[page] += 1
            self.evictable = [p for p in self.evictable if p not in batch]

    @rule(batch=st.lists(st.integers(0, PAGES), max_size=6))
    def release_any(self, batch):
        legal = all(n <= self.counts.get(p, 0) for p, n in Counter(batch).items())
        if self.attempt(lambda: self.pool.release(ids(*batch)), legal):
            for page in reversed(batch):
                self.counts[page] -= 1
                if self.counts[page] == 0 and page in self.cached:
                    self.evictable.append(page)

    @rule(data=st.data())
    def release_live(self, data):
        held = list(Counter(self.counts).elements())
        batch = data.draw(st.permutations(held)) if held else []
        self.release_any(batch[: data.draw(st.integers(0, len(batch)))])

    @rule(batch=st.lists(st.integers(0, PAGES), max_size=3))
    def mark(self, batch):
        legal = len(set(batch)) == len(batch) and all(
            self.counts.get(p, 0) and p not in self.cached for p in batch
        )
        if self.attempt(lambda: self.pool.mark_cached(ids(*batch), self.evicted.append), legal):
            self.cached.update(batch)

    @rule(batch=st.lists(st.integers(0, PAGES), max_size=2))
    def unmark(self, batch):
        legal = len(set(batch)) == len(batch) and self.cached.issuperset(batch)
        if self.attempt(lambda: self.pool.unmark_cached(ids(*batch)), legal):
            self.cached.difference_update(batch)
            self.evictable = [p for p in self.evictable if p not in batch]

    @invariant()
    def agrees_with_the_model(self):
        self.pool.check()
        assert {p: self.pool.refcount(p) for p in range(1, PAGES)} == self.counts
        assert self.pool.total == PAGES
        assert self.pool.evictable == len(self.evictable)
        assert self.pool.live == sum(n > 0 for n in self.counts.values())
        assert self.pool.free + self.pool.evictable + self.pool.live + 1 == PAGES


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=25, stateful_step_count=40)


def test_allocates_low_ids_first_and_never_page_0():
    assert PagePool(5).allocate(4).tolist() == [1, 2, 3, 4]


def test_the_end_of_a_chain_is_evicted_first_and_free_pages_go_before():
    pool = PagePool(8)
    evicted = []
    first, second = pool.allocate(3), pool.allocate(3)
    pool.mark_cached(np.concatenate([first, second]), evicted.append)
    pool.release(second)
    pool.release(first)
    assert pool.allocate(1).tolist() == [7]
    assert evicted == []
    pool.allocate(4)
    assert evicted == [6, 5, 4, 3]
    pool.check()


def test_a_retained_page_is_safe_from_eviction_and_rejoins_at_the_end():
    pool = PagePool(4)
    pages = pool.allocate(3)
    evicted = []
    pool.mark_cached(pages, evicted.append)
    pool.release(pages)  # eviction order: 3, 2, 1
    pool.retain(ids(3))
    assert pool.allocate(1).tolist() == [2]
    pool.release(ids(3))
    assert pool.allocate(2).tolist() == [1, 3]
    assert evicted == [2, 1, 3]


def test_out_of_pages_names_the_numbers_and_the_remedy():
    pool = PagePool(4)
    pages = pool.allocate(2)
    pool.mark_cached(pages, lambda page: None)
    pool.release(pages)
    message = "9 KV pages .* of 4 only 1 are free and 2 evictable: raise kv_memory"
    with pytest.raises(OutOfPages, match=message):
        pool.allocate(9)


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="pages"):
        PagePool(1)
    pool = PagePool(4)
    with pytest.raises(ValueError, match="-1"):
        pool.allocate(-1)
    for page in (-1, 0, 4):
        with pytest.raises(ValueError, match=r"is not one of 1 \.\. 3"):
            pool.refcount(page)
    page = pool.allocate(1)
    with pytest.raises(ValueError, match="page 1 has 1 references, 2 were released"):
        pool.release(ids(1, 1))
    assert pool.refcount(1) == 1
    pool.release(page)
    with pytest.raises(ValueError, match="page 1 is free"):
        pool.retain(page)
    page = pool.allocate(1)
    pool.mark_cached(page, lambda page: None)
    with pytest.raises(ValueError, match="distinct"):
        pool.unmark_cached(ids(1, 1))
    pool.unmark_cached(page)
    pool.check()

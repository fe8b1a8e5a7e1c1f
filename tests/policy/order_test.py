from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokendance_jax.policy.order import canonical_order

KEYS = st.integers(0, 7).map(lambda number: b"%d" % number)
SEQUENCES = st.lists(st.lists(KEYS, max_size=9), max_size=6)


def keys(numbers):
    return [b"%d" % number for number in numbers]


@given(SEQUENCES, st.randoms())
def test_every_key_once_whatever_the_order_of_the_agents(sequences, random):
    ordered = canonical_order(sequences)
    assert sorted(ordered) == sorted({key for sequence in sequences for key in sequence})
    random.shuffle(sequences)
    assert canonical_order(sequences) == ordered


@given(st.permutations(keys(range(6))), st.integers(1, 5))
def test_equal_orders_are_kept(sequence, agents):
    assert canonical_order([sequence] * agents) == sequence


@given(st.permutations(keys(range(6))), st.integers(2, 4), st.permutations(keys(range(6))))
def test_one_agent_that_permutes_its_blocks_changes_nothing(sequence, others, permuted):
    assert canonical_order([*[sequence] * others, permuted]) == sequence


@given(st.permutations(keys(range(6))), st.sets(KEYS))
def test_a_subset_in_order_changes_nothing(sequence, some):
    assert canonical_order([sequence, [key for key in sequence if key in some]]) == sequence


def breaks(order, sequence):
    """Counts how often an agent's next block is not the next that it sees in canonical order."""
    seen = [key for key in order if key in sequence]
    following = dict(pairwise(seen))
    return sum(following.get(left) != right for left, right in pairwise(sequence))


@pytest.mark.parametrize("agents", range(3, 9))
def test_own_block_first(agents):
    everybody = range(agents)
    sequences = [keys([own, *(other for other in everybody if other != own)]) for own in everybody]
    order = canonical_order(sequences)
    assert order == keys(everybody)
    # The order breaks at most behind the own block and at the own block's canonical place.
    assert all(breaks(order, sequence) <= 2 for sequence in sequences)
    assert all(breaks(order, sequence[1:]) == 0 for sequence in sequences)


@pytest.mark.parametrize("agents", range(3, 9))
def test_own_block_left_out_and_the_others_rotated(agents):
    sequences = [keys((own + step) % agents for step in range(1, agents)) for own in range(agents)]
    order = canonical_order(sequences)
    numbers = [int(key) for key in order]
    assert [right for _, right in pairwise(numbers)] == [
        (left + 1) % agents for left in numbers[:-1]
    ]
    assert all(breaks(order, sequence) <= 1 for sequence in sequences)


def test_neighbours_of_most_agents_stand_together():
    sequences = [keys([1, 2, 3]), keys([3, 1, 2]), keys([2, 3, 1])]
    # Two agents see each of the three pairs, but a chain holds only two pairs. All keys have the
    # same mean place, so the order of the keys decides.
    assert canonical_order(sequences) == keys([1, 2, 3])
    assert canonical_order([*sequences, keys([3, 1])]) == keys([3, 1, 2])

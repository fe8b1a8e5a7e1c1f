"""The canonical order of a round's shared segments."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise


def canonical_order(sequences: Sequence[Sequence[bytes]]) -> list[bytes]:
    """Merges the orders in which agents see shared segments into one order for all.

    Segments that most agents see one after the other are neighbours in this order. Their pages
    then have one frame in the prompts of these agents, and each segment is computed behind the
    text that most of these agents see before it. Pairs of neighbours are joined greedily, the most
    frequent first. A pair is skipped if one of its segments already has another neighbour on that
    side, or if the pair would close a cycle. The chains are then sorted by their mean place. The
    result does not depend on the order of the sequences.

    Args:
      sequences: keys of the segments that each agent sees, in its order; repeats are allowed.

    Returns:
      Every key once.
    """
    places = defaultdict(list)
    pairs: Counter[tuple[bytes, bytes]] = Counter()
    for sequence in sequences:
        for place, key in enumerate(sequence):
            places[key].append(place)
        for left, right in pairwise(sequence):
            if left != right:
                pairs[left, right] += 1
    # Sum integers: the mean of floats would depend on the order of the agents.
    mean = {key: sum(found) / len(found) for key, found in places.items()}

    chain_of = {key: [key] for key in places}

    def rank(pair: tuple[bytes, bytes]) -> tuple[int, float, float, tuple[bytes, bytes]]:
        left, right = pair
        return -pairs[pair], abs(mean[right] - mean[left]), mean[left], pair

    for left, right in sorted(pairs, key=rank):
        head, tail = chain_of[left], chain_of[right]
        if head is not tail and head[-1] == left and tail[0] == right:
            head += tail
            for key in tail:
                chain_of[key] = head
    chains = {id(chain): chain for chain in chain_of.values()}.values()
    ordered = sorted(
        chains, key=lambda chain: (sum(mean[k] for k in sorted(chain)) / len(chain), chain)
    )
    return [key for chain in ordered for key in chain]

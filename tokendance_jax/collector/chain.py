"""Bases that go on from each other: what earlier rounds shared stands in front of the next bundle.

An agent reads a round's blocks behind text of its own that grew in the rounds before. A base behind
the bundles of these rounds is nearer to that than one behind a preamble alone, and costs nothing
while their pages are held. It still depends on shared text alone.
"""

import dataclasses

import numpy as np
from jaxtyping import Int32

_NO_TOKENS = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """Bundles in the order in which their bases go on from each other.

    Attributes:
      preamble: tokens in front of the first.
      bundles: the token ids of each; the last is that of the latest round.
    """

    preamble: Int32[np.ndarray, " preamble"] = dataclasses.field(default_factory=_NO_TOKENS.copy)
    bundles: tuple[Int32[np.ndarray, " _"], ...] = ()

    def then(
        self,
        preamble: Int32[np.ndarray, " preamble"],
        bundle: Int32[np.ndarray, " bundle"],
        *,
        most: int,
    ) -> "Chain":
        """The chain that ends with a round's bundle.

        Where it would become too long, or the preamble is another, it starts anew from the latest
        bundle. A bundle that is in the chain keeps its place, so that a round that is served again
        reads the same base.

        Args:
          preamble: the round's preamble.
          bundle: the round's bundle.
          most: tokens that the chain may have, if it is more than one bundle.
        """
        for index, earlier in enumerate(self.bundles):
            if np.array_equal(earlier, bundle) and np.array_equal(preamble, self.preamble):
                return Chain(preamble, self.bundles[: index + 1])
        longest = self.bundles if np.array_equal(preamble, self.preamble) else self.bundles[-1:]
        for before in (longest, self.bundles[-1:], ()):
            if len(preamble) + sum(map(len, before)) + len(bundle) <= most:
                break
        return Chain(preamble, (*before, bundle))

    @property
    def contexts(self) -> tuple[Int32[np.ndarray, " _"], ...]:
        """What stands in front of the last bundle: the preamble, and the bundles before it."""
        return (self.preamble, *self.bundles[:-1])


"""What Master-Mirror storage costs, in bytes, against dense caches."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Compression:
    """Bytes of one mirror, or of all mirrors of a round, beside those of dense caches.

    Attributes:
      dense_bytes: the pages that dense caches of the same tokens fill, each agent by itself.
      base_bytes: base pages, each once: those a mirror reads, or those of the round; and the key
        bias of quantised pages.
      patch_bytes: patch pages.
      private_bytes: private pages.
      index_bytes: entry tables and token ids.
      exact_bytes: what would be held if all pages were as the pool has them.
    """

    dense_bytes: int
    base_bytes: int
    patch_bytes: int
    private_bytes: int
    index_bytes: int
    exact_bytes: int

    @property
    def own_bytes(self) -> int:
        """What the mirrors hold besides the base."""
        return self.patch_bytes + self.private_bytes + self.index_bytes

    @property
    def stored_bytes(self) -> int:
        """All that is held: the base and what the mirrors hold besides it."""
        return self.base_bytes + self.own_bytes

    @property
    def mirror_ratio(self) -> float:
        """Dense bytes over patch, private and index bytes: the base is not counted.

        The figure per mirror of TokenDance (arXiv 2604.03143). Of a round it is the mean over the
        mirrors, weighted by the bytes that each of them holds.
        """
        return self.dense_bytes / self.own_bytes

    @property
    def round_ratio(self) -> float:
        """Dense bytes over all stored bytes, the base included."""
        return self.dense_bytes / self.stored_bytes

    @property
    def form_ratio(self) -> float:
        """What would be held to the bit over what is held: 1 where it is."""
        return self.exact_bytes / self.stored_bytes

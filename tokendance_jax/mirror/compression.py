"""The size of Master-Mirror storage in bytes, compared with dense caches."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Compression:
    """Bytes of one mirror, or of all mirrors of a round, compared with dense caches.

    Attributes:
      dense_bytes: pages that dense caches of the same tokens fill, with one cache per agent.
      base_bytes: base pages, each counted once: those that the mirror reads, or those of the round.
        Includes the key bias of quantised pages.
      patch_bytes: patch pages.
      private_bytes: private pages.
      index_bytes: entry tables and token ids.
      exact_bytes: the total if all pages were stored exactly as in the pool.
    """

    dense_bytes: int
    base_bytes: int
    patch_bytes: int
    private_bytes: int
    index_bytes: int
    exact_bytes: int

    @property
    def own_bytes(self) -> int:
        """Bytes of the mirrors without the base."""
        return self.patch_bytes + self.private_bytes + self.index_bytes

    @property
    def stored_bytes(self) -> int:
        """All stored bytes: the base and the mirrors' own bytes."""
        return self.base_bytes + self.own_bytes

    @property
    def mirror_ratio(self) -> float:
        """Dense bytes over patch, private and index bytes, without the base.

        This is TokenDance's figure per mirror (arXiv 2604.03143). For a round it is the mean over
        the mirrors, weighted by `own_bytes` of each mirror.
        """
        return self.dense_bytes / self.own_bytes

    @property
    def round_ratio(self) -> float:
        """Dense bytes over all stored bytes, including the base."""
        return self.dense_bytes / self.stored_bytes

    @property
    def form_ratio(self) -> float:
        """Bytes of exact storage over stored bytes; 1 if the pages are stored exactly."""
        return self.exact_bytes / self.stored_bytes

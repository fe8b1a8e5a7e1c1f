"""Static sizes for a varying number of rows, so that few programs are compiled."""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Buckets:
    """Sizes that double from `minimum` up to exactly `budget`.

    Laws: sizes are sorted and unique, each at most twice the one before, and there are
    ceil(log2(budget / minimum)) + 1 of them. TPU serving engines bucket their tokens in the same
    way (vllm-project/tpu-inference); splitting the tail is ours.

    Attributes:
      minimum: smallest size, in rows.
      budget: largest size, in rows; most rows of one call.
    """

    minimum: int
    budget: int

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
          ValueError: not 1 <= minimum <= budget.
        """
        if not 1 <= self.minimum <= self.budget:
            raise ValueError(f"need 1 <= minimum <= budget, got {self.minimum}, {self.budget}")

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The sizes in ascending order."""
        sizes = []
        size = self.minimum
        while size < self.budget:
            sizes.append(size)
            size *= 2
        return (*sizes, self.budget)

    def fit(self, n: int) -> int:
        """Smallest size that holds n rows: below 2 n, or the minimum.

        Raises:
          ValueError: n is negative or above the budget.
        """
        if not 0 <= n <= self.budget:
            raise ValueError(f"{n} rows do not fit the budget of {self.budget} rows")
        return self.sizes[bisect_left(self.sizes, n)]

    def upto(self, n: int) -> tuple[int, ...]:
        """The sizes that numbers from 0 to n take.

        Raises:
          ValueError: n is negative or above the budget.
        """
        return self.sizes[: self.sizes.index(self.fit(n)) + 1]

    def cover(self, n: int) -> list[int]:
        """Sizes of the calls that take n rows in order.

        All calls but those of the tail have the size of the budget. The tail is one call, or two
        when one would pad by more than a quarter of the tail's rows and two pad less.

        Laws: the sum is at least n and grows with n; padding is at most n / 3 or `minimum` - 1
        rows, whichever is more; the cover of a size is that size. Where the budget is the minimum
        times a power of two, the cover of a cover's sum is the same cover.

        Args:
          n: number of rows.

        Returns:
          Sizes in descending order; none for no rows.

        Raises:
          ValueError: n is negative.
        """
        if n < 0:
            raise ValueError(f"cannot cover {n} rows")
        full, tail = divmod(n, self.budget)
        return [self.budget] * full + self._cover_tail(tail)

    def _cover_tail(self, n: int) -> list[int]:
        if n == 0:
            return []
        whole = self.fit(n)
        if whole == self.minimum or 4 * (whole - n) <= n:
            return [whole]
        # Two of any smaller size cannot hold n, so this is the only pair that may save rows.
        large = self.sizes[self.sizes.index(whole) - 1]
        small = self.fit(n - large)
        return [large, small] if large + small < whole else [whole]

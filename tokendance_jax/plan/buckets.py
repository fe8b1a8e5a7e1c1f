"""Static sizes that a varying number of rows is padded to, so that few programs are compiled."""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Buckets:
    """Sizes that double from `minimum` up to exactly `budget`.

    The sizes are sorted and unique, each is at most twice the size before it, and there are
    ceil(log2(budget / minimum)) + 1 of them. TPU serving engines use such buckets for their
    tokens (vllm-project/tpu-inference); splitting the tail in two (see `cover`) is an addition of
    this project.

    Attributes:
      minimum: smallest size, in rows.
      budget: largest size, in rows, and so the most rows of one call.
    """

    minimum: int
    budget: int

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
          ValueError: `minimum` is below 1 or above `budget`.
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
        """Returns the smallest size that holds n rows. It is below 2 n, or the minimum.

        Raises:
          ValueError: n is negative or above the budget.
        """
        if not 0 <= n <= self.budget:
            raise ValueError(f"{n} rows do not fit the budget of {self.budget} rows")
        return self.sizes[bisect_left(self.sizes, n)]

    def upto(self, n: int) -> tuple[int, ...]:
        """Returns the sizes that `fit` returns for numbers from 0 to n.

        Raises:
          ValueError: n is negative or above the budget.
        """
        return self.sizes[: self.sizes.index(self.fit(n)) + 1]

    def cover(self, n: int) -> list[int]:
        """Splits n rows into calls, in order, and returns the sizes of the calls.

        All calls except those of the tail have the size of the budget. The tail is the remaining
        rows. It takes one call, or two if one would pad it by more than a quarter of its rows and
        two pad less.

        The sum of the sizes is at least n and never decreases as n grows. Padding is at most n / 3
        rows or `minimum` - 1 rows, whichever is more. The cover of a size is that size. If the
        budget is the minimum times a power of two, the cover of a cover's sum is the same cover.

        Args:
          n: number of rows.

        Returns:
          Sizes in descending order; an empty list for 0 rows.

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
        # Two calls smaller than `large` cannot hold n rows, so no other pair can save rows.
        large = self.sizes[self.sizes.index(whole) - 1]
        small = self.fit(n - large)
        return [large, small] if large + small < whole else [whole]

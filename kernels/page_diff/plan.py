"""What a page diff compares, and what it finds."""

import dataclasses
from typing import Literal, no_type_check

import jax
import numpy as np

from tokendance_jax.kernels.lanes import Array

# Implementations return f32 [SCORES, layers, comparisons], in the order of `Deviation`. Where a
# difference is no number, the sum of squares is none either; the largest may be anything.
SCORES = 4


@no_type_check  # JAX also builds pytrees of stand-ins that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiffPlan:
    """Comparisons of base pages with siblings, page by page: so a base page is read once.

    Attributes:
      page: i32 [pages]; the base pages that are read.
      begin: i32 [pages + 1]; comparisons `begin[i]` to `begin[i + 1]` are those of `page[i]`.
      sibling: i32 [comparisons]; pages that are compared with them.
      frame: i32 [comparisons]; positions by which the base page's keys are rotated on: those of
        the sibling minus those of the base page.
      first: i32 [comparisons]; first slot that is compared.
      slots: i32 [comparisons]; how many are.
    """

    page: Array
    begin: Array
    sibling: Array
    frame: Array
    first: Array
    slots: Array

    @classmethod
    def of_comparisons(
        cls,
        base: np.ndarray,
        sibling: np.ndarray,
        frame: np.ndarray,
        first: np.ndarray,
        slots: np.ndarray,
    ) -> "DiffPlan":
        """Groups comparisons by their base pages.

        Args:
          base: i32 [comparisons]; base pages, ascending.
          sibling: i32 [comparisons]; see `DiffPlan.sibling`, and so on.
          frame: i32 [comparisons].
          first: i32 [comparisons].
          slots: i32 [comparisons].

        Raises:
          ValueError: the base pages do not ascend.
        """
        if (np.diff(base) < 0).any():
            raise ValueError("base: pages do not ascend; order comparisons by their base pages")
        page, begin = np.unique(base, return_index=True)
        columns = page, np.append(begin, len(base)), sibling, frame, first, slots
        return cls(*(column.astype(np.int32) for column in columns))

    def padded(self, pages: int, comparisons: int) -> "DiffPlan":
        """The same comparisons in arrays of these sizes, which are at least its own."""

        def fill(name: str, size: int, mode: Literal["constant", "edge"] = "constant") -> Array:
            column = np.asarray(getattr(self, name))
            return np.pad(column, (0, size - len(column)), mode=mode)

        columns = (fill(name, comparisons) for name in ("sibling", "frame", "first", "slots"))
        return DiffPlan(fill("page", pages), fill("begin", pages + 1, "edge"), *columns)


@no_type_check  # JAX also builds pytrees of stand-ins that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deviation:
    """How far siblings are from their base pages, in the order of the plan's comparisons.

    Scores are given for each layer, over its heads and the slots that are compared, so that a
    selection can weigh layers; a maximum or a sum over layers is that of the whole page. Where a
    difference is no number, they are infinite. What a plan is filled up with has zeros.

    Attributes:
      k_largest: f32 [layers, comparisons]; the largest absolute difference of a number of a key.
      k_squares: f32 [layers, comparisons]; the sum of squared differences of keys.
      v_largest: as k_largest, of values.
      v_squares: as k_squares, of values.
      far: bool [comparisons]; the patch bitmap: whether any number is further than the threshold,
        or infinitely far.
    """

    k_largest: jax.Array
    k_squares: jax.Array
    v_largest: jax.Array
    v_squares: jax.Array
    far: jax.Array

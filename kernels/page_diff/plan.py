"""The plan of a page diff, and its result."""

import dataclasses
from typing import Literal, no_type_check

import jax
import numpy as np

from tokendance_jax.kernels.lanes import Array

# Implementations return f32 [SCORES, layers, comparisons], in the order of `Deviation`. If a
# difference is NaN, the sum of squares is NaN too, and the largest difference may be anything.
SCORES = 4


@no_type_check  # JAX also builds these pytrees with leaves that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiffPlan:
    """Comparisons of base pages with siblings, grouped so that each base page is read once.

    Attributes:
      page: i32 [pages]; the base pages that are read.
      begin: i32 [pages + 1]; comparisons `begin[i]` to `begin[i + 1]` are with `page[i]`.
      sibling: i32 [comparisons]; the page that is compared with the base page.
      frame: i32 [comparisons]; by how many positions the base page's keys are rotated: the
        sibling's positions minus the base page's.
      first: i32 [comparisons]; the first slot to compare.
      slots: i32 [comparisons]; how many slots to compare.
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
        """Groups comparisons by base page.

        Args:
          base: i32 [comparisons]; base pages, in ascending order.
          sibling: i32 [comparisons]; see `DiffPlan`.
          frame: i32 [comparisons]; see `DiffPlan`.
          first: i32 [comparisons]; see `DiffPlan`.
          slots: i32 [comparisons]; see `DiffPlan`.

        Raises:
          ValueError: the base pages are not in ascending order.
        """
        if (np.diff(base) < 0).any():
            raise ValueError("base: pages do not ascend; order comparisons by their base pages")
        page, begin = np.unique(base, return_index=True)
        columns = page, np.append(begin, len(base)), sibling, frame, first, slots
        return cls(*(column.astype(np.int32) for column in columns))

    def padded(self, pages: int, comparisons: int) -> "DiffPlan":
        """Pads the arrays to these sizes, which must be at least their own."""

        def fill(name: str, size: int, mode: Literal["constant", "edge"] = "constant") -> Array:
            column = np.asarray(getattr(self, name))
            return np.pad(column, (0, size - len(column)), mode=mode)

        columns = (fill(name, comparisons) for name in ("sibling", "frame", "first", "slots"))
        return DiffPlan(fill("page", pages), fill("begin", pages + 1, "edge"), *columns)


@no_type_check  # JAX also builds these pytrees with leaves that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deviation:
    """How far siblings are from their base pages, in the order of the plan's comparisons.

    Each score is given per layer, over its heads and the compared slots, so that a selection can
    weight layers. The maximum or sum over layers is the score of the whole page. Scores are
    infinite if a difference is NaN, and zero for a plan's padding.

    Attributes:
      k_largest: f32 [layers, comparisons]; the largest absolute difference between keys.
      k_squares: f32 [layers, comparisons]; the sum of squared differences between keys.
      v_largest: as k_largest, for values.
      v_squares: as k_squares, for values.
      far: bool [comparisons]; the patch bitmap: whether any difference exceeds the threshold or is
        infinite.
    """

    k_largest: jax.Array
    k_squares: jax.Array
    v_largest: jax.Array
    v_squares: jax.Array
    far: jax.Array

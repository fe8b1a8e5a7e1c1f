"""Compares pages that hold the same tokens: how far they deviate, and which need a patch."""

from typing import Protocol

import jax
import jax.numpy as jnp

from tokendance_jax.kernels import dispatch
from tokendance_jax.kernels.lanes import Array
from tokendance_jax.kernels.page_diff.mosaic_gpu import page_diff_mosaic_gpu
from tokendance_jax.kernels.page_diff.mosaic_tpu import page_diff_mosaic_tpu
from tokendance_jax.kernels.page_diff.plan import Deviation, DiffPlan
from tokendance_jax.kernels.page_diff.xla import page_diff_xla
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import Rope


class PageDiff(Protocol):
    """The signature of `page_diff`'s implementations.

    They return the scores of `reference.page_diff_reference`.
    """

    def __call__(
        self, kv: PagedKV, siblings: PagedKV | None, plan: DiffPlan, *, rope: Rope
    ) -> jax.Array: ...


OP = dispatch.Op[PageDiff](
    "page_diff",
    xla=page_diff_xla,
    mosaic_gpu=page_diff_mosaic_gpu,
    mosaic_tpu=page_diff_mosaic_tpu,
)


def page_diff(
    kv: PagedKV,
    siblings: PagedKV | None,
    plan: DiffPlan,
    *,
    rope: Rope,
    threshold: float | Array,
    implementation: str | None = None,
) -> Deviation:
    """Compares the keys and values of base pages with those of siblings, which may differ in frame.

    A base page's keys are rotated to the sibling's positions in float32 and compared without
    rounding. Each base page is read once for all its siblings, and each sibling is read once.

    Args:
      kv: the pool, with the base pages.
      siblings: pages outside the pool, shaped like the pool except for the number of pages; None:
        the siblings are pages of the pool itself.
      plan: the comparisons.
      rope: the rotary embedding.
      threshold: a sibling is far if any absolute difference exceeds this.
      implementation: see `dispatch.Op.run`.

    Returns:
      The deviation of each comparison.

    Raises:
      ValueError: the siblings do not have the pool's shape and dtype.
      NotImplementedError: the named implementation does not support these arguments.
    """
    if siblings is not None:
        _check(kv, siblings)
    scores = OP.run(implementation, lambda run: run(kv, siblings, plan, rope=rope))
    largest, squares = (scores[kind::2] for kind in range(2))
    unknown = jnp.isnan(squares)
    largest, squares = (jnp.where(unknown, jnp.inf, x) for x in (largest, squares))
    far = (largest > jnp.asarray(threshold, jnp.float32)) | jnp.isinf(largest)
    return Deviation(
        k_largest=largest[0],
        k_squares=squares[0],
        v_largest=largest[1],
        v_squares=squares[1],
        far=far.any(axis=(0, 1)),
    )


def _check(kv: PagedKV, siblings: PagedKV) -> None:
    layers, _, *slot_shape = kv.k.shape
    expected = layers, siblings.k.shape[1], *slot_shape
    for pages in (siblings.k, siblings.v):
        if pages.shape != expected or pages.dtype != kv.k.dtype:
            raise ValueError(
                f"siblings: pages {pages.shape} of {pages.dtype} for a pool {kv.k.shape} of "
                f"{kv.k.dtype}; all but the number of pages must agree"
            )

"""Comparing pages that hold the same tokens: which of them need a patch, and how far they are."""

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


class PageDiff(Protocol):
    """The signature of `page_diff`'s implementations, which give `reference`'s scores."""

    def __call__(
        self, kv: PagedKV, siblings: PagedKV | None, plan: DiffPlan, *, theta: float
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
    theta: float,
    threshold: float | Array,
    implementation: str | None = None,
) -> Deviation:
    """Compares K and V of base pages with those of their siblings, in other frames too.

    A base page's keys are rotated on to the sibling's positions in float32, and compared without
    rounding. A base page is read once for all its siblings, and every sibling once.

    Args:
      kv: the pool, with the base pages.
      siblings: pages outside the pool, shaped as the pool's but for their number; None: siblings
        are pages of the pool itself.
      plan: what is compared.
      theta: base of the rotary frequencies.
      threshold: the largest absolute difference of a number that is near.
      implementation: see `dispatch.Op.run`.

    Returns:
      The deviation of each comparison.

    Raises:
      ValueError: the siblings are not of the pool's shape and dtype.
      NotImplementedError: the named implementation cannot take these shapes.
    """
    if siblings is not None:
        _check(kv, siblings)
    scores = OP.run(implementation, lambda run: run(kv, siblings, plan, theta=theta))
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

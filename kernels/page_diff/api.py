"""Comparing pages that hold the same tokens: which of them need a patch, and how far they are."""

import jax
import jax.numpy as jnp

from tokendance_jax.kernels import dispatch
from tokendance_jax.kernels.lanes import Array
from tokendance_jax.kernels.page_diff.mosaic_gpu import page_diff_mosaic_gpu
from tokendance_jax.kernels.page_diff.mosaic_tpu import page_diff_mosaic_tpu
from tokendance_jax.kernels.page_diff.plan import Deviation, DiffPlan
from tokendance_jax.kernels.page_diff.xla import page_diff_xla


def page_diff(
    k_pool: jax.Array,
    v_pool: jax.Array,
    siblings: tuple[Array, Array] | None,
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
      k_pool: [layers, pages, page_size, kv_heads, head_dim], in its storage dtype; base pages.
      v_pool: as k_pool.
      siblings: K and V of pages outside the pool, shaped as the pool's but for their number; None:
        siblings are pages of the pool itself.
      plan: what is compared.
      theta: base of the rotary frequencies.
      threshold: the largest absolute difference of a number that is near.
      implementation: see `dispatch.call`.

    Returns:
      The deviation of each comparison.

    Raises:
      ValueError: the siblings are not of the pool's shape and dtype.
      NotImplementedError: the named implementation cannot take these shapes.
    """
    if siblings is not None:
        _check(k_pool, siblings)
    scores = dispatch.call(
        "page_diff",
        implementation,
        {
            "xla": page_diff_xla,
            "mosaic_gpu": page_diff_mosaic_gpu,
            "mosaic_tpu": page_diff_mosaic_tpu,
        },
        k_pool,
        v_pool,
        siblings,
        plan,
        theta=theta,
    )
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


def _check(k_pool: jax.Array, siblings: tuple[Array, Array]) -> None:
    layers, _, *slot_shape = k_pool.shape
    expected = layers, siblings[0].shape[1], *slot_shape
    for pages in siblings:
        if pages.shape != expected or pages.dtype != k_pool.dtype:
            raise ValueError(
                f"siblings: pages {pages.shape} of {pages.dtype} for a pool {k_pool.shape} of "
                f"{k_pool.dtype}; all but the number of pages must agree"
            )

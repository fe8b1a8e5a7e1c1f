"""Restoring pages into the pool: from the pool itself, or from pages at rest."""

import jax

from tokendance_jax.kernels import dispatch
from tokendance_jax.kernels.sparse_restore.mosaic_gpu import sparse_restore_mosaic_gpu
from tokendance_jax.kernels.sparse_restore.mosaic_tpu import sparse_restore_mosaic_tpu
from tokendance_jax.kernels.sparse_restore.plan import RestorePlan, Source
from tokendance_jax.kernels.sparse_restore.xla import sparse_restore_xla


def sparse_restore(
    k_pool: jax.Array,
    v_pool: jax.Array,
    source: Source | None,
    plan: RestorePlan,
    *,
    theta: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Copies pieces of pages to slots of the pool, with keys rotated to where they go.

    Base pages and the patches that take their place are pieces alike: a mirror's plan names the
    patch page where it has one, and the base page elsewhere. A source page is read once, however
    many mirrors show it, and every slot is written once: the fused restore of TokenDance
    (arXiv 2604.03143, section 4.3). In place when the pools are donated.

    Args:
      k_pool: [layers, pages, page_size, kv_heads, head_dim], in its storage dtype.
      v_pool: as k_pool.
      source: pages outside the pool; None: pages of the pool itself, of which none is written too.
      plan: what goes where.
      theta: base of the rotary frequencies.
      implementation: see `dispatch.call`.

    Returns:
      The pools with the pieces written.

    Raises:
      ValueError: the source's pages are not of the pool's shape, or its arrays do not fit each
        other.
      NotImplementedError: the named implementation cannot take these shapes.
    """
    if source is not None:
        _check(k_pool, source)
    if plan.first.shape[0] == 0:
        return k_pool, v_pool
    return dispatch.call(
        "sparse_restore",
        implementation,
        {
            "xla": sparse_restore_xla,
            "mosaic_gpu": sparse_restore_mosaic_gpu,
            "mosaic_tpu": sparse_restore_mosaic_tpu,
        },
        k_pool,
        v_pool,
        source,
        plan,
        theta=theta,
    )


def _check(k_pool: jax.Array, source: Source) -> None:
    layers, _, *slot_shape = k_pool.shape
    pages = source.k.shape[1]
    if source.k.shape != (layers, pages, *slot_shape) or source.v.shape != source.k.shape:
        raise ValueError(
            f"source: pages {source.k.shape} and {source.v.shape} for a pool {k_pool.shape}; "
            "all but the number of pages must agree"
        )
    quantised = source.k.dtype == "int8"
    if not quantised and source.k.dtype != k_pool.dtype:
        raise ValueError(
            f"source: {source.k.dtype} pages for a pool of {k_pool.dtype}; store them as int8 "
            "or in the pool's dtype"
        )
    for scale in (source.k_scale, source.v_scale):
        if (None if scale is None else scale.shape) != (source.k.shape[:-1] if quantised else None):
            raise ValueError(
                "source: int8 pages come with k_scale and v_scale, one number for each slot and "
                "head; other pages come without"
            )

"""Restores pages into the pool, from the pool itself or from pages at rest."""

from typing import Protocol

from tokendance_jax.kernels import dispatch
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import Rope
from tokendance_jax.kernels.sparse_restore.mosaic_gpu import sparse_restore_mosaic_gpu
from tokendance_jax.kernels.sparse_restore.mosaic_tpu import sparse_restore_mosaic_tpu
from tokendance_jax.kernels.sparse_restore.plan import RestorePlan, Source
from tokendance_jax.kernels.sparse_restore.xla import sparse_restore_xla


class SparseRestore(Protocol):
    """The signature of `sparse_restore`'s implementations."""

    def __call__(
        self, kv: PagedKV, source: Source | None, plan: RestorePlan, *, rope: Rope
    ) -> PagedKV: ...


OP = dispatch.Op[SparseRestore](
    "sparse_restore",
    xla=sparse_restore_xla,
    mosaic_gpu=sparse_restore_mosaic_gpu,
    mosaic_tpu=sparse_restore_mosaic_tpu,
)


def sparse_restore(
    kv: PagedKV,
    source: Source | None,
    plan: RestorePlan,
    *,
    rope: Rope,
    implementation: str | None = None,
) -> PagedKV:
    """Copies pieces of pages to slots of the pool, and rotates keys to their new positions.

    This is the fused restore of TokenDance (arXiv 2604.03143, section 4.3). Each source page is
    read once, however many mirrors use it, and each slot is written once. Patches need no special
    treatment: a mirror's plan names the patch page where the mirror has one, and the base page
    elsewhere. The pool is updated in place if it is donated.

    Args:
      kv: the pool.
      source: pages outside the pool; None: pages of the pool itself, none of which is also written.
      plan: the pieces, and the slots that each is copied to.
      rope: the rotary embedding.
      implementation: see `dispatch.Op.run`.

    Returns:
      The pool with the pieces written.

    Raises:
      ValueError: the source's pages do not fit the pool, or its arrays do not fit each other.
      NotImplementedError: the named implementation does not support these arguments.
    """
    if source is not None:
        _check(kv, source)
    if plan.first.shape[0] == 0:
        return kv
    return OP.run(implementation, lambda run: run(kv, source, plan, rope=rope))


def _check(kv: PagedKV, source: Source) -> None:
    layers, _, *slot_shape = kv.k.shape
    pages = source.k.shape[1]
    if source.k.shape != (layers, pages, *slot_shape) or source.v.shape != source.k.shape:
        raise ValueError(
            f"source: pages {source.k.shape} and {source.v.shape} for a pool {kv.k.shape}; "
            "all but the number of pages must agree"
        )
    quantised = source.k.dtype == "int8"
    if source.v.dtype != source.k.dtype or not (quantised or source.k.dtype == kv.k.dtype):
        raise ValueError(
            f"source: {source.k.dtype} keys and {source.v.dtype} values for a pool of "
            f"{kv.k.dtype}; store both as int8 or in the pool's dtype"
        )
    for scale in (source.k_scale, source.v_scale):
        if (None if scale is None else scale.shape) != (source.k.shape[:-1] if quantised else None):
            raise ValueError(
                "source: int8 pages must come with k_scale and v_scale, one number for each slot "
                "and head; other pages must come without them"
            )

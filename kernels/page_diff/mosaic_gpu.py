"""The page diff as a Mosaic GPU kernel, for Hopper.

A thread block works on one part of a base page in one layer. Bulk copies bring this part into
shared memory once, and then the same part of one sibling after the other: the next sibling is
copied while the current one is compared. The kernel writes only four numbers for each part of a
sibling.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tokendance_jax.kernels.gpu_pages import PARAMETERS, PageParts, rotate, rotation
from tokendance_jax.kernels.page_diff.plan import SCORES, DiffPlan
from tokendance_jax.kernels.page_diff.tuning import STAGES
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import Rope

Ref = Any


def page_diff_mosaic_gpu(
    kv: PagedKV,
    siblings: PagedKV | None,
    plan: DiffPlan,
    *,
    rope: Rope,
    interpret: Any = False,
) -> jax.Array:
    """Computes the scores of `reference.page_diff_reference`. Arguments as for `api.page_diff`.

    Args:
      kv: the pool, bfloat16 or float32.
      siblings: pages outside the pool; None: the pool.
      plan: the comparisons.
      rope: the rotary embedding.
      interpret: parameters of the simulator, to run on a CPU.
    """
    parts, dtype = PageParts.of(kv.k), kv.k.dtype
    own = kv if siblings is None else siblings
    columns = (plan.page, plan.begin, plan.sibling, plan.frame, plan.first, plan.slots)
    inputs = {
        "k": parts.flat(kv.k),
        "v": parts.flat(kv.v),
        "own_k": parts.flat(own.k),
        "own_v": parts.flat(own.v),
        "tables": parts.turn_tables(rope),
    }
    shape = parts.rows, parts.head_dim
    scratch = {
        "k": plgpu.SMEM(shape, dtype),
        "v": plgpu.SMEM(shape, dtype),
        "own_k": plgpu.SMEM((STAGES, *shape), dtype),
        "own_v": plgpu.SMEM((STAGES, *shape), dtype),
        "tables": plgpu.SMEM(inputs["tables"].shape, jnp.int32),
    }

    def kernel(columns: list[Ref], inputs: dict[str, Ref], out: Ref) -> None:
        pl.run_scoped(
            functools.partial(_compare_part, parts, columns, inputs, out),
            scratch,
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        )

    comparisons, pages = plan.sibling.shape[0], plan.page.shape[0]
    call: Any = pl.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(
            (parts.layers, comparisons, parts.of_page, SCORES), jnp.float32
        ),
        mesh=parts.mesh(pages),
        compiler_params=PARAMETERS,
        interpret=interpret,
        name="page_diff",
    )
    out = call([jnp.asarray(column) for column in columns], inputs)
    k_largest, k_squares, v_largest, v_squares = jnp.moveaxis(out, 3, 0)
    scores = jnp.stack(
        [
            k_largest.max(axis=2),
            k_squares.sum(axis=2),
            v_largest.max(axis=2),
            v_squares.sum(axis=2),
        ]
    )
    # The kernel writes nothing for the plan's padding.
    used = jnp.arange(comparisons) < jnp.asarray(plan.begin)[-1]
    return jnp.where(used[None, None], scores, 0)


def _compare_part(
    parts: PageParts,
    columns: list[Ref],
    inputs: dict[str, Ref],
    out: Ref,
    smem: dict[str, Ref],
    brought: Ref,
    arrived: Ref,
) -> None:
    """Compares one part of a base page with the same part of each sibling, in one layer."""
    pages, begin, sibling, frame, first, slots = columns
    index, part, layer = (jax.lax.axis_index(name) for name in ("page", "part", "layer"))
    start, stop = begin[index], begin[index + 1]

    def rows_of(flat: Ref, page: jax.Array) -> Any:
        return pl.ds(parts.first_row(flat, layer, page, part), parts.rows)

    def fetch(comparison: jax.Array) -> None:
        """Starts copying a sibling's keys and values."""
        stage = jax.lax.rem(comparison - start, STAGES)
        rows = rows_of(inputs["own_k"], sibling[comparison])
        for name in ("own_k", "own_v"):
            plgpu.copy_gmem_to_smem(inputs[name].at[rows], smem[name].at[stage], arrived.at[stage])

    @pl.when(stop > start)
    def _() -> None:
        rows = rows_of(inputs["k"], pages[index])
        for name in ("k", "v"):
            plgpu.copy_gmem_to_smem(inputs[name].at[rows], smem[name], brought)
        plgpu.copy_gmem_to_smem(inputs["tables"], smem["tables"], brought)
        for ahead in range(STAGES):
            pl.when(start + ahead < stop)(functools.partial(fetch, start + ahead))
        plgpu.barrier_wait(brought)

        @pl.loop(start, stop)
        def _(comparison: jax.Array) -> None:
            stage = jax.lax.rem(comparison - start, STAGES)
            begins = (first[comparison] - part * parts.slots) * parts.kv_heads
            ends = begins + slots[comparison] * parts.kv_heads
            turn = rotation(smem["tables"], frame[comparison])
            plgpu.barrier_wait(arrived.at[stage])
            scores = (
                *_deviation(parts, smem["own_k"].at[stage], smem["k"], turn, begins, ends),
                *_deviation(parts, smem["own_v"].at[stage], smem["v"], None, begins, ends),
            )
            # All threads have read the sibling: the reductions of the scores synchronised them.
            pl.when(comparison + STAGES < stop)(lambda: fetch(comparison + STAGES))
            for number, score in enumerate(scores):
                out[layer, comparison, part, number] = score


def _deviation(
    parts: PageParts,
    own: Ref,
    base: Ref,
    turn: tuple[jax.Array, jax.Array] | None,
    begins: jax.Array,
    ends: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the largest difference and the sum of squares of a part's rows `begins` to `ends`."""
    shape = parts.chunk, parts.half
    largest, squares = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    for start in range(0, parts.rows, parts.chunk):
        rows = pl.ds(start, parts.chunk)
        used = jnp.logical_and(row + start >= begins, row + start < ends)
        shown = parts.halves(base, rows)
        if turn is not None:
            shown = rotate(shown, turn)
        for mine, other in zip(parts.halves(own, rows), shown, strict=True):
            gap = jnp.where(used, jnp.abs(mine - other), 0.0)
            largest = jnp.maximum(largest, gap)
            squares = squares + gap * gap
    return largest.max(), squares.sum()

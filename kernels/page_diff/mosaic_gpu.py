"""The page diff as a Mosaic GPU kernel, for Hopper.

A block of threads takes one part of a base page in one layer: bulk copies bring it into shared
memory once, and then one sibling after the other, the next on its way while one is compared. What
goes to memory are four numbers for each part of a sibling.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tokendance_jax.kernels import rope
from tokendance_jax.kernels.lanes import Array
from tokendance_jax.kernels.page_diff.plan import SCORES, DiffPlan
from tokendance_jax.kernels.page_diff.tuning import CHUNK, STAGES
from tokendance_jax.kernels.sparse_restore.tuning import part_slots

# Threads of a block: a tile of registers has a multiple of as many numbers.
THREADS = 128

Ref = Any


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """A row is one head of one slot; pools are arrays [rows, head_dim].

    Attributes:
      base_pages: pages of the pool.
      sibling_pages: pages of what siblings are in.
      page_size: slots of a page.
      part: slots of a page that a block takes.
      kv_heads: rows of a slot.
      head_dim: numbers of a row.
    """

    base_pages: int
    sibling_pages: int
    page_size: int
    part: int
    kv_heads: int
    head_dim: int

    @property
    def rows(self) -> int:
        """Rows of a part."""
        return self.part * self.kv_heads

    @property
    def half(self) -> int:
        """The width of a half head: the rotary embedding pairs its numbers with the other half."""
        return self.head_dim // 2

    @property
    def chunk(self) -> int:
        """Rows that are compared at a time."""
        return min(self.rows, CHUNK // self.half)


def page_diff_mosaic_gpu(
    k_pool: jax.Array,
    v_pool: jax.Array,
    siblings: tuple[Array, Array] | None,
    plan: DiffPlan,
    *,
    theta: float,
    interpret: Any = False,
) -> jax.Array:
    """Arguments as `api.page_diff`, results as `reference.page_diff_reference`.

    Args:
      k_pool: keys, bfloat16 or float32.
      v_pool: values.
      siblings: pages outside the pool; None: the pool.
      plan: what is compared.
      theta: base of the rotary frequencies.
      interpret: parameters of the simulator, to run on a CPU.
    """
    layers, pages, page_size, kv_heads, head_dim = k_pool.shape
    dtype = k_pool.dtype
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"the kernel takes bfloat16 and float32 pools, not {dtype}")
    own_k, own_v = siblings or (k_pool, v_pool)
    part = part_slots(page_size, kv_heads * head_dim * dtype.itemsize)
    sizes = _Sizes(pages, own_k.shape[1], page_size, part, kv_heads, head_dim)
    tiled = sizes.rows % sizes.chunk == 0 and sizes.chunk * sizes.half % THREADS == 0
    if head_dim not in (64, 128) or sizes.rows > 256 or not tiled:
        raise NotImplementedError(
            f"pages of {page_size} slots with {kv_heads} heads of {head_dim}: the kernel takes "
            f"heads of 64 or 128 and parts of {sizes.chunk} to 256 rows"
        )

    def flat(x: Array) -> jax.Array:
        return jnp.asarray(x).reshape(-1, head_dim)

    tables = rope.turn_tables(theta, head_dim)
    tables = jnp.asarray(np.broadcast_to(tables[:, None], (3, sizes.chunk, sizes.half)))
    columns = (plan.page, plan.begin, plan.sibling, plan.frame, plan.first, plan.slots)
    inputs = {
        "k": flat(k_pool),
        "v": flat(v_pool),
        "own_k": flat(own_k),
        "own_v": flat(own_v),
        "tables": tables,
    }
    shape = sizes.rows, head_dim
    scratch = {
        "k": plgpu.SMEM(shape, dtype),
        "v": plgpu.SMEM(shape, dtype),
        "own_k": plgpu.SMEM((STAGES, *shape), dtype),
        "own_v": plgpu.SMEM((STAGES, *shape), dtype),
        "tables": plgpu.SMEM(tables.shape, jnp.int32),
    }

    def kernel(columns: list[Ref], inputs: dict[str, Ref], out: Ref) -> None:
        pl.run_scoped(
            functools.partial(_compare_part, sizes, columns, inputs, out),
            scratch,
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        )

    comparisons, parts = plan.sibling.shape[0], page_size // part
    out = pl.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((layers, comparisons, parts, SCORES), jnp.float32),
        mesh=plgpu.Mesh(
            grid=(plan.page.shape[0], parts, layers), grid_names=("page", "part", "layer")
        ),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            # Angles lie in [-pi, pi), where the fast sine and cosine are good to 2^-20.
            approx_math=True,
        ),
        interpret=interpret,
        name="page_diff",
    )([jnp.asarray(column) for column in columns], inputs)
    k_largest, k_squares, v_largest, v_squares = jnp.moveaxis(out, 3, 0)
    scores = jnp.stack(
        [
            k_largest.max(axis=2),
            k_squares.sum(axis=2),
            v_largest.max(axis=2),
            v_squares.sum(axis=2),
        ]
    )
    # Nothing was written for what the plan is filled up with.
    used = jnp.arange(comparisons) < jnp.asarray(plan.begin)[-1]
    return jnp.where(used[None, None], scores, 0)


def _compare_part(
    sizes: _Sizes,
    columns: list[Ref],
    inputs: dict[str, Ref],
    out: Ref,
    smem: dict[str, Ref],
    brought: Ref,
    arrived: Ref,
) -> None:
    """Compares one part of a base page with that of all its siblings, in one layer."""
    pages, begin, sibling, frame, first, slots = columns
    index, part, layer = (jax.lax.axis_index(name) for name in ("page", "part", "layer"))
    start, stop = begin[index], begin[index + 1]

    def rows_of(page: jax.Array, number: int) -> Any:
        slot = (layer * number + page) * sizes.page_size + part * sizes.part
        return pl.ds(slot * sizes.kv_heads, sizes.rows)

    def fetch(comparison: jax.Array) -> None:
        """Starts the copies of a sibling."""
        stage = jax.lax.rem(comparison - start, STAGES)
        rows = rows_of(sibling[comparison], sizes.sibling_pages)
        for name in ("own_k", "own_v"):
            plgpu.copy_gmem_to_smem(inputs[name].at[rows], smem[name].at[stage], arrived.at[stage])

    @pl.when(stop > start)
    def _() -> None:
        rows = rows_of(pages[index], sizes.base_pages)
        for name in ("k", "v"):
            plgpu.copy_gmem_to_smem(inputs[name].at[rows], smem[name], brought)
        plgpu.copy_gmem_to_smem(inputs["tables"], smem["tables"], brought)
        for ahead in range(STAGES):
            pl.when(start + ahead < stop)(functools.partial(fetch, start + ahead))
        plgpu.barrier_wait(brought)

        @pl.loop(start, stop)
        def _(comparison: jax.Array) -> None:
            stage = jax.lax.rem(comparison - start, STAGES)
            before = part * sizes.part
            begins = (first[comparison] - before) * sizes.kv_heads
            ends = begins + slots[comparison] * sizes.kv_heads
            angle = rope.angles(frame[comparison], *(smem["tables"][table] for table in range(3)))
            turn = jnp.cos(angle), jnp.sin(angle)
            plgpu.barrier_wait(arrived.at[stage])
            scores = (
                *_deviation(sizes, smem["own_k"].at[stage], smem["k"], turn, begins, ends),
                *_deviation(sizes, smem["own_v"].at[stage], smem["v"], None, begins, ends),
            )
            # All threads have read the sibling: they met to find the scores.
            pl.when(comparison + STAGES < stop)(lambda: fetch(comparison + STAGES))
            for number, score in enumerate(scores):
                out[layer, comparison, part, number] = score


def _deviation(
    sizes: _Sizes,
    own: Ref,
    base: Ref,
    turn: tuple[jax.Array, jax.Array] | None,
    begins: jax.Array,
    ends: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The largest difference and the sum of squares of rows `begins` to `ends` of a part."""
    shape = sizes.chunk, sizes.half
    largest, squares = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    halves = pl.ds(0, sizes.half), pl.ds(sizes.half, sizes.half)
    for start in range(0, sizes.rows, sizes.chunk):
        rows = pl.ds(start, sizes.chunk)
        used = jnp.logical_and(row + start >= begins, row + start < ends)
        first, second = (base[rows, half].astype(jnp.float32) for half in halves)
        if turn is not None:
            cos, sin = turn
            first, second = first * cos - second * sin, second * cos + first * sin
        for half, shown in zip(halves, (first, second), strict=True):
            gap = jnp.where(used, jnp.abs(own[rows, half].astype(jnp.float32) - shown), 0.0)
            largest = jnp.maximum(largest, gap)
            squares = squares + gap * gap
    return largest.max(), squares.sum()

"""The fused sparse restore as a Mosaic GPU kernel, for Hopper.

A block of threads takes one part of a source page in one layer: bulk copies bring it into shared
memory once. Of each piece, keys are rotated in registers, and bulk copies take keys and values to
the pool. Values in the pool's precision never pass through registers.
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
from tokendance_jax.kernels.sparse_restore.plan import RestorePlan, Source
from tokendance_jax.kernels.sparse_restore.tuning import CHUNK, part_slots

# Threads of a block: a tile of registers has a multiple of as many numbers.
THREADS = 128
# Pieces on their way to the pool while the next is rotated.
STAGES = 2

Ref = Any


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """A row is one head of one slot; pools and sources are arrays [rows, head_dim].

    Attributes:
      pages: pages of the pool.
      source_pages: pages of the source.
      page_size: slots of a page.
      part: slots of a page that a block takes.
      kv_heads: rows of a slot.
      head_dim: numbers of a row.
    """

    pages: int
    source_pages: int
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
        """Rows that are rotated at a time."""
        return min(self.rows, CHUNK // self.half)


def sparse_restore_mosaic_gpu(
    k_pool: jax.Array,
    v_pool: jax.Array,
    source: Source | None,
    plan: RestorePlan,
    *,
    theta: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Arguments as `api.sparse_restore`.

    Args:
      k_pool: keys.
      v_pool: values.
      source: where from; None: the pool.
      plan: what goes where.
      theta: base of the rotary frequencies.
      interpret: parameters of the simulator, to run on a CPU.
    """
    layers, pages, page_size, kv_heads, head_dim = k_pool.shape
    dtype = k_pool.dtype
    rotated = source is None or source.rotated
    scaled = source is not None and source.k_scale is not None
    biased = source is not None and source.key_bias is not None
    # Whether keys or values are something else than what is stored.
    at_rest = not rotated or scaled or biased
    part = part_slots(page_size, kv_heads * head_dim * dtype.itemsize)
    sizes = _Sizes(
        pages,
        pages if source is None else source.k.shape[1],
        page_size,
        part,
        kv_heads,
        head_dim,
    )
    if head_dim not in (64, 128) or sizes.rows * sizes.half % THREADS or sizes.rows > 256:
        raise NotImplementedError(
            f"pages of {page_size} slots with {kv_heads} heads of {head_dim}: the kernel takes "
            "heads of 64 or 128 and parts of up to 256 rows"
        )

    def flat(x: Any) -> jax.Array:
        return jnp.asarray(x).reshape(-1, head_dim)

    tables = rope.turn_tables(theta, head_dim)
    tables = jnp.asarray(np.broadcast_to(tables[:, None], (3, sizes.chunk, sizes.half)))
    columns = (plan.page, plan.begin, plan.first, plan.slots, plan.target, plan.turn)
    arrays = [jnp.asarray(column) for column in columns]
    inputs: dict[str, jax.Array] = {"tables": tables}
    if source is not None:
        inputs |= {"k": flat(source.k), "v": flat(source.v)}
    if scaled:
        inputs |= {
            "k_scale": jnp.asarray(source.k_scale).reshape(-1),
            "v_scale": jnp.asarray(source.v_scale).reshape(-1),
        }
    if at_rest:
        bias = source.key_bias
        bias = jnp.zeros((layers, kv_heads, head_dim)) if bias is None else jnp.asarray(bias)
        inputs["bias"] = bias.reshape(-1, head_dim)

    shape = sizes.rows, head_dim
    stored = dtype if source is None else source.k.dtype
    staged = plgpu.SMEM((STAGES, sizes.rows, sizes.half), dtype)
    scratch = {
        "k": plgpu.SMEM(shape, stored),
        "v": plgpu.SMEM(shape, stored),
        "first_half": staged,
        "second_half": staged,
        "tables": plgpu.SMEM(tables.shape, jnp.int32),
    }
    if at_rest:
        scratch |= {"k_plain": plgpu.SMEM(shape, jnp.float32), "v_plain": plgpu.SMEM(shape, dtype)}
    pools = [jax.new_ref(flat(x), memory_space=plgpu.GMEM) for x in (k_pool, v_pool)]

    def kernel(columns: list[Ref], inputs: dict[str, Ref], k_pool: Ref, v_pool: Ref) -> None:
        source = {"k": k_pool, "v": v_pool} | inputs
        work = functools.partial(
            _restore_part, sizes, columns, source, k_pool, v_pool, rotated=rotated
        )
        pl.run_scoped(work, scratch, plgpu.Barrier(num_barriers=3))

    mesh = plgpu.Mesh(
        grid=(plan.page.shape[0], page_size // part, layers), grid_names=("page", "part", "layer")
    )
    parameters = plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        # Angles lie in [-pi, pi), where the fast sine and cosine are good to 2^-20.
        approx_math=True,
    )
    pl.kernel(
        kernel,
        out_type=(),
        mesh=mesh,
        compiler_params=parameters,
        interpret=interpret,
        name="sparse_restore",
    )(arrays, inputs, *pools)
    k, v = (jax.freeze(pool).reshape(k_pool.shape) for pool in pools)
    return k, v


def _restore_part(
    sizes: _Sizes,
    columns: list[Ref],
    source: dict[str, Ref],
    k_pool: Ref,
    v_pool: Ref,
    smem: dict[str, Ref],
    barriers: Ref,
    *,
    rotated: bool,
) -> None:
    """Restores all pieces of one part of a source page, in one layer."""
    pages, begin, first, slots, target, turn = columns
    index, layer = jax.lax.axis_index("page"), jax.lax.axis_index("layer")
    part_first = jax.lax.axis_index("part") * sizes.part
    start, stop = begin[index], begin[index + 1]

    @pl.when(stop > start)
    def _() -> None:
        slot = (layer * sizes.source_pages + pages[index]) * sizes.page_size + part_first
        row = slot * sizes.kv_heads
        copies = (
            (source["k"].at[pl.ds(row, sizes.rows)], smem["k"]),
            (source["v"].at[pl.ds(row, sizes.rows)], smem["v"]),
            (source["tables"], smem["tables"]),
        )
        for number, (there, here) in enumerate(copies):
            plgpu.copy_gmem_to_smem(there, here, barriers.at[number])
        for number in range(len(copies)):
            plgpu.barrier_wait(barriers.at[number])
        if "bias" in source:
            _make_plain(sizes, source, smem, row, layer)
            plgpu.commit_smem()
        k, v = smem.get("k_plain", smem["k"]), smem.get("v_plain", smem["v"])

        @pl.loop(start, stop)
        def _(piece: jax.Array) -> None:
            stage = jax.lax.rem(piece - start, STAGES)
            # Where slot 0 of the part would lie in the pool.
            to = layer * sizes.pages * sizes.page_size + target[piece] - first[piece] + part_first
            begins = jnp.maximum(first[piece] - part_first, 0)
            ends = jnp.minimum(first[piece] + slots[piece] - part_first, sizes.part)
            copy = functools.partial(_copy_rows, sizes, begins, ends, to * sizes.kv_heads)
            copy(v, v_pool)

            def turn_and_copy() -> None:
                # The stage is free when the copies of the piece before the last have read it; of
                # the last one and of this one's values they may go on.
                plgpu.wait_smem_to_gmem(STAGES - 1, wait_read_only=True)
                _rotate(sizes, k, smem, stage, turn[piece], part_first, rotated=rotated)
                plgpu.commit_smem()
                for number, half in enumerate(("first_half", "second_half")):
                    columns = pl.ds(number * sizes.half, sizes.half)
                    copy(smem[half].at[stage], k_pool.at[:, columns])

            if "k_plain" in smem:
                turn_and_copy()
            else:
                # What is not turned keeps its bits: a product with 1 and 0 loses signs of zeros.
                pl.when(turn[piece] == 0)(lambda: copy(k, k_pool))
                pl.when(turn[piece] != 0)(turn_and_copy)
            plgpu.commit_smem_to_gmem_group()

        plgpu.wait_smem_to_gmem(0)


def _make_plain(
    sizes: _Sizes, source: dict[str, Ref], smem: dict[str, Ref], row: jax.Array, layer: jax.Array
) -> None:
    """Turns what is at rest into float32 keys with their bias and values as the pool has them."""
    step = max(1, THREADS // sizes.head_dim)
    shape = step, sizes.head_dim
    number = jax.lax.broadcasted_iota(jnp.int32, shape, 0)

    def scale(of: Ref, at: jax.Array) -> jax.Array:
        tile = jnp.full(shape, of[row + at], jnp.float32)
        for other in range(1, step):
            tile = jnp.where(number == other, of[row + at + other], tile)
        return tile

    @pl.loop(0, sizes.rows // step)
    def _(index: jax.Array) -> None:
        at = index * step
        k = smem["k"][pl.ds(at, step)].astype(jnp.float32)
        v = smem["v"][pl.ds(at, step)].astype(jnp.float32)
        if "k_scale" in source:
            k, v = k * scale(source["k_scale"], at), v * scale(source["v_scale"], at)
        head = layer * sizes.kv_heads + jax.lax.rem(at, sizes.kv_heads)
        smem["k_plain"][pl.ds(at, step)] = k + source["bias"][pl.ds(head, step)]
        smem["v_plain"][pl.ds(at, step)] = v.astype(smem["v_plain"].dtype)


def _rotate(
    sizes: _Sizes,
    k: Ref,
    smem: dict[str, Ref],
    stage: jax.Array,
    turn: jax.Array,
    part_first: jax.Array,
    *,
    rotated: bool,
) -> None:
    """Rotates the part's keys into a stage."""
    for start in range(0, sizes.rows, sizes.chunk):
        rows = pl.ds(start, sizes.chunk)
        first = k[rows, pl.ds(0, sizes.half)].astype(jnp.float32)
        second = k[rows, pl.ds(sizes.half, sizes.half)].astype(jnp.float32)
        position = turn
        if not rotated:
            row = jax.lax.broadcasted_iota(jnp.int32, (sizes.chunk, sizes.half), 0) + start
            position = turn + part_first + jax.lax.div(row, sizes.kv_heads)
        angle = rope.angles(position, *(smem["tables"][index] for index in range(3)))
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        dtype = smem["first_half"].dtype
        smem["first_half"][stage, rows] = (first * cos - second * sin).astype(dtype)
        smem["second_half"][stage, rows] = (second * cos + first * sin).astype(dtype)


def _copy_rows(
    sizes: _Sizes, begins: jax.Array, ends: jax.Array, to: jax.Array, here: Ref, there: Ref
) -> None:
    """Sends slots `begins` to `ends` of the part to the rows behind `to`."""

    def copy(row: jax.Array | int, count: int) -> None:
        rows = pl.ds(row, count), pl.ds(to + row, count)
        plgpu.copy_smem_to_gmem(here.at[rows[0]], there.at[rows[1]], commit_group=False)

    whole = (ends - begins) == sizes.part

    @pl.when(whole)
    def _() -> None:
        copy(0, sizes.rows)

    @pl.when(jnp.logical_not(whole))
    def _() -> None:
        @pl.loop(begins, ends)
        def _(slot: jax.Array) -> None:
            copy(slot * sizes.kv_heads, sizes.kv_heads)

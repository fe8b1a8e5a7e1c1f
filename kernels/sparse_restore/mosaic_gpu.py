"""The fused sparse restore as a Mosaic GPU kernel, for Hopper.

A thread block works on one part of a source page in one layer. Bulk copies bring this part into
shared memory once. For each piece, the block rotates the keys in registers, and bulk copies write
keys and values to the pool. Values in the pool's precision never pass through registers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tokendance_jax.kernels.gpu_pages import PARAMETERS, THREADS, PageParts, rotate, rotation
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import Rope
from tokendance_jax.kernels.sparse_restore.plan import RestorePlan, Source
from tokendance_jax.kernels.sparse_restore.tuning import STAGES

Ref = Any


def sparse_restore_mosaic_gpu(
    kv: PagedKV,
    source: Source | None,
    plan: RestorePlan,
    *,
    rope: Rope,
    interpret: Any = False,
) -> PagedKV:
    """Implements `api.sparse_restore`, with the same arguments.

    Args:
      kv: the pool, bfloat16 or float32.
      source: the source pages; None: pages of the pool.
      plan: the pieces, and the slots that each is copied to.
      rope: the rotary embedding.
      interpret: parameters of the simulator, to run on a CPU.
    """
    parts, dtype = PageParts.of(kv.k), kv.k.dtype
    rotated = source is None or source.rotated
    scaled = source is not None and source.k_scale is not None
    biased = source is not None and source.key_bias is not None
    # Whether the stored keys are unrotated, need a scale, or lack their bias.
    at_rest = not rotated or scaled or biased
    columns = (plan.page, plan.begin, plan.first, plan.slots, plan.target, plan.turn)
    arrays = [jnp.asarray(column) for column in columns]
    inputs = {"tables": parts.turn_tables(rope)}
    if source is not None:
        inputs |= {"k": parts.flat(source.k), "v": parts.flat(source.v)}
    if source is not None and scaled:
        inputs |= {
            "k_scale": jnp.asarray(source.k_scale).reshape(-1),
            "v_scale": jnp.asarray(source.v_scale).reshape(-1),
        }
    if source is not None and at_rest:
        bias = source.key_bias
        none = parts.layers, parts.kv_heads, parts.head_dim
        inputs["bias"] = parts.flat(jnp.zeros(none) if bias is None else bias)

    shape = parts.rows, parts.head_dim
    stored = dtype if source is None else source.k.dtype
    staged = plgpu.SMEM((STAGES, parts.rows, parts.half), dtype)
    scratch = {
        "k": plgpu.SMEM(shape, stored),
        "v": plgpu.SMEM(shape, stored),
        "first_half": staged,
        "second_half": staged,
        "tables": plgpu.SMEM(inputs["tables"].shape, jnp.int32),
    }
    if at_rest:
        scratch |= {"k_plain": plgpu.SMEM(shape, jnp.float32), "v_plain": plgpu.SMEM(shape, dtype)}
    pools = [jax.new_ref(parts.flat(x), memory_space=plgpu.GMEM) for x in (kv.k, kv.v)]

    def kernel(columns: list[Ref], inputs: dict[str, Ref], k_pool: Ref, v_pool: Ref) -> None:
        source = {"k": k_pool, "v": v_pool} | inputs
        work = functools.partial(
            _restore_part, parts, columns, source, k_pool, v_pool, rotated=rotated
        )
        pl.run_scoped(work, scratch, plgpu.Barrier(num_barriers=3))

    call: Any = pl.kernel(
        kernel,
        out_type=(),
        mesh=parts.mesh(plan.page.shape[0]),
        compiler_params=PARAMETERS,
        interpret=interpret,
        name="sparse_restore",
    )
    call(arrays, inputs, *pools)
    k, v = (jax.freeze(pool).reshape(kv.k.shape) for pool in pools)
    return PagedKV(k, v)


def _restore_part(
    parts: PageParts,
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
    index, part, layer = (jax.lax.axis_index(name) for name in ("page", "part", "layer"))
    part_first = part * parts.slots
    start, stop = begin[index], begin[index + 1]

    @pl.when(stop > start)
    def _() -> None:
        row = parts.first_row(source["k"], layer, pages[index], part)
        copies = (
            (source["k"].at[pl.ds(row, parts.rows)], smem["k"]),
            (source["v"].at[pl.ds(row, parts.rows)], smem["v"]),
            (source["tables"], smem["tables"]),
        )
        for number, (there, here) in enumerate(copies):
            plgpu.copy_gmem_to_smem(there, here, barriers.at[number])
        for number in range(len(copies)):
            plgpu.barrier_wait(barriers.at[number])
        if "bias" in source:
            _make_plain(parts, source, smem, row, layer)
            plgpu.commit_smem()
        k, v = smem.get("k_plain", smem["k"]), smem.get("v_plain", smem["v"])

        @pl.loop(start, stop)
        def _(piece: jax.Array) -> None:
            stage = jax.lax.rem(piece - start, STAGES)
            # The row of the pool that slot 0 of the part would be copied to.
            to = parts.first_row(k_pool, layer, 0, part)
            to = to + (target[piece] - first[piece]) * parts.kv_heads
            begins = jnp.maximum(first[piece] - part_first, 0)
            ends = jnp.minimum(first[piece] + slots[piece] - part_first, parts.slots)
            copy = functools.partial(_copy_rows, parts, begins, ends, to)
            copy(v, v_pool)

            def turn_and_copy() -> None:
                # The stage is free once the copies of the piece before the previous one have read
                # it. Copies of the previous piece, and of this piece's values, may still run.
                plgpu.wait_smem_to_gmem(STAGES - 1, wait_read_only=True)
                _rotate(parts, k, smem, stage, turn[piece], part_first, rotated=rotated)
                plgpu.commit_smem()
                for number, half in enumerate(("first_half", "second_half")):
                    columns = pl.ds(number * parts.half, parts.half)
                    copy(smem[half].at[stage], k_pool.at[:, columns])

            if "k_plain" in smem:
                turn_and_copy()
            else:
                # Keys that are not rotated keep their bits: products with 1 and 0 would lose the
                # sign of zeros.
                pl.when(turn[piece] == 0)(lambda: copy(k, k_pool))
                pl.when(turn[piece] != 0)(turn_and_copy)
            plgpu.commit_smem_to_gmem_group()

        plgpu.wait_smem_to_gmem(0)


def _make_plain(
    parts: PageParts, source: dict[str, Ref], smem: dict[str, Ref], row: jax.Array, layer: jax.Array
) -> None:
    """Converts a part at rest: keys to float32, with their bias, and values to the pool's dtype."""
    step = max(1, THREADS // parts.head_dim)
    shape = step, parts.head_dim
    number = jax.lax.broadcasted_iota(jnp.int32, shape, 0)

    def scale(of: Ref, at: jax.Array) -> jax.Array:
        tile = jnp.full(shape, of[row + at], jnp.float32)
        for other in range(1, step):
            tile = jnp.where(number == other, of[row + at + other], tile)
        return tile

    @pl.loop(0, parts.rows // step)
    def _(index: jax.Array) -> None:
        at = index * step
        k = smem["k"][pl.ds(at, step)].astype(jnp.float32)
        v = smem["v"][pl.ds(at, step)].astype(jnp.float32)
        if "k_scale" in source:
            k, v = k * scale(source["k_scale"], at), v * scale(source["v_scale"], at)
        head = layer * parts.kv_heads + jax.lax.rem(at, parts.kv_heads)
        smem["k_plain"][pl.ds(at, step)] = k + source["bias"][pl.ds(head, step)]
        smem["v_plain"][pl.ds(at, step)] = v.astype(smem["v_plain"].dtype)


def _rotate(
    parts: PageParts,
    k: Ref,
    smem: dict[str, Ref],
    stage: jax.Array,
    turn: jax.Array,
    part_first: jax.Array,
    *,
    rotated: bool,
) -> None:
    """Rotates the part's keys and writes them to a stage."""
    for start in range(0, parts.rows, parts.chunk):
        rows, position = pl.ds(start, parts.chunk), turn
        if not rotated:
            row = jax.lax.broadcasted_iota(jnp.int32, (parts.chunk, parts.half), 0) + start
            position = turn + part_first + jax.lax.div(row, parts.kv_heads)
        halves = rotate(parts.halves(k, rows), rotation(smem["tables"], position))
        for name, half in zip(("first_half", "second_half"), halves, strict=True):
            smem[name][stage, rows] = half.astype(smem[name].dtype)


def _copy_rows(
    parts: PageParts, begins: jax.Array, ends: jax.Array, to: jax.Array, here: Ref, there: Ref
) -> None:
    """Copies slots `begins` to `ends` of the part to the pool; slot 0 would go to row `to`."""

    def copy(row: jax.Array | int, count: int) -> None:
        rows = pl.ds(row, count), pl.ds(to + row, count)
        plgpu.copy_smem_to_gmem(here.at[rows[0]], there.at[rows[1]], commit_group=False)

    whole = (ends - begins) == parts.slots

    @pl.when(whole)
    def _() -> None:
        copy(0, parts.rows)

    @pl.when(jnp.logical_not(whole))
    def _() -> None:
        @pl.loop(begins, ends)
        def _(slot: jax.Array) -> None:
            copy(slot * parts.kv_heads, parts.kv_heads)

"""What the Mosaic GPU attention kernels share: 64 queries against pages, 64 slots at a time.

A block of threads takes 64 queries of one KV head and walks a list of steps. Bulk copies bring the
pages of the next step into shared memory while tensor cores multiply those of this one. Queries are
turned in float32 when the frame changes; keys and values are used as they lie in the pool.
"""

import dataclasses
import functools
import math
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tokendance_jax.kernels import flash, rope
from tokendance_jax.kernels.lanes import LaneTables

# Queries of a block: the rows of one instruction of the tensor cores.
QUERIES = 64
# Slots of a step.
SLOTS = 64
# Steps whose pages are in shared memory or on their way.
STAGES = 2
# Columns of a head that pass through registers at a time.
COLUMNS = 64
LOG2E = math.log2(math.e)

Ref = Any


@no_type_check  # JAX also builds pytrees of stand-ins that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """Lists of steps, and which list each tile of queries walks.

    Attributes:
      page: i32 [lists, steps * pages_of_a_step].
      slot_position: i32 [lists, steps, SLOTS]; int32's maximum where a slot is not valid.
      frame: i32 [lists, steps], one for all queries; or [tiles, steps, queries].
      held: i32 [tiles, steps, queries], bit i: the query sees the i-th page of the step; or None:
        all queries see all pages.
      of_tile: i32 [tiles]; the list that a tile walks.
      count: i32 [tiles]; steps of it that the tile sees.
      last: i32 [tiles]; the greatest position that a query of the tile sees.
    """

    page: jax.Array
    slot_position: jax.Array
    frame: jax.Array
    held: jax.Array | None
    of_tile: jax.Array
    count: jax.Array
    last: jax.Array


def check_pool(k_pool: jax.Array) -> None:
    """Raises NotImplementedError for pools that the attention kernels cannot read."""
    _, _, page_size, _, head_dim = k_pool.shape
    if k_pool.dtype != jnp.bfloat16:
        raise NotImplementedError(
            f"a pool of {k_pool.dtype}: tensor cores would round its numbers to 10 bits"
        )
    if head_dim not in (64, 128) or page_size not in (8, 16, 32, 64):
        raise NotImplementedError(
            f"pages of {page_size} slots with heads of {head_dim}: the kernel takes pages of 8 to "
            "64 slots and heads of 64 or 128"
        )


def lane_steps(tables: LaneTables, page_size: int, lane: jax.Array, last: jax.Array) -> Steps:
    """The steps of lanes' own tables.

    Args:
      tables: the tables.
      page_size: slots of a page.
      lane: i32 [tiles]; the lane of each tile.
      last: i32 [tiles]; the greatest position that a query of the tile sees.
    """
    lanes = tables.page.shape[0]
    slot_position = tables.slot_positions(page_size).reshape(lanes, -1, SLOTS)
    start = slot_position.min(axis=2)
    # Steps without a valid slot stand where a key block is filled up: they go behind all others.
    order = jnp.argsort(start, axis=1)

    def in_order(x: jax.Array) -> jax.Array:
        index = order.reshape(*order.shape, *[1] * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1)

    pages = SLOTS // page_size
    page = in_order(jnp.asarray(tables.page).reshape(lanes, -1, pages))
    seen = start[lane] <= last[:, None]
    return Steps(
        page=page.reshape(lanes, -1),
        slot_position=in_order(slot_position),
        frame=in_order(jnp.asarray(tables.frame)[:, ::pages]),
        held=None,
        of_tile=lane,
        count=jnp.sum(seen.astype(jnp.int32), axis=1),
        last=last,
    )


def flash_attention_gpu(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    layer: int,
    limit: jax.Array,
    steps: Steps,
    *,
    theta: float,
    splits: int = 1,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Attends tiles of queries to the slots at positions up to each query's limit.

    Args:
      q: f32 [tiles, kv_heads, queries, head_dim], rotated at logical positions, not scaled; the
        number of queries is a multiple of `QUERIES`, or a smaller multiple of 8.
      k_pool: bf16 [layers, pages, page_size, kv_heads, head_dim].
      v_pool: as k_pool.
      layer: index of the layer.
      limit: i32 [tiles, queries], filled up with -1 to a multiple of `QUERIES`.
      steps: what the tiles walk.
      theta: base of the rotary frequencies.
      splits: parts of a tile's steps that different blocks take.
      interpret: parameters of the simulator, to run on a CPU.

    Returns:
      The output f32 [splits, tiles, kv_heads, queries, head_dim] over each part, zero where a query
      saw nothing of it, and the log-sum-exp of its scores f32 [splits, tiles, kv_heads, queries],
      there `flash.MASKED`.
    """
    tiles, kv_heads, queries, head_dim = q.shape
    _, pages, page_size, _, _ = k_pool.shape
    # In units of log2, so that the softmax takes powers of two.
    scaled = q * np.float32(LOG2E / math.sqrt(head_dim))
    shared = steps.held is not None
    inputs = {
        "q": scaled,
        "k": k_pool.reshape(-1, kv_heads, head_dim),
        "v": v_pool.reshape(-1, kv_heads, head_dim),
        "limit": limit,
        # A table for each of `COLUMNS`: of narrow heads twice, of wide ones once.
        "turns": jnp.asarray(
            np.tile(rope.turn_tables(theta, head_dim), (1, 2 * COLUMNS // head_dim))
        ),
        "stop": steps.slot_position.max(axis=2),
        **{name: value for name, value in vars(steps).items() if value is not None},
    }
    if head_dim == COLUMNS:
        # The rotary embedding in full width: q cos + (-second half, first half) sin. Of wide heads
        # a half is what passes through registers at a time.
        first, second = jnp.split(scaled, 2, axis=-1)
        inputs["q_crossed"] = jnp.concatenate([-second, first], axis=-1)
    narrow = functools.partial(
        plgpu.SMEM,
        dtype=k_pool.dtype,
        transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)),
    )
    scratch = {
        "q": narrow((QUERIES, head_dim)),
        "k": narrow((STAGES, SLOTS, head_dim)),
        "v": narrow((STAGES, SLOTS, head_dim)),
        "weights": narrow((QUERIES, SLOTS)),
        # Queries on their way in, results on their way out.
        "wide": plgpu.SMEM((QUERIES, COLUMNS), jnp.float32),
        "lse": plgpu.SMEM((QUERIES,), jnp.float32),
        "turns": plgpu.SMEM((3, COLUMNS), jnp.int32),
        "limit": plgpu.SMEM((QUERIES,), jnp.int32),
        "slot_position": plgpu.SMEM((STAGES, SLOTS), jnp.int32),
    }
    if shared:
        column = plgpu.SMEM((STAGES, QUERIES), jnp.int32)
        scratch |= {"frame": column, "held": column}
    walk = functools.partial(
        _walk,
        layer * pages * page_size,
        page_size,
        splits,
        min(queries, QUERIES),
        interpreted=bool(interpret),
    )

    def kernel(inputs: dict[str, Ref], out: Ref, lse: Ref) -> None:
        # One arrival for each copy of a step: its pages of keys and values, and its columns.
        copies = 2 * (SLOTS // page_size) + (3 if shared else 1)
        pl.run_scoped(
            functools.partial(walk, inputs, out, lse),
            scratch,
            plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
            plgpu.Barrier(),
        )

    shape = splits, tiles, kv_heads, queries
    return pl.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((*shape, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        mesh=plgpu.Mesh(
            grid=(-(-queries // QUERIES) * splits, kv_heads, tiles),
            grid_names=("block", "head", "tile"),
        ),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True
        ),
        interpret=interpret,
        name="flash_attention",
    )(inputs)


def merge_parts(out: jax.Array, lse: jax.Array) -> jax.Array:
    """Joins outputs over sets of slots: `flash.merge` of normalised parts.

    Args:
      out: f32 [parts, ..., head_dim].
      lse: f32 [parts, ...]; `flash.MASKED` of a part that saw nothing.

    Returns:
      The output over all slots, zero where no part saw one.
    """
    share = jnp.where(lse > flash.MASKED, jnp.exp(lse - lse.max(axis=0)[None]), jnp.zeros_like(lse))
    total = share.sum(axis=0)
    total = jnp.where(total > 0, total, jnp.ones_like(total))
    return (out * share[..., None]).sum(axis=0) / total[..., None]


def _walk(
    first_slot: int,
    page_size: int,
    splits: int,
    given: int,
    inputs: dict[str, Ref],
    out: Ref,
    lse: Ref,
    smem: dict[str, Ref],
    arrived: Ref,
    brought: Ref,
    *,
    interpreted: bool,
) -> None:
    """Attends 64 queries, of which some are given, to their part of what their tile sees."""
    number, head, tile = (jax.lax.axis_index(name) for name in ("block", "head", "tile"))
    split, block = jax.lax.rem(number, splits), jax.lax.div(number, splits)
    steps, count, last = (inputs[name][tile] for name in ("of_tile", "count", "last"))
    begin, end = count * split // splits, count * (split + 1) // splits
    queries, pages = pl.ds(block * QUERIES, QUERIES), SLOTS // page_size
    rows, wide = pl.ds(block * QUERIES, given), smem["wide"].at[pl.ds(0, given)]
    parts = [pl.ds(start, COLUMNS) for start in range(0, smem["q"].shape[1], COLUMNS)]

    def fetch(step: jax.Array) -> None:
        """Starts the copies of a step."""
        stage = jax.lax.rem(step, STAGES)
        done = arrived.at[stage]
        for index in range(pages):
            slot = first_slot + inputs["page"][steps, step * pages + index] * page_size
            there, here = pl.ds(slot, page_size), pl.ds(index * page_size, page_size)
            for name in ("k", "v"):
                plgpu.copy_gmem_to_smem(
                    inputs[name].at[there, head], smem[name].at[stage, here], done
                )
        positions = inputs["slot_position"].at[steps, step]
        plgpu.copy_gmem_to_smem(positions, smem["slot_position"].at[stage], done)
        if "held" in smem:
            for name in ("frame", "held"):
                column = inputs[name].at[tile, step, queries]
                plgpu.copy_gmem_to_smem(column, smem[name].at[stage], done)

    def bring(there: Ref, here: Ref) -> None:
        plgpu.copy_gmem_to_smem(there, here, brought)
        plgpu.barrier_wait(brought)

    def turn(frame: jax.Array) -> None:
        """Rotates the queries into frames: one, or [QUERIES]."""
        shape = QUERIES, COLUMNS
        tables = [smem["turns"][index] for index in range(3)]
        if frame.ndim:
            angle = rope.angles(-_down(frame, shape), *(_across(table, shape) for table in tables))
            cos, sin = jnp.cos(angle), jnp.sin(angle)
        else:
            angle = rope.angles(-frame, *tables)
            cos, sin = (_across(factor, shape) for factor in (jnp.cos(angle), jnp.sin(angle)))
        for index, columns in enumerate(parts):
            bring(inputs["q"].at[tile, head, rows, columns], wide)
            turned = smem["wide"][...] * cos
            if "q_crossed" in inputs:
                bring(inputs["q_crossed"].at[tile, head, rows], wide)
                turned = turned + smem["wide"][...] * sin
            else:
                bring(inputs["q"].at[tile, head, rows, parts[1 - index]], wide)
                turned = turned + smem["wide"][...] * (sin if index else -sin)
            smem["q"][:, columns] = turned.astype(smem["q"].dtype)
        plgpu.commit_smem()

    def attend(step: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        maximum, total, weighted = carry
        stage = jax.lax.rem(step, STAGES)
        if "held" in smem:
            plgpu.barrier_wait(arrived.at[stage])
            turn(smem["frame"][stage])
        else:
            frame = inputs["frame"][steps, step]
            before = inputs["frame"][steps, jnp.maximum(step - 1, 0)]
            pl.when(jnp.logical_or(step == begin, frame != before))(lambda: turn(frame))
            plgpu.barrier_wait(arrived.at[stage])

        @pl.when(inputs["stop"][steps, step] > last)
        def _() -> None:
            # Slots that no query sees may hold anything; a weight of zero would keep a NaN.
            written = _down(smem["slot_position"][stage], (SLOTS, COLUMNS)) <= last
            for columns in parts:
                value = smem["v"][stage, :, columns]
                smem["v"][stage, :, columns] = jnp.where(written, value, jnp.zeros_like(value))
            plgpu.commit_smem()

        shape = QUERIES, SLOTS
        scores = _scores(smem["q"], smem["k"].at[stage], interpreted=interpreted)
        seen = _across(smem["slot_position"][stage], shape) <= _down(smem["limit"][...], shape)
        if "held" in smem:
            page = jax.lax.broadcasted_iota(jnp.int32, shape, 1) // page_size
            held = jax.lax.shift_right_logical(_down(smem["held"][stage], shape), page) & 1
            seen = jnp.logical_and(seen, held == 1)
        scores = jnp.where(seen, scores, flash.MASKED)
        higher = jnp.maximum(maximum, scores.max(axis=1))
        weights = jnp.exp2(scores - _down(higher, shape))
        shrink = jnp.exp2(maximum - higher)
        smem["weights"][...] = weights.astype(smem["weights"].dtype)
        plgpu.commit_smem()

        def values(columns: Any, accumulator: Ref) -> jax.Array:
            plgpu.wgmma(accumulator, smem["weights"], smem["v"].at[stage, :, columns])
            return accumulator[...]

        weighted = tuple(
            part * _down(shrink, part.shape)
            + pl.run_scoped(functools.partial(values, columns), plgpu.ACC(part.shape, jnp.float32))
            for part, columns in zip(weighted, parts, strict=True)
        )
        pl.when(step + STAGES < end)(lambda: fetch(step + STAGES))
        return higher, total * shrink + weights.sum(axis=1), weighted

    for ahead in range(STAGES):
        pl.when(begin + ahead < end)(functools.partial(fetch, begin + ahead))
    bring(inputs["limit"].at[tile, queries], smem["limit"])
    bring(inputs["turns"], smem["turns"])
    start = (
        jnp.full((QUERIES,), flash.MASKED, jnp.float32),
        jnp.zeros((QUERIES,), jnp.float32),
        tuple(jnp.zeros((QUERIES, COLUMNS), jnp.float32) for _ in parts),
    )
    maximum, total, weighted = jax.lax.fori_loop(begin, end, attend, start)
    # Until the first slot is seen, all slots have weight: queries that saw none hold no result.
    score = (maximum + jnp.log2(total)) * np.float32(1 / LOG2E)
    smem["lse"][...] = jnp.where(maximum > flash.MASKED, score, flash.MASKED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem["lse"].at[pl.ds(0, given)], lse.at[split, tile, head, rows])
    saw = _down(maximum, (QUERIES, COLUMNS)) > flash.MASKED
    total = _down(total, (QUERIES, COLUMNS))
    for part, columns in zip(weighted, parts, strict=True):
        smem["wide"][...] = jnp.where(saw, part / total, jnp.zeros_like(part))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(wide, out.at[split, tile, head, rows, columns])
        plgpu.wait_smem_to_gmem(0)


def _down(column: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One number for each row."""
    return jax.lax.broadcast_in_dim(column, shape, (0,))


def _across(row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One number for each column."""
    return jax.lax.broadcast_in_dim(row, shape, (1,))


def _scores(q: Ref, k: Ref, *, interpreted: bool) -> jax.Array:
    """Products of queries and keys. The simulator's wgmma takes no transposed operand."""
    if interpreted:
        exact = jax.lax.Precision.HIGHEST
        return jnp.dot(q[...], k[...].T, preferred_element_type=jnp.float32, precision=exact)

    def product(accumulator: Ref) -> jax.Array:
        plgpu.wgmma(accumulator, q, plgpu.transpose_ref(k, (1, 0)))
        return accumulator[...]

    return pl.run_scoped(product, plgpu.ACC((q.shape[0], k.shape[0]), jnp.float32))

"""What the Mosaic GPU attention kernels share: 64 queries against pages, 64 slots at a time.

A block of threads takes the queries of a few rows of one KV head and walks a list of steps. Bulk
copies bring the pages of the next step into shared memory while tensor cores multiply those of this
one. Queries are turned in float32 when the frame changes; keys and values are used as they lie in
the pool. Queries come from where the model left them, row by row, and results go there.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tokendance_jax.kernels import flash, rope
from tokendance_jax.kernels.gpu_tiles import QUERIES, SLOTS, Parts, Steps, Tiles

# Steps whose pages are in shared memory or on their way.
STAGES = 2
# Columns of a head that pass through registers at a time.
COLUMNS = 64
LOG2E = math.log2(math.e)

Ref = Any


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


def flash_attention_gpu(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    layer: int,
    tiles: Tiles,
    steps: Steps,
    *,
    theta: float,
    before: Parts | None = None,
    parts: tuple[int, jax.Array] | None = None,
    with_lse: bool = True,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """Attends tiles of rows to the slots at positions up to each query's limit.

    Args:
      q: f32 [rows, heads, head_dim], rotated at logical positions, not scaled.
      k_pool: bf16 [layers, pages, page_size, kv_heads, head_dim].
      v_pool: as k_pool.
      layer: index of the layer.
      tiles: the rows; at most `QUERIES` queries of a KV head in a tile.
      steps: what the tiles walk.
      theta: base of the rotary frequencies.
      before: what the rows saw already, to be joined with what they see here.
      parts: most parts that a tile's steps are split into, for different blocks, and how many it
        are, i32 []; None: the result is whole.
      with_lse: whether log-sum-exps are wanted.
      interpret: parameters of the simulator, to run on a CPU.

    Returns:
      The output f32 [1, rows, heads, head_dim], or bf16 [parts, ...] over each part; zero where a
      row saw nothing, and anything in rows of no tile. If wanted, the log-sum-exp of the queries'
      scores f32 [1 or parts, tiles, kv_heads, QUERIES], where they saw nothing `flash.MASKED`.
    """
    _, heads, head_dim = q.shape
    _, pages, page_size, kv_heads, _ = k_pool.shape
    (count, tile_rows), group = tiles.row.shape, heads // kv_heads
    most, used = (1, jnp.ones((), jnp.int32)) if parts is None else parts
    inputs = {
        "q": q,
        "k": k_pool.reshape(-1, kv_heads, head_dim),
        "v": v_pool.reshape(-1, kv_heads, head_dim),
        "turns": jnp.asarray(rope.turn_tables(theta, head_dim)),
        "stop": steps.slot_position.max(axis=2),
        "parts": used[None],
        **vars(tiles),
        **{name: value for name, value in vars(steps).items() if value is not None},
    }
    narrow = functools.partial(
        plgpu.SMEM,
        dtype=k_pool.dtype,
        transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)),
    )
    column = plgpu.SMEM((QUERIES,), jnp.int32)
    out_type = jnp.float32 if parts is None else jnp.bfloat16
    scratch = {
        "q": narrow((QUERIES, head_dim)),
        "k": narrow((STAGES, SLOTS, head_dim)),
        "v": narrow((STAGES, SLOTS, head_dim)),
        # Queries on their way in, results on their way out.
        "wide": plgpu.SMEM((QUERIES, COLUMNS), jnp.float32),
        "lse": plgpu.SMEM((QUERIES,), jnp.float32),
        "turns": plgpu.SMEM((3, head_dim // 2), jnp.int32),
        "limit": column,
        "slot_position": plgpu.SMEM((STAGES, SLOTS), jnp.int32),
    }
    if steps.held is not None:
        scratch |= {"frame": column, "held": plgpu.SMEM((STAGES, QUERIES), jnp.int32)}
    if before is not None:
        inputs |= {f"before_{name}": value for name, value in vars(before).items()}
    if interpret:
        scratch["weights"] = narrow((QUERIES, SLOTS))
    if before is not None or parts is not None:
        scratch["part"] = plgpu.SMEM((QUERIES, COLUMNS), jnp.bfloat16)
    walk = functools.partial(
        _walk, layer * pages * page_size, page_size, group, interpreted=bool(interpret)
    )

    def kernel(inputs: dict[str, Ref], out: Ref, *lse: Ref) -> None:
        # One arrival for each copy of a step: its pages of keys and values, and its columns.
        copies = 2 * (SLOTS // page_size) + (1 if steps.held is None else 2)
        pl.run_scoped(
            functools.partial(walk, inputs, out, lse[0] if lse else None),
            scratch,
            plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=tile_rows),
        )

    results = [jax.ShapeDtypeStruct((most, *q.shape), out_type)]
    if with_lse:
        results.append(jax.ShapeDtypeStruct((most, count, kv_heads, QUERIES), jnp.float32))
    return pl.kernel(
        kernel,
        out_type=tuple(results),
        mesh=plgpu.Mesh(grid=(most, kv_heads, count), grid_names=("part", "head", "tile")),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True
        ),
        interpret=interpret,
        name="flash_attention",
    )(inputs)


def _walk(
    first_slot: int,
    page_size: int,
    group: int,
    inputs: dict[str, Ref],
    out: Ref,
    lse: Ref | None,
    smem: dict[str, Ref],
    arrived: Ref,
    brought: Ref,
    rows_brought: Ref,
    *,
    interpreted: bool,
) -> None:
    """Attends the queries of a tile to their part of what it sees."""
    part, head, tile = (jax.lax.axis_index(name) for name in ("part", "head", "tile"))
    parts = inputs["parts"][0]
    steps, count, last = (inputs[name][tile] for name in ("of_tile", "count", "last"))
    mine = part < parts
    count, parts = jnp.where(mine, count, 0), jnp.maximum(parts, 1)
    begin, end = count * part // parts, count * (part + 1) // parts
    (rows, _, head_dim), tile_rows = inputs["q"].shape, inputs["row"].shape[1]
    pages, half = SLOTS // page_size, head_dim // 2
    columns_of_head = [pl.ds(start, COLUMNS) for start in range(0, head_dim, COLUMNS)]

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
            plgpu.copy_gmem_to_smem(inputs["held"].at[tile, step], smem["held"].at[stage], done)

    def bring(there: Ref, here: Ref) -> None:
        plgpu.copy_gmem_to_smem(there, here, brought)
        plgpu.barrier_wait(brought)

    def each_row(act: Callable[[jax.Array, Any, Any], None]) -> None:
        """Calls with each row, its heads, and the tile's queries that are the row's."""

        @pl.loop(0, tile_rows)
        def _(index: jax.Array) -> None:
            first = (inputs["place"][tile] + index) * group
            act(inputs["row"][tile, index], pl.ds(head * group, group), pl.ds(first, group))

    def bring_rows(there: Ref, here: Ref, columns: Any) -> None:
        """Brings columns of the rows' queries; where there is no row, those of another one."""

        def copy(row: jax.Array, heads: Any, queries: Any) -> None:
            source = there.at[jnp.minimum(row, rows - 1), heads, columns]
            plgpu.copy_gmem_to_smem(source, here.at[queries], rows_brought)

        each_row(copy)
        plgpu.barrier_wait(rows_brought)

    def turn(frame: jax.Array) -> None:
        """Rotates the queries into frames: one, or [QUERIES]."""
        shape, wide = (QUERIES, half), smem["wide"]
        tables = [smem["turns"][index] for index in range(3)]
        if frame.ndim:
            angle = rope.angles(-_down(frame, shape), *(_across(table, shape) for table in tables))
            cos, sin = jnp.cos(angle), jnp.sin(angle)
        else:
            angle = rope.angles(-frame, *tables)
            cos, sin = (_across(factor, shape) for factor in (jnp.cos(angle), jnp.sin(angle)))
        # In units of log2, so that the softmax takes powers of two.
        scale = np.float32(LOG2E / math.sqrt(head_dim))
        cos, sin = cos * scale, sin * scale
        if half == COLUMNS:
            for index, columns in enumerate(columns_of_head):
                bring_rows(inputs["q"], wide, columns)
                turned = wide[...] * cos
                plgpu.commit_smem()
                bring_rows(inputs["q"], wide, columns_of_head[1 - index])
                turned = turned + wide[...] * (sin if index else -sin)
                smem["q"][:, columns] = turned.astype(smem["q"].dtype)
                plgpu.commit_smem()
            return
        bring_rows(inputs["q"], wide, columns_of_head[0])
        first, second = wide[:, pl.ds(0, half)], wide[:, pl.ds(half, half)]
        plgpu.commit_smem()
        # Tensor cores read tiles of 64 columns, which are stored as a whole.
        wide[:, pl.ds(0, half)] = first * cos - second * sin
        wide[:, pl.ds(half, half)] = second * cos + first * sin
        plgpu.commit_smem()
        smem["q"][...] = wide[...].astype(smem["q"].dtype)
        plgpu.commit_smem()

    def attend(step: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        maximum, total, weighted = carry
        stage = jax.lax.rem(step, STAGES)
        if "held" in smem:

            @pl.when(jnp.logical_or(step == begin, inputs["moved"][tile, step] > 0))
            def _() -> None:
                bring(inputs["frame"].at[tile, step], smem["frame"])
                turn(smem["frame"][...])

        else:
            frame = inputs["frame"][steps, step]
            before = inputs["frame"][steps, jnp.maximum(step - 1, 0)]
            pl.when(jnp.logical_or(step == begin, frame != before))(lambda: turn(frame))
        plgpu.barrier_wait(arrived.at[stage])

        @pl.when(inputs["stop"][steps, step] > last)
        def _() -> None:
            # Slots that no query sees may hold anything; a weight of zero would keep a NaN.
            written = _down(smem["slot_position"][stage], (SLOTS, COLUMNS)) <= last
            for columns in columns_of_head:
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
        narrow = weights.astype(smem["v"].dtype)
        if interpreted:  # the simulator's tensor cores take no operand from registers
            smem["weights"][...] = narrow
            narrow = smem["weights"]

        def values(columns: Any, accumulator: Ref) -> jax.Array:
            plgpu.wgmma(accumulator, narrow, smem["v"].at[stage, :, columns])
            return accumulator[...]

        weighted = tuple(
            part * _down(shrink, part.shape)
            + pl.run_scoped(functools.partial(values, columns), plgpu.ACC(part.shape, jnp.float32))
            for part, columns in zip(weighted, columns_of_head, strict=True)
        )
        # No warp reads the stage any more.
        plgpu.commit_smem()
        pl.when(step + STAGES < end)(lambda: fetch(step + STAGES))
        return higher, total * shrink + weights.sum(axis=1), weighted

    def join(number: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        """Takes up a part of what the queries saw before: a sum of one at its log-sum-exp."""
        maximum, total, weighted = carry
        bring(inputs["before_lse"].at[number, inputs["before_of_tile"][tile], head], smem["lse"])
        score = smem["lse"][...]
        plgpu.commit_smem()
        saw = score > flash.MASKED
        score = jnp.where(saw, score * np.float32(LOG2E), flash.MASKED)
        higher = jnp.maximum(maximum, score)
        shrink, share = jnp.exp2(maximum - higher), jnp.exp2(score - higher)
        share = jnp.where(saw, share, jnp.zeros_like(share))
        joined = []
        for part, columns in zip(weighted, columns_of_head, strict=True):
            bring_rows(inputs["before_out"].at[number], smem["part"], columns)
            found = smem["part"][...].astype(jnp.float32)
            plgpu.commit_smem()
            # What stands in places of no row may be no number.
            found = jnp.where(_down(share, found.shape) > 0, found, jnp.zeros_like(found))
            joined.append(part * _down(shrink, part.shape) + found * _down(share, part.shape))
        return higher, total * shrink + share, tuple(joined)

    for ahead in range(STAGES):
        pl.when(begin + ahead < end)(functools.partial(fetch, begin + ahead))
    bring(inputs["limit"].at[tile], smem["limit"])
    bring(inputs["turns"], smem["turns"])
    carry = (
        jnp.full((QUERIES,), flash.MASKED, jnp.float32),
        jnp.zeros((QUERIES,), jnp.float32),
        tuple(jnp.zeros((QUERIES, COLUMNS), jnp.float32) for _ in columns_of_head),
    )
    if "before_out" in inputs:
        carry = jax.lax.fori_loop(0, inputs["before_count"][tile], join, carry)
    maximum, total, weighted = jax.lax.fori_loop(begin, end, attend, carry)
    if lse is not None:
        score = (maximum + jnp.log2(total)) * np.float32(1 / LOG2E)
        smem["lse"][...] = jnp.where(maximum > flash.MASKED, score, flash.MASKED)
        plgpu.commit_smem()
        pl.when(mine)(lambda: plgpu.copy_smem_to_gmem(smem["lse"], lse.at[part, tile, head]))
    # Until the first slot is seen, all slots have weight: queries that saw none hold no result.
    saw = _down(maximum, (QUERIES, COLUMNS)) > flash.MASKED
    total = _down(total, (QUERIES, COLUMNS))
    result = smem["wide" if out.dtype == jnp.float32 else "part"]
    for values, columns in zip(weighted, columns_of_head, strict=True):
        values = jnp.where(saw, values / total, jnp.zeros_like(values))
        result[...] = values.astype(result.dtype)
        plgpu.commit_smem()

        def send(row: jax.Array, heads: Any, queries: Any, columns: Any = columns) -> None:
            @pl.when(jnp.logical_and(mine, row < rows))
            def _() -> None:
                plgpu.copy_smem_to_gmem(result.at[queries], out.at[part, row, heads, columns])

        each_row(send)
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

"""The Mosaic GPU kernel of round and decode attention: 64 queries against 64 slots at a time.

A thread block handles the queries that a few rows have for one KV head, and goes through a list of
steps. Bulk copies load the pages of the next step into shared memory while tensor cores multiply
those of the current step. Queries are rotated in float32 when the frame changes; keys and values
are used as the pool stores them. The kernel reads queries from the model's array and writes results
to an array of the same layout, row by row.

With a float32 pool, the threads first split the pages of a step into bfloat16 planes. The copies of
the next step start after that.
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

from tokendance_jax.kernels import flash, storage
from tokendance_jax.kernels.gpu_planes import planes_of, products, scores, split, store
from tokendance_jax.kernels.gpu_tiles import QUERIES, SLOTS, Parts, Steps, Tiles
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import Rope, angles

# Steps whose pages are in shared memory or on their way there. With a float32 pool, shared memory
# has the pages of one step, and their planes.
STAGES = 2
# Columns of a head that pass through registers at a time.
COLUMNS = 64
LOG2E = math.log2(math.e)

Ref = Any


def check_pool(pool: jax.Array) -> None:
    """Raises NotImplementedError for pools that the attention kernels cannot read."""
    _, _, page_size, _, head_dim = pool.shape
    storage.check_numbers(pool)
    if head_dim not in (64, 128) or page_size not in (8, 16, 32, 64):
        raise NotImplementedError(
            f"pages of {page_size} slots with heads of {head_dim}: the kernel takes pages of 8 to "
            "64 slots and heads of 64 or 128"
        )


# With jit, the kernel is traced and lowered once for all layers of a program, and equal kernels are
# compiled once.
@functools.partial(jax.jit, static_argnames=("rope", "most_parts", "with_lse", "interpret"))
def flash_attention_gpu(
    q: jax.Array,
    kv: PagedKV,
    layer: int | jax.Array,
    tiles: Tiles,
    steps: Steps,
    *,
    rope: Rope,
    before: Parts | None = None,
    parts: jax.Array | None = None,
    most_parts: int = 1,
    with_lse: bool = True,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """Attends tiles of rows to the slots at positions up to each query's limit.

    Args:
      q: f32 [rows, heads, head_dim], rotated at logical positions, not scaled.
      kv: the pool, bfloat16 or float32.
      layer: index of the layer; passed as data, so that all layers share one kernel.
      tiles: the rows; a tile has at most `QUERIES` queries for each KV head.
      steps: the steps that the tiles go through.
      rope: the rotary embedding.
      before: the rows' results over other slots, to be merged into the results of this call.
      parts: number of parts that a tile's steps are split into, each for a thread block of its own,
        i32 []; None: the steps are not split.
      most_parts: the largest value that `parts` can have.
      with_lse: whether to also return log-sum-exps.
      interpret: parameters of the simulator, to run on a CPU.

    Returns:
      The output f32 [1, rows, heads, head_dim]; with `parts`, the output of each part, [most_parts,
      rows, heads, head_dim] in the pool's precision. It is zero where a row saw nothing, and
      undefined in rows that are in no tile and in parts that are not in use. With `with_lse`, also
      the log-sum-exp of the queries' scores f32 [most_parts, tiles, kv_heads, QUERIES];
      `flash.MASKED` where a query saw nothing.
    """
    _, heads, head_dim = q.shape
    _, pages, page_size, kv_heads, _ = kv.k.shape
    (count, tile_rows), group = tiles.row.shape, heads // kv_heads
    used = jnp.ones((), jnp.int32) if parts is None else parts
    inputs = {
        "q": q,
        "k": kv.k.reshape(-1, kv_heads, head_dim),
        "v": kv.v.reshape(-1, kv_heads, head_dim),
        "turns": jnp.asarray(rope.turn_tables(head_dim)),
        "stop": steps.slot_position.max(axis=2),
        "parts": used[None],
        "layer": jnp.asarray(layer, jnp.int32)[None],
        **vars(tiles),
        **{name: value for name, value in vars(steps).items() if value is not None},
    }
    planes = planes_of(kv.k.dtype)
    column = plgpu.SMEM((QUERIES,), jnp.int32)
    out_type = jnp.float32 if parts is None else kv.k.dtype
    pages_of_steps = _swizzled((STAGES // planes, SLOTS, head_dim), kv.k.dtype)
    scratch = {
        "q": _swizzled((planes, QUERIES, head_dim)),
        "k": pages_of_steps,
        "v": pages_of_steps,
        # A buffer for queries on their way in and results on their way out.
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
    if planes > 1:
        scratch |= {f"{name}_planes": _swizzled((planes, SLOTS, head_dim)) for name in ("k", "v")}
    elif before is not None or parts is not None:
        scratch["part"] = plgpu.SMEM((QUERIES, COLUMNS), jnp.bfloat16)
    if interpret and planes == 1:
        scratch["weights"] = _swizzled((planes, QUERIES, SLOTS))
    walk = functools.partial(
        _walk, pages * page_size, page_size, group, interpreted=bool(interpret)
    )

    def kernel(inputs: dict[str, Ref], out: Ref, *lse: Ref) -> None:
        # One arrival for each copy of a step: pages of keys and values, slot positions, and `held`.
        copies = 2 * (SLOTS // page_size) + (1 if steps.held is None else 2)
        pl.run_scoped(
            functools.partial(walk, inputs, out, lse[0] if lse else None),
            scratch,
            plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=tile_rows),
        )

    results = [jax.ShapeDtypeStruct((most_parts, *q.shape), out_type)]
    if with_lse:
        results.append(jax.ShapeDtypeStruct((most_parts, count, kv_heads, QUERIES), jnp.float32))
    call: Any = pl.kernel(
        kernel,
        out_type=tuple(results),
        mesh=plgpu.Mesh(grid=(most_parts, kv_heads, count), grid_names=("part", "head", "tile")),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True
        ),
        interpret=interpret,
        name="flash_attention",
    )
    return call(inputs)


def _walk(
    slots_of_layer: int,
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
    """Attends the queries that a tile has for one KV head to one part of the tile's steps."""
    part, head, tile = (jax.lax.axis_index(name) for name in ("part", "head", "tile"))
    parts, first_slot = inputs["parts"][0], inputs["layer"][0] * slots_of_layer
    steps, count, last = (inputs[name][tile] for name in ("of_tile", "count", "last"))
    mine = part < parts
    count, parts = jnp.where(mine, count, 0), jnp.maximum(parts, 1)
    begin, end = count * part // parts, count * (part + 1) // parts
    (rows, _, head_dim), tile_rows = inputs["q"].shape, inputs["row"].shape[1]
    pages, half = SLOTS // page_size, head_dim // 2
    columns_of_head = [pl.ds(start, COLUMNS) for start in range(0, head_dim, COLUMNS)]
    (planes, *_), (ahead, *_) = smem["q"].shape, smem["k"].shape

    def fetch(step: jax.Array) -> None:
        """Starts the copies of a step."""
        stage, place = jax.lax.rem(step, STAGES), jax.lax.rem(step, ahead)
        done = arrived.at[stage]
        for index in range(pages):
            slot = first_slot + inputs["page"][steps, step * pages + index] * page_size
            there, here = pl.ds(slot, page_size), pl.ds(index * page_size, page_size)
            for name in ("k", "v"):
                plgpu.copy_gmem_to_smem(
                    inputs[name].at[there, head], smem[name].at[place, here], done
                )
        positions = inputs["slot_position"].at[steps, step]
        plgpu.copy_gmem_to_smem(positions, smem["slot_position"].at[stage], done)
        if "held" in smem:
            plgpu.copy_gmem_to_smem(inputs["held"].at[tile, step], smem["held"].at[stage], done)

    def passage(dtype: jnp.dtype) -> Ref:
        """Returns the buffer that columns of rows pass through."""
        return smem["wide" if dtype == jnp.float32 else "part"]

    def bring(there: Ref, here: Ref) -> None:
        plgpu.copy_gmem_to_smem(there, here, brought)
        plgpu.barrier_wait(brought)

    def each_row(act: Callable[[jax.Array, Any, Any], None]) -> None:
        """Calls `act` with each row, its query heads, and the places of its queries in the tile."""

        @pl.loop(0, tile_rows)
        def _(index: jax.Array) -> None:
            first = (inputs["place"][tile] + index) * group
            act(inputs["row"][tile, index], pl.ds(head * group, group), pl.ds(first, group))

    def bring_rows(there: Ref, here: Ref, columns: Any) -> None:
        """Copies columns of the rows' queries; places without a row get those of another row."""

        def copy(row: jax.Array, heads: Any, queries: Any) -> None:
            source = there.at[jnp.minimum(row, rows - 1), heads, columns]
            plgpu.copy_gmem_to_smem(source, here.at[queries], rows_brought)

        each_row(copy)
        plgpu.barrier_wait(rows_brought)

    def turn(frame: jax.Array) -> None:
        """Rotates the queries into one frame, i32 [], or each into its own, i32 [QUERIES]."""
        shape, wide = (QUERIES, half), smem["wide"]
        tables = [smem["turns"][index] for index in range(3)]
        if frame.ndim:
            angle = angles(-_down(frame, shape), *(_across(table, shape) for table in tables))
            cos, sin = jnp.cos(angle), jnp.sin(angle)
        else:
            angle = angles(-frame, *tables)
            cos, sin = (_across(factor, shape) for factor in (jnp.cos(angle), jnp.sin(angle)))
        # Scores are in units of log2, so that the softmax can use exp2.
        scale = np.float32(LOG2E / math.sqrt(head_dim))
        cos, sin = cos * scale, sin * scale
        if half == COLUMNS:
            for index, columns in enumerate(columns_of_head):
                bring_rows(inputs["q"], wide, columns)
                turned = wide[...] * cos
                plgpu.commit_smem()
                bring_rows(inputs["q"], wide, columns_of_head[1 - index])
                turned = turned + wide[...] * (sin if index else -sin)
                store(smem["q"].at[:, :, columns], turned)
                plgpu.commit_smem()
            return
        bring_rows(inputs["q"], wide, columns_of_head[0])
        first, second = wide[:, pl.ds(0, half)], wide[:, pl.ds(half, half)]
        plgpu.commit_smem()
        # Tensor cores read tiles of 64 columns, which must be stored whole: join the halves first.
        wide[:, pl.ds(0, half)] = first * cos - second * sin
        wide[:, pl.ds(half, half)] = second * cos + first * sin
        plgpu.commit_smem()
        store(smem["q"], wide[...])
        plgpu.commit_smem()

    def operand(name: str, place: jax.Array, first: Any) -> list[Ref]:
        """Returns the planes of a step's keys or values: its pages as they are, or split."""
        if planes == 1:
            return [smem[name].at[place]]
        for columns in columns_of_head:
            there = smem[f"{name}_planes"].at[:, :, columns]
            store(there, smem[name][place, :, columns], first)
        return planes_in(smem[f"{name}_planes"], first)

    def share_out(weights: jax.Array, first: Any) -> list[Any]:
        """Returns the planes of weights. Two would fill the registers: they overwrite the keys."""
        if planes == 1 and not interpreted:
            return split(weights, planes)
        # The simulator does not support tensor core operands in registers.
        there = smem["k_planes"].at[:, :, columns_of_head[0]] if planes > 1 else smem["weights"]
        plgpu.commit_smem()
        store(there, weights, first)
        plgpu.commit_smem()
        return planes_in(there, first)

    def planes_in(there: Ref, first: Any) -> list[Ref]:
        return [there.at[first + index] for index in range(planes)]

    def attend(step: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        maximum, total, weighted = carry
        stage, place = jax.lax.rem(step, STAGES), jax.lax.rem(step, ahead)
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
            # Slots that no query sees may hold NaN, which a weight of zero would not remove.
            written = _down(smem["slot_position"][stage], (SLOTS, COLUMNS)) <= last
            for columns in columns_of_head:
                value = smem["v"][place, :, columns]
                smem["v"][place, :, columns] = jnp.where(written, value, jnp.zeros_like(value))
            plgpu.commit_smem()

        def fetch_next() -> None:
            """Starts the next step's copies once no warp reads the pages of this step any more."""
            plgpu.commit_smem()
            pl.when(step + ahead < end)(lambda: fetch(step + ahead))

        shape = QUERIES, SLOTS
        # A zero that is unknown to the compiler, which would otherwise keep the addresses of all
        # planes in registers.
        first = 0 if planes == 1 else jnp.minimum(inputs["stop"][steps, step], 0)
        k, v = operand("k", place, first), operand("v", place, first)
        if planes > 1:
            fetch_next()
        score = scores(planes_in(smem["q"], first), k, interpreted=interpreted)
        seen = _across(smem["slot_position"][stage], shape) <= _down(smem["limit"][...], shape)
        if "held" in smem:
            page = jax.lax.broadcasted_iota(jnp.int32, shape, 1) // page_size
            held = jax.lax.shift_right_logical(_down(smem["held"][stage], shape), page) & 1
            seen = jnp.logical_and(seen, held == 1)
        score = jnp.where(seen, score, flash.MASKED)
        higher = jnp.maximum(maximum, score.max(axis=1))
        weights = jnp.exp2(score - _down(higher, shape))
        shrink = jnp.exp2(maximum - higher)
        shares = share_out(weights, first)
        weighted = tuple(
            part * _down(shrink, part.shape)
            + products(shares, [plane.at[:, columns] for plane in v], part.shape)
            for part, columns in zip(weighted, columns_of_head, strict=True)
        )
        if planes > 1:  # wait until no warp reads the planes
            plgpu.commit_smem()
        else:
            fetch_next()
        return higher, total * shrink + weights.sum(axis=1), weighted

    def join(number: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        """Merges a part of `before` into the carry: a sum of one at the part's log-sum-exp."""
        maximum, total, weighted = carry
        through = passage(inputs["before_out"].dtype)
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
            bring_rows(inputs["before_out"].at[number], through, columns)
            found = through[...].astype(jnp.float32)
            plgpu.commit_smem()
            # Places without a row may hold NaN.
            found = jnp.where(_down(share, found.shape) > 0, found, jnp.zeros_like(found))
            joined.append(part * _down(shrink, part.shape) + found * _down(share, part.shape))
        return higher, total * shrink + share, tuple(joined)

    for step in range(ahead):
        pl.when(begin + step < end)(functools.partial(fetch, begin + step))
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
    # Masked slots have weight until a query sees its first slot, so the values of queries that saw
    # none are not results.
    saw = _down(maximum, (QUERIES, COLUMNS)) > flash.MASKED
    total = _down(total, (QUERIES, COLUMNS))
    result = passage(out.dtype)
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
    """Broadcasts one number per row."""
    return jax.lax.broadcast_in_dim(column, shape, (0,))


def _across(row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Broadcasts one number per column."""
    return jax.lax.broadcast_in_dim(row, shape, (1,))


def _swizzled(shape: tuple[int, ...], dtype: jnp.dtype = jnp.bfloat16) -> Any:
    """Shared memory in the layout that tensor cores read: tiles of eight rows of 128 bytes."""
    tiles = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiles, plgpu.SwizzleTransform(128)))

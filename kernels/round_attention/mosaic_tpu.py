"""Round attention as a Mosaic TPU kernel.

One program goes through the tiles in use and, of each, through the key blocks that it sees. The
pages of a block, and the rows of the next tile, come while the block before is attended to. Tiles
are gathered and scattered row by row, by copies: rows may stand in any order.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tokendance_jax.kernels import flash, flash_tpu, rope
from tokendance_jax.kernels.flash_tpu import PLACES, TILE, product
from tokendance_jax.kernels.lanes import LaneTables, RowTiles, SharedRows

# Rows of a small tile: what is left of a lane behind its full tiles is often little.
SMALL_TILE = 32
# Numbers of a row of memory: a log-sum-exp is sent in each of them.
LSE_WIDTH = 128

Ref = Any


def round_attention_mosaic_tpu(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    layer: int,
    position: jax.Array,
    tables: LaneTables,
    tiles: RowTiles,
    *,
    theta: float,
    shared: SharedRows | None = None,
    with_lse: bool = False,
    interpret: Any = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Arguments as `api.round_attention`.

    Pools are read row by row. XLA lays out large pools with heads narrower than 128 in another way:
    who has such pools gives them the layout of rows, or XLA copies them.

    Args:
      q: f32 [rows, heads, head_dim].
      k_pool: [layers, pages, page_size, kv_heads, head_dim], bfloat16 or float32.
      v_pool: as k_pool.
      layer: index of the layer.
      position: i32 [rows].
      tables: block tables of all lanes.
      tiles: the rows, grouped by lane; of a tile, the rows in use stand first.
      theta: base of the rotary frequencies.
      shared: not taken.
      with_lse: whether log-sum-exps are wanted.
      interpret: whether to run on a CPU, or parameters of the simulator.
    """
    if shared is not None:
        raise NotImplementedError("the kernel takes tiles of one lane each, no shared rows")
    rows, heads, head_dim = q.shape
    page_size, kv_heads = k_pool.shape[2], k_pool.shape[3]
    dtype, group, tile_rows = k_pool.dtype, heads // kv_heads, tiles.row.shape[1]
    flash_tpu.check_pool(k_pool)
    columns, slot_position, row_position = _columns(rows, layer, position, tables, tiles, page_size)

    filled = -(-heads // TILE) * TILE
    queries = jnp.pad(q * head_dim**-0.5, ((0, 0), (0, filled - heads), (0, 0)))
    entries, slots = flash.block_pages(page_size), slot_position.shape[2]
    shapes = {
        "pages_k": ((PLACES, entries, page_size, kv_heads, head_dim), dtype),
        "pages_v": ((PLACES, entries, page_size, kv_heads, head_dim), dtype),
        "slot_position": ((PLACES, 1, slots), jnp.int32),
        "rows": ((PLACES, tile_rows * filled, head_dim), jnp.float32),
        "row_position": ((tile_rows, tile_rows), jnp.int32),
        "out": ((tile_rows * filled, head_dim), jnp.float32),
        "queries": ((kv_heads, group, tile_rows, head_dim), dtype),
        "keys": ((kv_heads, slots, head_dim), dtype),
        "values": ((kv_heads, slots, head_dim), dtype),
        "maximum": ((kv_heads, group, tile_rows, 1), jnp.float32),
        "total": ((kv_heads, group, tile_rows, 1), jnp.float32),
        "weighted": ((kv_heads, group, tile_rows, head_dim), jnp.float32),
    }
    if with_lse:
        shapes["lse"] = ((tile_rows * filled, LSE_WIDTH), jnp.float32)
    vmem = sum(
        int(np.prod(shape[:-1])) * max(shape[-1], 128) * jnp.dtype(kind).itemsize
        for shape, kind in shapes.values()
    )
    scratch = {name: pltpu.VMEM(shape, kind) for name, (shape, kind) in shapes.items()}
    scratch |= {
        "arrived": pltpu.SemaphoreType.DMA((PLACES,)),
        "rows_arrived": pltpu.SemaphoreType.DMA((PLACES,)),
        "sent": pltpu.SemaphoreType.DMA,
    }
    angles = jnp.asarray(np.tile(rope.turn_tables(theta, head_dim), 2))

    results = {"out": jnp.zeros(queries.shape, jnp.float32)}
    if with_lse:
        results["lse"] = jnp.full((*queries.shape[:2], LSE_WIDTH), flash.MASKED)

    def kernel(*refs: Ref) -> None:
        columns, slot_position, row_position, angles, q, k_pool, v_pool, _, out, vmem = refs
        inputs = {"k": k_pool, "v": v_pool, "slot_position": slot_position, "q": q}
        inputs |= {"row_position": row_position, "angles": angles}
        _attend_tiles(
            columns,
            inputs,
            out,
            vmem,
            lane_blocks=tables.page.shape[1] // entries,
            simulated=not isinstance(interpret, bool),
        )

    smem, there = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)
    whole = pl.BlockSpec(memory_space=pltpu.VMEM)
    kept = {name: there for name in results}
    found = pl.pallas_call(
        kernel,
        out_shape=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), results),
        in_specs=[jax.tree.map(lambda _: smem, columns), there, whole, whole, *[there] * 3, kept],
        out_specs=kept,
        scratch_shapes=[scratch],
        # Rows of no tile stay as they are.
        input_output_aliases={len(columns) + 6 + index: index for index in range(len(results))},
        compiler_params=flash_tpu.compiler_params(columns, vmem),
        interpret=interpret,
        name="round_attention",
    )(
        columns,
        slot_position,
        row_position,
        angles,
        queries,
        k_pool,
        v_pool,
        results,
    )
    out = found["out"][:, :heads]
    return (out, found["lse"][:, :heads, 0]) if with_lse else out


def _columns(
    rows: int,
    layer: int,
    position: jax.Array,
    tables: LaneTables,
    tiles: RowTiles,
    page_size: int,
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Prepares tables and tiles; all but the layer's number is the same code in all layers.

    Returns:
      Numbers for SMEM, flat; the slots' positions i32 [lanes * blocks, 1, slots]; the rows'
      positions i32 [tiles, tile_rows], -1 where there is no row.
    """
    entries = flash.block_pages(page_size)
    lanes = tables.page.shape[0]
    slot_position = tables.slot_positions(page_size).reshape(lanes, -1, entries * page_size)
    row, lane = jnp.asarray(tiles.row), jnp.asarray(tiles.lane)
    row_position = jnp.where(row < rows, jnp.take(position, row, mode="clip"), -1)
    last = jnp.max(row_position, axis=1)
    blocks = jnp.min(slot_position, axis=2)[lane] <= last[:, None]
    # A tile has a block at least, so that the copies of the next can start beside its last.
    blocks = jnp.maximum(jnp.sum(blocks.astype(jnp.int32), axis=1), 1)
    columns = {
        "layer": jnp.asarray(layer, jnp.int32)[None],
        "tiles": jnp.asarray(tiles.count)[None],
        "row": row.reshape(-1),
        "rows": jnp.sum((row < rows).astype(jnp.int32), axis=1),
        "lane": lane,
        "last": last,
        "blocks": blocks,
        "begin": jnp.cumsum(blocks) - blocks,
        "frame": jnp.asarray(tables.frame).reshape(-1, entries)[:, 0],
    }
    for name in ("page", "first", "slots", "start"):
        columns[name] = jnp.asarray(getattr(tables, name)).reshape(-1)
    return columns, slot_position.reshape(-1, 1, entries * page_size), row_position


def _attend_tiles(
    columns: dict[str, Ref],
    inputs: dict[str, Ref],
    out: dict[str, Ref],
    vmem: dict[str, Ref],
    *,
    lane_blocks: int,
    simulated: bool,
) -> None:
    """Attends all tiles in use."""
    tiles, tile_rows = columns["tiles"][0], vmem["row_position"].shape[0]
    entries, heads = vmem["pages_k"].shape[1], out["out"].shape[1]

    def number(tile: jax.Array, block: jax.Array) -> jax.Array:
        """The block's number among those of all lanes."""
        return columns["lane"][tile] * lane_blocks + block

    def seen_slots(tile: jax.Array, entry: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first slot of an entry that some row of the tile sees, and the end of these."""
        first = columns["first"][entry]
        ahead = columns["last"][tile] - columns["start"][entry] + 1
        return first, first + jnp.clip(ahead, 0, columns["slots"][entry])

    def fetch(tile: jax.Array, block: jax.Array, act: Callable[[Any], None]) -> None:
        """Starts or awaits the copies of a block into VMEM."""
        place = jax.lax.rem(columns["begin"][tile] + block, PLACES)
        arrived = vmem["arrived"].at[place]
        there = inputs["slot_position"].at[number(tile, block)]
        act(pltpu.make_async_copy(there, vmem["slot_position"].at[place], arrived))

        @pl.loop(0, entries)
        def _(index: jax.Array) -> None:
            entry = number(tile, block) * entries + index
            first, stop = seen_slots(tile, entry)

            @pl.when(stop > first)
            def _() -> None:
                page = columns["layer"][0], columns["page"][entry]
                for name in ("k", "v"):
                    here = vmem[f"pages_{name}"].at[place, index]
                    act(pltpu.make_async_copy(inputs[name].at[page], here, arrived))

    def clean(tile: jax.Array, block: jax.Array) -> None:
        """Clears the values that nobody sees."""
        place = jax.lax.rem(columns["begin"][tile] + block, PLACES)

        @pl.loop(0, entries)
        def _(index: jax.Array) -> None:
            seen = seen_slots(tile, number(tile, block) * entries + index)
            flash_tpu.clear_unseen(vmem["pages_v"].at[place, index], *seen)

    def move_rows(tile: jax.Array, act: Callable[[Ref, Ref], None]) -> None:
        """Starts or awaits copies of a tile's rows, to or from where `act` says."""

        @pl.loop(0, columns["rows"][tile])
        def _(index: jax.Array) -> None:
            act(columns["row"][tile * tile_rows + index], pl.ds(index * heads, heads))

    def fetch_rows(tile: jax.Array, act: Callable[[Any], None]) -> None:
        place = jax.lax.rem(tile, PLACES)
        here, arrived = vmem["rows"].at[place], vmem["rows_arrived"].at[place]
        q = inputs["q"]
        move_rows(tile, lambda row, at: act(pltpu.make_async_copy(q.at[row], here.at[at], arrived)))

    def send_rows(tile: jax.Array, act: Callable[[Any], None]) -> None:
        def send(row: jax.Array, at: Any) -> None:
            for name, there in out.items():
                act(pltpu.make_async_copy(vmem[name].at[at], there.at[row], vmem["sent"]))

        move_rows(tile, send)

    # Empty entries are not fetched: whatever stands in their place is then finite.
    vmem["pages_v"][...] = jnp.zeros(vmem["pages_v"].shape, vmem["pages_v"].dtype)

    @pl.when(tiles > 0)
    def _() -> None:
        fetch_rows(jnp.int32(0), lambda copy: copy.start())
        fetch(jnp.int32(0), jnp.int32(0), lambda copy: copy.start())

    @pl.loop(0, tiles)
    def _(tile: jax.Array) -> None:
        @pl.when(tile + 1 < tiles)
        def _() -> None:
            fetch_rows(tile + 1, lambda copy: copy.start())

        fetch_rows(tile, lambda copy: copy.wait())
        positions = inputs["row_position"][pl.ds(tile, 1)]
        # A column of the row's positions, in every column.
        vmem["row_position"][...] = jnp.broadcast_to(positions, (tile_rows, tile_rows)).T
        vmem["maximum"][...] = jnp.full(vmem["maximum"].shape, flash_tpu.LOWEST, jnp.float32)
        vmem["total"][...] = jnp.zeros(vmem["total"].shape, jnp.float32)
        vmem["weighted"][...] = jnp.zeros(vmem["weighted"].shape, jnp.float32)
        blocks = columns["blocks"][tile]

        @pl.loop(0, blocks)
        def _(block: jax.Array) -> None:
            is_last = block + 1 == blocks
            next_tile = jnp.where(is_last, tile + 1, tile)

            @pl.when(next_tile < tiles)
            def _() -> None:
                fetch(next_tile, jnp.where(is_last, 0, block + 1), lambda copy: copy.start())

            fetch(tile, block, lambda copy: copy.wait())
            clean(tile, block)
            frame = columns["frame"][number(tile, block)]
            before = columns["frame"][number(tile, jnp.maximum(block - 1, 0))]

            @pl.when((block == 0) | (frame != before))
            def _() -> None:
                _rotate_back(frame, inputs["angles"], vmem, jax.lax.rem(tile, PLACES))

            place = jax.lax.rem(columns["begin"][tile] + block, PLACES)
            for name in ("keys", "values"):
                heads_rows = flash_tpu.heads_of(
                    vmem[f"pages_{name[0]}"].at[place], simulated=simulated
                )
                for head, rows in enumerate(heads_rows):
                    vmem[name][head] = rows
            small = min(SMALL_TILE, tile_rows)
            few = columns["rows"][tile] <= small
            for size, fits in ((small, few), (tile_rows, jnp.logical_not(few))):
                pl.when(fits)(lambda size=size: _attend(size, place, vmem))

        @pl.when(tile > 0)
        def _() -> None:
            send_rows(tile - 1, lambda copy: copy.wait())

        _finish(vmem, heads)
        send_rows(tile, lambda copy: copy.start())

    @pl.when(tiles > 0)
    def _() -> None:
        send_rows(tiles - 1, lambda copy: copy.wait())


def _rotate_back(frame: jax.Array, tables: Ref, vmem: dict[str, Ref], place: jax.Array) -> None:
    """Rotates a tile's queries into a frame, head by head."""
    kv_heads, group, tile_rows, head_dim = vmem["queries"].shape
    stride = vmem["rows"].shape[1] // tile_rows
    position = jnp.full((1, head_dim), -frame, jnp.int32)
    angle = rope.angles(position, *(tables[pl.ds(index, 1)] for index in range(3)))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first = jax.lax.broadcasted_iota(jnp.int32, sin.shape, 1) < head_dim // 2
    sin = jnp.where(first, -sin, sin)
    for head in range(kv_heads * group):
        x = vmem["rows"][place, pl.ds(head, tile_rows, stride=stride)]
        turned = (x * cos + flash_tpu.swapped(x) * sin).astype(vmem["queries"].dtype)
        vmem["queries"][head // group, head % group] = turned


def _attend(size: int, place: jax.Array, vmem: dict[str, Ref]) -> None:
    """One step of the online softmax of a tile's first `size` rows."""
    kv_heads, rows = vmem["queries"].shape[0], pl.ds(0, size)
    seen = vmem["slot_position"][place] <= vmem["row_position"][rows, pl.ds(0, 1)]

    @pl.loop(0, kv_heads)
    def _(head: jax.Array) -> None:
        at = head, slice(None), rows
        scores = product(vmem["queries"][at], vmem["keys"][head], 1)
        scores = jnp.where(jnp.broadcast_to(seen[None], scores.shape), scores, flash.MASKED)
        before = vmem["maximum"][at]
        maximum = jnp.maximum(before, scores.max(axis=2, keepdims=True))
        weights, shrink = jnp.exp(scores - maximum), jnp.exp(before - maximum)
        vmem["maximum"][at] = maximum
        vmem["total"][at] = vmem["total"][at] * shrink + weights.sum(axis=2, keepdims=True)
        weighted = product(weights, vmem["values"][head], 0)
        vmem["weighted"][at] = vmem["weighted"][at] * shrink + weighted


def _finish(vmem: dict[str, Ref], stride: int) -> None:
    """Brings a tile's output into rows."""
    kv_heads, group, tile_rows, _ = vmem["queries"].shape
    for head in range(kv_heads * group):
        at = head // group, head % group
        total = vmem["total"][at]
        found = vmem["weighted"][at] / jnp.where(total > 0, total, jnp.ones_like(total))
        vmem["out"][pl.ds(head, tile_rows, stride=stride)] = found
        if "lse" in vmem:
            maximum = vmem["maximum"][at]
            lse = maximum + jnp.log(jnp.where(total > 0, total, jnp.ones_like(total)))
            lse = jnp.where(total > 0, lse, flash.MASKED)
            lse = jnp.broadcast_to(lse, (tile_rows, LSE_WIDTH))
            vmem["lse"][pl.ds(head, tile_rows, stride=stride)] = lse

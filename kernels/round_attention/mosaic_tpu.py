"""Round attention as a Mosaic TPU kernel.

One program loops over the tiles in use and, for each tile, over the key blocks that it sees. It
copies the pages of the next block, and the rows of the next tile, while it computes the current
block. Each row of a tile is gathered and scattered by a copy of its own, so rows may be in any
order.

Packed rows of many lanes attend to the blocks of groups in one tile; each row's query is rotated
into the frame that the block has in the row's lane. Then each lane's rows continue with the lane's
own blocks, in the window of the tile that contains them. Their softmax stays in VMEM in between.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tokendance_jax.kernels import flash, flash_tpu
from tokendance_jax.kernels.flash_tpu import PLACES, TILE, product
from tokendance_jax.kernels.lanes import LaneTables, RowTiles, SharedRows, block_pages
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import Rope, angles
from tokendance_jax.kernels.round_attention.tpu_stretches import (
    WINDOW,
    WORD,
    stretches,
    window_sizes,
)

# Numbers in a row of memory: each log-sum-exp is written to all numbers of a row.
LSE_WIDTH = 128

Ref = Any


def round_attention_mosaic_tpu(
    q: jax.Array,
    kv: PagedKV,
    layer: int | jax.Array,
    position: jax.Array,
    tables: LaneTables,
    tiles: RowTiles,
    *,
    rope: Rope,
    shared: SharedRows | None = None,
    with_lse: bool = False,
    interpret: Any = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Implements `api.round_attention`, with the same arguments.

    Expects pools in row-major layout. XLA lays out large pools with heads narrower than 128
    differently; pass such pools in row-major layout, or XLA copies them.

    Args:
      q: f32 [rows, heads, head_dim].
      kv: the pool, bfloat16 or float32.
      layer: index of the layer.
      position: i32 [rows].
      tables: block tables of all lanes.
      tiles: the rows, grouped by lane; in each tile, the rows in use come first.
      rope: the rotary embedding.
      shared: the packed rows, and what they share; ignored if its tables do not fit into SMEM.
      with_lse: whether to also return log-sum-exps.
      interpret: whether to interpret the kernel on a CPU, or parameters of the simulator.
    """
    heads, head_dim = q.shape[1:]
    page_size, kv_heads = kv.k.shape[2], kv.k.shape[3]
    dtype, group, tile_rows = kv.k.dtype, heads // kv_heads, tiles.row.shape[1]
    flash_tpu.check_pool(kv.k)
    columns, arrays = stretches(layer, position, tables, tiles, shared, page_size)
    if shared is not None and flash_tpu.table_bytes(columns) > flash_tpu.TABLE_BYTES:
        columns, arrays = stretches(layer, position, tables, tiles, None, page_size)

    filled = -(-heads // TILE) * TILE
    queries = jnp.pad(q * head_dim**-0.5, ((0, 0), (0, filled - heads), (0, 0)))
    entries, slots = block_pages(page_size), arrays["slot_position"].shape[2]
    shapes = {
        "pages_k": ((PLACES, entries, page_size, kv_heads, head_dim), dtype),
        "pages_v": ((PLACES, entries, page_size, kv_heads, head_dim), dtype),
        "slot_position": ((PLACES, 1, slots), jnp.int32),
        "rows": ((PLACES, tile_rows * filled, head_dim), jnp.float32),
        "row_position": ((tile_rows, tile_rows), jnp.int32),
        "cos": ((tile_rows, head_dim), jnp.float32),
        "sin": ((tile_rows, head_dim), jnp.float32),
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
    if "reading" in arrays:
        words = arrays["reading"].shape[1] - 1
        shapes["reading"] = ((PLACES, 1 + words, tile_rows), jnp.int32)
        shapes["held"] = ((words, tile_rows, tile_rows), jnp.int32)
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
    smem, there = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)
    inputs = arrays | {"q": queries, "k": kv.k, "v": kv.v}
    inputs["angles"] = jnp.asarray(np.tile(rope.turn_tables(head_dim), 2))
    specs = dict.fromkeys(inputs, there)
    specs["angles"] = specs["row_position"] = pl.BlockSpec(memory_space=pltpu.VMEM)
    results = {"out": jnp.zeros(queries.shape, jnp.float32)}
    if with_lse:
        results["lse"] = jnp.full((*queries.shape[:2], LSE_WIDTH), flash.MASKED)

    def kernel(columns: Any, inputs: Any, _: Any, out: Any, vmem: Any) -> None:
        _attend_tiles(columns, inputs, out, vmem, simulated=not isinstance(interpret, bool))

    found = pl.pallas_call(
        kernel,
        out_shape=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), results),
        in_specs=[dict.fromkeys(columns, smem), specs, dict.fromkeys(results, there)],
        out_specs=dict.fromkeys(results, there),
        scratch_shapes=[scratch],
        # Results start as `results`, so rows that are in no tile keep these values.
        input_output_aliases={
            len(columns) + len(inputs) + index: index for index in range(len(results))
        },
        compiler_params=flash_tpu.compiler_params(columns, vmem),
        interpret=interpret,
        name="round_attention",
    )(columns, inputs, results)
    out = found["out"][:, :heads]
    return (out, found["lse"][:, :heads, 0]) if with_lse else out


def _attend_tiles(
    columns: dict[str, Ref],
    inputs: dict[str, Ref],
    out: dict[str, Ref],
    vmem: dict[str, Ref],
    *,
    simulated: bool,
) -> None:
    """Attends all tiles in use."""
    tiles, tile_rows = columns["tiles"][0], vmem["row_position"].shape[0]
    entries, heads = vmem["pages_k"].shape[1], out["out"].shape[1]

    def seen_slots(stretch: jax.Array, entry: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The start and the end of the slots of an entry that any row of the stretch sees."""
        first = columns["first"][entry]
        ahead = columns["last"][stretch] - columns["start"][entry] + 1
        return first, first + jnp.clip(ahead, 0, columns["slots"][entry])

    def fetch(stretch: jax.Array, block: jax.Array, act: Callable[[Any], None]) -> None:
        """Starts or awaits the copies of a block into VMEM."""
        place = jax.lax.rem(columns["begin"][stretch] + block, PLACES)
        number, arrived = columns["block"][stretch] + block, vmem["arrived"].at[place]
        there = inputs["slot_position"].at[number]
        act(pltpu.make_async_copy(there, vmem["slot_position"].at[place], arrived))
        if "reading" in vmem:

            @pl.when(columns["reading"][stretch] >= 0)
            def _() -> None:
                there = inputs["reading"].at[columns["reading"][stretch] + block]
                act(pltpu.make_async_copy(there, vmem["reading"].at[place], arrived))

        @pl.loop(0, entries)
        def _(index: jax.Array) -> None:
            entry = number * entries + index
            first, stop = seen_slots(stretch, entry)

            @pl.when(stop > first)
            def _() -> None:
                page = columns["layer"][0], columns["page"][entry]
                for name in ("k", "v"):
                    here = vmem[f"pages_{name}"].at[place, index]
                    act(pltpu.make_async_copy(inputs[name].at[page], here, arrived))

    def clean(stretch: jax.Array, block: jax.Array) -> None:
        """Clears the values of slots that no row of the stretch sees."""
        place = jax.lax.rem(columns["begin"][stretch] + block, PLACES)
        number = columns["block"][stretch] + block

        @pl.loop(0, entries)
        def _(index: jax.Array) -> None:
            seen = seen_slots(stretch, number * entries + index)
            flash_tpu.clear_unseen(vmem["pages_v"].at[place, index], *seen)

    def move_rows(tile: jax.Array, act: Callable[[Ref, Ref], None]) -> None:
        """Calls `act` with each row of a tile and the row's place in VMEM."""

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

    # Empty entries are not fetched: their places must hold finite values from the start.
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
        vmem["row_position"][...] = _column(inputs["row_position"][pl.ds(tile, 1)])
        vmem["maximum"][...] = jnp.full(vmem["maximum"].shape, flash_tpu.LOWEST, jnp.float32)
        vmem["total"][...] = jnp.zeros(vmem["total"].shape, jnp.float32)
        vmem["weighted"][...] = jnp.zeros(vmem["weighted"].shape, jnp.float32)

        @pl.loop(columns["stretch"][tile], columns["stretch"][tile + 1])
        def _(stretch: jax.Array) -> None:
            blocks = columns["blocks"][stretch]

            @pl.loop(0, blocks)
            def _(block: jax.Array) -> None:
                is_last = block + 1 == blocks
                onward = jnp.where(is_last, stretch + 1, stretch)

                @pl.when(onward < columns["stretches"][0])
                def _() -> None:
                    fetch(onward, jnp.where(is_last, 0, block + 1), lambda copy: copy.start())

                fetch(stretch, block, lambda copy: copy.wait())
                clean(stretch, block)
                _meet(columns, stretch, block, jax.lax.rem(tile, PLACES), inputs, vmem, simulated)

        @pl.when(tile > 0)
        def _() -> None:
            send_rows(tile - 1, lambda copy: copy.wait())

        _finish(vmem, heads)
        send_rows(tile, lambda copy: copy.start())

    @pl.when(tiles > 0)
    def _() -> None:
        send_rows(tiles - 1, lambda copy: copy.wait())


def _meet(
    columns: dict[str, Ref],
    stretch: jax.Array,
    block: jax.Array,
    rows_place: jax.Array,
    inputs: dict[str, Ref],
    vmem: dict[str, Ref],
    simulated: bool,
) -> None:
    """Attends a stretch's rows to a block, in the window of the tile that contains them."""
    number, place = columns["block"][stretch] + block, columns["begin"][stretch] + block
    place, tile_rows = jax.lax.rem(place, PLACES), vmem["row_position"].shape[0]
    moved = columns["moved"][number] != 0
    if "reading" in vmem:
        together = columns["reading"][stretch] >= 0

        @pl.when(together)
        def _() -> None:
            for word in range(vmem["held"].shape[0]):
                vmem["held"][word] = _column(vmem["reading"][place, pl.ds(1 + word, 1)])

        @pl.when(together & moved)
        def _() -> None:
            frame = _column(vmem["reading"][place, pl.ds(0, 1)])[:, :1]
            _set_angles(frame, inputs["angles"], vmem)

        # In a lane's own blocks, only positions limit what rows see: set the bits of all entries.
        @pl.when(jnp.logical_not(together) & (block == 0))
        def _() -> None:
            vmem["held"][...] = jnp.full(vmem["held"].shape, -1, jnp.int32)

        alone = jnp.logical_not(together) & moved
    else:
        alone = moved

    @pl.when(alone)
    def _() -> None:
        frame = jnp.full((1, 1), columns["frame"][number], jnp.int32)
        _set_angles(frame, inputs["angles"], vmem)

    for name in ("keys", "values"):
        pages = vmem[f"pages_{name[0]}"].at[place]
        for head, x in enumerate(flash_tpu.heads_of(pages, simulated=simulated)):
            vmem[name][head] = x
    span = columns["from"][stretch], columns["to"][stretch]
    for index, size in enumerate(window_sizes(tile_rows)):

        @pl.when(columns["window"][stretch] == index)
        def _(size: int = size) -> None:
            whole = size == tile_rows
            offset = 0 if whole else pl.multiple_of(columns["offset"][stretch], WINDOW)

            @pl.when(moved)
            def _() -> None:
                _rotate_back(offset, size, rows_place, vmem)

            _attend(offset, size, span, place, vmem)


def _column(row: jax.Array) -> jax.Array:
    """Turns a row [1, n] into a column, and repeats the column: [n, n]."""
    return jnp.broadcast_to(row, (row.shape[1], row.shape[1])).T


def _set_angles(frame: jax.Array, tables: Ref, vmem: dict[str, Ref]) -> None:
    """Sets the cosines and signed sines that rotate back by frames [tile_rows, 1] or [1, 1]."""
    shape, head_dim = vmem["cos"].shape, vmem["cos"].shape[1]
    position = jnp.broadcast_to(-frame, (frame.shape[0], head_dim))
    angle = angles(position, *(tables[pl.ds(index, 1)] for index in range(3)))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first = jax.lax.broadcasted_iota(jnp.int32, sin.shape, 1) < head_dim // 2
    vmem["cos"][...] = jnp.broadcast_to(cos, shape)
    vmem["sin"][...] = jnp.broadcast_to(jnp.where(first, -sin, sin), shape)


def _rotate_back(offset: Any, size: int, place: jax.Array, vmem: dict[str, Ref]) -> None:
    """Rotates the queries of a tile's window by the angles of `_set_angles`, head by head."""
    kv_heads, group, tile_rows, _ = vmem["queries"].shape
    stride, window = vmem["rows"].shape[1] // tile_rows, pl.ds(offset, size)
    cos, sin = vmem["cos"][window], vmem["sin"][window]

    @pl.loop(0, kv_heads * group)
    def _(head: jax.Array) -> None:
        x = vmem["rows"][place, pl.ds(offset * stride + head, size, stride=stride)]
        turned = (x * cos + flash_tpu.swapped(x) * sin).astype(vmem["queries"].dtype)
        vmem["queries"][jax.lax.div(head, group), jax.lax.rem(head, group), window] = turned


def _attend(
    offset: Any,
    size: int,
    span: tuple[jax.Array, jax.Array],
    place: jax.Array,
    vmem: dict[str, Ref],
) -> None:
    """Performs one step of the online softmax for the rows of a window that lie in `span`."""
    kv_heads, window = vmem["queries"].shape[0], pl.ds(offset, size)
    limit, slot_position = vmem["row_position"][window, pl.ds(0, 1)], vmem["slot_position"][place]
    if "held" in vmem:
        row = offset + jax.lax.broadcasted_iota(jnp.int32, limit.shape, 0)
        limit = jnp.where((row >= span[0]) & (row < span[1]), limit, -1)
    seen = slot_position <= limit
    if "held" in vmem:
        entry = jax.lax.broadcasted_iota(jnp.int32, slot_position.shape, 1)
        entry = jax.lax.div(entry, np.int32(vmem["pages_k"].shape[2]))
        bits = jnp.zeros(seen.shape, jnp.int32)
        for word in range(vmem["held"].shape[0]):
            held = jnp.broadcast_to(vmem["held"][word, window, pl.ds(0, 1)], seen.shape)
            here = jax.lax.div(entry, np.int32(WORD)) == word
            bits = jnp.where(jnp.broadcast_to(here, seen.shape), held, bits)
        bit = jnp.broadcast_to(jax.lax.rem(entry, np.int32(WORD)), seen.shape)
        seen = seen & (jax.lax.shift_right_logical(bits, bit) & 1 == 1)

    @pl.loop(0, kv_heads)
    def _(head: jax.Array) -> None:
        at = head, slice(None), window
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
    """Normalises a tile's output and rearranges it by row."""
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

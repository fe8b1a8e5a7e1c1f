"""Round attention as XLA code: loops over row tiles and the key blocks that each tile sees."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokendance_jax.kernels import flash, storage
from tokendance_jax.kernels.lanes import LaneTables, RowTiles, SharedRows, block_pages
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import Rope, rotate
from tokendance_jax.kernels.round_attention.xla_shared import attend_shared, continued, nothing_seen

# Rows of smaller tiles, for the few rows that a lane often has after its full tiles. Tuned on a
# CPU.
SMALL_TILES = (32, 64)

# For each KV head: the queries in the frame of the block before, and the online softmax.
Carry = tuple[tuple[jax.Array, ...], tuple[flash.Carry, ...]]


def round_attention_xla(
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
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Implements `api.round_attention`, reading each key block once per tile of rows.

    The bounds of all loops come from the plan, not from the bucket, so padding rows, unused tiles
    and the part of a table that no row of a tile may see cost nothing.
    """
    rows, heads, head_dim = q.shape
    page_size, kv_heads = kv.k.shape[2], kv.k.shape[3]
    group = heads // kv_heads
    # The rows' results so far. Each tile overwrites its rows with their final results.
    if shared is not None:
        results = attend_shared(q, kv, layer, shared, rope=rope)
        tables, tiles = shared.tables, shared.tiles
    else:
        results = nothing_seen(q)[: 1 + with_lse]
    pages = block_pages(page_size)
    lanes = tables.page.shape[0]
    slot_position = tables.slot_positions(page_size).reshape(lanes, -1, pages * page_size)
    block_start, block_stop = jnp.min(slot_position, axis=2), jnp.max(slot_position, axis=2)
    block_frame = flash.block_frames(tables, page_size)
    # For all blocks at once: inside the loop, XLA would compute the angles again for every query.
    cos, sin = rope.rotation(-block_frame, head_dim)

    def tile(
        tile_rows: int, index: jax.Array, results: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        """Computes the results of a tile's first rows, [tile_rows, heads, ...]."""
        row, lane = jnp.asarray(tiles.row)[index, :tile_rows], tiles.lane[index]
        row_position = jnp.take(position, row, mode="clip")
        last = jnp.max(jnp.where(row < rows, row_position, -1))
        least = jnp.min(jnp.where(row < rows, row_position, np.iinfo(np.int32).max))
        q_tile = jnp.take(q, row, axis=0, mode="clip") * head_dim**-0.5
        queries = flash.split_heads(q_tile, kv_heads)  # one product per KV head

        # Blocks that all rows see whole come first, and get no mask: it would take a quarter of
        # their time.
        whole, seen = block_stop[lane] <= least, block_start[lane] <= last
        order = jnp.argsort(jnp.where(whole, 0, jnp.where(seen, 1, 2)))
        moved = flash.moved(block_frame[lane, order], start=0)

        def block(index: jax.Array, carry: Carry, *, masked: bool) -> Carry:
            turned, softmax = carry
            at = lane, order[index]
            keys, values = (flash.read_block(pool, layer, tables, *at) for pool in (kv.k, kv.v))
            turned = jax.lax.cond(
                moved[index],
                lambda: tuple(
                    rotate(x, cos[at][None], sin[at][None]).astype(keys.dtype) for x in queries
                ),
                lambda: turned,
            )
            mask = None
            if masked:
                key_position = slot_position[at]
                # Slots that no row sees may hold NaN, which a weight of zero would not remove.
                written = (key_position <= last)[:, None, None]
                values = jnp.where(written, values, jnp.zeros((), values.dtype))
                mask = key_position[None, :] <= row_position[:, None]
            return turned, tuple(
                flash.attend_block(
                    softmax[head], turned[head], keys[:, head], values[:, head], mask
                )
                for head in range(kv_heads)
            )

        whole_blocks, blocks = (jnp.sum(x.astype(jnp.int32)) for x in (whole, seen))
        carry = (
            tuple(x.astype(storage.value_dtype(kv.k.dtype)) for x in queries),
            tuple(flash.start(tile_rows * group, head_dim) for _ in range(kv_heads))
            if shared is None
            else continued((results[0], results[1]), row, kv_heads),
        )
        if tile_rows > max(SMALL_TILES):  # small tiles rarely pay for compiling another loop
            carry = jax.lax.fori_loop(
                0, whole_blocks, functools.partial(block, masked=False), carry
            )
        else:
            whole_blocks = 0
        carry = jax.lax.fori_loop(
            whole_blocks, blocks, functools.partial(block, masked=True), carry
        )
        found = [flash.join_heads([flash.finish(head) for head in carry[1]], tile_rows)]
        if len(results) > 1:
            lse = [flash.log_sum_exp(head) for head in carry[1]]
            found.append(flash.join_heads(lse, tile_rows))
        return tuple(found)

    most = min(tiles.row.shape[1], rows)  # places beyond are unused
    sizes = [*(size for size in SMALL_TILES if size < most), most]
    used = jnp.sum((tiles.row < rows).astype(jnp.int32), axis=1)
    size_of = jnp.sum(
        (used[:, None] > np.array(sizes[:-1], np.int32)[None, :]).astype(jnp.int32), axis=1
    )

    def sized_tile(size: int, *arguments: Any) -> tuple[jax.Array, ...]:
        room = [(0, most - size)]
        found = tile(size, *arguments)
        return tuple(jnp.pad(x, room + [(0, 0)] * (x.ndim - 1)) for x in found)

    branches = [functools.partial(sized_tile, size) for size in sizes]

    def step(index: jax.Array, results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        found = jax.lax.switch(size_of[index], branches, index, results)
        # Scatter after the switch: inside it, every tile would copy all results.
        row = tiles.row[index, :most]
        return tuple(x.at[row].set(y, mode="drop") for x, y in zip(results, found, strict=True))

    results = jax.lax.fori_loop(0, tiles.count, step, results)
    return results if with_lse else results[0]

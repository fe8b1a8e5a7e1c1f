"""Round attention as XLA code: loops over row tiles and over the key blocks that each sees."""

from typing import Any

import jax
import jax.numpy as jnp

from tokendance_jax.kernels import flash, storage
from tokendance_jax.kernels.lanes import LaneTables, RowTiles, SharedRows
from tokendance_jax.kernels.round_attention.xla_shared import attend_shared, continued

# Rows of a small tile: what is left of a lane behind its full tiles is often little.
SMALL_TILE = 32


def round_attention_xla(
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
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Reads each key block once per tile of rows; arguments as `api.round_attention`.

    Both loops have the plan's own bounds: padding rows, unused tiles and the part of a table that
    no row of a tile may see cost nothing, whatever the bucket.
    """
    before = None
    if shared is not None:
        before = attend_shared(q, k_pool, v_pool, layer, shared, theta=theta)
        tables, tiles = shared.tables, shared.tiles
    rows, heads, head_dim = q.shape
    page_size, kv_heads = k_pool.shape[2], k_pool.shape[3]
    group = heads // kv_heads
    pages = flash.block_pages(page_size)
    lanes = tables.page.shape[0]
    slot_position = tables.slot_positions(page_size).reshape(lanes, -1, pages * page_size)
    block_start = jnp.min(slot_position, axis=2)  # [lanes, blocks]
    frame = jnp.asarray(tables.frame).reshape(lanes, -1, pages)[:, :, 0]
    moved = jnp.concatenate(
        [jnp.ones((lanes, 1), jnp.bool_), frame[:, 1:] != frame[:, :-1]], axis=1
    )

    def tile(index: jax.Array, tile_rows: int, result: tuple[jax.Array, ...]) -> Any:
        row, lane = tiles.row[index, :tile_rows], tiles.lane[index]
        row_position = jnp.take(position, row, mode="clip")
        last = jnp.max(jnp.where(row < rows, row_position, -1))
        q_tile = jnp.take(q, row, axis=0, mode="clip") * head_dim**-0.5
        # [kv_heads, tile_rows * group, head_dim]: one product per KV head.
        q_tile = q_tile.reshape(tile_rows, kv_heads, group, head_dim).transpose(1, 0, 2, 3)
        q_tile = q_tile.reshape(kv_heads, tile_rows * group, head_dim)

        def block(
            index: jax.Array, carry: tuple[jax.Array, tuple[flash.Carry, ...]]
        ) -> tuple[jax.Array, tuple[flash.Carry, ...]]:
            turned, softmax = carry
            keys, values, frame = flash.read_block(k_pool, v_pool, layer, tables, lane, index)
            # Most blocks have the frame of the block before, and a rotation costs most of a
            # block's product.
            turned = jax.lax.cond(
                moved[lane, index],
                lambda: flash.rotate_back(q_tile, frame, theta=theta).astype(keys.dtype),
                lambda: turned,
            )
            key_position = slot_position[lane, index]
            # Slots that no row sees may hold anything; a weight of zero would keep a NaN.
            written = (key_position <= last)[:, None, None]
            values = jnp.where(written, values, jnp.zeros((), values.dtype))
            seen = key_position[None, :] <= row_position[:, None]
            return turned, tuple(
                flash.attend_block(
                    softmax[head], turned[head], keys[:, head], values[:, head], seen
                )
                for head in range(kv_heads)
            )

        blocks = jnp.sum((block_start[lane] <= last).astype(jnp.int32))
        start = (
            jnp.zeros(q_tile.shape, storage.value_dtype(k_pool.dtype)),
            tuple(flash.start(tile_rows * group, head_dim) for _ in range(kv_heads))
            if before is None
            else continued(before, row, kv_heads),
        )
        _, softmax = jax.lax.fori_loop(0, blocks, block, start)
        o_tile = jnp.stack([flash.finish(head) for head in softmax])
        o_tile = o_tile.reshape(kv_heads, tile_rows, group, head_dim).transpose(1, 0, 2, 3)
        found = [o_tile.reshape(tile_rows, heads, head_dim)]
        if with_lse:
            lse = jnp.stack([flash.log_sum_exp(head) for head in softmax])
            lse = lse.reshape(kv_heads, tile_rows, group).transpose(1, 0, 2)
            found.append(lse.reshape(tile_rows, heads))
        return tuple(x.at[row].set(y, mode="drop") for x, y in zip(result, found, strict=True))

    def fitting_tile(index: jax.Array, out: tuple[jax.Array, ...]) -> Any:
        if tiles.row.shape[1] <= SMALL_TILE:
            return tile(index, tiles.row.shape[1], out)
        return jax.lax.cond(
            tiles.row[index, SMALL_TILE] == rows,
            lambda: tile(index, SMALL_TILE, out),
            lambda: tile(index, tiles.row.shape[1], out),
        )

    out = [jnp.zeros((rows, heads, head_dim), jnp.float32)]
    if with_lse:
        out.append(jnp.full((rows, heads), flash.MASKED, jnp.float32))
    out = jax.lax.fori_loop(0, tiles.count, fitting_tile, tuple(out))
    return out if with_lse else out[0]

"""Round attention as XLA code: loops over row tiles and over the key blocks that each sees."""

import jax
import jax.numpy as jnp

from tokendance_jax.kernels import flash, storage
from tokendance_jax.kernels.lanes import LaneTables, RowTiles

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
) -> jax.Array:
    """Reads each key block once per tile of rows; arguments as `api.round_attention`.

    Both loops have the plan's own bounds: padding rows, unused tiles and the part of a table that
    no row of a tile may see cost nothing, whatever the bucket.
    """
    rows, heads, head_dim = q.shape
    page_size, kv_heads = k_pool.shape[2], k_pool.shape[3]
    group = heads // kv_heads
    pages = flash.block_pages(page_size)
    lanes = tables.page.shape[0]
    slot_position = tables.slot_positions(page_size).reshape(lanes, -1, pages * page_size)
    block_start = jnp.min(slot_position, axis=2)  # [lanes, blocks]
    frame, moved = flash.block_frames(tables, page_size)

    def tile(index: jax.Array, tile_rows: int, out: jax.Array) -> jax.Array:
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
            keys, values = (
                flash.read_block(pool, layer, tables, lane, index) for pool in (k_pool, v_pool)
            )
            turned = jax.lax.cond(
                moved[lane, index],
                lambda: flash.rotate_back(q_tile, frame[lane, index], theta=theta).astype(
                    keys.dtype
                ),
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
            tuple(flash.start(tile_rows * group, head_dim) for _ in range(kv_heads)),
        )
        _, softmax = jax.lax.fori_loop(0, blocks, block, start)
        o_tile = jnp.stack([flash.finish(head) for head in softmax])
        o_tile = o_tile.reshape(kv_heads, tile_rows, group, head_dim).transpose(1, 0, 2, 3)
        return out.at[row].set(o_tile.reshape(tile_rows, heads, head_dim), mode="drop")

    def fitting_tile(index: jax.Array, out: jax.Array) -> jax.Array:
        if tiles.row.shape[1] <= SMALL_TILE:
            return tile(index, tiles.row.shape[1], out)
        return jax.lax.cond(
            tiles.row[index, SMALL_TILE] == rows,
            lambda: tile(index, SMALL_TILE, out),
            lambda: tile(index, tiles.row.shape[1], out),
        )

    out = jnp.zeros((rows, heads, head_dim), jnp.float32)
    return jax.lax.fori_loop(0, tiles.count, fitting_tile, out)

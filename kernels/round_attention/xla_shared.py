"""Rows of many lanes against the key blocks that these share, as XLA code."""

import jax
import jax.numpy as jnp

from tokendance_jax.kernels import flash, rope
from tokendance_jax.kernels.lanes import TILE_ROWS, SharedRows

# What rows saw already: the output f32 [rows, heads, head_dim] over it, and the log-sum-exp of
# their scores f32 [rows, heads].
Before = tuple[jax.Array, jax.Array]


def attend_shared(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    layer: int,
    shared: SharedRows,
    *,
    theta: float,
) -> Before:
    """Reads each shared key block once per tile of rows; arguments as `api.round_attention`.

    Each row's query is rotated into the frame that the block has in the row's lane.
    """
    rows, heads, head_dim = q.shape
    page_size, kv_heads = k_pool.shape[2], k_pool.shape[3]
    group, groups = heads // kv_heads, shared.groups
    room = -len(shared.row) % TILE_ROWS
    row = jnp.pad(shared.row, (0, room), constant_values=rows).reshape(-1, TILE_ROWS)
    lane = jnp.pad(shared.lane, (0, room)).reshape(-1, TILE_ROWS)
    page, frame = jnp.asarray(groups.page), jnp.asarray(groups.frame)
    member, valid = jnp.asarray(groups.member), groups.valid(page_size)
    # For all blocks at once: XLA would work out angles beside the queries for each of these.
    cos, sin = rope.rotation(-frame, theta=theta, head_dim=head_dim)

    def tile(index: jax.Array, before: Before) -> Before:
        tile_row, tile_lane = row[index], lane[index]
        q_tile = jnp.take(q, tile_row, axis=0, mode="clip") * head_dim**-0.5

        def block(index: jax.Array, softmax: tuple[flash.Carry, ...]) -> tuple[flash.Carry, ...]:
            turned = rope.rotate(
                q_tile, cos[index, tile_lane][:, None, :], sin[index, tile_lane][:, None, :]
            )
            turned = turned.reshape(-1, kv_heads, group, head_dim).transpose(1, 0, 2, 3)
            turned = turned.reshape(kv_heads, -1, head_dim)
            keys, values = (
                flash.read_pages(pool, layer, page[index]).reshape(-1, kv_heads, head_dim)
                for pool in (k_pool, v_pool)
            )
            # Slots that nobody sees may hold anything; a weight of zero would keep a NaN.
            written = valid[index].reshape(-1, 1, 1)
            values = jnp.where(written, values, jnp.zeros((), values.dtype))
            seen = member[index][tile_lane][:, :, None] & valid[index][None]
            return tuple(
                flash.attend_block(
                    softmax[head],
                    turned[head].astype(keys.dtype),
                    keys[:, head],
                    values[:, head],
                    seen.reshape(TILE_ROWS, -1),
                )
                for head in range(kv_heads)
            )

        start = tuple(flash.start(TILE_ROWS * group, head_dim) for _ in range(kv_heads))
        softmax = jax.lax.fori_loop(0, groups.count, block, start)

        def by_row(found: list[jax.Array]) -> jax.Array:
            """Brings [TILE_ROWS * group, ...] of each KV head into rows."""
            stacked = jnp.stack(found).reshape(kv_heads, TILE_ROWS, group, *found[0].shape[1:])
            return jnp.swapaxes(stacked, 0, 1).reshape(TILE_ROWS, heads, *found[0].shape[1:])

        lse = by_row([flash.log_sum_exp(head) for head in softmax])
        out = by_row([flash.finish(head) for head in softmax])
        return tuple(
            x.at[tile_row].set(y, mode="drop") for x, y in zip(before, (out, lse), strict=True)
        )

    used = jnp.sum((row < rows).astype(jnp.int32))
    start = jnp.zeros(q.shape, jnp.float32), jnp.full((rows, heads), flash.MASKED, jnp.float32)
    return jax.lax.fori_loop(0, -(-used // TILE_ROWS), tile, start)


def continued(before: Before, row: jax.Array, kv_heads: int) -> tuple[flash.Carry, ...]:
    """The online softmax of rows i32 [n] behind what they saw, of each KV head: a sum of one."""
    out, lse = (jnp.take(x, row, axis=0, mode="clip") for x in before)
    rows, _, head_dim = out.shape
    out = out.reshape(rows, kv_heads, -1, head_dim).transpose(1, 0, 2, 3)
    lse = lse.reshape(rows, kv_heads, -1).transpose(1, 0, 2).reshape(kv_heads, -1)
    out = out.reshape(kv_heads, -1, head_dim)
    saw = lse > flash.MASKED
    total = saw.astype(jnp.float32)
    weighted = jnp.where(saw[:, :, None], out, jnp.zeros_like(out))
    return tuple((lse[head], total[head], weighted[head]) for head in range(kv_heads))

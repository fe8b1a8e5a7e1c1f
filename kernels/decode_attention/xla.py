"""Decode attention as XLA code: a loop over lanes, each with a loop over its key blocks."""

import jax
import jax.numpy as jnp

from tokendance_jax.kernels import flash
from tokendance_jax.kernels.lanes import LaneTables


def decode_attention_xla(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    layer: int,
    position: jax.Array,
    tables: LaneTables,
    *,
    theta: float,
) -> jax.Array:
    """Reads each lane's pages once; arguments as `api.decode_attention`.

    All heads of a lane meet a key block in one product, over keys of all KV heads laid side by
    side, with each query zero outside its own KV head: a few more operations, half the calls, and
    no strided copy of the block, where the memory's speed is the limit.
    """
    lanes, heads, head_dim = q.shape
    page_size, kv_heads = k_pool.shape[2], k_pool.shape[3]
    group = heads // kv_heads
    width = kv_heads * head_dim
    pages = flash.block_pages(page_size)
    slot_position = tables.slot_positions(page_size).reshape(lanes, -1, pages * page_size)
    block_start = jnp.min(slot_position, axis=2)  # [lanes, blocks]
    blocks = jnp.sum((block_start <= position[:, None]).astype(jnp.int32), axis=1)
    own_head = jnp.eye(kv_heads, dtype=jnp.float32)[:, None, :, None]

    def one(lane: jax.Array, out: jax.Array) -> jax.Array:
        q_lane = q[lane] * head_dim**-0.5

        def block(
            index: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            keys, values, frame = flash.read_block(k_pool, v_pool, layer, tables, lane, index)
            seen = slot_position[lane, index] <= position[lane]
            values = jnp.where(seen[:, None, None], values, jnp.zeros((), values.dtype))
            turned = flash.rotate_back(q_lane, frame, theta=theta)
            spread = turned.reshape(kv_heads, group, 1, head_dim) * own_head
            return flash.attend_block(
                carry,
                spread.reshape(heads, width).astype(keys.dtype),
                keys.reshape(-1, width),
                values.reshape(-1, width),
                seen[None, :],
            )

        o_lane = flash.finish(jax.lax.fori_loop(0, blocks[lane], block, flash.start(heads, width)))
        o_lane = o_lane.reshape(kv_heads, group, kv_heads, head_dim)
        o_lane = jnp.sum(o_lane * own_head, axis=2).reshape(1, heads, head_dim)
        return jax.lax.dynamic_update_slice(out, o_lane, (lane, 0, 0))

    return jax.lax.fori_loop(0, lanes, one, jnp.zeros((lanes, heads, head_dim), jnp.float32))

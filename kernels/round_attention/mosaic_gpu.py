"""Round attention as a Mosaic GPU kernel, for Hopper: tiles of rows against their lanes' tables."""

from typing import Any

import jax
import jax.numpy as jnp

from tokendance_jax.kernels.flash_gpu import (
    QUERIES,
    check_pool,
    flash_attention_gpu,
    lane_steps,
)
from tokendance_jax.kernels.lanes import LaneTables, RowTiles


def round_attention_mosaic_gpu(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    layer: int,
    position: jax.Array,
    tables: LaneTables,
    tiles: RowTiles,
    *,
    theta: float,
    interpret: Any = False,
) -> jax.Array:
    """Arguments as `api.round_attention`; `interpret` takes parameters of the simulator."""
    check_pool(k_pool)
    rows, heads, head_dim = q.shape
    kv_heads = k_pool.shape[3]
    group, (count, tile_rows) = heads // kv_heads, tiles.row.shape
    row, lane = jnp.asarray(tiles.row), jnp.asarray(tiles.lane)
    used = tile_rows * group
    room = -used % QUERIES

    # A tile's queries of one KV head: its rows, and for each the heads of the group.
    queries = jnp.take(q, row, axis=0, mode="clip")
    queries = queries.reshape(count, tile_rows, kv_heads, group, head_dim)
    queries = jnp.moveaxis(queries, 2, 1).reshape(count, kv_heads, used, head_dim)
    queries = jnp.pad(queries, [(0, 0), (0, 0), (0, room), (0, 0)])
    limit = jnp.where(row < rows, jnp.take(jnp.asarray(position), row, mode="clip"), -1)
    idle = jnp.arange(count, dtype=jnp.int32) >= tiles.count
    last = jnp.where(idle, -1, limit.max(axis=1))
    steps = lane_steps(tables, k_pool.shape[2], lane, last)
    limit = jnp.pad(jnp.repeat(limit, group, axis=1), [(0, 0), (0, room)], constant_values=-1)
    out, _ = flash_attention_gpu(
        queries, k_pool, v_pool, layer, limit, steps, theta=theta, interpret=interpret
    )
    out = out[0, :, :, :used].reshape(count, kv_heads, tile_rows, group, head_dim)
    out = jnp.moveaxis(out, 1, 2).reshape(count * tile_rows, heads, head_dim)
    zeros = jnp.zeros((rows, heads, head_dim), jnp.float32)
    return zeros.at[row.reshape(-1)].set(out, mode="drop")

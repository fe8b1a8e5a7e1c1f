"""Round attention as a Mosaic GPU kernel, for Hopper: tiles of rows against their lanes' tables."""

from typing import Any

import jax
import jax.numpy as jnp

from tokendance_jax.kernels.flash_gpu import check_pool, flash_attention_gpu
from tokendance_jax.kernels.gpu_tiles import Tiles, lane_steps, rows_of_tiles
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
    rows, heads, _ = q.shape
    page_size, kv_heads = k_pool.shape[2:4]
    group = heads // kv_heads
    row, lane = rows_of_tiles(jnp.asarray(tiles.row), group, rows), jnp.asarray(tiles.lane)
    lane = jnp.repeat(lane, row.shape[1])
    row = row.reshape(-1, row.shape[2])
    limit = jnp.where(row < rows, jnp.take(jnp.asarray(position), row, mode="clip"), -1)
    idle = jnp.arange(len(row), dtype=jnp.int32) >= tiles.count * (len(row) // len(tiles.lane))
    row, last = jnp.where(idle[:, None], rows, row), jnp.where(idle, -1, limit.max(axis=1))
    (out,) = flash_attention_gpu(
        q,
        k_pool,
        v_pool,
        layer,
        Tiles.of(row, jnp.zeros_like(lane), limit, group),
        lane_steps(tables, page_size, lane, last),
        theta=theta,
        with_lse=False,
        interpret=interpret,
    )
    found = jnp.zeros((rows,), jnp.bool_).at[row.reshape(-1)].set(True, mode="drop")
    return jnp.where(found[:, None, None], out[0], jnp.zeros_like(out[0]))

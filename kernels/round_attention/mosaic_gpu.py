"""Round attention as a Mosaic GPU kernel for Hopper: tiles of rows and their lanes' tables."""

from typing import Any

import jax
import jax.numpy as jnp

from tokendance_jax.kernels.flash_gpu import check_pool, flash_attention_gpu
from tokendance_jax.kernels.gpu_tiles import (
    Parts,
    Tiles,
    group_steps,
    lane_steps,
    rows_of_tiles,
    scores_of_rows,
    scores_of_tiles,
)
from tokendance_jax.kernels.lanes import LaneTables, RowTiles, SharedRows
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import Rope


def round_attention_mosaic_gpu(
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
    """Implements `api.round_attention`; `interpret` takes parameters of the simulator.

    With `shared`, the kernel runs twice. First, packed rows attend to their shared pages, in full
    tiles that mix rows of several lanes. Then each lane's tiles continue from those results.
    """
    check_pool(kv.k)
    rows, heads, _ = q.shape
    page_size, kv_heads = kv.k.shape[2:4]
    group, before = heads // kv_heads, None
    if shared is not None:
        before = _attend_shared(q, kv, layer, shared, rope=rope, interpret=interpret)
        tables, tiles = shared.tables, shared.tiles
    row, lane = rows_of_tiles(jnp.asarray(tiles.row), group, rows), jnp.asarray(tiles.lane)
    blocks = row.shape[1]
    lane, row = jnp.repeat(lane, blocks), row.reshape(-1, row.shape[2])
    idle = jnp.arange(len(row), dtype=jnp.int32) >= tiles.count * blocks
    row = jnp.where(idle[:, None], rows, row)
    limit = jnp.where(row < rows, jnp.take(jnp.asarray(position), row, mode="clip"), -1)
    last = limit.max(axis=1)
    parts = None
    if before is not None:
        out, lse = before
        number = jnp.arange(len(row), dtype=jnp.int32)
        saw = (lane >= tables.page.shape[0] // 2) & (last >= 0)
        lse = scores_of_tiles(lse, row, kv_heads)[None]
        parts = Parts(out, lse, number, saw.astype(jnp.int32))
    out, *lse = flash_attention_gpu(
        q,
        kv,
        layer,
        Tiles.of(row, jnp.zeros_like(lane), limit, group),
        lane_steps(tables, page_size, lane, last),
        rope=rope,
        before=parts,
        with_lse=with_lse,
        interpret=interpret,
    )
    found = jnp.zeros((rows,), jnp.bool_).at[row.reshape(-1)].set(True, mode="drop")
    out = jnp.where(found[:, None, None], out[0], jnp.zeros_like(out[0]))
    return (out, scores_of_rows(lse[0][0], row, group, rows)) if with_lse else out


def _attend_shared(
    q: jax.Array,
    kv: PagedKV,
    layer: int | jax.Array,
    shared: SharedRows,
    *,
    rope: Rope,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Attends the packed rows to the key blocks of the groups.

    Returns:
      The output [1, rows, heads, head_dim] in the pool's precision, undefined in other rows; and
      the log-sum-exp of scores f32 [rows, heads], `flash.MASKED` in other rows.
    """
    rows, heads, _ = q.shape
    page_size, kv_heads = kv.k.shape[2:4]
    lanes, group = shared.groups.frame.shape[1], heads // kv_heads
    row = rows_of_tiles(jnp.asarray(shared.row)[None], group, rows)[0]
    lane = rows_of_tiles(jnp.asarray(shared.lane)[None], group, 0)[0]
    lane = jnp.where(row < rows, lane, lanes)
    # All slots of groups lie before the rows that read them, so `group_steps` gives them position
    # 0, and a query with the limit 0 sees them all.
    limit = jnp.where(row < rows, 0, -1)
    out, lse = flash_attention_gpu(
        q,
        kv,
        layer,
        Tiles.of(row, jnp.zeros_like(row[:, 0]), limit, group),
        group_steps(shared.groups, lane, group, page_size),
        rope=rope,
        parts=jnp.ones((), jnp.int32),
        interpret=interpret,
    )
    return out, scores_of_rows(lse[0], row, group, rows)

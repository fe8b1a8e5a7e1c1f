"""Decode attention as a Mosaic GPU kernel, for Hopper: what lanes share, and their own pages."""

from typing import Any

import jax
import jax.numpy as jnp

from tokendance_jax.kernels.flash_gpu import (
    QUERIES,
    SLOTS,
    Steps,
    check_pool,
    flash_attention_gpu,
    lane_steps,
    merge_parts,
)
from tokendance_jax.kernels.lanes import GroupTables, LaneTables

# Blocks of threads that a kernel should have at least: one for each core of an H100.
BLOCKS = 132
# Most parts that the steps of a tile are split into: each part's output is written and read again.
SPLITS = 8


def decode_attention_mosaic_gpu(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    layer: int,
    position: jax.Array,
    tables: LaneTables,
    groups: GroupTables,
    *,
    theta: float,
    interpret: Any = False,
) -> jax.Array:
    """Arguments as `api.decode_attention`; `interpret` takes parameters of the simulator.

    A tile of the shared blocks has the queries of several lanes, each turned into its own frame; a
    tile of own pages has those of one.
    """
    check_pool(k_pool)
    lanes, heads, head_dim = q.shape
    page_size, kv_heads = k_pool.shape[2:4]
    group = heads // kv_heads
    if group > QUERIES:
        raise NotImplementedError(f"{group} heads share a KV head: a tile has {QUERIES} queries")
    position = jnp.asarray(position)

    def attend(width: int, limit: jax.Array, steps: Steps) -> tuple[jax.Array, jax.Array]:
        """Output and log-sum-exp [parts, lanes, kv_heads, group, ...] of tiles of some lanes."""
        tiles, used = limit.shape[0], width * group
        queries = jnp.pad(q, [(0, tiles * width - lanes), (0, 0), (0, 0)])
        queries = queries.reshape(tiles, width, kv_heads, group, head_dim)
        queries = jnp.moveaxis(queries, 2, 1).reshape(tiles, kv_heads, used, head_dim)
        out, lse = flash_attention_gpu(
            jnp.pad(queries, [(0, 0), (0, 0), (0, -used % 8), (0, 0)]),
            k_pool,
            v_pool,
            layer,
            limit,
            steps,
            theta=theta,
            splits=max(1, min(SPLITS, BLOCKS // (tiles * kv_heads))),
            interpret=interpret,
        )

        def by_lane(x: jax.Array) -> jax.Array:
            parts, rest = x.shape[0], x.shape[4:]
            x = x[:, :, :, :used].reshape(parts, tiles, kv_heads, width, group, *rest)
            x = jnp.moveaxis(x, 3, 2).reshape(parts, tiles * width, kv_heads, group, *rest)
            return x[:, :lanes]

        return by_lane(out), by_lane(lse)

    def of_queries(x: jax.Array, width: int, fill: int) -> jax.Array:
        """Columns of lanes, i32 [lanes, ...], as columns of queries [tiles, QUERIES, ...]."""
        tiles, rest = -(-lanes // width), [(0, 0)] * (x.ndim - 1)
        x = jnp.pad(x, [(0, tiles * width - lanes), *rest], constant_values=fill)
        x = jnp.repeat(x.reshape(tiles, width, *x.shape[1:]), group, axis=1)
        return jnp.pad(x, [(0, 0), (0, QUERIES - width * group), *rest], constant_values=fill)

    lane = jnp.arange(lanes, dtype=jnp.int32)
    own = attend(1, of_queries(position, 1, -1), lane_steps(tables, page_size, lane, position))

    # The slots of groups lie before all rows that read them: position 0 stands for all of them.
    width, pages = QUERIES // group, SLOTS // page_size
    blocks, _, entries = groups.member.shape
    steps = entries // pages
    valid = groups.valid(page_size).reshape(1, blocks * steps, SLOTS)
    bit = jnp.left_shift(1, jnp.arange(pages, dtype=jnp.int32))
    held = jnp.asarray(groups.member).reshape(blocks, lanes, steps, pages).astype(jnp.int32)
    held = jnp.sum(held * bit[None, None, None, :], axis=3)
    frame = jnp.broadcast_to(jnp.asarray(groups.frame)[:, :, None], held.shape)

    def of_steps(x: jax.Array) -> jax.Array:
        """[blocks, lanes, steps] as [tiles, steps, QUERIES]."""
        x = jnp.moveaxis(x, 1, 0).reshape(lanes, blocks * steps)
        return jnp.moveaxis(of_queries(x, width, 0), 1, 2)

    none = jnp.zeros(-(-lanes // width), jnp.int32)
    walked = Steps(
        page=jnp.asarray(groups.page).reshape(1, -1),
        slot_position=jnp.where(valid, 0, jnp.iinfo(jnp.int32).max),
        frame=of_steps(frame),
        held=of_steps(held),
        of_tile=none,
        count=none + jnp.asarray(groups.count) * steps,
        last=none,
    )
    shared = attend(width, of_queries(jnp.where(position < 0, -1, 0), width, -1), walked)
    parts = [jnp.concatenate(pair) for pair in zip(own, shared, strict=True)]
    return merge_parts(*parts).reshape(lanes, heads, head_dim)

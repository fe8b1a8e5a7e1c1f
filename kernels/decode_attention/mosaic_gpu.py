"""Decode attention as a Mosaic GPU kernel, for Hopper: what lanes share, then their own pages."""

from typing import Any

import jax
import jax.numpy as jnp

from tokendance_jax.kernels.flash_gpu import check_pool, flash_attention_gpu
from tokendance_jax.kernels.gpu_tiles import (
    QUERIES,
    SLOTS,
    Parts,
    Tiles,
    group_steps,
    lane_steps,
    merge_parts,
    rows_of_tiles,
)
from tokendance_jax.kernels.lanes import GroupTables, LaneTables
from tokendance_jax.kernels.paged_kv import PagedKV

# Blocks of threads that a kernel should have at least: one for each core of an H100.
BLOCKS = 132
# Most parts that the steps of a tile are split into.
SPLITS = 8
# Of the bytes of pages, the share that parts may take: each is written and read again.
PARTS_SHARE = 16


def decode_attention_mosaic_gpu(
    q: jax.Array,
    kv: PagedKV,
    layer: int | jax.Array,
    position: jax.Array,
    tables: LaneTables,
    groups: GroupTables,
    *,
    theta: float,
    interpret: Any = False,
) -> jax.Array:
    """Arguments as `api.decode_attention`; `interpret` takes parameters of the simulator.

    A tile of the shared blocks has the queries of several lanes, each turned into its own frame,
    and its steps are split among blocks of threads. A tile of own pages has the queries of one lane
    and goes on where those parts ended, so that a result is written once. Where the tiles of lanes
    are so few that their steps are split too, all parts are merged afterwards.
    """
    check_pool(kv.k)
    lanes, heads, _ = q.shape
    page_size, kv_heads = kv.k.shape[2:4]
    group = heads // kv_heads
    position = jnp.asarray(position)
    lane = jnp.arange(lanes, dtype=jnp.int32)
    row = rows_of_tiles(lane[None], group, lanes)[0]
    width = row.shape[1]
    own = lane_steps(tables, page_size, lane, position)
    walked = group_steps(groups, row, group, page_size)

    most, own_most = _most_parts(lanes, heads, kv_heads)
    count = parts_of(lanes, heads, kv_heads, shared=walked.count[0], own=own.count.sum())
    # The slots of groups lie before all rows that read them: position 0 stands for all of them.
    limit = jnp.where(row < lanes, jnp.take(position, row, mode="clip"), -1)
    out, lse = flash_attention_gpu(
        q,
        kv,
        layer,
        Tiles.of(row, jnp.zeros_like(row[:, 0]), jnp.minimum(limit, 0), group),
        walked,
        theta=theta,
        parts=count,
        most_parts=most,
        interpret=interpret,
    )
    shared = Parts(out, lse, lane // width, jnp.broadcast_to(count, lane.shape))
    own_tiles = Tiles.of(lane[:, None], lane % width, position[:, None], group)
    if own_most == 1:
        (out,) = flash_attention_gpu(
            q,
            kv,
            layer,
            own_tiles,
            own,
            theta=theta,
            before=shared,
            with_lse=False,
            interpret=interpret,
        )
        return out[0]
    count = jnp.full((), own_most, jnp.int32)
    out, lse = flash_attention_gpu(
        q,
        kv,
        layer,
        own_tiles,
        own,
        theta=theta,
        parts=count,
        most_parts=own_most,
        interpret=interpret,
    )
    whole = Parts(out, lse, lane, jnp.broadcast_to(count, lane.shape))
    return merge_parts([shared, whole], own_tiles.place)


def parts_of(lanes: int, heads: int, kv_heads: int, *, shared: Any, own: Any) -> jax.Array:
    """Parts that the shared steps are split into.

    As many as keep the device busy, while writing and reading them takes at most one
    `PARTS_SHARE`-th of the bytes of pages.

    Args:
      lanes: number of lanes.
      heads: query heads.
      kv_heads: KV heads.
      shared: steps that are read for several lanes.
      own: steps of all lanes' own pages.

    Returns:
      i32 []; 0 where there are no shared steps.
    """
    most, _ = _most_parts(lanes, heads, kv_heads)
    # A number of a page and one of a part have as many bytes; keys and values, written and read.
    affordable = (shared + own) * SLOTS * kv_heads // (lanes * heads * PARTS_SHARE)
    return jnp.minimum(jnp.clip(affordable, 1, most), shared)


def bytes_beside_pages(
    lanes: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    *,
    shared: int,
    own: int,
    itemsize: int = 2,
) -> int:
    """Bytes of one call that are not those of pages: queries, results, parts and what steps need.

    What several blocks read at about the same time is counted once; frames are those of lanes that
    hold all shared pages in one run. What tiles and steps need is made once for all layers.

    Args:
      lanes: number of lanes.
      heads: query heads.
      kv_heads: KV heads.
      head_dim: width of a head.
      page_size: slots of a page.
      shared: steps that are read for several lanes.
      own: steps of all lanes' own pages.
      itemsize: bytes of a number of the pool, and of the parts.
    """
    own_parts = _most_parts(lanes, heads, kv_heads)[1]
    tiles = -(-lanes // (QUERIES // (heads // kv_heads)))
    parts = int(parts_of(lanes, heads, kv_heads, shared=shared, own=own))
    numbers = lanes * heads * head_dim
    queries = 4 * numbers * (2 if shared else 1)
    part, score = itemsize * numbers, 4 * kv_heads * QUERIES
    written_and_read = 2 * parts * (part + tiles * score)
    if own_parts > 1:
        written_and_read += 2 * own_parts * (part + lanes * score)
    # Pages, positions and where they stop; the frame of a lane's step; what tiles see of a step.
    of_steps = 4 * (shared + own) * (SLOTS // page_size + SLOTS + 1) + 4 * own
    of_tiles = 4 * tiles * (shared * (QUERIES + 1) + parts * QUERIES)
    limits = 4 * QUERIES * (tiles + lanes)
    return queries + 4 * numbers + written_and_read + of_steps + of_tiles + limits


def _most_parts(lanes: int, heads: int, kv_heads: int) -> tuple[int, int]:
    """Most parts of the shared steps and of a lane's own, by what keeps the device busy."""
    tiles = -(-lanes // (QUERIES // (heads // kv_heads)))
    shared, own = (max(1, min(SPLITS, BLOCKS // (n * kv_heads))) for n in (tiles, 2 * lanes))
    return shared, own

"""Decode attention as a Mosaic GPU kernel for Hopper: shared key blocks, then lanes' own pages."""

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
from tokendance_jax.kernels.rope import Rope

# The least number of thread blocks that a kernel should have: one per core of an H100.
BLOCKS = 132
# Most parts that the steps of a tile are split into.
SPLITS = 8
# Writing and reading parts may take at most one `PARTS_SHARE`-th of the bytes of pages.
PARTS_SHARE = 16


def decode_attention_mosaic_gpu(
    q: jax.Array,
    kv: PagedKV,
    layer: int | jax.Array,
    position: jax.Array,
    tables: LaneTables,
    groups: GroupTables,
    *,
    rope: Rope,
    interpret: Any = False,
) -> jax.Array:
    """Implements `api.decode_attention`; `interpret` takes parameters of the simulator.

    A tile for the shared blocks has the queries of several lanes, each rotated into its own frame;
    its steps are split among thread blocks. A tile for own pages has the queries of one lane and
    continues from the results of those parts, so that each result is written once. With so few
    lanes that the steps of own pages are split too, all parts are merged afterwards.
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
    # All slots of groups lie before the rows that read them, so `group_steps` gives them position
    # 0, and a query with the limit 0 sees them all.
    limit = jnp.where(row < lanes, jnp.take(position, row, mode="clip"), -1)
    out, lse = flash_attention_gpu(
        q,
        kv,
        layer,
        Tiles.of(row, jnp.zeros_like(row[:, 0]), jnp.minimum(limit, 0), group),
        walked,
        rope=rope,
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
            rope=rope,
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
        rope=rope,
        parts=count,
        most_parts=own_most,
        interpret=interpret,
    )
    whole = Parts(out, lse, lane, jnp.broadcast_to(count, lane.shape))
    return merge_parts([shared, whole], own_tiles.place)


def parts_of(lanes: int, heads: int, kv_heads: int, *, shared: Any, own: Any) -> jax.Array:
    """Returns the number of parts that the shared steps are split into.

    It is the number that keeps the device busy, but no more than can be written and read with one
    `PARTS_SHARE`-th of the bytes of pages.

    Args:
      lanes: number of lanes.
      heads: query heads.
      kv_heads: KV heads.
      shared: steps that are read for several lanes.
      own: steps of all lanes' own pages.

    Returns:
      i32 []; 0 if there are no shared steps.
    """
    most, _ = _most_parts(lanes, heads, kv_heads)
    # Numbers of pages and of parts have the same size. The factors of two cancel: pages have keys
    # and values, parts are written and read.
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
    """Returns the bytes that one call moves besides pages.

    These are queries, results, parts, and the inputs for tiles and steps. Data that several thread
    blocks read at about the same time counts once. Frames count as for lanes that hold all shared
    pages in one run. Computing the inputs for tiles and steps does not count: it is done once for
    all layers.

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
    # For each step: its pages, slot positions and `stop`, and its frame if it is a lane's own. For
    # each tile: `held` and `moved` of each shared step, and frames once per part.
    of_steps = 4 * (shared + own) * (SLOTS // page_size + SLOTS + 1) + 4 * own
    of_tiles = 4 * tiles * (shared * (QUERIES + 1) + parts * QUERIES)
    limits = 4 * QUERIES * (tiles + lanes)
    return queries + 4 * numbers + written_and_read + of_steps + of_tiles + limits


def _most_parts(lanes: int, heads: int, kv_heads: int) -> tuple[int, int]:
    """Most parts of the shared steps and of a lane's own steps, to keep the device busy."""
    tiles = -(-lanes // (QUERIES // (heads // kv_heads)))
    shared, own = (max(1, min(SPLITS, BLOCKS // (n * kv_heads))) for n in (tiles, 2 * lanes))
    return shared, own

"""How much rows attend to each entry of their lanes' tables."""

import jax
import jax.numpy as jnp

from tokendance_jax.kernels import flash, storage
from tokendance_jax.kernels.lanes import LaneTables, RowTiles, block_pages
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import Rope, rotate


def attention_mass(
    q: jax.Array,
    kv: PagedKV,
    layer: int | jax.Array,
    position: jax.Array,
    tables: LaneTables,
    tiles: RowTiles,
    *,
    rope: Rope,
) -> jax.Array:
    """Sums the attention weights of a lane's rows and heads over the slots of each entry.

    Reads the keys twice: first to compute each row's softmax normaliser, then the weights.

    Args:
      q: f32 [rows, heads, head_dim], rotated at logical positions, not scaled.
      kv: the pool; only its keys are read.
      layer: index of the layer.
      position: i32 [rows]; logical positions.
      tables: block tables of all lanes.
      tiles: the rows, grouped by lane.
      rope: the rotary embedding.

    Returns:
      f32 [lanes, entries]; a lane's entries sum to its number of rows times heads.
    """
    rows, heads, head_dim = q.shape
    page_size, kv_heads = kv.k.shape[2], kv.k.shape[3]
    group = heads // kv_heads
    pages = block_pages(page_size)
    lanes, entries = tables.page.shape
    slot_position = tables.slot_positions(page_size).reshape(lanes, -1, pages * page_size)
    first_position = jnp.min(slot_position, axis=2)  # [lanes, blocks]
    frame = flash.block_frames(tables, page_size)
    moved = flash.moved(frame, start=0)
    # For all blocks at once: inside the loop, XLA would compute the angles again for every query.
    cos, sin = (x[:, :, None, None, None] for x in rope.rotation(-frame, head_dim))

    def tile(index: jax.Array, mass: jax.Array) -> jax.Array:
        row, lane = tiles.row[index], tiles.lane[index]
        used = row < rows
        row_position = jnp.where(used, jnp.take(position, row, mode="clip"), -1)
        q_tile = jnp.take(q, row, axis=0, mode="clip") * head_dim**-0.5
        q_tile = q_tile.reshape(-1, kv_heads, group, head_dim)
        blocks = jnp.sum((first_position[lane] <= jnp.max(row_position)).astype(jnp.int32))

        def scores(block: jax.Array, turned: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Computes the scores of a block, given queries in the frame of the block before.

            Returns:
              The queries in this block's frame, and the scores f32 [tile_rows, kv_heads, group,
              slots]; MASKED where a row does not see a slot.
            """
            keys = flash.read_block(kv.k, layer, tables, lane, block)
            turned = jax.lax.cond(
                moved[lane, block],
                lambda: rotate(q_tile, cos[lane, block], sin[lane, block]).astype(keys.dtype),
                lambda: turned,
            )
            product = jnp.einsum(
                "rkgh,skh->rkgs",
                turned,
                keys,
                preferred_element_type=jnp.float32,
                precision=flash.precision(keys.dtype),
            )
            seen = slot_position[lane, block][None, :] <= row_position[:, None]
            return turned, jnp.where(seen[:, None, None, :], product, flash.MASKED)

        def normalise(
            block: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            turned, maximum, total = carry
            turned, score = scores(block, turned)
            higher = jnp.maximum(maximum, score.max(axis=-1))
            weights = jnp.exp(score - higher[..., None]).sum(axis=-1)
            return turned, higher, total * jnp.exp(maximum - higher) + weights

        unturned = q_tile.astype(storage.value_dtype(kv.k.dtype))
        masked = jnp.full(q_tile.shape[:3], flash.MASKED)
        start = unturned, masked, jnp.zeros_like(masked)
        _, maximum, total = jax.lax.fori_loop(0, blocks, normalise, start)

        def add(
            block: jax.Array, carry: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            turned, mass = carry
            turned, score = scores(block, turned)
            weights = jnp.exp(score - maximum[..., None]) / total[..., None]
            weights = jnp.where(used[:, None, None, None], weights, jnp.zeros_like(weights))
            of_entry = weights.sum(axis=(0, 1, 2)).reshape(1, pages, page_size).sum(axis=2)
            at = (lane, block * pages)
            held = jax.lax.dynamic_slice(mass, at, (1, pages))
            return turned, jax.lax.dynamic_update_slice(mass, held + of_entry, at)

        return jax.lax.fori_loop(0, blocks, add, (unturned, mass))[1]

    return jax.lax.fori_loop(0, tiles.count, tile, jnp.zeros((lanes, entries), jnp.float32))

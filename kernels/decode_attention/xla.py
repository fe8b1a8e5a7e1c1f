"""Decode attention as XLA code, over key blocks that lanes share and over each lane's own."""

import jax
import jax.numpy as jnp

from tokendance_jax.kernels import flash
from tokendance_jax.kernels.lanes import GroupTables, LaneTables, block_pages
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import Rope, rotate

# Most key blocks of lanes' own tables that are read in one step. Tuned on a CPU: steps of 8 take
# 0.7 of the time of steps of one, steps of 4 take 0.75. The last step costs as much as a full one.
STEP_BLOCKS = 8
# Shared key blocks that are read at once if all lanes see them whole. Tuned on a CPU.
PLAIN_BLOCKS = 2

# The online softmax of each KV head.
Softmax = tuple[flash.Carry, ...]


def decode_attention_xla(
    q: jax.Array,
    kv: PagedKV,
    layer: int | jax.Array,
    position: jax.Array,
    tables: LaneTables,
    groups: GroupTables,
    *,
    rope: Rope,
) -> jax.Array:
    """Implements `api.decode_attention`, reading each key block of both tables once.

    What does not depend on the layer (masks, rotations, the order of blocks) is the same code in
    every layer, so XLA computes it once for all layers.
    """
    scaled = q * q.shape[2] ** -0.5
    own = _own_blocks(scaled, kv, layer, position, tables, rope=rope)
    shared = _shared_blocks(scaled, kv, layer, position, groups, rope=rope)
    return flash.finish(flash.merge(own, shared)).reshape(q.shape)


def _own_blocks(
    q: jax.Array,
    kv: PagedKV,
    layer: int | jax.Array,
    position: jax.Array,
    tables: LaneTables,
    *,
    rope: Rope,
) -> flash.Carry:
    """Attends lanes to the key blocks of their own tables.

    The blocks of all lanes form one list. Each step reads the next few blocks of the list, of
    whichever lanes. This splits long sequences, like FlashDecoding, and is as fast for many short
    ones.

    One product per block computes the scores of all heads of a lane, over the keys of all KV heads
    side by side, with each query zero outside its own KV head. This takes a few more operations,
    but half the calls and no strided copy of the block; memory bandwidth is the limit here.
    """
    lanes, heads, head_dim = q.shape
    page_size, kv_heads = kv.k.shape[2], kv.k.shape[3]
    group, width = heads // kv_heads, kv_heads * head_dim
    # With this size, the last step has few unused places if all lanes have equally many blocks.
    size = -(-lanes // -(-lanes // STEP_BLOCKS))
    lane, page, frame, seen, count = _list_blocks(position, tables, page_size, size)
    cos, sin = rope.rotation(-frame, head_dim)
    own_head = jnp.eye(kv_heads, dtype=jnp.float32)[None, :, None, :, None]

    def step(index: jax.Array, carry: flash.Carry) -> flash.Carry:
        maximum, total, weighted = carry

        def of_step(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, index * size, size)

        step_lane, step_page, step_seen = of_step(lane), of_step(page), of_step(seen)
        mine = step_lane[:, None] == jnp.arange(lanes, dtype=jnp.int32)[None, :]
        keys = flash.read_pages(kv.k, layer, step_page).reshape(size, -1, width)
        values = flash.read_pages(kv.v, layer, step_page).reshape(size, -1, width)
        # Slots that are not seen may hold NaN, which a weight of zero would not remove.
        values = jnp.where(step_seen[:, :, None], values, jnp.zeros((), values.dtype))

        turned = jnp.take(q, step_lane, axis=0, mode="clip")
        turned = rotate(turned, of_step(cos)[:, None, :], of_step(sin)[:, None, :])
        turned = turned.reshape(size, kv_heads, group, 1, head_dim) * own_head
        scores = jax.lax.dot_general(
            turned.reshape(size, heads, width).astype(keys.dtype),
            keys,
            (((2,), (2,)), ((0,), (0,))),
            preferred_element_type=jnp.float32,
            precision=flash.precision(keys.dtype),
        )
        scores = jnp.where(step_seen[:, None, :], scores, flash.MASKED)
        highest = jnp.where(mine[:, :, None], scores.max(axis=2)[:, None, :], flash.MASKED)
        new_maximum = jnp.maximum(maximum, highest.max(axis=0))
        of_block = jnp.take(new_maximum, step_lane, axis=0, mode="clip")
        weights = jnp.exp(scores - of_block[:, :, None])
        product = jax.lax.dot_general(
            weights.astype(values.dtype),
            values,
            (((2,), (1,)), ((0,), (0,))),
            preferred_element_type=jnp.float32,
            precision=flash.precision(values.dtype),
        ).reshape(size, kv_heads, group, kv_heads, head_dim)
        product = jnp.stack([product[:, head, :, head] for head in range(kv_heads)], axis=1)

        def by_lane(x: jax.Array) -> jax.Array:
            """Sums the blocks of each lane."""
            exact = jax.lax.Precision.HIGHEST
            return jnp.einsum("bl,bx->lx", mine.astype(x.dtype), x, precision=exact)

        shrink = jnp.exp(maximum - new_maximum)
        product = by_lane(product.reshape(size, -1)).reshape(weighted.shape)
        return (
            new_maximum,
            total * shrink + by_lane(weights.sum(axis=2)),
            weighted * shrink[:, :, None] + product,
        )

    start = (
        jnp.full((lanes, heads), flash.MASKED, jnp.float32),
        jnp.zeros((lanes, heads), jnp.float32),
        jnp.zeros((lanes, heads, head_dim), jnp.float32),
    )
    maximum, total, weighted = jax.lax.fori_loop(0, -(-count // size), step, start)
    return maximum.reshape(-1), total.reshape(-1), weighted.reshape(-1, head_dim)


def _list_blocks(
    position: jax.Array, tables: LaneTables, page_size: int, size: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Lists the key blocks in which lanes see any slot, lane by lane.

    Returns:
      For each block, padded to a multiple of `size` blocks: its lane i32 [blocks] (the number of
      lanes in padding), pages i32 [blocks, block_entries], frame i32 [blocks] and which slots are
      seen, bool [blocks, slots]; and the number of blocks i32 [].
    """
    lanes, entries = tables.page.shape
    pages = block_pages(page_size)
    each = entries // pages
    slot_position = tables.slot_positions(page_size).reshape(lanes, each, pages * page_size)
    first_position = jnp.min(slot_position, axis=2)
    blocks = jnp.sum((first_position <= position[:, None]).astype(jnp.int32), axis=1)
    stop = jnp.cumsum(blocks)
    item = jnp.arange(-(-lanes * each // size) * size, dtype=jnp.int32)
    lane = jnp.sum((stop[None, :] <= item[:, None]).astype(jnp.int32), axis=1)
    block = item - jnp.take(stop - blocks, lane, mode="clip")

    def of_block(x: jax.Array) -> jax.Array:
        flat = x.reshape(lanes * each, *x.shape[2:])
        return jnp.take(flat, lane * each + block, axis=0, mode="clip")

    limit = jnp.take(position, lane, mode="fill", fill_value=-1)
    page = of_block(jnp.asarray(tables.page).reshape(lanes, each, pages))
    frame = of_block(jnp.asarray(tables.frame).reshape(lanes, each, pages)[:, :, 0])
    return lane, page, frame, of_block(slot_position) <= limit[:, None], stop[-1]


def _shared_blocks(
    q: jax.Array,
    kv: PagedKV,
    layer: int | jax.Array,
    position: jax.Array,
    groups: GroupTables,
    *,
    rope: Rope,
) -> flash.Carry:
    """Attends all lanes at once to the key blocks that several of them hold.

    Computes one product per KV head and block. With the queries of all lanes, it is limited by
    operations, not by memory bandwidth. Hydragen (Juravsky et al., 2024) and cascade attention
    (FlashInfer; Ye et al., 2025) do this for prefixes, which are at the same place in all
    sequences. Here, each lane's query is rotated into the frame of the block, as in Hogwild!
    Inference (Rodionov et al., 2025), so a block may be at a different place in each lane.
    """
    lanes, heads, head_dim = q.shape
    page_size, kv_heads = kv.k.shape[2], kv.k.shape[3]
    group = heads // kv_heads
    blocks = groups.page.shape[0]
    page, frame = jnp.asarray(groups.page), jnp.asarray(groups.frame)
    valid = groups.valid(page_size)
    held = jnp.asarray(groups.member) & (position >= 0)[None, :, None]
    seen = (held[:, :, :, None] & valid[:, None, :, :]).reshape(blocks, lanes, -1)
    valid = valid.reshape(blocks, -1)
    cos, sin = rope.rotation(-frame, head_dim)
    # Blocks that all lanes see whole, and in the frames of the first block, come first: several of
    # them are read as one, without a mask. The results of idle lanes are dropped below.
    idle = (position < 0)[None, :, None]
    plain = jnp.all((seen | idle) & valid[:, None, :], axis=(1, 2))
    plain &= jnp.all(frame == frame[:1], axis=1)
    plain &= jnp.arange(blocks, dtype=jnp.int32) < groups.count
    order = jnp.argsort(~plain)
    moved = jnp.any(flash.moved(frame[order].T), axis=0)

    by_head = q.reshape(lanes, kv_heads, group, head_dim).transpose(1, 0, 2, 3)

    def turn(block: jax.Array) -> jax.Array:
        turned = rotate(by_head, cos[block][None, :, None, :], sin[block][None, :, None, :])
        return turned.reshape(kv_heads, lanes * group, head_dim)

    def attend(
        softmax: Softmax, turned: jax.Array, block: jax.Array, mask: jax.Array | None
    ) -> Softmax:
        """Attends to a block, or to several of them at once."""
        keys, values = (
            flash.read_pages(pool, layer, page[block]).reshape(-1, kv_heads, head_dim)
            for pool in (kv.k, kv.v)
        )
        if mask is not None:
            values = jnp.where(valid[block][:, None, None], values, jnp.zeros((), values.dtype))
        return tuple(
            flash.attend_block(part, turned_head, keys[:, head], values[:, head], mask)
            for head, (part, turned_head) in enumerate(
                zip(softmax, turned.astype(keys.dtype), strict=True)
            )
        )

    def plain_step(index: jax.Array, softmax: Softmax) -> Softmax:
        some = jax.lax.dynamic_slice_in_dim(order, index * wide, wide)
        return attend(softmax, first_turned, some, None)

    def step(index: jax.Array, carry: tuple[jax.Array, Softmax]) -> tuple[jax.Array, Softmax]:
        turned, softmax = carry
        block = order[index]
        # Most blocks have the frames of the block before.
        turned = jax.lax.cond(moved[index], lambda: turn(block), lambda: turned)
        return turned, attend(softmax, turned, block, seen[block])

    wide = min(PLAIN_BLOCKS, blocks)
    plain_steps = jnp.sum(plain.astype(jnp.int32)) // wide
    # In a branch: otherwise XLA computes the angles again for every query.
    first_turned = jax.lax.cond(
        groups.count > 0,
        lambda: turn(jnp.int32(0)),
        lambda: by_head.reshape(kv_heads, lanes * group, head_dim),
    )
    softmax = tuple(flash.start(lanes * group, head_dim) for _ in range(kv_heads))
    softmax = jax.lax.fori_loop(0, plain_steps, plain_step, softmax)
    carry = first_turned, softmax
    _, softmax = jax.lax.fori_loop(plain_steps * wide, groups.count, step, carry)

    def by_lane(*heads: jax.Array) -> jax.Array:
        """Rearranges [lanes * group, ...] of each KV head by lane."""
        stacked = jnp.stack(heads).reshape(kv_heads, lanes, group, *heads[0].shape[1:])
        return jnp.swapaxes(stacked, 0, 1).reshape(-1, *heads[0].shape[1:])

    maximum, total, weighted = jax.tree.map(by_lane, *softmax)
    # Idle lanes have results from blocks without a mask. With a masked maximum, `flash.merge`
    # ignores these.
    return jnp.where(jnp.repeat(position < 0, heads), flash.MASKED, maximum), total, weighted

"""Attention of packed rows to the key blocks that their lanes share, as XLA code."""

import functools

import jax
import jax.numpy as jnp

from tokendance_jax.kernels import flash, storage
from tokendance_jax.kernels.lanes import SHARED_TILE_ROWS, SharedRows
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import Rope, rotate

# The results of rows over the slots that they saw: the output f32 [rows, heads, head_dim], and the
# log-sum-exp of scores f32 [rows, heads].
Seen = tuple[jax.Array, jax.Array]
# For each KV head: the queries in the frames of the block before, and the online softmax.
Carry = tuple[tuple[jax.Array, ...], tuple[flash.Carry, ...]]


def attend_shared(
    q: jax.Array,
    kv: PagedKV,
    layer: int | jax.Array,
    shared: SharedRows,
    *,
    rope: Rope,
) -> Seen:
    """Attends packed rows to the groups, reading each key block once per tile of rows.

    Each row's query is rotated into the frame that the block has in the row's lane. The arguments
    are those of `api.round_attention`.
    """
    rows, heads, head_dim = q.shape
    page_size, kv_heads = kv.k.shape[2], kv.k.shape[3]
    groups = shared.groups
    tile_rows = min(SHARED_TILE_ROWS, len(shared.row))
    room = -len(shared.row) % tile_rows
    row = jnp.pad(shared.row, (0, room), constant_values=rows).reshape(-1, tile_rows)
    lane = jnp.pad(shared.lane, (0, room)).reshape(-1, tile_rows)
    page, frame = jnp.asarray(groups.page), jnp.asarray(groups.frame)
    member, valid = jnp.asarray(groups.member), groups.valid(page_size)
    # For all blocks at once: inside the loop, XLA would compute the angles again for every query.
    cos, sin = rope.rotation(-frame, head_dim)
    full = jnp.all(valid, axis=(1, 2))
    holds_all, holds_any = jnp.all(member, axis=2), jnp.any(member, axis=2)  # [blocks, lanes]

    def tile(index: jax.Array, results: Seen) -> Seen:
        tile_row, tile_lane = row[index], lane[index]
        used = (tile_row < rows)[None, :]
        q_tile = jnp.take(q, tile_row, axis=0, mode="clip") * head_dim**-0.5

        # Blocks that all rows see whole come first, and get no mask: it would take a quarter of
        # their time.
        whole = full & jnp.all(holds_all[:, tile_lane] | ~used, axis=1)
        seen = jnp.any(holds_any[:, tile_lane] & used, axis=1)
        order = jnp.argsort(jnp.where(seen & whole, 0, jnp.where(seen, 1, 2)))
        moved = jnp.any(flash.moved(frame[order].T), axis=0)

        def block(index: jax.Array, carry: Carry, *, masked: bool) -> Carry:
            turned, softmax = carry
            at = order[index]
            keys, values = (
                flash.read_pages(pool, layer, page[at]).reshape(-1, kv_heads, head_dim)
                for pool in (kv.k, kv.v)
            )

            def turn() -> tuple[jax.Array, ...]:
                rotated = rotate(q_tile, cos[at, tile_lane][:, None], sin[at, tile_lane][:, None])
                return flash.split_heads(rotated.astype(keys.dtype), kv_heads)

            turned = jax.lax.cond(moved[index], turn, lambda: turned)
            mask = None
            if masked:
                # Slots that no row sees may hold NaN, which a weight of zero would not remove.
                written = valid[at].reshape(-1, 1, 1)
                values = jnp.where(written, values, jnp.zeros((), values.dtype))
                mask = member[at][tile_lane][:, :, None] & valid[at][None]
                mask = mask.reshape(tile_rows, -1)
            return turned, tuple(
                flash.attend_block(
                    softmax[head], turned[head], keys[:, head], values[:, head], mask
                )
                for head in range(kv_heads)
            )

        dtype = storage.value_dtype(kv.k.dtype)
        carry = (
            flash.split_heads(jnp.zeros(q_tile.shape, dtype), kv_heads),  # set by the first block
            tuple(flash.start(tile_rows * heads // kv_heads, head_dim) for _ in range(kv_heads)),
        )
        whole_blocks = jnp.sum((seen & whole).astype(jnp.int32))
        blocks = jnp.sum(seen.astype(jnp.int32))
        carry = jax.lax.fori_loop(0, whole_blocks, functools.partial(block, masked=False), carry)
        _, softmax = jax.lax.fori_loop(
            whole_blocks, blocks, functools.partial(block, masked=True), carry
        )
        found = (
            flash.join_heads([flash.finish(head) for head in softmax], tile_rows),
            flash.join_heads([flash.log_sum_exp(head) for head in softmax], tile_rows),
        )
        out, lse = (x.at[tile_row].set(y, mode="drop") for x, y in zip(results, found, strict=True))
        return out, lse

    used = jnp.sum((row < rows).astype(jnp.int32))
    return jax.lax.fori_loop(0, -(-used // tile_rows), tile, nothing_seen(q))


def nothing_seen(q: jax.Array) -> Seen:
    """The results of queries [rows, heads, head_dim] that have seen nothing yet."""
    return jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:2], flash.MASKED, jnp.float32)


def continued(seen: Seen, row: jax.Array, kv_heads: int) -> tuple[flash.Carry, ...]:
    """Returns, for each KV head, the online softmax of rows i32 [n] that continues from `seen`.

    A row that saw something has a sum of one, at its log-sum-exp.
    """
    out, lse = (flash.split_heads(jnp.take(x, row, axis=0, mode="clip"), kv_heads) for x in seen)

    def head(out: jax.Array, lse: jax.Array) -> flash.Carry:
        saw = lse > flash.MASKED
        return lse, saw.astype(jnp.float32), jnp.where(saw[:, None], out, jnp.zeros_like(out))

    return tuple(map(head, out, lse))

"""Code shared by the XLA attention paths: reading key blocks and the online softmax over them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tokendance_jax.kernels import storage
from tokendance_jax.kernels.lanes import LaneTables, block_pages

MASKED = np.float32(-1e30)

# State of the online softmax of some queries: running maximum f32 [queries], sum f32 [queries] and
# weighted values f32 [queries, width].
Carry = tuple[jax.Array, jax.Array, jax.Array]


def read_pages(pool: jax.Array, layer: int | jax.Array, page: jax.Array) -> jax.Array:
    """Gathers pages of one layer.

    Args:
      pool: [layers, pages, page_size, kv_heads, head_dim], in its storage dtype.
      layer: index of the layer.
      page: i32 [...]; pages of the pool.

    Returns:
      [..., page_size, kv_heads, head_dim], in the pool's precision.
    """
    # XLA's CPU code copies faster with one index instead of two, neither wrapped nor clamped.
    flat = pool.reshape(-1, *pool.shape[2:])
    taken = flat.at[layer * pool.shape[1] + page].get(
        mode="promise_in_bounds", wrap_negative_indices=False
    )
    return storage.load(taken)


def read_block(
    pool: jax.Array, layer: int | jax.Array, tables: LaneTables, lane: jax.Array, block: jax.Array
) -> jax.Array:
    """Gathers one key block of one lane.

    Returns:
      Keys or values [slots, kv_heads, head_dim], in the pool's precision.
    """
    pages = block_pages(pool.shape[2])
    page = jax.lax.dynamic_slice(tables.page, (lane, block * pages), (1, pages))[0]
    return read_pages(pool, layer, page).reshape(-1, *pool.shape[3:])


def block_frames(tables: LaneTables, page_size: int) -> jax.Array:
    """The frame of each key block, i32 [lanes, blocks]."""
    lanes = tables.page.shape[0]
    return jnp.asarray(tables.frame).reshape(lanes, -1, block_pages(page_size))[:, :, 0]


def moved(frame: jax.Array, *, start: int | None = None) -> jax.Array:
    """Marks the blocks whose frame differs from that of the block before.

    Queries are rotated for these blocks only: most blocks have the same frame as the block before,
    and rotating the queries takes a large part of the time of a block's product.

    Args:
      frame: i32 [..., blocks].
      start: frame of the queries before the first block; None: unknown, so mark the first block.

    Returns:
      bool [..., blocks].
    """
    first = (
        jnp.ones((*frame.shape[:-1], 1), jnp.bool_) if start is None else frame[..., :1] != start
    )
    return jnp.concatenate([first, frame[..., 1:] != frame[..., :-1]], axis=-1)


def split_heads(x: jax.Array, kv_heads: int) -> tuple[jax.Array, ...]:
    """Splits an array [rows, heads, ...] by KV head.

    Returns:
      For each KV head, the part for its query heads, [rows * heads / kv_heads, ...].
    """
    rows, heads = x.shape[:2]
    parts = jnp.moveaxis(x.reshape(rows, kv_heads, heads // kv_heads, *x.shape[2:]), 1, 0)
    return tuple(parts.reshape(kv_heads, -1, *x.shape[2:]))


def join_heads(parts: Sequence[jax.Array], rows: int) -> jax.Array:
    """The inverse of `split_heads`: [rows, heads, ...]."""
    x = jnp.stack(parts).reshape(len(parts), rows, -1, *parts[0].shape[1:])
    return jnp.moveaxis(x, 0, 1).reshape(rows, -1, *parts[0].shape[1:])


def attend_block(
    carry: Carry,
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    seen: jax.Array | None,
) -> Carry:
    """Performs one step of the online softmax (Milakov and Gimelshein, 2018; FlashAttention, 2022).

    Args:
      carry: running maximum f32 [queries], sum f32 [queries], weighted values f32 [queries, width].
      q: scaled queries [queries, width_k], in the keys' precision.
      keys: [slots, width_k].
      values: [slots, width]; must be finite even in slots that are not seen.
      seen: bool [n, slots]; whether each of n equal runs of queries sees each slot. None: all
        queries see all slots.

    Returns:
      The carry after this block.
    """
    maximum, total, weighted = carry
    scores = jax.lax.dot_general(
        q,
        keys,
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=precision(keys.dtype),
    )
    if seen is not None:
        shape = seen.shape[0], -1, scores.shape[1]
        scores = jnp.where(seen[:, None, :], scores.reshape(shape), MASKED).reshape(scores.shape)
    new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
    weights = jnp.exp(scores - new_maximum[:, None])
    shrink = jnp.exp(maximum - new_maximum)
    product = jax.lax.dot_general(
        weights.astype(values.dtype),
        values,
        (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=precision(values.dtype),
    )
    return (
        new_maximum,
        total * shrink + weights.sum(axis=-1),
        weighted * shrink[:, None] + product,
    )


def start(queries: int, width: int) -> Carry:
    """The online softmax's carry before the first block."""
    return (
        jnp.full((queries,), MASKED, jnp.float32),
        jnp.zeros((queries,), jnp.float32),
        jnp.zeros((queries, width), jnp.float32),
    )


def merge(a: Carry, b: Carry) -> Carry:
    """Merges the online softmaxes of the same queries over two sets of slots.

    This is the log-sum-exp merge of FlashDecoding and of cascade attention (FlashInfer), on carries
    that are not normalised yet. If a query saw no slot of a set, the sum and the values of that
    carry are ignored: `attend_block` gives masked slots weight until a query sees its first slot.
    """
    maximum = jnp.maximum(a[0], b[0])

    def share(carry: Carry) -> jax.Array:
        saw = carry[0] > MASKED
        return jnp.where(saw, jnp.exp(carry[0] - maximum), jnp.zeros_like(maximum))

    share_a, share_b = share(a), share(b)
    return (
        maximum,
        a[1] * share_a + b[1] * share_b,
        a[2] * share_a[:, None] + b[2] * share_b[:, None],
    )


def finish(carry: Carry) -> jax.Array:
    """The attention output f32 [queries, width]; zero for queries whose weights sum to zero."""
    _, total, weighted = carry
    return weighted / jnp.where(total > 0, total, jnp.ones_like(total))[:, None]


def log_sum_exp(carry: Carry) -> jax.Array:
    """The log-sum-exp of scores f32 [queries]; `MASKED` for queries that saw nothing."""
    maximum, total, _ = carry
    saw = maximum > MASKED
    return jnp.where(saw, maximum + jnp.log(jnp.where(saw, total, jnp.ones_like(total))), MASKED)


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Full precision for float32, which accelerators would otherwise round to bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT

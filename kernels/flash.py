"""What the XLA attention paths share: reading a key block, and the online softmax over blocks."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tokendance_jax.kernels import storage
from tokendance_jax.kernels.lanes import LaneTables, block_pages

MASKED = np.float32(-1e30)

# The online softmax of some queries: maximum and sum f32 [queries], values f32 [queries, width].
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
    # One index in place of two, neither wrapped nor clamped: XLA's CPU code copies faster.
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
      keys or values [slots, kv_heads, head_dim], in the pool's precision.
    """
    pages = block_pages(pool.shape[2])
    page = jax.lax.dynamic_slice(tables.page, (lane, block * pages), (1, pages))[0]
    return read_pages(pool, layer, page).reshape(-1, *pool.shape[3:])


def block_frames(tables: LaneTables, page_size: int) -> jax.Array:
    """The frame of each key block, i32 [lanes, blocks]."""
    lanes = tables.page.shape[0]
    return jnp.asarray(tables.frame).reshape(lanes, -1, block_pages(page_size))[:, :, 0]


def moved(frame: jax.Array, *, start: int | None = None) -> jax.Array:
    """Where a block has another frame than the block before.

    Most blocks have the frame of the block before, and to rotate queries costs much of a block's
    product.

    Args:
      frame: i32 [..., blocks].
      start: frame of the queries before the first block; None: none, so that block has moved.

    Returns:
      bool [..., blocks].
    """
    first = (
        jnp.ones((*frame.shape[:-1], 1), jnp.bool_) if start is None else frame[..., :1] != start
    )
    return jnp.concatenate([first, frame[..., 1:] != frame[..., :-1]], axis=-1)


def split_heads(x: jax.Array, kv_heads: int) -> tuple[jax.Array, ...]:
    """Brings what belongs to rows and heads, [rows, heads, ...], under the KV heads.

    Returns:
      for each KV head [rows * heads of its group, ...].
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
    """One step of the online softmax (Milakov and Gimelshein, 2018; FlashAttention, 2022).

    Args:
      carry: running maximum f32 [queries], sum f32 [queries], weighted values f32 [queries, width].
      q: scaled queries [queries, width_k], in the keys' precision.
      keys: [slots, width_k].
      values: [slots, width], finite wherever they are not seen.
      seen: bool, broadcastable to [queries, slots] after a reshape of the leading axis: its first
        axis divides the queries; None: all queries see all slots.

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
    """Joins the online softmaxes of the same queries over two sets of slots.

    The log-sum-exp merge of FlashDecoding and of cascade attention (FlashInfer), on carries
    that are not normalised yet. A part whose query saw nothing counts for nothing, whatever it
    holds: within a block, `attend_block` gives the slots weight until the first one is seen.
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
    """The attention output f32 [queries, width]; zero for queries that saw nothing."""
    _, total, weighted = carry
    return weighted / jnp.where(total > 0, total, jnp.ones_like(total))[:, None]


def log_sum_exp(carry: Carry) -> jax.Array:
    """The log-sum-exp of scores f32 [queries]; `MASKED` for queries that saw nothing."""
    maximum, total, _ = carry
    saw = maximum > MASKED
    return jnp.where(saw, maximum + jnp.log(jnp.where(saw, total, jnp.ones_like(total))), MASKED)


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Full products for float32, where an accelerator would round the inputs to bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT

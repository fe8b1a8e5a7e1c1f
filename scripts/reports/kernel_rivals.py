"""Other ways to do the kernels' work: JAX's own Pallas ops, and a restore in three steps.

JAX's ops support neither frames nor groups. They read each agent's own copy of the base, and pages
in their own layouts. Copies and layouts are prepared before the ops are timed.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scripts.reports.kernel_work import PATCHES, Work
from tokendance_jax.kernels import storage
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import rotate
from tokendance_jax.kernels.sparse_restore import sparse_restore


@dataclasses.dataclass(frozen=True)
class Attend:
    """A way to compute attention.

    Attributes:
      call: takes queries f32 [rows, heads, head_dim], the arguments, and the keyword `layer`.
      arguments: arrays, or pytrees of arrays.
    """

    call: Callable[..., jax.Array]
    arguments: tuple[Any, ...]


def decode(work: Work) -> Mapping[str, Callable[[], Attend] | str]:
    """Other ways to compute attention of one row per agent."""
    return {
        "jax gpu.paged_attention": _on("gpu", lambda: gpu_paged_attention(work)),
        "jax tpu.paged_attention": _on("tpu", lambda: tpu_paged_attention(work)),
    }


def prefill(work: Work) -> Mapping[str, Callable[[], Attend] | str]:
    """Other ways to compute attention of a prefill's rows."""
    return {
        "jax gpu.attention_mgpu": "it takes whole sequences: no pages, and no cached tokens",
        "jax tpu.ragged_paged_attention": _on("tpu", lambda: tpu_ragged_paged_attention(work)),
    }


def _on(platform: str, make: Callable[[], Attend]) -> Callable[[], Attend] | str:
    present = jax.default_backend()
    return make if present == platform else f"it is for a {platform}, this is a {present}"


def gpu_paged_attention(work: Work, *, interpret: bool = False) -> Attend:
    """Adapts `jax.experimental.pallas.ops.gpu.paged_attention`, a Triton kernel.

    Args:
      work: the round.
      interpret: whether to simulate the kernel, on any platform.
    """
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    pages = (work.shared + work.own) // work.page_size
    block = 8  # a power of two that divides a key block
    return _paged(
        work,
        lambda q, k, v, page, length: paged_attention(
            q,
            k,
            v,
            page,
            length,
            pages_per_compute_block=block,
            k_splits=pages // block,
            interpret=interpret,
        ),
    )


def tpu_paged_attention(work: Work) -> Attend:
    """Adapts `jax.experimental.pallas.ops.tpu.paged_attention`."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    return _paged(
        work,
        lambda q, k, v, page, length: paged_attention(
            q, k, v, length, page, pages_per_compute_block=8
        ),
    )


def _paged(work: Work, op: Callable[..., jax.Array]) -> Attend:
    """Adapts an op that takes pages [kv_heads, pages, page_size, head_dim] of one layer."""

    def split(pool: jax.Array) -> list[jax.Array]:
        return [jnp.moveaxis(storage.load(layer), 2, 0) for layer in pool]

    def call(q: jax.Array, *arguments: Any, layer: int) -> jax.Array:
        k, v, page, length = arguments
        scaled = (q * q.shape[-1] ** -0.5).astype(k[layer].dtype)
        return op(scaled, k[layer], v[layer], page, length).astype(jnp.float32)

    kv = _copied(work)
    return Attend(call, (split(kv.k), split(kv.v), _tables(work), work.last + np.int32(1)))


def tpu_ragged_paged_attention(work: Work) -> Attend:
    """Adapts `jax.experimental.pallas.ops.tpu.ragged_paged_attention`."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    begin = np.arange(work.agents + 1, dtype=np.int32) * np.int32(work.rows)

    def call(q: jax.Array, *arguments: Any, layer: int) -> jax.Array:
        pages, length, page, begin, count = arguments
        out = ragged_paged_attention(
            q.astype(pages[layer].dtype),
            pages[layer],
            length,
            page,
            begin,
            count,
            sm_scale=q.shape[-1] ** -0.5,
        )
        return out.astype(jnp.float32)

    # In the op's layout, the keys and values of a head are neighbours.
    kv = _copied(work)
    pages = [
        jnp.stack([storage.load(k), storage.load(v)], axis=3).reshape(*k.shape[:2], -1, k.shape[3])
        for k, v in zip(kv.k, kv.v, strict=True)
    ]
    count = np.array([work.agents], np.int32)
    return Attend(call, (pages, work.last + np.int32(1), _tables(work), begin, count))


def _tables(work: Work) -> np.ndarray:
    """i32 [agents, pages]: the pages of each agent's copy of the base, then its own pages."""
    return np.stack([lane.page for lane in work.lanes(copied=True)])


def _copied(work: Work) -> PagedKV:
    """Returns the pool with every agent's copy of the base filled in."""
    rope, plan = work.config.rope, work.restore(patched=False)
    restore = functools.partial(sparse_restore, rope=rope, implementation="xla")
    return jax.jit(restore)(work.kv, None, plan)


def three_steps(work: Work) -> Callable[[PagedKV], PagedKV]:
    """Makes a restore of three programs: gather the base, overlay the patches, rotate and write.

    Returns:
      A function that takes the pool donated and returns it.
    """
    rope, head_dim = work.config.rope, work.config.head_dim
    agents, patches = work.agents, min(PATCHES, len(work.base))
    pages = [work.pages_of(agent) for agent in range(agents)]
    layers = np.arange(work.config.num_hidden_layers, dtype=np.int32)[:, None]

    def in_all_layers(page: np.ndarray, count: int) -> np.ndarray:
        """Indices of pages in all layers, in arrays that flatten layers and their `count` pages."""
        return (layers * np.int32(count) + page[None, :]).reshape(-1)

    of_pool = functools.partial(in_all_layers, count=work.shapes.pages)
    base = of_pool(np.tile(work.base, agents))
    patch = of_pool(np.concatenate([patch[:patches] for _, patch, _ in pages]))
    copy = of_pool(np.concatenate([copy for *_, copy in pages]))
    first = np.arange(agents)[:, None] * len(work.base) + np.arange(patches)[None, :]
    first = in_all_layers(first.reshape(-1).astype(np.int32), agents * len(work.base))
    frame = np.array([work.frame_of(agent) for agent in range(agents)], np.int32)
    frame = np.tile(np.repeat(frame, len(work.base)), len(layers))

    def read(pool: jax.Array, page: np.ndarray) -> jax.Array:
        flat = pool.reshape(-1, *pool.shape[2:])
        return flat.at[page].get(mode="promise_in_bounds", wrap_negative_indices=False)

    def write(pool: jax.Array, page: np.ndarray, content: jax.Array) -> jax.Array:
        flat = pool.reshape(-1, *pool.shape[-3:])
        keywords = {"mode": "promise_in_bounds", "wrap_negative_indices": False}
        return flat.at[page].set(content, unique_indices=True, **keywords).reshape(pool.shape)

    @jax.jit
    def gather(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return read(k, base), read(v, base)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def overlay(
        dense_k: jax.Array, dense_v: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return write(dense_k, first, read(k, patch)), write(dense_v, first, read(v, patch))

    @functools.partial(jax.jit, donate_argnums=(2, 3))
    def write_rotated(
        dense_k: jax.Array, dense_v: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        cos, sin = rope.rotation(jnp.asarray(frame), head_dim)
        keys = storage.load(dense_k).astype(jnp.float32)
        keys = rotate(keys, cos[:, None, None, :], sin[:, None, None, :])
        return write(k, copy, storage.store(keys, k.dtype)), write(v, copy, dense_v)

    def restore(kv: PagedKV) -> PagedKV:
        return PagedKV(*write_rotated(*overlay(*gather(kv.k, kv.v), kv.k, kv.v), kv.k, kv.v))

    return restore

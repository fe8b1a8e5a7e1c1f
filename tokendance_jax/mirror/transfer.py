"""Moves pages between a pool on the device and arrays on the host.

Pages go in groups of one size, so one program of each direction serves every round, and memory
beside the pool and the arrays stays small.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, Int32

from tokendance_jax.kernels import storage
from tokendance_jax.kernels.sparse_restore import RestorePlan, Source, sparse_restore
from tokendance_jax.mirror.errors import MirrorError
from tokendance_jax.mirror.pages import Quantised, StoredPages, before_rotation, quantised
from tokendance_jax.paged.kv import PagedKV, pool_format

# Pages of one call. On CPU, 16 pages of the 0.5B model stay in the cache: 4 GB/s out of the pool
# and 2 GB/s into it, against 3 and 0.7 GB/s with 256 pages.
GROUP = 16


def groups(count: int) -> Iterator[slice]:
    """Slices of at most `GROUP` that cover `count` pages."""
    return (slice(start, min(start + GROUP, count)) for start in range(0, count, GROUP))


def padded(x: np.ndarray, axis: int) -> np.ndarray:
    """Fills up an axis with zeros to `GROUP`."""
    missing = list(x.shape)
    missing[axis] = GROUP - x.shape[axis]
    return np.concatenate([x, np.zeros(missing, x.dtype)], axis=axis)


def read_pages(
    kv: PagedKV,
    pages: Int32[np.ndarray, " n"],
    used: Bool[np.ndarray, "pages page_size"],
    position: Int32[np.ndarray, "pages page_size"],
    form: Quantised | None,
) -> StoredPages:
    """Copies pages to the host.

    Args:
      kv: the pool.
      pages: ids of the pages.
      used: the slots that hold something, of every page of the pool; the others become 0.
      position: canonical positions of these slots.
      form: how the pages are stored; None: to the bit.

    Raises:
      MirrorError: a number to quantise is not finite.
    """
    layers, _, *slot_shape = kv.k.shape
    shape = layers, len(pages), *slot_shape
    k, v = (np.empty(shape, kv.k.dtype if form is None else np.int8) for _ in "kv")
    out = StoredPages(k, v)
    if form is not None:
        out = StoredPages(k, v, *(np.empty(shape[:-1], np.float32) for _ in "kv"))
    for group in groups(len(pages)):
        ids = pages[group]
        part = _read(kv, form, padded(ids, 0), padded(used[ids], 0), padded(position[ids], 0))
        for whole, some in zip(jax.tree.leaves(out), jax.tree.leaves(part), strict=True):
            whole[:, group] = np.asarray(some)[:, : len(ids)]
    for name in ("k_scale", "v_scale") if form is not None else ():
        if not np.isfinite(getattr(out, name)).all():
            problem = "has numbers that are not finite"
            raise MirrorError("kv", name[0], problem, "encode the pages to the bit")
    return out


def restore(
    kv: PagedKV,
    pages: StoredPages,
    plan: RestorePlan,
    form: Quantised | None,
    *,
    theta: float,
    implementation: str | None = None,
) -> PagedKV:
    """Writes slots of stored pages into a pool, which is donated.

    Args:
      kv: the pool.
      pages: where from.
      plan: what goes where (`turns` gives its turns).
      form: how the pages are stored.
      theta: base of the rotary frequencies.
      implementation: see `kernels.dispatch`.

    Returns:
      The pool with the slots written.
    """
    program = restorer(theta, implementation)
    # As many pieces as pages: most pages are one piece. A page of several may be read twice.
    for group in groups(len(plan.first)):
        part = plan.cut(group.start, group.stop)
        page = np.asarray(part.page)
        source = pages.take(padded(page, 0))
        part = dataclasses.replace(part, page=np.arange(len(page), dtype=np.int32))
        kv = program(kv, source, form, part.padded(GROUP, GROUP))
    return kv


@functools.cache
def restorer(theta: float, implementation: str | None, device: jax.Device | None = None) -> Any:
    """The program that writes a group of pages into a pool.

    Args:
      theta: base of the rotary frequencies.
      implementation: see `kernels.dispatch`.
      device: where the pool lies; None: the default device.

    Returns:
      A jitted function of the pool, which is donated, `StoredPages`, their form and the plan. Pools
      come and go in the layout that all programs take (`pool_format`).
    """
    pool = pool_format(device)
    return jax.jit(
        functools.partial(_restore, theta=theta, implementation=implementation),
        donate_argnums=0,
        in_shardings=(pool, None, None, None),
        out_shardings=pool,
    )


def turns(
    at: Int[np.ndarray, " tokens"],
    canonical: Int[np.ndarray, " tokens"],
    offset: Int[np.ndarray, " tokens"],
    form: Quantised | None,
) -> Int32[np.ndarray, " tokens"]:
    """`RestorePlan.turn` of tokens.

    Args:
      at: positions at which their keys shall stand.
      canonical: positions at which they were encoded.
      offset: their slots in their pages.
      form: how the pages are stored.
    """
    return (at - (canonical if form is None else offset)).astype(np.int32)


@jax.jit
def _read(
    kv: PagedKV,
    form: Quantised | None,
    pages: jax.Array,
    used: jax.Array,
    position: jax.Array,
) -> StoredPages:
    mask = used[None, :, :, None, None]
    k, v = kv.k[:, pages], kv.v[:, pages]
    if form is None:
        return StoredPages(*(jnp.where(mask, x, jnp.zeros((), x.dtype)) for x in (k, v)))
    k, v = (storage.load(x).astype(jnp.float32) for x in (k, v))
    k, v = (jnp.where(mask, x, 0.0) for x in (before_rotation(k, position, form), v))
    (k, k_scale), (v, v_scale) = quantised(k), quantised(v)
    return StoredPages(k, v, k_scale, v_scale)


def _restore(
    kv: PagedKV,
    pages: StoredPages,
    form: Quantised | None,
    plan: RestorePlan,
    *,
    theta: float,
    implementation: str | None,
) -> PagedKV:
    bias = None if form is None else form.key_bias
    source = Source(
        pages.k, pages.v, pages.k_scale, pages.v_scale, key_bias=bias, rotated=form is None
    )
    return sparse_restore(kv, source, plan, theta=theta, implementation=implementation)

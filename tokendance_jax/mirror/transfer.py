"""Moves pages between a pool on the device and arrays on the host.

Pages move in groups of one size. So one program per direction serves every round, and little memory
is needed in addition to the pool and the arrays.
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
from tokendance_jax.kernels.rope import Rope
from tokendance_jax.kernels.sparse_restore import RestorePlan, Source, sparse_restore
from tokendance_jax.mirror.errors import MirrorError
from tokendance_jax.mirror.pages import Quantised, StoredPages, before_rotation, quantised
from tokendance_jax.paged.kv import PagedKV, pool_format

# Pages per call. 16 pages of the 0.5B model stay in a CPU's cache: they are copied at 4 GB/s out of
# the pool and at 2 GB/s into it, compared with 3 and 0.7 GB/s for 256 pages.
GROUP = 16


def groups(count: int) -> Iterator[slice]:
    """Returns slices of at most `GROUP` pages that together cover `count` pages."""
    return (slice(start, min(start + GROUP, count)) for start in range(0, count, GROUP))


def padded(x: np.ndarray, axis: int) -> np.ndarray:
    """Pads an axis with zeros to length `GROUP`."""
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
      used: marks the slots in use, in every page of the pool; all other slots become 0.
      position: canonical positions of these slots.
      form: how to store the pages; None: exactly as in the pool.

    Raises:
      MirrorError: `form` is given and a number is not finite.
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
            raise MirrorError("kv", name[0], problem, "encode the pages exactly (form=None)")
    return out


def restore(
    kv: PagedKV,
    pages: StoredPages,
    plan: RestorePlan,
    form: Quantised | None,
    *,
    rope: Rope,
    implementation: str | None = None,
) -> PagedKV:
    """Writes slots of stored pages into a pool, which is donated.

    Args:
      kv: the pool.
      pages: the stored pages to read.
      plan: which slots go where (`turns` computes `plan.turn`).
      form: how the pages are stored.
      rope: the rotary embedding.
      implementation: see `kernels.dispatch`.

    Returns:
      The pool with the slots written.
    """
    program = restorer(rope, implementation)
    # Each group has at most `GROUP` pieces, because most pages are one piece. A page of several
    # pieces may be read twice.
    for group in groups(len(plan.first)):
        part = plan.cut(group.start, group.stop)
        page = np.asarray(part.page)
        source = pages.take(padded(page, 0))
        part = dataclasses.replace(part, page=np.arange(len(page), dtype=np.int32))
        kv = program(kv, source, form, part.padded(GROUP, GROUP))
    return kv


@functools.cache
def restorer(rope: Rope, implementation: str | None, device: jax.Device | None = None) -> Any:
    """Returns the program that writes a group of pages into a pool.

    Args:
      rope: the rotary embedding.
      implementation: see `kernels.dispatch`.
      device: where the pool lies; None: the default device.

    Returns:
      A jitted function of the pool, which is donated, the `StoredPages`, their form and the plan.
      It takes and returns pools in the layout of all programs (`pool_format`).
    """
    pool = pool_format(device)
    return jax.jit(
        functools.partial(_restore, rope=rope, implementation=implementation),
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
    """Computes `RestorePlan.turn` for tokens.

    Args:
      at: positions to which the tokens' keys are to be rotated.
      canonical: positions at which the keys were encoded.
      offset: slots of the tokens in their pages.
      form: how the pages are stored; None: exactly as in the pool.
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
    rope: Rope,
    implementation: str | None,
) -> PagedKV:
    bias = None if form is None else form.key_bias
    source = Source(
        pages.k, pages.v, pages.k_scale, pages.v_scale, key_bias=bias, rotated=form is None
    )
    return sparse_restore(kv, source, plan, rope=rope, implementation=implementation)

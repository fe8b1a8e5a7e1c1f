"""Mirrors of dense caches, and dense caches of mirrors.

Dense keys are rotated at logical positions. The same block at another offset has other keys
everywhere, so a comparison without alignment finds nothing in common; keys are turned by the frame
first, from the canonical copy and in float32.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int32, Shaped

from tokendance_jax.collector.lane import LanePlan
from tokendance_jax.kernels import rope, storage
from tokendance_jax.kernels.sparse_restore import RestorePlan
from tokendance_jax.mirror.errors import MirrorError
from tokendance_jax.mirror.layout import cut
from tokendance_jax.mirror.master_mirror import MasterMirror, encode
from tokendance_jax.mirror.pages import Array, joined
from tokendance_jax.mirror.transfer import GROUP, groups, padded, restore, turns
from tokendance_jax.paged.kv import PagedKV

Pages = Shaped[np.ndarray, "layers pages page_size kv_heads head_dim"]
Dense = Shaped[np.ndarray | jax.Array, "layers _ kv_heads head_dim"]


def encode_dense(
    lanes: Sequence[LanePlan],
    caches: Sequence[tuple[Dense, Dense]],
    base: PagedKV,
    *,
    theta: float,
    threshold: float,
) -> MasterMirror:
    """Encodes dense caches by comparing them with base pages.

    Of each lane's table, an entry with `base` set shows slots of that base page under its frame,
    and other entries are private; `page` is not read. A page of an agent becomes a patch where any
    of its keys or values is further than `threshold` from the base's. Patches and private pages
    keep the agent's own bits, in frame 0.

    Args:
      lanes: where each agent's tokens show base pages.
      caches: K and V of each lane, [layers, tokens, kv_heads, head_dim] in the dtype of `base`,
        keys rotated at logical positions.
      base: base pages, keys rotated at canonical positions; page 0 is not read.
      theta: base of the rotary frequencies.
      threshold: largest absolute difference of a number that is taken for the same.

    Raises:
      MirrorError: the threshold is negative or no number, or a cache does not fit its lane or the
        base's shape or dtype, or an entry shows a page outside `base`.
    """
    if not threshold >= 0:
        raise MirrorError("threshold", "value", f"is {threshold}", "pass 0 or more")
    if len(caches) != len(lanes):
        problem = f"{len(caches)} for {len(lanes)} lanes"
        raise MirrorError("caches", "number", problem, "pass K and V of every lane")
    base_k, base_v = np.asarray(base.k), np.asarray(base.v)
    behind = base_k.shape[1]  # the next page: what is an agent's own lies behind the base
    own_k, own_v = [], []
    encoded, lengths = [], []
    for index, (lane, (k, v)) in enumerate(zip(lanes, caches, strict=True)):
        _check_cache(index, k, v, base_k)
        lane = cut(lane, k.shape[1])
        used = _used(lane.first, lane.slots, base_k.shape[2])
        if (lane.base < 0).any() or (lane.base >= base_k.shape[1]).any():
            problem = f"an entry of lane {index} shows none of {base_k.shape[1]} pages"
            raise MirrorError("lanes", "base", problem, "pass all base pages that lanes show")
        if used.sum() != k.shape[1]:
            problem = f"an entry of lane {index} is not inside a page of {used.shape[1]} slots"
            raise MirrorError("lanes", "slots", problem, "cut entries at the pages of the base")
        pages_k, pages_v = _paged(k, used), _paged(v, used)
        shown_k = _turned(base_k[:, lane.base], lane.frame, theta)
        own = (
            (lane.base == 0)
            | _differs(pages_k, shown_k, used, threshold)
            | _differs(pages_v, base_v[:, lane.base], used, threshold)
        )
        page = np.where(own, behind + np.cumsum(own) - 1, lane.base).astype(np.int32)
        frame = np.where(own, 0, lane.frame).astype(np.int32)
        encoded.append(dataclasses.replace(lane, page=page, frame=frame))
        lengths.append(k.shape[1])
        own_k.append(pages_k[:, own])
        own_v.append(pages_v[:, own])
        behind += int(own.sum())
    pool = PagedKV(
        k=jnp.asarray(np.concatenate([base_k, *own_k], axis=1)),
        v=jnp.asarray(np.concatenate([base_v, *own_v], axis=1)),
    )
    return encode(encoded, lengths, pool)


def decode_dense(
    mirrors: MasterMirror, index: int, *, rotate: bool, theta: float
) -> tuple[
    Shaped[np.ndarray, "layers tokens kv_heads head_dim"],
    Shaped[np.ndarray, "layers tokens kv_heads head_dim"],
]:
    """K and V of one agent in logical order.

    Args:
      mirrors: the round.
      index: which mirror.
      rotate: whether keys stand at logical positions, rotated in float32 and with one rounding;
        keys of frame 0 that are stored to the bit keep it. Otherwise keys stand at canonical
        positions.
      theta: base of the rotary frequencies.

    Returns:
      K and V in the storage dtype; of quantised pages in float32.

    Raises:
      MirrorError: there is no such mirror, or its pages were quantised with another `theta`.
    """
    if not 0 <= index < len(mirrors.mirrors):
        problem = f"{index} of {len(mirrors.mirrors)} mirrors"
        raise MirrorError("index", "value", problem, "count mirrors from 0")
    form, mirror = mirrors.form, mirrors.mirrors[index]
    if form is not None and form.theta != theta:
        problem = f"is {theta}, of these mirrors {form.theta}"
        raise MirrorError("theta", "value", problem, "pass that of the model")
    table = jax.tree.map(np.asarray, mirror.table)
    parts = [mirrors.base, mirror.private, mirror.patch]
    stops = np.cumsum([part.count for part in parts])
    page = table.pages(*np.split(np.arange(stops[-1], dtype=np.int32), stops[:-1]))
    entry, offset, canonical = table.tokens_at()
    position = np.arange(len(entry), dtype=np.int32)
    turn = turns(position if rotate else canonical, canonical, offset, form)
    pages = joined(parts)
    layers, _, page_size, *head = pages.k.shape
    source = page[entry] * page_size + offset
    dtype = pages.k.dtype if form is None else np.dtype(np.float32)
    k, v = (np.empty((layers, len(entry), *head), dtype) for _ in "kv")
    scratch = PagedKV(*(jnp.zeros((layers, GROUP, page_size, *head), dtype) for _ in "kv"))
    for start in range(0, len(entry), GROUP * page_size):
        some = slice(start, start + GROUP * page_size)
        plan = RestorePlan.of_slots(
            source[some], position[some] - start, turn[some], page_size=page_size
        )
        scratch = restore(scratch, pages, plan, form, theta=theta)
        for out, pool in ((k, scratch.k), (v, scratch.v)):
            tokens = out[:, some]
            tokens[:] = np.asarray(pool).reshape(layers, -1, *head)[:, : tokens.shape[1]]
    return k, v


def _used(
    first: Int32[np.ndarray, " entries"], slots: Int32[np.ndarray, " entries"], page_size: int
) -> Bool[np.ndarray, "entries page_size"]:
    """The slots that entries read; in order, they are a lane's tokens."""
    offset = np.arange(page_size)[None, :]
    return (offset >= first[:, None]) & (offset < (first + slots)[:, None])


def _paged(x: Dense, used: Bool[np.ndarray, "pages page_size"]) -> Pages:
    """Lays tokens into the used slots of pages; the others are 0."""
    pages = np.zeros((x.shape[0], *used.shape, *x.shape[2:]), x.dtype)
    pages[:, used] = np.asarray(x)
    return pages


def _turned(k: Pages, frame: Int32[np.ndarray, " pages"], theta: float) -> Pages:
    """Keys rotated forward by their pages' frames."""
    k = k.copy()
    moved = np.flatnonzero(frame)
    for group in groups(len(moved)):
        at = moved[group]
        turned = _turn(padded(k[:, at], 1), padded(frame[at], 0), theta=theta)
        k[:, at] = np.asarray(turned)[:, : len(at)]
    return k


@partial(jax.jit, static_argnames="theta")
def _turn(k: jax.Array, frame: jax.Array, *, theta: float) -> jax.Array:
    cos, sin = rope.rotation(frame[None, :, None, None], theta=theta, head_dim=k.shape[-1])
    return storage.store(rope.rotate(storage.load(k).astype(jnp.float32), cos, sin), k.dtype)


def _differs(
    own: Pages, shown: Pages, used: Bool[np.ndarray, "pages page_size"], threshold: float
) -> Bool[np.ndarray, " pages"]:
    """Which pages have a number further apart than a threshold; NaN is far from all numbers."""
    dtype = storage.value_dtype(own.dtype)
    own, shown = (x.view(dtype).astype(np.float32) for x in (own, shown))
    with np.errstate(invalid="ignore"):  # inf - inf
        near = np.abs(own - shown) <= np.float32(threshold)
    return np.asarray((~near & used[None, :, :, None, None]).any(axis=(0, 2, 3, 4)))


def _check_cache(index: int, k: Array, v: Array, base_k: Array) -> None:
    layers, _, _, *head = base_k.shape
    expected = (layers, k.shape[1], *head)
    for name, x in (("k", k), ("v", v)):
        if x.shape != expected or x.dtype != base_k.dtype:
            problem = f"is {list(x.shape)} {x.dtype}, of this base {list(expected)} {base_k.dtype}"
            raise MirrorError(f"caches[{index}]", name, problem, "pass caches of the base's model")

"""Encodes dense caches as mirrors, and decodes mirrors to dense caches.

The keys of a dense cache are rotated at logical positions. The same block at another offset has
different keys everywhere, so a comparison without alignment finds nothing in common. Keys are
therefore rotated by the frame first, from the canonical copy and in float32.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int32, Shaped

from tokendance_jax.identity import ModelIdentity
from tokendance_jax.kernels.page_diff import DiffPlan, page_diff
from tokendance_jax.kernels.rope import Rope
from tokendance_jax.kernels.sparse_restore import RestorePlan
from tokendance_jax.mirror.errors import MirrorError
from tokendance_jax.mirror.layout import cut
from tokendance_jax.mirror.master_mirror import MasterMirror, encode
from tokendance_jax.mirror.pages import Array, joined
from tokendance_jax.mirror.transfer import GROUP, groups, restore, turns
from tokendance_jax.paged.kv import PagedKV
from tokendance_jax.plan.lane import LanePlan

Pages = Shaped[np.ndarray, "layers pages page_size kv_heads head_dim"]
Dense = Shaped[np.ndarray | jax.Array, "layers _ kv_heads head_dim"]


def encode_dense(
    lanes: Sequence[LanePlan],
    caches: Sequence[tuple[Dense, Dense]],
    base: PagedKV,
    *,
    identity: ModelIdentity,
    threshold: float,
) -> MasterMirror:
    """Encodes dense caches by comparing them with base pages.

    In each lane's table, an entry with `base` set shows slots of that base page under its frame,
    and all other entries are private; `page` is not read. A page of an agent becomes a patch if any
    of its keys or values differs by more than `threshold` from the base page. For the comparison,
    the base's keys are rotated in float32 and not rounded again. NaN and infinite differences
    exceed every threshold. Patches and private pages keep the agent's own bits, in frame 0.

    Args:
      lanes: tables that say which of each agent's tokens show base pages.
      caches: K and V of each lane, [layers, tokens, kv_heads, head_dim] in the dtype of `base`,
        with keys rotated at logical positions.
      base: base pages, with keys rotated at canonical positions; page 0 is not read.
      identity: the model that computed the caches and the base.
      threshold: largest absolute difference at which two numbers count as the same.

    Raises:
      MirrorError: the threshold is negative or NaN, a cache does not fit its lane or the base's
        shape or dtype, or an entry shows a page outside `base`.
    """
    if not threshold >= 0:
        raise MirrorError("threshold", "value", f"is {threshold}", "pass 0 or more")
    if len(caches) != len(lanes):
        problem = f"{len(caches)} for {len(lanes)} lanes"
        raise MirrorError("caches", "number", problem, "pass K and V of every lane")
    base_k, base_v = np.asarray(base.k), np.asarray(base.v)
    lanes = [
        _cut(index, lane, k, v, base_k)
        for index, (lane, (k, v)) in enumerate(zip(lanes, caches, strict=True))
    ]
    patched = _patched(lanes, caches, base, rope=identity.rope, threshold=threshold)
    behind = base_k.shape[1]  # the next free page: agents' own pages follow the base pages
    own_k, own_v = [], []
    encoded, lengths = [], []
    for lane, (k, v), patch in zip(lanes, caches, patched, strict=True):
        own = (lane.base == 0) | patch
        page = np.where(own, behind + np.cumsum(own) - 1, lane.base).astype(np.int32)
        frame = np.where(own, 0, lane.frame).astype(np.int32)
        encoded.append(dataclasses.replace(lane, page=page, frame=frame))
        lengths.append(k.shape[1])
        used = _used(lane.first, lane.slots, base_k.shape[2])
        own_k.append(_paged(k, used)[:, own])
        own_v.append(_paged(v, used)[:, own])
        behind += int(own.sum())
    pool = PagedKV(
        k=jnp.asarray(np.concatenate([base_k, *own_k], axis=1)),
        v=jnp.asarray(np.concatenate([base_v, *own_v], axis=1)),
    )
    return encode(encoded, lengths, pool, identity=identity)


def decode_dense(
    mirrors: MasterMirror, index: int, *, rotate: bool
) -> tuple[
    Shaped[np.ndarray, "layers tokens kv_heads head_dim"],
    Shaped[np.ndarray, "layers tokens kv_heads head_dim"],
]:
    """Returns K and V of one agent in logical order.

    Args:
      mirrors: the mirrors of a round.
      index: number of the mirror, from 0.
      rotate: whether to rotate keys to logical positions, in float32 and with one rounding; exactly
        stored keys of frame 0 keep their bits. Otherwise keys stay at canonical positions.

    Returns:
      K and V in the storage dtype, or in float32 for quantised pages.

    Raises:
      MirrorError: `index` is out of range.
    """
    if not 0 <= index < len(mirrors.mirrors):
        problem = f"{index} of {len(mirrors.mirrors)} mirrors"
        raise MirrorError("index", "value", problem, "count mirrors from 0")
    form, mirror = mirrors.form, mirrors.mirrors[index]
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
        scratch = restore(scratch, pages, plan, form, rope=mirrors.identity.rope)
        for out, pool in ((k, scratch.k), (v, scratch.v)):
            tokens = out[:, some]
            tokens[:] = np.asarray(pool).reshape(layers, -1, *head)[:, : tokens.shape[1]]
    return k, v


def _used(
    first: Int32[np.ndarray, " entries"], slots: Int32[np.ndarray, " entries"], page_size: int
) -> Bool[np.ndarray, "entries page_size"]:
    """Marks the slots that entries read. In order, they hold a lane's tokens."""
    offset = np.arange(page_size)[None, :]
    return (offset >= first[:, None]) & (offset < (first + slots)[:, None])


def _paged(x: Dense, used: Bool[np.ndarray, "pages page_size"]) -> Pages:
    """Copies tokens into the used slots of pages. The other slots are 0."""
    pages = np.zeros((x.shape[0], *used.shape, *x.shape[2:]), x.dtype)
    pages[:, used] = np.asarray(x)
    return pages


def _patched(
    lanes: Sequence[LanePlan],
    caches: Sequence[tuple[Dense, Dense]],
    base: PagedKV,
    *,
    rope: Rope,
    threshold: float,
) -> list[Bool[np.ndarray, " entries"]]:
    """Marks the entries of each lane that show a base page too far from the lane's cache."""
    layers, _, *slot_shape = base.k.shape
    own = [(np.asarray(k), np.asarray(v)) for k, v in caches]
    counts = [len(lane.base) for lane in lanes]
    agent = np.repeat(np.arange(len(lanes)), counts)
    shown, frame, first, slots, start = np.concatenate(
        [np.zeros((5, 0), np.int32)]
        + [
            np.stack([x.base, x.frame, x.first, x.slots, np.cumsum(x.slots) - x.slots])
            for x in lanes
        ],
        axis=1,
    )
    far = np.zeros(len(shown), np.bool_)
    # Sorted by base page across all lanes, so that siblings of one page are compared together.
    order = np.argsort(shown, kind="stable")
    order = order[shown[order] > 0]
    for group in groups(len(order)):
        some = order[group]
        siblings_k, siblings_v = np.zeros((2, layers, GROUP, *slot_shape), base.k.dtype)
        for number, index in enumerate(some):
            inside = slice(first[index], first[index] + slots[index])
            tokens = slice(start[index], start[index] + slots[index])
            k, v = own[agent[index]]
            siblings_k[:, number, inside] = k[:, tokens]
            siblings_v[:, number, inside] = v[:, tokens]
        plan = DiffPlan.of_comparisons(
            shown[some], np.arange(len(some)), frame[some], first[some], slots[some]
        ).padded(GROUP, GROUP)
        found = _far(base, PagedKV(siblings_k, siblings_v), plan, threshold, rope=rope)
        far[some] = np.asarray(found)[: len(some)]
    return [far[stop - n : stop] for n, stop in zip(counts, np.cumsum(counts), strict=True)]


@partial(jax.jit, static_argnames="rope")
def _far(
    base: PagedKV,
    siblings: PagedKV,
    plan: DiffPlan,
    threshold: float | Array,
    *,
    rope: Rope,
) -> jax.Array:
    return page_diff(base, siblings, plan, rope=rope, threshold=threshold).far


def _cut(index: int, lane: LanePlan, k: Array, v: Array, base_k: Pages) -> LanePlan:
    """Returns the part of a lane that its cache holds; raises if cache or base do not fit."""
    layers, pages, page_size, *head = base_k.shape
    expected = (layers, k.shape[1], *head)
    for name, x in (("k", k), ("v", v)):
        if x.shape != expected or x.dtype != base_k.dtype:
            problem = f"is {list(x.shape)} {x.dtype}, for a base of {list(expected)} {base_k.dtype}"
            raise MirrorError(f"caches[{index}]", name, problem, "pass caches of the base's model")
    lane = cut(lane, k.shape[1])
    if (lane.base < 0).any() or (lane.base >= pages).any():
        problem = f"an entry of lane {index} shows a page outside the {pages} base pages"
        raise MirrorError("lanes", "base", problem, "pass all base pages that lanes show")
    if _used(lane.first, lane.slots, page_size).sum() != k.shape[1]:
        problem = f"an entry of lane {index} is not inside a page of {page_size} slots"
        raise MirrorError("lanes", "slots", problem, "cut entries at the pages of the base")
    return lane

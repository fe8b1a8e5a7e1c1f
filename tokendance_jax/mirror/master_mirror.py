"""Master-Mirror storage: the KV of a round at rest, with each shared page stored once.

Follows the diff-aware storage of TokenDance (arXiv 2604.03143, section 4.3), except that the Master
is a canonical base instead of one request's cache. Encoding does not search for differences: the
block tables say which pages an agent computed itself. A patch overwrites a base page and is not a
difference to be added, so decoding is exact in every dtype. Optionally, pages are stored as 8-bit
integers.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import no_type_check

import jax
import numpy as np
from jaxtyping import Bool, Int32

from tokendance_jax.identity import ModelIdentity
from tokendance_jax.kernels.rope import Rope
from tokendance_jax.kernels.sparse_restore import RestorePlan
from tokendance_jax.mirror.errors import MirrorError
from tokendance_jax.mirror.layout import MirrorLayout, MirrorTable
from tokendance_jax.mirror.pages import Array, Quantised, StoredPages
from tokendance_jax.mirror.transfer import read_pages, restore, turns
from tokendance_jax.paged.kv import PagedKV
from tokendance_jax.paged.page_pool import PagePool
from tokendance_jax.plan.lane import LanePlan


@no_type_check  # JAX also builds pytrees of placeholders that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mirror:
    """The part of the KV that belongs to one agent.

    Attributes:
      table: the entries of the agent's context, in logical order.
      private: its private pages.
      patch: its patch pages.
    """

    table: MirrorTable
    private: StoredPages
    patch: StoredPages


@no_type_check  # JAX also builds pytrees of placeholders that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MasterMirror:
    """The KV of a round at rest. It depends only on what was written to the round's slots.

    Attributes:
      base: the base pages.
      mirrors: one mirror for each agent.
      identity: the model that computed the KV.
      form: how all pages are stored; None: exactly as in the pool.
    """

    base: StoredPages
    mirrors: tuple[Mirror, ...]
    identity: ModelIdentity = dataclasses.field(metadata={"static": True})
    form: Quantised | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: `MirrorLayout.compression(...).stored_bytes`."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def encode(
    lanes: Sequence[LanePlan],
    lengths: Sequence[int],
    kv: PagedKV,
    *,
    identity: ModelIdentity,
    form: Quantised | None = None,
) -> MasterMirror:
    """Copies a round's pages out of the pool, each shared page once.

    Args:
      lanes: the round's lanes; `LanePlan.base` says which entries show or replace base pages.
      lengths: number of tokens of each lane with written K and V; slots after them are cut off.
      kv: the pool; it is not changed.
      identity: the model that computed the KV.
      form: how to store pages; None: exactly as in the pool.

    Returns:
      The mirrors, with their arrays on the host.

    Raises:
      MirrorError: lanes and lengths do not match (see `MirrorLayout.of_lanes`), or an entry is not
        inside the pool's pages. With `form` also: its key bias or rotary embedding is not that of
        the pool's model, a number is not finite, or a slot has two canonical positions.
    """
    if form is not None:
        form.check(kv.k, identity.rope)
    layout = MirrorLayout.of_lanes(lanes, lengths)
    pages, page_size = kv.k.shape[1:3]
    used, position = _written_slots(layout, pages, page_size, one_position=form is not None)
    take = partial(read_pages, kv, used=used, position=position, form=form)
    mirrors = tuple(
        Mirror(table, take(private), take(patch))
        for table, private, patch in zip(
            layout.tables, layout.private_pages, layout.patch_pages, strict=True
        )
    )
    return MasterMirror(take(layout.base_pages), mirrors, identity, form)


def decode_pages(
    mirrors: MasterMirror,
    kv: PagedKV,
    pool: PagePool,
    *,
    identity: ModelIdentity,
    implementation: str | None = None,
) -> tuple[PagedKV, list[LanePlan]]:
    """Restores mirrors into pages of a pool, with the base restored once for all of them.

    To restore only some agents, drop the other mirrors from `mirrors.mirrors`. Base pages that only
    dropped mirrors read are not restored.

    Args:
      mirrors: the result of `encode`.
      kv: the pool's arrays; donated. For quantised pages they may have any precision.
      pool: allocates the pages. Afterwards it holds one reference for each table entry.
      identity: the model that will read the pages.
      implementation: the kernel that restores pages (see `kernels.dispatch`).

    Returns:
      The arrays with the written slots restored, and the lanes. They are the encoded lanes with new
      page ids, cut off after their written tokens, and with nothing to compute. `LanePlan.base` is
      negative for a patch whose base page is not in the pool.

    Raises:
      MirrorError: another model computed the mirrors, or the pool's arrays do not have their shape
        or dtype. No page is held then.
      OutOfPages: the pool has too few pages. No page is held then.
    """
    if differences := mirrors.identity.differences(identity):
        problem = f"is that of another model: {differences}"
        remedy = "restore them with the model that computed them, or serve the round again"
        raise MirrorError("mirrors", "identity", problem, remedy)
    _check_pool(mirrors, kv, pool)
    form, stored = mirrors.form, mirrors.base.count
    tables = [jax.tree.map(np.asarray, mirror.table) for mirror in mirrors.mirrors]
    parts = [mirrors.base]
    parts += [part for mirror in mirrors.mirrors for part in (mirror.private, mirror.patch)]
    stops = np.cumsum([part.count for part in parts])
    wanted = np.arange(stops[-1]) >= stored
    for table in tables:
        wanted[table.base_reads(stored)] = True
    # Base pages that are not restored get labels that are not page ids. They also differ from -2,
    # -3, ..., which mirrors use for base pages that are not stored.
    ids = np.iinfo(np.int32).min + np.arange(stops[-1], dtype=np.int32)
    pages = ids[wanted] = pool.allocate(int(wanted.sum()))
    base_ids, *own_ids = np.split(ids, stops[:-1])
    labels = np.append(base_ids, np.int32(0))  # index -1, a private entry, selects this 0
    lanes = [
        LanePlan(
            token_ids=table.token_ids,
            computed=np.zeros(0, np.int32),
            page=table.pages(base_ids, private, patch),
            frame=table.frame,
            first=table.first,
            slots=table.slots,
            base=np.where(table.base < -1, table.base + 1, labels[np.maximum(table.base, -1)]),
        )
        for table, private, patch in zip(tables, own_ids[::2], own_ids[1::2], strict=True)
    ]
    try:
        for part, plan in zip(parts, _plans(mirrors, tables, ids, stops), strict=True):
            # Without quantisation keys are not rotated, so one program serves every model.
            rope = Rope(1.0) if form is None else form.rope
            kv = restore(kv, part, plan, form, rope=rope, implementation=implementation)
    except BaseException:
        pool.release(pages)
        raise
    # Replace the reference of each page by one reference of each entry.
    pool.retain(np.concatenate([pages[:0], *(lane.page for lane in lanes)]))
    pool.release(pages)
    return kv, lanes


def _plans(
    mirrors: MasterMirror,
    tables: Sequence[MirrorTable],
    ids: Int32[np.ndarray, " pages"],
    stops: np.ndarray,
) -> list[RestorePlan]:
    """Plans the copy of each part of the stored pages, which end at `stops`, to pages `ids`."""
    size = mirrors.base.k.shape[2]
    if mirrors.form is None:
        # Copy whole pages, because XLA's CPU code writes them three times as fast.
        pages = np.flatnonzero(ids > 0).astype(np.int32)
        slot = (pages[:, None] * size + np.arange(size, dtype=np.int32)).reshape(-1)
        turn = np.zeros_like(slot)
    else:
        slot, canonical = _read_slots(tables, stops, size)
        turn = turns(canonical, canonical, slot % size, mirrors.form)
    target = ids[slot // size] * size + slot % size
    starts = np.append(0, stops[:-1]) * size
    begins = np.searchsorted(slot, np.append(starts, stops[-1] * size))
    return [
        RestorePlan.of_slots(
            slot[begin:end] - start, target[begin:end], turn[begin:end], page_size=size
        )
        for start, begin, end in zip(starts.tolist(), begins[:-1], begins[1:], strict=True)
    ]


def _read_slots(
    tables: Sequence[MirrorTable], stops: np.ndarray, page_size: int
) -> tuple[Int32[np.ndarray, " slots"], Int32[np.ndarray, " slots"]]:
    """Returns the stored slots that entries read, sorted and unique, and their positions."""
    base, *own = np.split(np.arange(stops[-1], dtype=np.int32), stops[:-1])
    slots, positions = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for table, private, patch in zip(tables, own[::2], own[1::2], strict=True):
        entry, offset, canonical = table.tokens_at()
        slots.append(table.pages(base, private, patch)[entry] * page_size + offset)
        positions.append(canonical)
    slot, at = np.unique(np.concatenate(slots), return_index=True)
    return slot, np.concatenate(positions)[at]


def _written_slots(
    layout: MirrorLayout, pages: int, page_size: int, *, one_position: bool
) -> tuple[Bool[np.ndarray, "p w"], Int32[np.ndarray, "p w"]]:
    """Finds the slots of a pool that entries read, and their canonical positions.

    Args:
      layout: the layout of the round.
      pages: pages of the pool.
      page_size: slots of a page.
      one_position: whether all entries that show a slot must agree on its canonical position.
    """
    used = np.zeros((pages, page_size), np.bool_)
    position = np.zeros((pages, page_size), np.int32)
    written = []
    for index, table in enumerate(layout.tables):
        page, stop = layout.pages(index), table.first + table.slots
        if (page >= pages).any() or (table.first < 0).any() or (stop > page_size).any():
            problem = f"an entry of lane {index} is not inside {pages} pages of {page_size} slots"
            raise MirrorError("lanes", "page", problem, "pass the pool that the lanes belong to")
        entry, offset, canonical = table.tokens_at()
        where = page[entry], offset
        used[where], position[where] = True, canonical
        written.append((where, canonical))
    for index, (where, canonical) in enumerate(written):
        if one_position and (position[where] != canonical).any():
            problem = f"a slot of lane {index} is shown at two canonical positions"
            raise MirrorError("lanes", "frame", problem, "pass frames that agree, or no form")
    return used, position


def _check_pool(mirrors: MasterMirror, kv: PagedKV, pool: PagePool) -> None:
    def kind(x: Array, dtype: np.dtype) -> str:
        layers, _, *slot_shape = x.shape
        return f"[{layers}, pages, {', '.join(map(str, slot_shape))}] {dtype}"

    stored = mirrors.base.k
    found = kind(kv.k, kv.k.dtype)
    expected = kind(stored, stored.dtype if mirrors.form is None else kv.k.dtype)
    if found != expected:
        raise MirrorError("kv", "k", f"is {found}", f"pass a pool of {expected}")
    if kv.k.shape[1] < pool.total:
        problem = f"has {kv.k.shape[1]} pages, the page pool {pool.total}"
        raise MirrorError("kv", "k", problem, "pass the arrays of the page pool")

"""Master-Mirror storage: the KV of a round at rest, each shared page once.

After the diff-aware storage of TokenDance (arXiv 2604.03143, section 4.3), with a canonical base in
place of a request's cache as the Master. What differs is not searched for: the block tables say
which pages an agent computed itself. Patches overwrite pages of the base and are never added to
them, so decoding is exact in every dtype; pages may also be stored as 8-bit integers.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import no_type_check

import jax
import numpy as np
from jaxtyping import Bool, Int32

from tokendance_jax.identity import ModelIdentity
from tokendance_jax.kernels.sparse_restore import RestorePlan
from tokendance_jax.mirror.errors import MirrorError
from tokendance_jax.mirror.layout import MirrorLayout, MirrorTable
from tokendance_jax.mirror.pages import Array, Quantised, StoredPages
from tokendance_jax.mirror.transfer import read_pages, restore, turns
from tokendance_jax.paged.kv import PagedKV
from tokendance_jax.paged.page_pool import PagePool
from tokendance_jax.plan.lane import LanePlan


@no_type_check  # JAX also builds pytrees of stand-ins that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mirror:
    """What one agent holds besides the base.

    Attributes:
      table: what the agent's context is made of, in logical order.
      private: its private pages.
      patch: its patch pages.
    """

    table: MirrorTable
    private: StoredPages
    patch: StoredPages


@no_type_check  # JAX also builds pytrees of stand-ins that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MasterMirror:
    """The KV of a round at rest. A pure function of what was written.

    Attributes:
      base: the base pages.
      mirrors: one for each agent.
      identity: the model that computed it.
      form: how all pages are stored; None: to the bit.
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
      lengths: tokens of each lane whose K and V are written; the room behind them is cut off.
      kv: the pool, which stays as it is.
      identity: the model that computed it.
      form: how pages are stored; None: to the bit.

    Returns:
      Arrays on the host.

    Raises:
      MirrorError: lanes and lengths do not fit each other (see `MirrorLayout.of_lanes`), or an
        entry is not inside the pool's pages; or, of pages to quantise, key bias or theta are not
        those of the pool's model, a number is not finite, or a slot has two canonical positions.
    """
    if form is not None:
        form.check(kv.k, identity.theta)
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
    """Restores mirrors into pages of a pool, the base once for all of them.

    Mirrors may be left out of `mirrors.mirrors`: base pages that no other mirror reads stay out of
    the pool.

    Args:
      mirrors: what `encode` returned.
      kv: the pool's arrays; donated. Of quantised pages, in any precision.
      pool: gives the pages. It has one reference for each table entry afterwards.
      identity: the model that will read the pages.
      implementation: which kernel restores (see `kernels.dispatch`).

    Returns:
      The arrays with the written slots restored, and the lanes: those that were encoded, with other
      page ids, cut off after their written tokens, and with nothing to compute. `LanePlan.base` is
      negative in a patch of a base page that is not in the pool.

    Raises:
      MirrorError: another model computed the mirrors, or the pool's arrays do not have their shape
        or dtype; nothing is held then.
      OutOfPages: the pool has too few pages; nothing is held then.
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
    # Base pages outside the pool get labels that are no page: the mirrors number theirs -2, -3, ...
    ids = np.iinfo(np.int32).min + np.arange(stops[-1], dtype=np.int32)
    pages = ids[wanted] = pool.allocate(int(wanted.sum()))
    base_ids, *own_ids = np.split(ids, stops[:-1])
    labels = np.append(base_ids, np.int32(0))  # -1, a private entry, finds the last
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
            # Without quantisation no key is turned, by whatever frequencies.
            theta = 1.0 if form is None else form.theta
            kv = restore(kv, part, plan, form, theta=theta, implementation=implementation)
    except BaseException:
        pool.release(pages)
        raise
    # One reference for each entry in place of one for each page.
    pool.retain(np.concatenate([pages[:0], *(lane.page for lane in lanes)]))
    pool.release(pages)
    return kv, lanes


def _plans(
    mirrors: MasterMirror,
    tables: Sequence[MirrorTable],
    ids: Int32[np.ndarray, " pages"],
    stops: np.ndarray,
) -> list[RestorePlan]:
    """How each part of the stored pages, as they end at `stops`, goes to the pages of `ids`."""
    size = mirrors.base.k.shape[2]
    if mirrors.form is None:
        # Whole pages, as they are: XLA's CPU code writes them three times as fast.
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
    """The slots of stored pages that entries read, each once and in order, and their positions."""
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
    """The slots of a pool that some entry reads, and their canonical positions.

    Args:
      layout: the round.
      pages: of the pool.
      page_size: of the pool.
      one_position: whether every slot must have one, whichever entries show it.
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

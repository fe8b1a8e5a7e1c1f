"""Master-Mirror storage: the KV of a round at rest, each shared page once.

After the diff-aware storage of TokenDance (arXiv 2604.03143, section 4.3), with a canonical base in
place of a request's cache as the Master. What differs is not searched for: the block tables say
which pages an agent computed itself. Patches overwrite pages of the base and are never added to
them, so decoding is exact in every dtype.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import no_type_check

import jax
import numpy as np
from jaxtyping import Bool

from tokendance_jax.collector.lane import LanePlan
from tokendance_jax.mirror.errors import MirrorError
from tokendance_jax.mirror.layout import Array, MirrorLayout, MirrorTable
from tokendance_jax.mirror.transfer import read_pages, write_pages
from tokendance_jax.paged.kv import PagedKV
from tokendance_jax.paged.page_pool import PagePool


@no_type_check  # JAX also builds pytrees of stand-ins that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mirror:
    """What one agent holds besides the base.

    The arrays of pages are [layers, pages, page_size, kv_heads, head_dim] in the pool's storage
    dtype, keys rotated at their pages' canonical positions.

    Attributes:
      table: what the agent's context is made of, in logical order.
      private_k: keys of the private pages.
      private_v: values of the private pages.
      patch_k: keys of the patch pages.
      patch_v: values of the patch pages.
    """

    table: MirrorTable
    private_k: Array
    private_v: Array
    patch_k: Array
    patch_v: Array


@no_type_check  # JAX also builds pytrees of stand-ins that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MasterMirror:
    """The KV of a round at rest. A pure function of what was written: unused slots are 0.

    Attributes:
      base_k: [layers, base_pages, page_size, kv_heads, head_dim] in the pool's storage dtype; keys,
        rotated at canonical positions.
      base_v: values, of the same shape.
      mirrors: one for each agent.
    """

    base_k: Array
    base_v: Array
    mirrors: tuple[Mirror, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: `MirrorLayout.compression(...).stored_bytes`."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def encode(lanes: Sequence[LanePlan], lengths: Sequence[int], kv: PagedKV) -> MasterMirror:
    """Copies a round's pages out of the pool, each shared page once.

    Args:
      lanes: the round's lanes; `LanePlan.base` says which entries show or replace base pages.
      lengths: tokens of each lane whose K and V are written; the room behind them is cut off.
      kv: the pool, which stays as it is.

    Returns:
      Arrays on the host.

    Raises:
      MirrorError: lanes and lengths do not fit each other (see `MirrorLayout.of_lanes`), or an
        entry is not inside the pool's pages.
    """
    layout = MirrorLayout.of_lanes(lanes, lengths)
    take = partial(read_pages, kv, used=_used_slots(layout, *kv.k.shape[1:3]))
    base_k, base_v = take(layout.base_pages)
    mirrors = []
    for table, private, patch in zip(
        layout.tables, layout.private_pages, layout.patch_pages, strict=True
    ):
        mirrors.append(Mirror(table, *take(private), *take(patch)))
    return MasterMirror(base_k, base_v, tuple(mirrors))


def decode_pages(
    mirrors: MasterMirror, kv: PagedKV, pool: PagePool
) -> tuple[PagedKV, list[LanePlan]]:
    """Restores mirrors into pages of a pool, the base once for all of them.

    Mirrors may be left out of `mirrors.mirrors`: base pages that no other mirror reads stay out of
    the pool.

    Args:
      mirrors: what `encode` returned.
      kv: the pool's arrays; donated.
      pool: gives the pages. It has one reference for each table entry afterwards.

    Returns:
      The arrays with the pages written, and the lanes: those that were encoded, with other page
      ids, cut off after their written tokens, and with nothing to compute. `LanePlan.base` is
      negative in a patch of a base page that is not in the pool.

    Raises:
      MirrorError: the pool's arrays do not have the shape or dtype of the mirrors.
      OutOfPages: the pool has too few pages; nothing is held then.
    """
    _check_pool(mirrors, kv, pool)
    stored = mirrors.base_k.shape[1]
    tables = [jax.tree.map(np.asarray, mirror.table) for mirror in mirrors.mirrors]
    reads = [table.base_reads(stored) for table in tables]
    read = np.unique(np.concatenate([np.zeros(0, np.int32), *reads]))

    contents = [(mirrors.base_k[:, read], mirrors.base_v[:, read])]
    for mirror in mirrors.mirrors:
        contents += [(mirror.private_k, mirror.private_v), (mirror.patch_k, mirror.patch_v)]
    stops = np.cumsum([k.shape[1] for k, _ in contents])
    pages = pool.allocate(int(stops[-1]))
    parts = np.split(pages, stops[:-1])
    try:
        for part, (k, v) in zip(parts, contents, strict=True):
            kv = write_pages(kv, part, np.asarray(k), np.asarray(v))
    except BaseException:
        pool.release(pages)
        raise

    # Base pages outside the pool get labels that are no page: the mirrors number theirs -2, -3, ...
    base_ids = np.iinfo(np.int32).min + np.arange(stored, dtype=np.int32)
    base_ids[read] = parts[0]
    labels = np.append(base_ids, np.int32(0))  # -1, a private entry, finds the last
    lanes = []
    for table, private, patch in zip(tables, parts[1::2], parts[2::2], strict=True):
        lanes.append(
            LanePlan(
                token_ids=table.token_ids,
                computed=np.zeros(0, np.int32),
                page=table.pages(base_ids, private, patch),
                frame=table.frame,
                first=table.first,
                slots=table.slots,
                base=np.where(table.base < -1, table.base + 1, labels[np.maximum(table.base, -1)]),
            )
        )
    # One reference for each entry in place of one for each page.
    pool.retain(np.concatenate([pages[:0], *(lane.page for lane in lanes)]))
    pool.release(pages)
    return kv, lanes


def _used_slots(layout: MirrorLayout, pages: int, page_size: int) -> Bool[np.ndarray, "p w"]:
    """The slots of a pool that some entry reads."""
    edges = np.zeros((pages, page_size + 1), np.int32)
    for index, table in enumerate(layout.tables):
        page, stop = layout.pages(index), table.first + table.slots
        if (page >= pages).any() or (table.first < 0).any() or (stop > page_size).any():
            problem = f"an entry of lane {index} is not inside {pages} pages of {page_size} slots"
            raise MirrorError("lanes", "page", problem, "pass the pool that the lanes belong to")
        np.add.at(edges, (page, table.first), 1)
        np.add.at(edges, (page, stop), -1)
    return np.cumsum(edges, axis=1)[:, :-1] > 0


def _check_pool(mirrors: MasterMirror, kv: PagedKV, pool: PagePool) -> None:
    def kind(x: Array) -> str:
        layers, _, *slot_shape = x.shape
        return f"[{layers}, pages, {', '.join(map(str, slot_shape))}] {x.dtype}"

    if kind(kv.k) != kind(mirrors.base_k):
        remedy = f"pass a pool of {kind(mirrors.base_k)}"
        raise MirrorError("kv", "k", f"is {kind(kv.k)}", remedy)
    if kv.k.shape[1] < pool.total:
        problem = f"has {kv.k.shape[1]} pages, the page pool {pool.total}"
        raise MirrorError("kv", "k", problem, "pass the arrays of the page pool")

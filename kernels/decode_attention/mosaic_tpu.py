"""Decode attention as a Mosaic TPU kernel.

One program loops over the key blocks in use. The blocks that several lanes hold come first, with
one product per KV head for the queries of all lanes; the lanes' own blocks follow. The online
softmax of all lanes stays in VMEM throughout, so a lane's own blocks add to its results over the
shared ones. The pages of the next block are copied while the current block is computed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tokendance_jax.kernels import flash, flash_tpu
from tokendance_jax.kernels.flash_tpu import PLACES, TILE, product
from tokendance_jax.kernels.lanes import Array, GroupTables, LaneTables, block_pages
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import Rope

Ref = Any


def decode_attention_mosaic_tpu(
    q: jax.Array,
    kv: PagedKV,
    layer: int | jax.Array,
    position: jax.Array,
    tables: LaneTables,
    groups: GroupTables,
    *,
    rope: Rope,
    interpret: Any = False,
) -> jax.Array:
    """Implements `api.decode_attention`, with the same arguments.

    Expects pools in row-major layout. XLA lays out large pools with heads narrower than 128
    differently; pass such pools in row-major layout, or XLA copies them.

    Args:
      q: f32 [lanes, heads, head_dim].
      kv: the pool, bfloat16 or float32.
      layer: index of the layer.
      position: i32 [lanes].
      tables: block tables of all lanes.
      groups: key blocks that several lanes hold.
      rope: the rotary embedding.
      interpret: whether to interpret the kernel on a CPU, or parameters of the simulator.
    """
    lanes, heads, head_dim = q.shape
    page_size, kv_heads = kv.k.shape[2], kv.k.shape[3]
    dtype, group = kv.k.dtype, heads // kv_heads
    flash_tpu.check_pool(kv.k)
    columns, reading = _columns(
        layer, position, tables, groups, page_size, rope=rope, head_dim=head_dim
    )

    rows = -(-group // TILE) * TILE
    queries = (q * head_dim**-0.5).reshape(lanes, kv_heads, group, head_dim).transpose(1, 0, 2, 3)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, rows - group), (0, 0)))
    entries = block_pages(page_size)
    pages = pltpu.VMEM((PLACES, entries, page_size, kv_heads, head_dim), dtype)
    scratch = {
        "k": pages,
        "v": pages,
        "reading": pltpu.VMEM((PLACES, lanes, *reading.shape[1:]), jnp.float32),
        "maximum": pltpu.VMEM((*queries.shape[:3], 1), jnp.float32),
        "total": pltpu.VMEM((*queries.shape[:3], 1), jnp.float32),
        "arrived": pltpu.SemaphoreType.DMA((PLACES,)),
    }
    width = max(head_dim, 128)
    vmem = 4 * 4 * kv_heads * lanes * rows * width  # queries, values, maxima and sums
    vmem += 2 * PLACES * entries * page_size * kv_heads * width * dtype.itemsize
    vmem += PLACES * 4 * lanes * reading.shape[2]

    def kernel(*refs: Ref) -> None:
        _attend_blocks(*refs, simulated=not isinstance(interpret, bool))

    smem, there = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)
    whole = pl.BlockSpec(memory_space=pltpu.VMEM)
    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(queries.shape, jnp.float32),
        in_specs=[
            jax.tree.map(lambda _: smem, columns),
            there,
            whole,
            jax.tree.map(lambda _: there, kv),
        ],
        out_specs=whole,
        scratch_shapes=[scratch],
        compiler_params=flash_tpu.compiler_params(columns, vmem),
        interpret=interpret,
        name="decode_attention",
    )(columns, reading, queries, kv)
    return out[:, :, :group].transpose(1, 0, 2, 3).reshape(q.shape)


def _columns(
    layer: int | jax.Array,
    position: jax.Array,
    tables: LaneTables,
    groups: GroupTables,
    page_size: int,
    *,
    rope: Rope,
    head_dim: int,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Prepares the tables. All but the layer's index is the same computation in all layers.

    The blocks of groups are numbered first, then those of each lane's own table.

    Returns:
      Numbers for SMEM, and how lanes read blocks. The numbers are the layer, and how many shared
      and own blocks are in use; the own blocks in use, numbered from the first own block; and for
      each entry its page, and the first and the end of the slots that any lane sees. How a lane
      reads a block is f32 [blocks * lanes + lanes * lane_blocks, 1, 2 * head_dim + slots]: cosines,
      signed sines, and whether the lane sees each slot.
    """
    entries = block_pages(page_size)
    lanes, blocks = tables.page.shape[0], tables.page.shape[1] // entries
    shared = groups.page.shape[0]
    position = jnp.asarray(position)

    # What each lane sees of each block.
    slot_position = tables.slot_positions(page_size)
    own_seen = (slot_position <= position[:, None, None]).reshape(lanes * blocks, -1)
    held = jnp.asarray(groups.member) & (position >= 0)[None, :, None]
    shared_seen = held[:, :, :, None] & groups.valid(page_size)[:, None]
    seen = jnp.concatenate([shared_seen.reshape(shared * lanes, -1), own_seen])

    own_frame = jnp.asarray(tables.frame).reshape(lanes * blocks, entries)[:, 0]
    frame = jnp.concatenate([jnp.asarray(groups.frame).reshape(-1), own_frame])
    cos, sin = rope.rotation(-frame, head_dim)
    reading = jnp.concatenate([cos, cos, -sin, sin, seen.astype(jnp.float32)], axis=1)[:, None]

    ahead = position[:, None] - jnp.asarray(tables.start) + 1
    slots = jnp.clip(ahead, jnp.zeros_like(ahead), jnp.asarray(tables.slots))

    def both(of_groups: Array, of_lanes: Array) -> jax.Array:
        return jnp.concatenate([jnp.asarray(x).reshape(-1) for x in (of_groups, of_lanes)])

    first = both(groups.first, tables.first)
    used = jnp.any(own_seen, axis=1)
    count = jnp.stack([jnp.asarray(x, jnp.int32) for x in (layer, groups.count, jnp.sum(used))])
    columns = {
        "count": count,
        "own": jnp.flatnonzero(used, size=lanes * blocks).astype(jnp.int32),
        "page": both(groups.page, tables.page),
        "first": first,
        "stop": first + both(groups.slots, slots),
    }
    return columns, reading


def _attend_blocks(
    columns: dict[str, Ref],
    reading: Ref,
    q: Ref,
    kv: PagedKV,
    out: Ref,
    vmem: dict[str, Ref],
    *,
    simulated: bool,
) -> None:
    """Attends all lanes to all blocks in use. Until the end, `out` has the weighted sums of values.

    All arrays are references, including those of the pool.
    """
    layer, shared = columns["count"][0], columns["count"][1]
    items = shared + columns["count"][2]
    lanes, entries = q.shape[1], vmem["k"].shape[1]
    lane_blocks = columns["own"].shape[0] // lanes
    groups = columns["page"].shape[0] // entries - lanes * lane_blocks

    def own(item: jax.Array) -> jax.Array:
        return columns["own"][jnp.maximum(item - shared, 0)]

    def fetch(item: jax.Array, act: Callable[[Any], None]) -> None:
        """Starts or awaits the copies of a block into VMEM."""
        place = jax.lax.rem(item, PLACES)
        arrived = vmem["arrived"].at[place]
        is_shared = item < shared

        @pl.when(is_shared)
        def _() -> None:
            there = reading.at[pl.ds(item * lanes, lanes)]
            act(pltpu.make_async_copy(there, vmem["reading"].at[place], arrived))

        @pl.when(jnp.logical_not(is_shared))
        def _() -> None:
            there = reading.at[pl.ds(groups * lanes + own(item), 1)]
            act(pltpu.make_async_copy(there, vmem["reading"].at[place, pl.ds(0, 1)], arrived))

        start = jnp.where(is_shared, item, groups + own(item)) * entries

        @pl.loop(0, entries)
        def _(entry: jax.Array) -> None:
            number = start + entry

            @pl.when(columns["stop"][number] > columns["first"][number])
            def _() -> None:
                for name, pool in (("k", kv.k), ("v", kv.v)):
                    page = pool.at[layer, columns["page"][number]]
                    act(pltpu.make_async_copy(page, vmem[name].at[place, entry], arrived))

    def clean(item: jax.Array) -> None:
        """Clears the values of slots that no lane sees."""
        place = jax.lax.rem(item, PLACES)
        start = jnp.where(item < shared, item, groups + own(item)) * entries

        @pl.loop(0, entries)
        def _(entry: jax.Array) -> None:
            seen = columns["first"][start + entry], columns["stop"][start + entry]
            flash_tpu.clear_unseen(vmem["v"].at[place, entry], *seen)

    vmem["maximum"][...] = jnp.full(vmem["maximum"].shape, flash_tpu.LOWEST, jnp.float32)
    vmem["total"][...] = jnp.zeros(vmem["total"].shape, jnp.float32)
    out[...] = jnp.zeros(out.shape, jnp.float32)
    # Empty entries are not fetched: their places must hold finite values from the start.
    vmem["v"][...] = jnp.zeros(vmem["v"].shape, vmem["v"].dtype)

    @pl.when(items > 0)
    def _() -> None:
        fetch(jnp.int32(0), lambda copy: copy.start())

    @pl.loop(0, items)
    def _(item: jax.Array) -> None:
        @pl.when(item + 1 < items)
        def _() -> None:
            fetch(item + 1, lambda copy: copy.start())

        fetch(item, lambda copy: copy.wait())
        clean(item)

        @pl.when(item < shared)
        def _() -> None:
            _attend(q, item, pl.ds(0, lanes), out, vmem, simulated=simulated)

        @pl.when(item >= shared)
        def _() -> None:
            lane = jax.lax.div(own(item), lane_blocks)
            _attend(q, item, pl.ds(lane, 1), out, vmem, simulated=simulated)

    total = vmem["total"][...]
    out[...] = out[...] / jnp.where(total > 0, total, jnp.ones_like(total))


def _attend(
    q: Ref, item: jax.Array, lanes: Any, out: Ref, vmem: dict[str, Ref], *, simulated: bool
) -> None:
    """Performs one step of the online softmax of some lanes: all of them, or one."""
    place, (kv_heads, *_, head_dim) = jax.lax.rem(item, PLACES), q.shape
    reading = vmem["reading"][place, pl.ds(0, lanes.size)]
    cos, sin = reading[..., :head_dim], reading[..., head_dim : 2 * head_dim]
    seen = reading[..., 2 * head_dim :]
    keys, values = (
        flash_tpu.heads_of(vmem[name].at[place], simulated=simulated) for name in ("k", "v")
    )
    for head in range(kv_heads):
        x = q[head, lanes]
        scores = product(x * cos + flash_tpu.swapped(x) * sin, keys[head], 1)
        scores = jnp.where(jnp.broadcast_to(seen, scores.shape) > 0, scores, flash.MASKED)
        before = vmem["maximum"][head, lanes]
        maximum = jnp.maximum(before, scores.max(axis=2, keepdims=True))
        weights, shrink = jnp.exp(scores - maximum), jnp.exp(before - maximum)
        total = weights.sum(axis=2, keepdims=True)
        vmem["maximum"][head, lanes] = maximum
        vmem["total"][head, lanes] = vmem["total"][head, lanes] * shrink + total
        out[head, lanes] = out[head, lanes] * shrink + product(weights, values[head], 0)

"""The fused sparse restore as a Mosaic TPU kernel.

One program iterates over the source pages in use, for some layers at a time. A copy brings a page
of these layers into VMEM once, while the pieces of the previous page are restored. The keys of each
piece are rotated into one of two stages, and copies write keys and values to the pool while the
next piece is rotated. Values in the pool's precision are copied from the page straight to the pool.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tokendance_jax.kernels import flash_tpu, storage
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import Rope, angles
from tokendance_jax.kernels.sparse_restore.plan import RestorePlan, Source

# Bytes of a page's keys in the layers that are restored at a time. VMEM holds at most ten times as
# much; a program has 16 MiB of it.
CHUNK_BYTES = 1 << 19
# Source pages in VMEM: one is being copied in, one is being restored, and pieces of one are still
# being copied to the pool.
PAGES = 3
# Pieces with rotated keys in VMEM: those being copied to the pool, and the one being rotated.
STAGES = 2

Ref = Any


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Sizes of pages and chunks. A chunk is a page in some of the layers.

    Attributes:
      chunks: chunks of a page.
      layers: layers of a chunk.
      page_size: slots of a page.
      kv_heads: heads of a slot.
      head_dim: width of a head.
    """

    chunks: int
    layers: int
    page_size: int
    kv_heads: int
    head_dim: int

    @property
    def chunk(self) -> tuple[int, ...]:
        """Shape of a chunk."""
        return self.layers, self.page_size, self.kv_heads, self.head_dim


def sparse_restore_mosaic_tpu(
    kv: PagedKV,
    source: Source | None,
    plan: RestorePlan,
    *,
    rope: Rope,
    interpret: Any = False,
) -> PagedKV:
    """Implements `api.sparse_restore`, with the same arguments.

    Expects pools and sources in row-major layout. XLA lays out large pools with heads narrower than
    128 differently; pass such pools with a row-major layout, or XLA copies them.

    Args:
      kv: the pool, bfloat16 or float32.
      source: the source pages; None: pages of the pool.
      plan: the pieces, and the slots that each is copied to.
      rope: the rotary embedding.
      interpret: whether to interpret the kernel on a CPU, or parameters of the simulator.
    """
    storage.check_numbers(kv.k)
    layers, _, page_size, kv_heads, head_dim = kv.k.shape
    dtype = kv.k.dtype
    page_bytes = page_size * kv_heads * max(head_dim, 128) * dtype.itemsize
    fitting = (n for n in range(1, layers + 1) if layers % n == 0 and n * page_bytes <= CHUNK_BYTES)
    chunk_layers = max(fitting, default=1)
    sizes = _Sizes(layers // chunk_layers, chunk_layers, page_size, kv_heads, head_dim)

    inputs = {"tables": jnp.asarray(np.tile(rope.turn_tables(head_dim)[:, None], 2))}
    scratch = {
        "k": pltpu.VMEM((PAGES, *sizes.chunk), dtype if source is None else source.k.dtype),
        "v": pltpu.VMEM((PAGES, *sizes.chunk), dtype if source is None else source.v.dtype),
        "k_stage": pltpu.VMEM((STAGES, *sizes.chunk), dtype),
        "arrived": pltpu.SemaphoreType.DMA((PAGES,)),
        "sent": pltpu.SemaphoreType.DMA((STAGES,)),
    }
    fetched: dict[str, jax.Array] = {}
    if source is not None:
        fetched |= {"k": jnp.asarray(source.k), "v": jnp.asarray(source.v)}
    if source is not None and source.k_scale is not None:
        for name, scale in (("k_scale", source.k_scale), ("v_scale", source.v_scale)):
            # Layers are the columns because the heads of a slot are the rows of a tile.
            fetched[name] = jnp.asarray(scale).transpose(1, 2, 3, 0)
            scratch[name] = pltpu.VMEM((PAGES, page_size, kv_heads, layers), jnp.float32)
        scratch["v_plain"] = pltpu.VMEM((PAGES, *sizes.chunk), dtype)
    if source is not None and (source.k_scale is not None or source.key_bias is not None):
        bias = source.key_bias
        bias = jnp.zeros((layers, kv_heads, head_dim)) if bias is None else jnp.asarray(bias)
        inputs["bias"] = bias
        scratch["k_plain"] = pltpu.VMEM(sizes.chunk, jnp.float32)

    begin = jnp.asarray(plan.begin)
    used = jnp.flatnonzero(begin[1:] > begin[:-1], size=plan.page.shape[0], fill_value=0)
    columns = {
        "pages": jnp.sum((begin[1:] > begin[:-1]).astype(jnp.int32))[None],
        "pieces": begin[-1:],
        "page": jnp.asarray(plan.page)[used],
        "start": begin[used],
        "stop": begin[used + 1],
        "first": plan.first,
        "slots": plan.slots,
        "target": plan.target,
        "turn": plan.turn,
    }
    columns = jax.tree.map(jnp.asarray, columns)
    if flash_tpu.table_bytes(columns) > flash_tpu.TABLE_BYTES:
        raise NotImplementedError(f"a plan of {plan.first.shape[0]} pieces is too large for SMEM")
    rotated = source is None or source.rotated

    def kernel(
        columns: dict[str, Ref],
        inputs: dict[str, Ref],
        fetched: dict[str, Ref],
        _: PagedKV,
        kv: PagedKV,
        scratch: dict[str, Ref],
    ) -> None:
        fetched = {"k": kv.k, "v": kv.v} | fetched
        _restore(sizes, columns, inputs, fetched, kv, scratch, rotated=rotated)

    whole, there = pl.BlockSpec(memory_space=pltpu.VMEM), pl.BlockSpec(memory_space=pl.ANY)
    before = len(columns) + len(inputs) + len(fetched)
    return pl.pallas_call(
        kernel,
        out_shape=jax.tree.map(lambda pool: jax.ShapeDtypeStruct(pool.shape, pool.dtype), kv),
        in_specs=[
            jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.SMEM), columns),
            jax.tree.map(lambda _: whole, inputs),
            jax.tree.map(lambda _: there, fetched),
            jax.tree.map(lambda _: there, kv),
        ],
        out_specs=jax.tree.map(lambda _: there, kv),
        scratch_shapes=[scratch],
        input_output_aliases={before: 0, before + 1: 1},
        interpret=interpret,
        name="sparse_restore",
    )(columns, inputs, fetched, kv)


def _restore(
    sizes: _Sizes,
    columns: dict[str, Ref],
    inputs: dict[str, Ref],
    fetched: dict[str, Ref],
    kv: PagedKV,
    vmem: dict[str, Ref],
    *,
    rotated: bool,
) -> None:
    """Restores all pieces of all pages in use. An item is one chunk of one page."""
    pages, pieces = columns["pages"][0], columns["pieces"][0]
    items = pages * sizes.chunks
    sent_v = vmem.get("v_plain", vmem["v"])

    def fetch(item: jax.Array, act: Callable[[Any], None]) -> None:
        """Starts or awaits the copies of an item into VMEM."""
        chunk, page = jax.lax.div(item, pages), columns["page"][jax.lax.rem(item, pages)]
        place = jax.lax.rem(item, PAGES)
        for name, ref in fetched.items():
            layers = pl.ds(chunk * sizes.layers, sizes.layers)
            at = ref.at[page] if name.endswith("scale") else ref.at[layers, page]
            act(pltpu.make_async_copy(at, vmem[name].at[place], vmem["arrived"].at[place]))

    def send(step: jax.Array, v: Ref, act: Callable[[Any], None]) -> None:
        """Starts or awaits the copies of a piece to the pool, each of a power of two of slots."""
        chunk, piece = jax.lax.div(step, pieces), jax.lax.rem(step, pieces)
        stage = jax.lax.rem(step, STAGES)
        first, slots, target = (columns[name][piece] for name in ("first", "slots", "target"))
        page = jax.lax.div(target, sizes.page_size)
        offset = jax.lax.rem(target, sizes.page_size)
        for bit in range(sizes.page_size.bit_length()):
            size = 1 << bit

            @pl.when(slots & size != 0)
            def _(size: int = size) -> None:
                done = slots & (size - 1)
                here = slice(None), pl.ds(first + done, size)
                there = pl.ds(chunk * sizes.layers, sizes.layers), page, pl.ds(offset + done, size)
                sent = vmem["sent"].at[stage]
                k = vmem["k_stage"].at[stage]
                act(pltpu.make_async_copy(k.at[here], kv.k.at[there], sent))
                act(pltpu.make_async_copy(v.at[here], kv.v.at[there], sent))

    @pl.when(items > 0)
    def _() -> None:
        fetch(jnp.int32(0), lambda copy: copy.start())

    @pl.loop(0, items)
    def _(item: jax.Array) -> None:
        # All pieces but the last are in the pool, so the place of the item before the previous one
        # is free.
        @pl.when(item + 1 < items)
        def _() -> None:
            fetch(item + 1, lambda copy: copy.start())

        fetch(item, lambda copy: copy.wait())
        place, index = jax.lax.rem(item, PAGES), jax.lax.rem(item, pages)
        chunk = jax.lax.div(item, pages)
        if "k_plain" in vmem:
            _make_plain(sizes, inputs["bias"], vmem, place, chunk)
        k = vmem["k_plain"] if "k_plain" in vmem else vmem["k"].at[place]
        v = sent_v.at[place]

        @pl.loop(columns["start"][index], columns["stop"][index])
        def _(piece: jax.Array) -> None:
            step = chunk * pieces + piece
            stage = vmem["k_stage"].at[jax.lax.rem(step, STAGES)]
            _rotate(sizes, k, stage, inputs["tables"], columns["turn"][piece], rotated=rotated)
            send(step, v, lambda copy: copy.start())

            @pl.when(step > 0)
            def _() -> None:
                send(step - 1, v, lambda copy: copy.wait())

    @pl.when(items > 0)
    def _() -> None:
        send(sizes.chunks * pieces - 1, sent_v.at[0], lambda copy: copy.wait())


def _make_plain(
    sizes: _Sizes, bias: Ref, vmem: dict[str, Ref], place: jax.Array, chunk: jax.Array
) -> None:
    """Converts a chunk at rest: keys to float32, with their bias, values to the pool's dtype."""

    @pl.loop(0, sizes.layers)
    def _(index: jax.Array) -> None:
        layer = chunk * sizes.layers + index

        def plain(name: str) -> jax.Array:
            x = vmem[name][place, index].astype(jnp.float32)
            if name + "_scale" in vmem:
                scale = vmem[name + "_scale"][place]
                column = jax.lax.broadcasted_iota(jnp.int32, scale.shape, 2) == layer
                scale = jnp.where(column, scale, jnp.zeros_like(scale))
                x = x * scale.sum(axis=2, keepdims=True)
            return x

        vmem["k_plain"][index] = plain("k") + bias[layer][None]
        if "v_plain" in vmem:
            vmem["v_plain"][place, index] = plain("v").astype(vmem["v_plain"].dtype)


def _rotate(
    sizes: _Sizes, k: Ref, stage: Ref, tables: Ref, turn: jax.Array, *, rotated: bool
) -> None:
    """Rotates a page's keys [layers, page_size, kv_heads, head_dim] and writes them to a stage."""
    slots = 1 if rotated else sizes.page_size
    shape = slots, 1, sizes.head_dim
    # Keys that are not rotated yet have an angle of their own in each slot.
    position = turn + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    angle = angles(position, *(tables[pl.ds(index, 1)] for index in range(3)))
    half = sizes.head_dim // 2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    sin = jnp.where(jax.lax.broadcasted_iota(jnp.int32, shape, 2) < half, -sin, sin)

    @pl.loop(0, sizes.layers)
    def _(layer: jax.Array) -> None:
        x = k[layer].astype(jnp.float32)
        stage[layer] = (x * cos + flash_tpu.swapped(x) * sin).astype(stage.dtype)

"""The page diff as a Mosaic TPU kernel.

A grid step compares a base page with one sibling, in some of the layers. Comparisons are ordered by
base page, so a base page stays in VMEM for all its siblings while copies bring in the next sibling.
The scores are written as one row per layer and one column per score.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tokendance_jax.kernels import flash_tpu, storage
from tokendance_jax.kernels.page_diff.plan import SCORES, DiffPlan
from tokendance_jax.kernels.page_diff.tuning import LAYERS_BYTES
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import Rope, angles

# Lanes of a vector register.
COLUMNS = 128

Ref = Any


def page_diff_mosaic_tpu(
    kv: PagedKV,
    siblings: PagedKV | None,
    plan: DiffPlan,
    *,
    rope: Rope,
    interpret: Any = False,
) -> jax.Array:
    """Computes the scores of `reference.page_diff_reference`. Arguments as for `api.page_diff`.

    Expects pools in row-major layout, as `sparse_restore` does. XLA copies a pool that has another
    layout because its heads are narrower than 128.

    Args:
      kv: the pool, bfloat16 or float32.
      siblings: pages outside the pool; None: the pool.
      plan: the comparisons.
      rope: the rotary embedding.
      interpret: whether to interpret the kernel on a CPU, or parameters of the simulator.
    """
    storage.check_numbers(kv.k)
    layers, _, page_size, kv_heads, head_dim = kv.k.shape
    dtype = kv.k.dtype
    own = jax.tree.map(jnp.asarray, kv if siblings is None else siblings)
    page_bytes = page_size * kv_heads * max(head_dim, 128) * dtype.itemsize
    most = min(layers, max(1, LAYERS_BYTES // page_bytes))
    of_chunk = next(n for n in range(most, 0, -1) if layers % n == 0)
    chunks = layers // of_chunk

    comparisons = plan.sibling.shape[0]
    begin = jnp.asarray(plan.begin)
    count = begin[-1]
    # Padding repeats the last comparison, so no pages are copied for it.
    number = jnp.minimum(jnp.arange(comparisons, dtype=jnp.int32), jnp.maximum(count - 1, 0))
    of_page = jnp.searchsorted(begin, number, side="right", method="scan_unrolled")
    columns = {
        "count": count[None],
        "base": jnp.take(jnp.asarray(plan.page), of_page - 1, mode="clip"),
        "sibling": jnp.asarray(plan.sibling)[number],
        "frame": jnp.asarray(plan.frame),
        "first": jnp.asarray(plan.first),
        "slots": jnp.asarray(plan.slots),
    }
    if flash_tpu.table_bytes(columns) > flash_tpu.TABLE_BYTES:
        raise NotImplementedError(f"a plan of {comparisons} comparisons is too large for SMEM")
    tables = jnp.asarray(np.tile(rope.turn_tables(head_dim)[:, None], 2))

    def pages(column: str) -> pl.BlockSpec:
        def index(chunk: Any, comparison: Any, columns: dict[str, Ref]) -> tuple[Any, ...]:
            return chunk, columns[column][comparison], 0, 0, 0

        return pl.BlockSpec((of_chunk, 1, page_size, kv_heads, head_dim), index)

    def scores(chunk: Any, comparison: Any, _: dict[str, Ref]) -> tuple[Any, ...]:
        return comparison, chunk, 0, 0

    out = pl.pallas_call(
        _compare,
        out_shape=jax.ShapeDtypeStruct((comparisons, chunks, of_chunk, COLUMNS), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(chunks, comparisons),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.VMEM),
                pages("base"),
                pages("base"),
                pages("sibling"),
                pages("sibling"),
            ],
            out_specs=pl.BlockSpec((1, 1, of_chunk, COLUMNS), scores),
            scratch_shapes=[pltpu.VMEM((SCORES, of_chunk, head_dim), jnp.float32)],
        ),
        interpret=interpret,
        name="page_diff",
    )(columns, tables, kv.k, kv.v, own.k, own.v)
    return out.reshape(comparisons, layers, COLUMNS)[:, :, :SCORES].T


def _compare(
    columns: dict[str, Ref],
    tables: Ref,
    k: Ref,
    v: Ref,
    own_k: Ref,
    own_v: Ref,
    out: Ref,
    rows: Ref,
) -> None:
    """Compares a base page with one sibling, in some of the layers.

    Args:
      columns: the plan.
      tables: `rope.turn_tables`, for both halves of a head.
      k: base keys [layers, 1, page_size, kv_heads, head_dim].
      v: base values.
      own_k: the sibling's keys.
      own_v: the sibling's values.
      out: f32 [1, 1, layers, COLUMNS]; one column per score.
      rows: f32 [SCORES, layers, head_dim]; scores before the reduction over a head's numbers.
    """
    comparison = pl.program_id(1)
    layers, head_dim = k.shape[0], k.shape[4]
    half = head_dim // 2
    angle = angles(columns["frame"][comparison], *(tables[pl.ds(index, 1)] for index in range(3)))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    lane = jax.lax.broadcasted_iota(jnp.int32, sin.shape, 2)
    sin = jnp.where(lane < half, -sin, sin)
    inside = jax.lax.broadcasted_iota(jnp.int32, k.shape[2:], 0) - columns["first"][comparison]
    used = (inside >= 0) & (inside < columns["slots"][comparison])
    # Padding compares no slots.
    used = used & (comparison < columns["count"][0])

    @pl.loop(0, layers)
    def _(layer: jax.Array) -> None:
        for kind, (base, own) in enumerate(((k, own_k), (v, own_v))):
            shown = base[layer, 0].astype(jnp.float32)
            if base is k:
                shown = shown * cos + flash_tpu.swapped(shown) * sin
            gap = jnp.where(used, jnp.abs(own[layer, 0].astype(jnp.float32) - shown), 0.0)
            of_layer = pl.ds(layer, 1)
            rows[2 * kind, of_layer] = gap.max(axis=(0, 1))[None]
            rows[2 * kind + 1, of_layer] = (gap * gap).sum(axis=(0, 1))[None]

    # The reduction over a head's numbers comes last, for all layers at once.
    column = jax.lax.broadcasted_iota(jnp.int32, (layers, COLUMNS), 1)
    tile = jnp.zeros((layers, COLUMNS), jnp.float32)
    for number in range(SCORES):
        reduce = jnp.sum if number % 2 else jnp.max
        tile = jnp.where(column == number, reduce(rows[number], axis=1, keepdims=True), tile)
    out[0, 0] = tile

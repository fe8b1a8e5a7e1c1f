"""Attention of a round's rows through their lanes' block tables."""

from typing import Literal, Protocol, overload

import jax

from tokendance_jax.kernels import dispatch
from tokendance_jax.kernels.lanes import LaneTables, RowTiles, SharedRows
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import Rope
from tokendance_jax.kernels.round_attention.mosaic_gpu import round_attention_mosaic_gpu
from tokendance_jax.kernels.round_attention.mosaic_tpu import round_attention_mosaic_tpu
from tokendance_jax.kernels.round_attention.xla import round_attention_xla


class RoundAttention(Protocol):
    """The signature of `round_attention`'s implementations."""

    def __call__(
        self,
        q: jax.Array,
        kv: PagedKV,
        layer: int | jax.Array,
        position: jax.Array,
        tables: LaneTables,
        tiles: RowTiles,
        *,
        rope: Rope,
        shared: SharedRows | None = None,
        with_lse: bool = False,
    ) -> jax.Array | tuple[jax.Array, jax.Array]: ...


OP = dispatch.Op[RoundAttention](
    "round_attention",
    xla=round_attention_xla,
    mosaic_gpu=round_attention_mosaic_gpu,
    mosaic_tpu=round_attention_mosaic_tpu,
)


@overload
def round_attention(
    q: jax.Array,
    kv: PagedKV,
    layer: int | jax.Array,
    position: jax.Array,
    tables: LaneTables,
    tiles: RowTiles,
    *,
    rope: Rope,
    shared: SharedRows | None = None,
    with_lse: Literal[False] = False,
    implementation: str | None = None,
) -> jax.Array: ...


@overload
def round_attention(
    q: jax.Array,
    kv: PagedKV,
    layer: int | jax.Array,
    position: jax.Array,
    tables: LaneTables,
    tiles: RowTiles,
    *,
    rope: Rope,
    shared: SharedRows | None = None,
    with_lse: Literal[True],
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]: ...


def round_attention(
    q: jax.Array,
    kv: PagedKV,
    layer: int | jax.Array,
    position: jax.Array,
    tables: LaneTables,
    tiles: RowTiles,
    *,
    rope: Rope,
    shared: SharedRows | None = None,
    with_lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attends rows to the pages of their lanes; a row sees logical positions up to its own.

    Keys stay rotated at their canonical positions. Queries are rotated back by the frame of the
    page that they attend to (rotary attention depends on position differences alone).

    Args:
      q: f32 [rows, heads, head_dim], rotated at logical positions, not scaled.
      kv: the pool; this round's rows are already written.
      layer: index of the layer.
      position: i32 [rows]; logical positions.
      tables: block tables of all lanes.
      tiles: the rows, grouped by lane.
      rope: the rotary embedding.
      shared: the packed rows, and what they share. If given, its tables and tiles replace `tables`
        and `tiles`.
      with_lse: whether to also return log-sum-exps.
      implementation: see `dispatch.Op.run`.

    Returns:
      f32 [rows, heads, head_dim]; zero in rows that are in no tile. With `with_lse`, also the
      log-sum-exp of each query's scores, f32 [rows, heads]; `flash.MASKED` in rows that are in no
      tile.

    Raises:
      NotImplementedError: the named implementation does not support these shapes.
    """
    return OP.run(
        implementation,
        lambda run: run(
            q,
            kv,
            layer,
            position,
            tables,
            tiles,
            rope=rope,
            shared=shared,
            with_lse=with_lse,
        ),
    )

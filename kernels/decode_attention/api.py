"""Attention of one new token per lane."""

from typing import Protocol

import jax

from tokendance_jax.kernels import dispatch
from tokendance_jax.kernels.decode_attention.mosaic_gpu import decode_attention_mosaic_gpu
from tokendance_jax.kernels.decode_attention.mosaic_tpu import decode_attention_mosaic_tpu
from tokendance_jax.kernels.decode_attention.xla import decode_attention_xla
from tokendance_jax.kernels.lanes import GroupTables, LaneTables
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import Rope


class DecodeAttention(Protocol):
    """The signature of `decode_attention`'s implementations."""

    def __call__(
        self,
        q: jax.Array,
        kv: PagedKV,
        layer: int | jax.Array,
        position: jax.Array,
        tables: LaneTables,
        groups: GroupTables,
        *,
        rope: Rope,
    ) -> jax.Array: ...


OP = dispatch.Op[DecodeAttention](
    "decode_attention",
    xla=decode_attention_xla,
    mosaic_gpu=decode_attention_mosaic_gpu,
    mosaic_tpu=decode_attention_mosaic_tpu,
)


def decode_attention(
    q: jax.Array,
    kv: PagedKV,
    layer: int | jax.Array,
    position: jax.Array,
    tables: LaneTables,
    groups: GroupTables,
    *,
    rope: Rope,
    implementation: str | None = None,
) -> jax.Array:
    """Attends one row per lane to the lane's pages, up to the row's own logical position.

    Key blocks that several lanes hold are read once for all of them.

    Args:
      q: f32 [lanes, heads, head_dim], rotated at logical positions, not scaled.
      kv: the pool; the new rows are already written.
      layer: index of the layer.
      position: i32 [lanes]; logical positions; -1 for a lane that attends to nothing.
      tables: block tables of all lanes, without the entries that are in the groups.
      groups: key blocks that several lanes hold. A lane's row must come after all slots that the
        lane holds there, unless its position is -1.
      rope: the rotary embedding.
      implementation: see `dispatch.Op.run`.

    Returns:
      f32 [lanes, heads, head_dim]; zero where a lane attends to nothing.

    Raises:
      NotImplementedError: the named implementation does not support these shapes.
    """
    return OP.run(
        implementation, lambda run: run(q, kv, layer, position, tables, groups, rope=rope)
    )

"""The paged KV state: one pool of pages for the keys and values of all layers."""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Int32, Shaped

from tokendance_jax.kernels import storage
from tokendance_jax.kernels.kv_write import kv_write


@no_type_check  # JAX also builds pytrees of stand-ins that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKV:
    """Keys and values in pages, passed into a jitted program and returned by it, never mutated.

    A program that takes a `PagedKV` takes it donated: rebind the name on the same line. Page 0 is
    never read. The arrays have a storage dtype: on CPU, bfloat16 numbers are held as their bits
    (see `kernels.storage`).

    Attributes:
      k: keys, rotated at their pages' canonical positions.
      v: values.
    """

    k: Shaped[jax.Array | jax.ShapeDtypeStruct, "layers pages page_size kv_heads head_dim"]
    v: Shaped[jax.Array | jax.ShapeDtypeStruct, "layers pages page_size kv_heads head_dim"]

    @classmethod
    def abstract(
        cls,
        *,
        layers: int,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: DTypeLike,
        platform: str,
    ) -> "PagedKV":
        """Shapes and dtypes alone: for memory budgets and for compiling ahead of time."""
        shape = (layers, pages, page_size, kv_heads, head_dim)
        array = jax.ShapeDtypeStruct(shape, storage.storage_dtype(jnp.dtype(dtype), platform))
        return cls(k=array, v=array)

    def zeros(self) -> "PagedKV":
        """A new pool of this one's shapes, filled with zeros."""
        return jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), self)

    @property
    def pages(self) -> int:
        """Number of pages, page 0 included."""
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        """Token slots in a page."""
        return self.k.shape[2]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: K and V of all layers."""
        layers, _, *page = self.k.shape
        return 2 * layers * int(self.k.dtype.itemsize) * page[0] * page[1] * page[2]

    def write(
        self,
        layer: int,
        slot: Int32[jax.Array, " rows"],
        k: Float[jax.Array, "rows kv_heads head_dim"],
        v: Float[jax.Array, "rows kv_heads head_dim"],
    ) -> "PagedKV":
        """Writes one layer's rows; slots past the pool are dropped."""
        return dataclasses.replace(
            self, k=kv_write(self.k, layer, slot, k), v=kv_write(self.v, layer, slot, v)
        )

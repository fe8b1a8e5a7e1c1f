"""The paged KV state: one pool of pages for the keys and values of all layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from tokendance_jax.kernels.paged_kv import PagedKV as PagedKV


@dataclasses.dataclass(frozen=True, slots=True)
class KVSpec:
    """The shape and storage of a page pool, without the pool.

    Attributes:
      layers: decoder layers.
      pages: number of pages, page 0 included.
      page_size: token slots in a page.
      kv_heads: key and value heads.
      head_dim: width of a head.
      storage: dtype of the arrays (see `kernels.storage`).
    """

    layers: int
    pages: int
    page_size: int
    kv_heads: int
    head_dim: int
    storage: np.dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: K and V of all layers."""
        values = self.layers * self.page_size * self.kv_heads * self.head_dim
        return 2 * values * self.storage.itemsize

    def page_room(self, platform: str) -> int:
        """Returns the bytes that a page occupies on a platform.

        On a TPU, heads are padded to a multiple of 128 numbers.
        """
        width = -(-self.head_dim // 128) * 128 if platform == "tpu" else self.head_dim
        return self.page_bytes // self.head_dim * width

    def zeros(self) -> PagedKV:
        """Returns a new pool on the default device, filled with zeros."""
        return jax.jit(self._zeros, out_shardings=pool_format())()

    def abstract(self) -> PagedKV:
        """Returns a pool of shapes alone, to compile for."""
        return jax.eval_shape(self._zeros)

    def _zeros(self) -> PagedKV:
        shape = (self.layers, self.pages, self.page_size, self.kv_heads, self.head_dim)
        return PagedKV(k=jnp.zeros(shape, self.storage), v=jnp.zeros(shape, self.storage))


def pool_format(device: jax.Device | None = None) -> Format:
    """Returns the memory layout of a pool's arrays: slot after slot, as all kernels read them.

    Every program that returns a pool must request this layout. Otherwise XLA chooses another
    order on TPUs for large pools with heads narrower than 128, and copies them before and after
    every program.

    Args:
      device: the device of the pool; None: the default device.
    """
    device = jax.devices()[0] if device is None else device
    return Format(Layout(major_to_minor=tuple(range(5))), SingleDeviceSharding(device))

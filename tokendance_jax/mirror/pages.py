"""Pages at rest: stored exactly as in the pool, or as 8-bit integers."""

import dataclasses
from collections.abc import Sequence
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int8, Int32

from tokendance_jax.kernels.rope import Rope, rotate
from tokendance_jax.mirror.errors import MirrorError

# `encode` returns host arrays; a caller may move them to a device.
Array = jax.Array | np.ndarray

# The largest integer. -128 is not used, so that a number and its negative have the same step.
_LARGEST = 127


@no_type_check  # JAX also builds pytrees of placeholders that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StoredPages:
    """K and V of some pages, outside the pool. Unused slots are 0.

    Attributes:
      k: [layers, pages, page_size, kv_heads, head_dim]; keys in the pool's storage dtype, rotated
        at canonical positions; or int8 keys without bias and rotation, in steps of `k_scale`.
      v: values, of the same shape and dtype; int8 values are in steps of `v_scale`.
      k_scale: f32 [layers, pages, page_size, kv_heads] if `k` is int8, otherwise None.
      v_scale: as k_scale.
    """

    k: Array
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None

    @property
    def count(self) -> int:
        """Number of pages."""
        return self.k.shape[1]

    def take(self, pages: np.ndarray) -> "StoredPages":
        """Copies the pages with these numbers, i32 [n], to the host."""
        return jax.tree.map(lambda x: np.asarray(x)[:, pages], self)


def joined(parts: Sequence[StoredPages]) -> StoredPages:
    """Concatenates the pages of all parts, on the host."""
    return jax.tree.map(lambda *x: np.concatenate([np.asarray(y) for y in x], axis=1), *parts)


@no_type_check  # JAX also builds pytrees of placeholders that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """Pages as symmetric 8-bit integers, with one scale for each token and head.

    Keys are stored without their rotation and without the model's key bias. In the first layer of
    Qwen2.5-Coder-0.5B the bias is 145, while the rest of the keys has a standard deviation of 0.7,
    so one step would be 1.1 with the bias. A rotation would spread the bias over all numbers of a
    head.

    Attributes:
      key_bias: f32 [layers, kv_heads, head_dim]; the bias that the model adds to keys before it
        rotates them.
      rope: the rotary embedding.
    """

    key_bias: Array
    rope: Rope = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes that a round stores once, in addition to its pages."""
        return self.key_bias.nbytes

    def page_bytes(self, page_size: int) -> int:
        """Bytes of one page: integers and scales of K and V in all layers."""
        layers, kv_heads, head_dim = self.key_bias.shape
        return 2 * layers * page_size * kv_heads * (head_dim + 4)

    def check(self, pool: Array, rope: Rope) -> None:
        """Raises if a pool belongs to another model.

        Args:
          pool: keys [layers, pages, page_size, kv_heads, head_dim].
          rope: the rotary embedding of the pool's model.

        Raises:
          MirrorError: the key bias does not have the pool's layers and heads, or the rotary
            embedding differs.
        """
        if self.rope != rope:
            problem = f"is {self.rope}"
            raise MirrorError("form", "rope", problem, f"pass that of this pool's model, {rope}")
        expected = (pool.shape[0], *pool.shape[3:])
        if self.key_bias.shape != expected or self.key_bias.dtype != np.float32:
            problem = f"is {list(self.key_bias.shape)} {self.key_bias.dtype}"
            remedy = f"pass the bias of this pool's model, {list(expected)} float32"
            raise MirrorError("form", "key_bias", problem, remedy)


def quantised(
    x: Float32[jax.Array, "*tokens head_dim"],
) -> tuple[Int8[jax.Array, "*tokens head_dim"], Float32[jax.Array, "*tokens"]]:
    """Quantises numbers to int8, with one scale per head that maps its largest magnitude to 127."""
    scale = jnp.max(jnp.abs(x), axis=-1) / _LARGEST
    # The numbers may all be 0, or the scale too small to divide by.
    scale = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def before_rotation(
    keys: Float32[jax.Array, "layers pages page_size kv_heads head_dim"],
    position: Int32[jax.Array, "pages page_size"],
    form: Quantised,
) -> Float32[jax.Array, "layers pages page_size kv_heads head_dim"]:
    """Removes the rotation and the model's bias from keys.

    Args:
      keys: keys rotated at their canonical positions.
      position: these positions.
      form: the bias and the base of the rotary frequencies.
    """
    cos, sin = form.rope.rotation(-position, keys.shape[-1])
    turned = rotate(keys, cos[None, :, :, None, :], sin[None, :, :, None, :])
    return turned - jnp.asarray(form.key_bias)[:, None, None]

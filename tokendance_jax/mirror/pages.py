"""Pages at rest: to the bit as the pool has them, or as 8-bit integers."""

import dataclasses
from collections.abc import Sequence
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int8, Int32

from tokendance_jax.kernels import rope
from tokendance_jax.mirror.errors import MirrorError

# On the host after encoding; a caller may move them to a device.
Array = jax.Array | np.ndarray

# The largest integer; -128 is left out, so that a number and its negative have the same step.
_LARGEST = 127


@no_type_check  # JAX also builds pytrees of stand-ins that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StoredPages:
    """K and V of some pages, outside the pool. Unused slots are 0.

    Attributes:
      k: [layers, pages, page_size, kv_heads, head_dim]; keys in the pool's storage dtype, rotated
        at canonical positions; or int8: keys before bias and rotation, in steps of `k_scale`.
      v: values, of the same shape and dtype; int8 in steps of `v_scale`.
      k_scale: f32 [layers, pages, page_size, kv_heads] where `k` is int8, else None.
      v_scale: as k_scale.
    """

    k: Array
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None

    @property
    def count(self) -> int:
        """How many pages there are."""
        return self.k.shape[1]

    def take(self, pages: np.ndarray) -> "StoredPages":
        """Copies pages of the given numbers, i32 [n], to the host."""
        return jax.tree.map(lambda x: np.asarray(x)[:, pages], self)


def joined(parts: Sequence[StoredPages]) -> StoredPages:
    """All pages of several, on the host, one after the other."""
    return jax.tree.map(lambda *x: np.concatenate([np.asarray(y) for y in x], axis=1), *parts)


@no_type_check  # JAX also builds pytrees of stand-ins that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """Pages as symmetric 8-bit integers, with a scale for each token and head.

    Keys are taken back to what they were before the rotary embedding, and the model's bias is taken
    off them. In the first layer of Qwen2.5-Coder-0.5B it is 145 where the rest of the keys has a
    standard deviation of 0.7, so with it one step would be 1.1; and a rotation spreads it over all
    numbers of a head.

    Attributes:
      key_bias: f32 [layers, kv_heads, head_dim]; what the model adds to keys before it rotates.
      theta: base of the rotary frequencies.
    """

    key_bias: Array
    theta: float = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes that a round holds once beside its pages."""
        return self.key_bias.nbytes

    def page_bytes(self, page_size: int) -> int:
        """Bytes of one page: integers and scales, K and V of all layers."""
        layers, kv_heads, head_dim = self.key_bias.shape
        return 2 * layers * page_size * kv_heads * (head_dim + 4)

    def check(self, pool: Array, theta: float) -> None:
        """Refuses pools of other models.

        Args:
          pool: keys [layers, pages, page_size, kv_heads, head_dim].
          theta: base of the rotary frequencies of the pool's model.

        Raises:
          MirrorError: the key bias is not of the pool's layers and heads, or theta is another.
        """
        if self.theta != theta:
            problem = f"is {self.theta}"
            raise MirrorError("form", "theta", problem, f"pass that of this pool's model, {theta}")
        expected = (pool.shape[0], *pool.shape[3:])
        if self.key_bias.shape != expected or self.key_bias.dtype != np.float32:
            problem = f"is {list(self.key_bias.shape)} {self.key_bias.dtype}"
            remedy = f"pass the bias of this pool's model, {list(expected)} float32"
            raise MirrorError("form", "key_bias", problem, remedy)


def quantised(
    x: Float32[jax.Array, "*tokens head_dim"],
) -> tuple[Int8[jax.Array, "*tokens head_dim"], Float32[jax.Array, "*tokens"]]:
    """Rounds numbers to multiples of a scale, the largest of each head to 127 times its scale."""
    scale = jnp.max(jnp.abs(x), axis=-1) / _LARGEST
    # Of zeros alone, and where the scale is too small to divide by.
    scale = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def before_rotation(
    keys: Float32[jax.Array, "layers pages page_size kv_heads head_dim"],
    position: Int32[jax.Array, "pages page_size"],
    form: Quantised,
) -> Float32[jax.Array, "layers pages page_size kv_heads head_dim"]:
    """Keys without their rotation and without the model's bias.

    Args:
      keys: rotated at their canonical positions.
      position: these positions.
      form: bias and frequencies.
    """
    cos, sin = rope.rotation(-position, theta=form.theta, head_dim=keys.shape[-1])
    turned = rope.rotate(keys, cos[None, :, :, None, :], sin[None, :, :, None, :])
    return turned - jnp.asarray(form.key_bias)[:, None, None]

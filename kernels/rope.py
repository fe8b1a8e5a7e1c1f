"""Rotary position embedding with angles that stay exact at any position.

Angles are measured in turns, as 32-bit fixed-point fractions. Integer products wrap modulo one turn
by themselves, so the absolute error is the same at position 10 and at position 10 million (below
1e-6 rad), and the angle of `a - b` equals the difference of the angles of `a` and `b`. A float32
product `position * frequency` is off by 4e-3 rad at position 100,000, which would break the
identity that collective rounds rely on: (R(m)q).(R(n)k) = (R(m-d)q).(R(n-d)k).
"""

import jax
import jax.numpy as jnp
import numpy as np

# Positions are split as `65536 * high + 256 * middle + low`. Each part multiplies its own
# fixed-point frequency, so the rounding error of a frequency is multiplied by at most 255 (`high`
# is 152 at 10 million).
_BITS = 8


def _turns(theta: float, head_dim: int, scale: int) -> np.ndarray:
    """Fixed-point turns per `scale` positions. Returns u32 [head_dim / 2]."""
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = frequency * scale / (2 * np.pi)
    return np.round((turns % 1.0) * 2.0**32).astype(np.uint64).astype(np.uint32)


def rotation(position: jax.Array, *, theta: float, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles at integer positions, which may be negative.

    Args:
      position: i32 [...].
      theta: base of the rotary frequencies.
      head_dim: width of a head; pairs are (i, i + head_dim / 2).

    Returns:
      cos, sin: f32 [..., head_dim / 2].
    """
    shape = (1,) * position.ndim + (head_dim // 2,)
    tables = (jnp.asarray(t.reshape(shape)) for t in turn_tables(theta, head_dim))
    angle = angles(position[..., None], *tables)
    return jnp.cos(angle), jnp.sin(angle)


def turn_tables(theta: float, head_dim: int) -> np.ndarray:
    """Fixed-point turns per 65536, 256 and 1 positions, for `angles`. Returns i32 [3, H/2]."""
    tables = [_turns(theta, head_dim, 1 << bits) for bits in (2 * _BITS, _BITS, 0)]
    return np.stack(tables).view(np.int32)


def angles(position: jax.Array, high: jax.Array, middle: jax.Array, low: jax.Array) -> jax.Array:
    """Rotary angles in [-pi, pi), from the tables of `turn_tables`.

    Args:
      position: i32, broadcastable to the tables.
      high: i32, turns per 65536 positions.
      middle: i32, turns per 256 positions.
      low: i32, turns per position.

    Returns:
      f32 of the tables' shape.
    """
    mask = np.int32((1 << _BITS) - 1)
    turns = (position >> 2 * _BITS) * high + ((position >> _BITS) & mask) * middle
    turns = turns + (position & mask) * low
    return turns.astype(jnp.float32) * np.float32(2 * np.pi / 2**32)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of every head.

    Args:
      x: f32 [..., H].
      cos: f32 [..., H/2], of x's rank.
      sin: f32 [..., H/2], of x's rank.

    Returns:
      f32 [..., H].
    """
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

"""Rotary position embedding with angles that stay exact at any position.

Angles are measured in turns, as 32-bit fixed-point fractions. Integer products wrap modulo one turn
by themselves, so the absolute error is the same at position 10 and at position 10 million (below
1e-6 rad), and the angle of `a - b` equals the difference of the angles of `a` and `b`. A float32
product `position * frequency` is off by 4e-3 rad at position 100,000, which would break the
identity that collective rounds rely on: (R(m)q).(R(n)k) = (R(m-d)q).(R(n-d)k).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

# Positions are split as `65536 * high + 256 * middle + low`. Each part multiplies its own
# fixed-point frequency, so the rounding error of a frequency is multiplied by at most 255 (`high`
# is 152 at 10 million).
_BITS = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Yarn:
    """Frequencies for longer contexts than a model was trained with (YaRN, arXiv 2309.00071).

    Low frequencies are divided by the factor, high ones stay, and those between are blended.

    Attributes:
      factor: how many times longer the context becomes.
      original: the context in training, in tokens.
      beta_fast: frequencies with more turns than this in the original context stay.
      beta_slow: frequencies with fewer turns than this are divided by the factor.
    """

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def scaled(self, frequency: np.ndarray, theta: float) -> np.ndarray:
        """Scales the frequencies f64 [head_dim / 2] of a base `theta`."""
        pairs = len(frequency)

        def index(turns: float) -> float:
            """The index, not rounded, of the frequency that makes this many turns."""
            return pairs * math.log(self.original / (turns * 2 * math.pi)) / math.log(theta)

        first = max(math.floor(index(self.beta_fast)), 0)
        last = min(math.ceil(index(self.beta_slow)), 2 * pairs - 1)
        width = last - first or 0.001
        divided = np.clip((np.arange(pairs) - first) / width, 0, 1)
        return frequency * (1 - divided) + frequency / self.factor * divided

    @property
    def score_scale(self) -> float:
        """Factor of attention scores: the square of the paper's factor of queries and of keys."""
        return (0.1 * math.log(self.factor) + 1) ** 2 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Rope:
    """A rotary position embedding: which angle each pair of numbers turns by per position.

    Rotations are pure: `score_scale` is for the model to apply to queries, once.

    Attributes:
      theta: base of the frequencies.
      yarn: how frequencies are scaled; None: not at all.
    """

    theta: float
    yarn: Yarn | None = None

    def __str__(self) -> str:
        """Names it in messages."""
        yarn = self.yarn
        return f"theta {self.theta:g}" + (
            "" if yarn is None else f", YaRN {yarn.factor:g} x {yarn.original}"
        )

    @property
    def score_scale(self) -> float:
        """Factor that attention scores are multiplied with."""
        return 1.0 if self.yarn is None else self.yarn.score_scale

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Returns the angles per position, f64 [head_dim / 2], in radians."""
        exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
        frequency = self.theta**-exponent
        return frequency if self.yarn is None else self.yarn.scaled(frequency, self.theta)

    def rotation(self, position: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """Computes cosines and sines of the angles at integer positions, which may be negative.

        Args:
          position: i32 [...].
          head_dim: width of a head; pairs are (i, i + head_dim / 2).

        Returns:
          cos, sin: f32 [..., head_dim / 2].
        """
        shape = (1,) * position.ndim + (head_dim // 2,)
        tables = (jnp.asarray(t.reshape(shape)) for t in self.turn_tables(head_dim))
        angle = angles(position[..., None], *tables)
        return jnp.cos(angle), jnp.sin(angle)

    def turn_tables(self, head_dim: int) -> np.ndarray:
        """Fixed-point turns per 65536, 256 and 1 positions, for `angles`. Returns i32 [3, H/2]."""
        turns = self.frequencies(head_dim) / (2 * np.pi)
        tables = [
            np.round((turns * (1 << bits) % 1.0) * 2.0**32).astype(np.uint64).astype(np.uint32)
            for bits in (2 * _BITS, _BITS, 0)
        ]
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

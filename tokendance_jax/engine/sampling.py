"""Sampling on the device: temperature, min-p, top-k and top-p, one random stream per lane."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, UInt32

from tokendance_jax.kernels.lanes import Array
from tokendance_jax.models.product import transposed
from tokendance_jax.prompt.round import Sampling

MAX_STOP_IDS = 16
# Takes the place of a token if a lane's logits are not finite.
NOT_FINITE = -2
# Logits in a block of `_argmax`, which finds the maximum of each block before its index.
_BLOCK = 128


@no_type_check  # JAX also builds this pytree with leaves that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """How each lane samples.

    Settings that are off have neutral values instead of None, so the structure of the pytree does
    not depend on the request.

    Attributes:
      temperature: 0 is greedy.
      top_k: 0 is off.
      top_p: 1 is off.
      min_p: 0 is off.
      key: random key of the lane.
      stop_ids: tokens that end the lane; -1 in unused places.
      limit: maximum number of tokens to generate.
    """

    temperature: Float32[Array, " lanes"]
    top_k: Int32[Array, " lanes"]
    top_p: Float32[Array, " lanes"]
    min_p: Float32[Array, " lanes"]
    key: UInt32[Array, "lanes 2"]
    stop_ids: Int32[Array, "lanes stops"]
    limit: Int32[Array, " lanes"]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class LaneSampling:
    """The settings of one lane, on the host.

    Attributes:
      sampling: temperature, top-k, top-p and min-p; the other fields do not count here.
      key: random key of the lane.
      limit: maximum number of tokens to generate.
      stop_ids: all tokens that end the lane (see `stop_ids_of`).
    """

    sampling: Sampling
    key: UInt32[np.ndarray, "2"]
    limit: int
    stop_ids: tuple[int, ...] = ()


def agent_key(seed: int, round_index: int, agent: str) -> UInt32[np.ndarray, "2"]:
    """Returns the random key of an agent in a round.

    The key depends only on the arguments, so an agent's tokens do not change with the other
    agents, their order, or the batch that the agent is in.
    """
    text = f"{seed}/{round_index}/{agent}".encode()
    return np.frombuffer(hashlib.blake2b(text, digest_size=8).digest(), np.uint32).copy()


def stop_ids_of(sampling: Sampling, model: Sequence[int]) -> tuple[int, ...]:
    """Returns the tokens that end an answer.

    Args:
      sampling: the answer's settings.
      model: the model's own stop tokens.
    """
    return (*(() if sampling.ignore_eos else model), *sampling.stop_token_ids)


def check_stop_ids(stop_ids: Sequence[int]) -> None:
    """Checks that a lane has places for all stop tokens.

    Raises:
      ValueError: if there are more than `MAX_STOP_IDS`.
    """
    if len(stop_ids) > MAX_STOP_IDS:
        raise ValueError(
            f"stop_token_ids: {len(stop_ids)} given, at most {MAX_STOP_IDS} are supported, "
            "including those of the model; give fewer"
        )


def sampling_arrays(lanes: int, settings: Sequence[LaneSampling]) -> SamplingArrays:
    """Stacks settings into `lanes` lanes. The remaining lanes are greedy and generate nothing.

    Raises:
      ValueError: as `check_stop_ids`.
    """
    unused = lanes - len(settings)
    key = np.zeros((lanes, 2), np.uint32)
    stops = np.full((lanes, MAX_STOP_IDS), -1, np.int32)
    for lane, own in enumerate(settings):
        check_stop_ids(own.stop_ids)
        key[lane] = own.key
        stops[lane, : len(own.stop_ids)] = own.stop_ids
    neutral = [Sampling()] * unused
    chosen = [*(own.sampling for own in settings), *neutral]
    return SamplingArrays(
        temperature=np.array([own.temperature for own in chosen], np.float32),
        top_k=np.array([own.top_k for own in chosen], np.int32),
        top_p=np.array([own.top_p for own in chosen], np.float32),
        min_p=np.array([own.min_p for own in chosen], np.float32),
        key=key,
        stop_ids=stops,
        limit=np.array([*(own.limit for own in settings), *[0] * unused], np.int32),
    )


def sample(
    logits: Float[jax.Array, "lanes vocab"],
    sampling: SamplingArrays,
    generated: Int32[jax.Array, " lanes"],
    adjust: Callable[[jax.Array], jax.Array] | None = None,
) -> Int32[jax.Array, " lanes"]:
    """Chooses each lane's next token.

    Temperature is applied first, then min-p, then top-k, then top-p among the remaining tokens, as
    in vLLM. Steps that no lane needs are skipped at run time.

    Args:
      logits: f32 [lanes, vocab].
      sampling: the lanes' settings.
      generated: number of tokens that each lane has generated, which is its position in its
        random stream.
      adjust: maps the model's logits, f32 [vocab, lanes], to those to choose from. It may exclude
        tokens by -inf.

    Returns:
      i32 [lanes] token ids; `NOT_FINITE` if one of the model's logits of the lane is NaN or
      infinite.
    """
    # `matmul` computes products of few rows in this order. The other order would copy all logits.
    by_token = transposed(logits)
    greedy, finite = _argmax(by_token)
    if adjust is not None:
        by_token = adjust(by_token)
        greedy, _ = _argmax(by_token)
    temperature = jnp.asarray(sampling.temperature)[:, None]
    top_k, top_p = jnp.asarray(sampling.top_k), jnp.asarray(sampling.top_p)
    min_p = jnp.asarray(sampling.min_p)

    def draw(by_token: jax.Array) -> jax.Array:
        logits = by_token.T
        # Subtract the maximum first, so that a tiny temperature gives -inf and never +inf.
        scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
        scaled = scaled / jnp.where(temperature > 0, temperature, jnp.ones_like(temperature))
        narrow = jnp.any((top_k > 0) | (top_p < 1) | (min_p > 0))
        kept = jax.lax.cond(narrow, lambda x: _narrow(x, top_k, top_p, min_p), lambda x: x, scaled)

        def noise(key: jax.Array, step: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
            return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

        gumbel = jax.vmap(noise)(jnp.asarray(sampling.key), generated)
        drawn, _ = _argmax((kept + gumbel).T)
        return jnp.where(temperature[:, 0] > 0, drawn, greedy)

    chosen = jax.lax.cond(jnp.any(temperature > 0), draw, lambda _: greedy, by_token)
    return jnp.where(finite, chosen, NOT_FINITE)


def is_stop(
    token: Int32[jax.Array, " lanes"], sampling: SamplingArrays
) -> Bool[jax.Array, " lanes"]:
    """Returns whether each lane's token is one of its stop tokens."""
    return jnp.any(token[:, None] == jnp.asarray(sampling.stop_ids), axis=-1)


def _argmax(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the first index of each column's maximum, and whether the whole column is finite.

    It finds the first block that holds the maximum, and then the first such place in the block.
    The same pass finds the largest and the least number of each block; with a NaN, both are NaN.

    On CPU this takes a fifth of the time of `jnp.argmax`, whose reduction of pairs is not
    vectorised, and needs no second pass over all logits to check them. It saves a tenth of a
    decode step of 25 lanes in bfloat16.
    """
    height, columns = x.shape
    # Pad with copies of the last row: the first of equal values is found, which is the row itself.
    filled = jnp.pad(x, ((0, -height % _BLOCK), (0, 0)), mode="edge")
    blocks = filled.reshape(-1, _BLOCK, columns)
    largest, least = jnp.max(blocks, axis=1), jnp.min(blocks, axis=1)
    block = _first_largest(largest)
    place = _first_largest(jnp.take_along_axis(blocks, block[None, None, :], axis=0)[0])
    finite = jnp.isfinite(jnp.max(largest, axis=0)) & jnp.isfinite(jnp.min(least, axis=0))
    return block * _BLOCK + place, finite


def _first_largest(x: jax.Array) -> jax.Array:
    """Returns the first index of each column's maximum, for few rows, by two plain reductions."""
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    largest = jnp.max(x, axis=0, keepdims=True)
    return jnp.min(jnp.where(x == largest, index, x.shape[0] - 1), axis=0)


def _narrow(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Sets logits outside min-p, then top-k, then top-p to -inf. Keeps ties at the edge.

    The largest logit of each lane must be 0.
    """
    logits = jnp.where(logits >= jnp.log(min_p)[:, None], logits, -jnp.inf)
    ones = jnp.ones_like(logits)
    wanted = jnp.where(top_k > 0, top_k, logits.shape[-1]).astype(jnp.float32)
    logits = jnp.where(logits >= _edge(logits, ones, wanted), logits, -jnp.inf)
    probabilities = jax.nn.softmax(logits, axis=-1)
    # Rounding can keep the sum below 1, so a top_p of 1 becomes 2, which no sum reaches: everything
    # is kept. A top_p that rounds to zero still keeps the most probable token.
    wanted = jnp.where(top_p < 1, jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny), 2.0)
    wanted = wanted.astype(jnp.float32)
    return jnp.where(logits >= _edge(logits, probabilities, wanted), logits, -jnp.inf)


def _edge(values: jax.Array, weights: jax.Array, wanted: jax.Array) -> jax.Array:
    """Returns the largest value with a weight of at least `wanted` at or above it.

    It bisects the bits of the values, compared as integers in float order. A sort of the
    vocabulary takes tens of milliseconds on CPU; 32 sums do not. If the whole weight is below
    `wanted`, the edge is -inf.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    order = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # the edge lies in [low, high)
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        above = jnp.sum(jnp.where(order >= middle[:, None], weights, 0.0), axis=-1)
        enough = above >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    limits = jnp.iinfo(jnp.int32)
    low = jnp.full(values.shape[:1], limits.min, jnp.int32)
    high = jnp.full(values.shape[:1], limits.max, jnp.int32)
    low, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    bits = jnp.where(low < 0, low ^ jnp.int32(0x7FFFFFFF), low)
    edge = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isnan(edge), -jnp.inf, edge)[:, None]

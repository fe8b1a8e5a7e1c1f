"""Adjusting logits on the device: biases, penalties and masks; log-probabilities of tokens.

The host lists only the tokens whose logits may change in each lane (`adjustments`). Once per call,
the device expands these lists to the whole vocabulary (`expand`). After each token it counts the
token, so that the penalties follow the answer within a call of several steps (`choose`).
"""

import dataclasses
from collections.abc import Sequence
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, UInt32

from tokendance_jax.engine.sampling import SamplingArrays, sample
from tokendance_jax.kernels.lanes import Array
from tokendance_jax.models.product import transposed
from tokendance_jax.prompt.round import MAX_LOGPROBS, Sampling

# Listed tokens per lane in the smallest bucket. The sizes of buckets are powers of four.
_FEWEST = 64
_WORD = 32  # bits


@no_type_check  # JAX also builds this pytree with leaves that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adjustments:
    """How each lane's logits change before a token is chosen from them.

    Settings that are off have neutral values instead of None, so the structure of the pytree does
    not depend on the request.

    Attributes:
      token: the tokens whose logits may change; the size of the vocabulary in unused places.
      count: how often each of these tokens occurs in the answer so far.
      seen: whether the token occurs in the prompt or in the answer so far.
      bias: added to the token's logit.
      repetition: repetition penalty; 1 is off.
      presence: presence penalty; 0 is off.
      frequency: frequency penalty; 0 is off.
      allowed: one bit per token of the vocabulary, the lowest bit of a word first; tokens without
        their bit are never chosen.
      best: how many of the most probable tokens to report, next to the chosen token; -1 reports
        nothing.
    """

    token: Int32[Array, "lanes adjusted"]
    count: Int32[Array, "lanes adjusted"]
    seen: Bool[Array, "lanes adjusted"]
    bias: Float32[Array, "lanes adjusted"]
    repetition: Float32[Array, " lanes"]
    presence: Float32[Array, " lanes"]
    frequency: Float32[Array, " lanes"]
    allowed: UInt32[Array, "lanes words"]
    best: Int32[Array, " lanes"]


@no_type_check  # JAX also builds this pytree with leaves that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of probabilities under the model, before anything changes its logits.

    Unused places hold the token -1 and the value -inf. These are all places of lanes that request
    nothing and of steps without a token, and otherwise the best tokens that were not requested.

    Attributes:
      chosen: log-probabilities of the chosen tokens.
      ids: the most probable tokens, in descending order.
      values: their log-probabilities.
    """

    chosen: Float32[Array, "lanes steps"]
    ids: Int32[Array, "lanes steps best"]
    values: Float32[Array, "lanes steps best"]

    @classmethod
    def blank(cls, lanes: int, steps: int) -> "Logprobs":
        """Returns unused places only."""
        shape = (lanes, steps, MAX_LOGPROBS)
        nothing = jnp.full(shape, -jnp.inf, jnp.float32)
        return cls(nothing[:, :, 0], jnp.full(shape, -1, jnp.int32), nothing)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class LaneAdjustment:
    """What adjusts the logits of one lane, on the host.

    Attributes:
      sampling: penalties, biases and log-probabilities; the other fields do not count here.
      prompt: the tokens of the prompt. Their order and number of occurrences do not count.
      answer: the tokens of the answer so far.
      allowed: which tokens of the vocabulary may be chosen in this call; None allows all.
    """

    sampling: Sampling
    prompt: Int32[np.ndarray, " tokens"]
    answer: Sequence[int] = ()
    allowed: Bool[np.ndarray, " vocab"] | None = None

    @property
    def neutral(self) -> bool:
        """Whether the lane needs no adjustment and no log-probabilities."""
        return self.allowed is None and not self.sampling.adjusts


def check_logit_bias(sampling: Sampling, vocab: int) -> None:
    """Checks that all tokens with a bias are in the vocabulary.

    Raises:
      ValueError: a token is not.
    """
    outside = [token for token, _ in sampling.logit_bias if token >= vocab]
    if outside:
        raise ValueError(
            f"logit_bias: token {outside[0]} is not one of the model's {vocab} tokens; remove it"
        )


def adjustments(lanes: int, vocab: int, settings: Sequence[LaneAdjustment]) -> Adjustments:
    """Stacks adjustments into `lanes` lanes, in bucket shapes. The remaining lanes are neutral.

    Args:
      lanes: number of lanes.
      vocab: size of the vocabulary.
      settings: what adjusts the first lanes.

    Raises:
      ValueError: a mask allows no token or has another size than the vocabulary, or as
        `check_logit_bias`.
    """
    tables = [_table(own, vocab) for own in settings]
    longest = max((len(token) for token, *_ in tables), default=0)
    size = _FEWEST
    while size < longest:
        size *= 4
    shape = (lanes, min(size, vocab))
    table = (
        np.full(shape, vocab, np.int32),
        np.zeros(shape, np.int32),
        np.zeros(shape, np.bool_),
        np.zeros(shape, np.float32),
    )
    for lane, columns in enumerate(tables):
        for column, own in zip(table, columns, strict=True):
            column[lane, : len(own)] = own
    words = np.full((lanes, -(-vocab // _WORD)), np.iinfo(np.uint32).max, np.uint32)
    for lane, own in enumerate(settings):
        if own.allowed is not None:
            words[lane] = _words(own.allowed, vocab)
    chosen = [*(own.sampling for own in settings), *[Sampling()] * (lanes - len(settings))]
    best = [-1 if own.logprobs is None else own.logprobs for own in chosen]
    return Adjustments(
        *table,
        repetition=np.array([own.repetition_penalty for own in chosen], np.float32),
        presence=np.array([own.presence_penalty for own in chosen], np.float32),
        frequency=np.array([own.frequency_penalty for own in chosen], np.float32),
        allowed=words,
        best=np.array(best, np.int32),
    )


def _table(own: LaneAdjustment, vocab: int) -> tuple[np.ndarray, ...]:
    """Returns a lane's tokens in ascending order, and their counts, seen flags and biases.

    Tokens are left out if they have no bias and no penalty of the lane applies to them.
    """
    sampling, none = own.sampling, np.zeros(0, np.int32)
    check_logit_bias(sampling, vocab)
    prompt = own.prompt if sampling.repetition_penalty != 1 else none
    answer = np.asarray(own.answer, np.int32) if sampling.penalises else none
    biased = np.array([token for token, _ in sampling.logit_bias], np.int32)
    # Faster than `np.unique`.
    token = np.sort(np.concatenate([prompt, answer, biased]))
    token = token[np.diff(token, prepend=-1) > 0]
    count = np.bincount(np.searchsorted(token, answer), minlength=len(token)).astype(np.int32)
    seen, bias = count > 0, np.zeros(token.shape, np.float32)
    seen[np.searchsorted(token, prompt)] = True
    bias[np.searchsorted(token, biased)] = [number for _, number in sampling.logit_bias]
    return token, count, seen, bias


def _words(allowed: np.ndarray, vocab: int) -> np.ndarray:
    """Returns a mask as u32 [words]."""
    if allowed.shape != (vocab,):
        raise ValueError(
            f"allowed: the shape is {allowed.shape}; give one bool for each of {vocab}"
        )
    if not allowed.any():
        raise ValueError("allowed: the mask allows no token; allow at least one")
    padded = np.pad(allowed, (0, -vocab % _WORD))
    return np.packbits(padded, bitorder="little").view(np.uint32)


@no_type_check  # JAX also builds this pytree with leaves that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Expanded:
    """`Adjustments` for every token of the vocabulary, on the device. Attributes as there."""

    count: Int32[jax.Array, "vocab lanes"]
    seen: Bool[jax.Array, "vocab lanes"]
    bias: Float32[jax.Array, "vocab lanes"]
    allowed: Bool[jax.Array, "vocab lanes"]
    repetition: Float32[jax.Array, "1 lanes"]
    presence: Float32[jax.Array, "1 lanes"]
    frequency: Float32[jax.Array, "1 lanes"]
    best: Int32[jax.Array, " lanes"]


def expand(adjustments: Adjustments, vocab: int) -> Expanded:
    """Expands adjustments to the whole vocabulary. One call does this once, before its steps."""
    token = jnp.asarray(adjustments.token)
    lanes = token.shape[0]
    lane = jax.lax.broadcasted_iota(jnp.int32, token.shape, 0)

    def spread(values: Array) -> jax.Array:
        values = jnp.asarray(values)
        table = jnp.zeros((vocab, lanes), values.dtype)
        return table.at[token, lane].add(values, mode="drop")

    bit = jnp.arange(_WORD, dtype=jnp.uint32)[None, None, :]
    bits = (jnp.asarray(adjustments.allowed)[:, :, None] >> bit) & jnp.uint32(1)
    return Expanded(
        count=spread(adjustments.count),
        seen=spread(jnp.asarray(adjustments.seen).astype(jnp.int32)) > 0,
        bias=spread(adjustments.bias),
        allowed=bits.reshape(lanes, -1)[:, :vocab].T != 0,
        repetition=jnp.asarray(adjustments.repetition)[None, :],
        presence=jnp.asarray(adjustments.presence)[None, :],
        frequency=jnp.asarray(adjustments.frequency)[None, :],
        best=jnp.asarray(adjustments.best),
    )


def adjust(
    logits: Float[jax.Array, "vocab lanes"], expanded: Expanded
) -> Float[jax.Array, "vocab lanes"]:
    """Adjusts logits: adds biases, then applies the repetition, frequency and presence penalties.

    The order is that of vLLM, except that the mask comes last. The result is the same, as no bias
    or penalty can change -inf.
    """
    count, repetition = expanded.count, expanded.repetition
    x = logits + expanded.bias
    repeated = jnp.where(x > 0, x / repetition, x * repetition)
    x = jnp.where(expanded.seen | (count > 0), repeated, x)
    x = x - expanded.frequency * count.astype(jnp.float32)
    x = x - expanded.presence * (count > 0).astype(jnp.float32)
    # Extreme repetition penalties overflow. Infinite logits would exclude all other tokens, or all.
    limits = jnp.finfo(jnp.float32)
    return jnp.where(expanded.allowed, jnp.clip(x, limits.min, limits.max), -jnp.inf)


def choose(
    logits: Float[jax.Array, "lanes vocab"],
    sampling: SamplingArrays,
    generated: Int32[jax.Array, " lanes"],
    live: Bool[jax.Array, " lanes"],
    expanded: Expanded | None,
) -> tuple[Int32[jax.Array, " lanes"], Expanded | None, Logprobs | None]:
    """Chooses each lane's next token from its adjusted logits.

    Args:
      logits: the model's logits.
      sampling: the lanes' settings.
      generated: see `sample`.
      live: lanes that choose a token.
      expanded: the lanes' adjustments; None if no lane has any.

    Returns:
      The tokens, -1 in other lanes, otherwise as from `sample`; the adjustments after these tokens;
      the log-probabilities, without the axis of steps. The latter two are None without adjustments.
    """
    if expanded is None:
        return jnp.where(live, sample(logits, sampling, generated), -1), None, None
    tokens = sample(logits, sampling, generated, lambda by_token: adjust(by_token, expanded))
    chosen = jnp.where(live, tokens, -1)
    lane = jnp.arange(len(chosen), dtype=jnp.int32)
    place = jnp.where(chosen >= 0, chosen, logits.shape[1])
    count = expanded.count.at[place, lane].add(1, mode="drop", unique_indices=True)
    found = _logprobs(logits, chosen, expanded.best)
    return chosen, dataclasses.replace(expanded, count=count), found


def _logprobs(logits: jax.Array, chosen: jax.Array, best: jax.Array) -> Logprobs:
    """Returns log-probabilities of one step, and skips at run time what no lane requests."""
    lanes, vocab = logits.shape
    most = min(MAX_LOGPROBS, vocab)
    blank = jax.tree.map(lambda x: x[:, 0], Logprobs.blank(lanes, 1))
    given = (best >= 0) & (chosen >= 0)

    def compute(logits: jax.Array) -> Logprobs:
        by_token = transposed(logits)
        total = jax.nn.logsumexp(by_token, axis=0)
        own = jnp.take_along_axis(by_token, jnp.maximum(chosen, 0)[None, :], axis=0)[0]

        def rank(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
            values, ids = jax.lax.top_k(logits, most)
            unused = ((0, 0), (0, MAX_LOGPROBS - most))
            return jnp.pad(ids, unused), jnp.pad(values - total[:, None], unused)

        wanted = jnp.where(given, jnp.minimum(best, vocab), 0)
        ids, values = jax.lax.cond(
            jnp.any(wanted > 0), rank, lambda _: (blank.ids, blank.values), logits
        )
        filled = jnp.arange(MAX_LOGPROBS, dtype=jnp.int32)[None, :] < wanted[:, None]
        return Logprobs(
            jnp.where(given, own - total, blank.chosen),
            jnp.where(filled, ids, blank.ids),
            jnp.where(filled, values, blank.values),
        )

    return jax.lax.cond(jnp.any(given), compute, lambda _: blank, logits)

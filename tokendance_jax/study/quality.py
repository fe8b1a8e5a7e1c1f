"""Compares the next-token distributions of two ways to compute a text."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Float64


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """The comparison of one lane, position by position.

    Attributes:
      kl: Kullback-Leibler divergence from the reference, in nats.
      same: whether both have the same most probable token.
    """

    kl: Float64[np.ndarray, " positions"]
    same: Bool[np.ndarray, " positions"]


@dataclasses.dataclass(frozen=True, slots=True)
class Agreement:
    """Teacher-forced agreement with a reference.

    Attributes:
      positions: number of distributions compared.
      kl_mean: mean Kullback-Leibler divergence from the reference, in nats.
      kl_p95: 95th percentile of the same divergence.
      top1: share of positions whose most probable token is the reference's.
      first_divergence: number of tokens before the first one whose most probable token is not the
        reference's; mean over the lanes. Along the reference's own greedy text, greedy decoding
        the other way leaves the text at this token.
    """

    positions: int
    kl_mean: float
    kl_p95: float
    top1: float
    first_divergence: float


def compare(
    reference: Float32[np.ndarray, "positions vocab"], other: Float32[np.ndarray, "positions vocab"]
) -> Comparison:
    """Compares the logits of one lane.

    Raises:
      ValueError: if a logit is NaN or infinite.
    """
    for name, logits in (("reference", reference), ("other", other)):
        if not np.isfinite(logits).all():
            raise ValueError(f"{name}: logits are NaN or infinite; check the model's weights")
    p, q = _log_softmax(reference), _log_softmax(other)
    # Rounding can make a divergence of zero negative.
    kl = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)
    return Comparison(kl, reference.argmax(axis=-1) == other.argmax(axis=-1))


def summarise(lanes: Sequence[Comparison]) -> Agreement:
    """Summarises comparisons; all positions have the same weight.

    Raises:
      ValueError: if `lanes` is empty.
    """
    if not lanes:
        raise ValueError("lanes: nothing was compared; give at least one lane")
    kl, same = (np.concatenate(c) for c in zip(*((x.kl, x.same) for x in lanes), strict=True))
    before = [len(x.same) if x.same.all() else int(np.argmin(x.same)) for x in lanes]
    return Agreement(
        positions=len(kl),
        kl_mean=float(kl.mean()),
        kl_p95=float(np.quantile(kl, 0.95)),
        top1=float(same.mean()),
        first_divergence=float(np.mean(before)),
    )


def agreement(
    reference: Sequence[Float32[np.ndarray, "_ vocab"]],
    other: Sequence[Float32[np.ndarray, "_ vocab"]],
) -> Agreement:
    """Compares logits lane by lane and position by position.

    Args:
      reference: logits f32 [positions, vocab] of each lane.
      other: the same, computed another way.
    """
    return summarise([compare(a, b) for a, b in zip(reference, other, strict=True)])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

"""How far the next-token distributions of two ways to compute a text are apart."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Float64


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """One lane, position by position.

    Attributes:
      kl: Kullback-Leibler divergence from the reference, in nats.
      same: whether the most probable token is the reference's.
    """

    kl: Float64[np.ndarray, " positions"]
    same: Bool[np.ndarray, " positions"]


@dataclasses.dataclass(frozen=True, slots=True)
class Agreement:
    """Teacher-forced agreement with a reference.

    Attributes:
      positions: number of distributions compared.
      kl_mean: mean Kullback-Leibler divergence from the reference, in nats.
      kl_p95: its 95th percentile.
      top1: share of positions whose most probable token is the reference's.
      first_divergence: mean over the lanes of the tokens before the first one whose most probable
        token is not the reference's. Along the reference's own greedy text, that is where a greedy
        text of the other way leaves it.
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
            raise ValueError(f"{name}: logits are NaN or infinite; check the weights it comes from")
    p, q = _log_softmax(reference), _log_softmax(other)
    # Rounding can bring a divergence of zero below zero.
    kl = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)
    return Comparison(kl, reference.argmax(axis=-1) == other.argmax(axis=-1))


def summarise(lanes: Sequence[Comparison]) -> Agreement:
    """Sums comparisons up; all positions count alike.

    Raises:
      ValueError: if there are none.
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

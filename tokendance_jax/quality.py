"""How far two distributions of the next token are apart."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32


@dataclasses.dataclass(frozen=True, slots=True)
class Agreement:
    """Teacher-forced agreement with a reference.

    Attributes:
      positions: number of distributions compared.
      kl_mean: mean Kullback-Leibler divergence from the reference, in nats.
      kl_p95: its 95th percentile.
      top1: share of positions whose most probable token is the reference's.
    """

    positions: int
    kl_mean: float
    kl_p95: float
    top1: float


def agreement(
    reference: Sequence[Float32[np.ndarray, "_ vocab"]],
    other: Sequence[Float32[np.ndarray, "_ vocab"]],
) -> Agreement:
    """Compares logits position by position.

    Args:
      reference: logits f32 [positions, vocab] of each lane.
      other: the same, computed another way.
    """
    divergences, same = [], []
    for expected, given in zip(reference, other, strict=True):
        p, q = _log_softmax(expected), _log_softmax(given)
        divergences.append((np.exp(p) * (p - q)).sum(axis=-1))
        same.append(expected.argmax(axis=-1) == given.argmax(axis=-1))
    divergence, equal = np.concatenate(divergences), np.concatenate(same)
    # Rounding can bring a divergence of zero below zero.
    divergence = np.maximum(divergence, 0.0)
    return Agreement(
        positions=len(divergence),
        kl_mean=float(divergence.mean()),
        kl_p95=float(np.quantile(divergence, 0.95)),
        top1=float(equal.mean()),
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

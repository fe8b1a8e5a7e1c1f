"""Teacher forcing: computes logits along given answers under an engine's policy."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from tokendance_jax.engine import programs
from tokendance_jax.engine.errors import NotFiniteError
from tokendance_jax.engine.prefill import Cost
from tokendance_jax.engine.rounds import RoundEngine
from tokendance_jax.prompt.round import PromptError
from tokendance_jax.prompt.tokenized import TokenizedPrompt


def follow(
    engine: RoundEngine, prompts: Sequence[TokenizedPrompt], answers: Sequence[np.ndarray]
) -> tuple[list[Float32[np.ndarray, "_ width"]], Cost]:
    """Computes the residual stream along given answers.

    The policy reads and computes what it would in a round of these prompts, and also computes the
    answers. Afterwards it keeps the pages that it would keep after a round.

    Args:
      engine: the engine that computes.
      prompts: the agents' prompts.
      answers: token ids i32 [tokens] of each answer; may be empty.

    Returns:
      For each agent, the residual stream f32 [1 + tokens, width] at the end of the prompt and at
      every token of the answer; and the cost, answers included.

    Raises:
      PromptError: if a prompt and its answer are longer than the model's context; nothing has been
        computed then.
      OutOfPages: if the pool cannot hold the sequences.
      NotFiniteError: if the residual stream is NaN or infinite; nothing is kept then.
    """
    sequences = [p.followed_by(ids) for p, ids in zip(prompts, answers, strict=True)]
    context = engine.model.config.max_position_embeddings
    for sequence in sequences:
        if len(sequence.token_ids) > context:
            raise PromptError(
                f"agent {sequence.agent!r}: prompt and answer have {len(sequence.token_ids)} "
                f"tokens, the model's context {context}; shorten them"
            )
    with engine.open(sequences) as opened:
        prefill = engine.prefill(opened, [len(prompt.token_ids) - 1 for prompt in prompts])
        streams = prefill.streams()
        for prompt, x in zip(prompts, streams, strict=True):
            _check_finite(x, f"agent {prompt.agent!r}", "residual stream")
    return streams, prefill.cost


def logits(
    engine: RoundEngine, hidden: Float32[np.ndarray, "rows width"]
) -> Float32[np.ndarray, "rows vocab"]:
    """Returns the next-token logits of residual-stream rows.

    Raises:
      NotFiniteError: if they are NaN or infinite.
    """
    size = engine.shapes.rows.minimum
    found = [np.zeros((0, engine.model.config.vocab_size), np.float32)]
    for start in range(0, len(hidden), size):
        part = hidden[start : start + size]
        padded = np.pad(part, ((0, size - len(part)), (0, 0)))
        found.append(np.asarray(engine.runner.run(programs.logits, padded))[: len(part)])
    whole = np.concatenate(found)
    _check_finite(whole, "logits", "rows")
    return whole


def score(
    engine: RoundEngine, prompts: Sequence[TokenizedPrompt], answers: Sequence[np.ndarray]
) -> tuple[list[Float32[np.ndarray, "_ vocab"]], Cost]:
    """As `follow`, but returns next-token logits f32 [1 + tokens, vocab] for each agent."""
    streams, cost = follow(engine, prompts, answers)
    return [logits(engine, x) for x in streams], cost


def _check_finite(x: np.ndarray, where: str, what: str) -> None:
    """Raises an error if a row of `x` [rows, columns] has numbers that are not finite."""
    broken = np.flatnonzero(~np.isfinite(x).all(axis=-1))
    if len(broken):
        raise NotFiniteError(
            where, what, f"row {broken[0]} of {len(x)} has NaN or infinite numbers"
        )

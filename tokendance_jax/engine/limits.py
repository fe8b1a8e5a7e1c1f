"""The limits of rounds and pools, checked on the host before anything is computed."""

from collections.abc import Sequence

from tokendance_jax import host
from tokendance_jax.models.decoder.config import DecoderConfig
from tokendance_jax.prompt.round import PromptError, Round
from tokendance_jax.prompt.tokenized import TokenizedPrompt


def answer_limits(
    round_: Round, prompts: Sequence[TokenizedPrompt], config: DecoderConfig
) -> list[int]:
    """Checks prompts against a model, and limits answers to the rest of the model's context.

    Args:
      round_: the round.
      prompts: its tokenized prompts.
      config: the model's sizes.

    Returns:
      The maximum number of tokens in each agent's answer.

    Raises:
      PromptError: a prompt fills the context, or has a token id outside the model's vocabulary.
    """
    context, limits = config.max_position_embeddings, []
    for agent, prompt in zip(round_.agents, prompts, strict=True):
        where, tokens = f"round {round_.index}: agent {agent.agent!r}", len(prompt.token_ids)
        if tokens >= context:
            raise PromptError(
                f"{where}: the prompt has {tokens} tokens, the model's context {context}; shorten "
                "the prompt"
            )
        if prompt.token_ids.max() >= config.vocab_size:
            raise PromptError(
                f"{where}: token id {prompt.token_ids.max()} is outside of the model's vocabulary "
                f"of {config.vocab_size}"
            )
        limits.append(min(agent.max_new_tokens or round_.max_new_tokens, context - tokens))
    return limits


def check_page_size(page_size: int) -> None:
    """Checks that block tables support a page size.

    Raises:
      ValueError: the page size is not a power of two of at most 256.
    """
    if page_size not in (1 << bit for bit in range(9)):
        raise ValueError(f"page_size: {page_size} is not a power of two of at most 256")


def check_kv_memory(kv_memory: int) -> None:
    """Checks that the memory of the default device is large enough for a page pool.

    Raises:
      ValueError: the device has less memory.
    """
    memory = host.memory()
    if memory is not None and kv_memory > memory:
        raise too_large(kv_memory, f"the device has {memory / 2**30:,.1f} GiB in total")


def too_large(kv_memory: int, why: str) -> ValueError:
    """Returns the error for a pool that does not fit in memory."""
    return ValueError(
        f"kv_memory: a pool of {kv_memory / 2**30:,.1f} GiB is too large: {why}; give less, or "
        "serve fewer agents or shorter answers"
    )

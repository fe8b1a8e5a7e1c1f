"""The limits of rounds and pools, checked on the host before anything is computed."""

import jax

from tokendance_jax import host
from tokendance_jax.models.decoder.config import DecoderConfig
from tokendance_jax.prompt.round import PromptError
from tokendance_jax.prompt.tokenized import TokenizedPrompt

# The pool that `kv_memory="auto"` allocates if the free memory is unknown, and the largest one on a
# CPU. There the pool shares memory with all other processes, and filling it with zeros takes time:
# 0.6 s for 1 GiB and 3 to 7 s for 4 GiB on two cores.
DEFAULT_KV_MEMORY = 1 << 30
_DIGITS = 6


def answer_limit(
    where: str, prompt: TokenizedPrompt, limit: int | None, config: DecoderConfig
) -> int:
    """Checks a prompt against a model, and limits its answer to the rest of the model's context.

    Args:
      where: names the prompt in errors.
      prompt: the prompt.
      limit: most tokens of the answer; None: as many as the context holds.
      config: the model's sizes.

    Raises:
      PromptError: the prompt is empty, fills the context, or has a token id outside the model's
        vocabulary; or the limit is below 1.
    """
    context, tokens = config.max_position_embeddings, len(prompt.token_ids)
    if tokens == 0:
        raise PromptError(f"{where}: the prompt has no tokens; give at least one")
    if limit is not None and limit < 1:
        raise PromptError(f"{where}: max_new_tokens is {limit}; give at least 1")
    if tokens >= context:
        raise PromptError(
            f"{where}: the prompt has {tokens} tokens, the model's context {context}; shorten "
            "the prompt"
        )
    largest, smallest = prompt.token_ids.max(), prompt.token_ids.min()
    if largest >= config.vocab_size or smallest < 0:
        outside = largest if largest >= config.vocab_size else smallest
        raise PromptError(
            f"{where}: token id {outside} is outside of the model's vocabulary of "
            f"{config.vocab_size}"
        )
    return min(limit or context, context - tokens)


def check_page_size(page_size: int) -> None:
    """Checks that block tables support a page size.

    Raises:
      ValueError: the page size is not a power of two of at most 256.
    """
    if page_size not in (1 << bit for bit in range(9)):
        raise ValueError(f"page_size: {page_size} is not a power of two of at most 256")


def check_kv_memory(kv_memory: int | str) -> None:
    """Checks that the memory of the default device is large enough for a page pool.

    Raises:
      ValueError: the device has less memory, or `kv_memory` is a string other than "auto".
    """
    if kv_memory == "auto":
        return
    if isinstance(kv_memory, str):
        raise ValueError(f"kv_memory: {kv_memory!r} is unknown; give a number of bytes or 'auto'")
    memory = host.memory()
    if memory is not None and kv_memory > memory:
        raise too_large(kv_memory, f"the device has {memory / 2**30:,.1f} GiB in total")


def pool_pages(kv_memory: int | str, room: int, *, memory_fraction: float, most: int) -> int:
    """Returns the number of pages of a pool.

    Args:
      kv_memory: bytes of the pool; "auto": a share of the free memory of the default device.
      room: bytes that a page occupies.
      memory_fraction: the share.
      most: maximum number of pages if `kv_memory` is "auto".

    Raises:
      ValueError: the memory does not hold two pages.
    """
    if not isinstance(kv_memory, str):
        pages = kv_memory // room
        if pages < 2:
            raise ValueError(
                f"kv_memory: {kv_memory} bytes hold {pages} pages of {room} bytes; "
                f"give at least {2 * room}"
            )
        return pages
    memory = _spare_memory(memory_fraction)
    pages = min(memory // room, most)
    if pages < 2:
        raise ValueError(
            f"kv_memory: 'auto' finds {memory} bytes for the pool, which hold {pages} pages of "
            f"{room} bytes; free at least {2 * room} bytes of the device's memory, or raise "
            "memory_fraction"
        )
    return pages


def _spare_memory(fraction: float) -> int:
    """Returns the bytes of a pool that occupies at most this share of the free memory."""
    free = host.free_memory()
    if free is None:
        return DEFAULT_KV_MEMORY
    share = int(fraction * free)
    if jax.devices()[0].platform == "cpu":
        share = min(share, DEFAULT_KV_MEMORY)
    # Programs are compiled for a number of pages. Without rounding, any small change of the free
    # memory would make the compiled programs on disk useless. Rounding costs less than 1/32.
    rest = max(0, share.bit_length() - _DIGITS)
    return share >> rest << rest


def too_large(kv_memory: int, why: str) -> ValueError:
    """Returns the error for a pool that does not fit in memory."""
    return ValueError(
        f"kv_memory: a pool of {kv_memory / 2**30:,.1f} GiB is too large: {why}; give less, or "
        "serve fewer agents or shorter answers"
    )

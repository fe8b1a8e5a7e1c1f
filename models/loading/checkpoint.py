"""The checkpoint that every loader returns."""

import dataclasses
from collections.abc import Mapping

import jax

from tokendance_jax.models.decoder.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model in memory: configuration, weights and text tools.

    Attributes:
      config: Sizes and constants of the model.
      params: Arrays by parameter path (see `tokendance_jax.models.decoder.parameters`). Matrices
        are [out, in] in the dtype requested when loading; norm weights and biases are float32.
      tokenizer_json: A Hugging Face `tokenizer.json`.
      chat_template: Jinja source of the chat template, if the checkpoint has one.
      stop_ids: Token ids that end a generation, in ascending order.
      name: The model's name, for display.
      special_tokens: Token strings by the names that chat templates use, such as `bos_token`;
        tuples of strings for lists, such as `additional_special_tokens`.
    """

    config: DecoderConfig
    params: dict[str, jax.Array]
    tokenizer_json: str
    chat_template: str | None
    stop_ids: tuple[int, ...]
    name: str
    special_tokens: Mapping[str, str | tuple[str, ...]] = dataclasses.field(default_factory=dict)

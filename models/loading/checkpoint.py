"""What every loader returns."""

import dataclasses

import jax

from tokendance_jax.models.qwen2.config import Qwen2Config


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model in memory: configuration, weights and text tools.

    Attributes:
      config: Sizes and constants of the model.
      params: Arrays by parameter path (see `tokendance_jax.models.qwen2.parameters`). Matrices are
        [out, in] in the type asked for at loading; norm weights and biases are float32.
      tokenizer_json: A Hugging Face `tokenizer.json`.
      chat_template: Jinja source of the chat template, if the checkpoint has one.
      stop_ids: Token ids that end a generation, in ascending order.
      name: The model's name, for people.
    """

    config: Qwen2Config
    params: dict[str, jax.Array]
    tokenizer_json: str
    chat_template: str | None
    stop_ids: tuple[int, ...]
    name: str

"""Sizes, constants and flags of a decoder."""

import dataclasses

from tokendance_jax.kernels.rope import Rope
from tokendance_jax.models.errors import CheckpointError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes, constants and flags of a decoder, under their Hugging Face names.

    Attributes:
      family: Name of the model family (see `models.families`).
      vocab_size: Rows of the embedding, padding rows included.
      hidden_size: Width of the residual stream.
      intermediate_size: Width of the gated MLP.
      num_hidden_layers: Decoder layers.
      num_attention_heads: Query heads.
      num_key_value_heads: Key and value heads; divides the query heads.
      head_dim: Width of one head; even, because rotary embedding works on pairs.
      max_position_embeddings: Longest context in tokens, with the scaling of `rope`.
      rope: The rotary position embedding.
      rms_norm_eps: Added to the mean square in every RMSNorm.
      tie_word_embeddings: Whether the logits come from the embedding matrix.
      attention_bias: Whether queries, keys and values have a bias.
      qk_norm: Whether queries and keys are normalised, head by head, before they are rotated.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: Rope
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    qk_norm: bool

    def __post_init__(self) -> None:
        where = type(self).__name__
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
                raise CheckpointError(
                    where, field.name, f"is {value!r}", "must be a positive number"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                where,
                "num_key_value_heads",
                f"{self.num_key_value_heads} does not divide the "
                f"{self.num_attention_heads} attention heads",
                "grouped-query attention needs groups of equal size",
            )
        if self.head_dim % 2:
            raise CheckpointError(
                where,
                "head_dim",
                f"{self.head_dim} is odd",
                "rotary embedding needs an even head width",
            )

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of a layer: half the operations that they cost per token."""
        q, kv = (n * self.head_dim for n in (self.num_attention_heads, self.num_key_value_heads))
        return self.hidden_size * (2 * q + 2 * kv + 3 * self.intermediate_size)

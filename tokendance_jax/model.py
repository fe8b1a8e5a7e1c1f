"""A loaded model: its module, split into graph and weights, and its tokenizer."""

import dataclasses
import functools
import os

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float32

from tokendance_jax.identity import ModelIdentity, weights_digest
from tokendance_jax.kernels.dispatch import platform_of
from tokendance_jax.kernels.storage import storage_dtype
from tokendance_jax.models.decoder.config import DecoderConfig
from tokendance_jax.models.decoder.model import Decoder, state_from_parameters
from tokendance_jax.models.loading import Checkpoint, load_checkpoint
from tokendance_jax.paged.kv import KVSpec
from tokendance_jax.prompt.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Model:
    """A model for the engine to serve.

    Attributes:
      name: name for display: the file, folder or hub id that the model was loaded from.
      config: sizes and constants.
      dtype: precision of the matrices, and of the KV pool unless the engine is told otherwise.
      graph: the module without its arrays.
      state: the arrays.
      tokenizer: converts text to token ids and back; holds the chat template.
    """

    name: str
    config: DecoderConfig
    dtype: jnp.dtype
    graph: nnx.GraphDef[Decoder]
    state: nnx.State
    tokenizer: Tokenizer

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, dtype: DTypeLike) -> "Model":
        """Puts a checkpoint's arrays, loaded in `dtype`, into the module."""
        graph, state = state_from_parameters(checkpoint.config, checkpoint.params, dtype)
        tokenizer = Tokenizer(
            checkpoint.tokenizer_json,
            checkpoint.chat_template,
            checkpoint.stop_ids,
            checkpoint.special_tokens,
        )
        name, config = checkpoint.name, checkpoint.config
        return cls(name, config, jnp.dtype(dtype), graph, state, tokenizer)

    @functools.cached_property
    def identity(self) -> ModelIdentity:
        """Distinguishes this model's KV from that of other models.

        The first access hashes all weights.
        """
        params = {
            ".".join(map(str, path)): variable.get_value()
            for path, variable in nnx.to_flat_state(self.state)
        }
        return ModelIdentity(
            weights=weights_digest(params),
            dtype=self.dtype.name,
            layers=self.config.num_hidden_layers,
            heads=self.config.num_attention_heads,
            kv_heads=self.config.num_key_value_heads,
            head_dim=self.config.head_dim,
            rope=self.config.rope,
            norm_eps=self.config.rms_norm_eps,
        )

    @property
    def key_bias(self) -> Float32[np.ndarray, "layers kv_heads head_dim"]:
        """The bias that each layer adds to keys before it rotates them; zeros if it adds none."""
        config = self.config
        shape = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        blocks = nnx.merge(self.graph, self.state).layers
        biases = [block.self_attn.k_proj.bias for block in blocks]
        found = [np.asarray(bias[...]) for bias in biases if bias is not None]
        return np.stack(found).reshape(shape) if found else np.zeros(shape, np.float32)

    def kv_spec(
        self,
        *,
        pages: int,
        page_size: int,
        dtype: DTypeLike | None = None,
        implementation: str | None = None,
    ) -> KVSpec:
        """Describes a page pool for this model.

        Args:
          pages: number of pages, page 0 included.
          page_size: token slots in a page.
          dtype: precision of K and V; None for that of the matrices.
          implementation: the kernels that will read the pool (see `kernels.dispatch`).
        """
        precision = self.dtype if dtype is None else jnp.dtype(dtype)
        return KVSpec(
            layers=self.config.num_hidden_layers,
            pages=pages,
            page_size=page_size,
            kv_heads=self.config.num_key_value_heads,
            head_dim=self.config.head_dim,
            storage=storage_dtype(precision, platform_of(implementation)),
        )


def load_model(
    source: str | os.PathLike[str], *, dtype: DTypeLike, progress: bool = False
) -> Model:
    """Loads a model.

    Args:
      source: a Hugging Face folder, a hub id, a GGUF file, or a folder that
        `scripts.convert_weights` wrote.
      dtype: float32 or bfloat16.
      progress: whether to draw a progress bar on stderr.

    Raises:
      CheckpointError: the source cannot be loaded. A model is never loaded in part.
    """
    return Model.from_checkpoint(load_checkpoint(source, dtype=dtype, progress=progress), dtype)

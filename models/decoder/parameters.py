"""Paths and shapes of the parameters of a decoder.

A parameter's path is its Hugging Face tensor name in Qwen models without the leading `model.`.
Matrices are [out, in] in every format. GGUF files of these models hold the same rows in the same
order: the query and key rows are not permuted.
"""

import numpy as np

from tokendance_jax.models.decoder.config import DecoderConfig


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by its path, in the order of the forward pass.

    Matrices are [out, in]. `lm_head.weight` is present only if the embedding is not tied.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for name, outputs in (("q", queries), ("k", keys), ("v", keys)):
        layer[f"self_attn.{name}_proj.weight"] = outputs, hidden
        if config.attention_bias:
            layer[f"self_attn.{name}_proj.bias"] = (outputs,)
    if config.qk_norm:
        layer |= {f"self_attn.{name}_norm.weight": (config.head_dim,) for name in "qk"}
    layer |= {
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_hidden_layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def parameter_dtype(shape: tuple[int, ...], dtype: np.dtype) -> np.dtype:
    """Returns the dtype in which a parameter is held: `dtype` for matrices, float32 for vectors."""
    return dtype if len(shape) == 2 else np.dtype(np.float32)

"""Names and shapes of the parameters of a Qwen2 model, here and in checkpoint files.

A parameter's path is its Hugging Face tensor name without the leading `model.`; matrices are
[out, in] in every format. GGUF files of this architecture hold the same rows in the same order:
the query and key rows are not permuted.
"""

import numpy as np

from tokendance_jax.models.qwen2.config import Qwen2Config

_GGUF_TOP = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def parameter_shapes(config: Qwen2Config) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by its path, in the order of the forward pass.

    Matrices are [out, in]. `lm_head.weight` is present only if the embedding is not tied.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.q_proj.bias": (queries,),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.k_proj.bias": (keys,),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.v_proj.bias": (keys,),
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


def hf_name(path: str) -> str:
    """Returns the Hugging Face tensor name of a parameter path."""
    return path if path == "lm_head.weight" else f"model.{path}"


def gguf_name(path: str) -> str:
    """Returns the GGUF tensor name of a parameter path."""
    if path in _GGUF_TOP:
        return _GGUF_TOP[path]
    _, index, rest = path.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{index}.{_GGUF_LAYER[module]}.{kind}"

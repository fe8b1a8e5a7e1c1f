"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from tokendance_jax.kernels.rope import Rope
from tokendance_jax.models.decoder.config import DecoderConfig
from tokendance_jax.models.families.family import Family

QWEN2 = Family(name="qwen2", architecture="Qwen2ForCausalLM", attention_bias=True, qk_norm=False)

# hidden, intermediate, layers, query heads, key/value heads, vocabulary, tied embedding
_PRESETS = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "14B": (5120, 13824, 48, 40, 8, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
    "72B": (8192, 29568, 80, 64, 8, 152064, False),
}


def preset(name: str) -> DecoderConfig:
    """Returns the sizes of a published Qwen2.5 Instruct model.

    Args:
      name: "0.5B", "1.5B", "3B", "7B", "14B", "32B" or "72B".

    Raises:
      ValueError: There is no preset of this name.
    """
    if name not in _PRESETS:
        raise ValueError(f"preset: no preset {name!r}; one of {', '.join(_PRESETS)}")
    hidden, intermediate, layers, heads, kv_heads, vocab, tied = _PRESETS[name]
    return QWEN2.config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=32768,
        rope=Rope(1e6),
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
    )

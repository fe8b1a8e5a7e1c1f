"""A small, fast Qwen2.5 with random weights and the demo's tokenizer. Its text is meaningless."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from tokendance_jax.demo import demo_chat_template, demo_tokenizer_json
from tokendance_jax.kernels.rope import Rope
from tokendance_jax.model import Model
from tokendance_jax.models.decoder.random import random_parameters
from tokendance_jax.models.families.qwen2 import QWEN2
from tokendance_jax.models.loading import Checkpoint
from tokendance_jax.prompt import Tokenizer

SMALL_CONFIG = QWEN2.config(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=8192,
    rope=Rope(1e6),
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
)


def small_model(dtype: DTypeLike) -> Model:
    """Makes the model, which is the same on every machine."""
    tokenizer = Tokenizer(demo_tokenizer_json())
    params = random_parameters(SMALL_CONFIG, dtype)
    # Tokens that are part of a character decode to U+FFFD. Their rows of the head are zero, so that
    # answers consist of whole characters.
    broken = [i for i in range(SMALL_CONFIG.vocab_size) if "\ufffd" in tokenizer.decode([i])]
    head = params["lm_head.weight"]
    params["lm_head.weight"] = head.at[jnp.asarray(broken)].set(jnp.zeros((), head.dtype))
    checkpoint = Checkpoint(
        config=SMALL_CONFIG,
        params=params,
        tokenizer_json=demo_tokenizer_json(),
        chat_template=demo_chat_template(),
        stop_ids=tuple(sorted(tokenizer.encode_markup("<|endoftext|><|im_end|>"))),
        name="small",
    )
    return Model.from_checkpoint(checkpoint, dtype)

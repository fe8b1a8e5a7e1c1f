"""Tiny random checkpoints in every format."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

from tokendance_jax.kernels.rope import Rope
from tokendance_jax.models.decoder.config import DecoderConfig
from tokendance_jax.models.decoder.parameters import parameter_shapes
from tokendance_jax.models.families.qwen2 import QWEN2
from tokendance_jax.models.families.registry import FAMILIES
from tokendance_jax.models.loading.gguf_tokenizer import tokenizer_from_gguf

# Rows of 256 values, the block size of k-quants and i-quants.
CONFIG = QWEN2.config(
    vocab_size=272,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=128,
    rope=Rope(1e6),
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
)
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
_ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"]
ENDOFTEXT, IM_START, IM_END, TOOL_CALL = range(259, 263)
TOKENS = [*_BYTES, "he", "ll", "hell", *_ADDED, *(f"[PAD{i}]" for i in range(263, 272))]
MERGES = ["h e", "l l", "he ll"]
TYPES = [1] * 259 + [3, 3, 3, 4] + [5] * 9
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}\n"
TOKENIZER_FIELDS: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.eos_token_id": IM_END,
}
GGUF_FIELDS: dict[str, Any] = {
    "general.name": "tiny",
    "qwen2.block_count": CONFIG.num_hidden_layers,
    "qwen2.context_length": CONFIG.max_position_embeddings,
    "qwen2.embedding_length": CONFIG.hidden_size,
    "qwen2.feed_forward_length": CONFIG.intermediate_size,
    "qwen2.attention.head_count": CONFIG.num_attention_heads,
    "qwen2.attention.head_count_kv": CONFIG.num_key_value_heads,
    "qwen2.rope.freq_base": CONFIG.rope.theta,
    "qwen2.attention.layer_norm_rms_epsilon": CONFIG.rms_norm_eps,
    "tokenizer.chat_template": TEMPLATE,
    **TOKENIZER_FIELDS,
}


def random_params(config: DecoderConfig) -> dict[str, np.ndarray]:
    """Returns float32 parameters that bfloat16 holds exactly."""
    rng = np.random.default_rng(0)
    return {
        path: rng.standard_normal(shape).astype(ml_dtypes.bfloat16).astype(np.float32)
        for path, shape in parameter_shapes(config).items()
    }


def tokenizer_json() -> str:
    return tokenizer_from_gguf(TOKENIZER_FIELDS, "tiny")


def hf_tensors(params: Mapping[str, np.ndarray], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    return {QWEN2.hf_name(path): array.astype(dtype) for path, array in params.items()}


def write_folder(
    folder: Path, config: DecoderConfig, shards: list[dict[str, np.ndarray]]
) -> dict[str, str]:
    """Writes a Hugging Face folder, with an index if there are several shards.

    Returns the index's map from tensors to files.
    """
    folder.mkdir()
    fields = FAMILIES[config.family].to_hf(config) | {"eos_token_id": ENDOFTEXT}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [IM_END, ENDOFTEXT]})
    )
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    shard_of = {}
    for index, tensors in enumerate(shards, 1):
        name = f"model-{index:05}-of-{len(shards):05}.safetensors"
        if len(shards) == 1:
            name = "model.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        shard_of |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    return shard_of


def write_gguf(
    file: Path,
    tensors: Mapping[str, tuple[np.ndarray, gguf.GGMLQuantizationType | None]],
    *,
    architecture: str = "qwen2",
    fields: Mapping[str, Any] = GGUF_FIELDS,
) -> None:
    """Writes a GGUF file. If a tensor has a type, its array holds the raw bytes of that type."""
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(
    params: Mapping[str, np.ndarray],
) -> dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType | None]]:
    return {QWEN2.gguf_name(path): (array, None) for path, array in params.items()}


def assert_params(
    loaded: Mapping[str, jax.Array], expected: Mapping[str, np.ndarray], dtype: str
) -> None:
    """Checks paths, types and exact values."""
    assert list(loaded) == list(expected)
    for path, array in expected.items():
        kind = np.dtype(dtype) if array.ndim == 2 else np.dtype(np.float32)
        assert loaded[path].dtype == kind, path
        np.testing.assert_array_equal(np.asarray(loaded[path]), array.astype(kind), err_msg=path)

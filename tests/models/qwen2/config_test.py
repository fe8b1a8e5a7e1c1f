import dataclasses
import math
from typing import Any

import pytest

from tokendance_jax.models.qwen2.config import Qwen2Config
from tokendance_jax.models.qwen2.errors import CheckpointError
from tokendance_jax.models.qwen2.parameters import gguf_name, hf_name, parameter_shapes

HF = Qwen2Config.preset("7B").to_hf()
GGUF: dict[str, Any] = {
    "general.architecture": "qwen2",
    "qwen2.block_count": 24,
    "qwen2.context_length": 32768,
    "qwen2.embedding_length": 896,
    "qwen2.feed_forward_length": 4864,
    "qwen2.attention.head_count": 14,
    "qwen2.attention.head_count_kv": 2,
    "qwen2.rope.freq_base": 1000000.0,
    "qwen2.attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
}


@pytest.mark.parametrize(
    ("name", "parameters", "tied"),
    [
        # Parameter counts of the published safetensors files.
        ("0.5B", 494_032_768, True),
        ("1.5B", 1_543_714_304, True),
        ("3B", 3_085_938_688, True),
        ("7B", 7_615_616_512, False),
        ("14B", 14_770_033_664, False),
        ("32B", 32_763_876_352, False),
        ("72B", 72_706_203_648, False),
    ],
)
def test_presets_have_the_published_sizes(name: str, parameters: int, tied: bool):
    config = Qwen2Config.preset(name)
    assert sum(map(math.prod, parameter_shapes(config).values())) == parameters
    assert config.tie_word_embeddings is tied
    assert ("lm_head.weight" in parameter_shapes(config)) is not tied
    layer = [
        shape for path, shape in parameter_shapes(config).items() if path.startswith("layers.0.")
    ]
    assert config.layer_weights == sum(math.prod(shape) for shape in layer if len(shape) == 2)


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'8B'.*0\.5B, 1\.5B"):
        Qwen2Config.preset("8B")


def test_hf_round_trip():
    config = Qwen2Config.preset("7B")
    assert Qwen2Config.from_hf(config.to_hf(), "config.json") == config


@pytest.mark.parametrize(
    "variant",
    [
        {"rope_scaling": None},
        {"rope_scaling": {}},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {"type": "default", "rope_type": "default", "factor": 4.0}},
        {"rope_scaling": {"rope_theta": 1e6, "factor": None}, "rope_theta": 5.0},
        {"rope_parameters": {"rope_theta": 1e6}, "rope_theta": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": None},
        {"head_dim": None},
        {"use_sliding_window": False, "sliding_window": 131072},
        {"layer_types": ["full_attention"] * 28},
        {"hidden_act": "silu"},
    ],
)
def test_hf_variants_of_the_same_model(variant: dict):
    fields = {key: value for key, value in (HF | variant).items() if value is not None}
    assert Qwen2Config.from_hf(fields, "config.json") == Qwen2Config.preset("7B")


def test_hf_leaves_out_untied():
    fields = {key: value for key, value in HF.items() if key != "tie_word_embeddings"}
    assert not Qwen2Config.from_hf(fields, "config.json").tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type: is 'llama'; only 'qwen2' is supported"),
        ({"model_type": "qwen3"}, "model_type: is 'qwen3'"),
        ({"hidden_act": "gelu"}, "hidden_act: is 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling: rope scaling 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling: rope scaling 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: rope scaling 'yarn'"),
        (
            {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 128}},
            "rope_scaling: rope scaling by factor, original_max_position_embeddings without a rope",
        ),
        (
            {"rope_parameters": {"rope_type": None, "rope_theta": 1e6, "factor": 4.0}},
            "rope_parameters: rope scaling by factor without a rope_type; only unscaled",
        ),
        (
            {"rope_scaling": {"rope_type": "default", "type": "yarn", "factor": 4.0}},
            "rope_scaling: rope scaling 'yarn'",
        ),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_parameters: rope_theta: is 0; must be"),
        ({"rope_scaling": "linear"}, "rope_scaling: is 'linear'; must be an object"),
        ({"use_sliding_window": True}, "use_sliding_window: sliding-window attention"),
        ({"layer_types": ["sliding_attention"]}, "layer_types: sliding-window attention"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config: "),
        ({"num_attention_heads": 0}, "num_attention_heads: is 0; must be a positive integer"),
        ({"hidden_size": "3584"}, "hidden_size: is '3584'"),
        ({"vocab_size": True}, "vocab_size: is True"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps: is -1.0; must be a positive number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: is 'no'; must be true or false"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide the 28"),
        ({"num_attention_heads": 24, "head_dim": None}, "hidden_size: 3584 is not divisible by 24"),
        ({"head_dim": 127}, "head_dim: 127 is odd"),
    ],
)
def test_hf_errors_name_file_and_field(change: dict, message: str):
    with pytest.raises(CheckpointError) as error:
        Qwen2Config.from_hf(HF | change, "here/config.json")
    assert str(error.value).startswith(f"here/config.json: {message}")


@pytest.mark.parametrize(
    "field",
    [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rope_theta",
        "rms_norm_eps",
    ],
)
def test_hf_missing_field(field: str):
    fields = {key: value for key, value in HF.items() if key != field}
    with pytest.raises(CheckpointError, match=f"config.json: {field}: the field is missing; "):
        Qwen2Config.from_hf(fields, "config.json")


def test_gguf_gives_the_preset():
    config = Qwen2Config.from_gguf(GGUF, "a.gguf", tied=True, vocab_size=151936)
    assert config == Qwen2Config.preset("0.5B")
    untied = Qwen2Config.from_gguf(GGUF, "a.gguf", tied=False, vocab_size=151936)
    assert untied == dataclasses.replace(config, tie_word_embeddings=False)


@pytest.mark.parametrize("key", GGUF)
def test_gguf_missing_field(key: str):
    fields = {name: value for name, value in GGUF.items() if name != key}
    with pytest.raises(CheckpointError, match=f"a.gguf: {key}: the field is missing; "):
        Qwen2Config.from_gguf(fields, "a.gguf", tied=True, vocab_size=151936)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "qwen3"}, "general.architecture: is 'qwen3'; only 'qwen2'"),
        ({"qwen2.rope.scaling.type": "yarn"}, "qwen2.rope.scaling.type: rope scaling 'yarn'"),
        ({"qwen2.rope.scaling.factor": 4.0}, "qwen2.rope.scaling.factor: rope scaling by 4.0"),
        ({"qwen2.rope.scale_linear": 2.0}, "qwen2.rope.scale_linear: rope scaling by 2.0 without"),
        ({"qwen2.attention.key_length": 128}, "qwen2.attention.value_length: is 64"),
        ({"qwen2.rope.dimension_count": 32}, "qwen2.rope.dimension_count: is 32"),
        ({"qwen2.attention.head_count_kv": 4}, "num_key_value_heads: 4 does not divide"),
    ],
)
def test_gguf_errors_name_file_and_field(change: dict, message: str):
    fields = GGUF | {"qwen2.attention.value_length": 64} | change
    with pytest.raises(CheckpointError) as error:
        Qwen2Config.from_gguf(fields, "a.gguf", tied=True, vocab_size=151936)
    assert str(error.value).startswith(f"a.gguf: {message}")


@pytest.mark.parametrize(
    "scaling",
    [
        {"qwen2.rope.scaling.type": "none", "qwen2.rope.scaling.factor": 4.0},
        {"qwen2.rope.scaling.factor": 1.0},
    ],
)
def test_gguf_accepts_unscaled_rope(scaling: dict[str, Any]):
    fields = GGUF | {"qwen2.attention.key_length": 64} | scaling
    config = Qwen2Config.from_gguf(fields, "a.gguf", tied=True, vocab_size=151936)
    assert config.head_dim == 64


@pytest.mark.parametrize(
    ("path", "hf", "gguf"),
    [
        ("embed_tokens.weight", "model.embed_tokens.weight", "token_embd.weight"),
        ("norm.weight", "model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "lm_head.weight", "output.weight"),
        (
            "layers.11.self_attn.q_proj.bias",
            "model.layers.11.self_attn.q_proj.bias",
            "blk.11.attn_q.bias",
        ),
        (
            "layers.0.post_attention_layernorm.weight",
            "model.layers.0.post_attention_layernorm.weight",
            "blk.0.ffn_norm.weight",
        ),
    ],
)
def test_names(path: str, hf: str, gguf: str):
    assert hf_name(path) == hf
    assert gguf_name(path) == gguf

import dataclasses
import math
from typing import Any

import pytest

from tokendance_jax.kernels.rope import Rope, Yarn
from tokendance_jax.models.decoder.config import DecoderConfig
from tokendance_jax.models.decoder.parameters import parameter_shapes
from tokendance_jax.models.errors import CheckpointError
from tokendance_jax.models.families.qwen2 import QWEN2, preset
from tokendance_jax.models.families.qwen3 import QWEN3
from tokendance_jax.models.families.registry import family_of

HF = QWEN2.to_hf(preset("7B"))
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
# As published with Qwen3-0.6B.
QWEN3_HF = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def from_hf(fields: dict, where: str = "config.json") -> DecoderConfig:
    return family_of(fields, "model_type", where).from_hf(fields, where)


def from_gguf(fields: dict) -> DecoderConfig:
    family = family_of(fields, "general.architecture", "a.gguf")
    return family.from_gguf(fields, "a.gguf", tied=True, vocab_size=151936)


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
    config = preset(name)
    assert sum(map(math.prod, parameter_shapes(config).values())) == parameters
    assert config.tie_word_embeddings is tied
    assert ("lm_head.weight" in parameter_shapes(config)) is not tied
    layer = [
        shape for path, shape in parameter_shapes(config).items() if path.startswith("layers.0.")
    ]
    assert config.layer_weights == sum(math.prod(shape) for shape in layer if len(shape) == 2)


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'8B'.*0\.5B, 1\.5B"):
        preset("8B")


def test_hf_round_trip():
    config = preset("7B")
    assert QWEN2.from_hf(QWEN2.to_hf(config), "config.json") == config


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
    assert QWEN2.from_hf(fields, "config.json") == preset("7B")


@pytest.mark.parametrize(
    ("scaling", "yarn"),
    [
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            Yarn(4.0, 32768),
        ),
        ({"rope_type": "yarn", "factor": 4, "truncate": True}, Yarn(4.0, 32768)),
        (
            {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16, "beta_slow": 2.0},
            Yarn(2.0, 32768, 16.0, 2.0),
        ),
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_yarn_makes_the_context_longer(scaling: dict, yarn: Yarn, key: str):
    config = QWEN2.from_hf(HF | {key: scaling}, "config.json")
    assert config == dataclasses.replace(
        preset("7B"),
        rope=Rope(1e6, yarn),
        max_position_embeddings=int(yarn.factor * 32768),
    )
    assert QWEN2.from_hf(QWEN2.to_hf(config), "config.json") == config


def test_hf_leaves_out_untied():
    fields = {key: value for key, value in HF.items() if key != "tie_word_embeddings"}
    assert not QWEN2.from_hf(fields, "config.json").tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "llama"},
            "model_type: is 'llama'; only 'qwen2' and 'qwen3' are supported",
        ),
        ({"attention_bias": False}, "attention_bias: is False; only True is supported"),
        ({"hidden_act": "gelu"}, "hidden_act: is 'gelu'"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling: rope scaling 'dynamic'; only unsc"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling: rope scaling 'llama3'"),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope_parameters: factor: the field is missing",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}},
            "rope_scaling: mscale: rope scaling 'yarn' with mscale 0.7; only unscaled",
        ),
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
            "rope_scaling: rope scaling 'default' and 'yarn'",
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
        from_hf(HF | change, "here/config.json")
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
        from_hf(fields)


def test_gguf_gives_the_preset():
    config = QWEN2.from_gguf(GGUF, "a.gguf", tied=True, vocab_size=151936)
    assert config == preset("0.5B")
    untied = QWEN2.from_gguf(GGUF, "a.gguf", tied=False, vocab_size=151936)
    assert untied == dataclasses.replace(config, tie_word_embeddings=False)


@pytest.mark.parametrize("key", GGUF)
def test_gguf_missing_field(key: str):
    fields = {name: value for name, value in GGUF.items() if name != key}
    with pytest.raises(CheckpointError, match=f"a.gguf: {key}: the field is missing; "):
        from_gguf(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "llama"}, "general.architecture: is 'llama'; only 'qwen2'"),
        ({"qwen2.rope.scaling.type": "linear"}, "qwen2.rope.scaling.type: rope scaling 'linear'"),
        ({"qwen2.rope.scaling.type": "yarn"}, "qwen2.rope.scaling.factor: the field is missing"),
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
        from_gguf(fields)
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
    config = QWEN2.from_gguf(fields, "a.gguf", tied=True, vocab_size=151936)
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
    assert QWEN2.hf_name(path) == hf
    assert QWEN2.gguf_name(path) == gguf


def test_qwen3_has_norms_in_place_of_biases():
    config = from_hf(QWEN3_HF)
    assert (config.family, config.attention_bias, config.qk_norm) == ("qwen3", False, True)
    assert (config.head_dim, config.num_attention_heads, config.hidden_size) == (128, 16, 1024)
    shapes = parameter_shapes(config)
    assert not any(path.endswith("bias") for path in shapes)
    for name in ("q_norm", "k_norm"):
        assert shapes[f"layers.27.self_attn.{name}.weight"] == (128,)
    # The published number of parameters.
    assert sum(map(math.prod, shapes.values())) == 596_049_920
    assert from_hf(QWEN3.to_hf(config)) == config
    assert QWEN3.gguf_name("layers.3.self_attn.q_norm.weight") == "blk.3.attn_q_norm.weight"


def test_qwen3_of_a_gguf_file():
    fields = {key.replace("qwen2", "qwen3"): value for key, value in GGUF.items()}
    fields |= {"general.architecture": "qwen3", "qwen3.attention.key_length": 128}
    config = from_gguf(fields)
    assert config == dataclasses.replace(
        preset("0.5B"), family="qwen3", attention_bias=False, qk_norm=True, head_dim=128
    )


def test_yarn_of_a_gguf_file():
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 32768}
    fields = GGUF | {f"qwen2.rope.scaling.{name}": value for name, value in scaling.items()}
    config = from_gguf(fields)
    assert config.rope == Rope(1e6, Yarn(4.0, 32768))
    assert config.max_position_embeddings == 131072

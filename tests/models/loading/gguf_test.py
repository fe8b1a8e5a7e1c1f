import sys
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize
from tokenizers import Tokenizer

from tests.models.loading import tiny
from tokendance_jax.models.families.qwen2 import QWEN2
from tokendance_jax.models.loading import CheckpointError, gguf_checkpoint, load_checkpoint, stored
from tokendance_jax.models.loading.gguf_tokenizer import (
    special_tokens_from_gguf,
    stop_ids_from_gguf,
    tokenizer_from_gguf,
)

PARAMS = tiny.random_params(tiny.CONFIG)
MATRIX = "layers.0.mlp.gate_proj.weight"
FLOATS = [("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)]
QUANTISED = [
    kind
    for kind in gguf.GGMLQuantizationType
    if kind.name not in {name for name, _ in FLOATS}
    and kind.name not in {"Q8_1", "Q8_K", "Q1_0", "I8", "I16", "I32", "I64", "F64"}
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loads(tmp_path: Path, dtype: str):
    file = tmp_path / "tiny.gguf"
    tiny.write_gguf(file, tiny.gguf_tensors(PARAMS))
    checkpoint = load_checkpoint(file, dtype=dtype)
    assert checkpoint.config == tiny.CONFIG
    assert checkpoint.name == "tiny"
    assert checkpoint.chat_template == tiny.TEMPLATE
    assert checkpoint.stop_ids == (tiny.ENDOFTEXT, tiny.IM_END)
    assert checkpoint.special_tokens == {"eos_token": "<|im_end|>"}
    tiny.assert_params(checkpoint.params, PARAMS, dtype)


@pytest.mark.parametrize("step", [-1, 1])  # unlike the embedding; equal to it
def test_output_matrix_is_the_head(tmp_path: Path, step: int):
    output = PARAMS["embed_tokens.weight"][::step]
    tensors = tiny.gguf_tensors(PARAMS | {"lm_head.weight": output})
    tiny.write_gguf(tmp_path / "a.gguf", tensors)
    checkpoint = load_checkpoint(tmp_path / "a.gguf", dtype=jnp.float32)
    assert not checkpoint.config.tie_word_embeddings
    tiny.assert_params(checkpoint.params, PARAMS | {"lm_head.weight": output}, "float32")


@pytest.mark.parametrize(("name", "kind"), FLOATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float_types(tmp_path: Path, name: str, kind: Any, dtype: str):
    # The values exceed bfloat16's precision, so that a wrong order of roundings would show.
    values = np.random.default_rng(1).standard_normal((256, 256)).astype(kind)
    tensors = tiny.gguf_tensors(PARAMS)
    tensors[QWEN2.gguf_name(MATRIX)] = values.view(np.uint8), gguf.GGMLQuantizationType[name]
    tiny.write_gguf(tmp_path / "a.gguf", tensors)
    params = load_checkpoint(tmp_path / "a.gguf", dtype=dtype).params
    np.testing.assert_array_equal(np.asarray(params[MATRIX]), values.astype(np.dtype(dtype)))


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_quantised_types(
    tmp_path: Path, kind: gguf.GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stored, "_SLICE_VALUES", 1024)  # many slices
    width, size = gguf.GGML_QUANT_SIZES[kind]
    # Bytes below 60 form finite float16 scales at any place in a block.
    data = np.random.default_rng(2).integers(0, 60, (256, 256 // width * size), np.uint8)
    tensors = tiny.gguf_tensors(PARAMS)
    tensors[QWEN2.gguf_name(MATRIX)] = data, kind
    tiny.write_gguf(tmp_path / "a.gguf", tensors)
    expected = dequantize(data, kind)
    for dtype in ("float32", "bfloat16"):
        params = load_checkpoint(tmp_path / "a.gguf", dtype=dtype).params
        tiny.assert_params(params, PARAMS | {MATRIX: expected}, dtype)


def test_scales_that_are_not_finite(tmp_path: Path):
    kind = gguf.GGMLQuantizationType.Q8_0
    width, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.zeros((256, 256 // width * size), np.uint8)
    data[255, -size:][:2] = 0, 0x7C  # the scale of the last block: infinity in float16
    tensors = tiny.gguf_tensors(PARAMS)
    tensors[QWEN2.gguf_name(MATRIX)] = data, kind
    tiny.write_gguf(tmp_path / "a.gguf", tensors)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path / "a.gguf", dtype="bfloat16")
    assert str(error.value).startswith(
        f"{tmp_path / 'a.gguf'}: {QWEN2.gguf_name(MATRIX)}: "
        "holds NaN or infinite numbers in bfloat16; "
    )


def test_tokenizer(tmp_path: Path):
    tiny.write_gguf(tmp_path / "a.gguf", tiny.gguf_tensors(PARAMS))
    checkpoint = load_checkpoint(tmp_path / "a.gguf", dtype="float32")
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json)
    text = "<|im_start|>hello é ½\n<tool_call>12<|im_end|>"
    ids = tokenizer.encode(text).ids
    assert ids[0] == tiny.IM_START
    assert ids[-1] == tiny.IM_END
    assert tiny.TOKENS.index("hell") in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    added = tokenizer.get_added_tokens_decoder()
    assert {i: token.special for i, token in added.items()} == {
        tiny.ENDOFTEXT: True,
        tiny.IM_START: True,
        tiny.IM_END: True,
        tiny.TOOL_CALL: False,
    }
    assert tokenizer.token_to_id("[PAD263]") is None
    # NFC turns the decomposed letter into the composed one.
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids


@pytest.mark.parametrize("name", ["deepseek-r1-qwen", "megrez", "kormo", "f2llmv2"])
def test_other_names_of_the_pre_tokenizer(name: str):
    fields = tiny.TOKENIZER_FIELDS | {"tokenizer.ggml.pre": name}
    assert tokenizer_from_gguf(fields, "a.gguf") == tiny.tokenizer_json()


def tokenizer_fields(changes: dict[str, int], **ids: int) -> dict[str, Any]:
    """Returns metadata with changed token types and the given special ids, such as `eot`."""
    types = [changes.get(token, kind) for token, kind in zip(tiny.TOKENS, tiny.TYPES, strict=True)]
    given = {f"tokenizer.ggml.{name}_token_id": value for name, value in ids.items()}
    return tiny.TOKENIZER_FIELDS | {"tokenizer.ggml.token_type": types} | given


NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED])
def test_ends_by_text_whatever_their_type(kind: int):
    fields = tokenizer_fields({"<|im_end|>": kind}, eos=tiny.ENDOFTEXT)
    assert stop_ids_from_gguf(fields, "a.gguf") == (tiny.ENDOFTEXT, tiny.IM_END)
    tokenizer = Tokenizer.from_str(tokenizer_from_gguf(fields, "a.gguf"))
    assert tokenizer.encode("<|im_end|>").ids == [tiny.IM_END]


def test_ends_by_id():
    fields = tokenizer_fields({}, eos=tiny.IM_END, eot=tiny.TOOL_CALL, eom=tiny.IM_START)
    ends = (tiny.ENDOFTEXT, tiny.IM_START, tiny.IM_END, tiny.TOOL_CALL)
    assert stop_ids_from_gguf(fields, "a.gguf") == ends


def test_a_word_that_reads_like_an_end_stays_a_word():
    tokens = [*tiny.TOKENS]
    tokens[tokens.index("he")] = "[EOS]"
    merges = ["[ EOS]", "ll hell"]
    fields = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges}
    assert stop_ids_from_gguf(tiny.TOKENIZER_FIELDS | fields, "a.gguf") == (
        tiny.ENDOFTEXT,
        tiny.IM_END,
    )


def test_special_tokens_by_the_names_of_templates():
    missing = 2**32 - 1
    fields = tokenizer_fields(
        {}, bos=tiny.ENDOFTEXT, eos=tiny.IM_END, padding=tiny.TOOL_CALL, unknown=missing
    )
    assert special_tokens_from_gguf(fields, "a.gguf") == {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<tool_call>",
    }


def without(fields: dict, key: str) -> dict:
    return {name: value for name, value in fields.items() if name != key}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (without(tiny.GGUF_FIELDS, "qwen2.block_count"), "qwen2.block_count: the field is missing"),
        (
            tiny.GGUF_FIELDS | {"qwen2.rope.scaling.type": "linear"},
            "qwen2.rope.scaling.type: rope scaling 'linear'",
        ),
        (
            tiny.GGUF_FIELDS | {"general.type": "adapter"},
            "general.type: an adapter; only whole models are supported: merge the adapter into",
        ),
        (tiny.GGUF_FIELDS | {"general.type": "mmproj"}, "general.type: is 'mmproj'; only 'model'"),
        (tiny.GGUF_FIELDS | {"split.count": 2}, "split.count: is one of 2 parts"),
        (
            tiny.GGUF_FIELDS | {"tokenizer.ggml.model": "llama"},
            "tokenizer.ggml.model: is 'llama'; only 'gpt2'",
        ),
        (
            tiny.GGUF_FIELDS | {"tokenizer.ggml.pre": "llama-bpe"},
            "tokenizer.ggml.pre: is 'llama-bpe'; only 'qwen2', 'deepseek-r1-qwen', ",
        ),
        (
            without(tiny.GGUF_FIELDS, "tokenizer.ggml.model"),
            "tokenizer.ggml.model: the field is missing",
        ),
        (
            without(tiny.GGUF_FIELDS, "tokenizer.ggml.tokens"),
            "tokenizer.ggml.tokens: the tokenizer is missing",
        ),
        (
            without(tiny.GGUF_FIELDS, "tokenizer.ggml.merges"),
            "tokenizer.ggml.merges: the tokenizer is missing",
        ),
        (
            tiny.GGUF_FIELDS | {"tokenizer.ggml.merges": ["h zz"]},
            "tokenizer.ggml.merges: not a valid BPE",
        ),
        (
            tiny.GGUF_FIELDS | {"tokenizer.ggml.merges": ["hz"]},
            "tokenizer.ggml.merges: not a valid BPE",
        ),
        (
            tiny.GGUF_FIELDS | {"tokenizer.ggml.token_type": [1, 3]},
            "tokenizer.ggml.token_type: has 2 entries; there are 272",
        ),
        (
            tiny.GGUF_FIELDS | {"tokenizer.ggml.token_type": [6] * 272},
            "tokenizer.ggml.token_type: token type 6",
        ),
        (
            without(tiny.GGUF_FIELDS, "tokenizer.ggml.eos_token_id"),
            "tokenizer.ggml.eos_token_id: the field is missing",
        ),
        (
            tiny.GGUF_FIELDS | {"tokenizer.ggml.eos_token_id": 272},
            "tokenizer.ggml.eos_token_id: is 272; it must be the id of one of 272 tokens",
        ),
        (
            tiny.GGUF_FIELDS | {"tokenizer.ggml.eot_token_id": 300},
            "tokenizer.ggml.eot_token_id: is 300; it must be the id of one of 272 tokens",
        ),
        (
            tiny.GGUF_FIELDS
            | {
                "tokenizer.ggml.tokens": [*tiny.TOKENS, "a b"],
                "tokenizer.ggml.token_type": [1] * 273,
            },
            "tokenizer: token 'a b' has id 272; the embedding has 272 rows",
        ),
    ],
)
def test_metadata_errors(tmp_path: Path, fields: dict, message: str):
    file = tmp_path / "a.gguf"
    tiny.write_gguf(file, tiny.gguf_tensors(PARAMS), fields=fields)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(file, dtype="float32")
    assert str(error.value).startswith(f"{file}: {message}")


def test_other_architecture(tmp_path: Path):
    file = tmp_path / "a.gguf"
    tiny.write_gguf(file, tiny.gguf_tensors(PARAMS), architecture="llama")
    with pytest.raises(CheckpointError, match=r"general.architecture: is 'llama'"):
        load_checkpoint(file, dtype="float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blk.1.attn_k.bias": None}, r"blk.1.attn_k.bias: the tensor is missing \(1 of 26 are\)"),
        ({"token_embd.weight": None}, "token_embd.weight: the tensor is missing"),
        (
            {"blk.0.attn_k.bias": np.zeros(64, np.float32)},
            r"blk.0.attn_k.bias: has shape \[64\]; the configuration asks for \[128\]",
        ),
        (
            {"blk.0.attn_q_norm.weight": np.zeros(64, np.float32)},
            r"blk.0.attn_q_norm.weight: unknown tensor \(1 in all\)",
        ),
        (
            {"blk.0.attn_q.weight.lora_a": np.zeros((2, 256), np.float32)},
            r"blk.0.attn_q.weight.lora_a: a tensor of an adapter; .* merge the adapter",
        ),
        (
            {"output_norm.weight": np.zeros(256, np.int32)},
            "output_norm.weight: tensor type 26 cannot be dequantised; F32, F16",
        ),
    ],
)
def test_tensor_errors(tmp_path: Path, change: dict, message: str):
    tensors: dict = tiny.gguf_tensors(PARAMS)
    tensors |= {name: (array, None) for name, array in change.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor[0] is not None}
    tiny.write_gguf(tmp_path / "a.gguf", tensors)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "a.gguf", dtype="float32")


def test_harmless_extra_tensor(tmp_path: Path):
    tensors = tiny.gguf_tensors(PARAMS) | {"rope_freqs.weight": (np.ones(32, np.float32), None)}
    tiny.write_gguf(tmp_path / "a.gguf", tensors)
    tiny.assert_params(
        load_checkpoint(tmp_path / "a.gguf", dtype="float32").params, PARAMS, "float32"
    )


def test_unsupported_row_width(tmp_path: Path):
    # The writer refuses such a tensor, so the test changes the type's number in the written file.
    file = tmp_path / "a.gguf"
    tiny.write_gguf(file, tiny.gguf_tensors(PARAMS))
    data = bytearray(file.read_bytes())
    name = b"blk.0.attn_k.bias"
    kind = data.index(name) + len(name) + 4 + 8
    data[kind : kind + 4] = gguf.GGMLQuantizationType.Q4_K.to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"blk.0.attn_k.bias: rows of 128 values; Q4_K needs"):
        load_checkpoint(file, dtype="float32")


def test_truncation(tmp_path: Path):
    whole = tmp_path / "whole.gguf"
    tiny.write_gguf(whole, tiny.gguf_tensors(PARAMS))
    data = whole.read_bytes()
    file = tmp_path / "cut.gguf"
    for size in (0, 3, 4, 20, 40, 1000, 5000):
        file.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"cut.gguf: header: the file ends inside"):
            load_checkpoint(file, dtype="float32")
    file.write_bytes(data[: len(data) - 100])
    with pytest.raises(CheckpointError, match=r"cut.gguf: \S+: its data end at byte .* truncated"):
        load_checkpoint(file, dtype="float32")


def test_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "a.gguf"
    tiny.write_gguf(file, tiny.gguf_tensors(PARAMS))

    def shrink(*arguments: Any, **keywords: Any) -> Any:
        file.write_bytes(file.read_bytes()[:-1])
        return stored.read_parameters(*arguments, **keywords)

    monkeypatch.setattr(gguf_checkpoint, "read_parameters", shrink)
    with pytest.raises(CheckpointError, match="the file became shorter while it was read"):
        load_checkpoint(file, dtype="float32")


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, b"GGML", "magic: not a GGUF file"),
        (4, (1).to_bytes(4, "little"), "version: is 1; little-endian GGUF of version 2 or 3"),
        (4, (3).to_bytes(4, "big"), "version: is 50331648"),
        (8, (2**60).to_bytes(8, "little"), "header: "),
        (24, (2**63).to_bytes(8, "little"), "header: the file ends inside its header"),
    ],
)
def test_damaged_header(tmp_path: Path, position: int, value: bytes, message: str):
    file = tmp_path / "a.gguf"
    tiny.write_gguf(file, tiny.gguf_tensors(PARAMS))
    data = bytearray(file.read_bytes())
    data[position : position + len(value)] = value
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"a.gguf: {message}"):
        load_checkpoint(file, dtype="float32")


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "a.gguf"
    tiny.write_gguf(file, tiny.gguf_tensors(PARAMS))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'tokendance-jax\[gguf\]'"):
        load_checkpoint(file, dtype="float32")


def test_progress_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny.write_gguf(tmp_path / "a.gguf", tiny.gguf_tensors(PARAMS))
    load_checkpoint(tmp_path / "a.gguf", dtype="float32", progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Loading weights" in captured.err
    load_checkpoint(tmp_path / "a.gguf", dtype="float32")
    assert capsys.readouterr().err == ""

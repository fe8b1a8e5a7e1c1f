import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from tests.models.loading import tiny
from tokendance_jax.models.loading import (
    CheckpointError,
    huggingface,
    load,
    load_checkpoint,
    safetensors_file,
    save_huggingface,
    stored,
)

PARAMS = tiny.random_params(tiny.CONFIG)
TENSORS = tiny.hf_tensors(PARAMS)
UNTIED = dataclasses.replace(tiny.CONFIG, tie_word_embeddings=False)


def split(tensors: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    items = list(tensors.items())
    return [dict(items[:10]), dict(items[10:])]


def load_error(source: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(source, dtype="float32")
    return str(error.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.write_folder(tmp_path / "tiny", tiny.CONFIG, [TENSORS])
    return tmp_path / "tiny"


@pytest.mark.parametrize("stored_as", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loads_every_type(
    tmp_path: Path, stored_as: Any, dtype: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stored, "_SLICE_VALUES", 1000)  # the last slice is shorter
    params = {path: array.astype(stored_as) for path, array in PARAMS.items()}
    tiny.write_folder(tmp_path / "tiny", tiny.CONFIG, [tiny.hf_tensors(params, stored_as)])
    checkpoint = load_checkpoint(tmp_path / "tiny", dtype=dtype)
    assert checkpoint.config == tiny.CONFIG
    assert checkpoint.name == "tiny"
    assert checkpoint.tokenizer_json == tiny.tokenizer_json()
    assert checkpoint.chat_template == tiny.TEMPLATE
    assert checkpoint.stop_ids == (tiny.ENDOFTEXT, tiny.IM_END)
    tiny.assert_params(checkpoint.params, params, dtype)


def test_loads_shards(tmp_path: Path):
    tiny.write_folder(tmp_path / "tiny", tiny.CONFIG, split(TENSORS))
    tiny.assert_params(
        load_checkpoint(tmp_path / "tiny", dtype=jnp.bfloat16).params, PARAMS, "bfloat16"
    )


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("path", ["layers.1.mlp.up_proj.weight", "layers.0.self_attn.k_proj.bias"])
def test_numbers_that_are_not_finite(
    tmp_path: Path, path: str, number: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stored, "_SLICE_VALUES", 1000)
    broken = PARAMS[path].copy()
    broken.flat[-1] = number
    tiny.write_folder(
        tmp_path / "tiny", tiny.CONFIG, split(tiny.hf_tensors(PARAMS | {path: broken}))
    )
    file = tmp_path / "tiny" / f"model-0000{1 + ('1' in path)}-of-00002.safetensors"
    assert load_error(tmp_path / "tiny").startswith(
        f"{file}: model.{path}: holds NaN or infinite numbers in float32; get the file again"
    )


def test_numbers_that_the_served_type_does_not_hold(tmp_path: Path):
    large = PARAMS["norm.weight"].copy(), PARAMS["embed_tokens.weight"].copy()
    for array in large:
        array.flat[3] = -3.4e38
    params = PARAMS | {"norm.weight": large[0], "embed_tokens.weight": large[1]}
    tiny.write_folder(tmp_path / "tiny", tiny.CONFIG, [tiny.hf_tensors(params)])
    tiny.assert_params(
        load_checkpoint(tmp_path / "tiny", dtype="float32").params, params, "float32"
    )
    message = "model.embed_tokens.weight: holds NaN or infinite numbers in bfloat16"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "tiny", dtype="bfloat16")


def test_untied(tmp_path: Path):
    params = PARAMS | {"lm_head.weight": PARAMS["embed_tokens.weight"] + 1}
    tiny.write_folder(tmp_path / "tiny", UNTIED, [tiny.hf_tensors(params)])
    tiny.assert_params(
        load_checkpoint(tmp_path / "tiny", dtype="float32").params, params, "float32"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored_as", [np.float32, ml_dtypes.bfloat16])
def test_harmless_extra_tensors(
    tmp_path: Path, stored_as: Any, dtype: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stored, "_SLICE_VALUES", 1000)
    extra = {
        "lm_head.weight": TENSORS["model.embed_tokens.weight"].astype(stored_as),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(32, np.float32),
    }
    tiny.write_folder(tmp_path / "tiny", tiny.CONFIG, [TENSORS | extra])
    checkpoint = load_checkpoint(tmp_path / "tiny", dtype=dtype)
    assert checkpoint.config == tiny.CONFIG
    tiny.assert_params(checkpoint.params, PARAMS, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_that_differs_from_the_embedding_is_used(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stored, "_SLICE_VALUES", 1000)
    head = PARAMS["embed_tokens.weight"].copy()
    head[-1, -1] += 1  # in the last slice
    params = PARAMS | {"lm_head.weight": head}
    tiny.write_folder(tmp_path / "tiny", tiny.CONFIG, [tiny.hf_tensors(params)])
    checkpoint = load_checkpoint(tmp_path / "tiny", dtype=dtype)
    assert checkpoint.config == UNTIED
    tiny.assert_params(checkpoint.params, params, dtype)


@pytest.mark.parametrize("dtype", ["float16", "int8", "float64"])
def test_other_target_type(folder: Path, dtype: str):
    with pytest.raises(ValueError, match=f"dtype is {dtype}; float32 and bfloat16"):
        load_checkpoint(folder, dtype=dtype)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (
            tiny.CONFIG,
            {"model.norm.weight": None},
            "model.norm.weight: the tensor is missing (1 of 26",
        ),
        (UNTIED, {}, "lm_head.weight: the tensor is missing"),
        (
            tiny.CONFIG,
            {"model.norm.weight": np.zeros(8, np.float32)},
            "model.norm.weight: has shape [8]; the configuration asks for [256]",
        ),
        (
            tiny.CONFIG,
            {"model.layers.2.mlp.up_proj.weight": np.zeros(8, np.float32)},
            "model.layers.2.mlp.up_proj.weight: unknown tensor (1 in all)",
        ),
        (
            tiny.CONFIG,
            {"lm_head.weight": np.zeros((8, 256), np.float32)},
            "lm_head.weight: has shape [8, 256]; the configuration asks for [272, 256]",
        ),
        (
            tiny.CONFIG,
            {"model.layers.0.mlp.up_proj.lora_A.weight": np.zeros((2, 256), np.float32)},
            "model.layers.0.mlp.up_proj.lora_A.weight: a tensor of an adapter; only whole models",
        ),
        (
            tiny.CONFIG,
            {"base_model.model.model.norm.weight": np.zeros(256, np.float32)},
            "base_model.model.model.norm.weight: a tensor of an adapter; only whole models",
        ),
    ],
)
def test_wrong_tensors(tmp_path: Path, config: Any, change: dict, message: str):
    tensors = {name: array for name, array in (TENSORS | change).items() if array is not None}
    tiny.write_folder(tmp_path / "tiny", config, [tensors])
    assert load_error(tmp_path / "tiny").startswith(f"{tmp_path / 'tiny'}: {message}")


@pytest.mark.parametrize("model", [False, True], ids=["alone", "beside a model"])
def test_adapter(folder: Path, model: bool):
    if not model:
        for file in folder.iterdir():
            file.unlink()
    file = folder / "adapter_model.safetensors"
    save_file({"base_model.model.lora_A.weight": np.zeros((2, 8), np.float32)}, file)
    assert load_error(folder).startswith(
        f"{folder}: adapter_model.safetensors: an adapter of its base model; only whole models are "
        "supported: merge the adapter into its base model first"
    )
    config = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "some/base"})
    (folder / "adapter_config.json").write_text(config)
    assert load_error(folder).startswith(f"{folder}: adapter_config.json: an adapter of some/base;")


def test_nothing_is_read_before_every_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "tiny"
    head = {"lm_head.weight": TENSORS["model.embed_tokens.weight"]}
    tiny.write_folder(folder, tiny.CONFIG, [TENSORS | head])

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was read")

    (folder / "tokenizer.json").unlink()
    monkeypatch.setattr(stored, "_read", fail)
    monkeypatch.setattr(huggingface, "equal_values", fail)
    assert "tokenizer.json: the tokenizer: the file is missing" in load_error(folder)


def test_unsupported_tensor_type(folder: Path):
    file = folder / "model.safetensors"
    save_file(TENSORS | {"model.norm.weight": np.zeros(256, np.int32)}, file)
    assert load_error(folder) == (
        f"{file}: model.norm.weight: has type I32; F32, F16, BF16 are supported"
    )


def assert_unreadable(folder: Path) -> None:
    # The text in parentheses comes from the package and differs between its releases.
    message = load_error(folder)
    assert message.startswith(
        f"{folder / 'model.safetensors'}: safetensors: the file cannot be read ("
    )
    assert message.endswith("); it is truncated or damaged: download it again")


def test_truncated_file(folder: Path):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for wrong in (b"", data[:7], data[:8], data[:100], data[:-1], data + b"\0"):
        file.write_bytes(wrong)
        assert_unreadable(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32"}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}}',
        b"\xff\xfe",
    ],
)
def test_damaged_header(folder: Path, header: bytes):
    file = folder / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert_unreadable(folder)


def test_file_that_shrinks_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch):
    file = folder / "model.safetensors"
    opened = []

    def cut_at_third(*arguments: Any, **keywords: Any) -> Any:
        opened.append(arguments)
        if len(opened) == 3:  # the header and one slice are read
            file.write_bytes(file.read_bytes()[:-1])
        return safetensors.safe_open(*arguments, **keywords)

    monkeypatch.setattr(safetensors_file, "safe_open", cut_at_third)
    assert_unreadable(folder)
    assert len(opened) == 3


def test_missing_shard(tmp_path: Path):
    tiny.write_folder(tmp_path / "tiny", tiny.CONFIG, split(TENSORS))
    (tmp_path / "tiny" / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: the file is missing" in load_error(tmp_path / "tiny")


def test_index_that_does_not_match(tmp_path: Path):
    folder = tmp_path / "tiny"
    shard_of = tiny.write_folder(folder, tiny.CONFIG, split(TENSORS))
    index = folder / "model.safetensors.index.json"
    moved = shard_of | {"model.norm.weight": "model-00001-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": moved}))
    assert load_error(folder).startswith(
        f"{folder}/model-00001-of-00002.safetensors: model.norm.weight: the tensor is missing"
    )
    index.write_text(json.dumps({"weight_map": [1]}))
    assert load_error(folder).startswith(f"{index}: weight_map: ")


def test_no_weights_or_several_without_index(folder: Path):
    save_file(TENSORS, folder / "other.safetensors")
    assert "*.safetensors: 2 files and no model.safetensors.index.json" in load_error(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert "*.safetensors: 0 files" in load_error(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_missing_file(folder: Path, name: str):
    (folder / name).unlink()
    assert load_error(folder).startswith(f"{folder / name}: ")


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_malformed_json(folder: Path, name: str, content: bytes):
    (folder / name).write_bytes(content)
    assert load_error(folder).startswith(f"{folder / name}: ")


def test_malformed_tokenizer(folder: Path):
    (folder / "tokenizer.json").write_text("{}")
    assert load_error(folder).startswith(f"{folder}: tokenizer: malformed (")


def test_tokenizer_of_another_model(tmp_path: Path):
    config = dataclasses.replace(tiny.CONFIG, vocab_size=260)
    params = tiny.hf_tensors(tiny.random_params(config))
    tiny.write_folder(tmp_path / "tiny", config, [params])
    assert "token '<tool_call>' has id 262; the embedding has 260 rows" in load_error(
        tmp_path / "tiny"
    )


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, None),
        ("plain", "plain"),
        ([{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}], "b"),
    ],
)
def test_chat_template_of_tokenizer_config(folder: Path, template: Any, expected: str | None):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert load_checkpoint(folder, dtype="float32").chat_template == expected


def test_chat_template_file_comes_first(folder: Path):
    (folder / "chat_template.jinja").write_text("own file")
    assert load_checkpoint(folder, dtype="float32").chat_template == "own file"
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert load_checkpoint(folder, dtype="float32").chat_template is None


@pytest.mark.parametrize("template", [3, [], ["a"], [{"name": "rag", "template": "a"}]])
def test_malformed_chat_template(folder: Path, template: Any):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert "chat_template: no default template" in load_error(folder)


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("<|im_end|>", "eos_token_id: is ['<|im_end|>']; must be one id or a list"),
        ([], "eos_token_id: is []; must be one id or a list"),
        (272, "eos_token_id: is 272; the embedding has 272 rows"),
    ],
)
def test_malformed_stop_ids(folder: Path, stop: Any, message: str):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    assert message in load_error(folder)


@pytest.mark.parametrize("source", ["no/such/folder", "./nothing", "/nothing", "a/b.gguf", "x"])
def test_missing_source(source: str):
    assert load_error(source).startswith(f"{source}: source: there is no such file or folder; ")


def test_no_such_home_folder():
    assert load_error("~nobody at all/x").startswith("~nobody at all/x: source: there is no such")


def test_hub(folder: Path, monkeypatch: pytest.MonkeyPatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked[repo_id] = allow_patterns
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    checkpoint = load_checkpoint("some-org/tiny-0.5B", dtype="float32")
    assert checkpoint.name == "some-org/tiny-0.5B"
    assert asked == {"some-org/tiny-0.5B": load._HUB_FILES}


def test_hub_that_fails(monkeypatch: pytest.MonkeyPatch):
    hub = pytest.importorskip("huggingface_hub")

    def snapshot_download(repo_id: str, **_: object) -> str:
        raise hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert "the hub cannot provide it (offline); check the path or hub id" in load_error("org/none")


def test_hub_without_its_client(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'tokendance-jax[hub]'" in load_error("org/name")


def test_writes_what_it_reads(tmp_path: Path):
    tiny.write_folder(tmp_path / "tiny", tiny.CONFIG, [TENSORS])
    checkpoint = load_checkpoint(tmp_path / "tiny", dtype="bfloat16")
    checkpoint = dataclasses.replace(checkpoint, special_tokens={"bos_token": "<|im_start|>"})
    save_huggingface(checkpoint, tmp_path / "again")
    again = load_checkpoint(tmp_path / "again", dtype="bfloat16")
    rounded = {path: np.asarray(a).astype(ml_dtypes.bfloat16) for path, a in PARAMS.items()}
    tiny.assert_params(again.params, rounded, "bfloat16")
    for field in ("config", "tokenizer_json", "chat_template", "stop_ids"):
        assert getattr(again, field) == getattr(checkpoint, field)
    with safetensors.safe_open(tmp_path / "again" / "model.safetensors", "numpy") as content:
        assert {content.get_slice(name).get_dtype() for name in content.keys()} == {"BF16"}  # noqa: SIM118
    # Other loaders read the template and the end token from this file.
    fields = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert fields["chat_template"] == tiny.TEMPLATE
    assert fields["eos_token"] == "<|im_end|>"
    assert again.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    with pytest.raises(CheckpointError, match="target: exists already"):
        save_huggingface(checkpoint, tmp_path / "again")

"""A checkpoint of Qwen3 with a longer context, in every format."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.models.decoder.tiny import QWEN3 as QWEN3_FIELDS
from tests.models.loading import tiny
from tokendance_jax.kernels.rope import Rope, Yarn
from tokendance_jax.models.errors import CheckpointError
from tokendance_jax.models.families.qwen3 import QWEN3
from tokendance_jax.models.loading import load_checkpoint, save_huggingface, save_orbax

CONFIG = dataclasses.replace(
    tiny.CONFIG,
    **QWEN3_FIELDS,
    rope=Rope(1e6, Yarn(4.0, 128)),
    max_position_embeddings=512,
)
PARAMS = tiny.random_params(CONFIG)


@pytest.fixture
def folder(tmp_path):
    tiny.write_folder(tmp_path / "folder", CONFIG, [tiny.hf_tensors(PARAMS)])
    return tmp_path / "folder"


def test_a_folder_and_what_is_saved_of_it(folder, tmp_path):
    loaded = load_checkpoint(folder, dtype="float32")
    assert loaded.config == CONFIG
    tiny.assert_params(loaded.params, PARAMS, "float32")
    save_orbax(loaded, tmp_path / "orbax")
    save_huggingface(loaded, tmp_path / "saved")
    for name in ("orbax", "saved"):
        again = load_checkpoint(tmp_path / name, dtype="float32")
        assert again.config == CONFIG
        assert jax.tree.all(jax.tree.map(np.array_equal, again.params, loaded.params))


def test_a_gguf_file(tmp_path):
    fields = {key.replace("qwen2.", "qwen3."): x for key, x in tiny.GGUF_FIELDS.items()}
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 128}
    fields |= {f"qwen3.rope.scaling.{name}": value for name, value in scaling.items()}
    tiny.write_gguf(
        tmp_path / "a.gguf", tiny.gguf_tensors(PARAMS), architecture="qwen3", fields=fields
    )
    loaded = load_checkpoint(tmp_path / "a.gguf", dtype="float32")
    assert loaded.config == CONFIG
    tiny.assert_params(loaded.params, PARAMS, "float32")


@pytest.mark.parametrize(
    "path", ["layers.1.self_attn.q_norm.weight", "layers.0.mlp.up_proj.weight"]
)
def test_a_missing_tensor_is_named(tmp_path, path):
    params = {name: x for name, x in PARAMS.items() if name != path}
    tiny.write_folder(tmp_path / "folder", CONFIG, [tiny.hf_tensors(params)])
    with pytest.raises(CheckpointError, match=f"{QWEN3.hf_name(path)}: the tensor is missing"):
        load_checkpoint(tmp_path / "folder", dtype="float32")


def test_biases_are_refused(tmp_path):
    bias = {"layers.0.self_attn.q_proj.bias": np.zeros(256, np.float32)}
    tiny.write_folder(tmp_path / "folder", CONFIG, [tiny.hf_tensors(PARAMS | bias)])
    with pytest.raises(CheckpointError, match=r"q_proj.bias: unknown tensor"):
        load_checkpoint(tmp_path / "folder", dtype="float32")

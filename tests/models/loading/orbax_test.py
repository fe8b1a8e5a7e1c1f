import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from tests.models.loading import tiny
from tokendance_jax.models.families.family import Family
from tokendance_jax.models.loading import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    save_orbax,
)

PARAMS = tiny.random_params(tiny.CONFIG)
ROOT = Path(__file__).resolve().parents[3]


def checkpoint(dtype: Any, params: dict[str, np.ndarray] = PARAMS) -> Checkpoint:
    return Checkpoint(
        config=dataclasses.replace(tiny.CONFIG, tie_word_embeddings="lm_head.weight" not in params),
        params={
            path: jax.device_put(array.astype(dtype if array.ndim == 2 else np.float32))
            for path, array in params.items()
        },
        tokenizer_json=tiny.tokenizer_json(),
        chat_template="a\r\nb\n",
        stop_ids=(tiny.ENDOFTEXT, tiny.IM_END),
        name="saved",
        special_tokens={
            "bos_token": "<|im_start|>",
            "image_token": "<tool_call>",
            "fim": "<|endoftext|>",
            "additional_special_tokens": ("<|im_end|>", "<tool_call>"),
        },
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_orbax(checkpoint(np.float32), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_round_trip_is_exact(tmp_path: Path, dtype: Any):
    params = {path: array * np.float32(1.001) for path, array in PARAMS.items()}
    params["lm_head.weight"] = params["embed_tokens.weight"] + 1
    original = checkpoint(dtype, params)
    target = tmp_path / "new" / "saved"
    save_orbax(original, target)
    assert [path.name for path in target.parent.iterdir()] == ["saved"]
    loaded = load_checkpoint(target, dtype=dtype)
    assert dataclasses.replace(loaded, params={}) == dataclasses.replace(original, params={})
    expected = {path: np.asarray(array) for path, array in original.params.items()}
    tiny.assert_params(loaded.params, expected, np.dtype(dtype).name)


def test_converts_on_loading(tmp_path: Path):
    params = {path: array * np.float32(1.001) for path, array in PARAMS.items()}
    save_orbax(checkpoint(np.float32, params), tmp_path / "saved")
    loaded = load_checkpoint(tmp_path / "saved", dtype="bfloat16")
    tiny.assert_params(loaded.params, params, "bfloat16")


def test_without_chat_template(tmp_path: Path):
    save_orbax(dataclasses.replace(checkpoint(np.float32), chat_template=None), tmp_path / "saved")
    assert load_checkpoint(tmp_path / "saved", dtype="float32").chat_template is None


def test_existing_target_is_kept(tmp_path: Path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "mine").touch()
    with pytest.raises(CheckpointError, match="saved: target: exists already; name a new folder"):
        save_orbax(checkpoint(np.float32), tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["mine"]


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(Family, "to_hf", fail)
    with pytest.raises(OSError, match="disk full"):
        save_orbax(checkpoint(np.float32), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("path", ["norm.weight", "layers.1.mlp.up_proj.weight"])
def test_numbers_that_are_not_finite(tmp_path: Path, path: str, dtype: str):
    broken = PARAMS[path].copy()
    broken.flat[-1] = np.nan
    save_orbax(checkpoint(np.float32, PARAMS | {path: broken}), tmp_path / "saved")
    kind = dtype if path.endswith("up_proj.weight") else "float32"
    message = f"params: {path}: holds NaN or infinite numbers in {kind}; get the file again"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "saved", dtype=dtype)


def load_error(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(folder, dtype="float32")
    return str(error.value)


def test_missing_params(saved: Path):
    shutil.rmtree(saved / "params")
    assert "*.safetensors: 0 files" in load_error(saved)


@pytest.mark.parametrize("damage", ["empty", "no metadata"])
def test_damaged_params(saved: Path, damage: str):
    params = saved / "params"
    if damage == "empty":
        shutil.rmtree(params)
        params.mkdir()
    else:
        (params / "_METADATA").unlink()
    assert load_error(saved).startswith(f"{params}: arrays: cannot be restored (")


def test_params_of_another_configuration(saved: Path):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"intermediate_size": 512}))
    assert load_error(saved).startswith(
        f"{saved}/params: layers.0.mlp.gate_proj.weight: has shape [256, 256]; "
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_missing_file(saved: Path, name: str):
    (saved / name).unlink()
    assert load_error(saved).startswith(f"{saved / name}: ")


def convert(source: Path, target: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.convert_weights"]
    return subprocess.run(
        [*command, f"--source={source}", f"--target={target}", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_script_converts(tmp_path: Path):
    tiny.write_gguf(tmp_path / "a.gguf", tiny.gguf_tensors(PARAMS))
    result = convert(tmp_path / "a.gguf", tmp_path / "saved")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("tiny: 26 arrays, ")
    tiny.assert_params(
        load_checkpoint(tmp_path / "saved", dtype="bfloat16").params, PARAMS, "bfloat16"
    )
    again = convert(tmp_path / "a.gguf", tmp_path / "saved", "--dtype=float32")
    assert again.returncode == 1
    assert again.stderr == (
        f"convert_weights: {tmp_path / 'saved'}: target: exists already; name a new folder\n"
    )


@pytest.mark.slow
def test_script_reports_a_missing_source(tmp_path: Path):
    result = convert(tmp_path / "none.gguf", tmp_path / "saved")
    assert result.returncode == 1
    assert "none.gguf: source: there is no such file or folder; " in result.stderr
    assert not (tmp_path / "saved").exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut data", "no data"])
def test_script_reports_damaged_data(saved: Path, tmp_path: Path, damage: str):
    # Loads in a separate process, as Orbax's other reads fail in threads at any later time.
    params = saved / "params"
    if damage == "cut data":
        for file in params.rglob("d/*"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        shutil.rmtree(params / "d")
        shutil.rmtree(params / "ocdbt.process_0")
        (params / "manifest.ocdbt").unlink()
    result = convert(saved, tmp_path / "again")
    assert result.returncode == 1
    assert f"convert_weights: {params}: arrays: cannot be restored (" in result.stderr
    assert not (tmp_path / "again").exists()

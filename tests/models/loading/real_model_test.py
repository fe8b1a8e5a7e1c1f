"""Loads the real Qwen2.5-Coder-0.5B-Instruct."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.models.loading import tiny
from tests.shared_data import real_checkpoint, real_gguf, shared_dir
from tokendance_jax.models.loading import Checkpoint

pytestmark = pytest.mark.real_model

# Prints how much the load raises the resident high-water mark; runs in a separate process. On Linux
# a forked child inherits its parent's mark, so the script resets the mark first.
_MEASURE = """
import json, re, sys
import jax
from tokendance_jax.models.loading import load_checkpoint

def memory(field):
    with open("/proc/self/status") as status:
        return int(re.search(field + r":\\s+(\\d+) kB", status.read()).group(1)) * 1024

jax.device_put(1.0).block_until_ready()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = memory("VmRSS")
checkpoint = load_checkpoint(sys.argv[1], dtype=sys.argv[2])
jax.block_until_ready(checkpoint.params)
size = sum(array.nbytes for array in checkpoint.params.values())
print(json.dumps({"growth": memory("VmHWM") - before, "size": size}))
"""


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return real_checkpoint("bfloat16")


@pytest.fixture(scope="module")
def huggingface_folder(
    checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A folder with the real weights in one bfloat16 safetensors file and the files of `tiny`."""
    folder = tmp_path_factory.mktemp("real") / "folder"
    params = {path: np.asarray(array) for path, array in checkpoint.params.items()}
    tiny.write_folder(folder, checkpoint.config, [tiny.hf_tensors(params, ml_dtypes.bfloat16)])
    yield folder
    shutil.rmtree(folder)  # more than a gigabyte, which pytest would keep


def test_is_untied_and_complete(checkpoint: Checkpoint):
    assert checkpoint.config.num_hidden_layers == 24
    assert not checkpoint.config.tie_word_embeddings
    assert len(checkpoint.params) == 291
    assert checkpoint.stop_ids == (151643, 151645)
    assert checkpoint.chat_template is not None
    assert all(bool(np.isfinite(array).all()) for array in checkpoint.params.values())


@pytest.mark.parametrize("name", ["public_short", "public_round"])
def test_token_ids(checkpoint: Checkpoint, name: str):
    golden = np.load(shared_dir() / "golden" / f"{name}.npz")
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json)
    ids = tokenizer.encode(str(golden["text"]), add_special_tokens=False).ids
    assert ids == golden["input_ids"].tolist()
    assert tokenizer.decode(ids, skip_special_tokens=False) == str(golden["text"])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("source", "dtype"), [("gguf", "float32"), ("safetensors", "bfloat16")])
def test_peak_memory(source: str, dtype: str, request: pytest.FixtureRequest):
    path = real_gguf() if source == "gguf" else request.getfixturevalue("huggingface_folder")
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path), dtype],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    memory = json.loads(result.stdout)
    assert memory["growth"] < 1.3 * memory["size"]
    # The measured growth includes the arrays.
    assert memory["growth"] > 0.9 * memory["size"]

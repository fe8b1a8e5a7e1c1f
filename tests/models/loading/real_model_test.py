"""Loads the real Qwen2.5-Coder-0.5B-Instruct."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.shared_data import real_gguf, shared_dir
from tokendance_jax.models.loading import Checkpoint, load_checkpoint

pytestmark = pytest.mark.real_model

# Growth of the resident high-water mark during the load, in a process of its own. Linux counts a
# forked child's mark from its parent's, so the mark is reset first.
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
    return load_checkpoint(real_gguf(), dtype="bfloat16")


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
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory(dtype: str):
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(real_gguf()), dtype],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    memory = json.loads(result.stdout)
    assert memory["growth"] < 1.3 * memory["size"]
    # The measure sees the arrays at all.
    assert memory["growth"] > 0.9 * memory["size"]

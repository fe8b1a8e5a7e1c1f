import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import ragged_paged_attention

from scripts.reports import kernel_rivals
from scripts.reports.kernel_work import Work
from tokendance_jax.kernels.round_attention.reference import round_attention_reference
from tokendance_jax.models.families.qwen2 import preset

ROOT = Path(__file__).resolve().parents[3]
KERNELS = [
    "sparse_restore",
    "page_diff",
    "round_attention",
    "decode_attention",
    "kv_write",
    "attention_mass",
]
SIZES = "--agents=3", "--shared=256", "--own=256", "--rows=20", "--layers=2", "--turns=2"
# Runs the script with a kernel that returns wrong values.
_WRONG = """
import sys
from absl import app
from scripts.reports import bench_kernels, kernel_subjects

right = kernel_subjects.kv_write
kernel_subjects.kv_write = lambda kv, layer, slot, k, v: right(kv, layer, slot, 2 * k, v)
sys.argv[0] = "bench_kernels"
app.run(bench_kernels.main)
"""


def run(target, *arguments):
    return subprocess.run(
        [sys.executable, *arguments, *SIZES, f"--json={target}"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_times_what_gives_the_values_of_the_reference(tmp_path):
    target = tmp_path / "result.json"
    command = "-m", "scripts.reports.bench_kernels", "--dtype=bfloat16"
    done = run(target, *command)
    assert done.returncode == 0, done.stderr
    rows = json.loads(target.read_text())["kernels"]
    timed = [
        (row["dtype"], row["kernel"], row["implementation"]) for row in rows if not row["reason"]
    ]
    assert timed == [
        ("bfloat16", kernel, way)
        for kernel in KERNELS
        for way in (["xla", "three steps"] if kernel == "sparse_restore" else ["xla"])
    ]
    for row in rows:
        if not row["reason"]:
            assert len(row["seconds"]) == 2
            assert row["bytes_per_s"] > 0
            assert row["error"] <= 1e-2
    # The script says why it has no times of JAX's ops, which run on other devices.
    assert (
        "decode_attention, jax gpu.paged_attention: it is for a gpu, this is a cpu" in done.stdout
    )


@pytest.mark.slow
def test_wrong_values_get_no_time(tmp_path):
    target = tmp_path / "result.json"
    done = run(target, "-c", _WRONG, "--kernel=kv_write", "--dtype=float32")
    assert done.returncode == 1
    assert "kv_write by xla: not the values of the reference" in done.stderr
    assert "wrong values: an error of" in done.stdout
    assert not target.exists()


def work(heads, kv_heads, head_dim, dtype="bfloat16"):
    config = dataclasses.replace(
        preset("0.5B"),
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )
    return Work(config, dtype, page_size=16, agents=2, shared=256, own=256, rows=20)


def check(work, call, arguments, rows, position, lane):
    """Compares a rival with the reference, over a copy of the base for each agent."""
    q = work.queries(rows)
    expected = work.expected(round_attention_reference, q, 1, position, lane)
    assert abs(call(q, *arguments, layer=1) - expected).max() < 1e-2 * abs(expected).max()


def check_decode(work, attend):
    call = jax.jit(attend.call, static_argnames="layer")
    check(work, call, attend.arguments, work.agents, work.last, np.arange(work.agents))


@pytest.mark.sweep
def test_jax_attention_for_gpus_reads_the_same_round():
    round_ = work(heads=4, kv_heads=2, head_dim=64)
    check_decode(round_, kernel_rivals.gpu_paged_attention(round_, interpret=True))


@pytest.mark.sweep
def test_jax_attention_for_tpus_reads_the_same_round():
    round_ = work(heads=4, kv_heads=2, head_dim=128)
    # It mixes dtypes.
    with pltpu.force_tpu_interpret_mode(), jax.numpy_dtype_promotion("standard"):
        check_decode(round_, kernel_rivals.tpu_paged_attention(round_))


@pytest.mark.sweep
def test_jax_prefill_attention_for_tpus_reads_the_same_round(monkeypatch):
    # Calls the reference of JAX's op, because the simulator of TPU kernels cannot run the op.
    reference = ragged_paged_attention.ref_ragged_paged_attention
    monkeypatch.setattr(ragged_paged_attention, "ragged_paged_attention", reference)
    round_ = work(heads=4, kv_heads=2, head_dim=128)
    attend, plan = kernel_rivals.tpu_ragged_paged_attention(round_), round_.prefill
    with jax.numpy_dtype_promotion("standard"):
        rows = len(plan.lane), plan.rows.position, plan.lane
        check(round_, attend.call, attend.arguments, *rows)


def test_more_rows_than_own_tokens_are_refused():
    with pytest.raises(ValueError, match="rows: 300 of 256 own tokens"):
        dataclasses.replace(work(4, 2, 64), rows=300)

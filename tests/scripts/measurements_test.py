"""Runs each measuring script in a process of its own, because their flags share names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def run(script, target, *arguments):
    """Returns the completed process and the JSON that it wrote, or {} if it wrote no file."""
    done = subprocess.run(
        [sys.executable, "-m", f"scripts.{script}", f"--json={target}", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    written = json.loads(target.read_text()) if target.exists() else {}
    return done, written


def test_quality_beside_work(tmp_path):
    plot = tmp_path / "plot.png"
    done, written = run(
        "eval_quality",
        tmp_path / "result.json",
        *("--rounds=2", "--agents=4", "--tokens=8", "--row_budget=64", f"--plot={plot}"),
        *("--policy=blend", "--policy=tokendance"),
        *("--selection=none", "--selection=head", "--head_pages=1", "--head_pages=2"),
    )
    assert done.returncode == 0, done.stderr
    rows = written["policies"]
    kinds = [(row["policy"], row["selection"], row["head_pages"]) for row in rows]
    assert kinds == [
        ("dense", None, None),
        ("blend", None, None),
        ("tokendance", "none", None),
        ("tokendance", "head", 1),
        ("tokendance", "head", 2),
        ("dense, other buckets", None, None),
        ("shuffled bases", None, None),
    ]
    dense, blend, none, _, head, noise, shuffled = rows
    assert (dense["kl_mean"], dense["top1"]) == (0, 1)
    assert noise["kl_mean"] == noise["noise_floor"] < 1e-6
    assert none["token_layers"] < head["token_layers"] < dense["token_layers"]
    assert head["kl_mean"] < none["kl_mean"] < shuffled["kl_mean"]
    assert blend["kl_mean"] > head["kl_mean"]
    for row in rows:
        assert row["trace"] == "town-0"
        assert sorted(row["kl_by_round"]) == ["1", "2"]
        assert row["first_divergence"] <= 9
    assert plot.stat().st_size > 10_000
    assert "shuffled bases" in done.stdout


# A sweep, because the test of the training script asks probes too.
@pytest.mark.sweep
def test_answers_to_probes_beside_work(tmp_path):
    done, written = run(
        "eval_quality",
        tmp_path / "result.json",
        *("--probes", "--draws=2", "--setting=5 agents", "--row_budget=64"),
        *("--policy=epic", "--policy=tokendance", "--selection=none"),
    )
    assert done.returncode == 0, done.stderr
    rows = written["policies"]
    kinds = [(row["name"], row["setting"], row["round"]) for row in rows]
    assert kinds == [
        (name, "5 agents", 0) for name in ("dense", "epic", "tokendance none", "shuffled bases")
    ]
    for row in rows:
        assert sum(row["asked"].values()) == 10
        assert row["probes"].keys() == row["intervals"].keys()
        for kind, (low, high) in row["intervals"].items():
            assert 0 <= low <= row["probes"][kind] <= high <= 1
    dense, _, none, shuffled = rows
    assert none["token_layers"] < dense["token_layers"]
    assert sum(shuffled["probes"].values()) < sum(none["probes"].values())
    assert "tokendance none" in done.stdout


def test_time_beside_work(tmp_path):
    sizes = "--agents=2", "--agents=3", "--row_budget=64", "--turns=1"
    done, written = run("bench_round", tmp_path / "result.json", *sizes)
    assert done.returncode == 0, done.stderr
    rows = written["prefill"]
    assert [row["agents"] for row in rows] == [2] * 7 + [3] * 7
    for row in rows:
        assert row["prefill_s"] > 0
        assert (row["time"] == 1) == (row["policy"] == "tokendance" and not row["head_pages"])
        assert 0 < row["token_layers"] <= row["prompt_tokens"]
    assert "tokendance none" in done.stdout


def test_a_step_over_shared_pages_beside_one_over_copies(tmp_path):
    sizes = "--agents=5", "--shared=600", "--private=40", "--steps=2", "--turns=2"
    model = "--model=demo", "--dtype=float32"
    done, written = run("reports.bench_groups", tmp_path / "result.json", *model, *sizes)
    assert done.returncode == 0, done.stderr
    rows = written["timings"]
    assert [row["what"] for row in rows] == ["attention of a step", "decode step"]
    for row in rows:
        assert row["dtype"] == "float32"
        assert len(row["shared_s"]) == len(row["copied_s"]) == 2
        assert row["difference"] < 1e-5


def test_programs_beside_their_products(tmp_path):
    sizes = "--rows=64", "--agents=2", "--context=32", "--steps=2", "--turns=2"
    model = "--model=demo", "--dtype=float32"
    done, written = run("reports.bench_engine", tmp_path / "result.json", *model, *sizes)
    assert done.returncode == 0, done.stderr
    rows = written["timings"]
    assert [row["what"] for row in rows] == [
        "prefill of 2 x 32 rows",
        "decode step of 2 agents at 32 tokens",
    ]
    assert all(row["ratio"] > 0 and len(row["program_s"]) == 2 for row in rows)
    assert "alone, ms" in done.stdout


def test_the_part_of_the_host_in_a_step(tmp_path):
    sizes = "--sequences=2", "--shared=40", "--own=8", "--answer=12", "--steps=4"
    model = "--model=demo", "--dtype=float32"
    done, written = run("reports.bench_steps", tmp_path / "result.json", *model, *sizes)
    assert done.returncode == 0, done.stderr
    rows = written["steps"]
    assert [row["sequences"] for row in rows] == [2]
    assert all(row["calls"] > 0 and 0 < row["host_s"] < row["call_s"] for row in rows)


@pytest.mark.parametrize(
    ("script", "argument", "message"),
    [
        ("eval_quality", "--first_round=9", "first_round"),
        ("eval_quality", "--model=nowhere.gguf", "nowhere.gguf"),
        ("bench_round", "--round=9", "round"),
    ],
)
def test_names_what_is_wrong(tmp_path, script, argument, message):
    done, written = run(script, tmp_path / "result.json", argument)
    assert done.returncode == 1
    assert not written
    assert message in done.stderr
    assert "Traceback" not in done.stderr

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

from scripts import common, serve_round
from tokendance_jax.demo import demo_trace, harbour_trace
from tokendance_jax.prompt import write_trace

ROOT = Path(__file__).resolve().parents[2]
# One size of pool: what several tests compile is compiled once.
SETTINGS = "--compilation_cache=off", "--kv_memory=16MiB"
FIELDS = {
    "policy": str,
    "round": int,
    "agents": int,
    "prompt_tokens": int,
    "distinct_tokens": int,
    "unique_tokens": int,
    "token_layers": float,
    "attended": float,
    "computed_tokens": int,
    "reused_tokens": int,
    "plan_s": float,
    "prefill_s": float,
    "decode_s": float,
    "compile_s": float,
    "decoded_tokens": int,
    "kv_bytes_dense": int,
    "kv_bytes_held": int,
    "kv_bytes_rest": int,
    "outputs": dict,
    "output_ids": dict,
}


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Runs the script in this process; returns its status and what it wrote."""
    monkeypatch.setattr(serve_round.host, "tune_allocator", lambda: None)
    target = tmp_path / "result.json"

    def run(*arguments):
        with flagsaver.flagsaver():
            flags.FLAGS(["serve_round", *SETTINGS, f"--json={target}", *arguments])
            status = serve_round.main(["serve_round"])
        return status, json.loads(target.read_text()) if target.exists() else None

    return run


def test_the_demo_tells_what_is_right_and_what_reuse_saves(serve, capsys):
    status, written = serve()
    assert status == 0
    dense, collective = written["policies"]["dense"], written["policies"]["tokendance"]
    assert dense["answers"] == collective["answers"] == 24
    for values in (dense, collective):
        assert values["right"] >= 18
    assert collective["computed_tokens"] < 0.5 * dense["computed_tokens"]
    assert collective["kv_bytes_held"] < 0.75 * dense["kv_bytes_held"]
    assert collective["agreement"]["top1"] > 0.97
    right = {"dense": 0, "tokendance": 0}
    for row in written["rounds"]:
        assert row["tokens"]["markup"] > 0
        prompts = demo_trace().rounds[row["round"]].agents
        right[row["policy"]] += sum(
            row["outputs"][prompt.agent] == prompt.recorded_output for prompt in prompts
        )
    assert right == {"dense": dense["right"], "tokendance": collective["right"]}
    shown = capsys.readouterr().out
    for prompt in demo_trace().rounds[2].agents:
        assert f"{prompt.agent}: {prompt.segments[-1].text}" in shown
    assert f"{dense['right']} of 24" in shown


def test_compares_policies_and_writes_every_field(serve, capsys):
    status, written = serve("--policy=dense", "--policy=prefix", "--max_new_tokens=6")
    assert status == 0
    assert written["config"]["policy"] == ["dense", "prefix"]
    rows = written["rounds"]
    assert [(row["policy"], row["round"]) for row in rows] == [
        (policy, index) for policy in ("dense", "prefix") for index in range(3)
    ]
    for row in rows:
        assert {field: type(row[field]) for field in FIELDS} == FIELDS
        assert list(row["outputs"]) == list(row["output_ids"])
        assert len(row["outputs"]) == 8
    for dense, prefix in zip(rows[:3], rows[3:], strict=True):
        assert dense["output_ids"] == prefix["output_ids"]
        assert dense["distinct_tokens"] == prefix["distinct_tokens"]
        assert dense["unique_tokens"] >= prefix["unique_tokens"]
    agreed = written["policies"]["prefix"]["agreement"]
    assert agreed["top1"] == 1
    assert agreed["kl_mean"] < 1e-9
    assert written["policies"]["dense"]["agreement"] is None
    shown = capsys.readouterr().out
    assert "8 of 8 answers equal those of dense" in shown
    assert "0 of 8 answers are right" in shown


def test_the_collective_round_computes_what_is_unique(serve, capsys):
    arguments = ("--policy=prefix", "--policy=tokendance", "--max_new_tokens=2")
    status, written = serve(*arguments, "--selection=none")
    assert status == 0
    for row in written["rounds"][4:]:
        assert row["policy"] == "tokendance"
        assert row["computed_tokens"] <= 1.02 * row["unique_tokens"]
        assert row["kv_bytes_held"] < row["kv_bytes_dense"]
        assert row["kv_bytes_rest"] < row["kv_bytes_dense"]
    assert 0 < written["policies"]["tokendance"]["agreement"]["kl_mean"] < 0.1
    assert "ceiling" in capsys.readouterr().out
    _, plain = serve(*arguments, "--noquality", "--selection=head", "--head_pages=1000")
    assert plain["policies"]["tokendance"]["agreement"] is None
    for prefix, head in zip(plain["rounds"][:3], plain["rounds"][3:], strict=True):
        assert prefix["output_ids"] == head["output_ids"]  # everything is recomputed


def test_cuts_the_trace(serve):
    arguments = ("--rounds=1", "--agents=2", "--max_new_tokens=3")
    sizes = "--dtype=float32", "--page_size=32", "--kv_memory=auto"
    status, written = serve("--policy=prefix", *arguments, *sizes)
    assert status == 0
    (row,) = written["rounds"]
    assert row["agents"] == 2
    assert [len(ids) for ids in row["output_ids"].values()] == [3, 3]


def test_serves_a_file_and_live_rounds(serve, tmp_path):
    path = tmp_path / "rounds.jsonl.gz"
    write_trace(path, harbour_trace())
    arguments = (f"--trace={path}", "--policy=prefix", "--rounds=2", "--max_new_tokens=4")
    _, recorded = serve(*arguments, "--rounds=1")
    assert recorded["rounds"][0]["tokens"]["markup"] == 0
    assert recorded["policies"]["prefix"]["right"] is None
    _, replayed = serve(*arguments, "--chat=yes")
    _, live = serve(*arguments, "--noreplay")
    assert live["rounds"][0]["output_ids"] == replayed["rounds"][0]["output_ids"]
    assert live["rounds"][1]["prompt_tokens"] != replayed["rounds"][1]["prompt_tokens"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model=nowhere.gguf",), "nowhere.gguf"),
        (("--trace=nowhere.jsonl",), "nowhere.jsonl"),
        (("--kv_memory=much",), "kv_memory"),
        (("--kv_memory=64KiB",), "kv_memory"),
        (("--page_size=17",), "page_size"),
        (("--top_p=2",), "top_p"),
        (("--json=/nowhere/at/all.json",), "json"),
    ],
)
def test_names_what_is_wrong(serve, capsys, arguments, message):
    status, written = serve(*arguments)
    assert status == 1
    assert written is None
    assert message in capsys.readouterr().err


def test_unknown_trace_field_is_named_with_its_line(serve, capsys, tmp_path):
    path = tmp_path / "rounds.jsonl"
    write_trace(path, harbour_trace())
    first, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps({**json.loads(first), "temprature": 1}) + "\n" + rest)
    status, _ = serve(f"--trace={path}")
    assert status == 1
    assert "temprature" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("12", 12), ("2KiB", 2048), ("1.5GiB", 3 << 29), ("3 MiB", 3 << 20)]
)
def test_sizes(text, size):
    assert common.parse_bytes(text) == size


def test_ctrl_c_ends_cleanly_with_what_was_done(tmp_path):
    target = tmp_path / "result.json"
    process = subprocess.Popen(
        [
            sys.executable,
            *("-u", "-m", "scripts.serve_round"),
            *("--policy=dense", "--policy=prefix", *SETTINGS),
            f"--json={target}",
        ],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Round 0, dense"):
            process.send_signal(signal.SIGINT)
            break
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Interrupted" in shown
    assert "Traceback" not in errors
    rows = json.loads(target.read_text())["rounds"]
    assert 1 <= len(rows) < 6

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.prompt.recording_test import RECORDING, texts
from tokendance_jax.prompt import read_trace
from tokendance_jax.prompt.recording import trace_of

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    command = [sys.executable, "-m", "scripts.make_trace", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_script_writes_a_trace_that_reads_back(tmp_path):
    recording, trace = tmp_path / "recording.json", tmp_path / "trace.jsonl.gz"
    recording.write_text(json.dumps(RECORDING), encoding="utf-8")
    done = run(f"--recording={recording}", f"--trace={trace}")
    assert done.returncode == 0, done.stderr
    assert "2 rounds of up to 3 agents" in " ".join(done.stdout.split())
    expected = trace_of(RECORDING)
    read = read_trace(trace)
    assert [texts(p) for r in read.rounds for p in r.agents] == [
        texts(p) for r in expected.rounds for p in r.agents
    ]


@pytest.mark.slow
def test_the_script_says_what_is_wrong(tmp_path):
    recording, trace = tmp_path / "recording.json", tmp_path / "trace.jsonl"
    recording.write_text("{", encoding="utf-8")
    done = run(f"--recording={recording}", f"--trace={trace}")
    assert done.returncode == 1
    assert "is not JSON" in done.stderr
    assert not trace.exists()

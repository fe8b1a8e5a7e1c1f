import json
import os
import subprocess
import sys

import pytest


@pytest.mark.aot
def test_reports_what_fits(tmp_path):
    path = tmp_path / "report.json"
    command = "--model=0.5B", "--target=tpu-v5e", "--program=decode", "--agents=2"
    done = subprocess.run(
        [sys.executable, "-m", "scripts.reports.program_report", *command, f"--json={path}"],
        env=os.environ | {"COLUMNS": "140"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(path.read_text())["programs"]
    assert "in all GB" in done.stdout
    assert row["memory"] >= row["weights"] + row["pool"] + row["temporaries"]
    assert row["copies"] == []
    assert row["bound_s"] > 0


@pytest.mark.aot
def test_says_what_does_not_fit(tmp_path):
    path = tmp_path / "report.json"
    command = "--model=14B", "--target=tpu-v5e", "--program=decode", "--agents=2"
    done = subprocess.run(
        [sys.executable, "-m", "scripts.reports.program_report", *command, f"--json={path}"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(path.read_text())["programs"]
    assert "the round of 2 agents needs" in row["refused"]
    assert row["refused"] in done.stdout.replace("\n", " ")

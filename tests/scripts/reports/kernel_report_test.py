import json
import os
import subprocess
import sys

import pytest


@pytest.mark.aot
@pytest.mark.parametrize("target", ["h100", "tpu-v5e"])
def test_reports_what_the_compilers_say(tmp_path, target):
    path = tmp_path / "report.json"
    # The 1.5B model has heads of 128. TPUs copy pools with narrower heads.
    command = "--model=1.5B", "--agents=2", f"--target={target}", f"--json={path}"
    done = subprocess.run(
        [sys.executable, "-m", "scripts.reports.kernel_report", *command],
        env=os.environ | {"COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["kernels"]
    last = "round_attention, packed" if target == "h100" else "round_attention"
    names = ["sparse_restore", "decode_attention", "round_attention", last, "page_diff"]
    assert [row["kernel"] for row in rows] == names
    assert all(name in done.stdout for name in names)
    for row in rows:
        assert row["bytes"] >= row["floor_bytes"] > 0
        assert row["bound_s"] > 0
        if target == "h100":
            assert row["spill_bytes"] == 0
            assert 0 < row["registers"] <= 255
        else:
            assert row["registers"] is None
    for row in (rows[0], rows[-1]):  # restore and comparison
        assert row["bytes"] < 1.1 * row["floor_bytes"]

"""Plots of quality against work, drawn from the results of a measurement."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.helpers import pareto
from scripts.plot_quality import read
from tokendance_jax.study.variants import NOISE

ROOT = Path(__file__).resolve().parents[2]


def row(name, token_layers, kl=0.1, *, base=None):
    return {
        "name": name,
        "policy": name if name == NOISE else name.split(" ")[0],
        "base": base,
        "trace": "town",
        "positions": 9,
        "token_layers": token_layers,
        "kl_mean": kl,
        "top1": 1 - kl,
    }


ROWS = [
    row("dense", 200, 0.0),
    row("tokendance head 4", 120, 0.02, base="joint"),
    row("tokendance none", 100, 0.04, base="joint"),
    row("tokendance none, alone", 100, 0.4, base="alone"),
    row("blend", 140, 0.3),
    row(NOISE, 200, 0.0),
]


def plot_script(tmp_path, *arguments):
    out = tmp_path / "plot.png"
    command = [sys.executable, "-m", "scripts.plot_quality", f"--out={out}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done, out


def test_a_line_for_each_policy_and_base_by_work_without_the_checks():
    lines = {
        label: [(point["name"], point["work"]) for point in points]
        for label, points in pareto.lines(ROWS).items()
    }
    assert lines == {
        "tokendance, joint": [("none", 0.5), ("head 4", 0.6)],
        "tokendance, alone": [("none", 0.5)],
        "blend": [("blend", 0.7)],
    }


def test_files_are_drawn_side_by_side(tmp_path):
    pytest.importorskip("matplotlib")
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        file.write_text(json.dumps({"policies": ROWS}))
    done, out = plot_script(tmp_path, "--kl=0.02", "--top1=0.97", *files)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes()[1:4] == b"PNG"
    width, height = (int.from_bytes(out.read_bytes()[at : at + 4], "big") for at in (16, 20))
    assert width > height  # two columns


@pytest.mark.parametrize("text", ["", "{}", '{"policies": []}', '{"policies": [{"policy": "a"}]}'])
def test_a_file_that_holds_something_else_is_named(tmp_path, text):
    wrong = tmp_path / "wrong.json"
    wrong.write_text(text)
    with pytest.raises(ValueError, match=r"wrong\.json: not what eval_quality --json writes"):
        read(wrong)


def test_nothing_is_drawn_of_a_file_that_holds_something_else(tmp_path):
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    done, out = plot_script(tmp_path, wrong)
    assert done.returncode == 1
    assert str(wrong) in done.stderr
    assert not out.exists()

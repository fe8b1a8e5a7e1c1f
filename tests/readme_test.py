"""README and WORKSPACE name things that exist, and the README's example runs as written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_example_serves_three_rounds(capsys: pytest.CaptureFixture[str]):
    (block,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert list(names["result"].texts) == ["Ludan", "Wesond"]
    # In the last round every agent's prompt has both answers of the round before.
    assert [segment.kind for segment in names["blocks"]] == ["shared", "shared"]
    ledger = names["result"].ledger
    assert ledger.tokens["shared"] > 0
    assert 0 < ledger.computed_tokens <= ledger.prompt_tokens


def test_pages_are_short():
    workspace = (ROOT / "WORKSPACE.md").read_text(encoding="utf-8")
    assert len(README.splitlines()) <= 180
    assert len(workspace.splitlines()) <= 320


def test_links_lead_to_files():
    pages = [ROOT / "README.md", ROOT / "WORKSPACE.md", *(ROOT / "scripts").rglob("*.md")]
    assert len(pages) > 8
    for page in pages:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            known = target.startswith("https://") or (page.parent / target).exists()
            assert known, f"{page}: {target}"


def test_the_table_of_invariants_names_tests_that_exist():
    workspace = (ROOT / "WORKSPACE.md").read_text(encoding="utf-8")
    table = workspace.partition("## What must hold")[2].partition("\n## ")[0]
    places = re.findall(r"`((?:tests|\.ci)/[^`]*)`", table)
    assert len(places) > 60
    for place in places:
        assert list(ROOT.glob(place.rstrip("/"))), place


def test_the_reference_is_what_flags_and_docstrings_say():
    # Run in a separate process: other scripts define flags with the same names.
    code = "from scripts.reference import make as m; print(m.reference(), end='')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    written = (ROOT / "scripts" / "reference" / "serve_round.md").read_text(encoding="utf-8")
    assert done.stdout == written, "run python -m scripts.reference.make"
    for field in ("--least_saving", "token_layers", "mirror_s", "finish_reasons"):
        assert f"`{field}`" in written

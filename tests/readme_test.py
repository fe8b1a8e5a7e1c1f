"""The README says what is there, and its example runs as it is written."""

import dataclasses
import re
from pathlib import Path

import pytest

from tokendance_jax.engine.result import RoundLedger, Timings

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## )", README, re.MULTILINE | re.DOTALL)
    return text


@pytest.mark.slow
def test_the_example_serves_three_rounds(capsys: pytest.CaptureFixture[str]):
    (block,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert list(names["result"].texts) == ["Ludan", "Wesond"]
    # In the last round every agent holds both answers of the round before.
    assert [segment.kind for segment in names["blocks"]] == ["shared", "shared"]
    ledger = names["result"].ledger
    assert ledger.tokens["shared"] > 0
    assert 0 < ledger.computed_tokens <= ledger.prompt_tokens


def test_every_flag_is_explained():
    source = (ROOT / "scripts" / "serve_round.py").read_text(encoding="utf-8")
    defined = re.findall(r"flags\.DEFINE_\w+\(\s*\"(\w+)\"", source)
    table = section("Flags of `scripts.serve_round`")
    explained = re.findall(r"^\| `--(?:\[no\])?(\w+)`", table, re.MULTILINE)
    assert sorted(explained) == sorted(defined)


def test_every_number_of_the_json_output_is_explained():
    explained = re.findall(r"`(\w+)`", section("JSON output"))
    for kind in (RoundLedger, Timings):
        assert {field.name for field in dataclasses.fields(kind)} <= set(explained)

"""The README's example runs as it is written."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_example_serves_three_rounds(capsys: pytest.CaptureFixture[str]):
    (block,) = re.findall(
        r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    names = {}
    exec(compile(block, str(README), "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert list(names["result"].texts) == ["Ann", "Bo"]
    # In the last round every agent holds both answers of the round before.
    assert [segment.kind for segment in names["blocks"]] == ["shared", "shared"]
    assert names["result"].ledger.tokens["shared"] > 0
    assert 0 < names["result"].ledger.computed_tokens <= names["result"].ledger.prompt_tokens

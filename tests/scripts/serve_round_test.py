import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from scripts import serve_round
from tokendance_jax.demo import demo_trace, harbour_trace
from tokendance_jax.engine.result import (
    AgentLedger,
    AgentResult,
    RoundLedger,
    RoundResult,
    Timings,
)
from tokendance_jax.engine.rounds import RoundEngine
from tokendance_jax.prompt import AgentPrompt, Round, Segment, Trace, write_trace

ROOT = Path(__file__).resolve().parents[2]
# All tests use one size of pool and of calls, so that a program is compiled once for all of them.
SETTINGS = "--compilation_cache=off", "--kv_memory=16MiB", "--row_budget=64"
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
    """Runs the script in this process; returns its status and the JSON that it wrote."""
    monkeypatch.setattr(serve_round.host, "tune_allocator", lambda: None)
    target = tmp_path / "result.json"

    def run(*arguments):
        with flagsaver.flagsaver():
            flags.FLAGS(["serve_round", *SETTINGS, f"--json={target}", *arguments])
            status = serve_round.main(["serve_round"])
        return status, json.loads(target.read_text()) if target.exists() else None

    return run


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.fixture
def served_rounds(monkeypatch):
    """Collects the rounds that engines serve. Agents answer with their name and the round."""
    found = []

    def answer(engine, round_, **_):
        found.append(round_)
        own = AgentLedger({}, 1, 1, 0, 1, 1, 1.0, 1)
        agents = (
            AgentResult(prompt.agent, f"{prompt.agent}, {round_.index}\n", (1,), "stop", own)
            for prompt in round_.agents
        )
        ledger = RoundLedger({}, 1, 1, 1, 1, 1.0, 1.0, 0, len(round_.agents), 1, 1, 1)
        return RoundResult(round_.index, tuple(agents), Timings(*[0.0] * 6), ledger)

    monkeypatch.setattr(RoundEngine, "serve", answer)
    return found


def test_live_rounds_hold_nothing_that_was_recorded(serve, served_rounds):
    """The demo's answers end without a newline, its blocks with one. Six agents are left out."""
    status, _ = serve("--noreplay", "--agents=2", "--policy=dense")
    assert status == 0
    assert [round_.index for round_ in served_rounds] == [0, 1, 2]
    first, second = (prompt.agent for prompt in served_rounds[0].agents)
    for round_ in served_rounds[1:]:
        said = [f"{agent}, {round_.index - 1}\n" for agent in (first, second)]
        for prompt in round_.agents:
            assert [s.text for s in prompt.segments if s.kind == "shared"] == said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model=nowhere.gguf",), "nowhere.gguf"),
        (("--model=~nobody at all/x",), "~nobody at all/x: source: there is no such home folder"),
        (("--trace_name=other",), "trace_name: the demo has no trace 'other'"),
        (("--page_size=0",), "page_size"),
        (("--row_budget=0",), "row_budget"),
        (("--top_k=3000000000",), "top_k"),
        (("--temperature=nan",), "temperature"),
        (("--temperature=1e300",), "temperature"),
        (("--seed=-1",), "seed"),
        (("--kv_memory=99999999GiB",), "kv_memory: a pool of 99,999,999.0 GiB is too large"),
        (("--policy=dense", "--policy=blend", "--blend_ratio=7"), "blend_ratio"),
        (("--blend_ratio=nan", "--policy=blend"), "blend_ratio"),
        (("--base=joint-agent", "--selection=deviation"), "selection"),
        (("--preamble=/nowhere",), "preamble"),
        (("--json=/",), "json: '/' is not a file"),
        (("--json=/dev/null",), "json: '/dev/null' is not a file"),
        (("--json=/proc/self/x.json",), "json: '/proc/self/x.json' can't be written"),
        (("--trace=nowhere.jsonl",), "nowhere.jsonl"),
        (("--kv_memory=much",), "kv_memory"),
        (("--kv_memory=64KiB",), "kv_memory"),
        (("--page_size=17",), "page_size"),
        (("--top_p=2",), "top_p"),
        (("--json=/nowhere/at/all.json",), "json"),
    ],
)
def test_names_what_is_wrong(serve, served_rounds, capsys, arguments, message):
    status, written = serve(*arguments)
    assert status == 1
    assert written is None
    assert not served_rounds
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("serve_round: ")
    assert message in line


def test_who_has_no_home_folder_is_told_so(serve, capsys, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    status, _ = serve("--compilation_cache=auto")
    assert status == 1
    assert capsys.readouterr().err.startswith(
        "serve_round: compilation_cache: the user has no home"
    )


def test_a_late_error_loses_nothing(serve, served_rounds, capsys, monkeypatch, tmp_path):
    inner, kept = RoundEngine.serve, []

    def failing(engine, round_, **arguments):
        if round_.index == 2:
            kept.append(json.loads((tmp_path / "result.json").read_text()))
            raise jax.errors.JaxRuntimeError("INTERNAL: the device\nis \x1b[2Jgone")
        return inner(engine, round_, **arguments)

    monkeypatch.setattr(RoundEngine, "serve", failing)
    status, written = serve("--policy=dense", "--agents=2")
    assert status == 1
    assert len(served_rounds) == 2
    assert [row["round"] for row in written["rounds"]] == [0, 1]
    assert kept == [written]
    shown = capsys.readouterr()
    assert shown.err == "serve_round: INTERNAL: the device is \\x1b[2Jgone\n"
    assert "Work of all rounds" in shown.out
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_replay_that_cannot_be_served_whole_is_not_begun(serve, served_rounds, capsys, tmp_path):
    *rounds, last = harbour_trace().rounds
    long = Segment("history", "h", text="Ann visits Jade Inn at noon.\n" * 1500)
    first, *others = last.agents
    first = dataclasses.replace(first, segments=(long, *first.segments))
    last = dataclasses.replace(last, agents=(first, *others))
    write_trace(tmp_path / "x.jsonl", Trace("x", (*rounds, last)))
    for memory in ("16MiB", "auto"):
        status, written = serve(f"--trace={tmp_path / 'x.jsonl'}", f"--kv_memory={memory}")
        assert (status, written, served_rounds) == (1, None, [])
        assert "serve_round: round 2: agent 'Edda': the prompt has" in capsys.readouterr().err


def test_text_of_others_is_shown_harmlessly(serve, served_rounds, capsys, tmp_path):
    task = Segment("task", "t", text="\x1b[2J\x1b[31mWhere?\n")
    prompt = AgentPrompt("[red]Ann\x1b]0;renamed\x07\u202e", (task,), 2)
    write_trace(tmp_path / "x.jsonl", Trace("[b]x\x9b", (Round((prompt,), max_new_tokens=2),)))
    status, written = serve(f"--trace={tmp_path / 'x.jsonl'}", "--policy=dense")
    assert status == 0
    assert list(written["rounds"][0]["outputs"]) == [prompt.agent]
    shown = capsys.readouterr().out
    assert r"[red]Ann\x1b]0;renamed\x07\u202e: \x1b[2J\x1b[31mWhere?" in shown
    assert r"[b]x\x9b: 1 rounds" in shown
    assert r"  [red]Ann\x1b]0;renamed\x07\u202e, 0" in shown
    assert len(served_rounds) == 1
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)


def test_unknown_trace_field_is_named_with_its_line(serve, capsys, tmp_path):
    path = tmp_path / "rounds.jsonl"
    write_trace(path, harbour_trace())
    first, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps({**json.loads(first), "temprature": 1}) + "\n" + rest)
    status, _ = serve(f"--trace={path}")
    assert status == 1
    assert "temprature" in capsys.readouterr().err


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

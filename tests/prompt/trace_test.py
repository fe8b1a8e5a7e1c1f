"""Lossless writing and reading of traces, errors with file and line, live runs of recordings."""

import dataclasses
import gzip
import json
import pathlib

import jaxtyping
import pytest

from tokendance_jax.demo import harbour_trace
from tokendance_jax.prompt import (
    AgentPrompt,
    Author,
    PromptError,
    Round,
    Segment,
    Trace,
    gather,
    read_trace,
    read_traces,
    relive,
    write_trace,
)

SHARED_TRACES = pathlib.Path(__file__).parents[3] / "shared" / "traces"
TASK = Segment("task", "t", text="go\n")


def _line(**changes) -> str:
    fields = {
        "trace": "x",
        "round": 0,
        "agent": "a",
        "segments": [{"kind": "task", "id": "t", "text": "go\n"}],
        "max_new_tokens": 4,
    }
    fields |= changes
    return json.dumps({key: value for key, value in fields.items() if value != "absent"})


def _by(author, kind="shared", **changes) -> str:
    """Returns a line with a block that has an author."""
    block = {"kind": kind, "id": "s", "text": "x", "author": author}
    task = {"kind": "task", "id": "t", "text": "go\n"}
    return _line(**{"agent": "c", "segments": [block, task], **changes})


def _file(folder: pathlib.Path, *lines: str) -> pathlib.Path:
    path = folder / "trace.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["harbour.jsonl", "harbour.jsonl.gz"])
def test_a_written_trace_reads_back(tmp_path, name):
    for _ in range(2):  # The second time it replaces the file.
        write_trace(tmp_path / name, harbour_trace())
    assert read_trace(str(tmp_path / name)) == harbour_trace()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_equal_traces_make_equal_files(tmp_path):
    write_trace(tmp_path / "a.gz", harbour_trace())
    write_trace(tmp_path / "b.gz", harbour_trace())
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


@pytest.mark.parametrize("name", ["ga-small-en.jsonl", "ga-small.jsonl", "ga-25-c.jsonl.gz"])
def test_shared_traces_are_written_byte_for_byte_as_they_were_read(tmp_path, name):
    path = SHARED_TRACES / name
    if not path.exists():
        pytest.skip(f"no {path}: the shared folder is not beside this checkout")
    written = b""
    for trace in read_traces(path).values():
        write_trace(tmp_path / "trace.jsonl", trace)
        written += (tmp_path / "trace.jsonl").read_bytes()
    content = path.read_bytes()
    assert written == (gzip.decompress(content) if name.endswith(".gz") else content)


def test_limits_and_recordings_are_kept(tmp_path):
    path = _file(
        tmp_path,
        _line(recorded_output="done\n"),
        _line(agent="b", max_new_tokens=9),
        _line(round=1),
    )
    first, second = read_trace(path).rounds
    assert [prompt.max_new_tokens for prompt in first.agents] == [4, 9]
    assert [prompt.recorded_output for prompt in first.agents] == ["done\n", None]
    assert (first.max_new_tokens, second.max_new_tokens) == (9, 4)
    assert second.index == 1


def test_the_limit_of_the_round_is_written_where_an_agent_has_none(tmp_path):
    round_ = Round((AgentPrompt("a", (TASK,)),), max_new_tokens=5)
    write_trace(tmp_path / "x.jsonl", Trace("x", (round_,)))
    assert read_trace(tmp_path / "x.jsonl").rounds[0].agents[0].max_new_tokens == 5


def test_everything_but_the_sampling_is_kept(tmp_path):
    """A new field of prompts, segments or rounds must be added here and to the format."""
    assert [field.name for field in dataclasses.fields(AgentPrompt)] == [
        *("agent", "segments", "max_new_tokens", "recorded_output", "fidelity", "sampling")
    ]
    assert [field.name for field in dataclasses.fields(Segment)] == [
        *("kind", "id", "text", "token_ids", "author")
    ]
    assert [field.name for field in dataclasses.fields(Round)] == [
        *("agents", "max_new_tokens", "sampling", "index")
    ]
    task = Segment("task", "t", text="go\n")
    judge = AgentPrompt("judge", (task,), 3, recorded_output="x", fidelity="exact")
    first = Round((AgentPrompt("a", (task,), 5, recorded_output="no\n"), judge), max_new_tokens=5)
    blocks = gather({"a": "no\n"}, 0)
    second = Round((AgentPrompt("a", (*blocks, task), 4),), max_new_tokens=4, index=1)
    trace = Trace("x", (first, second))
    write_trace(tmp_path / "x.jsonl", trace)
    assert read_trace(tmp_path / "x.jsonl") == trace


def test_what_is_wrong_with_one_trace_does_not_hurt_the_others(tmp_path):
    path = _file(tmp_path, _line(), _line(round=1), _line(trace="y", round=7), _line(trace="z"))
    assert len(read_trace(path).rounds) == 2
    assert read_trace(path, "z").name == "z"
    for read in (read_traces, lambda path: read_trace(path, "y")):
        with pytest.raises(PromptError, match=r"trace\.jsonl:3: trace 'y': starts with round 7"):
            read(path)


def test_a_line_that_names_no_trace_may_be_of_those_beside_it(tmp_path):
    path = _file(tmp_path, _line(), _line(trace="y"), '{"trace": "y', _line(trace="z"))
    assert read_trace(path).name == "x"
    for name in "yz":
        with pytest.raises(PromptError, match=r"trace\.jsonl:3: not a JSON line"):
            read_trace(path, name)
    for lines in (["[]", _line()], [_line(), "[]"], ["[]"]):
        with pytest.raises(PromptError, match=r":\d: a line must be a JSON object, got list"):
            read_trace(_file(tmp_path, *lines))
    with pytest.raises(PromptError, match="the file holds no lines"):
        read_trace(_file(tmp_path))


def test_one_of_several_traces(tmp_path):
    path = _file(tmp_path, _line(trace="y"), _line(), _line(trace="y", round=1))
    assert list(read_traces(path)) == ["y", "x"]
    assert read_trace(path).name == "y"
    assert len(read_trace(path, "y").rounds) == 2
    with pytest.raises(PromptError, match="no trace 'z'; the file has y, x"):
        read_trace(path, "z")


def test_unusual_line_separators_are_text(tmp_path):
    segment = {"kind": "task", "id": "t", "text": "a\u2028b\x85c\r\n"}
    line = _line(segments=[segment]).encode().decode("unicode_escape").replace("\r\n", "\\r\\n")
    (prompt,) = read_trace(_file(tmp_path, line)).rounds[0].agents
    assert prompt.segments[0].text == "a\u2028b\x85c\r\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "not a JSON line"),
        ('{"trace": "x"', "not a JSON line"),
        ("[" * 100_000, "not a JSON line"),
        ("[]", "a line must be a JSON object, got list"),
        (_line(agent="absent"), "a line lacks the field 'agent'"),
        (_line(colour="red"), "a line has an unknown field 'colour'"),
        (_line(trace=""), "trace is empty"),
        (_line(trace=1), "trace: expected a string"),
        (_line(round="1"), "round must be an integer >= 0"),
        (_line(round=True), "round must be an integer >= 0"),
        (_line(round=2), "trace 'x': round 2 follows round 0"),
        (_line(trace="y", round=1), "trace 'y': starts with round 1"),
        (_line(), "agent 'a' occurs twice in round 0"),
        (_line(agent=5), "the name of an agent: expected a string"),
        (_line(max_new_tokens=0), "max_new_tokens must be an integer >= 1"),
        (_line(max_new_tokens=2.0), "max_new_tokens must be an integer >= 1"),
        (_line(recorded_output=3), "recorded_output: expected a string"),
        (_line(segments={}), "segments must be a list"),
        (_line(segments=[]), "the last segment must be a task"),
        (_line(segments=["go"]), "segment 0 must be a JSON object, got str"),
        (_line(segments=[{"kind": "task", "id": "t"}]), "segment 0 lacks the field 'text'"),
        (_line(segments=[{"kind": "x", "id": "t", "text": ""}]), "kind 'x' is none of"),
        (_line(fidelity="precise"), "trace 'x': agent 'a': fidelity 'precise' is none of"),
        (_by("Ann"), "trace 'x': segment 0: author must be a JSON object, got str"),
        (_by({"round": 0}), "segment 0: author lacks the field 'agent'"),
        (_by({"round": "0", "agent": "a"}), "author: round must be an integer >= 0"),
        (_by({"round": 0, "agent": ""}), "author: agent is empty"),
        (_by({"round": 0, "agent": "a"}, "task"), "a task segment has no author"),
        (_by({"round": 0, "agent": "b"}, round=1), "'s': its author 'b' takes no part in an earl"),
        (_by({"round": 1, "agent": "a"}, round=1), "'s': its author 'a' takes no part in an earl"),
        (_line(segments=[{"kind": "task", "id": "t", "text": "\ud800"}]), "lone surrogate"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = _file(tmp_path, _line(), line)
    # The product runs without the tests' import hook, which would refuse wrong types first.
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(PromptError, match=message) as error:
            read_traces(path)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert str(error.value).startswith(f"{path}:2: ")


def test_rounds_do_not_come_back(tmp_path):
    path = _file(tmp_path, _line(), _line(round=1), _line(agent="b"))
    with pytest.raises(PromptError, match=r"trace\.jsonl:3: trace 'x': round 0 follows round 1"):
        read_traces(path)


def test_a_shared_id_with_two_texts_is_named_with_its_round(tmp_path):
    def line(agent: str, text: str) -> str:
        shared = {"kind": "shared", "id": "s", "text": text}
        return _line(round=1, agent=agent, segments=[shared, {**shared, "kind": "task"}])

    path = _file(tmp_path, _line(), line("a", "one"), line("b", "two"))
    message = r"trace\.jsonl:2: trace 'x': round 1: agent 'b': shared segment 's' had another c"
    with pytest.raises(PromptError, match=message):
        read_traces(path)


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "t.jsonl.gz"
    write_trace(path, harbour_trace())
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    with pytest.raises(PromptError, match=r"t\.jsonl\.gz:\d+: damaged gzip data"):
        read_traces(path)
    path.write_bytes(whole[:40] + b"????????" + whole[48:])
    with pytest.raises(PromptError, match=r"t\.jsonl\.gz"):
        read_traces(path)
    path.write_bytes(b"plain")
    with pytest.raises(PromptError, match=r"t\.jsonl\.gz: cannot be read: Not a gzipped file"):
        read_traces(path)
    with pytest.raises(PromptError, match="cannot be read: No such file"):
        read_traces(tmp_path / "absent.jsonl")
    with pytest.raises(PromptError, match="the file holds no lines"):
        read_traces(_file(tmp_path))
    (tmp_path / "latin.jsonl").write_bytes(_line().encode() + b"\n\xff\n")
    with pytest.raises(PromptError, match=r"latin\.jsonl:2: not UTF-8"):
        read_traces(tmp_path / "latin.jsonl")


def test_token_ids_have_no_place_in_a_trace(tmp_path):
    shared = Segment("shared", "s", token_ids=(1,))
    trace = Trace("x", (Round((AgentPrompt("a", (shared, TASK)),)),))
    with pytest.raises(PromptError, match="agent 'a': segment 's' holds token ids"):
        write_trace(tmp_path / "x.jsonl", trace)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_text("old")

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(pathlib.Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_trace(path, harbour_trace())
    assert [item.read_text() for item in tmp_path.iterdir()] == ["old"]


def test_rounds_of_a_trace_are_numbered():
    round_ = Round((AgentPrompt("a", (TASK,)),), index=1)
    with pytest.raises(PromptError, match="trace 'x': round 1 stands where 0 belongs"):
        Trace("x", (round_,))
    with pytest.raises(PromptError, match="trace 'x': rounds must be"):
        Trace("x", ())


def test_gather_makes_the_next_rounds_blocks():
    blocks = gather({"Ann": "hi\n\n", "Bob": "a\0b"}, 3)
    assert blocks == (
        Segment("shared", "out/r3/Ann", text="hi\n", author=Author(3, "Ann")),
        Segment("shared", "out/r3/Bob", text="a\ufffdb\n", author=Author(3, "Bob")),
    )
    with pytest.raises(PromptError, match="author: round must be an integer >= 0, got -1"):
        gather({"Ann": "hi"}, -1)


def test_relive_replaces_every_block_of_a_recording():
    first, second, _ = harbour_trace().rounds
    recorded = {prompt.agent: prompt.recorded_output or "" for prompt in first.agents}
    live = {agent: f"{agent} says something else" for agent in recorded}
    new = relive(second, live, recorded)
    for old_prompt, new_prompt in zip(second.agents, new.agents, strict=True):
        for old, segment in zip(old_prompt.segments, new_prompt.segments, strict=True):
            if old.kind == "shared":
                agent = old.id.rsplit("/", 1)[1]
                text = f"{live[agent]}\n"
                assert segment == Segment("shared", f"live/{old.id}", text, None, Author(0, agent))
            else:
                assert segment == old
    assert (new.index, new.max_new_tokens) == (second.index, second.max_new_tokens)


def test_relive_tells_equal_answers_apart_by_the_id():
    segments = [Segment("shared", f"out/{name}", text="yes\n") for name in ("Joann", "Ann", "x")]
    other = Segment("shared", "rule", text="be kind\n")
    round_ = Round((AgentPrompt("a", (*segments, other, TASK)),), index=1)
    recorded = {"Bob": "yes\n", "Ann": "yes\n", "Joann": "yes\n"}
    new = relive(round_, {"Bob": "b", "Ann": "a", "Joann": "j"}, recorded)
    assert [s.text for s in new.agents[0].segments] == ["j\n", "a\n", "b\n", "be kind\n", "go\n"]
    with pytest.raises(PromptError, match="'out/Joann' is by agent 'Joann', who has no answer"):
        relive(round_, {"Bob": "b"}, recorded)

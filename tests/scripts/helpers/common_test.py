"""Helpers that the scripts share: sizes, cut traces, results on disk."""

import dataclasses
import json
import math
import os

import pytest

from scripts.helpers import common
from tokendance_jax.demo import demo_trace, harbour_trace
from tokendance_jax.policy.policies import PolicyOptions
from tokendance_jax.prompt import PromptError, Trace, name_authors


@pytest.mark.parametrize(
    ("text", "size"), [("12", 12), ("2KiB", 2048), ("1.5GiB", 3 << 29), ("3 MiB", 3 << 20)]
)
def test_sizes(text, size):
    assert common.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "-1", "nan", "1e9", "2TiB", "\u0663MiB", "9" * 400 + "GiB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match=r"kv_memory: .* is not a size; write"):
        common.parse_bytes(text)


def shared(trace):
    return [
        segment
        for round_ in trace.rounds
        for prompt in round_.agents
        for segment in prompt.segments
        if segment.kind == "shared"
    ]


def test_blocks_of_agents_that_are_left_out():
    def cut(trace, live=False):
        return common.cut_trace(trace, rounds=2, agents=3, max_new_tokens=7, live=live)

    def authors(trace):
        return {segment.author and segment.author.agent for segment in shared(trace)}

    replayed = cut(demo_trace())
    assert [len(round_.agents) for round_ in replayed.rounds] == [3, 3]
    assert len(shared(replayed)) == 3 * 8
    assert {p.max_new_tokens or m.max_new_tokens for m in replayed.rounds for p in m.agents} == {7}
    live = cut(demo_trace(), live=True)
    assert len(shared(live)) == 3 * 3
    names = {prompt.agent for prompt in live.rounds[0].agents}
    assert authors(live) == names
    # A replay needs no authors, but keeps those that the trace names.
    named = cut(name_authors(demo_trace()))
    assert len(shared(named)) == 3 * 8
    assert authors(named) == {*names, None}


def test_the_pool_holds_no_more_than_the_context_allows(small_model):
    def needed(**changes):
        trace = harbour_trace()
        rounds = tuple(dataclasses.replace(m, agents=m.agents[:2]) for m in trace.rounds)
        trace = common.cut_trace(
            Trace(trace.name, rounds), rounds=0, agents=0, max_new_tokens=changes.pop("answer")
        )
        return common.needed_kv_memory(
            small_model, trace, page_size=changes.pop("page_size", 16), chat=False, **changes
        )

    context = small_model.config.max_position_embeddings
    assert needed(answer=100) < needed(answer=context) == needed(answer=10**9)
    with pytest.raises(ValueError, match="page_size: 0 is not a power of two"):
        needed(answer=1, page_size=0)


def test_the_pool_of_a_live_run_holds_longer_answers_than_recorded(small_model):
    trace = common.cut_trace(harbour_trace(), rounds=2, agents=0, max_new_tokens=200, live=True)
    sizes = {"page_size": 16, "chat": False}
    recorded = common.needed_kv_memory(small_model, trace, **sizes)
    live = common.needed_kv_memory(small_model, trace, **sizes, live=True)
    blocks = 4 * 150 // 16  # answers are shorter than 50 tokens
    page = small_model.kv_spec(pages=1, page_size=16).page_bytes
    assert live >= recorded + 2 * 4 * blocks * page


def test_options_are_refused_whichever_policy_they_are_for():
    good = PolicyOptions()
    common.check_policies(["dense", "blend", "tokendance"], good)
    with pytest.raises(ValueError, match="blend_ratio"):
        common.check_policies(["dense", "blend"], dataclasses.replace(good, blend_ratio=7.0))
    with pytest.raises(ValueError, match="selection"):
        common.check_policies(
            ["tokendance"], dataclasses.replace(good, base="joint-agent", selection="query")
        )


def test_results_are_valid_json_whatever_they_hold(tmp_path):
    target = tmp_path / "r.json"
    found = {"kl": [math.nan, (math.inf, 1.5)], "path": "\udcff", "text": "\u963f", "n": {3: True}}
    common.write_json(str(target), found)

    def refuse(word):
        raise AssertionError(word)

    assert json.loads(target.read_text("utf-8"), parse_constant=refuse) == {
        **{"kl": [None, [None, 1.5]], "path": "\udcff", "text": "\u963f", "n": {"3": True}}
    }
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "r.json"
    link = tmp_path / "link.json"
    link.symlink_to(target)
    common.write_json(str(link), {"n": 1})
    assert link.is_symlink()

    def fail(source, to):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            common.write_json(str(target), {"n": 2})
    with pytest.raises(TypeError):
        common.write_json(str(target), {"n": object()})
    assert json.loads(target.read_text()) == {"n": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "r.json"]


def test_files_that_cannot_be_written_are_refused_and_nothing_is_left(tmp_path):
    common.check_json_path(None)
    common.check_json_path(str(tmp_path / "new.json"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "folder").mkdir()
    for path, message in (
        ("folder", "out: .*/folder' is not a file"),
        ("absent/r.json", "out: the folder .*/absent does not exist; make it first"),
    ):
        with pytest.raises(PromptError, match=message):
            common.check_file(str(tmp_path / path), "out")
    with pytest.raises(PromptError, match="out: '' is not a file"):
        common.check_file("", "out")

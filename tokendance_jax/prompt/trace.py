"""Traces of rounds as JSON lines: one line per agent and round, in the order round, then agent.

A line holds `trace`, `round`, `agent`, `segments` (a list of `kind`, `id`, `text`),
`max_new_tokens` and, for replays, `recorded_output`. How answers are drawn is not part of a trace.
"""

import dataclasses
import gzip
import json
import os
import pathlib
import secrets
import zlib
from collections.abc import Iterator
from typing import Any

from tokendance_jax.prompt.round import (
    AgentPrompt,
    PromptError,
    Round,
    Segment,
    check_integer,
    check_name,
)

_LINE_FIELDS = ("trace", "round", "agent", "segments", "max_new_tokens")
_SEGMENT_FIELDS = ("kind", "id", "text")


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    """A sequence of rounds under one name.

    Attributes:
      name: name of the trace.
      rounds: the rounds; their indices are 0, 1, 2, ...

    Raises:
      PromptError: empty name, no rounds, indices out of order.
    """

    name: str
    rounds: tuple[Round, ...]

    def __post_init__(self) -> None:
        check_name(self.name, "the name of a trace")
        if not isinstance(self.rounds, tuple) or not self.rounds:
            raise PromptError(
                f"trace {self.name!r}: rounds must be a tuple with at least one Round"
            )
        for index, moment in enumerate(self.rounds):
            if moment.index != index:
                raise PromptError(
                    f"trace {self.name!r}: round {moment.index} stands where {index} belongs; "
                    "number the rounds from 0 in order"
                )


def read_traces(path: str | os.PathLike[str]) -> dict[str, Trace]:
    """Reads all traces of a file.

    Args:
      path: a JSON lines file, compressed if its name ends in ".gz".

    Returns:
      The traces by name, in the order in which the file names them first.

    Raises:
      PromptError: the file cannot be read or a line is not as the format wants it; names file and
        line.
    """
    drafts: dict[str, list[_Draft]] = {}
    for number, line in _lines(path):
        where = f"{os.fspath(path)}:{number}"
        try:
            name, index, prompt = _parse(line)
            rounds = drafts.setdefault(name, [])
            if index == len(rounds):
                rounds.append(_Draft(number))
            elif index != len(rounds) - 1:
                raise PromptError(
                    f"round {index} of trace {name!r} follows round {len(rounds) - 1}; rounds "
                    "start at 0 and each one's lines stand together"
                    if rounds
                    else f"trace {name!r} starts with round {index}; rounds start at 0"
                )
            if prompt.agent in rounds[-1].prompts:
                raise PromptError(f"agent {prompt.agent!r} occurs twice in round {index}")
            rounds[-1].prompts[prompt.agent] = prompt
        except PromptError as error:
            raise PromptError(f"{where}: {error}") from None
    if not drafts:
        raise PromptError(f"{os.fspath(path)}: the file holds no lines; give a trace")
    traces = {}
    for name, rounds in drafts.items():
        done = []
        for index, draft in enumerate(rounds):
            try:
                done.append(draft.round(index))
            except PromptError as error:
                raise PromptError(f"{os.fspath(path)}:{draft.line}: {error}") from None
        traces[name] = Trace(name, tuple(done))
    return traces


def read_trace(path: str | os.PathLike[str], name: str | None = None) -> Trace:
    """Reads one trace of a file.

    Args:
      path: a JSON lines file, compressed if its name ends in ".gz".
      name: which trace; None: the file's first.

    Returns:
      The trace.

    Raises:
      PromptError: as `read_traces`, or the file has no trace of that name.
    """
    traces = read_traces(path)
    if name is None:
        return next(iter(traces.values()))
    if name not in traces:
        raise PromptError(f"{os.fspath(path)}: no trace {name!r}; the file has {', '.join(traces)}")
    return traces[name]


def write_trace(path: str | os.PathLike[str], trace: Trace) -> None:
    """Writes a trace; the file appears complete or not at all.

    Args:
      path: the file, compressed if its name ends in ".gz"; replaced if it exists.
      trace: what to write. Each round's `sampling` is not part of the format.

    Raises:
      PromptError: a segment holds token ids instead of text.
      OSError: the file cannot be written.
    """
    path = pathlib.Path(path)
    text = "".join(
        json.dumps(_fields(trace, moment, prompt), ensure_ascii=False, separators=(",", ":")) + "\n"
        for moment in trace.rounds
        for prompt in moment.agents
    )
    content = text.encode()
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclasses.dataclass(slots=True)
class _Draft:
    """A round while its lines are read: where it starts, and its prompts by agent."""

    line: int
    prompts: dict[str, AgentPrompt] = dataclasses.field(default_factory=dict)

    def round(self, index: int) -> Round:
        prompts = tuple(self.prompts.values())
        limits = [prompt.max_new_tokens for prompt in prompts if prompt.max_new_tokens is not None]
        return Round(prompts, max_new_tokens=max(limits), index=index)


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Numbers the lines of a file from 1; only a newline ends a line, not U+2028 and its kin."""
    number = 0
    try:
        opener = gzip.open if os.fspath(path).endswith(".gz") else open
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode()
    except OSError as error:
        raise PromptError(f"{os.fspath(path)}: cannot be read: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:
        raise PromptError(
            f"{os.fspath(path)}:{number + 1}: damaged gzip data ({error}); fetch the file again"
        ) from None
    except UnicodeDecodeError as error:
        raise PromptError(f"{os.fspath(path)}:{number}: not UTF-8: {error.reason}") from None


def _parse(line: str) -> tuple[str, int, AgentPrompt]:
    """One line as trace name, round index and prompt."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"not a JSON line: {error}") from None
    fields = _object(fields, "a line", _LINE_FIELDS, ("recorded_output",))
    check_name(fields["trace"], "trace")
    check_integer(fields["round"], "round", 0)
    check_integer(fields["max_new_tokens"], "max_new_tokens", 1)
    if not isinstance(fields["segments"], list):
        raise PromptError("segments must be a list")
    segments = tuple(
        Segment(**_object(segment, f"segment {position}", _SEGMENT_FIELDS))
        for position, segment in enumerate(fields["segments"])
    )
    prompt = AgentPrompt(
        fields["agent"], segments, fields["max_new_tokens"], fields.get("recorded_output")
    )
    return fields["trace"], fields["round"], prompt


def _object(
    value: object, what: str, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    """A JSON object with these fields and no others."""
    if not isinstance(value, dict):
        raise PromptError(f"{what} must be a JSON object, got {type(value).__name__}")
    if missing := [field for field in required if field not in value]:
        raise PromptError(f"{what} lacks the field {missing[0]!r}")
    if unknown := [field for field in value if field not in required + optional]:
        raise PromptError(
            f"{what} has an unknown field {unknown[0]!r}; known: {', '.join(required + optional)}"
        )
    return value


def _fields(trace: Trace, moment: Round, prompt: AgentPrompt) -> dict[str, object]:
    """One line's fields, in the order of the format."""
    for segment in prompt.segments:
        if segment.text is None:
            raise PromptError(
                f"trace {trace.name!r}: agent {prompt.agent!r}: segment {segment.id!r} holds token "
                "ids; a trace holds text"
            )
    fields: dict[str, object] = {
        "trace": trace.name,
        "round": moment.index,
        "agent": prompt.agent,
        "segments": [{"kind": s.kind, "id": s.id, "text": s.text} for s in prompt.segments],
        "max_new_tokens": prompt.max_new_tokens or moment.max_new_tokens,
    }
    if prompt.recorded_output is not None:
        fields["recorded_output"] = prompt.recorded_output
    return fields

"""Traces of rounds as JSON lines: one line per agent and round, ordered by round, then by agent.

A line holds `trace`, `round`, `agent`, `segments` (a list of `kind`, `id`, `text`) and
`max_new_tokens`, for replays also `recorded_output`, and `fidelity` if it is not the default. A
shared segment that is an answer may name its `author` by `round` and `agent`. Sampling settings are
not part of a trace.
"""

import dataclasses
import gzip
import json
import os
import pathlib
import secrets
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from tokendance_jax.prompt.round import (
    AgentPrompt,
    Author,
    PromptError,
    Round,
    Segment,
    check_integer,
    check_name,
)

_LINE_FIELDS = ("trace", "round", "agent", "segments", "max_new_tokens")
_SEGMENT_FIELDS = ("kind", "id", "text")
_AUTHOR_FIELDS = ("round", "agent")


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    """A named sequence of rounds.

    Attributes:
      name: name of the trace.
      rounds: the rounds; their indices are 0, 1, 2, ...

    Raises:
      PromptError: empty name, no rounds, indices out of order, or an author of a shared segment
        who takes no part in an earlier round of the named number.
    """

    name: str
    rounds: tuple[Round, ...]

    def __post_init__(self) -> None:
        check_name(self.name, "the name of a trace")
        if not isinstance(self.rounds, tuple) or not self.rounds:
            raise PromptError(
                f"trace {self.name!r}: rounds must be a tuple with at least one Round"
            )
        for index, round_ in enumerate(self.rounds):
            if round_.index != index:
                raise PromptError(
                    f"trace {self.name!r}: round {round_.index} stands where {index} belongs; "
                    "number the rounds from 0 in order"
                )
            try:
                _check_authors(round_, self.rounds[:index])
            except PromptError as error:
                raise PromptError(f"trace {self.name!r}: {error}") from None


def read_traces(path: str | os.PathLike[str]) -> dict[str, Trace]:
    """Reads all traces of a file.

    Args:
      path: a JSON lines file, compressed if its name ends in ".gz".

    Returns:
      The traces by name, in the order of their first lines in the file.

    Raises:
      PromptError: the file cannot be read or a line does not have the format; names file, line and
        trace.
    """
    lines: dict[str, list[_Line]] = {}
    for line in _lines(path):
        if line.trace is None:
            _parse(line)  # raises the error with the cause
        else:
            lines.setdefault(line.trace, []).append(line)
    if not lines:
        raise PromptError(f"{os.fspath(path)}: the file holds no lines; give a trace")
    return {name: _trace(name, found) for name, found in lines.items()}


def read_trace(path: str | os.PathLike[str], name: str | None = None) -> Trace:
    """Reads one trace of a file; errors in the lines of other traces do not matter.

    A line that does not name its trace, such as one that was cut off, may belong to the trace of
    the line before or after it. It is an error if one of these belongs to the requested trace.

    Args:
      path: a JSON lines file, compressed if its name ends in ".gz".
      name: name of the trace; None for the first one in the file.

    Returns:
      The trace.

    Raises:
      PromptError: the file cannot be read, has no trace of that name, or a line of the trace does
        not have the format; names file, line and trace.
    """
    known: list[str] = []
    wanted: list[_Line] = []
    strays: list[_Line] = []  # lines after the last one that names its trace
    before = None
    for line in _lines(path):
        if line.trace is None:
            strays.append(line)
            continue
        if line.trace not in known:
            known.append(line.trace)
        if name is None:
            name = before = line.trace
        if strays and name in (before, line.trace):
            _parse(strays[0])
        strays, before = [], line.trace
        if line.trace == name:
            wanted.append(line)
    if strays and before in (None, name):
        _parse(strays[0])
    if not known:
        raise PromptError(f"{os.fspath(path)}: the file holds no lines; give a trace")
    if name is None or not wanted:
        raise PromptError(f"{os.fspath(path)}: no trace {name!r}; the file has {', '.join(known)}")
    return _trace(name, wanted)


def write_trace(path: str | os.PathLike[str], trace: Trace) -> None:
    """Writes a trace atomically: the file appears complete or not at all.

    Args:
      path: the file, compressed if its name ends in ".gz"; replaced if it exists.
      trace: the trace. The format does not include each round's `sampling`.

    Raises:
      PromptError: a segment holds token ids instead of text.
      OSError: the file cannot be written.
    """
    path = pathlib.Path(path)
    text = "".join(
        json.dumps(_fields(trace, round_, prompt), ensure_ascii=False, separators=(",", ":")) + "\n"
        for round_ in trace.rounds
        for prompt in round_.agents
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


@dataclasses.dataclass(frozen=True, slots=True)
class _Line:
    """A line of a file.

    Attributes:
      where: file and number of the line, from 1.
      trace: name of its trace; None if the line does not name one.
      value: the parsed JSON; a `PromptError` if the line is not valid JSON.
    """

    where: str
    trace: str | None
    value: object


def _lines(path: str | os.PathLike[str]) -> Iterator[_Line]:
    """Reads the lines of a file. Only a newline ends a line, not U+2028 or similar characters."""
    number = 0
    try:
        opener = gzip.open if os.fspath(path).endswith(".gz") else open
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                value = _json(line)
                name = value.get("trace") if isinstance(value, dict) else None
                name = name if isinstance(name, str) and name else None
                yield _Line(f"{os.fspath(path)}:{number}", name, value)
    except OSError as error:
        raise PromptError(f"{os.fspath(path)}: cannot be read: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:
        raise PromptError(
            f"{os.fspath(path)}:{number + 1}: damaged gzip data ({error}); fetch the file again"
        ) from None


def _json(line: bytes) -> object:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return PromptError(f"not UTF-8: {error.reason}")
    except (ValueError, RecursionError) as error:
        return PromptError(f"not a JSON line: {error}")


def _parse(line: _Line) -> tuple[int, AgentPrompt]:
    """Converts one line to its round index and prompt.

    Raises:
      PromptError: the line does not have the format; names file, line and trace.
    """
    try:
        if isinstance(line.value, PromptError):
            raise line.value
        fields = _object(line.value, "a line", _LINE_FIELDS, ("recorded_output", "fidelity"))
        check_name(fields["trace"], "trace")
        check_integer(fields["round"], "round", 0)
        check_integer(fields["max_new_tokens"], "max_new_tokens", 1)
        if not isinstance(fields["segments"], list):
            raise PromptError("segments must be a list")
        prompt = AgentPrompt(
            fields["agent"],
            tuple(_segment(value, number) for number, value in enumerate(fields["segments"])),
            fields["max_new_tokens"],
            fields.get("recorded_output"),
            fields.get("fidelity", "collective"),
        )
        return fields["round"], prompt
    except PromptError as error:
        raise _located(line, error) from None


def _segment(value: object, number: int) -> Segment:
    fields = _object(value, f"segment {number}", _SEGMENT_FIELDS, ("author",))
    if "author" in fields:
        author = _object(fields["author"], f"segment {number}: author", _AUTHOR_FIELDS)
        fields = {**fields, "author": Author(**author)}
    return Segment(**fields)


def _located(line: _Line, error: PromptError) -> PromptError:
    """Returns the error with the place and the trace of the line added to its message."""
    trace = "" if line.trace is None else f"trace {line.trace!r}: "
    return PromptError(f"{line.where}: {trace}{error}")


def _trace(name: str, lines: Sequence[_Line]) -> Trace:
    """Builds a trace from its lines."""
    drafts: list[tuple[_Line, dict[str, AgentPrompt]]] = []  # first line, prompts
    for line in lines:
        index, prompt = _parse(line)
        last = len(drafts) - 1
        if index == last + 1:
            drafts.append((line, {}))
        elif index != last:
            follows = (
                f"round {index} follows round {last}; number rounds from 0 and keep the lines "
                "of each round together"
            )
            starts = f"starts with round {index}; number rounds from 0"
            raise _located(line, PromptError(follows if drafts else starts))
        prompts = drafts[-1][1]
        if prompt.agent in prompts:
            raise _located(
                line, PromptError(f"agent {prompt.agent!r} occurs twice in round {index}")
            )
        prompts[prompt.agent] = prompt
    rounds: list[Round] = []
    for index, (line, prompts) in enumerate(drafts):
        agents = tuple(prompts.values())
        most = max(prompt.max_new_tokens or 1 for prompt in agents)
        try:
            round_ = Round(agents, max_new_tokens=most, index=index)
            _check_authors(round_, rounds)
        except PromptError as error:
            raise _located(line, error) from None
        rounds.append(round_)
    return Trace(name, tuple(rounds))


def _check_authors(round_: Round, before: Sequence[Round]) -> None:
    """Raises if a block's author takes no part in an earlier round of the named number."""
    agents = [{prompt.agent for prompt in earlier.agents} for earlier in before]
    for prompt in round_.agents:
        for segment in prompt.segments:
            author = segment.author
            if author is None or (
                author.round < len(agents) and author.agent in agents[author.round]
            ):
                continue
            raise PromptError(
                f"round {round_.index}: shared segment {segment.id!r}: its author {author.agent!r} "
                f"takes no part in an earlier round {author.round}; name another, or leave it out"
            )


def _object(
    value: object, what: str, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Returns `value` if it is a JSON object with these fields and no others; else raises."""
    if not isinstance(value, dict):
        raise PromptError(f"{what} must be a JSON object, got {type(value).__name__}")
    if missing := [field for field in required if field not in value]:
        raise PromptError(f"{what} lacks the field {missing[0]!r}")
    if unknown := [field for field in value if field not in required + optional]:
        raise PromptError(
            f"{what} has an unknown field {unknown[0]!r}; known: {', '.join(required + optional)}"
        )
    return value


def _fields(trace: Trace, round_: Round, prompt: AgentPrompt) -> dict[str, object]:
    """Returns the fields of one line, in the order of the format."""
    for segment in prompt.segments:
        if segment.text is None:
            raise PromptError(
                f"trace {trace.name!r}: agent {prompt.agent!r}: segment {segment.id!r} holds token "
                "ids; a trace holds text"
            )
    fields: dict[str, object] = {
        "trace": trace.name,
        "round": round_.index,
        "agent": prompt.agent,
        "segments": [_segment_fields(segment) for segment in prompt.segments],
        "max_new_tokens": prompt.max_new_tokens or round_.max_new_tokens,
    }
    if prompt.recorded_output is not None:
        fields["recorded_output"] = prompt.recorded_output
    if prompt.fidelity != "collective":
        fields["fidelity"] = prompt.fidelity
    return fields


def _segment_fields(segment: Segment) -> dict[str, object]:
    fields: dict[str, object] = {name: getattr(segment, name) for name in _SEGMENT_FIELDS}
    if segment.author is not None:
        fields["author"] = dataclasses.asdict(segment.author)
    return fields

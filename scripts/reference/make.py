"""Writes the reference of serve_round: flags, fields of traces, and fields of results.

python -m scripts.reference.make
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import app, flags

from scripts import serve_round
from tokendance_jax.engine.result import AgentLedger, RoundLedger, Timings

FILE = Path(__file__).with_name("serve_round.md")

_TRACES = """\
## Traces

A trace is a file of JSON lines, gzip-compressed if its name ends in `.gz`. Each line is the prompt
of one agent in one round. Lines are ordered by round, then by agent.

| field | meaning |
|---|---|
| `trace` | name of the trace; a file may hold several |
| `round` | number of the round, from 0 |
| `agent` | name of the agent |
| `segments` | the prompt: a list of `{"kind", "id", "text"}`, in order |
| `max_new_tokens` | maximum number of tokens of the answer |
| `recorded_output` | the agent's answer in the recording (optional) |
| `fidelity` | `exact`: the agent reads nothing that was computed in another context (optional) |

The kind of a segment is `system` or `history` (private to the agent), `shared` (a block that other
agents may hold too) or `task` (the agent's own question, last). Within a round, all shared segments
with the same id have the same text. Segments are encoded one by one, so a shared block has the same
tokens in every prompt. Strings such as `<|im_end|>` in a segment are encoded as ordinary
characters, never as markup.

With `--replay`, the default, shared blocks are the recorded ones. With `--noreplay`, every block
that is an answer of an earlier round is replaced by the same agent's answer in this run; histories
stay as recorded. The optional field `author` of a shared segment (`{"round", "agent"}`) names the
agent who gave the answer, and the round. Without this field, the author follows from the id
(`out/r0/Ann`), or from the text if it equals a recorded output. If the author of a block cannot be
determined, an error names the round and the block.

An invalid line is an error in its own trace; `--trace_name` still serves the other traces of the
file. A line without the name of its trace, such as a line that was cut off, may belong to the trace
before or after it and is an error in both.
"""

_JSON = """\
## Results

`--json` names a file that is replaced after each round, so that it holds one valid JSON object at
any time. Numbers that are not finite are `null`.

`config` holds the flags. `policies` holds for each policy the sums over its rounds, the number of
answers, the number of right answers (in replays of the demo), and the agreement with the first
policy: the mean and the 95th percentile of the KL divergence, the share of positions with the same
most probable token, and the mean number of tokens before the first difference. `rounds` has one
entry for each policy and round:
"""

_ANSWERS = {
    "policy": "the policy",
    "round": "number of the round",
    "agents": "number of agents",
    "outputs": "the answers, by agent",
    "output_ids": "the token ids of the answers, by agent",
    "finish_reasons": "`stop` or `length`, by agent",
}


def attributes(kind: type) -> dict[str, str]:
    """Returns the descriptions of a class's attributes in its docstring, by attribute."""
    text = inspect.getdoc(kind) or ""
    lines = text.partition("Attributes:\n")[2]
    found = {}
    for entry in re.split(r"\n  (?=\w)", lines.rstrip()):
        name, _, meaning = entry.strip().partition(": ")
        found[name] = " ".join(meaning.split())
    return found


def _flags() -> Iterator[str]:
    for flag in flags.FLAGS.get_flags_for_module(serve_round):
        default = flag.default
        if isinstance(default, list):
            default = ", ".join(map(str, default))
        shown = "" if default is None else f"`{default}`"
        name = f"[no]{flag.name}" if flag.boolean else flag.name
        yield f"| `--{name}` | {shown} | {_meaning(flag)} |"


def _meaning(flag: flags.Flag) -> str:
    """Returns the help of a flag without absl's additions, followed by the possible values."""
    values = getattr(flag.parser, "enum_values", None)
    listed = f" One of {', '.join(f'`{value}`' for value in values)}." if values else ""
    text = re.sub(r"^<[^>]*>: ", "", " ".join((flag.help or "").split()))
    return text.removesuffix("; repeat this option to specify a list of values") + listed


def _fields() -> Iterator[str]:
    meanings = attributes(AgentLedger) | attributes(RoundLedger) | attributes(Timings)
    names = [field.name for kind in (RoundLedger, Timings) for field in dataclasses.fields(kind)]
    for name in names:
        yield f"| `{name}` | {meanings[name].rstrip('.')} |"
    yield from (f"| `{name}` | {meaning} |" for name, meaning in _ANSWERS.items())


def reference() -> str:
    """Returns the text of the reference."""
    return "\n".join(
        [
            "# Reference of `scripts.serve_round`",
            "",
            "Written by `python -m scripts.reference.make` from the flags and the docstrings.",
            "",
            "The exit status is 0 on success, 1 after an error, and 130 after Ctrl-C. Flags,",
            "output paths and the prompts of a replay are checked before anything is computed.",
            "After a later error or Ctrl-C, the results so far are still printed and written.",
            "",
            "## Flags",
            "",
            "| flag | default | meaning |",
            "|---|---|---|",
            *_flags(),
            "",
            _TRACES,
            _JSON,
            "| field | meaning |",
            "|---|---|",
            *_fields(),
            "",
        ]
    )


def main(argv: Sequence[str]) -> None:
    """Writes the reference."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    app.run(main)

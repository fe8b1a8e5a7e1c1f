"""Writes the reference of serve_round: its flags, the fields of traces, and those of its results.

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

A trace is a file of JSON lines, compressed if its name ends in `.gz`. One line is the prompt of one
agent in one round. Lines are ordered by round, then by agent.

| field | meaning |
|---|---|
| `trace` | name of the trace; a file may hold several |
| `round` | from 0 |
| `agent` | name of the agent |
| `segments` | the prompt in order: a list of `{"kind", "id", "text"}` |
| `max_new_tokens` | limit for the answer |
| `recorded_output` | what the agent answered in the recording (optional) |
| `fidelity` | `exact`: the agent reads nothing that was computed in another context (optional) |

Kinds of segments are `system` and `history` (private to the agent), `shared` (a block that other
agents may hold too) and `task` (the agent's own question, last). Within a round a shared id has one
text. Segments are encoded one by one, so a shared block has the same tokens in every prompt.
Strings such as `<|im_end|>` in a segment are ordinary characters, never markup.

With `--replay`, the default, shared blocks are the recorded ones. With `--noreplay`, every block
that is an answer of an earlier round is replaced by what the same agent answered in this run;
histories stay as recorded. The `author` of a shared segment (`{"round", "agent"}`) says whose
answer it is. Without it the id tells (`out/r0/Ann`), or the text, if it equals a recorded output. A
block whose author cannot be told is an error that names the round and the block.

A bad line is an error in its own trace; `--trace_name` still serves the others. A line that names
no trace, such as one that was cut off, may belong to the trace before or after it and is an error
in both.
"""

_JSON = """\
## Results

`--json` names a file that is replaced after each round, so it is one valid JSON object at any time.
Numbers that are not finite are `null`.

`config` holds the flags. `policies` holds for each policy the sums over its rounds, its number of
answers, how many of them are right (in replays of the demo), and its agreement with the first
policy: mean and 95th percentile of the KL divergence, share of equal most probable tokens, and
tokens before the first that differs. `rounds` has one entry for each policy and round:
"""

_ANSWERS = {
    "policy": "the policy",
    "round": "number of the round",
    "agents": "number of agents",
    "outputs": "agent to answer",
    "output_ids": "agent to the token ids of the answer",
    "finish_reasons": "agent to `stop` or `length`",
}


def attributes(kind: type) -> dict[str, str]:
    """What the docstring of a class says of each of its attributes."""
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
    """The help without what absl adds to it, and the choices behind it."""
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
    """The text of the reference."""
    return "\n".join(
        [
            "# Reference of `scripts.serve_round`",
            "",
            "Written by `python -m scripts.reference.make` from the flags and the docstrings.",
            "",
            "The exit status is 0, 1 after an error, and 130 after Ctrl-C. Flags, outputs and the",
            "prompts of a replay are checked before anything is computed. After a later error, and",
            "after Ctrl-C, what was done is still shown and written.",
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

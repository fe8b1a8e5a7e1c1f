"""Converts a recording of agents, a plain JSON file, to a trace of rounds.

  python -m scripts.make_trace --recording=recording.json --trace=trace.jsonl.gz

`tokendance_jax.prompt.recording` describes the JSON. The answers of all agents in a round become
shared blocks of the next round.
"""

import json
from collections.abc import Sequence

from absl import app, flags

from scripts.helpers import common, terminal
from tokendance_jax.prompt import PromptError, write_trace
from tokendance_jax.prompt.recording import BLOCKS, trace_of

_RECORDING = flags.DEFINE_string("recording", "", "JSON file with the recording. Required.")
_TRACE = flags.DEFINE_string("trace", "", "Trace to write: a .jsonl or .jsonl.gz file. Required.")
_BLOCKS = flags.DEFINE_enum(
    "blocks",
    "all",
    BLOCKS,
    "Shared blocks that an agent sees. 'all': all, in one order; 'own_first': all, its own first; "
    "'others': all but its own.",
)


def main(argv: Sequence[str]) -> int:
    """Reads the recording and writes the trace; returns the exit status: 0, or 1 after an error."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    try:
        for name, value in (("recording", _RECORDING.value), ("trace", _TRACE.value)):
            if not value:
                raise PromptError(f"{name}: name a file with --{name}")
        with open(_RECORDING.value, encoding="utf-8") as file:
            try:
                recording = json.load(file)
            except ValueError as error:
                raise PromptError(f"recording: {_RECORDING.value} is not JSON: {error}") from None
        trace = trace_of(recording, blocks=_BLOCKS.value)
        write_trace(_TRACE.value, trace)
    except common.ERRORS as error:
        terminal.complain("make_trace", error)
        return 1
    agents = max(len(round_.agents) for round_ in trace.rounds)
    terminal.console().print(
        f"{terminal.markup(_TRACE.value)}: {len(trace.rounds)} rounds of up to {agents} agents"
    )
    return 0


if __name__ == "__main__":
    app.run(main)

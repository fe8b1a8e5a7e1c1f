"""Converts a checkpoint to the project's Orbax format.

Reads a Hugging Face folder, a GGUF file, an Orbax folder or a hub id, and writes a new Orbax
folder, which loads faster. If the conversion fails, nothing is left at the target.

  python -m scripts.convert_weights --source=Qwen/Qwen2.5-0.5B-Instruct --target=weights/0.5b
  python -m scripts.convert_weights --source=model.gguf --target=weights/coder --dtype=float32
"""

from collections.abc import Sequence

from absl import app, flags

from scripts.helpers import common, terminal
from tokendance_jax.models.loading import load_checkpoint, save_orbax
from tokendance_jax.models.loading.sidecars import check_target

_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "Checkpoint to convert: a folder with config.json and safetensors files, a GGUF file, an Orbax "
    "folder or a Hugging Face hub id.",
    required=True,
)
_TARGET = flags.DEFINE_string(
    "target", None, "Orbax folder to write; it must not exist.", required=True
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "bfloat16",
    ["float32", "bfloat16"],
    "Precision of the matrices; norm weights and biases are always float32.",
)


def main(argv: Sequence[str]) -> int:
    """Converts the checkpoint; returns the exit status: 0, or 1 after a message on stderr."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    common.quiet_logs()
    try:
        common.path_of(_SOURCE.value, "source")
        target = common.path_of(_TARGET.value, "target")
        check_target(target)
        checkpoint = load_checkpoint(_SOURCE.value, dtype=_DTYPE.value, progress=True)
        save_orbax(checkpoint, target)
    except common.ERRORS as error:
        terminal.complain("convert_weights", error)
        return 1
    size = sum(array.nbytes for array in checkpoint.params.values())
    found = f"{checkpoint.name}: {len(checkpoint.params)} arrays, {size:,} bytes -> {target}"
    terminal.console().print(terminal.markup(found), soft_wrap=True)
    return 0


if __name__ == "__main__":
    app.run(main)

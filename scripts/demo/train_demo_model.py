"""Trains the demo's model from nothing, on a CPU, on conversations of a small town.

  python -m scripts.demo.train_demo_model --out=town-run --minutes=110
  python -m scripts.demo.train_demo_model --out=town-run --steps=200 --layers=2

The folder keeps the recipe, the tokenizer, checkpoints, the loss, and in the end `model/`, a
Hugging Face folder in bfloat16, with `probes.json`: how often the engine's greedy answers to
held-out probes are right. A run that was stopped goes on where its last checkpoint is.
"""

import dataclasses
import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from scripts.demo import tokenizer as demo_tokenizer
from scripts.demo.data import tokenizer_texts
from scripts.demo.run import Run
from scripts.demo.training import Recipe, Stage, start, train_step
from scripts.helpers import common, probe_tables, terminal
from tokendance_jax import host
from tokendance_jax.model import load_model
from tokendance_jax.models.qwen2.config import Qwen2Config
from tokendance_jax.study import probes

_OUT = flags.DEFINE_string("out", None, "Folder of the run; made if missing.", required=True)
_RESUME = flags.DEFINE_bool("resume", True, "Whether to go on with a run that the folder holds.")
_MINUTES = flags.DEFINE_float(
    "minutes",
    110.0,
    "Time for the steps: how many follows from the time of the first ones.",
    lower_bound=0,
)
_STEPS = flags.DEFINE_integer(
    "steps", 0, "Number of steps; 0: as many as fit in --minutes.", lower_bound=0
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of parameters and data.", lower_bound=0)
_LAYERS = flags.DEFINE_integer("layers", 6, "Decoder layers.", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 256, "Width; heads are 64 wide, two to a KV head.")
_INNER = flags.DEFINE_integer("inner", 512, "Width of the MLP.", lower_bound=1)
_LEARNING_RATE = flags.DEFINE_float(
    "learning_rate", 1.5e-3, "Peak of the learning rate.", lower_bound=0
)
_WARMUP = flags.DEFINE_integer("warmup", 100, "Steps of warm-up.", lower_bound=0)
_WEIGHT_DECAY = flags.DEFINE_float("weight_decay", 0.1, "Weight decay of matrices.", lower_bound=0)
_TEXT_WEIGHT = flags.DEFINE_float(
    "text_weight", 0.1, "Weight of tokens that are no answer.", lower_bound=0
)
_STAGES = flags.DEFINE_multi_string(
    "stage",
    ["0.02:256:8:0", "0.38:512:4:5", "0.35:768:4:10", "0.25:1024:4:16"],
    "Part of the curriculum, as share of the steps:tokens in a row:rows:most agents (0: drills); "
    "repeat the flag.",
)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Precision of products.")
_SAVE_MINUTES = flags.DEFINE_float(
    "save_minutes", 5.0, "Minutes between checkpoints.", lower_bound=0
)
_EVAL_STEPS = flags.DEFINE_integer(
    "eval_steps", 250, "Steps between checks on held-out towns.", lower_bound=1
)
_DRAWS = flags.DEFINE_integer(
    "draws", 20, "Draws of rounds of probes in each setting.", lower_bound=1
)
_SETTING = flags.DEFINE_multi_enum(
    "setting",
    list(probes.SETTINGS),
    list(probes.SETTINGS),
    "Settings of the probes; repeat the flag.",
)

_CONTEXT = 8192
_TIMED_STEPS = 3


def open_run(folder: Path, *, resume: bool) -> Run:
    """Opens the run in a folder, or begins one by the flags' values.

    Args:
      folder: the run's folder.
      resume: whether a run that the folder holds is taken up.

    Raises:
      ValueError: the folder holds a run and `resume` is false.
    """
    described = folder / "recipe.json"
    if described.exists():
        if not resume:
            raise ValueError(f"out: {folder} holds a run; name a new folder or resume it")
        fields = json.loads(described.read_text())
        stages = tuple(Stage(**stage) for stage in fields["recipe"].pop("stages"))
        recipe = Recipe(**fields["recipe"], stages=stages)
        config = Qwen2Config(**fields["config"])
        return Run(folder, config, recipe, (folder / "tokenizer.json").read_text())
    config, recipe = _config(), _recipe()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_json = demo_tokenizer.train(tokenizer_texts())
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    if not recipe.steps:
        recipe = _timed(Run(folder, config, recipe, tokenizer_json), _MINUTES.value * 60)
    # Last, so that a folder without it is begun anew.
    fields = {"config": dataclasses.asdict(config), "recipe": dataclasses.asdict(recipe)}
    common.write_json(str(described), fields)
    return Run(folder, config, recipe, tokenizer_json)


def _config() -> Qwen2Config:
    if _WIDTH.value < 128 or _WIDTH.value % 128:
        raise ValueError(f"width: {_WIDTH.value} is no multiple of 128; heads come in pairs")
    heads = _WIDTH.value // 64
    return Qwen2Config(
        vocab_size=demo_tokenizer.VOCAB_SIZE,
        hidden_size=_WIDTH.value,
        intermediate_size=_INNER.value,
        num_hidden_layers=_LAYERS.value,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=64,
        max_position_embeddings=_CONTEXT,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )


def _recipe() -> Recipe:
    stages = []
    for text in _STAGES.value:
        try:
            share, length, rows, agents = text.split(":")
            stages.append(Stage(float(share), int(length), int(rows), int(agents)))
        except ValueError:
            raise ValueError(f"stage: {text!r} is not share:tokens:rows:agents") from None
    return Recipe(
        steps=_STEPS.value,
        learning_rate=_LEARNING_RATE.value,
        warmup=_WARMUP.value,
        weight_decay=_WEIGHT_DECAY.value,
        text_weight=_TEXT_WEIGHT.value,
        dtype=_DTYPE.value,
        seed=_SEED.value,
        stages=tuple(stages),
    )


def _timed(run: Run, seconds: float) -> Recipe:
    """The recipe with as many steps as fit in a time, by the first steps of each stage."""
    per_step = 0.0
    for stage in run.recipe.stages:
        # A plan of this stage alone; its programs are thrown away.
        recipe = dataclasses.replace(
            run.recipe, steps=1000, stages=(dataclasses.replace(stage, share=1.0),)
        )
        alone = Run(run.folder, run.config, recipe, run.tokenizer_json)
        state = start(run.config, recipe)
        for step in range(_TIMED_STEPS + 1):
            if step == 1:
                began = time.monotonic()
            batch = alone.batch(step)
            arrays = batch.token, batch.weight, batch.conversation
            state, losses = train_step(state, arrays, config=run.config, recipe=recipe)
            jax.block_until_ready(losses)
        per_step += stage.share * (time.monotonic() - began) / _TIMED_STEPS
    return dataclasses.replace(run.recipe, steps=max(100, int(seconds / per_step)))


def main(argv: Sequence[str]) -> int:
    """Trains, exports and scores; returns the exit status: 0, or 1 after an error."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    common.quiet_logs()
    host.tune_allocator()
    try:
        run = open_run(common.path_of(_OUT.value, "out"), resume=_RESUME.value)
        params = run.train(save_minutes=_SAVE_MINUTES.value, eval_steps=_EVAL_STEPS.value)
        if importlib.util.find_spec("matplotlib"):
            run.plot()
        model = run.export(params)
        found: list[dict[str, Any]] = []
        for found in probes.measure_variants(
            load_model(model, dtype="float32"), [], _SETTING.value, draws=_DRAWS.value
        ):
            common.write_json(str(run.folder / "probes.json"), {"policies": found})
        for table in probe_tables.tables(found):
            terminal.console().print(table)
    except common.ERRORS as error:
        terminal.complain("train_demo_model", error)
        return 1
    return 0


if __name__ == "__main__":
    app.run(main)

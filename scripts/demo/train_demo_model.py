"""Trains the demo's model from scratch, on a CPU, on conversations of a small town.

  python -m scripts.demo.train_demo_model --out=town-run --minutes=110
  python -m scripts.demo.train_demo_model --out=town-run --steps=200 --layers=2

The folder of the run holds the recipe, the tokenizer, checkpoints and the loss. At the end it also
holds `model/`, a Hugging Face folder in bfloat16, and `probes.json`: how often the engine's greedy
answers to held-out probes are right. A run that was stopped continues from its latest checkpoint.
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
from tokendance_jax.kernels.rope import Rope
from tokendance_jax.model import load_model
from tokendance_jax.models.decoder.config import DecoderConfig
from tokendance_jax.models.families.qwen2 import QWEN2
from tokendance_jax.study import probes

_OUT = flags.DEFINE_string(
    "out", None, "Folder of the run; created if it does not exist.", required=True
)
_RESUME = flags.DEFINE_bool(
    "resume", True, "Whether to continue a run that the folder holds; --noresume refuses it."
)
_MINUTES = flags.DEFINE_float(
    "minutes",
    110.0,
    "Minutes that all steps may take; the time of the first ones determines their number. Ignored "
    "with --steps.",
    lower_bound=0,
)
_STEPS = flags.DEFINE_integer(
    "steps", 0, "Number of training steps; 0: as many as fit in --minutes.", lower_bound=0
)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed of parameters and data.", lower_bound=0)
_LAYERS = flags.DEFINE_integer("layers", 6, "Number of decoder layers.", lower_bound=1)
_WIDTH = flags.DEFINE_integer(
    "width",
    256,
    "Width of the residual stream, a multiple of 128; heads are 64 wide, two per KV head.",
)
_INNER = flags.DEFINE_integer("inner", 512, "Width of the MLP.", lower_bound=1)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 1.5e-3, "Peak learning rate.", lower_bound=0)
_WARMUP = flags.DEFINE_integer("warmup", 100, "Number of warm-up steps.", lower_bound=0)
_WEIGHT_DECAY = flags.DEFINE_float("weight_decay", 0.1, "Weight decay of matrices.", lower_bound=0)
_TEXT_WEIGHT = flags.DEFINE_float(
    "text_weight",
    0.1,
    "Loss weight of tokens outside of answers; tokens of answers have weight 1.",
    lower_bound=0,
)
_STAGES = flags.DEFINE_multi_string(
    "stage",
    ["0.02:256:8:0", "0.38:512:4:5", "0.35:768:4:10", "0.25:1024:4:16"],
    "Stages of the curriculum, as SHARE:TOKENS:ROWS:AGENTS: share of the steps, tokens in a row, "
    "rows in a batch, and most agents of a town (0: drills).",
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["float32", "bfloat16"], "Precision of the matrices in products."
)
_SAVE_MINUTES = flags.DEFINE_float(
    "save_minutes", 5.0, "Minutes between checkpoints.", lower_bound=0
)
_EVAL_STEPS = flags.DEFINE_integer(
    "eval_steps", 250, "Steps between evaluations on held-out towns.", lower_bound=1
)
_DRAWS = flags.DEFINE_integer(
    "draws", 20, "Number of draws of rounds of probes in each setting.", lower_bound=1
)
_SETTING = flags.DEFINE_multi_enum(
    "setting",
    list(probes.SETTINGS),
    list(probes.SETTINGS),
    "Kinds of rounds of probes to draw.",
)

_CONTEXT = 8192
_TIMED_STEPS = 3


def open_run(folder: Path, *, resume: bool) -> Run:
    """Opens the run in a folder, or starts a run with the values of the flags.

    Args:
      folder: the run's folder.
      resume: whether to continue a run that the folder holds.

    Raises:
      ValueError: the folder holds a run and `resume` is false.
    """
    described = folder / "recipe.json"
    if described.exists():
        if not resume:
            raise ValueError(f"out: {folder} holds a run; name a new folder, or use --resume")
        fields = json.loads(described.read_text())
        stages = tuple(Stage(**stage) for stage in fields["recipe"].pop("stages"))
        recipe = Recipe(**fields["recipe"], stages=stages)
        config = QWEN2.from_hf(fields["config"], "recipe.json")
        return Run(folder, config, recipe, (folder / "tokenizer.json").read_text())
    config, recipe = _config(), _recipe()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_json = demo_tokenizer.train(tokenizer_texts())
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    if not recipe.steps:
        recipe = _timed(Run(folder, config, recipe, tokenizer_json), _MINUTES.value * 60)
    # Written last: in a folder without this file, the run starts anew.
    fields = {"config": QWEN2.to_hf(config), "recipe": dataclasses.asdict(recipe)}
    common.write_json(str(described), fields)
    return Run(folder, config, recipe, tokenizer_json)


def _config() -> DecoderConfig:
    if _WIDTH.value < 128 or _WIDTH.value % 128:
        raise ValueError(
            f"width: {_WIDTH.value} is not a multiple of 128; heads are 64 wide and come in pairs"
        )
    heads = _WIDTH.value // 64
    return QWEN2.config(
        vocab_size=demo_tokenizer.VOCAB_SIZE,
        hidden_size=_WIDTH.value,
        intermediate_size=_INNER.value,
        num_hidden_layers=_LAYERS.value,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=64,
        max_position_embeddings=_CONTEXT,
        rope=Rope(1e6),
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
    """Returns the recipe with as many steps as fit in a time; times first steps of every stage."""
    per_step = 0.0
    for stage in run.recipe.stages:
        # A recipe of this stage alone; its compiled program is not used again.
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

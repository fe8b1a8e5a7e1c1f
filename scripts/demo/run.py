"""A training run of the demo model and its folder: batches, checkpoints, the loss, the export."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from scripts.demo.data import Batch, draw_batch
from scripts.demo.training import Params, Recipe, Stage, hits, start, train_step
from tokendance_jax.demo import demo_chat_template
from tokendance_jax.demo.town import KINDS, words
from tokendance_jax.models.decoder.config import DecoderConfig
from tokendance_jax.models.loading import Checkpoint, save_huggingface
from tokendance_jax.prompt import Tokenizer

_LOG_STEPS = 10
_HELD_OUT_ROWS = 24
# Seeds of data: (seed, _TRAIN, step); held-out batches are the same for every run.
_TRAIN, _HELD_OUT = 0, 1


class Run:
    """A training run and its folder."""

    def __init__(self, folder: Path, config: DecoderConfig, recipe: Recipe, tokenizer_json: str):
        self.folder, self.config, self.recipe = folder, config, recipe
        self.tokenizer_json = tokenizer_json
        self.tokenizer = Tokenizer(tokenizer_json, demo_chat_template())
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute() / "checkpoints", options=options)

    def batch(self, step: int) -> Batch:
        """Draws the batch of a step."""
        return self._draw((self.recipe.seed, _TRAIN, step), self.recipe.stage(step), low=2)

    def held_out(self, stage: Stage) -> Batch:
        """Draws a fixed batch of held-out names and places, in towns of a stage's largest size."""
        stage = dataclasses.replace(stage, rows=_HELD_OUT_ROWS)
        return self._draw((_HELD_OUT,), stage, low=stage.agents, split="held_out")

    def _draw(
        self, seed: tuple[int, ...], stage: Stage, *, low: int, split: words.Split = "train"
    ) -> Batch:
        return draw_batch(
            self.tokenizer,
            seed,
            rows=stage.rows,
            length=stage.length,
            agents=(low, stage.agents),
            text_weight=self.recipe.text_weight,
            split=split,
        )

    def restore(self) -> tuple[int, dict]:
        """Returns the number of steps done, and the state after them."""
        state = start(self.config, self.recipe)
        step = self._manager.latest_step()
        if step is None:
            return 0, state
        return step, dict(self._manager.restore(step, args=ocp.args.StandardRestore(state)))

    def save(self, step: int, state: dict) -> None:
        """Writes a checkpoint, unless the latest one is of this step."""
        if self._manager.latest_step() != step:
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def train(self, *, save_minutes: float, eval_steps: int, until: int | None = None) -> Params:
        """Trains from the latest checkpoint on.

        Args:
          save_minutes: minutes between checkpoints.
          eval_steps: steps between evaluations on held-out towns.
          until: the step after which to stop; None: the recipe's last.

        Returns:
          The parameters.
        """
        step, state = self.restore()
        log = self.folder / "loss.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        log.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))
        started = saved = time.monotonic()
        first = step
        until = self.recipe.steps if until is None else until
        while step < until:
            batch = self.batch(step)
            arrays = batch.token, batch.weight, batch.conversation
            state, losses = train_step(state, arrays, config=self.config, recipe=self.recipe)
            step += 1
            last = step == until
            if step % _LOG_STEPS and not last:
                continue
            answers, text = np.asarray(losses).tolist()
            entry = {"step": step, "answers": round(answers, 4), "text": round(text, 4)}
            if step % eval_steps == 0 or last:
                entry["held_out"] = self.score(state["params"], self.recipe.stage(step - 1))
            with log.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            left = (time.monotonic() - started) / (step - first) * (until - step)
            print(f"{json.dumps(entry)} {left / 60:.0f} min left", file=sys.stderr, flush=True)
            if time.monotonic() - saved > save_minutes * 60 or last:
                self.save(step, state)
                saved = time.monotonic()
        return state["params"]

    def score(self, params: Params, stage: Stage) -> dict[str, float]:
        """Returns the share of right answers by kind, on the held-out batch of a stage."""
        batch = self.held_out(stage)
        arrays = batch.token, batch.conversation
        hit = hits(params, *arrays, config=self.config, dtype=self.recipe.dtype)
        counts = batch.correct(np.asarray(hit))
        return {kind: round(right / total, 3) for kind, (right, total) in counts.items() if total}

    def export(self, params: Params) -> Path:
        """Writes the model as a Hugging Face folder, unless the folder exists; returns its path."""
        folder = self.folder / "model"
        if not folder.exists():
            stop_ids = sorted(self.tokenizer.encode_markup("<|endoftext|><|im_end|>"))
            checkpoint = Checkpoint(
                config=self.config,
                params=params,
                tokenizer_json=self.tokenizer_json,
                chat_template=demo_chat_template(),
                stop_ids=tuple(stop_ids),
                name="town",
            )
            save_huggingface(checkpoint, folder)
        return folder

    def plot(self) -> None:
        """Plots the loss and the share of right answers to `loss.png`; needs matplotlib."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        entries = [json.loads(line) for line in (self.folder / "loss.jsonl").open()]
        figure, (losses, shares) = pyplot.subplots(1, 2, figsize=(12, 4.5))
        for name in ("answers", "text"):
            points = [(entry["step"], entry[name]) for entry in entries]
            losses.plot(*zip(*points, strict=True), label=name)
        scored = [entry for entry in entries if entry.get("held_out")]
        for kind in KINDS:
            points = [(e["step"], e["held_out"][kind]) for e in scored if kind in e["held_out"]]
            if points:
                shares.plot(*zip(*points, strict=True), label=kind)
        losses.set_ylabel("loss of a token (nats)")
        shares.set_ylabel("right answers on held-out towns")
        for axis in (losses, shares):
            axis.set_xlabel("steps")
            axis.legend()
        figure.tight_layout()
        figure.savefig(self.folder / "loss.png", dpi=120)
        pyplot.close(figure)

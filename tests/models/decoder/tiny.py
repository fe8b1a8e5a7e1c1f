"""Tiny random models, and a prefill of lanes with them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from tests.small_model import SMALL_CONFIG
from tokendance_jax.demo import demo_tokenizer_json
from tokendance_jax.engine import programs as device
from tokendance_jax.engine.compiling import Programs
from tokendance_jax.engine.runner import Runner
from tokendance_jax.model import Model
from tokendance_jax.models.decoder.random import random_parameters
from tokendance_jax.models.loading import Checkpoint
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.plan.round_plan import pack
from tokendance_jax.plan.shapes import Shapes

# Fields in which a model of another family differs.
QWEN3 = {"family": "qwen3", "attention_bias": False, "qk_norm": True}


def tiny_model(dtype: DTypeLike = "float32", **change: Any) -> Model:
    """Returns a model of two layers, with 4 query heads and 2 KV heads of width 16.

    Args:
      dtype: precision of the matrices.
      change: other fields of the configuration.
    """
    config = dataclasses.replace(
        SMALL_CONFIG,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        head_dim=16,
        **change,
    )
    params = random_parameters(config, dtype)
    generator = np.random.default_rng(1)
    for path in params:
        if path.endswith(("q_norm.weight", "k_norm.weight")):  # else they are one
            params[path] = jnp.asarray(generator.uniform(0.5, 2, config.head_dim), jnp.float32)
    checkpoint = Checkpoint(config, params, demo_tokenizer_json(), None, (), "tiny")
    return Model.from_checkpoint(checkpoint, dtype)


def tiny_shapes(row_budget: int) -> Shapes:
    """Returns shapes of up to 4 lanes of 512 tokens, over 64 pages of 16 slots."""
    return Shapes.of(row_budget=row_budget, max_lanes=4, max_tokens=512, pages=64, page_size=16)


def tokens(count: int, seed: int = 0) -> np.ndarray:
    """Returns random token ids."""
    return np.random.default_rng(seed).integers(0, SMALL_CONFIG.vocab_size, count).astype(np.int32)


def prefill(programs: Programs, lanes: Sequence[LanePlan]) -> tuple[Runner, jax.Array]:
    """Prefills the lanes into an empty pool.

    Returns:
      The runner, and the residual stream of each lane's last row.
    """
    shapes = programs.shapes
    spec = programs.model.kv_spec(pages=shapes.pages, page_size=shapes.page_size)
    runner = Runner(programs, spec)
    hidden = runner.new_hidden(shapes.lanes.fit(len(lanes)))
    for plan in pack(lanes, shapes):
        hidden, _ = runner.run(device.prefill, hidden, plan)
    return runner, hidden

"""The demo's model: a small Qwen2.5 trained on the language of the town."""

import dataclasses
import importlib.resources

from jax.typing import DTypeLike

from tokendance_jax.demo import demo_checkpoint
from tokendance_jax.model import Model, load_model


def demo_model(dtype: DTypeLike) -> Model:
    """Loads the demo's model.

    Args:
      dtype: float32 or bfloat16.
    """
    with importlib.resources.as_file(demo_checkpoint()) as path:
        return dataclasses.replace(load_model(path, dtype=dtype), name="demo")

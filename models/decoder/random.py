"""Random parameters for tests and benchmarks."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from tokendance_jax.models.decoder.config import DecoderConfig
from tokendance_jax.models.decoder.parameters import parameter_shapes


def random_parameters(
    config: DecoderConfig, dtype: DTypeLike, *, seed: int = 0
) -> dict[str, jax.Array]:
    """Draws parameters whose activations have the scales of a freshly initialised model.

    Args:
      config: sizes of the model.
      dtype: precision of the matrices; vectors are float32.
      seed: the same seed gives the same numbers on every machine.

    Returns:
      Path to array: matrices normal with variance 1 / inputs, biases normal, norm weights one.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    params = {}
    for path, shape in parameter_shapes(config).items():
        if path.endswith("bias"):
            params[path] = jnp.asarray(generator.standard_normal(shape, np.float32))
        elif len(shape) == 1:
            params[path] = jnp.ones(shape, jnp.float32)
        else:
            scale = np.float32(1.0 if path.startswith("embed") else shape[1] ** -0.5)
            drawn = generator.standard_normal(shape, np.float32) * scale
            params[path] = jnp.asarray(drawn.astype(jnp.dtype(dtype)))
    return params

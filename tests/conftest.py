"""Settings of the whole test run: CPU, strict promotion, warnings as errors (see pyproject)."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from tests.simulators import simulator, tpu_simulator

__all__ = ["simulator", "tpu_simulator"]

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Engines of several tests compile the same programs: once per run is enough.
_PROGRAMS = tempfile.TemporaryDirectory(prefix="tokendance-tests-")
jax.config.update("jax_compilation_cache_dir", _PROGRAMS.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="session")
def demo_model():
    """The demo's model in float32, one for the whole run."""
    from tokendance_jax.demo.model import demo_model

    return demo_model("float32")

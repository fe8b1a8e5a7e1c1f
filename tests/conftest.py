"""Settings of the whole test run: CPU, strict promotion, warnings as errors (see pyproject)."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

from tests.simulators import simulator, tpu_simulator

__all__ = ["simulator", "tpu_simulator"]

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# On a busy machine an example may take long.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

# Engines of several tests compile the same programs: once per run is enough, whichever of its
# processes needs them. Those that run tests are started by the one that makes the folder.
if "TOKENDANCE_TEST_PROGRAMS" not in os.environ:
    _PROGRAMS = tempfile.TemporaryDirectory(prefix="tokendance-tests-")
    os.environ["TOKENDANCE_TEST_PROGRAMS"] = _PROGRAMS.name
jax.config.update("jax_compilation_cache_dir", os.environ["TOKENDANCE_TEST_PROGRAMS"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="session")
def small_model():
    """The small random model in float32, one for the whole run."""
    from tests.small_model import small_model

    return small_model("float32")

"""Settings of the whole test run: CPU, strict promotion, warnings as errors (see pyproject)."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Engines of several tests compile the same programs. All processes of a run share one cache, so
# each program is compiled once. The first process makes the folder; workers and the scripts that
# tests run are started by that process and inherit the variable.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _PROGRAMS = tempfile.TemporaryDirectory(prefix="tokendance-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _PROGRAMS.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import hypothesis
import jax
import pytest

from tests.simulators import simulator, tpu_simulator

__all__ = ["simulator", "tpu_simulator"]

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# There is no deadline because an example may take long on a busy machine.
# `--hypothesis-profile=thorough` draws more examples in tests that do not set their number.
hypothesis.settings.register_profile("tests", deadline=None, max_examples=24)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=500)
hypothesis.settings.load_profile("tests")


def pytest_configure(config):
    """Turns LLVM's optimisations off in the default tests, where they are half of compile time.

    Other tests keep them: they run longer computations, or inspect code compiled for accelerators.
    """
    if "not slow" in config.option.markexpr:
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Runs all tests of a file in one process: they share programs, models and counters.

    Most slow tests share little, and some take long, so each goes to whichever process is free.
    Only the tests of the probes share an engine.
    """
    from xdist.scheduler import LoadFileScheduling

    class BySharing(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return file if file.endswith("probes_test.py") else nodeid

    by_test = config.option.markexpr.startswith("slow")
    return (BySharing if by_test else LoadFileScheduling)(config, log)


@pytest.fixture(scope="session")
def small_model():
    """The small random model in float32, made once per process."""
    from tests.small_model import small_model

    return small_model("float32")

"""JAX's kernel simulators. They are not public yet, so only this module uses their internals."""

import pytest
from jax.experimental.pallas import tpu as pltpu


class Simulator:
    """The simulator of Mosaic GPU kernels."""

    def __init__(self):
        from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call

        self._get_races = interpret_pallas_call.get_races
        self.reset = gpu_callbacks.reset_gpu_interpret_mode_state
        self.reset()

    def races(self) -> bool:
        """Whether a thread of the last kernel read memory that another thread was writing."""
        return self._get_races().races_found


@pytest.fixture
def simulator():
    """A fresh simulator: once a kernel has failed, the simulator runs no other kernel."""
    try:
        simulator = Simulator()
    except ImportError as error:
        pytest.skip(f"this JAX has no simulator of Mosaic GPU kernels: {error}")
    yield simulator
    simulator.reset()


class TpuSimulator:
    """The simulator of Mosaic TPU kernels."""

    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")

    def races(self) -> bool:
        """Whether a copy and another access to the same memory were unordered."""
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call

        races = interpret_pallas_call.races
        assert races is not None
        return races.races_found


@pytest.fixture
def tpu_simulator():
    """A fresh simulator."""
    pltpu.reset_tpu_interpret_mode_state()
    yield TpuSimulator()
    pltpu.reset_tpu_interpret_mode_state()

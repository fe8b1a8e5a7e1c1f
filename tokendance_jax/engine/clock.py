"""Lap times in wall time, with or without compilation."""

import time

from tokendance_jax.engine.compiling import Programs


class Clock:
    """Measures laps of wall time, without compilation unless `cold`."""

    def __init__(self, programs: Programs, *, cold: bool):
        self._programs = programs
        self._cold = cold
        self._compiled_before = programs.compile_s
        self._start = self._mark = self._now()

    @property
    def compile_s(self) -> float:
        """Seconds of compilation since the start."""
        return self._programs.compile_s - self._compiled_before

    def lap(self) -> float:
        """Returns the seconds since the last lap, and starts the next lap."""
        before, self._mark = self._mark, self._now()
        return self._mark - before

    def total(self) -> float:
        """Returns the seconds since the start."""
        return self._now() - self._start

    def _now(self) -> float:
        return time.perf_counter() - (0.0 if self._cold else self._programs.compile_s)

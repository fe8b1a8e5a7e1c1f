"""Choosing the implementation of an operation."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import jax

# "interpret" runs the Mosaic GPU kernel on a CPU, in JAX's simulator of Mosaic GPU kernels.
IMPLEMENTATIONS = ("xla", "mosaic_gpu", "mosaic_tpu", "interpret")
_BY_PLATFORM = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}

Signature = TypeVar("Signature", bound=Callable[..., Any])
Result = TypeVar("Result")


def platform_of(implementation: str | None) -> str:
    """Returns the platform whose pools an implementation reads: "cpu", "gpu" or "tpu".

    For "xla" and None, this is JAX's default platform.

    Raises:
      ValueError: no implementation has that name.
    """
    _check(implementation)
    named = {kernel: platform for platform, kernel in _BY_PLATFORM.items()} | {"interpret": "gpu"}
    return named.get(implementation or "", jax.default_backend())


@dataclasses.dataclass(frozen=True)
class Op(Generic[Signature]):
    """An operation and its implementations, which share one signature.

    An implementation that does not support the arguments raises NotImplementedError, with a reason.

    Attributes:
      name: name of the operation, for messages.
      xla: XLA code, which supports all arguments.
      mosaic_gpu: a Pallas kernel for GPUs, with the additional argument `interpret`.
      mosaic_tpu: a Pallas kernel for TPUs.
    """

    name: str
    xla: Signature
    mosaic_gpu: Signature
    mosaic_tpu: Signature

    def run(self, implementation: str | None, call: Callable[[Signature], Result]) -> Result:
        """Calls one of the implementations.

        Args:
          implementation: one of `IMPLEMENTATIONS`. None selects the implementation for the default
            platform, and falls back to XLA code if that raises NotImplementedError.
          call: a function that calls the implementation passed to it.

        Returns:
          The result of `call`.

        Raises:
          ValueError: no implementation has that name.
          NotImplementedError: the named implementation does not support the arguments.
        """
        _check(implementation)
        if implementation == "interpret":
            return call(cast(Signature, functools.partial(_simulated, self.mosaic_gpu)))
        if implementation is not None:
            return call(getattr(self, implementation))
        preferred = _BY_PLATFORM.get(jax.default_backend(), "xla")
        try:
            return call(getattr(self, preferred))
        except NotImplementedError as reason:
            _report(self.name, preferred, str(reason))
            return call(self.xla)


def _check(implementation: str | None) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation: {implementation!r} is none of {known}")


def _simulated(kernel: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Runs a Mosaic GPU kernel in JAX's simulator of an H100, on a CPU."""
    # The simulator has no public API yet.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    from jax.sharding import AbstractDevice, AbstractMesh

    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=8)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return kernel(*arguments, **keywords, interpret=InterpretGPUParams(detect_races=True))


@functools.cache
def _report(name: str, implementation: str, reason: str) -> None:
    """Warns, once for each reason, that XLA code runs in place of a kernel."""
    logging.getLogger(__name__).warning(
        "%s: XLA code in place of %s: %s", name, implementation, reason
    )

"""Which implementation of an operation runs."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import jax

# "interpret" runs the Mosaic GPU kernel on a CPU, in JAX's simulator of such kernels.
IMPLEMENTATIONS = ("xla", "mosaic_gpu", "mosaic_tpu", "interpret")
_BY_PLATFORM = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}

Signature = TypeVar("Signature", bound=Callable[..., Any])
Result = TypeVar("Result")


def platform_of(implementation: str | None) -> str:
    """The platform whose pools an implementation reads: "cpu", "gpu" or "tpu".

    Raises:
      ValueError: there is no implementation of that name.
    """
    _check(implementation)
    named = {kernel: platform for platform, kernel in _BY_PLATFORM.items()} | {"interpret": "gpu"}
    return named.get(implementation or "", jax.default_backend())


@dataclasses.dataclass(frozen=True)
class Op(Generic[Signature]):
    """An operation and its implementations, which share one signature.

    An implementation that cannot take its arguments raises NotImplementedError with the reason.

    Attributes:
      name: name of the operation, for messages.
      xla: XLA code, which takes everything.
      mosaic_gpu: a Pallas kernel for GPUs, which also takes `interpret`.
      mosaic_tpu: a Pallas kernel for TPUs.
    """

    name: str
    xla: Signature
    mosaic_gpu: Signature
    mosaic_tpu: Signature

    def run(self, implementation: str | None, call: Callable[[Signature], Result]) -> Result:
        """Calls one of the implementations.

        Args:
          implementation: one of `IMPLEMENTATIONS`; None: that of the default platform, and XLA code
            where it raises NotImplementedError.
          call: calls the implementation that it is given.

        Returns:
          What `call` returned.

        Raises:
          ValueError: there is no implementation of that name.
          NotImplementedError: the named implementation cannot take the arguments.
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
    # The simulator is not public yet.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    from jax.sharding import AbstractDevice, AbstractMesh

    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=8)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return kernel(*arguments, **keywords, interpret=InterpretGPUParams(detect_races=True))


@functools.cache
def _report(name: str, implementation: str, reason: str) -> None:
    """Says once why XLA code runs in place of a kernel."""
    logging.getLogger(__name__).warning(
        "%s: XLA code in place of %s: %s", name, implementation, reason
    )

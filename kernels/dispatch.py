"""Which implementation of a kernel runs."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

# "interpret" runs the Mosaic GPU kernel on a CPU, in JAX's simulator of such kernels.
IMPLEMENTATIONS = ("xla", "mosaic_gpu", "mosaic_tpu", "interpret")
_BY_PLATFORM = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}


def platform_of(implementation: str | None) -> str:
    """The platform whose pools an implementation reads: "cpu", "gpu" or "tpu".

    Raises:
      ValueError: there is no implementation of that name.
    """
    _check(implementation)
    named = {kernel: platform for platform, kernel in _BY_PLATFORM.items()} | {"interpret": "gpu"}
    return named.get(implementation or "", jax.default_backend())


def call(
    name: str,
    implementation: str | None,
    kernels: Mapping[str, Callable[..., Any]],
    *arguments: Any,
    **keywords: Any,
) -> Any:
    """Runs one implementation of a kernel.

    Args:
      name: name of the kernel, for messages.
      implementation: one of `IMPLEMENTATIONS`; None: what the default platform has, and XLA code
        where that declares itself unfit for the arguments.
      kernels: the implementations that there are, but for "interpret". One that cannot take the
        arguments raises NotImplementedError with the reason.
      arguments: for the kernel.
      keywords: for the kernel.

    Returns:
      What the kernel returned.

    Raises:
      ValueError: there is no implementation of that name.
      NotImplementedError: the named implementation is unfit for the arguments.
    """
    _check(implementation)
    if implementation == "interpret":
        return _simulated(kernels["mosaic_gpu"], *arguments, **keywords)
    if implementation is not None:
        return kernels[implementation](*arguments, **keywords)
    preferred = _BY_PLATFORM.get(jax.default_backend(), "xla")
    try:
        return kernels[preferred](*arguments, **keywords)
    except NotImplementedError as reason:
        _report(name, preferred, str(reason))
        return kernels["xla"](*arguments, **keywords)


def _check(implementation: str | None) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation: {implementation!r} is none of {known}")


def _simulated(kernel: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Runs a Mosaic GPU kernel in JAX's simulator of an H100, on a CPU.

    Args:
      kernel: takes `interpret`.
      arguments: for the kernel.
      keywords: for the kernel.
    """
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

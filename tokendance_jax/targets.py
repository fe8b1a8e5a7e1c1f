"""Compiles for accelerators that need not be present, and reads their compilers' reports.

XLA's own back ends do the work: the CUDA plug-in compiles for an H100 from a description of the
device, and libtpu compiles for TPUs from the name of a topology. The `aot` extra installs both.
"""

import dataclasses
import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# The device description that XLA needs to compile for an H100 SXM, from NVIDIA's data sheet and
# CUDA's table of compute capability 9.0.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 85520809984
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class TargetUnavailable(RuntimeError):
    """The compiler of a target is not installed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """An accelerator, with the figures that its maker publishes.

    Attributes:
      name: name of the accelerator, the key in `TARGETS`.
      platform: "cuda" or "tpu".
      topology: XLA's name of a topology that contains the accelerator.
      bandwidth: memory bandwidth in bytes per second.
      rate: bfloat16 operations per second of the matrix units.
      memory: bytes of memory.
      scratch: bytes of fast memory for a kernel: shared memory of a block, or VMEM of a core.
    """

    name: str
    platform: str
    topology: str
    bandwidth: float
    rate: float
    memory: int
    scratch: int


TARGETS = {
    target.name: target
    for target in (
        Target("h100", "cuda", "1x1x1", 3.35e12, 989e12, 80 * 10**9, 232448),
        Target("tpu-v5e", "tpu", "v5e:2x2x1", 819e9, 197e12, 16 * 2**30, 128 * 2**20),
        Target("tpu-v6e", "tpu", "v6e:2x2x1", 1638e9, 918e12, 32 * 2**30, 128 * 2**20),
    )
}


# Names of the targets by JAX's `device_kind`.
_KINDS = {"NVIDIA H100 80GB HBM3": "h100", "TPU v5 lite": "tpu-v5e", "TPU v6 lite": "tpu-v6e"}


def present() -> Target | None:
    """Returns the target that JAX's default device is, or None if it is not a target."""
    name = _KINDS.get(jax.devices()[0].device_kind)
    return None if name is None else TARGETS[name]


@functools.cache
def device(target: Target) -> jax.Device:
    """Returns a device of the target to compile for. It cannot run programs.

    Raises:
      TargetUnavailable: the target's compiler is not installed or fails to start.
    """
    # Without this, libtpu queries the metadata server of Google's cloud for minutes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # libtpu allows one process at a time, because a TPU does. Compiling does not need the limit.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = {"target_config": _H100, "topology": target.topology} if target.name == "h100" else {}
    try:
        topology = topologies.get_topology_desc(
            platform=target.platform, topology_name=target.topology, **options
        )
    except Exception as error:
        raise TargetUnavailable(
            f"{target.name}: no compiler ({type(error).__name__}: {error}); "
            "install the `aot` extra (pip install tokendance-jax[aot]), and set JAX_PLATFORMS=cpu "
            "before JAX starts if this machine has no such device"
        ) from error
    return topology.devices[0]


def compile_for(
    target: Target, function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()
) -> jax.stages.Compiled:
    """Compiles a function for a target.

    Args:
      target: the accelerator to compile for.
      function: a function of arrays or pytrees of arrays.
      arguments: arrays or `jax.ShapeDtypeStruct`; only their shapes and dtypes are used.
      donate: indices of the donated arguments.

    Raises:
      TargetUnavailable: see `device`.
    """
    shapes = placed(target, arguments)
    return jax.jit(function, donate_argnums=donate).lower(*shapes).compile()


def placed(target: Target, tree: Any) -> Any:
    """Returns the shapes of a pytree of arrays, placed on a device of the target.

    Raises:
      TargetUnavailable: see `device`.
    """
    place = SingleDeviceSharding(device(target))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


@dataclasses.dataclass(frozen=True, slots=True)
class GpuKernel:
    """The report of ptxas on one Mosaic GPU kernel.

    Attributes:
      name: name of the kernel.
      registers: registers per thread.
      spill_bytes: stores and loads of spilled registers.
      stack_bytes: stack per thread.
      shared_bytes: shared memory per block.
      threads: threads per block.
      ptx: the kernel's PTX code.
    """

    name: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    ptx: str

    @property
    def blocks_per_core(self) -> int:
        """Blocks that fit a core of an H100 at once (CUDA programming guide, section 16)."""
        # Warps get registers in units of 256, and a block reserves 1 KiB of shared memory.
        warps = -(-self.threads // 32)
        registers = -(-self.registers * 32 // 256) * 256 * warps
        return min(65536 // registers, 233472 // (self.shared_bytes + 1024), 2048 // self.threads)

    def count(self, pattern: str) -> int:
        """Counts the matches of a regular expression in the PTX code."""
        return len(re.findall(pattern, self.ptx))


def gpu_kernels(
    target: Target, function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()
) -> tuple[jax.stages.Compiled, list[GpuKernel]]:
    """Compiles like `compile_for`, and also returns the reports on its Mosaic GPU kernels."""
    with tempfile.TemporaryDirectory() as folder, _dumping(folder):
        compiled = compile_for(target, function, *arguments, donate=donate)
        kernels = [_read_kernel(path) for path in sorted(Path(folder).glob("*.ptxas"))]
    return compiled, kernels


@contextmanager
def _dumping(folder: str) -> Iterator[None]:
    """Makes the Mosaic GPU compiler write its PTX, reports and logs to a folder."""
    names = ("MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_TO")
    before = {name: os.environ.get(name) for name in names}
    cached = getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009 - not declared
    os.environ.update(zip(names, ("1", "1", folder), strict=True))
    # A program from the compilation cache would not be compiled, and so would leave no report.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _read_kernel(path: Path) -> GpuKernel:
    report = path.read_text()
    ptx = path.with_suffix(".ptx").read_text()
    launch = path.with_suffix(".mlir-passes.log").read_text()

    def number(pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        if found is None:
            raise ValueError(f"{path.name}: the compiler's report has no {pattern!r}")
        return int(found[1])

    return GpuKernel(
        name=path.stem,
        registers=number(r"Used (\d+) registers", report),
        spill_bytes=number(r"(\d+) bytes spill stores", report)
        + number(r"(\d+) bytes spill loads", report),
        stack_bytes=number(r"(\d+) bytes stack frame", report),
        shared_bytes=number(r"dynamic_shared_memory_size %c(\d+)_i32", launch),
        threads=number(r"\.maxntid (\d+)", ptx),
        ptx=ptx,
    )

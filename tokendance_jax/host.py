"""Settings of the process that speed up JAX on a CPU, and how much memory there is."""

import contextlib
import ctypes
import os
import platform
from pathlib import Path

import jax

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def tune_allocator() -> bool:
    """Makes glibc keep freed memory instead of returning it to the kernel.

    XLA's CPU client frees its temporaries after every call. By default glibc unmaps blocks of that
    size, and every call faults all of its pages in again, at a third of its time. Call this once,
    before large arrays are made. The process keeps its high-water mark of memory from then on.

    Returns:
      Whether the allocator took the settings; False where there is no glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    return all(mallopt(option, value) == 1 for option, value in settings)


def cache_compilations(folder: str | os.PathLike[str] | None = None) -> Path:
    """Keeps compiled programs on disk, so that the next process does not compile them again.

    Args:
      folder: where; by default the folder that `JAX_COMPILATION_CACHE_DIR` names, or
        `tokendance-jax/xla` in the user's cache folder. Programs in it are run as they are: do not
        share it with people you do not trust.

    Returns:
      The folder.

    Raises:
      ValueError: if there is no cache folder, because the user has no home folder.
    """
    if folder is None and (folder := os.environ.get("JAX_COMPILATION_CACHE_DIR")) is None:
        try:
            home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        except RuntimeError:  # neither HOME nor an entry in the password file, as in containers
            raise ValueError(
                "compilation_cache: the user has no home folder; name a folder for compiled "
                "programs, or set HOME or XDG_CACHE_HOME"
            ) from None
        folder = Path(home) / "tokendance-jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return Path(folder)


def memory() -> int | None:
    """Bytes of memory of the default device; on a CPU what the process may use; None: unknown."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    found = []
    with contextlib.suppress(ValueError, OSError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of containers
        with contextlib.suppress(ValueError, OSError):
            found.append(int((Path("/sys/fs/cgroup") / limit).read_text()))
    return min(found, default=None)

"""Process settings that speed up JAX on a CPU, and the amount of memory."""

import contextlib
import ctypes
import os
import platform
from pathlib import Path

import jax

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# A container's files of control groups, version 2 and version 1: limit, usage, and statistics with
# the name under which they list the file cache that the kernel drops first.
_CONTAINERS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def tune_allocator() -> bool:
    """Makes glibc keep freed memory instead of returning it to the kernel.

    XLA's CPU client frees its temporaries after every call. By default, glibc unmaps blocks of that
    size, and every call spends a third of its time on faulting all of its pages in again. Call this
    function once, before large arrays are created. From then on the process keeps its peak memory.

    Returns:
      Whether the allocator accepted the settings; False without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    return all(mallopt(option, value) == 1 for option, value in settings)


def cache_compilations(folder: str | os.PathLike[str] | None = None) -> Path:
    """Keeps compiled programs on disk, so that the next process does not compile them again.

    Args:
      folder: the folder for compiled programs; by default the folder that
        `JAX_COMPILATION_CACHE_DIR` names, or `tokendance-jax/xla` in the user's cache folder.
        Programs in it are run unchecked, so do not share it with people you do not trust.

    Returns:
      The folder.

    Raises:
      ValueError: there is no cache folder, because the user has no home folder.
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
    """Returns the bytes of memory of the default device, or None if unknown.

    On a CPU this is the memory that the process may use.
    """
    device = jax.devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    found = []
    with contextlib.suppress(ValueError, OSError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit, *_ in _CONTAINERS:
        with contextlib.suppress(ValueError, OSError):
            found.append(int((_CGROUP / limit).read_text()))
    return min(found, default=None)


def free_memory() -> int | None:
    """Returns the bytes of memory that are free on the default device, or None if unknown.

    On a CPU this is the memory that the process can allocate without swapping. Cached files that
    the kernel can drop count as free.
    """
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats or "bytes_in_use" not in stats:
            return None
        return max(0, stats["bytes_limit"] - stats["bytes_in_use"])
    found = []
    with contextlib.suppress(KeyError, ValueError, OSError):
        found.append(_statistic(_MEMINFO, "MemAvailable:") * 1024)
    for limit, usage, statistics, cached in _CONTAINERS:
        with contextlib.suppress(KeyError, ValueError, OSError):
            rest = int((_CGROUP / limit).read_text()) - int((_CGROUP / usage).read_text())
            found.append(max(0, rest + _statistic(_CGROUP / statistics, cached)))
    return min(found, default=None)


def _statistic(path: Path, name: str) -> int:
    """Returns a number from a file whose lines begin with a name and a number.

    Raises:
      KeyError: no line begins with the name.
      ValueError: there is no number.
      OSError: the file cannot be read.
    """
    for line in path.read_text().splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == name:
            return int(words[1])
    raise KeyError(name)

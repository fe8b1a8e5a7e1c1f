"""Settings of the process, and the memory of its machine."""

import os
import types

import jax
import pytest

from tokendance_jax import host


def test_the_machine_has_memory():
    memory = host.memory()
    assert memory is not None
    assert 1 << 28 < memory <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_free_memory_is_part_of_the_memory():
    memory, free = host.memory(), host.free_memory()
    assert memory is not None
    assert free is not None
    assert 0 < free < memory


GIB = 1 << 30
MEMINFO = "MemTotal: 8388608 kB\nMemFree: 1048576 kB\nMemAvailable: 4194304 kB\n"  # 4 GiB
VERSION_2 = {
    "memory.max": f"{3 * GIB}\n",
    "memory.current": f"{2 * GIB}\n",
    "memory.stat": f"anon {GIB}\ninactive_file {GIB // 2}\n",
}
VERSION_1 = {
    "memory/memory.limit_in_bytes": f"{4 * GIB}\n",
    "memory/memory.usage_in_bytes": f"{2 * GIB}\n",
    "memory/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}\n",
}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"meminfo": MEMINFO}, 4 * GIB),
        ({"meminfo": MEMINFO, **VERSION_2}, 3 * GIB // 2),
        ({"meminfo": MEMINFO, **VERSION_1}, 3 * GIB),
        (VERSION_1, 3 * GIB),
        ({"meminfo": MEMINFO, **VERSION_2, "memory.max": "max\n"}, 4 * GIB),
        ({"meminfo": MEMINFO, **VERSION_2, "memory.max": f"{GIB}\n"}, 0),
        ({"meminfo": "MemTotal: 8388608 kB\n"}, None),
        ({"meminfo": "MemAvailable:\n", "memory.max": "much\n"}, None),
        ({}, None),
    ],
)
def test_a_cpus_free_memory_leaves_out_what_is_in_use(monkeypatch, tmp_path, files, free):
    monkeypatch.setattr(host, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert host.free_memory() == free


@pytest.mark.parametrize(
    ("stats", "free"),
    [
        ({"bytes_limit": 60 * GIB, "bytes_in_use": 15 * GIB}, 45 * GIB),
        ({"bytes_limit": 2 * GIB, "bytes_in_use": 3 * GIB}, 0),
        ({"bytes_in_use": 3 * GIB}, None),
        (None, None),
    ],
)
def test_an_accelerators_free_memory_leaves_out_what_is_in_use(monkeypatch, stats, free):
    device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert host.free_memory() == free


def test_the_cache_folder_is_the_users(monkeypatch):
    kept = {}
    monkeypatch.setattr(jax.config, "update", kept.__setitem__)
    monkeypatch.setenv("HOME", "/nowhere/home")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    folder = host.cache_compilations()
    assert str(folder) == kept["jax_compilation_cache_dir"]
    assert str(folder) == "/nowhere/home/.cache/tokendance-jax/xla"
    monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere/cache")
    assert str(host.cache_compilations()) == "/nowhere/cache/tokendance-jax/xla"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/nowhere/jax")
    assert str(host.cache_compilations()) == "/nowhere/jax"
    assert str(host.cache_compilations("/nowhere/own")) == "/nowhere/own"


def test_who_has_no_home_is_told_so(monkeypatch):
    def no_entry(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    with pytest.raises(ValueError, match="compilation_cache: the user has no home folder; name a"):
        host.cache_compilations()

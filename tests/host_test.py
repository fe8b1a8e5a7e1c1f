"""Settings of the process, and the memory of its machine."""

import os

import jax
import pytest

from tokendance_jax import host


def test_the_machine_has_memory():
    memory = host.memory()
    assert memory is not None
    assert 1 << 28 < memory <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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

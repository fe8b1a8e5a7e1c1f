"""The programs that take pages out of a pool and back, compiled for accelerators."""

import functools

import jax.numpy as jnp
import pytest

from tests.kernels.cases import shape
from tokendance_jax import targets
from tokendance_jax.kernels.sparse_restore import RestorePlan
from tokendance_jax.mirror.pages import Quantised, StoredPages
from tokendance_jax.mirror.transfer import GROUP, _read, _restore
from tokendance_jax.paged import KVSpec

pytestmark = [
    pytest.mark.aot,
    pytest.mark.parametrize("target", ["h100", "tpu-v5e", "tpu-v6e"]),
    pytest.mark.parametrize("form", ["exact", "int8"]),
]
# Qwen2.5-7B; a pool of 3.8 GB.
SPEC = KVSpec(28, 4096, 16, 4, 128, jnp.dtype(jnp.bfloat16))
POOL = SPEC.pages * SPEC.page_bytes


def form_of(name):
    bias = shape(SPEC.layers, SPEC.kv_heads, SPEC.head_dim, dtype="float32")
    return Quantised(bias, 1e6) if name == "int8" else None


def needs_of(target, program, *arguments, donate=()):
    compiled = targets.compile_for(targets.TARGETS[target], program, *arguments, donate=donate)
    needs = compiled.memory_analysis()
    assert needs is not None
    return needs


def test_pages_are_read_without_a_copy_of_the_pool(form, target):
    pages, used = shape(GROUP), shape(GROUP, SPEC.page_size, dtype="bool")
    position = shape(GROUP, SPEC.page_size)
    needs = needs_of(target, _read, SPEC.abstract(), form_of(form), pages, used, position)
    # A few times the group's pages in float32.
    assert needs.temp_size_in_bytes < 0.03 * POOL


def test_pages_are_restored_in_place(form, target):
    slots = (SPEC.layers, GROUP, SPEC.page_size, SPEC.kv_heads)
    pages = shape(*slots, SPEC.head_dim, dtype="int8" if form == "int8" else "bfloat16")
    scale = shape(*slots, dtype="float32") if form == "int8" else None
    plan = RestorePlan(shape(GROUP), shape(GROUP + 1), *(shape(GROUP) for _ in range(4)))
    program = functools.partial(
        _restore,
        theta=1e6,
        implementation="mosaic_gpu" if target == "h100" else "mosaic_tpu",
    )
    stored = StoredPages(pages, pages, scale, scale)
    needs = needs_of(target, program, SPEC.abstract(), stored, form_of(form), plan, donate=(0,))
    assert needs.alias_size_in_bytes == POOL
    assert needs.temp_size_in_bytes <= 1 << 20

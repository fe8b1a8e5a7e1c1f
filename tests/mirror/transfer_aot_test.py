"""The programs that read pages from a pool and restore them, compiled for accelerators."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.layout import Layout

from tests.kernels.cases import shape
from tokendance_jax import targets
from tokendance_jax.kernels.rope import Rope
from tokendance_jax.kernels.sparse_restore import RestorePlan
from tokendance_jax.mirror.pages import Quantised, StoredPages
from tokendance_jax.mirror.transfer import GROUP, _read, restorer
from tokendance_jax.paged.kv import KVSpec, pool_format

pytestmark = [
    pytest.mark.aot,
    pytest.mark.parametrize("target", ["h100", "tpu-v5e", "tpu-v6e"]),
    pytest.mark.parametrize("form", ["exact", "int8"]),
]
# Qwen2.5-7B with a pool of 3.8 GB; and heads of 64, which XLA would lay out differently on TPUs.
SPEC = KVSpec(28, 4096, 16, 4, 128, jnp.dtype(jnp.bfloat16))
NARROW = dataclasses.replace(SPEC, layers=24, kv_heads=2, head_dim=64)


def form_of(name, spec):
    bias = shape(spec.layers, spec.kv_heads, spec.head_dim, dtype="float32")
    return Quantised(bias, Rope(1e6)) if name == "int8" else None


def needs_of(compiled):
    needs = compiled.memory_analysis()
    assert needs is not None
    return needs


def test_pages_are_read_without_a_copy_of_the_pool(form, target):
    pages, used = shape(GROUP), shape(GROUP, SPEC.page_size, dtype="bool")
    arguments = SPEC.abstract(), form_of(form, SPEC), pages, used, shape(GROUP, SPEC.page_size)
    needs = needs_of(targets.compile_for(targets.TARGETS[target], _read, *arguments))
    # Temporaries hold a few float32 copies of the group's pages.
    assert needs.temp_size_in_bytes < 0.03 * SPEC.pages * SPEC.page_bytes


@pytest.mark.parametrize("spec", [SPEC, NARROW], ids=["128", "64"])
def test_pages_are_restored_in_place(form, target, spec):
    slots = (spec.layers, GROUP, spec.page_size, spec.kv_heads)
    pages = shape(*slots, spec.head_dim, dtype="int8" if form == "int8" else "bfloat16")
    scale = shape(*slots, dtype="float32") if form == "int8" else None
    plan = RestorePlan(shape(GROUP), shape(GROUP + 1), *(shape(GROUP) for _ in range(4)))
    target = targets.TARGETS[target]
    device = targets.device(target)
    program = restorer(
        Rope(1e6), "mosaic_gpu" if target.platform == "cuda" else "mosaic_tpu", device
    )
    stored = StoredPages(pages, pages, scale, scale)
    arguments = spec.abstract(), stored, form_of(form, spec), plan
    compiled = program.lower(*targets.placed(target, arguments)).compile()
    needs = needs_of(compiled)
    assert needs.alias_size_in_bytes == spec.pages * spec.page_room(target.platform)
    assert needs.temp_size_in_bytes <= 1 << 20
    # The result has the layout in which the next program takes the pool.
    expected = pool_format(device).layout
    assert isinstance(expected, Layout)
    for pool in jax.tree.leaves(compiled.output_formats):
        assert pool.layout.major_to_minor == expected.major_to_minor

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from tests.kernels import cases
from tests.kernels.cases import shape, swept
from tokendance_jax import targets
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.sparse_restore import RestorePlan, Source, sparse_restore

# KV heads and head dims of Qwen2.5 from 0.5B to 72B.
HEADS = ((2, 64), (2, 128), (4, 128), (8, 128))
DTYPES = ("bfloat16", "float32")
LAYERS, PAGES, SOURCES, PIECES = 24, 512, 64, 256
KINDS = ("pool", "pages", "at rest", "int8")


def arguments(heads, page_size, dtype, kind):
    kv_heads, head_dim = heads
    slot_shape = (page_size, kv_heads, head_dim)
    pool = shape(LAYERS, PAGES, *slot_shape, dtype=dtype)
    pages = shape(LAYERS, SOURCES, *slot_shape, dtype="int8" if kind == "int8" else dtype)
    scale = shape(*pages.shape[:-1], dtype="float32")
    bias = shape(LAYERS, kv_heads, head_dim, dtype="float32")
    source = {
        "pool": None,
        "pages": Source(pages, pages),
        "at rest": Source(pages, pages, key_bias=bias, rotated=False),
        "int8": Source(pages, pages, scale, scale, key_bias=bias, rotated=False),
    }[kind]
    piece = shape(PIECES)
    plan = RestorePlan(shape(SOURCES), shape(SOURCES + 1), piece, piece, piece, piece)
    return PagedKV(pool, pool), source, plan


def restore(implementation):
    return functools.partial(sparse_restore, rope=cases.ROPE, implementation=implementation)


def check_in_place(compiled, pool, *, temporary):
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == 2 * pool.size * jnp.dtype(pool.dtype).itemsize
    assert memory.temp_size_in_bytes <= temporary


@pytest.mark.parametrize(("implementation", "platform"), cases.PLATFORMS)
@pytest.mark.parametrize("kind", KINDS)
@swept("dtype", [("bfloat16",), ("float32",)])
def test_lowers(dtype, kind, implementation, platform):
    program = jax.jit(restore(implementation), donate_argnums=0)
    lowered = program.trace(*arguments((2, 128), 16, dtype, kind)).lower(
        lowering_platforms=(platform,)
    )
    assert "custom_call" in lowered.as_text()


@pytest.mark.aot
@pytest.mark.parametrize("kind", KINDS)
@swept(("heads", "page_size", "dtype"), itertools.product(HEADS, (16, 32), DTYPES))
def test_compiles_for_an_h100(heads, page_size, dtype, kind):
    h100 = targets.TARGETS["h100"]
    shapes = arguments(heads, page_size, dtype, kind)
    compiled, (kernel,) = targets.gpu_kernels(h100, restore("mosaic_gpu"), *shapes, donate=(0,))
    assert kernel.spill_bytes == kernel.stack_bytes == 0
    assert kernel.shared_bytes <= h100.scratch
    # Enough blocks of threads in flight to hide the memory's latency.
    assert kernel.blocks_per_core >= 3
    # Pages move by bulk copies only. Threads load the plan, scales and biases.
    assert kernel.count(r"cp\.async\.bulk\.tensor\S*\.shared\S*\.global") >= 2
    assert kernel.count(r"cp\.async\.bulk\S*\.global\.shared") >= 4
    assert kernel.count(r"\bst\.global") == 0
    assert kernel.count(r"\bld\.global\S*\.(b16|b8|u8|s8|u16)\b") == 0
    # The tables of angles.
    check_in_place(compiled, shapes[0].k, temporary=16 * 1024)


@pytest.mark.aot
@pytest.mark.parametrize("target", ["tpu-v5e", "tpu-v6e"])
@pytest.mark.parametrize("kind", KINDS)
# On TPUs, XLA lays out pools of narrower heads in another way and would copy them.
@swept(("heads", "dtype"), itertools.product(((2, 128), (4, 128), (8, 128)), DTYPES))
def test_compiles_for_a_tpu(heads, dtype, kind, target):
    shapes = arguments(heads, 16, dtype, kind)
    compiled = targets.compile_for(
        targets.TARGETS[target], restore("mosaic_tpu"), *shapes, donate=(0,)
    )
    check_in_place(compiled, shapes[0].k, temporary=1 << 20)

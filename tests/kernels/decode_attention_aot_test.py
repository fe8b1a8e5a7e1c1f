import itertools

import jax
import pytest

from tests.kernels import cases
from tests.kernels.cases import shape
from tests.kernels.round_attention_aot_test import HEADS
from tokendance_jax import targets
from tokendance_jax.kernels.decode_attention import decode_attention
from tokendance_jax.kernels.flash import block_pages
from tokendance_jax.kernels.lanes import GroupTables, LaneTables

LAYERS, PAGES, LANES, BLOCKS, TOKENS = 28, 8192, 25, 12, 512


def arguments(heads, page_size, dtype="bfloat16", pages=PAGES):
    # A pool of its own for each size: what was compiled once is not compiled again.
    pool = shape(
        LAYERS, pages + heads.heads, page_size, heads.kv_heads, heads.head_dim, dtype=dtype
    )
    q = shape(LANES, heads.heads, heads.head_dim, dtype="float32")
    column = shape(LANES, TOKENS // page_size)
    tables = LaneTables(column, column, column, column, column)
    entries = block_pages(page_size)
    member = shape(BLOCKS, LANES, entries, dtype="bool")
    column = shape(BLOCKS, entries)
    groups = GroupTables(column, column, column, shape(BLOCKS, LANES), member, shape())
    return q, pool, pool, shape(LANES), tables, groups


def attend(implementation):
    def program(q, k, v, position, tables, groups):
        return decode_attention(
            q,
            k,
            v,
            3,
            position,
            tables,
            groups,
            theta=cases.THETA,
            implementation=implementation,
        )

    return program


@pytest.mark.parametrize(("implementation", "platform"), cases.PLATFORMS)
def test_lowers(implementation, platform):
    program = jax.jit(attend(implementation)).trace(*arguments(HEADS[1], 16))
    assert "custom_call" in program.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.aot
@pytest.mark.parametrize(("heads", "page_size"), list(itertools.product(HEADS, (16, 32))), ids=str)
def test_compiles_for_an_h100(heads, page_size):
    h100 = targets.TARGETS["h100"]
    shapes = arguments(heads, page_size)
    compiled, kernels = targets.gpu_kernels(h100, attend("mosaic_gpu"), *shapes)
    assert len(kernels) == 2  # shared blocks, own pages
    for kernel in kernels:
        assert kernel.spill_bytes == kernel.stack_bytes == 0
        assert kernel.shared_bytes <= h100.scratch
        assert kernel.blocks_per_core >= 2
        assert kernel.count(r"wgmma\.mma_async\S*\.bf16\.bf16") >= 8
        assert kernel.count(r"cp\.async\.bulk\.tensor\S*\.shared\S*\.global") >= 128 // page_size
        assert kernel.count(r"\bst\.global") == 0
        assert kernel.count(r"\bld\.global") == kernel.count(r"\bld\.global\.[bsu]32\b")
    memory, pool = compiled.memory_analysis(), shapes[1]
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.05 * pool.size


@pytest.mark.aot
@pytest.mark.parametrize("target", ["tpu-v5e", "tpu-v6e"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", HEADS[1:], ids=str)
def test_compiles_for_a_tpu(heads, dtype, target):
    shapes = arguments(heads, 16, dtype, pages=1024)  # a v5e has 16 GiB
    compiled = targets.compile_for(targets.TARGETS[target], attend("mosaic_tpu"), *shapes)
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 << 20

import itertools

import jax
import pytest

from tests.kernels import cases
from tests.kernels.cases import shape
from tokendance_jax import targets
from tokendance_jax.kernels.flash import block_pages
from tokendance_jax.kernels.lanes import (
    TILE_ROWS,
    GroupTables,
    LaneTables,
    RowTiles,
    SharedRows,
)
from tokendance_jax.kernels.round_attention import round_attention

# Heads of Qwen2.5: 0.5B, 1.5B, 3B, 7B, 14B and 32B, 72B.
HEADS = (
    cases.Heads(14, 2, 64),
    cases.Heads(12, 2, 128),
    cases.Heads(16, 2, 128),
    cases.Heads(28, 4, 128),
    cases.Heads(40, 8, 128),
    cases.Heads(64, 8, 128),
)
LAYERS, PAGES, LANES, ROWS, TILES, TOKENS = 28, 8192, 32, 2048, 48, 4096
SHARED_ROWS = 1024


def arguments(heads, page_size, dtype="bfloat16", pages=PAGES):
    # A pool of its own for each size: what was compiled once is not compiled again.
    pool = shape(
        LAYERS, pages + heads.heads, page_size, heads.kv_heads, heads.head_dim, dtype=dtype
    )
    q = shape(ROWS, heads.heads, heads.head_dim, dtype="float32")
    column = shape(LANES, TOKENS // page_size)
    tables = LaneTables(column, column, column, column, column)
    tiles = RowTiles(shape(TILES, TILE_ROWS), shape(TILES), shape())
    return q, pool, pool, shape(ROWS), tables, tiles


def shared_rows(page_size):
    """Shapes of rows of all lanes that meet shared pages together."""
    entries = block_pages(page_size)
    blocks = TOKENS // page_size // entries
    entry, row = shape(blocks, entries), shape(SHARED_ROWS)
    member = shape(blocks, LANES, entries, dtype="bool")
    groups = GroupTables(entry, entry, entry, shape(blocks, LANES), member, shape())
    column = shape(2 * LANES, TOKENS // page_size)
    tables = LaneTables(column, column, column, column, column)
    tiles = RowTiles(shape(TILES, TILE_ROWS), shape(TILES), shape())
    return SharedRows(row, row, groups, tables, tiles)


def attend(implementation, **options):
    def program(q, k, v, position, tables, tiles, shared=None):
        return round_attention(
            q,
            k,
            v,
            3,
            position,
            tables,
            tiles,
            theta=cases.THETA,
            shared=shared,
            implementation=implementation,
            **options,
        )

    return program


@pytest.mark.parametrize(("implementation", "platform"), cases.PLATFORMS)
def test_lowers(implementation, platform):
    program = jax.jit(attend(implementation)).trace(*arguments(HEADS[1], 16))
    assert "custom_call" in program.lower(lowering_platforms=(platform,)).as_text()


def test_shared_rows_lower():
    program = jax.jit(attend("mosaic_gpu", with_lse=True))
    traced = program.trace(*arguments(HEADS[1], 16), shared_rows(16))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("custom_call") >= 2


def check_kernel(kernel, page_size):
    assert kernel.spill_bytes == kernel.stack_bytes == 0
    assert kernel.shared_bytes <= targets.TARGETS["h100"].scratch
    assert kernel.blocks_per_core >= 2
    # Both products on tensor cores.
    assert kernel.count(r"wgmma\.mma_async\S*\.bf16\.bf16") >= 8
    # Keys, values, queries and results move by bulk copies; threads load entries of tables.
    assert kernel.count(r"cp\.async\.bulk\.tensor\S*\.shared\S*\.global") >= 2 * 64 // page_size
    assert kernel.count(r"\bst\.global") == 0
    assert kernel.count(r"\bld\.global") == kernel.count(r"\bld\.global\.[bsu]32\b")


@pytest.mark.aot
@pytest.mark.parametrize(("heads", "page_size"), list(itertools.product(HEADS, (16, 32))), ids=str)
def test_compiles_for_an_h100(heads, page_size):
    h100 = targets.TARGETS["h100"]
    shapes = arguments(heads, page_size)
    compiled, (kernel,) = targets.gpu_kernels(h100, attend("mosaic_gpu"), *shapes)
    check_kernel(kernel, page_size)
    # Temporaries are queries and results, in a few arrangements, and never a pool.
    memory, (q, pool, *_) = compiled.memory_analysis(), shapes
    assert memory is not None
    tiled = TILES * TILE_ROWS * q.size // ROWS * 4
    assert memory.temp_size_in_bytes < 4 * tiled
    assert memory.temp_size_in_bytes < pool.size * 2


@pytest.mark.aot
@pytest.mark.parametrize(
    ("heads", "page_size"), [(HEADS[0], 16), (HEADS[3], 32), (HEADS[4], 16)], ids=str
)
def test_compiles_shared_rows_for_an_h100(heads, page_size):
    shapes = *arguments(heads, page_size), shared_rows(page_size)
    program = attend("mosaic_gpu", with_lse=True)
    compiled, kernels = targets.gpu_kernels(targets.TARGETS["h100"], program, *shapes)
    assert len(kernels) == 2  # shared blocks, lanes' own
    for kernel in kernels:
        check_kernel(kernel, page_size)
    memory, (_, pool, *_) = compiled.memory_analysis(), shapes
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.1 * pool.size


@pytest.mark.aot
@pytest.mark.parametrize("target", ["tpu-v5e", "tpu-v6e"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", HEADS[1:], ids=str)
def test_compiles_for_a_tpu(heads, dtype, target):
    shapes = arguments(heads, 16, dtype, pages=1024)  # a v5e has 16 GiB
    compiled = targets.compile_for(targets.TARGETS[target], attend("mosaic_tpu"), *shapes)
    memory, q = compiled.memory_analysis(), shapes[0]
    assert memory is not None
    assert memory.temp_size_in_bytes < 3 * q.size * 4

import pytest

from tests.kernels import aot, cases
from tests.kernels.cases import shape
from tokendance_jax.kernels.lanes import TILE_ROWS, GroupTables, RowTiles, SharedRows, block_pages
from tokendance_jax.kernels.round_attention import round_attention

LANES, ROWS, TILES, TOKENS = 32, 2048, 48, 4096
SHARED_ROWS = 1024


def arguments(heads, page_size, **pool):
    kv, q = aot.pool_of(heads, page_size, **pool), aot.queries_of(ROWS, heads)
    tiles = RowTiles(shape(TILES, TILE_ROWS), shape(TILES), shape())
    return q, kv, shape(ROWS), aot.tables_of(LANES, TOKENS // page_size), tiles


def shared_rows(page_size):
    """Shapes of packed rows of all lanes."""
    entries = block_pages(page_size)
    blocks = TOKENS // page_size // entries
    entry, row = shape(blocks, entries), shape(SHARED_ROWS)
    member = shape(blocks, LANES, entries, dtype="bool")
    groups = GroupTables(entry, entry, entry, shape(blocks, LANES), member, shape())
    tables = aot.tables_of(2 * LANES, TOKENS // page_size)
    tiles = RowTiles(shape(TILES, TILE_ROWS), shape(TILES), shape())
    return SharedRows(row, row, groups, tables, tiles)


def with_shared_rows(q, kv, layer, position, tables, tiles, shared, **options):
    return round_attention(
        q, kv, layer, position, tables, tiles, shared=shared, with_lse=True, **options
    )


@aot.on_platforms
@cases.swept("dtype", [("bfloat16",), ("float32",)])
def test_lowers(dtype, implementation, platform):
    shapes = arguments(aot.HEADS[1], 16, dtype=dtype)
    aot.check_lowers(round_attention, implementation, platform, shapes)


@aot.on_platforms
def test_shared_rows_lower(implementation, platform):
    shapes = *arguments(aot.HEADS[1], 16), shared_rows(16)
    aot.check_lowers(with_shared_rows, implementation, platform, shapes)


@pytest.mark.aot
@cases.swept(("heads", "page_size", "dtype"), aot.ON_H100)
def test_compiles_for_an_h100(heads, page_size, dtype):
    shapes = arguments(heads, page_size, dtype=dtype)
    kernels, memory = aot.compile_for_an_h100(round_attention, shapes, page_size)
    assert len(kernels) == 1
    # Temporaries hold queries and results in a few arrangements, and never a copy of a pool.
    q, kv, *_ = shapes
    tiled = TILES * TILE_ROWS * q.size // ROWS * 4
    assert memory.temp_size_in_bytes < 4 * tiled
    assert memory.temp_size_in_bytes < kv.k.size * 2


@pytest.mark.aot
@cases.swept(
    ("heads", "page_size", "dtype"),
    [
        (aot.HEADS[0], 16, "bfloat16"),
        (aot.HEADS[3], 32, "bfloat16"),
        (aot.HEADS[4], 16, "bfloat16"),
        (aot.HEADS[3], 16, "float32"),
    ],
)
def test_compiles_shared_rows_for_an_h100(heads, page_size, dtype):
    shapes = *arguments(heads, page_size, dtype=dtype), shared_rows(page_size)
    kernels, memory = aot.compile_for_an_h100(with_shared_rows, shapes, page_size)
    assert len(kernels) == 2  # shared blocks, lanes' own
    assert memory.temp_size_in_bytes < 0.1 * shapes[1].k.size


@pytest.mark.aot
def test_layers_have_one_kernel_on_an_h100():
    # A pool of another size than in other tests: a kernel compiled before is not compiled again.
    shapes = arguments(aot.HEADS[0], 16, pages=1024)
    aot.check_layers_have_one_kernel(round_attention, shapes, 1)


@aot.for_tpus
def test_compiles_for_a_tpu(heads, dtype, target):
    shapes = arguments(heads, 16, dtype=dtype, pages=1024)  # a v5e has 16 GiB
    memory = aot.compile_for_a_tpu(round_attention, shapes, target)
    assert memory.temp_size_in_bytes < 3 * shapes[0].size * 4


@pytest.mark.aot
@pytest.mark.parametrize("target", ["tpu-v5e", "tpu-v6e"])
@cases.swept(
    ("heads", "page_size", "dtype"),
    [(aot.HEADS[0], 16, "bfloat16"), (aot.HEADS[3], 16, "bfloat16"), (aot.HEADS[3], 32, "float32")],
)
def test_compiles_shared_rows_for_a_tpu(heads, page_size, dtype, target):
    shapes = *arguments(heads, page_size, dtype=dtype, pages=1024), shared_rows(page_size)
    memory = aot.compile_for_a_tpu(with_shared_rows, shapes, target)
    # Queries, results and log-sum-exps. Partial results over shared pages never leave the kernel.
    assert memory.temp_size_in_bytes < 3 * shapes[0].size * 4

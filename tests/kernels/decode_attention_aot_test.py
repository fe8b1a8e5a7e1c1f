import pytest

from tests.kernels import aot, cases
from tests.kernels.cases import shape
from tokendance_jax.kernels.decode_attention import decode_attention
from tokendance_jax.kernels.lanes import GroupTables, block_pages

LANES, BLOCKS, TOKENS = 25, 12, 512


def arguments(heads, page_size, **pool):
    kv, q = aot.pool_of(heads, page_size, **pool), aot.queries_of(LANES, heads)
    entries = block_pages(page_size)
    member = shape(BLOCKS, LANES, entries, dtype="bool")
    column = shape(BLOCKS, entries)
    groups = GroupTables(column, column, column, shape(BLOCKS, LANES), member, shape())
    return q, kv, shape(LANES), aot.tables_of(LANES, TOKENS // page_size), groups


@aot.on_platforms
@cases.swept("dtype", [("bfloat16",), ("float32",)])
def test_lowers(dtype, implementation, platform):
    shapes = arguments(aot.HEADS[1], 16, dtype=dtype)
    aot.check_lowers(decode_attention, implementation, platform, shapes)


@pytest.mark.aot
@cases.swept(("heads", "page_size", "dtype"), aot.ON_H100)
def test_compiles_for_an_h100(heads, page_size, dtype):
    shapes = arguments(heads, page_size, dtype=dtype)
    kernels, memory = aot.compile_for_an_h100(decode_attention, shapes, page_size)
    assert len(kernels) == 2  # shared blocks, own pages
    assert memory.temp_size_in_bytes < 0.05 * shapes[1].k.size


@pytest.mark.aot
def test_layers_have_one_kernel_on_an_h100():
    # A pool of another size than in other tests: a kernel compiled before is not compiled again.
    shapes = arguments(aot.HEADS[0], 16, pages=1024)
    aot.check_layers_have_one_kernel(decode_attention, shapes, 2)  # shared blocks, own pages


@aot.for_tpus
def test_compiles_for_a_tpu(heads, dtype, target):
    shapes = arguments(heads, 16, dtype=dtype, pages=1024)  # a v5e has 16 GiB
    memory = aot.compile_for_a_tpu(decode_attention, shapes, target)
    assert memory.temp_size_in_bytes < 4 << 20

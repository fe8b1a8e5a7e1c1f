"""XLA's scatter, compiled for accelerators, writes rows in place: no kernel is needed for that."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from tests.kernels.cases import shape, swept
from tokendance_jax import targets
from tokendance_jax.hlo import Program
from tokendance_jax.kernels.kv_write import kv_write
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.paged.kv import pool_format

# KV heads and head dims of Qwen2.5 from 0.5B to 72B.
HEADS = ((2, 128), (2, 64), (4, 128), (8, 128))
DTYPES = ("bfloat16", "float32")
LAYERS, SLOTS = 12, 1 << 17
# Pages and rows of a prefill call and of a decode step.
SIZES = ((16, 2048), (32, 32))


def compiled_write(target, heads, dtype, sizes, **options):
    """Compiles a write, checks that it is in place, and returns the program."""
    page_size, rows = sizes
    pool = shape(LAYERS, SLOTS // page_size, page_size, *heads, dtype=dtype)
    value = shape(rows, *heads, dtype="float32")
    arguments = PagedKV(pool, pool), shape(rows), value, value
    layout = pool_format(targets.device(target))
    program = jax.jit(
        lambda kv, slot, k, v: kv_write(kv, 3, slot, k, v),
        donate_argnums=0,
        in_shardings=(layout, None, None, None),
        out_shardings=layout,
    )
    compiled = program.lower(*targets.placed(target, arguments)).compile(**options)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    assert memory.alias_size_in_bytes >= 2 * pool.size * pool.dtype.itemsize
    assert memory.temp_size_in_bytes < 1 << 20
    found = Program(compiled)
    assert found.made(pool.shape) == []
    # It moves rows and their slots, in a few steps, but no page and no part of a page.
    row = math.prod(heads) * (4 + jnp.dtype(dtype).itemsize)
    assert found.bytes_moved() < 2 * 4 * rows * (row + 4)
    assert " sort(" not in text
    return found


@pytest.mark.aot
@swept(("heads", "dtype", "sizes"), itertools.product(HEADS, DTYPES, SIZES))
def test_an_h100_writes_rows_alone(heads, dtype, sizes, tmp_path):
    h100 = targets.TARGETS["h100"]
    found = compiled_write(
        h100, heads, dtype, sizes, compiler_options={"xla_dump_to": str(tmp_path)}
    )
    # One kernel for keys and one for values. Each also converts to the pool's dtype.
    opcodes = [instruction.opcode for instruction, _ in found.executed()]
    assert set(opcodes) == {"parameter", "bitcast", "fusion", "tuple"}
    assert opcodes.count("fusion") == 2
    ptx = "".join(file.read_text() for file in tmp_path.glob("*.ptx"))
    stores = re.findall(r"\bst\S*\.global\S*", ptx)
    assert stores
    # There are no atomic operations, and the pool is not read.
    assert not re.search(r"\b(atom|red)\.", ptx)
    assert all(".nc." in load for load in re.findall(r"\bld\.global\S*", ptx))
    if heads[1] == 128 and sizes[1] == 2048:
        # Each thread stores four numbers.
        assert set(stores) == {"st.global.v2.b32" if dtype == "bfloat16" else "st.global.v4.b32"}


@pytest.mark.aot
@pytest.mark.parametrize("target", ["tpu-v5e", "tpu-v6e"])
@swept(("heads", "dtype"), itertools.product(HEADS, DTYPES))
def test_a_tpu_writes_rows_alone(heads, dtype, target):
    compiled_write(targets.TARGETS[target], heads, dtype, SIZES[0])

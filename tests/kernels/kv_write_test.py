import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import cases
from tokendance_jax.kernels.kv_write import kv_write
from tokendance_jax.kernels.paged_kv import PagedKV

LAYERS, PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM = SHAPE = (3, 5, 4, 2, 8)
SLOTS, ROWS = PAGES * PAGE_SIZE, 12
DTYPES = pytest.mark.parametrize("dtype", ["float32", "uint16"])

write = jax.jit(kv_write, static_argnums=1)


def bits(random, dtype):
    """A pool of arbitrary bit patterns, NaNs included. All of them must survive a write."""
    width = np.dtype(dtype).itemsize * 8
    return random.integers(0, 2**width, SHAPE, f"uint{width}").view(dtype)


@DTYPES
@given(
    seed=st.integers(0, 2**32 - 1),
    # The first slots past the pool, one whole pool past it, and int32's maximum.
    sentinel=st.sampled_from([SLOTS, SLOTS + 1, 2 * SLOTS, 2**31 - 1]),
    dropped=st.sets(st.integers(0, ROWS - 1)),
)
@settings(max_examples=25)
def test_writes_the_named_slots_and_nothing_else(dtype, seed, sentinel, dropped):
    random = np.random.default_rng(seed)
    pools: Any = [bits(random, dtype) for _ in "kv"]
    layer = seed % LAYERS
    slot = random.permutation(SLOTS)[:ROWS].astype(np.int32)
    slot[list(dropped)] = sentinel
    values = random.standard_normal((2, ROWS, KV_HEADS, HEAD_DIM)).astype(np.float32)
    written = write(PagedKV(*pools), layer, slot, *values)

    stored = values.astype(ml_dtypes.bfloat16).view(np.uint16) if dtype == "uint16" else values
    for found, pool, value in zip((written.k, written.v), pools, stored, strict=True):
        expected = pool.copy()
        for row in set(range(ROWS)) - dropped:
            expected[layer, slot[row] // PAGE_SIZE, slot[row] % PAGE_SIZE] = value[row]
        assert found.dtype == pool.dtype
        assert np.asarray(found).tobytes() == expected.tobytes()


def memory(dtype):
    """Aliased and temporary bytes of a write to a large donated pool, as fractions of the pool."""
    pool = cases.shape(8, 2048, 16, 2, 64, dtype=dtype)  # at least 64 MiB, never allocated
    slot, value = (
        jax.ShapeDtypeStruct((256,), jnp.int32),
        jax.ShapeDtypeStruct((256, 2, 64), jnp.float32),
    )
    program = jax.jit(functools.partial(kv_write, layer=3), donate_argnames="kv")
    compiled = program.lower(kv=PagedKV(pool, pool), slot=slot, k=value, v=value).compile()
    size, needs = 2 * pool.size * pool.dtype.itemsize, compiled.memory_analysis()
    assert needs is not None
    return SimpleNamespace(
        alias=needs.alias_size_in_bytes / size, temp=needs.temp_size_in_bytes / size
    )


@DTYPES
def test_a_donated_pool_is_written_in_place(dtype):
    needs = memory(dtype)
    assert needs.alias == 1
    assert needs.temp < 0.1


def test_a_bfloat16_pool_would_be_copied_on_cpu():
    # This is why storage.py holds bits. If it fails, XLA scatters bfloat16 in place on CPU, and the
    # bits are no longer needed.
    if jax.default_backend() != "cpu":
        pytest.skip("about XLA's CPU backend")
    assert memory("bfloat16").temp >= 1

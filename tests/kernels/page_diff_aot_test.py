import functools
import itertools

import jax
import pytest

from tests.kernels import cases
from tests.kernels.cases import shape, swept
from tokendance_jax import targets
from tokendance_jax.kernels.page_diff import DiffPlan, page_diff
from tokendance_jax.kernels.paged_kv import PagedKV

# KV heads and head dims of Qwen2.5 from 0.5B to 72B.
HEADS = ((2, 64), (2, 128), (4, 128), (8, 128))
DTYPES = ("bfloat16", "float32")
LAYERS, PAGES, BASES, COMPARISONS, SIBLINGS = 24, 512, 64, 256, 128


def arguments(heads, page_size, dtype, *, outside):
    pool = shape(LAYERS, PAGES, page_size, *heads, dtype=dtype)
    other = shape(LAYERS, SIBLINGS, page_size, *heads, dtype=dtype)
    column = shape(COMPARISONS)
    plan = DiffPlan(shape(BASES), shape(BASES + 1), column, column, column, column)
    return PagedKV(pool, pool), PagedKV(other, other) if outside else None, plan


def diff(implementation):
    return functools.partial(
        page_diff, rope=cases.ROPE, threshold=0.1, implementation=implementation
    )


def check_temporaries(compiled, *, most):
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes <= most


@pytest.mark.parametrize(("implementation", "platform"), cases.PLATFORMS)
@pytest.mark.parametrize("outside", [False, True])
@swept("dtype", [("bfloat16",), ("float32",)])
def test_lowers(dtype, outside, implementation, platform):
    lowered = (
        jax.jit(diff(implementation))
        .trace(*arguments((2, 128), 16, dtype, outside=outside))
        .lower(lowering_platforms=(platform,))
    )
    assert "custom_call" in lowered.as_text()


@pytest.mark.aot
@pytest.mark.parametrize("outside", [False, True])
@swept(("heads", "page_size", "dtype"), itertools.product(HEADS, (16, 32), DTYPES))
def test_compiles_for_an_h100(heads, page_size, dtype, outside):
    h100 = targets.TARGETS["h100"]
    shapes = arguments(heads, page_size, dtype, outside=outside)
    compiled, (kernel,) = targets.gpu_kernels(h100, diff("mosaic_gpu"), *shapes)
    assert kernel.spill_bytes == kernel.stack_bytes == 0
    assert kernel.shared_bytes <= h100.scratch
    # Enough blocks of threads in flight to hide the memory's latency.
    assert kernel.blocks_per_core >= 3
    # Pages arrive by bulk copies only. The copies are those of the base page, of the first two
    # siblings, of the next sibling (K and V each), and of the tables.
    assert kernel.count(r"cp\.async\.bulk\.tensor\S*\.shared\S*\.global") == 9
    # Threads load only numbers of the plan, and store only the scores of a part.
    assert kernel.count(r"\bld\.global") == kernel.count(r"\bld\.global\S*\.b32\b") <= 9
    assert kernel.count(r"\bst\.global") == kernel.count(r"\bst\.global\.v4\.b32\b") == 1
    # Scores of up to 16 parts of a page and of the whole page, and the tables of angles.
    check_temporaries(compiled, most=17 * LAYERS * COMPARISONS * 16 + 16 * 1024)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("target", "outside"),
    [
        ("tpu-v5e", False),
        ("tpu-v6e", True),
        pytest.param("tpu-v5e", True, marks=pytest.mark.sweep),
        pytest.param("tpu-v6e", False, marks=pytest.mark.sweep),
    ],
)
# On TPUs, XLA lays out pools of narrower heads in another way and would copy them.
@swept(
    ("heads", "page_size", "dtype"),
    [
        (*size, dtype)
        for size in (((2, 128), 16), ((4, 128), 16), ((8, 128), 32))
        for dtype in DTYPES
    ],
)
def test_compiles_for_a_tpu(heads, page_size, dtype, outside, target):
    shapes = arguments(heads, page_size, dtype, outside=outside)
    compiled = targets.compile_for(targets.TARGETS[target], diff("mosaic_tpu"), *shapes)
    check_temporaries(compiled, most=1 << 20)

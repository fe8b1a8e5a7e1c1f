"""Helpers of the tests that compile kernels for accelerators."""

import itertools

import jax
import pytest

from tests.kernels import cases
from tests.kernels.cases import shape
from tokendance_jax import hlo, targets
from tokendance_jax.kernels.gpu_planes import planes_of
from tokendance_jax.kernels.lanes import LaneTables
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.paged.kv import pool_format

# Head shapes of Qwen2.5: 0.5B; 1.5B; 3B; 7B; 14B and 32B; 72B.
HEADS = (
    cases.Heads(14, 2, 64),
    cases.Heads(12, 2, 128),
    cases.Heads(16, 2, 128),
    cases.Heads(28, 4, 128),
    cases.Heads(40, 8, 128),
    cases.Heads(64, 8, 128),
)
LAYERS, PAGES = 28, 8192

# What is compiled for an H100: all heads in both precisions, with pages of 16 and of 32 slots.
ON_H100 = [
    *((heads, page_size, "bfloat16") for heads in HEADS for page_size in (16, 32)),
    *((heads, (16, 32)[index % 2], "float32") for index, heads in enumerate(HEADS)),
    (HEADS[0], 32, "float32"),
]

on_platforms = pytest.mark.parametrize(("implementation", "platform"), cases.PLATFORMS)


def for_tpus(test):
    """Runs a test for two TPUs, both precisions and the heads that TPUs store without padding."""
    pairs = itertools.product(HEADS[1:], ("bfloat16", "float32"))
    test = cases.swept(("heads", "dtype"), pairs)(test)
    return pytest.mark.aot(pytest.mark.parametrize("target", ["tpu-v5e", "tpu-v6e"])(test))


def pool_of(heads, page_size, dtype="bfloat16", pages=PAGES):
    """The shapes of a pool, with a number of pages that depends on the heads.

    The compiler does not compile the same kernel twice, and `targets.gpu_kernels` reports only
    kernels that are compiled.
    """
    pages += heads.heads
    pool = shape(LAYERS, pages, page_size, heads.kv_heads, heads.head_dim, dtype=dtype)
    return PagedKV(pool, pool)


def queries_of(rows, heads):
    return shape(rows, heads.heads, heads.head_dim, dtype="float32")


def tables_of(lanes, entries):
    column = shape(lanes, entries)
    return LaneTables(column, column, column, column, column)


def attend(kernel, implementation, layers=(3,)):
    """Returns a program that runs a kernel in the given layers."""

    def program(q, kv, *arguments):
        for layer in layers:
            with jax.named_scope(f"layer_{layer}"):
                q = kernel(q, kv, layer, *arguments, rope=cases.ROPE, implementation=implementation)
        return q

    return program


def check_lowers(kernel, implementation, platform, shapes):
    program = jax.jit(attend(kernel, implementation)).trace(*shapes)
    assert "custom_call" in program.lower(lowering_platforms=(platform,)).as_text()


def check_layers_have_one_kernel(kernel, shapes, kernels):
    """Checks that all layers share kernels, each lowered once and compiled once."""
    h100, layers = targets.TARGETS["h100"], range(3)
    program = attend(kernel, "mosaic_gpu", layers)
    lowered = jax.jit(program).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu") == kernels
    compiled, programs = targets.gpu_kernels(h100, program, *shapes)
    assert len(programs) == kernels
    assert len(hlo.Program(compiled).kernels()) == kernels * len(layers)


def compile_for_an_h100(kernel, shapes, page_size):
    """Compiles a kernel and checks each of its programs. Returns these and the memory needed."""
    h100, pool = targets.TARGETS["h100"], shapes[1].k
    planes = planes_of(pool.dtype)
    compiled, programs = targets.gpu_kernels(h100, attend(kernel, "mosaic_gpu"), *shapes)
    for program in programs:
        assert program.spill_bytes == program.stack_bytes == 0
        assert program.shared_bytes <= h100.scratch
        assert program.blocks_per_core >= (2 if planes == 1 or pool.shape[4] == 64 else 1)
        # Both products run on tensor cores. With two planes, each becomes three products.
        assert program.count(r"wgmma\.mma_async\S*\.bf16\.bf16") >= 8 * (2 * planes - 1)
        # Keys, values, queries and results move by bulk copies. Threads load table entries only.
        copies = program.count(r"cp\.async\.bulk\.tensor\S*\.shared\S*\.global")
        assert copies >= 2 * 64 // page_size
        assert program.count(r"\bst\.global") == 0
        assert program.count(r"\bld\.global") == program.count(r"\bld\.global\.[bsu]32\b")
    return programs, memory_of(compiled)


def compile_for_a_tpu(kernel, shapes, target):
    """Compiles a kernel for pools in the layout of all programs. Returns the memory needed."""
    target = targets.TARGETS[target]
    pool = pool_format(targets.device(target))
    program = jax.jit(
        attend(kernel, "mosaic_tpu"), in_shardings=(None, pool, *[None] * (len(shapes) - 2))
    )
    return memory_of(program.lower(*targets.placed(target, shapes)).compile())


def memory_of(compiled):
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory

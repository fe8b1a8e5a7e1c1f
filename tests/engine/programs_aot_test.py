"""Whole programs of rounds, compiled for accelerators: they fit the device and copy no pool."""

import dataclasses

import pytest

from tokendance_jax import targets
from tokendance_jax.engine.ahead import NAMES, RoundSize, compile_round
from tokendance_jax.models.families.qwen2 import preset

# Parameters in the matrices that multiply each row: published sizes minus embedding and vectors.
MATRICES = {"0.5B": 0.358e9, "7B": 6.525e9, "14B": 13.21e9}
HEAD = {"0.5B": 151936 * 896, "7B": 152064 * 3584, "14B": 152064 * 5120}


def compiled(name, model, target, agents, layers=None):
    """Compiles a program, of `layers` layers if given, and checks what holds on every target."""
    config, target = preset(model), targets.TARGETS[target]
    matrices = MATRICES[model]
    if layers is not None:
        matrices *= layers / config.num_hidden_layers
        config = dataclasses.replace(config, num_hidden_layers=layers)
    size = RoundSize(agents)
    found = compile_round(name, config, target, size)
    # The program fits the device with all the pool that weights leave room for. The round fits the
    # pool.
    assert found.memory < target.memory
    assert found.round_pool < found.pool
    # Keys and values are written in place, and no temporary is near their size.
    assert found.aliased >= found.pool
    assert found.temporaries < 0.1 * found.pool
    if target.name == "tpu-v6e":
        assert found.kernels is None  # if this fails, jaxlib can read v6e programs: drop the `if`
        return found
    assert found.copies == ()
    # Every layer has its kernels; none of them fell back to XLA code.
    assert found.kernels
    assert found.kernels % config.num_hidden_layers == 0
    # Every product is computed once, padding rows included. The rest are attention's products.
    attention = 0.4 if config.hidden_size < 1000 else 0.1
    products = 2 * found.rows * (matrices + (HEAD[model] if name == "decode" else 0))
    assert found.operations is not None
    assert products < 1.01 * found.operations < (1.01 + attention) * products
    # All matrices are read, in decode no more than once.
    assert found.moved is not None
    assert found.moved > 0.95 * 2 * matrices
    if name == "decode":
        assert found.moved < 1.5 * found.weights + found.round_pool
    return found


@pytest.mark.aot
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", ["7B", pytest.param("14B", marks=pytest.mark.sweep)])
def test_rounds_of_25_agents_fit_an_h100(model, name):
    found = compiled(name, model, "h100", 25)
    # Room for the residual stream and the widest rows of one layer, but not of all layers.
    assert found.temporaries < 3e9


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("prefill", "tpu-v5e"),
        # The test of `program_report` compiles a smaller round for a v5e.
        *(
            pytest.param("decode", target, marks=pytest.mark.sweep)
            for target in ("tpu-v5e", "tpu-v6e")
        ),
    ],
)
def test_narrow_heads_are_not_copied_on_tpus(name, target):
    compiled(name, "0.5B", target, 4, layers=2)


@pytest.mark.aot
def test_a_pool_that_does_not_hold_the_round_is_refused():
    v5e = targets.TARGETS["tpu-v5e"]
    with pytest.raises(ValueError, match="the round of 50 agents needs 1729"):
        compile_round("decode", preset("0.5B"), v5e, RoundSize(50), kv_memory=10**8)

import jax
import numpy as np
import pytest

from tokendance_jax.paged.kv import KVSpec, pool_format


def spec(head_dim):
    return KVSpec(
        layers=3, pages=5, page_size=4, kv_heads=2, head_dim=head_dim, storage=np.dtype("float32")
    )


@pytest.mark.parametrize(("head_dim", "room"), [(64, 2), (128, 1), (192, 4 / 3)])
def test_heads_fill_up_lanes_of_a_tpu(head_dim, room):
    assert spec(head_dim).page_room("tpu") == room * spec(head_dim).page_bytes
    assert spec(head_dim).page_room("gpu") == spec(head_dim).page_bytes


def test_a_new_pool_lies_as_programs_take_it():
    pool, shapes = spec(64).zeros(), spec(64).abstract()
    for array, shape in ((pool.k, shapes.k), (pool.v, shapes.v)):
        assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
        assert not array.any()
        # A program that expects pools in this layout accepts the new pool.
        program = jax.jit(lambda pool: pool, in_shardings=pool_format(), donate_argnums=0)
        assert program.lower(shape).compile()(array).shape == shape.shape
        assert array.is_deleted()

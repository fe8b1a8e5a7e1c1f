import jax
import jax.numpy as jnp
import numpy as np

from tokendance_jax.hlo import Program

f32 = np.float32


def program(function, *arguments, donate=()):
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arguments]
    compiled = jax.jit(function, donate_argnums=donate).lower(*shapes).compile()
    return Program(compiled)


def test_counts_the_operations_of_products():
    found = program(lambda x, y: x @ y, ((64, 32), f32), ((32, 16), f32))
    assert found.products() == 2 * 64 * 32 * 16


def test_counts_a_loops_body_once():
    def loop(x, y):
        return jax.lax.fori_loop(0, 7, lambda _, x: x @ y, x)

    assert program(loop, ((64, 64), f32), ((64, 64), f32)).products() == 2 * 64**3


def test_counts_what_is_read_and_written():
    found = program(lambda x, y: x + y, ((1000,), f32), ((1000,), f32))
    assert found.bytes_moved() == 3 * 4000


def test_what_is_picked_counts_and_not_what_it_is_picked_from():
    found = program(lambda x, i: x.at[i].get(mode="clip") + 1, ((10**5, 8), f32), ((4,), np.int32))
    assert found.bytes_moved() < 10**4


def test_finds_copies():
    shape = 4, 100, 8

    def write(pool, i, x):
        return pool.at[1, i].set(x, mode="drop")

    arguments = (shape, f32), ((4,), np.int32), ((4, 8), f32)
    in_place = program(write, *arguments, donate=(0,))
    assert in_place.made(shape) == []
    # Without donation, the pool is copied.
    assert [made.opcode for made in program(write, *arguments).made(shape)] == ["copy"]
    assert program(lambda pool: jnp.flip(pool, 1), (shape, f32)).made(shape)

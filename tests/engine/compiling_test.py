"""How arguments reach programs, and what programs do with the pool."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.decoder import tiny
from tokendance_jax.engine import programs as device
from tokendance_jax.engine.compiling import Form, Programs
from tokendance_jax.engine.runner import Runner
from tokendance_jax.plan.round_plan import blank_plan

DTYPES = [np.int32, np.float32, np.uint32, np.bool_]


@st.composite
def host_arrays(draw):
    """Draws arrays with up to three axes, some of them empty, and any bits."""
    arrays = []
    for _ in range(draw(st.integers(0, 6))):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        bits = draw(st.lists(st.integers(0, 2**32 - 1), min_size=27, max_size=27))
        words = np.array(bits, np.uint32)[: int(np.prod(shape))].reshape(shape)
        array = np.asarray(words % 2 == 0) if dtype == np.bool_ else words.view(dtype)
        arrays.append(array)
    return arrays


@given(host_arrays())
@settings(max_examples=5)  # every example compiles a program
def test_arrays_of_the_host_arrive_with_their_bits(arrays):
    on_device = jnp.arange(3)
    arguments = (arrays, {"kept": on_device}, tuple(arrays[:1]))
    form, leaves = Form.of(arguments, ())
    taken, kept, words = form.pack(leaves)
    assert not taken
    assert [x is on_device for x in kept] == [True]
    assert words.dtype == np.int32
    back = jax.jit(form.unpack)(taken, kept, words)
    assert jax.tree.structure(back) == jax.tree.structure(arguments)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(arguments), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_arguments_of_one_form_share_a_program_and_others_do_not():
    array = np.zeros((2, 3), np.int32)
    form = Form.of((array,), ())[0]
    assert Form.of((array + 1,), ())[0] == form
    others = [(array.T,), (array.astype(np.float32),), (jnp.asarray(array),), ([array],)]
    for other in others:
        assert Form.of(other, ())[0] != form


@pytest.mark.parametrize("array", [np.zeros(2, np.int64), np.zeros(2, np.float16)])
def test_words_of_other_sizes_are_refused(array):
    with pytest.raises(TypeError, match=r"four bytes"):
        Form.of((array,), ())


def test_a_call_takes_the_pool_and_puts_what_it_returns_in_its_place():
    model, shapes = tiny.tiny_model(), tiny.tiny_shapes(64)
    spec = model.kv_spec(pages=shapes.pages, page_size=shapes.page_size)
    runner = Runner(Programs(model, shapes), spec)
    plan = blank_plan(rows=64, lanes=4, seats=4, entries=shapes.entries.minimum, shapes=shapes)
    before, hidden = runner.kv, runner.new_hidden(4)
    runner.run(device.prefill, hidden, plan)
    assert before.k.is_deleted()
    assert hidden.is_deleted()
    assert not runner.lost
    runner.kv.k.delete()
    assert runner.lost
    runner.reset()
    assert not runner.lost


def test_a_runner_compiles_a_program_once():
    model, shapes = tiny.tiny_model(), tiny.tiny_shapes(64)
    spec = model.kv_spec(pages=shapes.pages, page_size=shapes.page_size)
    runner = Runner(Programs(model, shapes), spec)
    hidden = np.zeros((64, model.config.hidden_size), np.float32)
    runner.prepare(device.logits, hidden)
    seconds = runner.programs.compile_s
    assert seconds > 0
    assert runner.run(device.logits, hidden + 1).shape == (64, model.config.vocab_size)
    assert runner.programs.compile_s == seconds


def test_programs_are_declared_with_what_they_take_donated():
    assert device.prefill.places == (0,)
    assert device.decode.places == ()
    assert device.prefill.pool
    assert not device.logits.pool
    with pytest.raises(ValueError, match="nobody"):
        _ = dataclasses.replace(device.prefill, donated=("nobody",)).places

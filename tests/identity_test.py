import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.loading import tiny
from tokendance_jax import identity
from tokendance_jax.identity import weights_digest
from tokendance_jax.model import load_model
from tokendance_jax.models.loading import load_checkpoint, save_orbax

PARAMS = {
    "a": jnp.arange(12, dtype=jnp.float32).reshape(4, 3),
    "b": jnp.arange(5).astype(jnp.bfloat16),
}


def test_the_digest_is_that_of_the_bits():
    # Saved mirrors contain this digest, so it must be the same in every process, on every platform
    # and in later versions.
    digest = "1e55b26daa811422bd6df6c4b70e6e108f633451c224c7e044814754732862e8"
    assert weights_digest(PARAMS) == digest
    assert weights_digest(dict(reversed(PARAMS.items()))) == digest


def test_the_digest_does_not_depend_on_how_arrays_are_read(monkeypatch):
    digest = weights_digest(PARAMS)
    monkeypatch.setattr(identity, "_SLICE", 36)  # bytes: three of the four rows of `a`
    assert weights_digest(PARAMS) == digest


@pytest.mark.parametrize(
    "change",
    [
        {"a": PARAMS["a"].at[3, 2].add(1e-6)},
        {"a": PARAMS["a"].at[0, 0].set(-0.0)},
        {"a": PARAMS["a"][::-1]},
        {"a": PARAMS["a"].reshape(3, 4)},
        {"b": PARAMS["b"].astype(jnp.float32)},
        {"c": PARAMS["b"]},
    ],
)
def test_every_change_changes_the_digest(change):
    assert weights_digest(PARAMS | change) != weights_digest(PARAMS)


def test_one_model_of_two_formats_is_one_model(tmp_path):
    params = tiny.random_params(tiny.CONFIG)
    folder, orbax = tmp_path / "tiny", tmp_path / "orbax"
    tiny.write_folder(folder, tiny.CONFIG, [tiny.hf_tensors(params, np.float16)])
    save_orbax(load_checkpoint(folder, dtype="float32"), orbax)
    one, other = load_model(folder, dtype="float32"), load_model(orbax, dtype="float32")
    assert one.identity == other.identity
    assert one.identity.rope == tiny.CONFIG.rope
    # A lower precision gives other keys and values.
    assert load_model(orbax, dtype="bfloat16").identity.weights != one.identity.weights
    assert dataclasses.replace(one, name="other").identity == one.identity

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tokendance_jax.kernels import storage

BITS = np.arange(2**16, dtype=np.uint32)
BF16, U16 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.uint16)


@pytest.mark.parametrize(
    ("dtype", "platform", "stored"),
    [
        (jnp.bfloat16, "cpu", jnp.uint16),
        (jnp.bfloat16, "gpu", jnp.bfloat16),
        (jnp.bfloat16, "tpu", jnp.bfloat16),
        (jnp.float32, "cpu", jnp.float32),
        (jnp.float32, "gpu", jnp.float32),
    ],
)
def test_only_bfloat16_on_cpu_is_held_as_bits(dtype, platform, stored):
    assert storage.storage_dtype(jnp.dtype(dtype), platform) == jnp.dtype(stored)
    assert storage.value_dtype(jnp.dtype(stored)) == jnp.dtype(dtype)


def same_bits(bits, expected):
    """Asserts that bfloat16 bit patterns are equal. All NaNs count as equal."""
    bits, expected = np.asarray(bits), np.asarray(expected)
    nan = np.isnan(expected.view(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(np.isnan(bits.view(ml_dtypes.bfloat16).astype(np.float32)), nan)
    np.testing.assert_array_equal(bits[~nan], expected[~nan])


def test_every_bfloat16_number_comes_back():
    # All 65,536 patterns, including signed zeros, denormals, infinities and NaNs.
    bits = BITS.astype(np.uint16)
    loaded = jax.jit(storage.load)(bits)
    assert loaded.dtype == BF16
    same_bits(np.asarray(loaded).view(np.uint16), bits)
    stored = jax.jit(lambda x: storage.store(x, U16))((BITS << 16).view(np.float32))
    assert stored.dtype == U16
    same_bits(stored, bits)


def test_storing_rounds_as_astype_does():
    # Every bfloat16 number, with lower bits that are a tie, near a tie, or far from one.
    rests = np.array([0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = ((BITS << 16)[:, None] | rests).view(np.float32)
    stored = jax.jit(lambda x: storage.store(x, U16))(x)
    with np.errstate(invalid="ignore"):  # NaN makes the cast warn
        same_bits(stored, x.astype(ml_dtypes.bfloat16).view(np.uint16))
    same_bits(stored, np.asarray(jnp.asarray(x).astype(jnp.bfloat16)).view(np.uint16))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_other_dtypes_mean_themselves(dtype):
    x = np.linspace(-3, 3, 100, dtype=np.float32)
    stored = storage.store(jnp.asarray(x), jnp.dtype(dtype))
    assert stored.dtype == dtype
    assert storage.load(stored) is stored
    np.testing.assert_array_equal(stored, x.astype(jnp.dtype(dtype)))

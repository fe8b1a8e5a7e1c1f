import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import cases
from tokendance_jax.kernels.attention_mass import attention_mass

SMALL = cases.HEADS[1]

program = jax.jit(functools.partial(attention_mass, rope=cases.ROPE), static_argnums=2)


def values(pool):
    if pool.dtype == np.uint16:
        return (pool.astype(np.uint32) << 16).view(np.float32)
    return pool


def naive(case, heads, q, k):
    """The mass by its definition, lane by lane, in float64: one array [table entries] per lane."""
    mass, row = [], 0
    for plan in case.lanes:
        position = np.arange(plan.slots.sum(), dtype=np.int32)
        slot, _ = plan.locate(position, case.page_size)
        entry = np.repeat(np.arange(len(plan.page)), plan.slots)
        keys = values(k)[cases.LAYER].reshape(-1, heads.kv_heads, heads.head_dim)[slot]
        keys = cases.turned(
            np.nan_to_num(keys).astype(np.float64), plan.frame[entry][:, None, None]
        )
        keys = np.repeat(keys, heads.heads // heads.kv_heads, axis=1)
        of_lane = np.zeros(len(plan.page))
        for at in plan.computed.tolist():
            query = q[row].astype(np.float64) * heads.head_dim**-0.5
            scores = np.einsum("hd,shd->hs", query, keys[: at + 1])
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            np.add.at(of_lane, entry[: at + 1], weights.sum(axis=0))
            row += 1
        mass.append(of_lane)
    return mass


def check(case, heads, dtype):
    """Compares the mass of every table entry. The pool holds NaN in all slots without a token."""
    q = cases.queries(cases.ROWS, heads)
    kv = cases.pool(case, heads, dtype)
    out = np.asarray(
        program(q, cases.poisoned(case, kv), cases.LAYER, case.position, case.tables, case.tiles)
    )
    assert out.shape == case.tables.page.shape
    used = np.asarray(case.tables.slots) > 0
    assert not out[~used].any()
    for index, (plan, expected) in enumerate(
        zip(case.lanes, naive(case, heads, q, kv.k), strict=True)
    ):
        found = out[index][used[index]]
        whole = len(plan.computed) * heads.heads
        np.testing.assert_allclose(found.sum(), whole, rtol=1e-4)
        rtol = 2e-2 if dtype == "uint16" else 1e-4
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * whole / 100)


@pytest.mark.parametrize(
    ("heads", "page_size", "dtype"),
    [(cases.HEADS[0], 16, "float32"), (cases.HEADS[1], 8, "float32"), (SMALL, 32, "uint16")],
    ids=str,
)
def test_equals_the_definition(heads, page_size, dtype):
    check(cases.sharing(page_size), heads, dtype)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=6)
def test_random_lanes_equal_the_definition(seed):
    check(cases.random_case(seed, page_size=16), SMALL, "float32")

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mirror.rounds import (
    IDENTITY,
    PAGE_SIZE,
    ROPE,
    SPECS,
    Sample,
    aligned,
    assert_same_bits,
    decode_pages,
    encode,
    gathered,
    lane_plan,
    pool,
    rotated,
    samples,
    values,
)
from tokendance_jax.kernels.rope import Rope
from tokendance_jax.mirror import (
    MirrorError,
    MirrorLayout,
    Quantised,
    decode_dense,
    master_mirror,
    transfer,
)
from tokendance_jax.paged import PagePool
from tokendance_jax.paged.kv import KVSpec, PagedKV

STORAGE = st.sampled_from(["float32", "uint16"])
# The bias is far larger than keys without it.
FORM = Quantised(200 * np.random.default_rng(9).standard_normal((2, 2, 4)).astype(np.float32), ROPE)
# The base pages 6 and 7 are shown away from their canonical positions, 20 to 27. Lane 0 continues
# its own text behind a base page, in the page where that text ended. Lane 1 patches page 6.
EXAMPLE = Sample(
    lanes=[
        lane_plan([(9, 0, 0, 3, 0), (6, -17, 0, 4, 6), (9, 0, 3, 1, 0), (8, 0, 0, 4, 0)], 12),
        lane_plan([(20, -20, 0, 4, 6), (7, -20, 0, 3, 7), (11, 0, 1, 2, 0)], 9),
        lane_plan([(6, -20, 0, 4, 6), (7, -20, 0, 4, 7)], 8),
    ],
    lengths=[11, 9, 8],
)


def biased_pool(sample, spec, *, poison=np.nan):
    """A pool of the sample whose keys have the bias and are rotated to canonical positions."""
    kv = pool(sample, spec, poison=poison)
    layers, pages, size, *head = kv.k.shape
    k = values(kv.k).reshape(layers, pages * size, *head).copy()
    written = {slot: canonical for _, _, slot, canonical in sample.written()}
    slots = np.array(list(written))
    position = np.array(list(written.values()))
    k[:, slots] = rotated(k[:, slots] + FORM.key_bias[:, None], position)
    k = k.reshape(kv.k.shape)
    if spec.storage == np.uint16:
        k = k.astype(ml_dtypes.bfloat16).view(np.uint16)
    return PagedKV(jnp.asarray(k), kv.v)


def canonical_of(sample, index):
    return np.array([at for lane, _, _, at in sample.written() if lane == index], np.int64)


def poisoned(spec):
    bits = np.uint16(0x7FC0) if spec.storage == np.uint16 else np.float32(np.nan)
    return jax.tree.map(lambda x: jnp.full(x.shape, bits, x.dtype), spec.abstract())


def release(pages, lanes):
    for lane in lanes:
        pages.release(lane.page)
    pages.check()
    assert pages.live == 0


def encoded(sample, spec, form=FORM):
    return encode(sample.lanes, sample.lengths, biased_pool(sample, spec), form=form)


@given(samples().map(aligned), STORAGE)
@settings(max_examples=15)
def test_every_number_is_within_half_a_step(sample, storage):
    kv = biased_pool(sample, SPECS[storage])
    mirrors = encode(sample.lanes, sample.lengths, kv, form=FORM)
    for index in range(len(sample.lanes)):
        held_k, held_v = map(values, gathered(sample, index, kv))
        k, v = decode_dense(mirrors, index, rotate=False)
        assert k.dtype == v.dtype == np.float32
        back = -canonical_of(sample, index)
        bias = FORM.key_bias[:, None]
        # Rounding of a float32 angle, and of numbers of up to 1000 to float32.
        for found, true, rounding in (
            (rotated(k, back) - bias, rotated(held_k, back) - bias, 1e-3),
            (v, held_v, 1e-6),
        ):
            step = np.abs(true).max(axis=-1, keepdims=True) / 127
            assert (np.abs(found - true) <= step / 2 + rounding).all()


@given(samples().map(aligned), STORAGE, st.booleans())
@settings(max_examples=15)
def test_restored_pages_hold_what_dense_caches_hold_and_nothing_else(sample, storage, on_device):
    mirrors = encoded(sample, SPECS["float32"])
    source = jax.tree.map(jnp.asarray, mirrors) if on_device else mirrors
    # The pool may have another precision than the encoded pool.
    spec = SPECS[storage]
    pages = PagePool(spec.pages)
    pages.allocate(3)
    restored, lanes = decode_pages(source, poisoned(spec), pages)
    again = Sample(lanes, sample.lengths)
    for index in range(len(lanes)):
        dense = decode_dense(mirrors, index, rotate=False)
        for found, expected in zip(gathered(again, index, restored), dense, strict=True):
            if storage == "uint16":
                expected = expected.astype(ml_dtypes.bfloat16).view(np.uint16)
            assert found.tobytes() == expected.tobytes()
    written = np.zeros(spec.pages * PAGE_SIZE, bool)
    written[[slot for _, _, slot, _ in again.written()]] = True
    for array in (restored.k, restored.v):
        finite = np.isfinite(values(array)).all(axis=(0, 3, 4)).reshape(-1)
        assert (finite == written).all()
    held = {page for _, page, *_ in sample.entries()}
    assert pages.live == len(held) + 3
    pages.release(np.array([1, 2, 3], np.int32))
    release(pages, lanes)


@given(samples().map(aligned))
@settings(max_examples=12)
def test_what_is_restored_encodes_to_the_same_integers(sample):
    mirrors = encoded(sample, SPECS["float32"])
    pages = PagePool(64)
    restored, lanes = decode_pages(mirrors, poisoned(SPECS["float32"]), pages)
    again = encode(lanes, sample.lengths, restored, form=FORM)
    assert jax.tree.structure(again) == jax.tree.structure(mirrors)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(mirrors), strict=True):
        if one.dtype == np.float32:
            np.testing.assert_allclose(one, other, rtol=1e-2)
        else:
            np.testing.assert_array_equal(one, other)


@given(samples().map(aligned), STORAGE)
@settings(max_examples=12)
def test_only_what_is_written_counts(sample, storage):
    spec = SPECS[storage]
    mirrors = encoded(sample, spec)
    clean = biased_pool(sample, spec, poison=7.0)
    assert_same_bits(mirrors, encode(sample.lanes, sample.lengths, clean, form=FORM))
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(mirrors))


@given(samples().map(aligned), STORAGE)
@settings(max_examples=12)
def test_bytes_are_the_layouts(sample, storage):
    spec = SPECS[storage]
    mirrors = encoded(sample, spec)
    exact = encode(sample.lanes, sample.lengths, pool(sample, spec))
    layout = MirrorLayout.of_lanes(sample.lanes, sample.lengths)
    size, page_bytes = PAGE_SIZE, spec.page_bytes
    whole = layout.compression(page_size=size, page_bytes=page_bytes, form=FORM)
    assert mirrors.nbytes == whole.stored_bytes
    assert exact.nbytes == whole.exact_bytes
    assert whole.form_ratio == exact.nbytes / mirrors.nbytes
    plain = layout.compression(page_size=size, page_bytes=page_bytes)
    assert (plain.form_ratio, plain.dense_bytes) == (1, whole.dense_bytes)
    own = layout.mirror_compression(page_size=size, page_bytes=page_bytes, form=FORM)
    for mirror, one in zip(mirrors.mirrors, own, strict=True):
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(mirror)) == one.own_bytes


@pytest.mark.parametrize(("head_dim", "ratio"), [(64, 128 / 68), (128, 256 / 132)])
def test_a_page_is_about_half_of_one_in_bfloat16(head_dim, ratio):
    spec = KVSpec(3, 10, 16, 2, head_dim, np.dtype(np.uint16))
    form = Quantised(np.zeros((3, 2, head_dim), np.float32), ROPE)
    assert spec.page_bytes / form.page_bytes(16) == pytest.approx(ratio)


@pytest.mark.parametrize("rotate", [False, True])
def test_keys_stand_where_they_are_asked_for(rotate):
    spec = SPECS["float32"]
    kv = biased_pool(EXAMPLE, spec)
    mirrors = encode(EXAMPLE.lanes, EXAMPLE.lengths, kv, form=FORM)
    shapes = [(m.private.count, m.patch.count) for m in mirrors.mirrors]
    assert (mirrors.base.count, shapes) == (2, [(2, 0), (1, 1), (0, 0)])
    for index, lane in enumerate(EXAMPLE.lanes):
        k, _ = decode_dense(mirrors, index, rotate=rotate)
        held, _ = gathered(EXAMPLE, index, kv)
        frame = np.repeat(lane.frame, lane.slots)[: len(held[0])]
        expected = rotated(held, frame) if rotate else held
        step = 4 / 127  # for normally distributed numbers
        np.testing.assert_allclose(k, expected, atol=step)


def test_a_page_is_read_once_whoever_shows_it(monkeypatch):
    spec, plans = SPECS["float32"], []

    def restore(kv, pages, plan, form, **keywords):
        plans.append(plan)
        return transfer.restore(kv, pages, plan, form, **keywords)

    monkeypatch.setattr(master_mirror, "restore", restore)
    decode_pages(encoded(EXAMPLE, spec), poisoned(spec), PagePool(spec.pages))
    base, private, *_ = plans
    assert (base.page.tolist(), base.begin.tolist()) == ([0, 1], [0, 1, 2])
    assert (base.slots.tolist(), base.turn.tolist()) == ([4, 4], [20, 24])
    # Own text continues in the page where it ended, at later positions.
    assert (private.page.tolist(), private.begin.tolist()) == ([0, 1], [0, 2, 3])
    assert (private.slots.tolist(), private.turn.tolist()) == ([3, 1, 3], [0, 4, 8])


def test_some_mirrors_are_restored_without_the_others():
    spec = SPECS["float32"]
    mirrors = encoded(EXAMPLE, spec)
    some = dataclasses.replace(mirrors, mirrors=mirrors.mirrors[1:2])
    pages = PagePool(spec.pages)
    restored, lanes = decode_pages(some, poisoned(spec), pages)
    assert pages.live == 3  # one base page, one patch, one private page
    expected = decode_dense(mirrors, 1, rotate=False)
    assert_same_bits(gathered(Sample(lanes, [9]), 0, restored), expected)
    release(pages, lanes)
    none = dataclasses.replace(mirrors, mirrors=())
    assert decode_pages(none, restored, pages) == (restored, [])
    assert pages.live == 0


def test_a_mirror_without_tokens_has_no_pages():
    spec = SPECS["float32"]
    sample = dataclasses.replace(EXAMPLE, lengths=[11, 0, 8])
    mirrors = encoded(sample, spec)
    assert (mirrors.mirrors[1].private.count, mirrors.mirrors[1].patch.count) == (0, 0)
    scales = mirrors.mirrors[1].private.k_scale
    assert scales is not None
    assert scales.shape == (2, 0, PAGE_SIZE, 2)
    pages = PagePool(spec.pages)
    restored, lanes = decode_pages(mirrors, poisoned(spec), pages)
    assert lanes[1].page.size == 0
    k, v = decode_dense(mirrors, 1, rotate=True)
    assert k.shape == v.shape == (2, 0, 2, 4)
    del restored
    release(pages, lanes)
    with pytest.raises(MirrorError, match="lengths: number: 3 lengths for 3 lanes, 0 tokens"):
        encode(sample.lanes, [0, 0, 0], biased_pool(sample, spec), form=FORM)


def test_zeros_stay_zeros():
    spec = SPECS["float32"]
    form = dataclasses.replace(FORM, key_bias=0 * FORM.key_bias)
    kv = jax.tree.map(jnp.zeros_like, spec.zeros())
    mirrors = encode(EXAMPLE.lanes, EXAMPLE.lengths, kv, form=form)
    for x in decode_dense(mirrors, 0, rotate=True):
        assert (x == 0).all()


@pytest.mark.parametrize(("field", "number"), [("k", np.nan), ("k", np.inf), ("v", -np.inf)])
def test_numbers_that_are_not_finite_are_refused(field, number):
    kv = biased_pool(EXAMPLE, SPECS["float32"])
    broken = dataclasses.replace(kv, **{field: getattr(kv, field).at[1, 6, 2, 1, 3].set(number)})
    with pytest.raises(MirrorError, match=f"kv: {field}: has numbers that are not finite; encode"):
        encode(EXAMPLE.lanes, EXAMPLE.lengths, broken, form=FORM)
    encode(EXAMPLE.lanes, EXAMPLE.lengths, broken)


def test_bad_arguments_are_refused():
    spec = SPECS["float32"]
    kv = biased_pool(EXAMPLE, spec)
    for wrong, kind in (
        (FORM.key_bias[:1], r"\[1, 2, 4\] float32"),
        (FORM.key_bias[:, :1], r"\[2, 1, 4\] float32"),
        (FORM.key_bias.reshape(2, 8), r"\[2, 8\] float32"),
        (FORM.key_bias.astype(np.float64), r"\[2, 2, 4\] float64"),
    ):
        message = rf"^form: key_bias: is {kind}; pass the bias of .*, \[2, 2, 4\] float32$"
        with pytest.raises(MirrorError, match=message):
            encode(EXAMPLE.lanes, EXAMPLE.lengths, kv, form=Quantised(wrong, ROPE))
    # One page is shown in two lanes, in one of them in a wrong frame.
    moved = dataclasses.replace(EXAMPLE.lanes[2], frame=np.array([-20, -19], np.int32))
    lanes = [*EXAMPLE.lanes[:2], moved]
    with pytest.raises(MirrorError, match="lanes: frame: a slot of lane 1 is shown at two canon"):
        encode(lanes, EXAMPLE.lengths, kv, form=FORM)
    mirrors = encode(EXAMPLE.lanes, EXAMPLE.lengths, kv, form=FORM)
    other = dataclasses.replace(IDENTITY, rope=Rope(500.0))
    with pytest.raises(MirrorError, match=r"form: rope: is theta 10000; pass .* model, theta 500$"):
        encode(EXAMPLE.lanes, EXAMPLE.lengths, kv, form=FORM, identity=other)
    other = dataclasses.replace(spec, kv_heads=4).zeros()
    with pytest.raises(MirrorError) as error:
        decode_pages(mirrors, other, PagePool(64))
    assert str(error.value) == (
        "kv: k: is [2, pages, 4, 4, 4] float32; pass a pool of [2, pages, 4, 2, 4] float32"
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int8", pytest.param("exact", marks=pytest.mark.sweep)])
def test_the_gpu_kernel_restores_what_xla_code_restores(form, simulator):
    spec = KVSpec(2, 12, 16, 2, 64, np.dtype(ml_dtypes.bfloat16))
    bias = np.random.default_rng(0).normal(size=(2, 2, 64), scale=100).astype(np.float32)
    quantised = Quantised(bias, Rope(1e6)) if form == "int8" else None
    lanes = [
        lane_plan([(1, 0, 0, 5, 0), (2, 5, 0, 16, 2), (1, 0, 5, 11, 0)], 20),
        lane_plan([(3, 0, 0, 16, 2), (2, 16, 0, 9, 2)], 25),
    ]
    lengths = [30, 25]
    drawn = np.random.default_rng(1).standard_normal((2, *spec.abstract().k.shape))
    kv = PagedKV(*(jnp.asarray(x, jnp.bfloat16) for x in drawn))
    identity = dataclasses.replace(IDENTITY, rope=Rope(1e6))
    mirrors = encode(lanes, lengths, kv, form=quantised, identity=identity)
    found = {}
    for implementation in ("xla", "interpret"):
        nan = PagedKV(*(jnp.full_like(x, jnp.nan) for x in (kv.k, kv.v)))
        restored, back = decode_pages(
            mirrors,
            nan,
            PagePool(spec.pages),
            identity=identity,
            implementation=implementation,
        )
        slots = [
            lane.locate(np.arange(length, dtype=np.int32), spec.page_size)[0]
            for lane, length in zip(back, lengths, strict=True)
        ]
        found[implementation] = [
            np.asarray(x).reshape(2, -1, 2, 64)[:, np.concatenate(slots)].astype(np.float32)
            for x in (restored.k, restored.v)
        ]
    for one, other in zip(found["interpret"], found["xla"], strict=True):
        assert np.isfinite(other).all()
        if form == "exact":
            assert one.tobytes() == other.tobytes()
        np.testing.assert_allclose(one, other, rtol=2**-7, atol=2e-5)
    assert not simulator.races()


def test_encoding_needs_little_memory_beside_the_pool():
    spec = KVSpec(24, 2048, 16, 2, 64, np.dtype(np.uint16))  # never allocated
    form = Quantised(np.zeros((24, 2, 64), np.float32), Rope(1e6))
    pages = np.zeros(16, np.int32)
    used = np.zeros((16, 16), np.bool_)
    program = transfer._read.lower(
        spec.abstract(), form, pages, used, used.astype(np.int32)
    ).compile()
    needs = program.memory_analysis()
    assert needs is not None
    assert needs.temp_size_in_bytes < 0.1 * spec.pages * spec.page_bytes

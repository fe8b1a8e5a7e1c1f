import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mirror.rounds import (
    IDENTITY,
    PAGE_SIZE,
    SPECS,
    Sample,
    assert_same_bits,
    decode_pages,
    encode,
    gathered,
    lane_plan,
    pool,
    samples,
    values,
)
from tokendance_jax.kernels.rope import Rope
from tokendance_jax.mirror import MirrorError, MirrorLayout, decode_dense, master_mirror
from tokendance_jax.paged import OutOfPages, PagePool

STORAGE = st.sampled_from(["float32", "uint16"])
EXAMPLE = Sample(
    lanes=[
        lane_plan([(9, 0, 0, 4, 0), (20, 4, 0, 4, 5), (6, 4, 0, 4, 6), (10, 0, 0, 2, 0)], 12),
        lane_plan([(11, 0, 0, 3, 0), (21, 3, 0, 4, 5), (6, 3, 0, 4, 6), (6, 7, 1, 2, 6)], 13),
    ],
    lengths=[14, 12],
)


def poisoned(spec):
    """An empty pool, full of NaN."""
    bits = np.uint16(0x7FC0) if spec.storage == np.uint16 else np.float32(np.nan)
    return jax.tree.map(lambda x: jnp.full(x.shape, bits, x.dtype), spec.abstract())


def release(pages, lanes):
    for lane in lanes:
        pages.release(lane.page)
    pages.check()
    assert pages.live == 0


@given(samples(), STORAGE)
@settings(max_examples=15)
def test_decoding_gives_what_the_pool_held(sample, storage):
    kv = pool(sample, SPECS[storage])
    mirrors = encode(sample.lanes, sample.lengths, kv)
    for index in range(len(sample.lanes)):
        decoded = decode_dense(mirrors, index, rotate=False)
        assert_same_bits(decoded, gathered(sample, index, kv))


@given(samples(), STORAGE)
@settings(max_examples=15)
def test_only_what_is_written_counts(sample, storage):
    mirrors = encode(sample.lanes, sample.lengths, pool(sample, SPECS[storage]))
    clean = pool(sample, SPECS[storage], poison=7.0)
    assert_same_bits(mirrors, encode(sample.lanes, sample.lengths, clean))
    pages = [mirrors.base.k, mirrors.base.v]
    for mirror in mirrors.mirrors:
        pages += [mirror.private.k, mirror.private.v, mirror.patch.k, mirror.patch.v]
    assert all(np.isfinite(values(x)).all() for x in pages)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(mirrors))


@given(samples(), STORAGE)
@settings(max_examples=15)
def test_bytes_are_the_layouts(sample, storage):
    spec = SPECS[storage]
    mirrors = encode(sample.lanes, sample.lengths, pool(sample, spec))
    layout = MirrorLayout.of_lanes(sample.lanes, sample.lengths)
    compression = layout.compression(page_size=PAGE_SIZE, page_bytes=spec.page_bytes)
    assert mirrors.nbytes == compression.stored_bytes
    own = layout.mirror_compression(page_size=PAGE_SIZE, page_bytes=spec.page_bytes)
    for mirror, one in zip(mirrors.mirrors, own, strict=True):
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(mirror)) == one.own_bytes


@given(samples(), STORAGE, st.booleans())
@settings(max_examples=15)
def test_pages_come_back_and_encode_to_the_same_bits(sample, storage, on_device):
    spec = SPECS[storage]
    kv = pool(sample, spec)
    mirrors = encode(sample.lanes, sample.lengths, kv)
    pages = PagePool(spec.pages)
    pages.allocate(3)  # so that pages get other ids than before
    source = jax.tree.map(jnp.asarray, mirrors) if on_device else mirrors
    restored, lanes = decode_pages(source, poisoned(spec), pages)

    # Tables equal the encoded ones except for page ids. A page has one new id wherever it occurs.
    entries = list(sample.entries())
    names = {0: 0}
    for index, lane in enumerate(lanes):
        mine = [entry[1:] for entry in entries if entry[0] == index]
        assert lane.slots.tolist() == [slots for _, _, _, slots, _ in mine]
        assert lane.frame.tolist() == [frame for _, frame, _, _, _ in mine]
        assert lane.first.tolist() == [first for _, _, first, _, _ in mine]
        assert lane.token_ids.tolist() == sample.lanes[index].token_ids.tolist()
        assert lane.computed.size == 0
        for (page, *_, base), new_page, new_base in zip(mine, lane.page, lane.base, strict=True):
            assert names.setdefault(page, new_page) == new_page
            assert names.setdefault(base, new_base) == new_base
    assert len(set(names.values())) == len(names)
    held = Counter(page for _, page, *_ in entries)
    assert all((names[base] > 0) == (base in held) for *_, base in entries if base)

    # Each entry holds one reference, and no more pages are live than in the old round.
    for page, count in held.items():
        assert pages.refcount(int(names[page])) == count
    assert pages.live == len(held) + 3
    again = Sample(lanes, sample.lengths)
    for index in range(len(lanes)):
        assert_same_bits(gathered(again, index, restored), gathered(sample, index, kv))
    assert_same_bits(encode(lanes, sample.lengths, restored), mirrors)
    pages.release(np.array([1, 2, 3], np.int32))
    release(pages, lanes)


def test_a_replaced_base_page_that_nobody_reads_is_neither_stored_nor_restored():
    spec = SPECS["float32"]
    mirrors = encode(EXAMPLE.lanes, EXAMPLE.lengths, pool(EXAMPLE, spec))
    assert mirrors.base.k.shape[1] == 1
    pages = PagePool(spec.pages)
    _, lanes = decode_pages(mirrors, poisoned(spec), pages)
    assert pages.live == 1 + 3 + 2
    assert pages.refcount(int(lanes[0].page[2])) == 3
    assert lanes[0].base[1] == lanes[1].base[1] < 0
    assert lanes[0].base[2] == lanes[0].page[2] == lanes[1].page[2] == lanes[1].page[3]


def test_own_pages_of_several_entries_come_back_once():
    spec = SPECS["float32"]
    sample = Sample(
        lanes=[
            lane_plan([(9, 0, 0, 3, 0), (20, 2, 0, 2, 5), (20, 3, 2, 2, 5), (9, 0, 3, 1, 0)], 6),
            lane_plan([(8, 0, 0, 2, 0), (5, 2, 0, 4, 5), (8, 0, 2, 2, 0), (7, 0, 0, 2, 0)], 6),
        ],
        lengths=[8, 10],
    )
    kv = pool(sample, spec)
    mirrors = encode(sample.lanes, sample.lengths, kv)
    assert mirrors.base.k.shape[1] == 1
    shapes = [(m.private.k.shape[1], m.patch.k.shape[1]) for m in mirrors.mirrors]
    assert shapes == [(1, 1), (2, 0)]
    pages = PagePool(spec.pages)
    restored, lanes = decode_pages(mirrors, poisoned(spec), pages)
    assert pages.live == 5
    private, patch = lanes[0].page[[0, 1]].tolist()
    assert lanes[0].page.tolist() == [private, patch, patch, private]
    assert pages.refcount(private) == pages.refcount(patch) == 2
    assert [pages.refcount(int(page)) for page in lanes[1].page] == [2, 1, 2, 1]
    assert_same_bits(encode(lanes, sample.lengths, restored), mirrors)
    release(pages, lanes)


def test_some_mirrors_are_restored_without_the_others():
    spec = SPECS["float32"]
    sample = Sample(
        lanes=[
            lane_plan([(5, 0, 0, 4, 5), (6, 0, 0, 4, 6), (7, 0, 0, 4, 7)], 12),
            lane_plan([(9, 0, 0, 4, 5), (6, 4, 0, 4, 6), (8, 0, 0, 4, 0)], 12),
            lane_plan([(6, 8, 0, 4, 6), (10, 0, 0, 4, 7), (11, 0, 0, 4, 7)], 12),
        ],
        lengths=[12, 12, 12],
    )
    kv = pool(sample, spec)
    mirrors = encode(sample.lanes, sample.lengths, kv)
    assert mirrors.base.k.shape[1] == 3
    some = dataclasses.replace(mirrors, mirrors=mirrors.mirrors[1:])
    pages = PagePool(spec.pages)
    restored, lanes = decode_pages(some, poisoned(spec), pages)
    assert pages.live == 1 + 2 + 2  # two of three base pages are not restored
    assert pages.refcount(int(lanes[0].page[1])) == 2
    expected = encode(sample.lanes[1:], sample.lengths[1:], kv)
    assert_same_bits(encode(lanes, sample.lengths[1:], restored), expected)
    release(pages, lanes)


def test_too_few_pages_hold_nothing():
    spec = SPECS["uint16"]
    kv = pool(EXAMPLE, spec)
    mirrors = encode(EXAMPLE.lanes, EXAMPLE.lengths, kv)
    pages = PagePool(6)
    target = poisoned(spec)
    with pytest.raises(OutOfPages) as error:
        decode_pages(mirrors, target, pages)
    assert (error.value.requested, pages.free) == (6, 5)
    pages.check()
    target.k.block_until_ready()  # still there: nothing was donated


def test_a_failed_write_holds_nothing(monkeypatch):
    spec = SPECS["uint16"]
    mirrors = encode(EXAMPLE.lanes, EXAMPLE.lengths, pool(EXAMPLE, spec))

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(master_mirror, "restore", fail)
    pages = PagePool(spec.pages)
    with pytest.raises(MemoryError):
        decode_pages(mirrors, poisoned(spec), pages)
    assert pages.live == 0
    pages.check()


def test_pools_of_another_kind_are_refused():
    mirrors = encode(EXAMPLE.lanes, EXAMPLE.lengths, pool(EXAMPLE, SPECS["uint16"]))
    pages = PagePool(64)
    with pytest.raises(MirrorError) as error:
        decode_pages(mirrors, SPECS["float32"].zeros(), pages)
    assert str(error.value) == (
        "kv: k: is [2, pages, 4, 2, 4] float32; pass a pool of [2, pages, 4, 2, 4] uint16"
    )
    with pytest.raises(MirrorError, match="kv: k: has 64 pages, the page pool 65"):
        decode_pages(mirrors, SPECS["uint16"].zeros(), PagePool(65))
    assert pages.live == 0


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"weights": "1" * 64}, "weights 000000000000... and not 111111111111..."),
        ({"dtype": "bfloat16"}, "dtype float32 and not bfloat16"),
        (
            {"rope": Rope(1e6), "heads": 2},
            "heads 4 and not 2, rope theta 10000 and not theta 1e+06",
        ),
    ],
)
def test_mirrors_of_another_model_are_refused(change, difference):
    spec = SPECS["float32"]
    mirrors = encode(EXAMPLE.lanes, EXAMPLE.lengths, pool(EXAMPLE, spec))
    pages, kv = PagePool(spec.pages), poisoned(spec)
    with pytest.raises(MirrorError) as error:
        decode_pages(mirrors, kv, pages, identity=dataclasses.replace(IDENTITY, **change))
    assert str(error.value) == (
        f"mirrors: identity: is that of another model: {difference}; restore them with the model "
        "that computed them, or serve the round again"
    )
    assert pages.live == 0
    kv.k.block_until_ready()  # still there: nothing was donated


@pytest.mark.parametrize("entry", [(64, 0, 0, 4, 0), (1, 0, 2, 3, 0), (1, 0, -1, 3, 0)])
def test_entries_outside_the_pool_are_refused(entry):
    with pytest.raises(MirrorError, match="lane 0 is not inside 64 pages of 4 slots"):
        encode([lane_plan([entry])], [3], SPECS["float32"].zeros())

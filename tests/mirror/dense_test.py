import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mirror.rounds import (
    PAGE_SIZE,
    SPANS,
    SPECS,
    encode,
    encode_dense,
    gathered,
    lane_plan,
    pool,
    rotated,
    samples,
    stored,
    values,
)
from tokendance_jax.mirror import MirrorError, decode_dense
from tokendance_jax.paged.kv import PagedKV

PAGES = 6  # of the base, including page 0
# Unchanged numbers differ by rounding only: below 1e-5 in float32 and 0.05 in bfloat16.
THRESHOLD = {"float32": 1e-4, "uint16": 0.15}


@dataclasses.dataclass(frozen=True)
class DenseRound:
    """A base, agents that show its pages at other offsets, and which entries they changed."""

    base: PagedKV
    lanes: list
    caches: list
    changed: list


def dense_round(recipes, storage, offset, seed=0):
    """Builds a round. Each agent's recipe lists (base page or 0, span, "k" or "v" to change it)."""
    spec = SPECS[storage]
    generator = np.random.default_rng(seed)

    def numbers(*tokens):
        return generator.uniform(-2, 2, (spec.layers, *tokens, spec.kv_heads, spec.head_dim))

    # Canonical positions count through the pages, starting at `offset`.
    raw, base_v = numbers(PAGES * PAGE_SIZE), numbers(PAGES * PAGE_SIZE)
    base_k = rotated(raw, offset + np.arange(PAGES * PAGE_SIZE))
    lanes, caches, changes = [], [], []
    shown = np.zeros(PAGES * PAGE_SIZE, bool)
    for recipe in recipes:
        entries, k, v, changed, start = [], [], [], [], 0
        for page, (first, slots), change in recipe:
            at = page * PAGE_SIZE + first + np.arange(slots)
            shown[at] |= page != 0
            own_k, own_v = (raw[:, at], base_v[:, at]) if page else (numbers(slots), numbers(slots))
            own_k, own_v = own_k.copy(), own_v.copy()
            if page and change:
                # Change one number of one token at layer 1.
                (own_k if change == "k" else own_v)[1, slots // 2, 0, 1] += 1.0
            changed.append(bool(page and change))
            entries.append((0, start - int(offset + at[0]) if page else 0, first, slots, page))
            k.append(own_k)
            v.append(own_v)
            start += slots
        lanes.append(lane_plan(entries, start))
        k = rotated(np.concatenate(k, axis=1), np.arange(start))
        caches.append(
            tuple(stored(x.astype(np.float32), spec) for x in (k, np.concatenate(v, axis=1)))
        )
        changes.append(changed)
    base_k[:, ~shown] = np.nan
    base_v[:, ~shown] = np.nan
    shape = (spec.layers, PAGES, PAGE_SIZE, spec.kv_heads, spec.head_dim)
    base = PagedKV(
        *(jnp.asarray(stored(x.astype(np.float32), spec).reshape(shape)) for x in (base_k, base_v))
    )
    return DenseRound(base, lanes, caches, changes)


def compare(round, threshold):
    return encode_dense(round.lanes, round.caches, round.base, threshold=threshold)


RECIPES = st.lists(
    st.lists(
        st.tuples(st.integers(0, PAGES - 1), SPANS, st.sampled_from(["", "", "k", "v"])),
        min_size=1,
        max_size=6,
    ),
    min_size=1,
    max_size=3,
)


@given(RECIPES, st.sampled_from(["float32", "uint16"]), st.sampled_from([0, 7, 100_000]))
@settings(max_examples=15)
def test_only_changed_pages_are_patches(recipes, storage, offset):
    round = dense_round(recipes, storage, offset)
    mirrors = compare(round, THRESHOLD[storage])
    shown = set()
    for index, (lane, changed) in enumerate(zip(round.lanes, round.changed, strict=True)):
        mirror = mirrors.mirrors[index]
        assert (mirror.table.patch_index >= 0).tolist() == changed
        assert (mirror.table.base == -1).tolist() == (lane.base == 0).tolist()
        assert mirror.patch.k.shape[1] == sum(changed)
        assert mirror.private.k.shape[1] == (lane.base == 0).sum()
        shown |= {page for page, patch in zip(lane.base, changed, strict=True) if not patch} - {0}

        # Patched and private tokens have the agent's bits; others are within the threshold.
        own = np.repeat(np.array(changed) | (lane.base == 0), lane.slots)
        for rotate in (True, False):
            decoded = decode_dense(mirrors, index, rotate=rotate)
            for x, expected in zip(decoded, round.caches[index], strict=True):
                assert x.dtype == expected.dtype
                assert x[:, own].tobytes() == expected[:, own].tobytes()
                if rotate:
                    gap = np.abs(values(x) - values(expected))
                    assert gap.max(initial=0) <= THRESHOLD[storage]
    assert mirrors.base.k.shape[1] == len(shown)
    assert np.isfinite(values(mirrors.base.k)).all()


@pytest.mark.parametrize("storage", ["float32", "uint16"])
def test_without_alignment_every_shown_page_is_a_patch(storage):
    recipe = [(0, (0, 3), "")] + [(page, (0, PAGE_SIZE), "") for page in range(1, PAGES)]
    round = dense_round([recipe], storage, offset=2)
    aligned = compare(round, THRESHOLD[storage])
    assert (aligned.mirrors[0].table.patch_index < 0).all()
    lane = dataclasses.replace(round.lanes[0], frame=np.zeros_like(round.lanes[0].frame))
    unaligned = compare(dataclasses.replace(round, lanes=[lane]), THRESHOLD[storage])
    assert (unaligned.mirrors[0].table.patch_index >= 0).tolist() == [False] + [True] * 5


def test_what_is_the_same_to_the_bit_passes_a_threshold_of_0():
    # Pages at their canonical positions are not rotated, so nothing is rounded.
    round = dense_round([[(page, (0, PAGE_SIZE), "") for page in (1, 2)]], "float32", -PAGE_SIZE)
    assert round.lanes[0].frame.tolist() == [0, 0]
    mirrors = compare(round, 0.0)
    assert (mirrors.mirrors[0].table.patch_index == -1).all()
    assert mirrors.mirrors[0].patch.k.nbytes == 0


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_far_from_all_others_are_kept(number):
    round = dense_round([[(page, (0, PAGE_SIZE), "") for page in (1, 2)]], "float32", 3)
    round.caches[0][1][0, 5, 1, 2] = number
    mirrors = compare(round, 1e30)
    assert mirrors.mirrors[0].table.patch_index.tolist() == [-1, 0]
    decoded = decode_dense(mirrors, 0, rotate=True)
    assert decoded[1][:, 4:].tobytes() == round.caches[0][1][:, 4:].tobytes()


@given(samples(), st.sampled_from(["float32", "uint16"]))
@settings(max_examples=15)
def test_keys_turn_forward_by_their_frames(sample, storage):
    kv = pool(sample, SPECS[storage])
    mirrors = encode(sample.lanes, sample.lengths, kv)
    # Angles are exact to 1e-6 rad; bfloat16 has 8 bits.
    relative = 2**-8 if storage == "uint16" else 0
    for index in range(len(sample.lanes)):
        k, v = decode_dense(mirrors, index, rotate=True)
        held_k, held_v = gathered(sample, index, kv)
        assert v.tobytes() == held_v.tobytes()
        frame = [position - at for lane, position, _, at in sample.written() if lane == index]
        expected = rotated(values(held_k), np.array(frame, np.int64))
        np.testing.assert_allclose(values(k), expected, rtol=relative, atol=2e-5)
        unmoved = np.array(frame) == 0
        assert k[:, unmoved].tobytes() == held_k[:, unmoved].tobytes()


def test_bad_arguments_are_refused():
    round = dense_round([[(0, (0, 2), ""), (1, (1, 3), "")]], "float32", 0)
    (k, v), lane = round.caches[0], round.lanes[0]

    def refused(message, threshold=0.1, **changes):
        with pytest.raises(MirrorError) as error:
            compare(dataclasses.replace(round, **changes), threshold)
        assert str(error.value).startswith(message)

    refused("threshold: value: is -1", threshold=-1.0)
    refused("threshold: value: is nan", threshold=np.nan)
    refused("caches: number: 0 for 1 lanes", caches=[])
    refused(
        "caches[0]: k: is [1, 5, 2, 4] float32, for a base of [2, 5, 2,", caches=[(k[:1], v[:1])]
    )
    half = tuple(x.astype(np.float16) for x in (k, v))
    refused("caches[0]: k: is [2, 5, 2, 4] float16, for a base of", caches=[half])
    longer = tuple(np.concatenate([x, x], axis=1) for x in (k, v))
    refused("lengths: tokens: 10 tokens in a lane of 5 slots", caches=[longer])
    for page in (PAGES, -1):
        wrong = dataclasses.replace(lane, base=np.array([0, page], np.int32))
        refused("lanes: base: an entry of lane 0 shows a page outside the 6 base", lanes=[wrong])
    wrong = dataclasses.replace(lane, first=np.array([0, 2], np.int32))
    refused("lanes: slots: an entry of lane 0 is not inside a page of 4 slots", lanes=[wrong])

    mirrors = compare(round, 0.1)
    for index in (1, -1):
        with pytest.raises(MirrorError, match=f"index: value: {index} of 1 mirrors"):
            decode_dense(mirrors, index, rotate=False)

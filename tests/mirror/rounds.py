"""Random rounds of lanes over a poisoned pool, and their content slot by slot."""

import dataclasses
import functools
from collections import defaultdict

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from tokendance_jax import mirror
from tokendance_jax.identity import ModelIdentity
from tokendance_jax.kernels.rope import Rope
from tokendance_jax.paged.kv import KVSpec, PagedKV
from tokendance_jax.plan.lane import LanePlan

PAGE_SIZE = 4
# All rounds have one shape, so that programs are compiled once.
SPECS = {
    name: KVSpec(
        layers=2, pages=64, page_size=PAGE_SIZE, kv_heads=2, head_dim=4, storage=np.dtype(name)
    )
    for name in ("float32", "uint16")
}
ROPE = Rope(10_000.0)
IDENTITY = ModelIdentity(
    weights="0" * 64,
    dtype="float32",
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    rope=ROPE,
    norm_eps=1e-6,
)
# All of one model, unless a test passes another identity.
encode = functools.partial(mirror.encode, identity=IDENTITY)
encode_dense = functools.partial(mirror.encode_dense, identity=IDENTITY)
decode_pages = functools.partial(mirror.decode_pages, identity=IDENTITY)
FRAMES = st.sampled_from([0, 3, -3, 50, -100_000])


@dataclasses.dataclass(frozen=True)
class Sample:
    """A round: its lanes and how many tokens of each are written."""

    lanes: list[LanePlan]
    lengths: list[int]

    def written(self):
        """Yields (lane, logical position, slot, canonical position) of every written token."""
        for index, (lane, length) in enumerate(zip(self.lanes, self.lengths, strict=True)):
            position = np.arange(length, dtype=np.int32)
            slot, canonical = lane.locate(position, PAGE_SIZE)
            yield from (
                (index, *where)
                for where in zip(position.tolist(), slot.tolist(), canonical.tolist(), strict=True)
            )

    def entries(self):
        """Yields (lane, page, frame, first, slots, base) of every entry with written tokens."""
        for index, (lane, length) in enumerate(zip(self.lanes, self.lengths, strict=True)):
            columns = (lane.page, lane.frame, lane.first, lane.slots, lane.base)
            for page, frame, first, slots, base in zip(*(c.tolist() for c in columns), strict=True):
                if length > 0:
                    yield index, page, frame, first, min(slots, length), base
                length -= slots


def lane_plan(entries, tokens=0):
    """A lane with entries (page, frame, first, slots, base) and `tokens` prompt tokens."""
    page, frame, first, slots, base = np.array(entries, np.int32).reshape(-1, 5).T
    return LanePlan(
        token_ids=np.arange(tokens, dtype=np.int32),
        computed=np.arange(tokens, dtype=np.int32),
        page=page,
        frame=frame,
        first=first,
        slots=slots,
        base=base,
    )


SPANS = st.integers(0, PAGE_SIZE - 1).flatmap(
    lambda first: st.tuples(st.just(first), st.integers(1, PAGE_SIZE - first))
)
# Lanes share a few pages: base pages, patches that several lanes hold, and exact prefixes. A page
# of a lane's own is read in one entry, or in several if its kind ends in "again".
OWN = ["private", "private again", "patch", "patch", "patch again"]
KINDS = st.sampled_from([*OWN, "base", "base", "shared patch", "prefix"])
ENTRIES = st.tuples(KINDS, st.integers(0, 3), FRAMES, SPANS)


@st.composite
def samples(draw):
    """Draws lanes over shared pages, with slots that no lane uses."""
    ids = iter(draw(st.permutations(range(1, 64))))
    shared = {kind: [next(ids) for _ in range(4)] for kind in ("base", "shared patch", "prefix")}
    lanes = []
    for recipe in draw(st.lists(st.lists(ENTRIES, max_size=8), min_size=1, max_size=4)):
        entries, own = [], defaultdict(lambda: next(ids))
        for kind, number, frame, (first, slots) in recipe:
            base = 0 if kind in ("private", "prefix", "private again") else shared["base"][number]
            if kind in shared:
                page = shared[kind][number]
            else:
                page = own[kind, number % 2] if kind.endswith("again") else next(ids)
            entries.append((page, 0 if kind == "prefix" else frame, first, slots, base))
        lanes.append(lane_plan(entries, draw(st.integers(0, 5))))
    lengths = [draw(st.integers(0, int(lane.slots.sum()))) for lane in lanes]
    if not any(lengths):
        lanes.append(lane_plan([(next(ids), 0, 0, PAGE_SIZE, 0)], PAGE_SIZE))
        lengths.append(draw(st.integers(1, PAGE_SIZE)))
    return Sample(lanes, lengths)


def aligned(sample):
    """The same round, with frames that give every slot one canonical position."""
    lanes = []
    for lane in sample.lanes:
        start = np.cumsum(lane.slots) - lane.slots
        # Pages begin near and far, in an order that does not depend on the tables.
        begins = lane.page * 7919 % 5 * np.where(lane.page % 3, 20, 25_000)
        frame = (start - lane.first - begins).astype(np.int32)
        lanes.append(dataclasses.replace(lane, frame=frame))
    return Sample(lanes, sample.lengths)


def pool(sample, spec, *, poison=np.nan, seed=0):
    """A pool with random numbers where tokens are written, and poison everywhere else."""
    generator = np.random.default_rng(seed)
    shape = (spec.layers, spec.pages * PAGE_SIZE, spec.kv_heads, spec.head_dim)
    written = np.zeros(shape[1], bool)
    written[[slot for _, _, slot, _ in sample.written()]] = True
    arrays = []
    for _ in "kv":
        numbers = generator.normal(size=shape).astype(np.float32)
        numbers[..., 0, 0] = -0.0
        numbers[:, ~written] = poison
        arrays.append(jnp.asarray(stored(numbers, spec).reshape(spec.abstract().k.shape)))
    return PagedKV(*arrays)


def stored(numbers, spec):
    """Converts numbers to the storage dtype, on the host."""
    if spec.storage == np.uint16:
        return numbers.astype(ml_dtypes.bfloat16).view(np.uint16)
    return numbers.astype(spec.storage)


def values(x):
    """Converts an array of the storage dtype to float32 numbers."""
    x = np.asarray(x)
    return x.view(ml_dtypes.bfloat16).astype(np.float32) if x.dtype == np.uint16 else x


def rotated(k, position):
    """Rotates keys forward in float64. `position` is [tokens], k is [layers, tokens, heads, H]."""
    first, second = np.split(np.asarray(k, np.float64), 2, axis=-1)
    frequency = ROPE.theta ** (-2 * np.arange(first.shape[-1]) / k.shape[-1])
    turn = np.exp(1j * np.asarray(position)[None, :, None, None] * frequency)
    turned = (first + 1j * second) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def gathered(sample, index, kv):
    """K and V of one lane in logical order, slot by slot from the pool."""
    slots = [slot for lane, _, slot, _ in sample.written() if lane == index]
    layers, _, _, *head = kv.k.shape
    return tuple(np.asarray(x).reshape(layers, -1, *head)[:, slots] for x in (kv.k, kv.v))


def assert_same_bits(actual, expected):
    """Asserts that two trees of arrays are equal in structure, dtypes, shapes and every bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()

"""Attention cases for the kernel tests: lanes of a round, and pools that hold them."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tokendance_jax.kernels import storage
from tokendance_jax.kernels.flash import MASKED
from tokendance_jax.kernels.lanes import LaneTables, RowTiles, SharedRows, block_pages
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import Rope, rotate
from tokendance_jax.kernels.round_attention.reference import round_attention_reference
from tokendance_jax.plan import shared_rows
from tokendance_jax.plan.buckets import Buckets
from tokendance_jax.plan.groups import group_tables
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.plan.round_plan import lane_tables, row_tiles
from tokendance_jax.plan.shapes import PACKING, Shapes

ROPE = Rope(1e6)
LAYERS, LAYER = 2, 1
LANES, ROWS = 8, 384
BF16_NAN = 0x7FC0


@dataclasses.dataclass(frozen=True)
class Heads:
    """Head shape of a model."""

    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        """Returns the name that tests show."""
        return f"{self.heads}/{self.kv_heads}/{self.head_dim}"


HEADS = (Heads(14, 2, 64), Heads(4, 4, 32), Heads(8, 2, 128))
# Both precisions, each with another head shape and page size. The sweep adds further combinations.
COMBINATIONS = [
    (HEADS[0], 8, "uint16"),
    (HEADS[1], 16, "float32"),
    *(
        pytest.param(heads, page_size, dtype, marks=pytest.mark.sweep)
        for heads, page_size, dtype in (
            (HEADS[2], 32, "uint16"),
            (HEADS[0], 16, "float32"),
            (HEADS[1], 32, "uint16"),
            (HEADS[2], 8, "float32"),
        )
    ),
]


def swept(names: str | tuple[str, ...], values: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test by cases. All but the first run in the sweep only."""
    first, *rest = values
    rest = [pytest.param(*case, marks=pytest.mark.sweep) for case in rest]
    return pytest.mark.parametrize(names, [pytest.param(*first), *rest], ids=str)


# Kernels and their platforms.
PLATFORMS = (("mosaic_gpu", "cuda"), ("mosaic_tpu", "tpu"))

# (page, frame, first, slots)
Entry = tuple[int, int, int, int]


def lane(entries: list[Entry], computed: int, *, ahead: int = 0) -> LanePlan:
    """A lane that computes its last `computed` tokens, with `ahead` unwritten slots behind them."""
    page, frame, first, slots = np.array(entries, np.int32).T
    tokens = int(slots.sum()) - ahead
    return LanePlan(
        token_ids=np.zeros(tokens, np.int32),
        computed=np.arange(tokens - computed, tokens, dtype=np.int32),
        page=page,
        frame=frame,
        first=first,
        slots=slots,
        base=np.zeros_like(page),
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """A round of lanes in bucket shapes. Rows are in the order of the lanes.

    Attributes:
      lanes: the lanes in use.
      pages: pages of the pool.
      page_size: token slots in a page.
      tables: block tables of `LANES` lanes.
      lane: lane of each of `ROWS` rows; `LANES` for padding.
      position: logical position of each row; 0 for padding.
      tiles: the rows grouped by lane.
    """

    lanes: list[LanePlan]
    pages: int
    page_size: int
    tables: LaneTables
    lane: np.ndarray
    position: np.ndarray
    tiles: RowTiles

    @classmethod
    def of(cls, lanes: list[LanePlan], *, pages: int, page_size: int) -> "Case":
        """Stacks lanes. All cases with the same page size have the same shapes."""
        block = block_pages(page_size)
        shapes = Shapes(
            rows=Buckets(ROWS, ROWS),
            lanes=Buckets(LANES, LANES),
            entries=Buckets(7 * block, 7 * block),
            pages=pages,
            page_size=page_size,
        )
        used = np.repeat(np.arange(len(lanes), dtype=np.int32), [len(p.computed) for p in lanes])
        row_lane, position = np.full(ROWS, LANES, np.int32), np.zeros(ROWS, np.int32)
        row_lane[: len(used)] = used
        position[: len(used)] = np.concatenate([p.computed for p in lanes])
        return cls(
            lanes=lanes,
            pages=pages,
            page_size=page_size,
            tables=lane_tables(lanes, shapes),
            lane=row_lane,
            position=position,
            tiles=row_tiles(used, rows=ROWS, lanes=LANES),
        )

    @property
    def used(self) -> np.ndarray:
        """bool [rows]: rows that are not padding."""
        return self.lane < LANES

    def last_positions(self) -> np.ndarray:
        """i32 [lanes]: position of each lane's last token; -1 for lanes not in use."""
        last = np.full(LANES, -1, np.int32)
        last[: len(self.lanes)] = [len(p.token_ids) - 1 for p in self.lanes]
        return last

    def read_slots(self) -> np.ndarray:
        """bool [pages, page_size]: slots that hold a token of some lane."""
        read = np.zeros((self.pages, self.page_size), np.bool_)
        for plan in self.lanes:
            slot, _ = plan.locate(np.arange(len(plan.token_ids), dtype=np.int32), self.page_size)
            read.reshape(-1)[slot] = True
        return read


def shape(*shape: int, dtype: str = "int32") -> Any:
    """An array without data, to compile for."""
    return jax.ShapeDtypeStruct(shape, dtype)


def sharing(page_size: int) -> Case:
    """A round with one lane of every kind, and two lanes of padding."""
    half = page_size // 2
    pages = iter(range(1, 1000))

    def fresh(tokens: int) -> list[Entry]:
        """Own pages in frame 0, the last one partial."""
        full, rest = divmod(tokens, page_size)
        entries = [(next(pages), 0, 0, page_size) for _ in range(full)]
        return [*entries, (next(pages), 0, 0, rest)] if rest else entries

    # More tokens than a key block (256) and two row tiles (128 each).
    base = fresh(300)
    base_page = [page for page, *_ in base]
    shared = base_page[: 256 // page_size]

    def mapped(some: list[int], frame: int) -> list[Entry]:
        return [(page, frame, 0, page_size) for page in some]

    lanes = [
        # Everything is computed, and there is room for an answer.
        lane([*base, *fresh(2 * page_size)], 300, ahead=2 * page_size),
        # One token.
        lane(fresh(1), 1),
        # Prefix reuse: reads the base's first key block in frame 0 and computes the tail.
        lane([*mapped(shared, 0), *fresh(21)], 21),
        # Private text of odd length, then base pages in positive, negative and large frames, one
        # frame per key block. Computes the task.
        lane(
            [
                *fresh(21),
                *mapped(shared[4:8], 21),
                *mapped(shared[1:3], -page_size),
                *mapped(shared[3:5], 100_000),
                *mapped(shared[5:6], -100_000),
                *fresh(9),
            ],
            9,
        ),
        # Partial pages: the first slots of one, the last slots of one, one slot in the middle of
        # one; and one page twice, in two frames.
        lane(
            [
                (shared[0], 0, 0, half),
                (shared[2], 7, half, page_size - half),
                (shared[3], 7, half, 1),
                (shared[1], 50, 0, page_size),
                (shared[1], -50, 1, page_size - 1),
                *fresh(5),
            ],
            5,
        ),
        # A computed tail that begins inside a page; the table continues behind it.
        lane([*mapped(shared[:3], 0), *fresh(40)], 15, ahead=20),
    ]
    return Case.of(lanes, pages=next(pages) + 2, page_size=page_size)


def tasks(page_size: int, *, tokens: int = 544) -> Case:
    """A round of lanes that compute private text, read a base, and compute a task behind it."""
    base, fresh = list(range(1, 1 + tokens // page_size)), iter(range(100, 199))
    lanes = []
    for agent in range(6):
        frame = [0, 5, -7, 100_000, -100_000, 5][agent]
        own = [(next(fresh), 0, 0, page_size)] * (agent % 3 > 0)
        shown = [(page, frame, 0, page_size) for page in base]
        shown[3 + agent] = (next(fresh), 0, 0, page_size)  # a patch, not computed
        # The last page shows other slots in every second lane; two lanes leave out two pages.
        shown[-1] = (base[-1], frame, agent % 2, page_size - 1)
        shown = shown[2 * (agent > 3) :]
        task = [(next(fresh), 0, 0, page_size), (next(fresh), 0, 0, 5)]
        plan = lane([*own, *shown, *task], 9 + agent % 2, ahead=agent % 3)
        private = np.arange(page_size * len(own), dtype=np.int32)
        lanes.append(dataclasses.replace(plan, computed=np.append(private, plan.computed)))
    # The base's own lane computes it.
    lanes.append(lane([(page, 0, 0, page_size) for page in base[: 64 // page_size]], 64))
    return Case.of(lanes, pages=200, page_size=page_size)


def share(case: Case, *, whatever: bool = False) -> SharedRows:
    """The packed rows of a case: as planned, or with `whatever`, packed whatever that costs."""

    def split(*arguments: Any, cost: float, **keywords: Any) -> Any:
        return group_tables(*arguments, cost=0.0 if whatever else cost, **keywords)

    entries = case.tables.page.shape[1]
    shapes = Shapes(
        rows=Buckets(ROWS, ROWS),
        lanes=Buckets(LANES, LANES),
        entries=Buckets(entries, entries),
        pages=case.pages,
        page_size=case.page_size,
        packing=PACKING["gpu"],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_rows, "group_tables", split)
        if whatever:
            patch.setattr(shared_rows, "PACKING_COST", -np.inf)
        sharing = shared_rows.share_rows(case.lanes, case.tables, shapes, PACKING["gpu"])
    used = case.used
    return sharing.of_rows(case.lane[used], case.position[used], rows=ROWS)


def turned(x: np.ndarray, frame: int | np.ndarray) -> np.ndarray:
    """Rotates keys forward by their frames, in float64."""
    first, second = np.split(x, 2, axis=-1)
    frequency = ROPE.theta ** (-2 * np.arange(first.shape[-1]) / x.shape[-1])
    moved = (first + 1j * second) * np.exp(1j * frame * frequency)
    return np.concatenate([moved.real, moved.imag], axis=-1)


def log_sum_exps(case: Case, q: np.ndarray, kv: PagedKV) -> np.ndarray:
    """The log-sum-exp of each query's scores over its lane, computed from rotated keys."""
    rows, heads, head_dim = q.shape
    found = np.full((rows, heads), MASKED, np.float32)
    pool = np.asarray(storage.load(jnp.asarray(kv.k[LAYER])), np.float32)
    pool = pool.reshape(-1, *kv.k.shape[3:])
    for index, plan in enumerate(case.lanes):
        position = np.arange(len(plan.token_ids), dtype=np.int32)
        slot, canonical = plan.locate(position, case.page_size)
        # In NumPy, because XLA would compile for every lane's length.
        keys = turned(pool[slot], (position - canonical)[:, None, None]).astype(np.float32)
        keys = np.repeat(keys, heads // kv.k.shape[3], axis=1)
        mine = np.flatnonzero(case.lane == index)
        scores = np.einsum("rnh,snh->rns", q[mine], keys) * head_dim**-0.5
        seen = position[None, None, :] <= case.position[mine][:, None, None]
        found[mine] = np.logaddexp.reduce(np.where(seen, scores, -np.inf), axis=2)
    return found


def random_case(seed: int, page_size: int) -> Case:
    """Lanes of random entries over few pages, with random overlaps, gaps and frames."""
    random = np.random.default_rng(seed)
    lanes = []
    for _ in range(random.integers(1, LANES)):
        entries: list[Entry] = []
        for _ in range(random.integers(1, 7)):
            frame = int(random.choice([0, 0, 5, -5, 100_000, -9_000_000]))
            for _ in range(random.integers(1, 5)):
                first = int(random.integers(0, page_size))
                slots = int(random.integers(1, page_size - first + 1))
                entries.append((int(random.integers(1, 30)), frame, first, slots))
        ahead = int(random.integers(0, entries[-1][3]))
        tokens = sum(slots for *_, slots in entries) - ahead
        computed = int(random.integers(1, min(tokens, ROWS // LANES) + 1))
        lanes.append(lane(entries, computed, ahead=ahead))
    return Case.of(lanes, pages=40, page_size=page_size)


def pool(case: Case, heads: Heads, dtype: str, seed: int = 0) -> PagedKV:
    """A pool of random numbers in a storage dtype: "float32", or "uint16" for bfloat16 bits."""
    shape = (LAYERS, case.pages, case.page_size, heads.kv_heads, heads.head_dim)
    drawn = np.random.default_rng(seed).standard_normal((2, *shape)).astype(np.float32)
    k, v = drawn.astype(ml_dtypes.bfloat16).view(np.uint16) if dtype == "uint16" else drawn
    return PagedKV(k, v)


def poisoned(case: Case, kv: PagedKV) -> PagedKV:
    """The pool with NaN in all slots without a token of a lane (so in page 0), and in layer 0."""
    clean = case.read_slots()
    assert not clean[0].any()

    def of_pool(pool: np.ndarray) -> np.ndarray:
        pool = pool.copy()
        pool[:, ~clean] = BF16_NAN if pool.dtype == np.uint16 else np.nan
        pool[1 - LAYER] = BF16_NAN if pool.dtype == np.uint16 else np.nan
        return pool

    return jax.tree.map(of_pool, kv)


def numbers_of(kv: PagedKV) -> PagedKV:
    """The pool as accelerators store it: as bfloat16 numbers instead of their bits."""
    return jax.tree.map(
        lambda x: jnp.asarray(x.view(ml_dtypes.bfloat16) if x.dtype == np.uint16 else x), kv
    )


def on_tensor_cores(dtype: str) -> str:
    """The key of `tolerance` for attention on tensor cores with a pool of this storage dtype."""
    return "planes" if dtype == "float32" else dtype


def queries(rows: int, heads: Heads, seed: int = 1) -> np.ndarray:
    """Random queries f32 [rows, heads, head_dim]."""
    shape = rows, heads.heads, heads.head_dim
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


_definition = jax.jit(
    functools.partial(round_attention_reference, rope=ROPE), static_argnames="layer"
)


def reference(
    case: Case,
    q: np.ndarray,
    kv: PagedKV,
    position: np.ndarray,
    lane: np.ndarray,
    *,
    chunk: int = 64,
) -> np.ndarray:
    """The reference's output for rows of the given lanes; zero for rows without a lane.

    Works in chunks because the reference gathers all keys of each row. All chunks have one shape,
    so that the reference compiles once.
    """
    out = np.zeros_like(q)
    used = np.flatnonzero(lane < LANES)
    for start in range(0, len(used), chunk):
        rows = used[start : start + chunk]
        filled = np.resize(rows, chunk)
        part = _definition(q[filled], kv, LAYER, position[filled], lane[filled], case.tables)
        out[rows] = part[: len(rows)]
    return out


def tolerance(dtype: str) -> float:
    """Largest error of an output, relative to the largest output.

    With a bfloat16 pool, queries and weights are rounded to bfloat16, by 2**-9 (2e-3) each. The
    errors partly average out over the slots: 2e-3 measured, and 4e-7 in float32. "planes" stands
    for a float32 pool on tensor cores, where products are exact to about 2**-16 (2e-5): 5e-6
    measured.
    """
    return {"uint16": 5e-3, "planes": 2e-5, "float32": 1e-5}[dtype]


def assert_close(out: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    """Compares attention outputs within `tolerance`."""
    assert np.isfinite(expected).all()
    atol = tolerance(dtype) * np.abs(expected).max()
    np.testing.assert_allclose(out, expected, rtol=0, atol=atol)


def rerotated(case: Case, kv: PagedKV, pages: int) -> tuple[Case, PagedKV]:
    """Puts a case into frame 0: lanes read copies of their pages with keys rotated by the frame.

    Returns:
      The case, and its pool of `pages` pages.
    """
    source, frame, lanes = [0], [0], []
    for plan in case.lanes:
        page = np.arange(len(source), len(source) + len(plan.page), dtype=np.int32)
        lanes.append(dataclasses.replace(plan, page=page, frame=np.zeros_like(plan.frame)))
        source += plan.page.tolist()
        frame += plan.frame.tolist()
    filler = [0] * (pages - len(source))
    source, frame = np.array(source + filler), jnp.array(frame + filler, jnp.int32)
    cos, sin = ROPE.rotation(frame, kv.k.shape[-1])
    keys = rotate(
        jnp.asarray(kv.k[:, source]), cos[None, :, None, None, :], sin[None, :, None, None, :]
    )
    moved = Case.of(lanes, pages=pages, page_size=case.page_size)
    return moved, PagedKV(keys, jnp.asarray(kv.v[:, source]))

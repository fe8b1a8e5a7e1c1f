"""The kernels to time: their work, other ways to do the same work, and the expected results.

To add a kernel, write a function that returns a `Subject` for some work, and name it in `SUBJECTS`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scripts.reports import kernel_rivals
from scripts.reports.kernel_rivals import Attend
from scripts.reports.kernel_work import PATCHES, Work
from tokendance_jax.kernels import storage
from tokendance_jax.kernels.attention_mass import attention_mass
from tokendance_jax.kernels.attention_mass.reference import attention_mass_reference
from tokendance_jax.kernels.decode_attention import decode_attention
from tokendance_jax.kernels.kv_write import kv_write
from tokendance_jax.kernels.page_diff import Deviation, DiffPlan, page_diff
from tokendance_jax.kernels.page_diff.reference import page_diff_reference
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.round_attention import round_attention
from tokendance_jax.kernels.round_attention.reference import round_attention_reference
from tokendance_jax.kernels.sparse_restore import RestorePlan, sparse_restore
from tokendance_jax.kernels.sparse_restore.reference import sparse_restore_reference

MOSAIC = ("xla", "mosaic_gpu", "mosaic_tpu")


@dataclasses.dataclass(frozen=True)
class Program:
    """One way to do a kernel's work.

    Attributes:
      check: returns what is compared with the reference.
      timed: does the work `Subject.calls` times.
    """

    check: Callable[[], Any]
    timed: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A kernel and its work.

    Attributes:
      what: the work of one call, in words.
      bytes: the minimum number of bytes that one call moves.
      operations: number of operations of one call.
      calls: number of calls in a timed program.
      implementations: the implementations that the kernel has.
      program: makes the program of a named implementation. If the implementation cannot do the
        work, `program` raises NotImplementedError, or the program's `check` does.
      rivals: other ways to do the work, by name: each makes a program, or is the reason why there
        is none on this machine.
      error: computes the error of a result of `check`: its largest difference from the reference,
        divided by the reference's largest number.
    """

    what: str
    bytes: int
    operations: int
    calls: int
    implementations: tuple[str, ...]
    program: Callable[[str], Program]
    rivals: Mapping[str, Callable[[], Program] | str]
    error: Callable[[Any], float]


class _InPlace:
    """Programs that write a pool in place. All write the same copy; the pool itself stays."""

    def __init__(self, kv: PagedKV):
        self._kv = kv
        self._copy: PagedKV | None = None

    def program(self, call: Callable[[PagedKV], PagedKV]) -> Program:
        """Makes the program of a call that takes the pool donated and returns it."""

        def again() -> PagedKV:
            assert self._copy is not None
            self._copy = call(self._copy)
            return self._copy

        def check() -> PagedKV:
            self._copy = None  # frees the old copy before the new one is made
            self._copy = jax.tree.map(jnp.copy, self._kv)
            return again()

        return Program(check, again)


def _error(found: jax.Array, expected: jax.Array) -> jax.Array:
    found, expected = (storage.load(x).astype(jnp.float32) for x in (found, expected))
    return jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected))


def sparse_restore_subject(work: Work, cases: Mapping[str, Mapping[str, Any]]) -> Subject:
    """Restores all layers of every agent's copy of the base, with patches, and rotates keys."""
    plan, rope, kv = work.restore(), work.config.rope, work.kv
    layers, _, *page_shape = kv.k.shape
    in_place = _InPlace(kv)

    def program(implementation: str) -> Program:
        def restore(kv: PagedKV, plan: RestorePlan) -> PagedKV:
            return sparse_restore(kv, None, plan, rope=rope, implementation=implementation)

        jitted = jax.jit(restore, donate_argnums=0)
        return in_place.program(lambda kv: jitted(kv, plan))

    @jax.jit
    def error_of_layer(kv: PagedKV, found: PagedKV, layer: jax.Array) -> jax.Array:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=layer, slice_size=1)
        expected = sparse_restore_reference(jax.tree.map(cut, kv), None, plan, rope=rope)
        return jnp.maximum(_error(cut(found.k), expected.k), _error(cut(found.v), expected.v))

    def error(found: PagedKV) -> float:
        return max(float(error_of_layer(kv, found, jnp.int32(at))) for at in range(layers))

    page = 2 * int(np.prod(page_shape)) * kv.k.dtype.itemsize
    return Subject(
        what=f"{work.agents} mirrors of {work.shared} tokens, {PATCHES} pages of each its own",
        bytes=layers * page * (len(plan.page) + len(plan.first)),
        operations=cases["sparse_restore"]["operations"],
        calls=1,
        implementations=MOSAIC,
        program=program,
        rivals={
            "three steps": lambda: in_place.program(kernel_rivals.three_steps(work)),
            "jax.experimental.pallas": "it has no op that restores pages",
        },
        error=error,
    )


def page_diff_subject(work: Work, cases: Mapping[str, Mapping[str, Any]]) -> Subject:
    """Compares all layers of the base with every agent's copy of it."""
    plan, rope, kv = work.comparisons(), work.config.rope, work.kv
    layers, _, *page_shape = kv.k.shape

    def program(implementation: str) -> Program:
        def compare(kv: PagedKV, plan: DiffPlan) -> Deviation:
            return page_diff(
                kv, None, plan, rope=rope, threshold=0.0, implementation=implementation
            )

        jitted = jax.jit(compare)
        call = functools.partial(jitted, kv, plan)
        return Program(call, call)

    def error(found: Deviation) -> float:
        worst = 0.0
        for layer in range(layers):
            of_layer = PagedKV(kv.k[layer : layer + 1], kv.v[layer : layer + 1])
            expected = page_diff_reference(of_layer, None, plan, rope=rope)[:, 0]
            scores = found.k_largest, found.k_squares, found.v_largest, found.v_squares
            errors = [_error(score[layer], x) for score, x in zip(scores, expected, strict=True)]
            worst = max(worst, *map(float, errors))
        return worst

    page = 2 * int(np.prod(page_shape)) * kv.k.dtype.itemsize
    return Subject(
        what=f"{work.agents} siblings of {work.shared} tokens",
        bytes=layers * page * (len(plan.page) + len(plan.sibling)),
        operations=cases["page_diff"]["operations"],
        calls=1,
        implementations=MOSAIC,
        program=program,
        rivals={"jax.experimental.pallas": "it has no op that compares pages"},
        error=error,
    )


def _attention(
    work: Work,
    case: Mapping[str, Any],
    implementations: tuple[str, ...],
    attend: Callable[[str], Attend],
    rivals: Mapping[str, Callable[[], Attend] | str],
    *,
    rows: int,
    expected: Callable[[jax.Array, int], jax.Array],
) -> Subject:
    """Makes the subject of a kernel that takes queries and reads one layer.

    It is timed through all layers. The queries of a layer depend on the result of the layer before,
    so the layers run one after another, and none finds its pages in a cache.
    """
    layers = work.config.num_hidden_layers
    q, middle = work.queries(rows), layers // 2

    def program(attend: Attend) -> Program:
        once = jax.jit(attend.call, static_argnames="layer")

        @jax.jit
        def through_all_layers(q: jax.Array, *arguments: Any) -> jax.Array:
            x = q
            for layer in range(layers):
                out = attend.call(x, *arguments, layer=layer)
                # A result that is not shaped as queries only makes the layers run in order.
                x = q + (out if out.shape == q.shape else jnp.min(out) * np.float32(1e-30))
            return x

        return Program(
            check=lambda: once(q, *attend.arguments, layer=middle),
            timed=lambda: through_all_layers(q, *attend.arguments),
        )

    def of_rival(rival: Callable[[], Attend] | str) -> Callable[[], Program] | str:
        return rival if isinstance(rival, str) else lambda: program(rival())

    return Subject(
        what=case["what"],
        bytes=case["floor"],
        operations=case["operations"],
        calls=layers,
        implementations=implementations,
        program=lambda name: program(attend(name)),
        rivals={name: of_rival(rival) for name, rival in rivals.items()},
        error=lambda found: float(_error(found, expected(q, middle))),
    )


def decode_attention_subject(work: Work, cases: Mapping[str, Mapping[str, Any]]) -> Subject:
    """Attends with the next row of every agent."""
    groups, tables = work.decode

    def attend(implementation: str) -> Attend:
        def call(q: jax.Array, *arguments: Any, layer: int) -> jax.Array:
            kv, *rest = arguments
            keywords = {"rope": work.config.rope, "implementation": implementation}
            return decode_attention(q, kv, layer, *rest, **keywords)

        return Attend(call, (work.kv, work.last, tables, groups))

    lane = np.arange(work.agents, dtype=np.int32)
    return _attention(
        work,
        cases["decode_attention"],
        MOSAIC,
        attend,
        kernel_rivals.decode(work),
        rows=work.agents,
        expected=lambda q, layer: work.expected(
            round_attention_reference, q, layer, work.last, lane
        ),
    )


def round_attention_subject(work: Work, cases: Mapping[str, Mapping[str, Any]]) -> Subject:
    """Attends with the rows of a prefill."""
    plan = work.prefill

    def attend(implementation: str) -> Attend:
        def call(q: jax.Array, *arguments: Any, layer: int) -> jax.Array:
            kv, *rest, shared = arguments
            keywords = {"rope": work.config.rope, "implementation": implementation}
            return round_attention(q, kv, layer, *rest, shared=shared, **keywords)

        return Attend(call, (work.kv, plan.rows.position, plan.tables, plan.tiles, plan.shared))

    return _attention(
        work,
        cases["round_attention"],
        MOSAIC,
        attend,
        kernel_rivals.prefill(work),
        rows=len(plan.lane),
        expected=lambda q, layer: work.expected(
            round_attention_reference, q, layer, plan.rows.position, plan.lane
        ),
    )


def attention_mass_subject(work: Work, cases: Mapping[str, Mapping[str, Any]]) -> Subject:
    """Sums how much a prefill's rows attend to each entry; computes products with keys twice."""
    plan, case = work.prefill, cases["round_attention"]

    def call(q: jax.Array, *arguments: Any, layer: int) -> jax.Array:
        kv, *rest = arguments
        return attention_mass(q, kv, layer, *rest, rope=work.config.rope)

    def expected(q: jax.Array, layer: int) -> jax.Array:
        rows = work.expected(attention_mass_reference, q, layer, plan.rows.position, plan.lane)
        return jnp.zeros(plan.tables.page.shape, jnp.float32).at[plan.lane].add(rows)

    # The kernel reads no values and writes no results of the queries' size.
    queries = 4 * len(plan.lane) * work.config.num_attention_heads * work.config.head_dim
    floor = (case["floor"] - 2 * queries) // 2 + queries
    return _attention(
        work,
        {**case, "floor": floor},
        ("xla",),
        lambda _: Attend(call, (work.kv, plan.rows.position, plan.tables, plan.tiles)),
        {"jax.experimental.pallas": "it has no op that sums weights"},
        rows=len(plan.lane),
        expected=expected,
    )


def kv_write_subject(work: Work, cases: Mapping[str, Mapping[str, Any]]) -> Subject:
    """Writes the keys and values of a prefill's rows, in all layers."""
    del cases
    slot, kv = np.asarray(work.prefill.rows.slot), work.kv
    layers, _, page_size, *head_shape = kv.k.shape
    k, v = jax.random.normal(jax.random.key(2), (2, len(slot), *head_shape))

    def write(kv: PagedKV, slot: jax.Array, k: jax.Array, v: jax.Array) -> PagedKV:
        for layer in range(layers):
            kv = kv_write(kv, layer, slot, k, v)
        return kv

    jitted = jax.jit(write, donate_argnums=0)
    program = _InPlace(kv).program(lambda kv: jitted(kv, slot, k, v))

    def error(found: PagedKV) -> float:
        worst = 0.0
        for pool, written, value in ((kv.k, found.k, k), (kv.v, found.v, v)):
            stored = np.asarray(storage.store(value, pool.dtype))
            for layer in range(layers):
                expected = np.array(pool[layer])
                expected[slot // page_size, slot % page_size] = stored
                worst = max(worst, float(_error(written[layer], jnp.asarray(expected))))
        return worst

    numbers = 2 * len(slot) * int(np.prod(head_shape))
    return Subject(
        what=f"keys and values of {len(slot)} rows, one layer",
        bytes=numbers * (4 + kv.k.dtype.itemsize) + 4 * len(slot),
        operations=0,
        calls=layers,
        implementations=("xla",),
        program=lambda _: program,
        rivals={"jax.experimental.pallas": "it has no op that writes rows"},
        error=error,
    )


SUBJECTS: dict[str, Callable[[Work, Mapping[str, Mapping[str, Any]]], Subject]] = {
    "sparse_restore": sparse_restore_subject,
    "page_diff": page_diff_subject,
    "round_attention": round_attention_subject,
    "decode_attention": decode_attention_subject,
    "kv_write": kv_write_subject,
    "attention_mass": attention_mass_subject,
}

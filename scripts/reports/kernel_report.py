"""Reports what compilers say about the kernels, for accelerators that need not be present.

  python -m scripts.reports.kernel_report --model=7B --model=14B --agents=25

For each kernel, the report shows registers, spills, shared memory and blocks at a time from ptxas,
and temporaries from XLA. It counts the bytes that the kernel moves, against the minimum that any
kernel could move, and the operations. From these follows the time that bytes and operations take at
the target's published bandwidth and rate: a bound, not a measurement. Needs the `aot` extra.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

if __name__ == "__main__":
    # Otherwise the compilers look for devices, and complain that there are none.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich import box
from rich.console import Console
from rich.table import Table

from scripts.helpers import measure
from tokendance_jax import targets
from tokendance_jax.kernels.decode_attention import decode_attention
from tokendance_jax.kernels.decode_attention.mosaic_gpu import bytes_beside_pages
from tokendance_jax.kernels.gpu_pages import part_slots
from tokendance_jax.kernels.gpu_planes import planes_of
from tokendance_jax.kernels.gpu_tiles import SLOTS
from tokendance_jax.kernels.lanes import GroupTables, LaneTables, block_pages
from tokendance_jax.kernels.page_diff import DiffPlan, page_diff
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.round_attention import round_attention
from tokendance_jax.kernels.sparse_restore import RestorePlan, sparse_restore
from tokendance_jax.models.decoder.config import DecoderConfig
from tokendance_jax.models.families.qwen2 import preset
from tokendance_jax.plan.buckets import Buckets
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.plan.round_plan import pack
from tokendance_jax.plan.shapes import PACKING, Packing, Shapes

_MODEL = flags.DEFINE_multi_string(
    "model", ["0.5B", "7B", "14B"], "Published model sizes of the kernels, such as '7B'."
)
_DTYPE = flags.DEFINE_multi_enum(
    "dtype", ["bfloat16"], ["float32", "bfloat16"], "Precisions of the KV pool."
)
_TARGET = flags.DEFINE_multi_enum(
    "target", ["h100"], list(targets.TARGETS), "Accelerators to compile for."
)
_AGENTS = flags.DEFINE_integer("agents", 25, "Number of agents in the round.", lower_bound=1)
_SHARED = flags.DEFINE_integer(
    "shared",
    2048,
    "Number of tokens that all agents share, rounded up to a multiple of 256.",
    lower_bound=256,
)
_OWN = flags.DEFINE_integer(
    "own",
    256,
    "Number of tokens of each agent's own text, rounded up to a multiple of 256.",
    lower_bound=256,
)
_ROWS = flags.DEFINE_multi_integer(
    "rows", [128, 20], "Numbers of rows that each agent computes in a prefill.", lower_bound=1
)
_PAGE_SIZE = flags.DEFINE_enum("page_size", "16", ["16", "32"], "Token slots in a KV page.")
_JSON = flags.DEFINE_string("json", None, "JSON file to write the results to.")


def main(argv: Sequence[str]) -> int:
    """Compiles and prints; returns the exit status: 0, or 1 after an error."""
    return measure.run(argv, _measure, json=_JSON.value, width=132)  # as wide as the Markdown


def _measure(console: Console) -> Iterator[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in _TARGET.value:
        target = targets.TARGETS[name]
        packing = PACKING[target.platform]
        for size, dtype in itertools.product(_MODEL.value, _DTYPE.value):
            of_kernels = cases(preset(size), dtype, packing=packing)
            found = (report(case, target) for case in of_kernels)
            rows += [{"model": size, "dtype": dtype} | row for row in found]
        console.print(_table(name, [row for row in rows if row["target"] == name]))
        yield {"kernels": rows}


def cases(
    config: DecoderConfig, dtype: str = "bfloat16", *, packing: Packing | None = None
) -> list[dict[str, Any]]:
    """Describes the kernels on a round of the flags' sizes: how to call them, and their work.

    Args:
      config: sizes of the model.
      dtype: precision of the pool.
      packing: see `Shapes.packing`.

    Returns:
      For each kernel its name, `call(implementation)`, `arguments` and `donate`; `floor`: the bytes
      of queries, of results, and of every page, counted once for all agents whose tables name it;
      `extra`: the bytes that the GPU kernel moves in addition; and `operations`: for attention,
      those of tensor cores.
    """
    page_size, agents = int(_PAGE_SIZE.value), _AGENTS.value
    layers, kv_heads = config.num_hidden_layers, config.num_key_value_heads
    heads, head_dim, rope = config.num_attention_heads, config.head_dim, config.rope
    shared, own = (-(-tokens // 256) * 256 for tokens in (_SHARED.value, _OWN.value))
    itemsize, planes = jnp.dtype(dtype).itemsize, planes_of(jnp.dtype(dtype))
    # Bytes of the keys and values of a page in one layer.
    page = 2 * page_size * kv_heads * head_dim * itemsize
    shared_pages, own_pages = shared // page_size, own // page_size
    pages = 1 + shared_pages + agents * (shared_pages + own_pages)
    pool = _shape(layers, pages, page_size, kv_heads, head_dim, dtype=dtype)
    kv = PagedKV(pool, pool)

    pieces = agents * shared_pages
    piece = _shape(pieces)
    plan = RestorePlan(_shape(shared_pages), _shape(shared_pages + 1), piece, piece, piece, piece)
    restored = {
        "name": "sparse_restore",
        "what": f"{agents} mirrors of {shared} tokens, all layers",
        "call": lambda implementation: (
            lambda kv, plan: sparse_restore(
                kv, None, plan, rope=rope, implementation=implementation
            )
        ),
        "arguments": (kv, plan),
        "donate": (0,),
        "floor": layers * page * (shared_pages + pieces),
        "extra": 4 * (4 * pieces + 2 * shared_pages),
        # Two products and a sum for each number of a key, and as many operations for its angle.
        "operations": layers * pieces * page_size * kv_heads * head_dim * 8,
    }

    block = block_pages(page_size)
    entries = _shape(agents, own_pages)
    tables = LaneTables(entries, entries, entries, entries, entries)
    blocks = shared_pages // block
    entry = _shape(blocks, block)
    member = _shape(blocks, agents, block, dtype="bool")
    groups = GroupTables(entry, entry, entry, _shape(blocks, agents), member, _shape())
    q = _shape(agents, heads, head_dim, dtype="float32")
    queries = 4 * agents * heads * head_dim
    steps = {"shared": shared // SLOTS, "own": agents * own // SLOTS}
    numbers = agents, heads, kv_heads, head_dim, page_size
    beside = bytes_beside_pages(*numbers, **steps, itemsize=itemsize)
    decoded = {
        "name": "decode_attention",
        "what": f"{agents} lanes, {shared} shared and {own} own tokens, one layer",
        "call": lambda implementation: (
            lambda q, kv, position, tables, groups: decode_attention(
                q, kv, 0, position, tables, groups, rope=rope, implementation=implementation
            )
        ),
        "arguments": (q, kv, _shape(agents), tables, groups),
        "donate": (),
        "floor": page * (shared_pages + agents * own_pages) + 2 * queries,
        "extra": beside - 2 * queries,
        "operations": 4 * agents * heads * head_dim * (shared + own) * (2 * planes - 1),
    }

    plan = DiffPlan(_shape(shared_pages), _shape(shared_pages + 1), *[piece] * 4)
    parts = page_size // part_slots(page_size, itemsize * kv_heads * head_dim)
    compared = {
        "name": "page_diff",
        "what": f"{agents} siblings of {shared} tokens, all layers",
        "call": lambda implementation: (
            lambda kv, plan: page_diff(
                kv, None, plan, rope=rope, threshold=0.1, implementation=implementation
            )
        ),
        "arguments": (kv, plan),
        "donate": (),
        "floor": layers * page * (shared_pages + pieces) + layers * pieces * 16,
        # On a GPU, scores of parts of pages are written and read again.
        "extra": 2 * layers * pieces * parts * 16 + 4 * (4 * pieces + 2 * shared_pages),
        # A key is rotated as in a restore. Every number of K and V goes into a difference, a
        # maximum and a sum of squares.
        "operations": layers * pieces * page // (2 * itemsize) * (8 + 2 * 5),
    }
    prefills = [_prefill(config, kv, page, rows, packing) for rows in _ROWS.value]
    return [restored, decoded, *prefills, compared]


def _prefill(
    config: DecoderConfig, kv: PagedKV, page: int, each: int, packing: Packing | None
) -> dict[str, Any]:
    """Describes round attention of `each` rows per agent, after the text that all agents share."""
    page_size, agents = int(_PAGE_SIZE.value), _AGENTS.value
    heads, head_dim, rope = config.num_attention_heads, config.head_dim, config.rope
    shared, own = (-(-tokens // 256) * 256 for tokens in (_SHARED.value, _OWN.value))
    rows, context = agents * each, shared + own
    shapes = Shapes(
        rows=Buckets(rows, rows),
        lanes=Buckets(agents, agents),
        entries=Buckets(context // page_size, context // page_size),
        pages=kv.k.shape[1],
        page_size=page_size,
        packing=packing,
    )
    base = np.arange(1, 1 + shared // page_size, dtype=np.int32)
    lanes = [
        LanePlan.contiguous(
            np.zeros(context, np.int32),
            np.append(base, 1 + len(base) + np.arange(own // page_size) + agent * 4096),
            computed_from=context - each,
            page_size=page_size,
        )
        for agent in range(agents)
    ]
    (plan,) = pack(lanes, shapes)
    # Where packing does not pay, every tile has rows of a single lane.
    together = plan.shared if plan.shared and plan.shared.groups.count else None
    plans = jax.tree.map(lambda x: _shape(*x.shape, dtype=x.dtype.name), (plan.tables, plan.tiles))
    options = {} if together is None else {"shared": together}
    numbers, planes = rows * heads * head_dim, planes_of(kv.k.dtype)
    # On a GPU, packed rows write and read their results over shared pages in the pool's precision,
    # and their queries are read once more.
    part = kv.k.dtype.itemsize * numbers + 4 * rows * heads
    extra = 0 if together is None else 4 * numbers + 2 * part

    def call(implementation: str) -> Callable[..., Any]:
        def program(q: Any, kv: PagedKV, position: Any, plans: Any, options: Any) -> Any:
            options = {**options, "rope": rope, "implementation": implementation}
            return round_attention(q, kv, 0, position, *plans, **options)

        return program

    return {
        "name": f"round_attention{', packed' if together else ''}",
        "what": f"{agents} lanes of {each} rows at {context} tokens, one layer",
        "call": call,
        "arguments": (
            _shape(rows, heads, head_dim, dtype="float32"),
            kv,
            _shape(rows),
            plans,
            jax.tree.map(lambda x: _shape(*x.shape, dtype=x.dtype.name), options),
        ),
        "donate": (),
        "floor": page * (shared + agents * own) // page_size + 8 * numbers,
        "extra": extra,
        "operations": 4 * numbers * (context - each // 2) * (2 * planes - 1),
    }


def report(case: dict[str, Any], target: targets.Target) -> dict[str, Any]:
    """Compiles one kernel for a target.

    Returns:
      The figures of the table, in bytes, operations and seconds.
    """
    gpu = target.platform == "cuda"
    call = case["call"]("mosaic_gpu" if gpu else "mosaic_tpu")
    if gpu:
        compiled, kernels = targets.gpu_kernels(
            target, call, *case["arguments"], donate=case["donate"]
        )
    else:
        compiled = targets.compile_for(target, call, *case["arguments"], donate=case["donate"])
        kernels = []
    memory = compiled.memory_analysis()
    moved = case["floor"] + (case["extra"] if gpu else 0)
    return {
        "kernel": case["name"],
        "what": case["what"],
        "target": target.name,
        "registers": max((kernel.registers for kernel in kernels), default=None),
        "spill_bytes": sum(kernel.spill_bytes for kernel in kernels) if gpu else None,
        "shared_bytes": max((kernel.shared_bytes for kernel in kernels), default=None),
        "blocks_per_core": min((kernel.blocks_per_core for kernel in kernels), default=None),
        "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
        "bytes": moved,
        "floor_bytes": case["floor"],
        "operations": case["operations"],
        "bound_s": max(moved / target.bandwidth, case["operations"] / target.rate),
    }


def _shape(*shape: int, dtype: str = "int32") -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _table(target: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"Kernels on {target}", box=box.MARKDOWN, show_edge=True)
    for column in ("kernel", "model", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in (
        "registers",
        "spills",
        "shared KB",
        "blocks",
        "MB moved",
        "/ floor",
        "GFLOP",
        "bound us",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:

        def number(name: str, scale: float = 1.0, row: dict[str, Any] = row) -> str:
            return "-" if row[name] is None else f"{row[name] / scale:,.0f}"

        table.add_row(
            row["kernel"],
            row["model"],
            row["dtype"],
            number("registers"),
            number("spill_bytes"),
            number("shared_bytes", 1e3),
            number("blocks_per_core"),
            f"{row['bytes'] / 1e6:,.1f}",
            f"{row['bytes'] / row['floor_bytes']:.2f}",
            f"{row['operations'] / 1e9:,.1f}",
            f"{row['bound_s'] * 1e6:,.1f}",
        )
    return table


if __name__ == "__main__":
    app.run(main)

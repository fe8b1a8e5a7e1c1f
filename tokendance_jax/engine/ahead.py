"""Compiles whole programs of rounds for an accelerator that need not be present.

The compiler needs only shapes, so no weights are created. The result shows whether model, pool
and temporaries fit the device, and how much a program computes and moves.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tokendance_jax import targets
from tokendance_jax.demo import demo_tokenizer_json
from tokendance_jax.engine import programs
from tokendance_jax.engine.compiling import Programs
from tokendance_jax.engine.warm_up import blank_decode
from tokendance_jax.hlo import Program
from tokendance_jax.kernels.lanes import block_pages
from tokendance_jax.model import Model
from tokendance_jax.models.decoder.config import DecoderConfig
from tokendance_jax.models.decoder.model import abstract_parameters
from tokendance_jax.plan.round_plan import blank_plan
from tokendance_jax.plan.shapes import PACKING, Shapes
from tokendance_jax.prompt.tokenizer import Tokenizer

Name = Literal["prefill", "decode"]
NAMES: tuple[Name, ...] = ("prefill", "decode")
# Share of a device's memory that is used neither for weights nor for the pool. By default JAX
# allocates three quarters of a GPU's memory.
RESERVE = {"cuda": 0.25, "tpu": 0.06}
MAX_AGENTS = 128


@dataclasses.dataclass(frozen=True, slots=True)
class RoundSize:
    """The size of a round in tokens.

    Attributes:
      agents: number of agents.
      shared: tokens that all agents share.
      own: other tokens of each agent's prompt.
      answer: maximum number of tokens in an answer.
    """

    agents: int = 25
    shared: int = 2048
    own: int = 256
    answer: int = 256

    @property
    def tokens(self) -> int:
        """Tokens per agent, including its answer."""
        return self.shared + self.own + self.answer

    def pages(self, page_size: int) -> int:
        """Returns the number of pages that the round needs in a pool, page 0 included."""
        own = -(-self.own // page_size) + -(-self.answer // page_size)
        return 1 + -(-self.shared // page_size) + self.agents * own


@dataclasses.dataclass(frozen=True, slots=True)
class Compiled:
    """A compiled program: its memory and its work.

    For a decode program, `operations` and `moved` count one step. The fields that are read from
    the program's text (`operations`, `moved`, `copies`, `kernels`) are None if jaxlib cannot
    parse it: libtpu is newer, and for a v6e it uses instructions that jaxlib 0.10.2 rejects.

    Attributes:
      name: "prefill" or "decode".
      rows: rows of a call, padding included.
      weights: bytes of all arrays of the model, whether or not this program uses them.
      pool: bytes of the pool, as the device lays it out.
      round_pool: bytes of the pool's pages that the round needs.
      temporaries: bytes of temporary buffers, which are neither arguments nor results.
      code: bytes of the program's code, if the compiler reports them.
      memory: bytes in use while the program runs: weights, pool, other arguments, results that do
        not reuse an argument's buffer, temporaries and code.
      aliased: bytes of the argument buffers that results reuse, the pool's included.
      operations: operations of the matrix products in the program, plus the attention operations
        that the round needs.
      moved: bytes read and written. For attention, the least that a kernel could move.
      copies: names of instructions that create an array as large as the pool's keys.
      kernels: number of Mosaic kernels in the program.
    """

    name: str
    rows: int
    weights: int
    pool: int
    round_pool: int
    temporaries: int
    code: int
    memory: int
    aliased: int
    operations: int | None
    moved: int | None
    copies: tuple[str, ...] | None
    kernels: int | None


def abstract_model(config: DecoderConfig, target: targets.Target) -> Model:
    """Returns a bfloat16 model of shapes alone on a device of the target.

    Its tokenizer is the demo's.
    """
    graph, state = abstract_parameters(config, "bfloat16")
    state = targets.placed(target, state)
    tokenizer = Tokenizer(demo_tokenizer_json())
    return Model("shapes", config, jnp.dtype("bfloat16"), graph, state, tokenizer)


def compile_round(
    name: Name,
    config: DecoderConfig,
    target: targets.Target,
    size: RoundSize,
    *,
    kv_memory: int | None = None,
    page_size: int = 16,
    row_budget: int = 2048,
    steps: int = 8,
) -> Compiled:
    """Compiles one program of a round.

    Args:
      name: the program.
      config: the model's sizes.
      target: the device to compile for.
      size: the size of the round.
      kv_memory: bytes of the pool; None: what weights and `RESERVE` leave of the device's memory.
      page_size: token slots in a page.
      row_budget: maximum number of rows in a prefill call.
      steps: tokens that a decode call generates.

    Raises:
      TargetUnavailable: the target's compiler is not installed.
      ValueError: the pool is too small for the round.
      jax.errors.JaxRuntimeError: the program does not fit the device.
    """
    implementation = "mosaic_gpu" if target.platform == "cuda" else "mosaic_tpu"
    model = abstract_model(config, target)
    weights = _bytes(model.state)
    spec = model.kv_spec(pages=1, page_size=page_size, implementation=implementation)
    room = spec.page_room(target.platform)
    if kv_memory is None:
        kv_memory = int(target.memory * (1 - RESERVE[target.platform])) - weights
    pages, needed = kv_memory // room, size.pages(page_size)
    if pages < needed:
        raise ValueError(
            f"{target.name}: a pool of {kv_memory} bytes holds {max(0, pages)} pages; the round of "
            f"{size.agents} agents needs {needed}"
        )
    spec = dataclasses.replace(spec, pages=pages)
    shapes = Shapes.of(
        row_budget=row_budget,
        max_lanes=MAX_AGENTS,
        max_tokens=config.max_position_embeddings,
        pages=pages,
        page_size=page_size,
        packing=PACKING[target.platform],  # as in the engine
    )
    device = targets.device(target)
    compiler = Programs(model, shapes, implementation=implementation, device=device)
    program = programs.prefill if name == "prefill" else programs.decode
    kv = spec.abstract()
    arguments = _arguments(name, config, size, shapes, steps)
    compiled = compiler.compile(program, kv, *arguments)

    memory, pool = compiled.memory_analysis(), pages * room
    assert memory is not None
    try:
        text = Program(compiled)
    except ValueError:
        text = None
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    beside = _bytes(arguments) + results + memory.temp_size_in_bytes
    operations, moved = _attention(name, config, size, row_budget)
    return Compiled(
        name=name,
        rows=row_budget if name == "prefill" else shapes.lanes.fit(size.agents),
        weights=weights,
        pool=pool,
        round_pool=needed * room,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        memory=weights + pool + beside + memory.generated_code_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        operations=text and text.products() + operations,
        moved=text and text.bytes_moved() + moved,
        copies=text and tuple(made.name for made in text.made(kv.k.shape)),
        kernels=text and len(text.kernels()),
    )


def _arguments(
    name: Name, config: DecoderConfig, size: RoundSize, shapes: Shapes, steps: int
) -> tuple[Any, ...]:
    """Returns the program's arguments after the pool, in the bucket shapes of the round."""
    block = block_pages(shapes.page_size)
    # A base has its own frame, so a new key block begins where its entries begin.
    entries = shapes.entries.fit(-(-size.tokens // shapes.page_size) + block)
    lanes = shapes.lanes.fit(size.agents)
    if name == "decode":
        return blank_decode(lanes=lanes, entries=entries, steps=steps, shapes=shapes)
    plan = blank_plan(
        rows=shapes.rows.budget,
        lanes=shapes.lanes.fit(size.agents + 1),  # one more for the base
        seats=lanes,
        entries=entries,
        shapes=shapes,
    )
    return jax.ShapeDtypeStruct((lanes, config.hidden_size), np.float32), plan


def _attention(
    name: Name, config: DecoderConfig, size: RoundSize, row_budget: int
) -> tuple[int, int]:
    """Returns operations and bytes of attention in all layers.

    A page counts once, however many lanes read it. For decode these are the numbers of the last
    step, for prefill those of a full call of the agents' own rows.
    """
    width = config.num_attention_heads * config.head_dim
    slot = 2 * config.num_key_value_heads * config.head_dim * 2  # keys and values, bfloat16
    if name == "decode":
        rows, behind, lanes, own = size.agents, size.tokens, size.agents, size.own + size.answer
    else:
        rows, behind = row_budget, size.shared + size.own // 2
        lanes, own = min(size.agents, -(-row_budget // size.own)), size.own
    operations = 4 * rows * width * behind
    moved = slot * (size.shared + lanes * own) + 2 * 4 * rows * width
    return config.num_hidden_layers * operations, config.num_hidden_layers * moved


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))

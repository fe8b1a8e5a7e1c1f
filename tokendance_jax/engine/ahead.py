"""Whole programs of rounds, compiled for an accelerator that need not be present.

Shapes are all that a compiler needs: no weight is made. What comes back says whether model, pool
and temporaries fit the device, and what a program computes and moves.
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
from tokendance_jax.models.qwen2.config import Qwen2Config
from tokendance_jax.models.qwen2.model import abstract_parameters
from tokendance_jax.plan.round_plan import blank_plan
from tokendance_jax.plan.shapes import PACKING, Shapes
from tokendance_jax.prompt.tokenizer import Tokenizer

Name = Literal["prefill", "decode"]
NAMES: tuple[Name, ...] = ("prefill", "decode")
# Share of a device's memory that is neither weights nor pool. Of a GPU's, JAX takes three quarters
# unless told otherwise.
RESERVE = {"cuda": 0.25, "tpu": 0.06}
MAX_AGENTS = 128


@dataclasses.dataclass(frozen=True, slots=True)
class RoundSize:
    """The tokens of a round.

    Attributes:
      agents: agents.
      shared: tokens that all agents share.
      own: tokens of each agent's prompt beside.
      answer: most tokens of an answer.
    """

    agents: int = 25
    shared: int = 2048
    own: int = 256
    answer: int = 256

    @property
    def tokens(self) -> int:
        """Tokens of an agent, its answer included."""
        return self.shared + self.own + self.answer

    def pages(self, page_size: int) -> int:
        """Pages that the round takes from a pool, page 0 included."""
        own = -(-self.own // page_size) + -(-self.answer // page_size)
        return 1 + -(-self.shared // page_size) + self.agents * own


@dataclasses.dataclass(frozen=True, slots=True)
class Compiled:
    """A program as its compiler left it. Of a decode program, operations and bytes are of one step.

    What is read from the program's text is None where jaxlib does not know all instructions in it:
    libtpu is newer, and uses some on a v6e that jaxlib 0.10.2 refuses.

    Attributes:
      name: "prefill" or "decode".
      rows: rows of a call, padding included.
      weights: bytes of the model's arrays, used by this program or not.
      pool: bytes of the pool, as the device lays it out.
      round_pool: bytes of it that the round takes.
      temporaries: bytes beside arguments and results.
      code: bytes of the program, where the compiler tells.
      memory: bytes in use while it runs: weights, pool, other arguments, results that are not
        written into arguments, temporaries and code.
      aliased: bytes of arguments that results are written into; the pool is among them.
      operations: of matrix products; of attention, what the round needs.
      moved: bytes read and written; by attention, the least that a kernel could.
      copies: instructions that make an array as large as the pool's keys.
      kernels: Mosaic kernels in it.
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


def abstract_model(config: Qwen2Config, target: targets.Target) -> Model:
    """A bfloat16 model of shapes alone, on a device of the target; its tokenizer is the demo's."""
    graph, state = abstract_parameters(config, "bfloat16")
    state = targets.placed(target, state)
    tokenizer = Tokenizer(demo_tokenizer_json())
    return Model("shapes", config, jnp.dtype("bfloat16"), graph, state, tokenizer)


def compile_round(
    name: Name,
    config: Qwen2Config,
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
      name: which one.
      config: the model's sizes.
      target: what for.
      size: the round.
      kv_memory: bytes of the pool; None: what weights and `RESERVE` leave of the device.
      page_size: token slots in a page.
      row_budget: rows of a prefill call.
      steps: tokens that a decode call generates.

    Raises:
      TargetUnavailable: the target's compiler is not installed.
      ValueError: the pool does not hold the round.
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
    name: Name, config: Qwen2Config, size: RoundSize, shapes: Shapes, steps: int
) -> tuple[Any, ...]:
    """What the program takes behind the pool, in the buckets of the round."""
    block = block_pages(shapes.page_size)
    # A base has a frame of its own: another key block begins there.
    entries = shapes.entries.fit(-(-size.tokens // shapes.page_size) + block)
    lanes = shapes.lanes.fit(size.agents)
    if name == "decode":
        return blank_decode(lanes=lanes, entries=entries, steps=steps, shapes=shapes)
    plan = blank_plan(
        rows=shapes.rows.budget,
        lanes=shapes.lanes.fit(size.agents + 1),  # and that of the base
        seats=lanes,
        entries=entries,
        shapes=shapes,
    )
    return jax.ShapeDtypeStruct((lanes, config.hidden_size), np.float32), plan


def _attention(
    name: Name, config: Qwen2Config, size: RoundSize, row_budget: int
) -> tuple[int, int]:
    """Operations and bytes of attention in all layers: each page once for all who show it.

    In decoding, of the last step; in prefill, of a full call of the agents' own rows.
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

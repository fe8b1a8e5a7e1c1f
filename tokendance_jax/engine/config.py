"""The settings of an engine."""

import dataclasses

from jax.typing import DTypeLike

from tokendance_jax.engine.limits import check_kv_memory, check_page_size, pool_pages
from tokendance_jax.kernels import dispatch
from tokendance_jax.model import Model
from tokendance_jax.paged.kv import KVSpec
from tokendance_jax.plan.shapes import PACKING, Shapes
from tokendance_jax.policy.policies import POLICIES, PolicyOptions
from tokendance_jax.prompt.preamble import DEFAULT_PREAMBLE


@dataclasses.dataclass(frozen=True, slots=True)
class EngineConfig:
    """The settings of an engine, checked on construction.

    Attributes:
      policy: the policy, which decides what KV is reused and how: one of `POLICIES`.
      options: options of the policies.
      preamble: neutral text in front of shared text that is computed once for all agents; used if
        the agents' prompts have no common beginning.
      salt: secret of a tenant; cached pages are found only under the same salt.
      page_size: token slots in a page: a power of two, at most 256.
      kv_memory: bytes of the page pool. "auto": a share of the memory that is free on the default
        device when the engine is created, on a CPU at most 1 GiB, and never more than `max_agents`
        lanes of the model's whole context and their bases can use. Programs are compiled for a
        number of pages, so give a number to engines that share programs.
      memory_fraction: the share of the free memory if `kv_memory` is "auto": above 0, at most 1.
        The rest is for the temporary arrays of programs.
      kv_dtype: precision of the pool; None: the model's.
      row_budget: maximum number of rows in one prefill call; longer rounds take several calls.
      max_agents: maximum number of sequences that decode together, and so of agents in a round.
      decode_steps: tokens per agent that a decode call generates before the host reads them.
      prefill_calls: most prefill calls between two decode calls while answers are generated; 0:
        prefill comes first.
      max_waiting: most sequences that wait for pages.
      answer_room: tokens of an answer whose pages a sequence takes at a time.
      cold: whether timings include compilation.
      implementation: which kernels run: "xla", "mosaic_gpu", "mosaic_tpu", or "interpret" (the
        GPU kernels in a simulator); None: those of the platform.
    """

    policy: str = "tokendance"
    options: PolicyOptions = dataclasses.field(default_factory=PolicyOptions)
    preamble: str = DEFAULT_PREAMBLE
    salt: bytes = b""
    page_size: int = 16
    kv_memory: int | str = "auto"
    memory_fraction: float = 0.9
    kv_dtype: DTypeLike | None = None
    row_budget: int = 2048
    max_agents: int = 128
    decode_steps: int = 8
    prefill_calls: int = 1
    max_waiting: int = 1024
    answer_room: int = 64
    cold: bool = False
    implementation: str | None = None

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
          ValueError: a setting is out of its range.
        """
        least = {"row_budget": 1, "max_agents": 1, "decode_steps": 1, "prefill_calls": 0}
        for name, number in {**least, "max_waiting": 1, "answer_room": 1}.items():
            if getattr(self, name) < number:
                raise ValueError(
                    f"{name}: {getattr(self, name)} is too small; give at least {number}"
                )
        check_page_size(self.page_size)
        check_kv_memory(self.kv_memory)
        if not 0 < self.memory_fraction <= 1:
            raise ValueError(
                f"memory_fraction: {self.memory_fraction} is out of range; give a number above 0 "
                "and at most 1"
            )
        if self.policy not in POLICIES:
            raise ValueError(
                f"policy: {self.policy!r} is unknown; choose one of {', '.join(POLICIES)}"
            )


def sizes(model: Model, config: EngineConfig) -> tuple[KVSpec, Shapes]:
    """Returns the spec of the pool, and the static shapes."""
    spec = model.kv_spec(
        pages=1,
        page_size=config.page_size,
        dtype=config.kv_dtype,
        implementation=config.implementation,
    )
    platform = dispatch.platform_of(config.implementation)
    context = model.config.max_position_embeddings
    lanes = config.max_agents + 1  # bases count as one more lane
    pages = pool_pages(
        config.kv_memory,
        spec.page_room(platform),
        memory_fraction=config.memory_fraction,
        most=1 + lanes * Shapes.most_entries(context, config.page_size),  # page 0 holds no token
    )
    shapes = Shapes.of(
        row_budget=config.row_budget,
        max_lanes=config.max_agents,
        max_tokens=context,
        pages=pages,
        page_size=config.page_size,
        packing=PACKING.get(platform),
    )
    return dataclasses.replace(spec, pages=pages), shapes

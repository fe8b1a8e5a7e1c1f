"""The settings of an engine."""

import dataclasses

from jax.typing import DTypeLike

from tokendance_jax.engine.limits import check_kv_memory, check_page_size
from tokendance_jax.policy.policies import POLICIES, PolicyOptions
from tokendance_jax.prompt.preamble import DEFAULT_PREAMBLE

DEFAULT_KV_MEMORY = 1 << 30


@dataclasses.dataclass(frozen=True, slots=True)
class EngineConfig:
    """The settings of a `RoundEngine`, checked on construction.

    Attributes:
      policy: the policy, which decides what KV is reused and how: one of `POLICIES`.
      options: options of the policies.
      preamble: neutral text in front of shared text that is computed once for all agents; used if
        the agents' prompts have no common beginning.
      salt: secret of a tenant; cached pages are found only under the same salt.
      page_size: token slots in a page: a power of two, at most 256.
      kv_memory: bytes of the page pool.
      kv_dtype: precision of the pool; None: the model's.
      row_budget: maximum number of rows in one prefill call; longer rounds take several calls.
      max_agents: maximum number of agents in a round.
      decode_steps: tokens per agent that a decode call generates before the host reads them.
      cold: whether timings include compilation.
      implementation: which kernels run: "xla", "mosaic_gpu", "mosaic_tpu", or "interpret" (the
        GPU kernels in a simulator); None: those of the platform.
    """

    policy: str = "tokendance"
    options: PolicyOptions = dataclasses.field(default_factory=PolicyOptions)
    preamble: str = DEFAULT_PREAMBLE
    salt: bytes = b""
    page_size: int = 16
    kv_memory: int = DEFAULT_KV_MEMORY
    kv_dtype: DTypeLike | None = None
    row_budget: int = 2048
    max_agents: int = 128
    decode_steps: int = 8
    cold: bool = False
    implementation: str | None = None

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
          ValueError: a setting is out of its range.
        """
        for name in ("row_budget", "max_agents", "decode_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is too small; give at least 1")
        check_page_size(self.page_size)
        check_kv_memory(self.kv_memory)
        if self.policy not in POLICIES:
            raise ValueError(
                f"policy: {self.policy!r} is unknown; choose one of {', '.join(POLICIES)}"
            )

"""The result of a served round: texts, timings, and a ledger of tokens and bytes."""

import dataclasses
from typing import Literal

from tokendance_jax.mirror import MasterMirror

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one round, without compilation unless `EngineConfig.cold` is set.

    Attributes:
      plan_s: tokenising, matching, planning.
      prefill_s: the prefill calls.
      first_token_s: from the start of the round until every agent has its first token.
      decode_s: from the first to the last token.
      mirror_s: laying the round out as mirrors and copying them out of the pool, if requested.
      compile_s: tracing and compiling programs for new shapes.
    """

    plan_s: float
    prefill_s: float
    first_token_s: float
    decode_s: float
    mirror_s: float
    compile_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class AgentLedger:
    """Where an agent's tokens and bytes went.

    Attributes:
      tokens: prompt tokens by kind: system, history, shared, task, markup.
      prompt_tokens: number of prompt tokens of all kinds.
      computed_tokens: prompt tokens that this agent computed in this round.
      reused_tokens: prompt tokens read from pages of other agents, of bases or of earlier rounds.
      decoded_tokens: tokens of the answer, including the one that ended it.
      kv_bytes_dense: bytes of the pages that the written KV of prompt and answer fills without
        sharing.
      kv_bytes_held: bytes of the pages that hold this KV, each page divided among the agents of
        the round that hold it.
      kv_bytes_mirror: bytes of the agent's mirror at rest: private pages, patches and tables, but
        not the base. Counted for the requested form of mirrors, otherwise for exact ones; None if
        neither mirrors nor their bytes are requested.
    """

    tokens: dict[str, int]
    prompt_tokens: int
    computed_tokens: int
    reused_tokens: int
    decoded_tokens: int
    kv_bytes_dense: int
    kv_bytes_held: float
    kv_bytes_mirror: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class AgentResult:
    """One agent's answer.

    Attributes:
      agent: name of the agent.
      text: the answer, without stop token or stop string.
      token_ids: the tokens of the answer, without the stop token and those that overlap a stop
        string.
      finish_reason: "stop" at a stop token or string, "length" at the limit.
      ledger: tokens and bytes of the agent.
    """

    agent: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    ledger: AgentLedger


@dataclasses.dataclass(frozen=True, slots=True)
class RoundLedger:
    """Sums over the round. Fields that are not listed are those of `AgentLedger`, summed up.

    Attributes:
      distinct_tokens: private and task tokens of every agent, and every distinct shared block
        once: the tokens that a round needs if it computes each block once and reuses nothing from
        earlier rounds.
      unique_tokens: `distinct_tokens` without exact prefix hits, plus the preamble of the bases:
        the tokens that this round needs.
      computed_tokens: tokens computed for agents and for bases.
      token_layers: computed tokens times the layers that each ran through, looks included,
        divided by the model's layers: the work as a number of tokens that run through all layers.
      attended: keys that computed tokens attended to, summed over the layers and divided by the
        model's layers: the work of attention, which `token_layers` does not include.
      kv_bytes_held: bytes of all pages that the round fills, each page counted once.
      kv_bytes_rest: bytes of the round at rest: the base once, and all mirrors; None if not
        requested.
    """

    tokens: dict[str, int]
    prompt_tokens: int
    distinct_tokens: int
    unique_tokens: int
    computed_tokens: int
    token_layers: float
    attended: float
    reused_tokens: int
    decoded_tokens: int
    kv_bytes_dense: int
    kv_bytes_held: int
    kv_bytes_rest: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class RoundResult:
    """A served round.

    Attributes:
      index: number of the round.
      agents: the answers, in the order of the prompts.
      timings: seconds, by phase.
      ledger: the sums over the round.
      mirrors: the round's KV at rest, if requested.
    """

    index: int
    agents: tuple[AgentResult, ...]
    timings: Timings
    ledger: RoundLedger
    mirrors: MasterMirror | None = None

    @property
    def texts(self) -> dict[str, str]:
        """The answer of each agent by name, in the order of the prompts."""
        return {result.agent: result.text for result in self.agents}

"""What a served round gives back: texts, timings, and a ledger of tokens and bytes."""

import dataclasses
from typing import Literal

from tokendance_jax.mirror import MasterMirror

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one round, compilation left out.

    Attributes:
      plan_s: tokenising, matching, planning.
      prefill_s: the prefill calls.
      first_token_s: from the start of the round to everybody's first token.
      decode_s: from the first to the last token.
      mirror_s: laying the round out as mirrors and copying them out of the pool, where asked for.
      compile_s: tracing and compiling programs for shapes that were new.
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
      prompt_tokens: their sum.
      computed_tokens: prompt tokens that this agent computed in this round.
      reused_tokens: prompt tokens that it read from pages of others or of earlier rounds.
      decoded_tokens: tokens of the answer, the one that ended it included.
      kv_bytes_dense: bytes of the pages that the prompt and the written answer fill.
      kv_bytes_held: the same, each page divided among the agents of the round that hold it.
      kv_bytes_mirror: bytes of its mirror at rest: private pages, patches, tables; not the base. In
        the form that was asked for, else to the bit; None if nobody asked.
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
      agent: its name.
      text: the answer, without stop token or stop string.
      token_ids: the tokens of the answer, without stop token and without those that a stop string
        lies in.
      finish_reason: "stop" at a stop token or string, "length" at the limit.
      ledger: tokens and bytes.
    """

    agent: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    ledger: AgentLedger


@dataclasses.dataclass(frozen=True, slots=True)
class RoundLedger:
    """The round's sums; the fields are those of `AgentLedger`.

    Attributes:
      distinct_tokens: private and task tokens of every agent, and every distinct shared block once:
        what a round needs that pays for a block once and knows nothing from before.
      unique_tokens: the same without exact prefix hits, and with the preamble of the bases: what
        this round cannot do without.
      computed_tokens: those of the agents, and of the bases.
      token_layers: tokens computed times the layers that each ran through, looks included, over the
        model's layers: the work of so many tokens.
      attended: keys that computed tokens attended to, in all layers, over the model's layers: the
        work of attention, which token-layers do not hold.
      kv_bytes_held: bytes of all pages that the round filled, each once.
      kv_bytes_rest: bytes of the round at rest: the base once, and all mirrors; None if nobody
        asked.
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
      timings: seconds.
      ledger: the round's sums.
      mirrors: the round's KV at rest, where it was asked for.
    """

    index: int
    agents: tuple[AgentResult, ...]
    timings: Timings
    ledger: RoundLedger
    mirrors: MasterMirror | None = None

    @property
    def texts(self) -> dict[str, str]:
        """Agent to answer, in the order of the prompts."""
        return {result.agent: result.text for result in self.agents}

"""Counts the tokens and bytes of a round."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from tokendance_jax.engine.prefill import Cost
from tokendance_jax.engine.result import AgentLedger, AgentResult, RoundLedger
from tokendance_jax.engine.sequence import Sequence as Served
from tokendance_jax.mirror import MirrorLayout, Quantised
from tokendance_jax.policy.policy import OpenRound
from tokendance_jax.prompt.tokenized import SpanKind, TokenizedPrompt


def account(
    sequences: Sequence[Served],
    opened: OpenRound,
    cost: Cost,
    *,
    layers: int,
    page_size: int,
    page_bytes: int,
    layout: MirrorLayout | None,
    form: Quantised | None,
) -> tuple[tuple[AgentResult, ...], RoundLedger]:
    """Builds the agents' results and the round's ledger.

    Args:
      sequences: the agents, whose answers have ended.
      opened: the round; its pages may be released already.
      cost: the cost of its prefill.
      layers: the model's layers.
      page_size: token slots in a page.
      page_bytes: bytes of a page in all layers.
      layout: the layout of the round's mirrors; None: the bytes of mirrors are not counted.
      form: how pages are stored in mirrors; None: bit for bit.
    """
    prompts = [sequence.prompt for sequence in sequences]
    lengths = [sequence.length for sequence in sequences]
    filled = [
        np.unique(lane.page[np.cumsum(lane.slots) - lane.slots < length])
        for lane, length in zip(opened.lanes, lengths, strict=True)
    ]
    holders = Counter(page for pages in filled for page in pages.tolist())
    bases = set(opened.base_pages.tolist())
    sizes: dict[str, Any] = {"page_size": page_size, "page_bytes": page_bytes, "form": form}
    at_rest = None if layout is None else layout.mirror_compression(**sizes)
    agents = []
    for seat, sequence in enumerate(sequences):
        prompt, answer = sequence.prompt, sequence.answer
        computed = int(cost.tokens[seat])
        ledger = AgentLedger(
            tokens=tokens_by_kind(prompt),
            prompt_tokens=len(prompt.token_ids),
            computed_tokens=computed,
            reused_tokens=len(prompt.token_ids) - computed,
            decoded_tokens=len(answer.chosen),
            kv_bytes_dense=-(-lengths[seat] // page_size) * page_bytes,
            kv_bytes_held=sum(page_bytes / holders[page] for page in filled[seat].tolist()),
            kv_bytes_mirror=None if at_rest is None else at_rest[seat].own_bytes,
        )
        assert answer.finish_reason is not None
        agents.append(
            AgentResult(prompt.agent, answer.text, answer.token_ids, answer.finish_reason, ledger)
        )
    ledgers = [agent.ledger for agent in agents]

    def total(field: str) -> int:
        return sum(getattr(ledger, field) for ledger in ledgers)

    ledger = RoundLedger(
        tokens={kind: sum(ledger.tokens[kind] for ledger in ledgers) for kind in ledgers[0].tokens},
        prompt_tokens=total("prompt_tokens"),
        distinct_tokens=distinct_tokens(prompts),
        unique_tokens=opened.preamble_tokens + distinct_tokens(prompts, opened.exact_hits),
        computed_tokens=cost.base_tokens + total("computed_tokens"),
        token_layers=cost.token_layers / layers,
        attended=cost.attended / layers,
        reused_tokens=total("reused_tokens"),
        decoded_tokens=total("decoded_tokens"),
        kv_bytes_dense=total("kv_bytes_dense"),
        kv_bytes_held=len(holders.keys() | bases) * page_bytes,
        kv_bytes_rest=None if layout is None else layout.compression(**sizes).stored_bytes,
    )
    return tuple(agents), ledger


def tokens_by_kind(prompt: TokenizedPrompt) -> dict[str, int]:
    """Counts a prompt's tokens by kind."""
    counts: dict[str, int] = {kind: 0 for kind in get_args(SpanKind)}
    for span in prompt.spans:
        counts[span.kind] += span.stop - span.start
    return counts


def distinct_tokens(
    prompts: Sequence[TokenizedPrompt], exact_hits: Sequence[int] | None = None
) -> int:
    """Counts private and task tokens of all prompts, and the tokens of distinct shared blocks.

    Args:
      prompts: the prompts.
      exact_hits: for each prompt, the number of leading tokens whose private and task tokens are
        not counted; None: 0.
    """
    private, shared = 0, {}
    for prompt, hit in zip(prompts, exact_hits or [0] * len(prompts), strict=True):
        for span in prompt.spans:
            if span.kind == "shared":
                block = np.ascontiguousarray(prompt.token_ids[span.start : span.stop])
                shared[block.tobytes()] = span.stop - span.start
            else:
                private += max(0, span.stop - max(span.start, hit))
    return private + sum(shared.values())

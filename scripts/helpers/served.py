"""The results of serve_round: sums over the rounds of each policy, tables of them, and JSON."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from scripts.helpers import measure
from tokendance_jax.engine.result import RoundResult
from tokendance_jax.prompt import Trace
from tokendance_jax.study.quality import Comparison, summarise


@dataclasses.dataclass
class Served:
    """The results so far.

    Attributes:
      results: the results of all rounds, by policy.
      compared: the comparisons with the first policy in all rounds, by policy.
      asked: the trace, if its recorded answers are the right ones; else None.
    """

    results: dict[str, list[RoundResult]]
    compared: dict[str, list[Comparison]]
    asked: Trace | None = None

    @classmethod
    def under(cls, policies: Sequence[str]) -> "Served":
        """Makes empty results for these policies."""
        first, *others = dict.fromkeys(policies)
        return cls({policy: [] for policy in (first, *others)}, {policy: [] for policy in others})

    @property
    def first(self) -> str:
        """The policy that the others are compared with."""
        return next(iter(self.results))

    def right(self, result: RoundResult) -> list[bool] | None:
        """Whether each answer of a round is right, word for word; None if that is not known."""
        if self.asked is None:
            return None
        prompts = self.asked.rounds[result.index].agents
        return [
            answer.text.strip() == (prompt.recorded_output or "").strip()
            for answer, prompt in zip(result.agents, prompts, strict=True)
        ]

    def summaries(self) -> dict[str, dict[str, Any]]:
        """Returns the sums over the rounds of each policy, and its agreement with the first."""
        fields = ("prompt", "distinct", "unique", "computed")
        kinds = ("held", "rest", "dense")
        names = [*(f"{field}_tokens" for field in fields), *(f"kv_bytes_{kind}" for kind in kinds)]
        summaries = {}
        for policy, results in self.results.items():
            ledgers = [result.ledger for result in results]
            if not ledgers:
                continue
            compared = self.compared.get(policy)
            right = [found for result in results if (found := self.right(result)) is not None]
            summaries[policy] = {
                **{name: sum(getattr(ledger, name) for ledger in ledgers) for name in names},
                "token_layers": sum(ledger.token_layers for ledger in ledgers),
                "prefill_s": sum(result.timings.prefill_s for result in results),
                "answers": sum(len(result.agents) for result in results),
                "right": sum(map(sum, right)) if right else None,
                "agreement": dataclasses.asdict(summarise(compared)) if compared else None,
            }
        return summaries

    def json(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the results and the values of the flags, to be written to a file."""
        rows = [
            {
                "policy": policy,
                "round": result.index,
                "agents": len(result.agents),
                **dataclasses.asdict(result.ledger),
                **dataclasses.asdict(result.timings),
                "outputs": result.texts,
                "output_ids": {agent.agent: list(agent.token_ids) for agent in result.agents},
                "finish_reasons": {agent.agent: agent.finish_reason for agent in result.agents},
            }
            for policy, rounds in self.results.items()
            for result in rounds
        ]
        return {"config": dict(config), "rounds": rows, "policies": self.summaries()}


def rounds_table(served: Served, *, cold: bool) -> Table:
    """Makes a table of tokens, times and bytes; `cold`: whether times include compilation."""
    title = "Tokens, seconds and KV bytes" + ("" if cold else " (compilation left out)")
    # Headings have two lines, so that the table fits 80 columns.
    tokens = ("prompt\ntokens", "computed", "reused")
    times = ("prefill\ns", "decode\ns", "decode\ntok/s")
    columns = ("round", *tokens, *times, "KV MiB\nheld", "KV MiB\ndense")
    table = measure.table("policy", *columns, title=title)
    for policy, rounds in served.results.items():
        for result in rounds:
            ledger, timings = result.ledger, result.timings
            later = ledger.decoded_tokens - len(result.agents)  # without the first tokens
            table.add_row(
                policy,
                str(result.index),
                f"{ledger.prompt_tokens:,}",
                f"{ledger.computed_tokens:,}",
                f"{ledger.reused_tokens / ledger.prompt_tokens:.1%}",
                f"{timings.prefill_s:.2f}",
                f"{timings.decode_s:.2f}",
                f"{later / timings.decode_s:,.0f}" if later else "-",
                f"{ledger.kv_bytes_held / 2**20:,.1f}",
                f"{ledger.kv_bytes_dense / 2**20:,.1f}",
            )
    return table


def work_table(served: Served) -> Table:
    """Makes a table of each policy's computed tokens, with unique tokens and the reuse ceiling."""
    columns = ("prompt\ntokens", "computed", "unique", "prompt /\ncomputed", "collective\nceiling")
    table = measure.table("policy", *columns, "token-\nlayers", title="Work of all rounds")
    for policy, values in served.summaries().items():
        prompt = values["prompt_tokens"]
        table.add_row(
            policy,
            f"{prompt:,}",
            f"{values['computed_tokens']:,}",
            f"{values['unique_tokens']:,}",
            f"{prompt / values['computed_tokens']:.2f}",
            f"{prompt / values['distinct_tokens']:.2f}",
            f"{values['token_layers']:,.0f}",
        )
    return table


def comparison_table(served: Served) -> Table:
    """Makes a table of each policy's time and bytes, and of its agreement with the first."""
    title = "Time, bytes" + (f", quality against {served.first}" if served.compared else "")
    columns = ["prefill\ns", "KV MiB\nheld", "at\nrest", "dense"]
    columns += ["mean\nKL", "top-1", "first\ndiverg."]
    columns += ["right\nanswers"] * (served.asked is not None)
    table = measure.table("policy", *columns, title=title)
    for policy, values in served.summaries().items():
        agreed = values["agreement"]
        quality = ["-", "-", "-"]
        if agreed is not None:
            kl, top1, first = agreed["kl_mean"], agreed["top1"], agreed["first_divergence"]
            quality = [f"{kl:.2g}", f"{top1:.3f}", f"{first:.1f}"]
        if values["right"] is not None:
            quality.append(f"{values['right']} of {values['answers']}")
        table.add_row(
            policy,
            f"{values['prefill_s']:.2f}",
            *(f"{values[f'kv_bytes_{what}'] / 2**20:,.0f}" for what in ("held", "rest", "dense")),
            *quality,
        )
    return table

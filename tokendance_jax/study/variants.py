"""What is compared: policies and their choices, with names for tables."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tokendance_jax.policy.policies import PolicyOptions

UNLIMITED = ("none", "all")
# Names of what checks a measurement: an audit, and the noise floor.
SHUFFLED, NOISE = "shuffled bases", "dense, other buckets"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A policy and its choices."""

    policy: str
    options: PolicyOptions = dataclasses.field(default_factory=PolicyOptions)

    @property
    def name(self) -> str:
        """For tables: the policy, and what distinguishes this variant of it."""
        if self.policy != "tokendance":
            return self.policy
        pages = "" if self.options.selection in UNLIMITED else f" {self.options.head_pages}"
        base = "" if self.options.base == "joint" else f", {self.options.base}"
        return f"tokendance {self.options.selection}{pages}{base}"

    @property
    def choices(self) -> dict[str, Any]:
        """For results: the name, the policy, and those of its choices that it has."""
        own = self.policy == "tokendance"
        limited = own and self.options.selection not in UNLIMITED
        return {
            "name": self.name,
            "policy": self.policy,
            "base": self.options.base if own else None,
            "selection": self.options.selection if own else None,
            "head_pages": self.options.head_pages if limited else None,
        }


def audited(variants: Sequence[Variant]) -> Variant | None:
    """The variant that an audit repeats with shuffled bases: the first that keeps bases.

    Those of `joint-agent` are pages of a request, and gone with it.
    """
    kept = (v for v in variants if v.policy == "tokendance" and v.options.base != "joint-agent")
    return next(kept, None)

"""The variants that studies compare: policies and their options, with names for tables."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tokendance_jax.policy.policies import PolicyOptions

UNLIMITED = ("none", "all")
# Names of the checks of a measurement: an audit, and the noise floor.
SHUFFLED, NOISE = "shuffled bases", "dense, other buckets"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A policy and its options."""

    policy: str
    options: PolicyOptions = dataclasses.field(default_factory=PolicyOptions)

    @property
    def name(self) -> str:
        """The name in tables: the policy, and the options that distinguish this variant of it."""
        if self.policy != "tokendance":
            return self.policy
        pages = "" if self.options.selection in UNLIMITED else f" {self.options.head_pages}"
        base = "" if self.options.base == "joint" else f", {self.options.base}"
        return f"tokendance {self.options.selection}{pages}{base}"

    @property
    def choices(self) -> dict[str, Any]:
        """The fields in results: name, policy and options; None for options that do not apply."""
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
    """Returns the variant that an audit repeats with shuffled bases: the first that keeps bases.

    The bases of `joint-agent` are pages of a request and are released with it.
    """
    kept = (v for v in variants if v.policy == "tokendance" and v.options.base != "joint-agent")
    return next(kept, None)

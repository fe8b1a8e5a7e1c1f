"""Builds policies by name."""

import dataclasses

import numpy as np
from jaxtyping import Int32

from tokendance_jax.paged.page_pool import PagePool
from tokendance_jax.paged.prefix_cache import PrefixCache
from tokendance_jax.policy.collective import BASES as BASES
from tokendance_jax.policy.collective import Collective
from tokendance_jax.policy.exact import Dense, Prefix
from tokendance_jax.policy.policy import Policy
from tokendance_jax.policy.rivals import Blend, Epic
from tokendance_jax.policy.selection import SELECTIONS as SELECTIONS
from tokendance_jax.policy.selection import make_selection

POLICIES = ("dense", "prefix", "blend", "blend-batched", "epic", "tokendance")


@dataclasses.dataclass(frozen=True, slots=True)
class PolicyOptions:
    """Options of the policies.

    Attributes:
      base: how `tokendance` conditions its bases: one of `BASES`.
      selection: which shared pages its agents compute themselves: one of `SELECTIONS`.
      head_pages: number of pages that its agents compute themselves, if the selection is limited.
      least_saving: fraction from 0 to 1. Sharing must save at least this fraction of the tokens
        that an exact round computes, preamble and bases counted; otherwise `tokendance` serves the
        round as `prefix` does. None: it shares whatever that costs, for studies of reuse.
      blend_ratio: fraction of the shared tokens that `blend` recomputes.
      epic_tokens: tokens of each segment that `epic` recomputes.
    """

    base: str = "joint"
    selection: str = "head"
    head_pages: int = 4
    least_saving: float | None = 0.2
    blend_ratio: float = 0.15
    epic_tokens: int = 16


def make_policy(
    name: str,
    pool: PagePool,
    page_size: int,
    namespace: str,
    *,
    options: PolicyOptions | None = None,
    preamble: Int32[np.ndarray, " preamble"] | None = None,
    context: int = 1 << 30,
    salt: bytes = b"",
) -> Policy:
    """Builds a policy by its name.

    Args:
      name: one of `POLICIES`.
      pool: the page pool.
      page_size: token slots in a page.
      namespace: what K and V depend on besides the tokens (model, precision, rotary embedding).
      options: options of the policies; None: the defaults.
      preamble: tokens in front of bases if agents have no leading text in common.
      context: most tokens of a lane, prompt and answer together.
      salt: secret of a tenant, whose pages no other tenant finds.

    Raises:
      ValueError: the policy is unknown, or an option is out of its range.
    """
    options = options or PolicyOptions()
    where = (pool, page_size, namespace)
    if name == "dense":
        return Dense(pool, page_size)
    if name == "prefix":
        return Prefix(pool, PrefixCache(*where, salt), page_size)
    if name == "epic":
        return Epic(*where, tokens=options.epic_tokens, salt=salt)
    if name in ("blend", "blend-batched"):
        batched = name == "blend-batched"
        return Blend(*where, ratio=options.blend_ratio, batched=batched, salt=salt)
    if name == "tokendance":
        return Collective(
            *where,
            base=options.base,
            selection=make_selection(options.selection, options.head_pages),
            preamble=np.zeros(0, np.int32) if preamble is None else preamble,
            least_saving=options.least_saving,
            context=context,
            salt=salt,
        )
    raise ValueError(f"policy: {name!r} is unknown; choose one of {', '.join(POLICIES)}")

"""An open round of the collective policy, and the base that continues one agent's private text."""

import dataclasses
import math

import numpy as np
from jaxtyping import Int32

from tokendance_jax.paged.page_pool import PagePool
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.policy.bases import Placed
from tokendance_jax.policy.parts import Run
from tokendance_jax.policy.policy import OpenRound, Scores, pages_for

_NO_PAGES = np.zeros(0, np.int32)


@dataclasses.dataclass(slots=True, eq=False)
class CollectiveLane:
    """An agent's lane that reads from bases, while its patches may still be chosen.

    Attributes:
      seat: the agent's place in the round.
      private: number of leading tokens that are the agent's own text; their K and V are exact.
      asked: position where the prompt's own segments end; markup may follow.
      run: the lane's shared text.
      at: index of each entry of `run` in the lane's table.
      spare: pages for patches that are chosen later.
    """

    seat: int
    private: int
    asked: int
    run: Run
    at: Int32[np.ndarray, " entries"]
    spare: Int32[np.ndarray, " spare"]


@dataclasses.dataclass(slots=True, eq=False)
class OpenCollective(OpenRound):
    """An open round of the collective policy.

    Attributes:
      collective: the lanes that read from bases.
      placed: where each segment of the bases lies, by its `content_key`.
      reserved: pages for a Master's base.
    """

    collective: list[CollectiveLane] = dataclasses.field(default_factory=list)
    placed: dict[bytes, Placed] = dataclasses.field(default_factory=dict)
    reserved: Int32[np.ndarray, " reserved"] = dataclasses.field(default_factory=lambda: _NO_PAGES)


def rebase(
    pool: PagePool, opened: OpenCollective, scores: Scores, *, context: int, page_size: int
) -> list[LanePlan]:
    """Makes the agent with the lowest summed deviation the Master.

    The Master's base continues the Master's private text. The base entries of all agents move
    to the pages of this base, with frames for its positions. If the context cannot hold the
    private text of any agent together with the bundle, there is no Master.

    Args:
      pool: the page pool.
      opened: the round; its neutral base is computed, and so is all private text.
      scores: for each collective lane, the deviation of each entry of its run.
      context: most tokens of a lane.
      page_size: token slots in a page.

    Returns:
      The lane of the Master's base; an empty list without a Master.
    """
    bundle = opened.bases[0].token_ids[opened.preamble_tokens :]
    most = context - len(bundle)
    fitting = [
        (score, lane)
        for score, lane in zip(scores, opened.collective, strict=True)
        if lane.private <= most
    ]
    if not fitting:
        return []
    # Of equal sums, the lowest seat wins; the papers leave this open.
    sums = [math.fsum(score.tolist()) for score, _ in fitting]
    _, master = fitting[int(np.argmin(sums))]
    plan, neutral = opened.lanes[master.seat], opened.bases[0]
    skip = pages_for(opened.preamble_tokens, page_size)
    private = int(np.searchsorted(np.cumsum(plan.slots), master.private, side="right"))
    page = np.concatenate([plan.page[:private], opened.reserved])
    slots = np.concatenate([plan.slots[:private], neutral.slots[skip:]])
    token_ids = np.concatenate([plan.token_ids[: master.private], bundle])
    computed = np.arange(master.private, len(token_ids), dtype=np.int32)
    zeros = np.zeros_like(page)
    base = LanePlan(token_ids, computed, page, zeros, zeros, slots, base=zeros)
    pool.retain(plan.page[:private])
    opened.reserved = opened.reserved[:0]
    opened.bases.append(base)

    shift = np.int32(opened.preamble_tokens - master.private)
    moved = dict(zip(neutral.page[skip:].tolist(), page[private:].tolist(), strict=True))
    for lane in opened.collective:
        plan = opened.lanes[lane.seat]
        moves = np.isin(plan.base, neutral.page[skip:])
        reads = moves & (plan.page == plan.base)
        to = np.array([moved.get(page, page) for page in plan.base.tolist()], np.int32)
        pool.retain(to[reads])
        pool.release(plan.page[reads])
        opened.lanes[lane.seat] = dataclasses.replace(
            plan,
            page=np.where(reads, to, plan.page),
            frame=np.where(moves, plan.frame + shift, plan.frame),
            base=to,
        )
    for key, place in opened.placed.items():
        to = np.array([moved.get(page, page) for page in place.page.tolist()], np.int32)
        if not np.array_equal(to, place.page):  # else it lies in another base of the round
            at = place.canonical - int(shift)
            opened.placed[key] = dataclasses.replace(place, page=to, canonical=at)
    return [base]

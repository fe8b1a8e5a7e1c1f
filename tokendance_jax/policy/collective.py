"""The KV Collector: computes the shared text of a round once, for all agents to read.

The unit of reuse is the round (TokenDance, arXiv 2604.03143, section 4.2). Its shared segments
form a bundle, which is computed once behind a neutral preamble. Agents read this base through
entries (page, frame) of their block tables, so no key is rotated again and no page is copied.
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Collection, Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int32

from tokendance_jax.paged.page_pool import OutOfPages, PagePool
from tokendance_jax.plan.lane import LanePlan, with_rows
from tokendance_jax.policy.bases import paged
from tokendance_jax.policy.draft import Draft, Drafter, LaneDraft
from tokendance_jax.policy.exact import pages_for
from tokendance_jax.policy.parts import Run, asked_until
from tokendance_jax.policy.policy import (
    NOBODY,
    Compute,
    Look,
    OpenRound,
    Scores,
    Steps,
    no_steps,
)
from tokendance_jax.policy.reuse import BaseReuse
from tokendance_jax.policy.selection import Scored, Selection, deviations
from tokendance_jax.policy.table import agent_table
from tokendance_jax.prompt.tokenized import TokenizedPrompt

Base = Literal["joint", "joint-agent", "alone", "isolated"]
BASES: tuple[str, ...] = get_args(Base)

_NO_PAGES = np.zeros(0, np.int32)


@dataclasses.dataclass(slots=True, eq=False)
class _Lane:
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
class _OpenCollective(OpenRound):
    """An open round, with its collective lanes and pages reserved for a Master's base."""

    collective: list[_Lane] = dataclasses.field(default_factory=list)
    reserved: Int32[np.ndarray, " reserved"] = dataclasses.field(default_factory=lambda: _NO_PAGES)


class Collective(BaseReuse):
    """The policy `tokendance`: agents read shared text from common bases and compute the rest."""

    # The frame may change between private text, the agent's own block, the blocks before that
    # block, those behind it, and the task.
    frames = 4

    def __init__(
        self,
        pool: PagePool,
        page_size: int,
        namespace: str,
        *,
        base: str,
        selection: Selection,
        preamble: Int32[np.ndarray, " preamble"],
        least_saving: float | None,
        context: int,
        salt: bytes = b"",
    ):
        """Makes the policy with empty caches.

        Args:
          pool: the page pool.
          page_size: token slots in a page.
          namespace: what K and V depend on besides the tokens.
          base: how bases are conditioned: "joint" (the bundle as one text behind the preamble),
            "alone" (each segment behind the preamble), "isolated" (each segment at position 0),
            "joint-agent" (the bundle behind the private text of the agent whose own K and V deviate
            least from the joint base: the paper's request Master).
          selection: which pages agents compute themselves.
          preamble: tokens in front of the bases if agents have no leading text in common.
          least_saving: fraction from 0 to 1. Sharing must save at least this fraction of the
            tokens that an exact round computes, preamble and bases counted; otherwise the round is
            served exactly. None: shares whatever it costs.
          context: most tokens of a lane, prompt and answer together.
          salt: secret of a tenant.

        Raises:
          ValueError: the base is unknown, the selection cannot be combined with it, or
            `least_saving` is not from 0 to 1.
        """
        if base not in BASES:
            raise ValueError(f"base: {base!r} is unknown; choose one of {', '.join(BASES)}")
        if base == "joint-agent" and selection.look is not None:
            raise ValueError(
                "selection: base 'joint-agent' needs a selection without scores; "
                "choose head, none, own or all"
            )
        if least_saving is not None and not 0 <= least_saving <= 1:
            raise ValueError(
                f"least_saving: {least_saving} is not a fraction; give a number from 0 to 1"
            )
        kind = "joint" if base == "joint-agent" else base
        super().__init__(pool, page_size, namespace, kind=kind, salt=salt)
        self._base = base
        self._selection = selection
        self._context = context
        self._drafter = Drafter(
            self._store,
            self._cache,
            page_size,
            base=base,
            selection=selection,
            preamble=preamble,
            least_saving=least_saving,
            context=context,
        )
        look = "deviation" if base == "joint-agent" else selection.look
        self.programs = ("prefill",) if look is None else ("prefill", look)
        self.bases = 1 if base.startswith("joint") else sys.maxsize

    def open(self, prompts: Sequence[TokenizedPrompt], rooms: Sequence[int]) -> OpenRound:
        """Takes the bases' pages, then every agent's; see `Policy.open`.

        If the pool cannot hold the round with its bases, the round is served exactly.
        """
        draft = self._drafter.draft(prompts, rooms)
        if draft.shares:
            with contextlib.suppress(OutOfPages):
                return self._open(draft, prompts, rooms)
        return self._open(Draft([None] * len(prompts)), prompts, rooms)

    def _open(
        self, draft: Draft, prompts: Sequence[TokenizedPrompt], rooms: Sequence[int]
    ) -> OpenRound:
        """Takes the pages of a draft; if the pool cannot allocate them, no reference is held."""
        opened = _OpenCollective([], [], [], draft.preamble_tokens, no_steps())
        # Pages of quoted bases may be evictable, so they are held while new pages are allocated.
        # This includes the pages that patches replace: a patch must not get the page that it
        # replaces.
        pages = [lane.run.page for lane in draft.lanes if lane is not None]
        quoted = np.concatenate([_NO_PAGES, *pages])
        quoted = quoted[quoted > 0]
        self._pool.retain(quoted)
        try:
            for layout in draft.bases:
                opened.bases.append(self._store.take(layout)[0])
            if self._base == "joint-agent" and draft.bases:
                context = pages_for(draft.preamble_tokens, self._page_size)
                opened.reserved = self._pool.allocate(len(opened.bases[0].page) - context)
            for seat, (prompt, room) in enumerate(zip(prompts, rooms, strict=True)):
                lane = draft.lanes[seat]
                if lane is not None:
                    opened.lanes.append(self._open_lane(opened, seat, prompt, room, lane))
                else:
                    opened.lanes.append(
                        self._exact.open_lane(prompt.token_ids, room, prompt.answer_tokens)
                    )
                    opened.exact_hits.append(int(opened.lanes[-1].computed[0]))
            opened.steps = self._plan(opened)
            return opened
        except BaseException:
            self.close(opened, None)
            raise
        finally:
            self._pool.release(quoted)

    def close(self, opened: OpenRound, written: Sequence[Int32[np.ndarray, " _"]] | None) -> None:
        """Releases every reference; later rounds can still find bases and exact pages."""
        assert isinstance(opened, _OpenCollective)
        for lane in opened.collective:
            self._pool.release(lane.spare)
        self._pool.release(opened.reserved)
        super().close(opened, written)

    def _reusing(self, opened: OpenRound) -> Collection[int]:
        assert isinstance(opened, _OpenCollective)
        return {lane.seat for lane in opened.collective}

    def _open_lane(
        self,
        opened: _OpenCollective,
        seat: int,
        prompt: TokenizedPrompt,
        room: int,
        draft: LaneDraft,
    ) -> LanePlan:
        """Takes an agent's pages: exact hits, new pages of its own, patches, and base pages."""
        size, ids = self._page_size, prompt.token_ids
        parts, private, chosen, head = draft.parts, draft.private, draft.chosen, draft.head
        bases = np.concatenate([_NO_PAGES, *(lane.page for lane in opened.bases)])
        run = dataclasses.replace(draft.run, page=paged(draft.run.page, bases))
        full, rest = divmod(private, size)
        hit = self._cache.match_blocks(draft.blocks)

        own = sum(part.stop - part.start for part in parts if part.placed is None) + room
        # A partial page that is found again is not written; own text continues in a new page.
        gap = size - rest if rest and len(hit) > full else 0
        own_hits = min(len(hit), full + (gap > 0))
        own_pages = pages_for(own + gap, size)
        patches = int(chosen.sum())
        fresh = own_pages - own_hits + patches - (len(hit) - own_hits) + draft.later
        page = self._pool.extend(hit, fresh)
        self._pool.retain(run.page[~chosen])
        own_page = np.concatenate([page[:own_hits], page[len(hit) :][: own_pages - own_hits]])
        page = np.concatenate([page[own_hits : len(hit)], page[len(hit) + own_pages - own_hits :]])
        patch_page, spare_page = page[:patches], page[patches:]
        self._cache.insert_blocks(
            draft.blocks,
            np.concatenate([own_page[: full + (head > 0 and rest > 0)], patch_page[:head]]),
        )

        shown = run.page.copy()
        shown[chosen] = patch_page
        table, at = agent_table(
            parts, run, shown, own_page, room=room, gap_at=private, gap=gap, page_size=size
        )
        hit_tokens = draft.hit_tokens(len(hit), size)
        computed = np.ones(len(ids), np.bool_)
        computed[:hit_tokens] = False
        computed[run.positions(~chosen)] = False
        opened.collective.append(_Lane(seat, private, asked_until(prompt), run, at, spare_page))
        opened.exact_hits.append(hit_tokens)
        page, frame, first, slots, base = table
        # Own text behind shared text continues in the page where own text ended before. This page
        # then has a second entry, and needs a second reference.
        own_entries = page[base == 0]
        self._pool.retain(own_entries[1:][own_entries[1:] == own_entries[:-1]])
        computed = np.flatnonzero(computed).astype(np.int32)
        return LanePlan(ids, computed, page, frame, first, slots, base=base)

    def _plan(self, opened: _OpenCollective) -> Steps:
        """Yields all steps, then releases the preamble, which only the rows of bases read."""
        yield from self._steps(opened)
        if self._base != "joint-agent":  # a Master's base continues private text instead
            opened.left = pages_for(opened.preamble_tokens, self._page_size)
            for lane in opened.bases:
                self._pool.release(lane.page[: opened.left])

    def _steps(self, opened: _OpenCollective) -> Steps:
        lanes, collective = opened.lanes, opened.collective
        # Programs are compiled for up to `self.bases` bases; any others are computed one by one.
        for base in opened.bases[: -self.bases]:
            yield Compute([base], [NOBODY])
        bases = opened.bases[-self.bases :]
        nobody = [NOBODY] * len(bases)
        look = self._selection.look
        if self._base == "joint-agent" and opened.bases:
            look = "deviation"
        if look is None or not collective:
            yield Compute([*bases, *lanes], [*nobody, *range(len(lanes))])
            return
        # Compute first what does not depend on the choice: bases, private text and exact agents.
        first = list(lanes)
        for lane in collective:
            plan = lanes[lane.seat]
            first[lane.seat] = with_rows(plan, plan.computed[plan.computed < lane.private])
        yield Compute([*bases, *first], [*nobody, *range(len(lanes))])
        seats = [lane.seat for lane in collective]
        if look == "deviation":  # all rows up to the end of shared text, reading base pages only
            looked = [
                with_rows(plan, np.arange(lane.private, lane.run.stop))
                for lane in collective
                for plan in [_without_patches(lanes[lane.seat])]
            ]
        else:  # the agent's own text behind its first shared text
            looked = [
                with_rows(plan, rows[(rows >= lane.private) & (rows < lane.asked)])
                for lane in collective
                for plan in [lanes[lane.seat]]
                for rows in [plan.computed]
            ]
        scores = yield Look(look, looked, seats)
        assert scores is not None
        if look == "deviation":
            scores = deviations(
                [
                    square[:, lane.run.positions() - lane.private]
                    for lane, square in zip(collective, scores, strict=True)
                ]
            )
        if self._base == "joint-agent":
            before = self._rebase(opened, scores)
        else:
            self._patch(opened, scores)
            before = []
        rest = [
            with_rows(plan, plan.computed[plan.computed >= lane.private])
            for lane in collective
            for plan in [lanes[lane.seat]]
        ]
        yield Compute([*before, *rest], [*[NOBODY] * len(before), *seats])

    def _patch(self, opened: _OpenCollective, scores: Scores) -> None:
        """Chooses pages by their scores, and puts their patches into the lanes' tables."""
        assert isinstance(self._selection, Scored)
        runs = [lane.run for lane in opened.collective]
        if self._selection.look == "deviation":
            of_entries = [
                np.add.reduceat(score, np.cumsum(run.slots) - run.slots)
                / run.slots.astype(np.float32)
                for run, score in zip(runs, scores, strict=True)
            ]
        else:
            of_entries = [s[lane.at] for lane, s in zip(opened.collective, scores, strict=True)]
        chosen = self._selection.pick_scored(runs, of_entries)
        for lane, pick in zip(opened.collective, chosen, strict=True):
            plan, count = opened.lanes[lane.seat], int(pick.sum())
            page = plan.page.copy()
            page[lane.at[pick]] = lane.spare[:count]
            patched = lane.run.positions(pick)
            computed = np.sort(np.concatenate([plan.computed, patched]))
            opened.lanes[lane.seat] = dataclasses.replace(plan, page=page, computed=computed)
            self._pool.release(lane.run.page[pick])
            lane.spare = lane.spare[count:]

    def _rebase(self, opened: _OpenCollective, scores: Scores) -> list[LanePlan]:
        """Makes the agent with the lowest summed deviation the Master.

        The Master's base continues the Master's private text. The base entries of all agents move
        to the pages of this base, with frames for its positions. If the context cannot hold the
        private text of any agent together with the bundle, there is no Master.

        Returns:
          The lane of the Master's base; an empty list without a Master.
        """
        bundle = opened.bases[0].token_ids[opened.preamble_tokens :]
        most = self._context - len(bundle)
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
        context = pages_for(opened.preamble_tokens, self._page_size)
        private = int(np.searchsorted(np.cumsum(plan.slots), master.private, side="right"))
        page = np.concatenate([plan.page[:private], opened.reserved])
        slots = np.concatenate([plan.slots[:private], neutral.slots[context:]])
        token_ids = np.concatenate([plan.token_ids[: master.private], bundle])
        computed = np.arange(master.private, len(token_ids), dtype=np.int32)
        zeros = np.zeros_like(page)
        base = LanePlan(token_ids, computed, page, zeros, zeros, slots, base=zeros)
        self._pool.retain(plan.page[:private])
        opened.reserved = opened.reserved[:0]
        opened.bases.append(base)

        moved = dict(zip(neutral.page[context:].tolist(), page[private:].tolist(), strict=True))
        for lane in opened.collective:
            plan = opened.lanes[lane.seat]
            moves = np.isin(plan.base, neutral.page[context:])
            reads = moves & (plan.page == plan.base)
            to = np.array([moved.get(page, page) for page in plan.base.tolist()], np.int32)
            self._pool.retain(to[reads])
            self._pool.release(plan.page[reads])
            shift = np.int32(opened.preamble_tokens - master.private)
            opened.lanes[lane.seat] = dataclasses.replace(
                plan,
                page=np.where(reads, to, plan.page),
                frame=np.where(moves, plan.frame + shift, plan.frame),
                base=to,
            )
        return [base]


def _without_patches(plan: LanePlan) -> LanePlan:
    """Returns the same lane with base pages in place of patches."""
    return dataclasses.replace(plan, page=np.where(plan.base > 0, plan.base, plan.page))

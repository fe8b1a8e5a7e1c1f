"""The KV Collector: computes the shared text of a round once, for all agents to read.

The unit of reuse is the round (TokenDance, arXiv 2604.03143, section 4.2). Its shared segments
form a bundle, which is computed once behind a neutral preamble. Agents read this base through
entries (page, frame) of their block tables, so no key is rotated again and no page is copied.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int32

from tokendance_jax.paged.page_pool import OutOfPages, PagePool
from tokendance_jax.plan.lane import LanePlan, with_rows
from tokendance_jax.policy.bases import content_key, paged
from tokendance_jax.policy.draft import Draft, Drafter, LaneDraft, leading_entries
from tokendance_jax.policy.open_collective import CollectiveLane, OpenCollective, rebase
from tokendance_jax.policy.parts import asked_until
from tokendance_jax.policy.policy import (
    NOBODY,
    Compute,
    Look,
    OpenRound,
    Scores,
    Steps,
    compute,
    no_steps,
    pages_for,
)
from tokendance_jax.policy.reuse import BaseReuse
from tokendance_jax.policy.selection import Scored, Selection, deviations
from tokendance_jax.policy.table import agent_table
from tokendance_jax.prompt.tokenized import TokenizedPrompt

Base = Literal["joint", "joint-agent", "alone", "isolated"]
BASES: tuple[str, ...] = get_args(Base)

_NO_PAGES = np.zeros(0, np.int32)


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

    def open(
        self,
        prompts: Sequence[TokenizedPrompt],
        rooms: Sequence[int],
        limits: Sequence[int] | None = None,
        *,
        patient: bool = False,
    ) -> OpenRound:
        """Takes the bases' pages, then every agent's; see `Policy.open`.

        If the pool cannot hold the round with its bases, the round is served exactly, unless it is
        patient.
        """
        draft = self._drafter.draft(prompts, rooms if limits is None else limits)
        if draft.shares:
            try:
                return self._open(draft, prompts, rooms)
            except OutOfPages:
                if patient:
                    raise
        return self._open(Draft([None] * len(prompts)), prompts, rooms)

    def _open(
        self, draft: Draft, prompts: Sequence[TokenizedPrompt], rooms: Sequence[int]
    ) -> OpenRound:
        """Takes the pages of a draft; if the pool cannot allocate them, no reference is held."""
        opened = OpenCollective([], [], [], draft.preamble_tokens, no_steps())
        with self._quoted(draft.lanes):
            try:
                for layout in draft.bases:
                    base, placed = self._store.take(layout)
                    opened.bases.append(base)
                    opened.placed.update((content_key(place.token_ids), place) for place in placed)
                if self._base == "joint-agent" and draft.bases:
                    context = pages_for(draft.preamble_tokens, self._page_size)
                    opened.reserved = self._pool.allocate(len(opened.bases[0].page) - context)
                for prompt, room, lane in zip(prompts, rooms, draft.lanes, strict=True):
                    self._take(opened, prompt, room, lane)
            except BaseException:
                self._abandon(opened)
                raise
        opened.steps = self._plan(opened)
        return opened

    def join(self, opened: OpenRound, prompt: TokenizedPrompt, room: int, limit: int) -> Steps:
        """Takes the pages of a lane that reads the round's bases; see `Policy.join`."""
        assert isinstance(opened, OpenCollective)
        lane = self._drafter.draft_joining(prompt, limit, opened.placed)
        with self._quoted([lane]):
            seat = self._take(opened, prompt, room, lane)
        return self._steps(opened, [], [seat])

    def _resume(self, opened: OpenRound, seat: int, prompt: TokenizedPrompt, room: int) -> Steps:
        """Takes new pages for the lane's own text; its other entries stay as they are."""
        lane, ids, size = opened.lanes[seat], prompt.token_ids, self._page_size
        if seat not in self._reusing(opened):
            opened.lanes[seat] = self._exact.open_lane(ids, room)
        else:
            own = lane.base == 0
            # Own text begins in a new page, or continues in the page where it ended before.
            number = np.cumsum(lane.first[own] == 0) - 1
            count = int(number[-1]) + 1
            leading = leading_entries(own & (lane.first == 0) & (lane.slots == size))
            blocks = self._cache.split(ids[: leading * size])
            hit = self._cache.match_blocks(blocks)
            later = pages_for(max(0, len(ids) + room - lane.room(size)), size)
            fresh = self._pool.extend(hit, count - len(hit) + later)
            self._cache.insert_blocks(blocks, fresh)
            page = lane.page.copy()
            page[own] = fresh[number]
            self._pool.retain(page[own][1:][np.diff(number) == 0])
            starts = np.cumsum(lane.slots) - lane.slots
            mine = np.repeat(own, lane.slots)[: len(ids)]
            mine[: starts[len(hit)]] = False
            computed = np.flatnonzero(mine).astype(np.int32)
            lane = dataclasses.replace(lane, token_ids=ids, page=page, computed=computed)
            opened.lanes[seat] = lane.extended(fresh[count:], size)
        return compute(opened, [seat])

    def _forked(self, opened: OpenRound, seat: int, lane: LanePlan) -> None:
        assert isinstance(opened, OpenCollective)
        super()._forked(opened, seat, lane)
        opened.collective += [
            dataclasses.replace(like, seat=len(opened.lanes) - 1, spare=_NO_PAGES)
            for like in opened.collective
            if like.seat == seat
        ]

    def _release_lane(
        self, opened: OpenRound, seat: int, written: Int32[np.ndarray, " _"] | None
    ) -> None:
        assert isinstance(opened, OpenCollective)
        self._release_spare(opened, seat)
        super()._release_lane(opened, seat, written)

    def _suspend(self, opened: OpenRound, seat: int, written: Int32[np.ndarray, " _"]) -> None:
        assert isinstance(opened, OpenCollective)
        self._release_spare(opened, seat)
        super()._suspend(opened, seat, written)

    def _release_spare(self, opened: OpenCollective, seat: int) -> None:
        for lane in opened.collective:
            if lane.seat == seat:
                self._pool.release(lane.spare)
                lane.spare = _NO_PAGES

    def _release_bases(self, opened: OpenRound) -> None:
        assert isinstance(opened, OpenCollective)
        self._pool.release(opened.reserved)
        super()._release_bases(opened)

    def _reusing(self, opened: OpenRound) -> Collection[int]:
        assert isinstance(opened, OpenCollective)
        return {lane.seat for lane in opened.collective}

    @contextlib.contextmanager
    def _quoted(self, lanes: Sequence[LaneDraft | None]) -> Iterator[None]:
        """Holds the pages of older bases that drafts read, while new pages are allocated.

        They may be evictable. They include the pages that patches replace: a patch must not get the
        page that it replaces.
        """
        pages = [lane.run.page for lane in lanes if lane is not None]
        quoted = np.concatenate([_NO_PAGES, *pages])
        quoted = quoted[quoted > 0]
        self._pool.retain(quoted)
        try:
            yield
        finally:
            self._pool.release(quoted)

    def _take(
        self, opened: OpenCollective, prompt: TokenizedPrompt, room: int, draft: LaneDraft | None
    ) -> int:
        """Takes an agent's pages, and returns its seat."""
        if draft is not None:
            return self._take_collective(opened, prompt, room, draft)
        return self._exact.take(opened, prompt, room)

    def _take_collective(
        self, opened: OpenCollective, prompt: TokenizedPrompt, room: int, draft: LaneDraft
    ) -> int:
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
        page, frame, first, slots, base = table
        # Own text behind shared text continues in the page where own text ended before. This page
        # then has a second entry, and needs a second reference.
        own_entries = page[base == 0]
        self._pool.retain(own_entries[1:][own_entries[1:] == own_entries[:-1]])
        computed = np.flatnonzero(computed).astype(np.int32)
        seat = opened.add(LanePlan(ids, computed, page, frame, first, slots, base=base), hit_tokens)
        opened.collective.append(
            CollectiveLane(seat, private, asked_until(prompt), run, at, spare_page)
        )
        return seat

    def _plan(self, opened: OpenCollective) -> Steps:
        """Yields all steps, then releases the preamble, which only the rows of bases read."""
        yield from self._steps(opened, opened.bases, range(len(opened.lanes)))
        if self._base != "joint-agent":  # a Master's base continues private text instead
            opened.left = pages_for(opened.preamble_tokens, self._page_size)
            for lane in opened.bases:
                self._pool.release(lane.page[: opened.left])

    def _steps(
        self, opened: OpenCollective, bases: Sequence[LanePlan], seats: Sequence[int]
    ) -> Steps:
        """Yields the steps that compute some seats, and bases before them."""
        lanes = opened.lanes
        collective = [lane for lane in opened.collective if lane.seat in seats]
        # Programs are compiled for up to `self.bases` bases; any others are computed one by one.
        for base in bases[: -self.bases]:
            yield Compute([base], [NOBODY])
        bases = bases[-self.bases :]
        nobody = [NOBODY] * len(bases)
        look = self._selection.look
        if self._base == "joint-agent" and bases:
            look = "deviation"
        if look is None or not collective:
            yield Compute([*bases, *(lanes[seat] for seat in seats)], [*nobody, *seats])
            return
        # Compute first what does not depend on the choice: bases, private text and exact agents.
        first = {seat: lanes[seat] for seat in seats}
        for lane in collective:
            plan = lanes[lane.seat]
            first[lane.seat] = with_rows(plan, plan.computed[plan.computed < lane.private])
        yield Compute([*bases, *first.values()], [*nobody, *seats])
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
            before = rebase(
                self._pool, opened, scores, context=self._context, page_size=self._page_size
            )
        else:
            self._patch(opened, collective, scores)
            before = []
        rest = [
            with_rows(plan, plan.computed[plan.computed >= lane.private])
            for lane in collective
            for plan in [lanes[lane.seat]]
        ]
        yield Compute([*before, *rest], [*[NOBODY] * len(before), *seats])

    def _patch(
        self, opened: OpenCollective, collective: Sequence[CollectiveLane], scores: Scores
    ) -> None:
        """Chooses pages by their scores, and puts their patches into the lanes' tables."""
        assert isinstance(self._selection, Scored)
        runs = [lane.run for lane in collective]
        if self._selection.look == "deviation":
            of_entries = [
                np.add.reduceat(score, np.cumsum(run.slots) - run.slots)
                / run.slots.astype(np.float32)
                for run, score in zip(runs, scores, strict=True)
            ]
        else:
            of_entries = [s[lane.at] for lane, s in zip(collective, scores, strict=True)]
        chosen = self._selection.pick_scored(runs, of_entries)
        for lane, pick in zip(collective, chosen, strict=True):
            plan, count = opened.lanes[lane.seat], int(pick.sum())
            page = plan.page.copy()
            page[lane.at[pick]] = lane.spare[:count]
            patched = lane.run.positions(pick)
            computed = np.sort(np.concatenate([plan.computed, patched]))
            opened.lanes[lane.seat] = dataclasses.replace(plan, page=page, computed=computed)
            self._pool.release(lane.run.page[pick])
            lane.spare = lane.spare[count:]


def _without_patches(plan: LanePlan) -> LanePlan:
    """Returns the same lane with base pages in place of patches."""
    return dataclasses.replace(plan, page=np.where(plan.base > 0, plan.base, plan.page))

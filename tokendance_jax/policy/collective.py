"""The KV Collector: the shared text of a round computed once, and read by everybody.

The unit of reuse is the round (TokenDance, arXiv 2604.03143, section 4.2). Its shared segments form
a bundle, which is computed once behind a neutral preamble; agents read the base through entries
(page, frame) of their block tables, so no key is rotated again and no page is copied.
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
    """A lane of the collective part of a round, while it is being decided.

    Attributes:
      seat: the agent's place in the round.
      private: leading tokens of the agent's own text, which are exact.
      asked: where the prompt ends; markup may follow.
      run: its shared text.
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
    """An open round, the collective ones among its lanes, and pages reserved for a Master."""

    collective: list[_Lane] = dataclasses.field(default_factory=list)
    reserved: Int32[np.ndarray, " reserved"] = dataclasses.field(default_factory=lambda: _NO_PAGES)


class Collective(BaseReuse):
    """One base for the round, and for every agent what is its own: the policy `tokendance`."""

    # Private text, the own block, the blocks before it and behind it, the task.
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
          namespace: what K and V depend on beside the tokens.
          base: how bases are conditioned: "joint" (the bundle as one text behind the preamble),
            "alone" (each segment behind the preamble), "isolated" (each segment at position 0),
            "joint-agent" (the bundle behind the private text of the agent whose own K and V deviate
            least from the joint base: the paper's request Master).
          selection: which pages agents compute themselves.
          preamble: tokens in front of the bases where agents have no leading text in common.
          least_saving: share of the tokens which the round would compute exactly, from 0 to 1, that
            sharing must save, preamble and bases counted; else the round is served exactly. None:
            shares whatever it costs.
          context: most tokens of a lane, prompt and answer together.
          salt: secret of a tenant.

        Raises:
          ValueError: if there is no such base, it does not go with the selection, or the least
            saving is no share.
        """
        if base not in BASES:
            raise ValueError(f"base: {base!r} is unknown; choose one of {', '.join(BASES)}")
        if base == "joint-agent" and selection.look is not None:
            raise ValueError(
                "selection: base 'joint-agent' has a look of its own; choose head, none, own or all"
            )
        if least_saving is not None and not 0 <= least_saving <= 1:
            raise ValueError(f"least_saving: {least_saving} is no share; give a number from 0 to 1")
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

        A round that the pool does not hold with its bases is served exactly.
        """
        draft = self._drafter.draft(prompts, rooms)
        if draft.shares:
            with contextlib.suppress(OutOfPages):
                return self._open(draft, prompts, rooms)
        return self._open(Draft([None] * len(prompts)), prompts, rooms)

    def _open(
        self, draft: Draft, prompts: Sequence[TokenizedPrompt], rooms: Sequence[int]
    ) -> OpenRound:
        """Takes the pages of a draft; holds nothing if the pool cannot give them."""
        opened = _OpenCollective([], [], [], draft.preamble_tokens, no_steps())
        # Quoted bases may be evictable: they are held while new pages are taken, those that patches
        # replace as well, as no patch is the page that it replaces.
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
        """Keeps bases and exact pages findable, and gives every reference back."""
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
        # A partial page that is found again is not written: own text goes on in a new page.
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
        # Own text that goes on behind shared text begins in the page where it ended before: a
        # second entry of the page, and a second reference.
        own_entries = page[base == 0]
        self._pool.retain(own_entries[1:][own_entries[1:] == own_entries[:-1]])
        computed = np.flatnonzero(computed).astype(np.int32)
        return LanePlan(ids, computed, page, frame, first, slots, base=base)

    def _plan(self, opened: _OpenCollective) -> Steps:
        """All steps; then the preamble is given back, which only the bases' own rows read."""
        yield from self._steps(opened)
        if self._base != "joint-agent":  # a Master's base stands behind private text instead
            opened.left = pages_for(opened.preamble_tokens, self._page_size)
            for lane in opened.bases:
                self._pool.release(lane.page[: opened.left])

    def _steps(self, opened: _OpenCollective) -> Steps:
        lanes, collective = opened.lanes, opened.collective
        # Bases beyond those that programs are compiled for are computed one by one.
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
        # First what does not depend on the choice: bases, private text, exact agents.
        first = list(lanes)
        for lane in collective:
            plan = lanes[lane.seat]
            first[lane.seat] = with_rows(plan, plan.computed[plan.computed < lane.private])
        yield Compute([*bases, *first], [*nobody, *range(len(lanes))])
        seats = [lane.seat for lane in collective]
        if look == "deviation":  # everything up to the end of the shared text, over bases alone
            looked = [
                with_rows(plan, np.arange(lane.private, lane.run.stop))
                for lane in collective
                for plan in [_without_patches(lanes[lane.seat])]
            ]
        else:  # the agent's own text behind the first shared text
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
        """Chooses pages by their scores, and puts patches into the lanes' tables."""
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
        """Makes the agent of the lowest summed deviation the Master; gives its base's lane.

        The Master's base goes on where the Master's private text ends. Everybody's entries move
        over to its pages, in the frames of its positions. There is no Master, and no lane, where
        the context holds nobody's private text and the bundle.
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
        # Of equal sums the lowest seat's (papers leave it open).
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
    """The same lane as it reads bases alone."""
    return dataclasses.replace(plan, page=np.where(plan.base > 0, plan.base, plan.page))

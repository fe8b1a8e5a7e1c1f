"""The KV Collector: the shared text of a round computed once, and read by everybody.

The unit of reuse is the round (TokenDance, arXiv 2604.03143, section 4.2). Its shared segments form
a bundle, which is computed once behind a neutral preamble; agents read the base through entries
(page, frame) of their block tables, so no key is rotated again and no page is copied.
"""

import dataclasses
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Int32

from tokendance_jax.collector.bases import Placed, content_key
from tokendance_jax.collector.exact import pages_for
from tokendance_jax.collector.lane import LanePlan, with_rows
from tokendance_jax.collector.order import canonical_order
from tokendance_jax.collector.parts import Part, Run, asked_until, parts_of, run_of, shared_keys
from tokendance_jax.collector.policy import (
    NOBODY,
    Compute,
    Look,
    OpenRound,
    Scores,
    Steps,
    no_steps,
)
from tokendance_jax.collector.reuse import BaseReuse
from tokendance_jax.collector.selection import Scored, Selection, deviations
from tokendance_jax.collector.table import agent_table
from tokendance_jax.paged.page_pool import PagePool
from tokendance_jax.prompt.tokenized import TokenizedPrompt, TokenSpan

Base = Literal["joint", "joint-agent", "alone", "isolated"]
BASES: tuple[str, ...] = get_args(Base)

# Fewer tokens in common than this are no preamble: they name the first agent or quote a template.
_LEAST_PREAMBLE = 16
_NO_TOKENS = _NO_PAGES = np.zeros(0, np.int32)


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
          salt: secret of a tenant.

        Raises:
          ValueError: if there is no such base, or it does not go with the selection.
        """
        if base not in BASES:
            raise ValueError(f"base: {base!r} is unknown; choose one of {', '.join(BASES)}")
        if base == "joint-agent" and selection.look is not None:
            raise ValueError(
                "selection: base 'joint-agent' has a look of its own; choose head, none, own or all"
            )
        kind = "joint" if base == "joint-agent" else base
        super().__init__(pool, page_size, namespace, kind=kind, salt=salt)
        self._base = base
        self._selection = selection
        self._preamble = preamble
        look = "deviation" if base == "joint-agent" else selection.look
        self.programs = ("prefill",) if look is None else ("prefill", look)
        self.bases = 1 if base.startswith("joint") else sys.maxsize

    def open(self, prompts: Sequence[TokenizedPrompt], rooms: Sequence[int]) -> OpenRound:
        """Takes the bases' pages, then every agent's; see `Policy.open`."""
        opened = _OpenCollective([], [], [], 0, no_steps())
        try:
            together = [prompt for prompt in prompts if prompt.fidelity == "collective"]
            placed = self._open_bases(opened, together)
            for seat, (prompt, room) in enumerate(zip(prompts, rooms, strict=True)):
                parts = self._parts(prompt, placed) if prompt.fidelity == "collective" else []
                if any(part.placed is not None for part in parts):
                    opened.lanes.append(self._open_lane(opened, seat, prompt, room, parts))
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

    def _open_bases(
        self, opened: _OpenCollective, prompts: Sequence[TokenizedPrompt]
    ) -> dict[bytes, Placed]:
        """Opens the base lanes of the round's bundle; gives the place of each of its segments."""
        sequences = shared_keys(prompts)
        segments = {
            content_key(ids): ids
            for prompt in prompts
            for span in prompt.spans
            for ids in [prompt.token_ids[span.start : span.stop]]
        }
        order = canonical_order(sequences)
        if not order:
            return {}
        preamble = _NO_TOKENS if self._base == "isolated" else self._preamble_of(prompts)
        opened.preamble_tokens = len(preamble)
        together = self._base.startswith("joint")
        placed: dict[bytes, Placed] = {}
        for group in [order] if together else [[key] for key in order]:
            lane, places = self._store.open(preamble, [segments[key] for key in group])
            opened.bases.append(lane)
            placed.update(zip(group, places, strict=True))
        if self._base == "joint-agent":
            context = pages_for(len(preamble), self._page_size)
            opened.reserved = self._pool.allocate(len(opened.bases[0].page) - context)
        return placed

    def _preamble_of(self, prompts: Sequence[TokenizedPrompt]) -> Int32[np.ndarray, " preamble"]:
        """The leading system text that all agents have in common, else the configured one.

        Nothing stands in front of the bases where all prompts begin with shared text: then they
        are computed where the agents have them.
        """
        leading = [_leading_system(prompt) for prompt in prompts]
        if all(prompt.spans[0].kind == "shared" for prompt in prompts):
            return _NO_TOKENS
        least = min(map(len, leading))
        equal = np.all([ids[:least] == leading[0][:least] for ids in leading], axis=0)
        common = least if equal.all() else int(np.argmin(equal))
        # The leading text of one agent is not neutral.
        if len(prompts) > 1 and common >= _LEAST_PREAMBLE:
            return leading[0][:common]
        return self._preamble

    def _parts(self, prompt: TokenizedPrompt, placed: Mapping[bytes, Placed]) -> list[Part]:
        def place(span: TokenSpan, key: bytes, token_ids: Int32[np.ndarray, " _"]) -> Placed | None:
            if span.kind in ("shared", "task"):
                return placed.get(key)
            if span.kind == "history":  # a quote of what was shared, in this round or an older one
                return placed.get(key) or self._store.find(token_ids)
            return None

        return parts_of(prompt, place)

    def _open_lane(
        self,
        opened: _OpenCollective,
        seat: int,
        prompt: TokenizedPrompt,
        room: int,
        parts: Sequence[Part],
    ) -> LanePlan:
        """Takes an agent's pages: exact hits, new pages of its own, patches, and base pages."""
        size, ids = self._page_size, prompt.token_ids
        private = parts[0].stop if parts[0].placed is None else 0
        run = run_of(parts)
        chosen = self._selection.pick(run, size)
        # Patches that go on where the private text ends are exact, and may be found again.
        # Behind more of the agent's own text, or where a Master moves them, they are not found.
        first = np.cumsum(run.offset == 0) == 1
        head = 0 if self._base == "joint-agent" else _leading(chosen[first])
        full, rest = divmod(private, size)
        blocks = self._cache.split(ids[:private])
        if head:
            blocks += [ids[private - rest : private].tobytes()] * (rest > 0)
            blocks += [_patch_block(ids, run, entry) for entry in range(head)]
        hit = self._cache.match_blocks(blocks)

        own = sum(part.stop - part.start for part in parts if part.placed is None) + room
        # A partial page that is found again is not written: own text goes on in a new page.
        gap = size - rest if rest and len(hit) > full else 0
        own_hits = min(len(hit), full + (gap > 0))
        own_pages = pages_for(own + gap, size)
        spare = 0
        if self._selection.look is not None:  # a page may be shown several times
            times = np.sort(np.unique(run.page, return_counts=True)[1])[::-1]
            spare = int(times[: self._selection.pages].sum())
        patches = int(chosen.sum())
        fresh = own_pages - own_hits + patches - (len(hit) - own_hits) + spare
        # Quoted bases may be evictable: hold them before new pages are taken, those that patches
        # replace as well, as no patch is the page that it replaces.
        self._pool.retain(run.page)
        try:
            page = self._pool.extend(hit, fresh)
        except BaseException:
            self._pool.release(run.page)
            raise
        self._pool.release(run.page[chosen])
        own_page = np.concatenate([page[:own_hits], page[len(hit) :][: own_pages - own_hits]])
        page = np.concatenate([page[own_hits : len(hit)], page[len(hit) + own_pages - own_hits :]])
        patch_page, spare_page = page[:patches], page[patches:]
        self._cache.insert_blocks(
            blocks, np.concatenate([own_page[: full + (head > 0 and rest > 0)], patch_page[:head]])
        )

        shown = run.page.copy()
        shown[chosen] = patch_page
        table, at = agent_table(
            parts, run, shown, own_page, room=room, gap_at=private, gap=gap, page_size=size
        )
        hit_tokens = min(len(hit), full) * size
        if len(hit) > full:
            found = len(hit) - full - (rest > 0)
            hit_tokens = private + int(run.slots[:found].sum())
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
        nobody = [NOBODY] * len(opened.bases)
        look = self._selection.look
        if self._base == "joint-agent" and opened.bases:
            look = "deviation"
        if look is None or not collective:
            yield Compute([*opened.bases, *lanes], [*nobody, *range(len(lanes))])
            return
        # First what does not depend on the choice: bases, private text, exact agents.
        first = list(lanes)
        for lane in collective:
            plan = lanes[lane.seat]
            first[lane.seat] = with_rows(plan, plan.computed[plan.computed < lane.private])
        yield Compute([*opened.bases, *first], [*nobody, *range(len(lanes))])
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
            before = [self._rebase(opened, scores)]
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

    def _rebase(self, opened: _OpenCollective, scores: Scores) -> LanePlan:
        """Makes the agent of the lowest summed deviation the Master; gives its base's lane.

        The Master's base goes on where the Master's private text ends. Everybody's entries move
        over to its pages, in the frames of its positions.
        """
        # Of equal sums the lowest seat's (papers leave it open).
        sums = [math.fsum(score.tolist()) for score in scores]
        master = opened.collective[int(np.argmin(sums))]
        plan, neutral = opened.lanes[master.seat], opened.bases[0]
        context = pages_for(opened.preamble_tokens, self._page_size)
        private = int(np.searchsorted(np.cumsum(plan.slots), master.private, side="right"))
        page = np.concatenate([plan.page[:private], opened.reserved])
        slots = np.concatenate([plan.slots[:private], neutral.slots[context:]])
        bundle = neutral.token_ids[opened.preamble_tokens :]
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
        return base


def _leading_system(prompt: TokenizedPrompt) -> Int32[np.ndarray, " leading"]:
    """A prompt's tokens up to the first that is neither system text nor markup."""
    stop = 0
    for span in prompt.spans:
        if span.kind not in ("system", "markup"):
            break
        stop = span.stop
    return prompt.token_ids[:stop]


def _leading(chosen: Bool[np.ndarray, " entries"]) -> int:
    """How many entries at the beginning are chosen."""
    return len(chosen) if chosen.all() else int(np.argmin(chosen))


def _without_patches(plan: LanePlan) -> LanePlan:
    """The same lane as it reads bases alone."""
    return dataclasses.replace(plan, page=np.where(plan.base > 0, plan.base, plan.page))


def _patch_block(ids: Int32[np.ndarray, " tokens"], run: Run, entry: int) -> bytes:
    """What a patch of the exact head depends on beside the tokens before it."""
    start, slots = int(run.start[entry]), int(run.slots[entry])
    where = np.array([run.frame[entry], run.first[entry]], np.int32)
    return b"patch" + where.tobytes() + ids[start : start + slots].tobytes()

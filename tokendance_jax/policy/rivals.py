"""Per-request position-independent caching, as published: CacheBlend and EPIC.

Both compute every shared segment alone at position 0, cache its KV and find it again by content.
For each request they copy this KV to where the prompt needs it, rotate the copied keys by the
offset, and recompute some of the copied tokens. Each agent keeps a dense cache of its own.
"""

import abc
import dataclasses
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int32

from tokendance_jax.paged.page_pool import PagePool
from tokendance_jax.plan.lane import LanePlan, with_rows
from tokendance_jax.policy.bases import Placed, content_key
from tokendance_jax.policy.policy import (
    NOBODY,
    Compute,
    Link,
    Look,
    OpenRound,
    Rest,
    Steps,
    no_steps,
    pages_for,
)
from tokendance_jax.policy.reuse import BaseReuse
from tokendance_jax.policy.selection import deviations
from tokendance_jax.prompt.tokenized import TokenizedPrompt

_NO_TOKENS = np.zeros(0, np.int32)


@dataclasses.dataclass(slots=True, eq=False)
class _OpenRequests(OpenRound):
    """An open round.

    Attributes:
      links: the copies that the lane of a seat needs; a lane without is exact.
      placed: where each shared segment lies, by its `content_key`.
    """

    links: dict[int, Link] = dataclasses.field(default_factory=dict)
    placed: dict[bytes, Placed] = dataclasses.field(default_factory=dict)


class PerRequest(BaseReuse):
    """The common part of `Blend` and `Epic`: isolated bases, dense lanes, links between them."""

    programs = ("prefill", "link")
    bases = sys.maxsize

    def __init__(self, pool: PagePool, page_size: int, namespace: str, *, salt: bytes = b""):
        """Makes the policy with empty caches.

        Args:
          pool: the page pool.
          page_size: token slots in a page.
          namespace: what K and V depend on besides the tokens.
          salt: secret of a tenant.
        """
        super().__init__(pool, page_size, namespace, kind="isolated", salt=salt)

    def open(
        self,
        prompts: Sequence[TokenizedPrompt],
        rooms: Sequence[int],
        limits: Sequence[int] | None = None,
        *,
        patient: bool = False,
    ) -> OpenRound:
        """Takes the bases' pages, then a dense lane for every agent; see `Policy.open`."""
        del limits, patient
        opened = _OpenRequests([], [], [], 0, no_steps())
        try:
            self._open_bases(opened, prompts)
            # Take exact agents first, because they are computed first: a lane finds pages of lanes
            # that were taken before it.
            seats = sorted(range(len(prompts)), key=lambda seat: any(_shared(prompts[seat])))
            for seat in seats:
                self._take(opened, prompts[seat], rooms[seat])
        except BaseException:
            self._abandon(opened)
            raise
        places = np.argsort(seats).tolist()
        opened.lanes = [opened.lanes[at] for at in places]
        opened.exact_hits = [opened.exact_hits[at] for at in places]
        opened.links = {seats[at]: link for at, link in opened.links.items()}
        opened.steps = self._steps(opened, opened.bases, range(len(prompts)))
        return opened

    def join(self, opened: OpenRound, prompt: TokenizedPrompt, room: int, limit: int) -> Steps:
        """Takes the pages of one more lane, and of segments that have none; see `Policy.join`."""
        del limit
        assert isinstance(opened, _OpenRequests)
        before, placed = len(opened.bases), dict(opened.placed)
        try:
            self._open_bases(opened, [prompt])
            seat = self._take(opened, prompt, room)
        except BaseException:
            for lane in opened.bases[before:]:
                self._store.close(lane, failed=True)
            del opened.bases[before:]
            opened.placed = placed
            raise
        return self._steps(opened, opened.bases[before:], [seat])

    def _resume(self, opened: OpenRound, seat: int, prompt: TokenizedPrompt, room: int) -> Steps:
        """Takes new pages, and copies the shared text again; see `Policy.resume`."""
        assert isinstance(opened, _OpenRequests)
        if seat in opened.links:
            taken = self._link_lane(prompt, room, opened.placed)
            lane, opened.exact_hits[seat], opened.links[seat] = taken
        else:
            lane = self._exact.open_lane(prompt.token_ids, room)
        opened.lanes[seat] = lane
        return self._steps(opened, [], [seat])

    def _forked(self, opened: OpenRound, seat: int, lane: LanePlan) -> None:
        assert isinstance(opened, _OpenRequests)
        super()._forked(opened, seat, lane)
        if seat in opened.links:
            opened.links[len(opened.lanes) - 1] = opened.links[seat]

    def _reusing(self, opened: OpenRound) -> Collection[int]:
        assert isinstance(opened, _OpenRequests)
        return opened.links

    def _open_bases(self, opened: _OpenRequests, prompts: Sequence[TokenizedPrompt]) -> None:
        """Takes the pages of shared segments that the round does not hold."""
        for prompt in prompts:
            for key, ids in _shared(prompt):
                if key not in opened.placed:
                    lane, (opened.placed[key],) = self._store.open(_NO_TOKENS, [ids])
                    opened.bases.append(lane)

    def _take(self, opened: _OpenRequests, prompt: TokenizedPrompt, room: int) -> int:
        """Takes an agent's pages, and returns its seat."""
        if any(_shared(prompt)):
            lane, hits, link = self._link_lane(prompt, room, opened.placed)
            seat = opened.add(lane, hits)
            opened.links[seat] = link
            return seat
        return self._exact.take(opened, prompt, room)

    def _link_lane(
        self, prompt: TokenizedPrompt, room: int, placed: Mapping[bytes, Placed]
    ) -> tuple[LanePlan, int, Link]:
        """Opens a dense lane that computes its own text.

        Returns:
          The lane, the number of its leading tokens that are read from exact pages, and the copies
          of its shared text.
        """
        ids = prompt.token_ids
        spans = [span for span in prompt.spans if span.kind == "shared"]
        blocks = self._cache.split(ids[: spans[0].start])
        hit = self._cache.match_blocks(blocks)
        wanted = pages_for(len(ids) + room, self._page_size)
        page = self._pool.extend(hit, wanted - len(hit))
        self._cache.insert_blocks(blocks, page)

        hits = len(hit) * self._page_size
        lane = LanePlan.contiguous(ids, page, computed_from=hits, page_size=self._page_size)
        own = np.ones(len(ids), np.bool_)
        own[:hits] = False
        own[-1:] = True
        source, shift = np.zeros((2, len(ids)), np.int32)
        for span in spans:
            place = placed[content_key(ids[span.start : span.stop])]
            source[span.start : span.stop] = place.slot(self._page_size)
            shift[span.start : span.stop] = span.start - place.canonical
            own[span.start : span.stop] = False
        copied = np.concatenate([np.arange(s.start, s.stop, dtype=np.int32) for s in spans])
        target, _ = lane.locate(copied, self._page_size)
        link = Link(source[copied], target, shift[copied])
        return with_rows(lane, np.flatnonzero(own)), hits, link

    def _first(
        self, opened: _OpenRequests, bases: Sequence[LanePlan], seats: Sequence[int]
    ) -> Steps:
        """Yields the step before the links, which computes bases and exact agents."""
        exact = [seat for seat in seats if seat not in opened.links]
        if bases or exact:
            lanes = [*bases, *(opened.lanes[seat] for seat in exact)]
            yield Compute(lanes, [*[NOBODY] * len(bases), *exact])

    @abc.abstractmethod
    def _steps(
        self, opened: _OpenRequests, bases: Sequence[LanePlan], seats: Sequence[int]
    ) -> Steps:
        """Yields the steps that compute some seats, and bases before them."""


class Epic(PerRequest):
    """EPIC's LegoLink-k (arXiv 2410.15332): recomputes the first k tokens of every segment.

    All requests of the round are linked and computed together.
    """

    def __init__(
        self, pool: PagePool, page_size: int, namespace: str, *, tokens: int = 16, salt: bytes = b""
    ):
        """Makes the policy; see `PerRequest`.

        Args:
          pool: the page pool.
          page_size: token slots in a page.
          namespace: what K and V depend on besides the tokens.
          tokens: number of leading tokens of each segment that are recomputed.
          salt: secret of a tenant.

        Raises:
          ValueError: the number of tokens is negative.
        """
        if tokens < 0:
            raise ValueError(f"epic_tokens: {tokens} is negative; give 0 or more")
        super().__init__(pool, page_size, namespace, salt=salt)
        self._tokens = tokens

    def _link_lane(
        self, prompt: TokenizedPrompt, room: int, placed: Mapping[bytes, Placed]
    ) -> tuple[LanePlan, int, Link]:
        lane, hits, link = super()._link_lane(prompt, room, placed)
        heads = [
            np.arange(span.start, min(span.start + self._tokens, span.stop), dtype=np.int32)
            for span in prompt.spans
            if span.kind == "shared"
        ]
        rows = np.sort(np.concatenate([lane.computed, *heads]))
        return with_rows(lane, rows), hits, link

    def _steps(
        self, opened: _OpenRequests, bases: Sequence[LanePlan], seats: Sequence[int]
    ) -> Steps:
        yield from self._first(opened, bases, seats)
        linked = [seat for seat in seats if seat in opened.links]
        if linked:
            yield join_links([opened.links[seat] for seat in linked])
            yield Compute([opened.lanes[seat] for seat in linked], linked)


class Blend(PerRequest):
    """CacheBlend (arXiv 2405.16444): recomputes tokens whose K and V deviate at layer 1.

    All tokens of a request run through layer 0, and their K and V at layer 1 are computed. The
    shared tokens that deviate most from the cached ones then continue through the layers, together
    with the request's own text.
    """

    programs = ("prefill", "link", "deviation", "rest")

    def __init__(
        self,
        pool: PagePool,
        page_size: int,
        namespace: str,
        *,
        ratio: float = 0.15,
        batched: bool = False,
        salt: bytes = b"",
    ):
        """Makes the policy; see `PerRequest`.

        Args:
          pool: the page pool.
          page_size: token slots in a page.
          namespace: what K and V depend on besides the tokens.
          ratio: fraction of a request's shared tokens that are recomputed.
          batched: whether the round's requests are computed together instead of one after another.
          salt: secret of a tenant.

        Raises:
          ValueError: the ratio is not from 0 to 1.
        """
        if not 0 <= ratio <= 1:
            raise ValueError(f"blend_ratio: {ratio} is not a fraction; give a number from 0 to 1")
        super().__init__(pool, page_size, namespace, salt=salt)
        self._ratio = ratio
        self._batched = batched

    def _steps(
        self, opened: _OpenRequests, bases: Sequence[LanePlan], seats: Sequence[int]
    ) -> Steps:
        yield from self._first(opened, bases, seats)
        linked = [seat for seat in seats if seat in opened.links]
        for some in [linked] if self._batched else [[seat] for seat in linked]:
            if some:
                yield from self._blend(opened, some)

    def _blend(self, opened: _OpenRequests, seats: Sequence[int]) -> Steps:
        """Links some requests, and recomputes the shared tokens that deviate most."""
        yield join_links([opened.links[seat] for seat in seats])
        lanes = [opened.lanes[seat] for seat in seats]
        starts = [opened.exact_hits[seat] for seat in seats]
        everything = [
            with_rows(lane, np.arange(start, len(lane.token_ids)))
            for lane, start in zip(lanes, starts, strict=True)
        ]
        scores = yield Look("deviation", everything, seats, resume=True)
        assert scores is not None
        for seat, lane, start, square in zip(seats, lanes, starts, scores, strict=True):
            shared = np.setdiff1d(np.arange(start, len(lane.token_ids)), lane.computed)
            (score,) = deviations([square[:, shared - start]])
            # A stable sort prefers the earlier of two tokens with equal scores.
            most = np.argsort(-score, kind="stable")[: int(self._ratio * len(shared))]
            opened.lanes[seat] = with_rows(lane, np.union1d(lane.computed, shared[most]))
        yield Rest([opened.lanes[seat] for seat in seats], seats)


def join_links(links: Sequence[Link]) -> Link:
    """Joins several links into one step."""
    columns = zip(*((link.source, link.target, link.shift) for link in links), strict=True)
    return Link(*(np.concatenate(column) for column in columns))


def _shared(prompt: TokenizedPrompt) -> Iterator[tuple[bytes, Int32[np.ndarray, " _"]]]:
    """Yields keys and tokens of the segments that a prompt links; none if its agent is exact."""
    for span in prompt.spans:
        if span.kind == "shared" and prompt.fidelity == "collective":
            ids = prompt.token_ids[span.start : span.stop]
            yield content_key(ids), ids

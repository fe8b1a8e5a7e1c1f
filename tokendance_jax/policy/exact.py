"""The exact policies: a page is read only in the context in which it was computed."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from tokendance_jax.paged.page_pool import PagePool
from tokendance_jax.paged.prefix_cache import PrefixCache
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.policy.policy import OpenRound, Policy, Steps, compute, no_steps, pages_for
from tokendance_jax.prompt.tokenized import TokenizedPrompt


class Exact(Policy):
    """A policy that opens and closes lanes one by one; all lanes are exact."""

    def open_lane(
        self, token_ids: Int32[np.ndarray, " tokens"], room: int, answer_tokens: int = 0
    ) -> LanePlan:
        """Takes pages for a prompt and `room` more tokens.

        Args:
          token_ids: the prompt.
          room: how many more tokens the lane must have room for.
          answer_tokens: number of tokens at the end that are computed even if they are cached.

        Raises:
          OutOfPages: the pool cannot allocate them; no reference is held then.
        """
        raise NotImplementedError

    def close_lane(self, lane: LanePlan, written: Int32[np.ndarray, " written"] | None) -> None:
        """Releases a lane's pages.

        Args:
          lane: an open lane.
          written: the tokens whose K and V were written, in logical order; None if the round failed
            and the pages may hold anything.
        """
        raise NotImplementedError

    def open(
        self,
        prompts: Sequence[TokenizedPrompt],
        rooms: Sequence[int],
        limits: Sequence[int] | None = None,
        *,
        patient: bool = False,
    ) -> OpenRound:
        """Opens a lane for each agent; see `Policy.open`."""
        del limits, patient
        opened = OpenRound([], [], [], 0, no_steps())
        try:
            for prompt, room in zip(prompts, rooms, strict=True):
                self.take(opened, prompt, room)
        except BaseException:
            self._abandon(opened)
            raise
        opened.steps = compute(opened, range(len(prompts)))
        return opened

    def join(self, opened: OpenRound, prompt: TokenizedPrompt, room: int, limit: int) -> Steps:
        """Opens one more lane; see `Policy.join`."""
        del limit
        return compute(opened, [self.take(opened, prompt, room)])

    def take(self, opened: OpenRound, prompt: TokenizedPrompt, room: int) -> int:
        """Opens a lane of a round, which may be another policy's; returns its seat."""
        lane = self.open_lane(prompt.token_ids, room, prompt.answer_tokens)
        return opened.add(lane, int(lane.computed[0]))

    def _suspend(self, opened: OpenRound, seat: int, written: Int32[np.ndarray, " _"]) -> None:
        opened.lanes[seat] = self.suspend_lane(opened.lanes[seat], written)

    def _resume(self, opened: OpenRound, seat: int, prompt: TokenizedPrompt, room: int) -> Steps:
        opened.lanes[seat] = self.open_lane(prompt.token_ids, room)
        return compute(opened, [seat])

    def suspend_lane(self, lane: LanePlan, written: Int32[np.ndarray, " written"]) -> LanePlan:
        """Releases a lane's pages; returns the lane without pages."""
        self.close_lane(lane, written)
        return dataclasses.replace(lane, page=np.zeros_like(lane.page))

    def _release_lane(
        self, opened: OpenRound, seat: int, written: Int32[np.ndarray, " _"] | None
    ) -> None:
        self.close_lane(opened.lanes[seat], written)


class Dense(Exact):
    """Every agent computes its whole prompt into pages of its own."""

    def open_lane(
        self, token_ids: Int32[np.ndarray, " tokens"], room: int, answer_tokens: int = 0
    ) -> LanePlan:
        """Takes fresh pages; see `Exact.open_lane`."""
        del answer_tokens
        pages = self._pool.allocate(pages_for(len(token_ids) + room, self._page_size))
        return LanePlan.contiguous(token_ids, pages, computed_from=0, page_size=self._page_size)

    def close_lane(self, lane: LanePlan, written: Int32[np.ndarray, " written"] | None) -> None:
        """Frees the pages; see `Exact.close_lane`."""
        del written
        self._pool.release(lane.page)


class Prefix(Exact):
    """Reuses full pages whose whole prefix is equal, across agents and rounds.

    This works like vLLM's automatic prefix caching. Blocks are registered when a lane opens,
    before they are computed. So the table of an agent may name a page that an earlier agent's rows
    write in the same call: at each layer, all rows write before any row attends.
    """

    def __init__(self, pool: PagePool, cache: PrefixCache, page_size: int):
        super().__init__(pool, page_size)
        self._cache = cache

    def open_lane(
        self, token_ids: Int32[np.ndarray, " tokens"], room: int, answer_tokens: int = 0
    ) -> LanePlan:
        """Takes the longest cached prefix and fresh pages after it; see `Exact.open_lane`."""
        hit = self._cache.match(token_ids[: len(token_ids) - answer_tokens])
        wanted = pages_for(len(token_ids) + room, self._page_size)
        pages = self._pool.extend(hit, wanted - len(hit))
        self._cache.insert(token_ids, pages)
        return LanePlan.contiguous(
            token_ids,
            pages,
            computed_from=len(hit) * self._page_size,
            page_size=self._page_size,
        )

    def close_lane(self, lane: LanePlan, written: Int32[np.ndarray, " written"] | None) -> None:
        """Keeps full written pages for later rounds; see `Exact.close_lane`."""
        if written is None:
            for first in lane.computed[:1]:  # a forked lane computed nothing
                self._cache.forget(lane.page[first // self._page_size :])
        else:
            self._cache.insert(written, lane.page)
        self._pool.release(lane.page)

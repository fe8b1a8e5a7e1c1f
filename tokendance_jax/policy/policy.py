"""The interface of policies: a policy opens a round as lanes and steps, and releases its lanes."""

import abc
import dataclasses
from collections.abc import Generator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int32

from tokendance_jax.paged.page_pool import PagePool
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.prompt.tokenized import TokenizedPrompt

# The seat of a base's lane, which belongs to no agent.
NOBODY = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Compute:
    """Computes the rows of lanes, through all layers.

    Attributes:
      lanes: the lanes, in an order in which they may read each other: of the pages written in this
        step, a lane reads those that it writes itself or that earlier lanes write.
      seats: the agent of each lane, or `NOBODY`.
    """

    lanes: Sequence[LanePlan]
    seats: Sequence[int]


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """Copies K and V between slots, and rotates keys to the position of the copy.

    Attributes:
      source: slot (page * page_size + offset) to read.
      target: slot to write.
      shift: position of the copy minus position of the source.
    """

    source: Int32[np.ndarray, " slots"]
    target: Int32[np.ndarray, " slots"]
    shift: Int32[np.ndarray, " slots"]


@dataclasses.dataclass(frozen=True, slots=True)
class Look:
    """Scores rows, so that the policy can choose which of them to compute.

    The rows run through the first layers and are then compared with the pages in their lanes'
    tables. Rows whose slots are in pages of the lane's own write their K and V of these layers;
    rows whose slots are in base pages do not. The scores are sent back into the policy's steps,
    one array per lane.

    Attributes:
      what: the kind of scores. "deviation": the squared changes of each row's K and V at layer 1,
        f32 [2, rows]. "attention": how much the rows attend to each table entry in a middle layer,
        f32 [entries].
      lanes: the lanes; `computed` names the rows.
      seats: the agent of each lane.
      resume: whether a `Rest` step continues the rows after layer 0.
    """

    what: Literal["deviation", "attention"]
    lanes: Sequence[LanePlan]
    seats: Sequence[int]
    resume: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Rest:
    """Runs some rows of the preceding `Look` through layer 1 and the layers after it.

    Attributes:
      lanes: the lanes of that `Look` in the same order; `computed` names the rows to continue.
      seats: the agent of each lane.
    """

    lanes: Sequence[LanePlan]
    seats: Sequence[int]


Step = Compute | Link | Look | Rest
Scores = list[Float32[np.ndarray, "..."]]
Steps = Generator[Step, Scores | None, None]


def pages_for(tokens: int, page_size: int) -> int:
    """Returns the number of pages that hold so many tokens."""
    return -(-tokens // page_size)


def no_steps() -> Steps:
    """Yields no steps."""
    yield from ()


def compute(opened: "OpenRound", seats: Sequence[int]) -> Steps:
    """Yields one step that computes the lanes of some seats."""
    yield Compute([opened.lanes[seat] for seat in seats], seats)


@dataclasses.dataclass(slots=True, eq=False)
class OpenRound:
    """A round whose pages are taken.

    Attributes:
      lanes: the lanes by seat: those of the round's agents in order, then those that joined later.
        Their tables may change until all steps are done; after that they hold the prompt and room
        for the answer. A suspended lane has page 0 where it gave up its own pages.
      bases: lanes of bases that the round holds.
      exact_hits: number of leading tokens of each prompt that are read from exact pages.
      preamble_tokens: number of tokens of the neutral preamble in front of the bases.
      steps: what the device has to do, in order. The scores of each `Look` are sent into the
        generator.
      left: number of leading entries of the bases' tables whose pages were released when all steps
        were done; these entries hold a preamble. Later rounds can still find the pages, but this
        round no longer reads them.
      held: seats that are not released yet. The bases are released with the last of them.
      suspended: those of them that gave up their own pages.
      failed: whether the bases may hold anything, so that later rounds must not find them.
    """

    lanes: list[LanePlan]
    bases: list[LanePlan]
    exact_hits: list[int]
    preamble_tokens: int
    steps: Steps
    left: int = 0
    held: set[int] = dataclasses.field(default_factory=set)
    suspended: set[int] = dataclasses.field(default_factory=set)
    failed: bool = False

    def add(self, lane: LanePlan, exact_hits: int) -> int:
        """Adds a lane whose pages are taken, and returns its seat."""
        seat = len(self.lanes)
        self.lanes.append(lane)
        self.exact_hits.append(exact_hits)
        self.held.add(seat)
        return seat

    @property
    def base_pages(self) -> Int32[np.ndarray, " references"]:
        """Pages that the bases hold, with one occurrence per reference."""
        pages = [lane.page[self.left :] for lane in self.bases]
        return np.concatenate(pages) if pages else np.zeros(0, np.int32)


class Policy(abc.ABC):
    """Decides which pages lanes take and which rows they compute; host only.

    A round is opened as a whole. From then on each seat has a life of its own: it grows, may be
    suspended and resumed, and is released when its answer ends. Others may join.

    A round may be opened or joined only when all steps of the rounds before are done, because
    caches offer a page as soon as it is taken.

    Attributes:
      programs: names of the programs that its steps may need, which are compiled in advance.
      bases: most lanes of bases that it computes together with the agents' lanes.
      frames: most changes of frame that an agent's table is expected to have.
    """

    programs: tuple[str, ...] = ("prefill",)
    bases: int = 0
    frames: int = 0

    def __init__(self, pool: PagePool, page_size: int):
        self._pool = pool
        self._page_size = page_size

    @abc.abstractmethod
    def open(
        self,
        prompts: Sequence[TokenizedPrompt],
        rooms: Sequence[int],
        limits: Sequence[int] | None = None,
        *,
        patient: bool = False,
    ) -> OpenRound:
        """Takes the pages of a round.

        Args:
          prompts: the agents' prompts.
          rooms: for each lane, how many more tokens it must have room for.
          limits: for each lane, how many more tokens it may grow by; None: `rooms`.
          patient: whether pages will be released later, so that it is better to wait for them than
            to serve the round exactly because its bases do not fit.

        Raises:
          OutOfPages: the pool cannot allocate them; no reference is held then.
        """

    @abc.abstractmethod
    def join(self, opened: OpenRound, prompt: TokenizedPrompt, room: int, limit: int) -> Steps:
        """Takes the pages of one more lane, which reads the bases of an open round.

        Args:
          opened: the round; it holds at least one seat. The lane gets the next seat.
          prompt: the prompt.
          room: how many more tokens the lane must have room for.
          limit: how many more tokens the lane may grow by.

        Returns:
          The steps that compute the lane.

        Raises:
          OutOfPages: the pool cannot allocate them; the round is unchanged then.
        """

    def suspend(self, opened: OpenRound, seat: int, written: Int32[np.ndarray, " _"]) -> None:
        """Releases the pages that only this lane needs; the round keeps its bases.

        Args:
          opened: an open round.
          seat: a seat that it holds.
          written: the tokens whose K and V were written, in logical order.
        """
        self._suspend(opened, seat, written)
        opened.suspended.add(seat)

    def resume(self, opened: OpenRound, seat: int, prompt: TokenizedPrompt, room: int) -> Steps:
        """Takes pages for a suspended lane again.

        Args:
          opened: an open round.
          seat: the suspended seat.
          prompt: its prompt, followed by the tokens of its answer.
          room: how many more tokens the lane must have room for.

        Returns:
          The steps that compute what the lane gave up.

        Raises:
          OutOfPages: the pool cannot allocate them; the lane stays suspended then.
        """
        steps = self._resume(opened, seat, prompt, room)
        opened.suspended.remove(seat)
        return steps

    def grow(self, opened: OpenRound, seat: int, tokens: int) -> None:
        """Takes pages until a lane has room for `tokens` tokens, prompt and answer together.

        Raises:
          OutOfPages: the pool cannot allocate them; the lane is unchanged then.
        """
        lane = opened.lanes[seat]
        missing = tokens - lane.room(self._page_size)
        pages = self._pool.allocate(pages_for(max(0, missing), self._page_size))
        opened.lanes[seat] = lane.extended(pages, self._page_size)

    def reserve(self, room: int) -> Int32[np.ndarray, " pages"]:
        """Takes the pages that `fork` needs for a lane with room for `room` more tokens.

        Raises:
          OutOfPages: the pool cannot allocate them.
        """
        return self._pool.allocate(1 + pages_for(room, self._page_size))

    def fork(self, opened: OpenRound, seat: int, pages: Int32[np.ndarray, " pages"]) -> Link:
        """Adds a lane that shares all pages of another lane's prompt; it gets the next seat.

        Only the page where the answer begins is copied, if the prompt fills a part of it.

        Args:
          opened: an open round whose steps are done.
          seat: the lane to share; nothing of its answer is written yet.
          pages: pages from `reserve`. The lane keeps them.

        Returns:
          The copy.
        """
        lane, size = opened.lanes[seat], self._page_size
        entry, offset, _ = lane.entry_of(len(lane.token_ids) - 1)
        last, stop = int(entry), int(offset) + 1
        first = int(lane.first[last])
        whole = stop == size
        kept = lane.cut(last + whole)
        copied = np.arange(first, first if whole else stop, dtype=np.int32)
        self._pool.retain(kept.page)
        fork = kept.extended(pages, size, first=None if whole else first)
        self._forked(opened, seat, fork)
        source, target = lane.page[last] * size + copied, fork.page[last] * size + copied
        return Link(source, target, np.zeros_like(copied))

    def _forked(self, opened: OpenRound, seat: int, lane: LanePlan) -> None:
        """Adds a lane that shares the pages of `seat`."""
        nothing = np.zeros(0, np.int32)
        lane = dataclasses.replace(lane, computed=nothing)
        opened.add(lane, opened.exact_hits[seat])

    def release(
        self, opened: OpenRound, seat: int, written: Int32[np.ndarray, " _"] | None
    ) -> None:
        """Releases the pages of a lane, and with the last lane those of the bases.

        Args:
          opened: an open round.
          seat: a seat that it holds.
          written: the tokens whose K and V were written, in logical order; None if the lane failed
            and its pages may hold anything. For a suspended lane this does not matter.
        """
        opened.held.remove(seat)
        if seat in opened.suspended:
            lane = opened.lanes[seat]
            self._pool.release(lane.page[lane.page > 0])
        else:
            self._release_lane(opened, seat, written)
        if not opened.held:
            self._release_bases(opened)

    def close(self, opened: OpenRound, written: Sequence[Int32[np.ndarray, " _"]] | None) -> None:
        """Releases all lanes of a round, and its bases.

        Args:
          opened: an open round.
          written: for each seat, as for `release`; None if the round failed.
        """
        opened.failed |= written is None
        for seat in sorted(opened.held):
            self.release(opened, seat, None if written is None else written[seat])

    def _abandon(self, opened: OpenRound) -> None:
        """Releases what was taken for a round that cannot be opened."""
        self.close(opened, None)
        if not opened.lanes:
            self._release_bases(opened)

    @abc.abstractmethod
    def _release_lane(
        self, opened: OpenRound, seat: int, written: Int32[np.ndarray, " _"] | None
    ) -> None: ...

    @abc.abstractmethod
    def _suspend(self, opened: OpenRound, seat: int, written: Int32[np.ndarray, " _"]) -> None: ...

    @abc.abstractmethod
    def _resume(
        self, opened: OpenRound, seat: int, prompt: TokenizedPrompt, room: int
    ) -> Steps: ...

    def _release_bases(self, opened: OpenRound) -> None:
        """Releases the bases."""
        assert not opened.bases

    def base_pages(self) -> Int32[np.ndarray, " pages"]:
        """Returns the pages of the bases that later rounds may read."""
        return np.zeros(0, np.int32)

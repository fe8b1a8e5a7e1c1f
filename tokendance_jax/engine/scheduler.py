"""The scheduler: which sequences hold pages, and what the device does next."""

import bisect
from typing import Literal

import numpy as np
from jaxtyping import Int32

from tokendance_jax.engine.admission import Admission, QueueFull
from tokendance_jax.engine.counters import Counters
from tokendance_jax.engine.sequence import Handle, Sequence
from tokendance_jax.paged.page_pool import OutOfPages, PagePool
from tokendance_jax.policy.policy import Link, OpenRound, Policy, Steps

Unit = Literal["prefill", "decode"]


class Scheduler:
    """Admits sequences in order of priority and arrival, and alternates prefill and decode calls.

    One admission is prefilled at a time, because later ones may read the pages that it computes.
    When no page is left for an answer that grows, the youngest sequence of the lowest priority is
    stalled.

    Attributes:
      policy: decides what sequences share.
      pool: the pool that the policy takes pages from.
      waiting: admissions that hold no pages, in order.
      prefilling: the admission that is being computed.
      running: the sequences that decode.
      held: sequences that have ended and keep their pages (see `Handle.hold`).
      ended: sequences that the scheduler could not serve, or not to their end; the engine empties
        the list.
    """

    policy: Policy
    pool: PagePool

    def __init__(
        self,
        counts: Counters,
        *,
        slots: int,
        decode_steps: int,
        prefill_calls: int,
        max_waiting: int,
    ):
        """Starts without sequences; `reset` sets the policy.

        Args:
          counts: where stalled sequences are counted.
          slots: most sequences that decode together.
          decode_steps: tokens per sequence and decode call.
          prefill_calls: most prefill calls between two decode calls; 0: prefill comes first.
          max_waiting: most sequences that wait.
        """
        self.waiting: list[Admission] = []
        self.prefilling: Admission | None = None
        self.running: list[Sequence] = []
        self.held: list[Sequence] = []
        self.ended: list[Sequence] = []
        self._counts = counts
        self._slots = slots
        self._decode_steps = decode_steps
        self._prefill_calls = prefill_calls
        self._max_waiting = max_waiting
        self._calls = 0  # prefill calls since the last decode call

    def reset(self, policy: Policy, pool: PagePool) -> None:
        """Goes on with another pool; no sequence holds pages. Those that wait stay."""
        self.policy, self.pool = policy, pool

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.prefilling or self.running)

    def add(self, handle: Handle) -> None:
        """Lets the sequences of a handle wait for their pages.

        Raises:
          QueueFull: too many sequences wait.
        """
        waiting = sum(len(admission.sequences) for admission in self.waiting)
        if waiting and waiting + len(handle.sequences) > self._max_waiting:
            raise QueueFull(
                f"{waiting} requests wait, and at most {self._max_waiting} may: try again later, "
                "or raise max_waiting"
            )
        self._queue(Admission(handle.sequences, handle))

    def step(self) -> Unit | None:
        """Chooses the next unit of work, and takes the pages that it needs.

        Returns:
          "prefill": the next call of `prefilling`. "decode": a call for all `running` sequences.
          None: nothing can run; sequences may have been added to `ended`.
        """
        self.admit()
        patient = self._prefill_calls == 0 or self._calls < self._prefill_calls
        if self.prefilling and (patient or not self.running):
            self._calls += 1
            return "prefill"
        self._calls = 0
        self._grow()
        if self.running:
            return "decode"
        return "prefill" if self.prefilling else None

    def admit(self) -> None:
        """Admits the next that waits, unless another admission is being prefilled.

        While sequences run, only the first in order is tried, so that none is overtaken for ever.
        If nothing runs, none of the others can be waited for: the first that fits is admitted, and
        if none does, one is given up.
        """
        while not self.prefilling:
            ready = [admission for admission in self.waiting if admission.ready]
            for admission in ready[:1] if self.running else ready:
                if self._admitted(admission):
                    return
            if self.running or not ready:
                return
            # A stalled answer ends with what it has, which releases its bases. What is new never
            # fits if nothing is stalled.
            given_up = next((some for some in ready if some.resumes), ready[0])
            self.waiting.remove(given_up)
            for sequence in given_up.sequences:
                sequence.error = None if given_up.resumes else given_up.refusal
                self.ended.append(sequence)

    def _admitted(self, admission: Admission) -> bool:
        """Tries to take an admission's pages."""
        available = self.pool.free + self.pool.evictable
        if len(self.running) + len(admission.sequences) > self._slots:
            return False
        if admission.refusal and self.running and available <= admission.available:
            return False  # planning again would find the same
        try:
            self._open(admission)
        except OutOfPages as error:
            admission.refusal, admission.available = error, available
            return False
        self.waiting.remove(admission)
        self.prefilling = admission
        for sequence in admission.sequences:
            sequence.status = "prefilling"
        return True

    def prefilled(self) -> list[Sequence]:
        """Lets the sequences run whose prefill is complete, and returns them."""
        assert self.prefilling is not None
        sequences, self.prefilling = self.prefilling.sequences, None
        for sequence in sequences:
            sequence.status = "running"
        self.running += sequences
        return sequences

    def leave(self, sequence: Sequence) -> None:
        """Takes a sequence out of the queue, out of a prefill, or out of the running ones."""
        if sequence in self.running:
            self.running.remove(sequence)
        if self.prefilling and sequence in self.prefilling.sequences:
            self._drop()
        for admission in self.waiting:
            if sequence in admission.sequences:
                self.waiting.remove(admission)
                break

    def release(self, sequence: Sequence, *, keep: bool) -> None:
        """Lets a sequence leave, and releases its pages if it holds any.

        Args:
          sequence: the sequence.
          keep: whether later sequences may find its pages.
        """
        self.leave(sequence)
        if sequence in self.held:
            self.held.remove(sequence)
        opened = sequence.opened
        if opened is not None and sequence.seat in opened.held:
            opened.failed |= not keep
            self.policy.release(opened, sequence.seat, sequence.written if keep else None)

    def holders(self) -> list[Sequence]:
        """Returns all sequences that hold pages, or wait to join a round that does."""
        admissions = [some for some in self.waiting if some.resumes or some.handle.joins]
        if self.prefilling:
            admissions.append(self.prefilling)
        return [*self.running, *(one for some in admissions for one in some.sequences)]

    def _drop(self) -> None:
        """Gives up a prefill that is not complete. Its pages may hold anything."""
        assert self.prefilling is not None
        admission, self.prefilling = self.prefilling, None
        if admission.steps is not None:
            admission.steps.close()
        for pages in admission.spare:
            self.pool.release(pages)
        for sequence in admission.sequences:
            opened = sequence.opened
            if opened is not None and sequence.seat in opened.held:
                opened.failed |= admission.opens
                self.policy.release(opened, sequence.seat, None)

    def _queue(self, admission: Admission) -> None:
        bisect.insort(self.waiting, admission, key=lambda some: some.order)

    def _open(self, admission: Admission) -> None:
        """Takes the pages of an admission; if the pool cannot allocate them, none are held."""
        handle, policy = admission.handle, self.policy
        first = admission.sequences[0]
        if admission.resumes:
            assert first.opened is not None
            prompt = first.continued()
            admission.steps = policy.resume(first.opened, first.seat, prompt, first.room)
            return
        own = admission.own
        spare: list[Int32[np.ndarray, " pages"]] = []
        try:
            for sequence in admission.sequences:
                if sequence.copies is not None:
                    spare.append(policy.reserve(sequence.room))
            opened = handle.joins.opened if handle.joins else None
            if opened is not None and opened.held:
                seats = len(opened.lanes)
                steps = policy.join(opened, first.prompt, first.room, first.remaining)
            else:
                prompts, rooms = [some.prompt for some in own], [some.room for some in own]
                seats = 0
                others = bool(self.running) or any(some.resumes for some in self.waiting)
                limits = [some.remaining for some in own]
                opened = policy.open(prompts, rooms, limits, patient=others)
                steps, admission.opens = opened.steps, True
        except BaseException:
            for pages in spare:
                self.pool.release(pages)
            raise
        for seat, sequence in enumerate(own, start=seats):
            sequence.opened, sequence.seat = opened, seat
        admission.spare = spare
        admission.steps = self._with_copies(admission, opened, steps)
        handle.opened = opened
        handle.plan_s = handle.clock.lap()

    def _with_copies(self, admission: Admission, opened: OpenRound, steps: Steps) -> Steps:
        """Yields steps, then the copies for lanes that share the prompt of another lane."""
        yield from steps
        copies: list[Link] = []
        for sequence in admission.sequences:
            if sequence.copies is not None:
                pages = admission.spare.pop(0)
                copies.append(self.policy.fork(opened, sequence.copies.seat, pages))
                sequence.opened, sequence.seat = opened, len(opened.lanes) - 1
        for copy in copies:
            if len(copy.source):
                yield copy

    def _grow(self) -> None:
        """Takes the pages that the next decode call needs; stalls sequences if there are none."""
        for sequence in sorted(self.running, key=lambda some: some.order):
            needed = sequence.length + min(self._decode_steps, sequence.remaining)
            if sequence.lane.slots.sum() >= needed:
                continue
            wanted = max(needed, sequence.length + sequence.room)
            while sequence.status == "running":
                try:
                    assert sequence.opened is not None
                    self.policy.grow(sequence.opened, sequence.seat, wanted)
                    break
                except OutOfPages:
                    self._make_place(sequence)

    def _make_place(self, sequence: Sequence) -> None:
        """Stalls a sequence so that another one may grow; ends it if it is the only one."""
        victims = [some for some in self.running if some.handle.answer_room]
        victim = max(victims, key=lambda some: some.order)
        if victim is sequence and len(self.running) == 1 and not self.prefilling:
            self.running.remove(sequence)
            sequence.status = "finished"
            self.ended.append(sequence)
            return
        assert victim.opened is not None
        self.policy.suspend(victim.opened, victim.seat, victim.written)
        self.running.remove(victim)
        victim.status = "stalled"
        self._counts.stalled += 1
        self._queue(Admission([victim], victim.handle, resumes=True))

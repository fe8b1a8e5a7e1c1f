"""A device that computes no numbers. It records what the K and V of each slot would depend on.

It checks every step of a policy: a row reads only slots that were written in all layers, for the
same token at the same canonical position, and writes only to slots that nobody has written.
"""

import dataclasses
from collections import Counter

import numpy as np

from tests.policy.rounds import PAGE_SIZE
from tokendance_jax.paged import OutOfPages, PagePool
from tokendance_jax.policy.policy import NOBODY, Compute, Link, Look, Rest


@dataclasses.dataclass(frozen=True)
class Held:
    """The content of a slot.

    Attributes:
      token: its token.
      canonical: the position that its key is rotated at.
      source: a digest of everything that its K and V depend on, or None if only the lower layers
        are written.
      writer: number of the round, and seat of the agent that computed it (None for a copy).
    """

    token: int
    canonical: int
    source: int | None
    writer: tuple[int, int | None]


def row(before, token):
    """Returns the source of a token that is computed behind the prefix with digest `before`."""
    return hash((before, "row", token))


def behind(before, source):
    """Returns the digest of a prefix that is extended by a token with the given source."""
    return hash((before, source))


def exact_sources(tokens):
    """Returns the sources of a text that is computed as a whole."""
    before, sources = 0, []
    for token in tokens:
        sources.append(row(before, token))
        before = behind(before, sources[-1])
    return sources


def drawn(random):
    """Returns a function that draws random scores."""
    return lambda seat, shape: random.random(shape).astype(np.float32)


class WatchedPool(PagePool):
    """A pool that clears the slots of a page when it allocates the page."""

    def __init__(self, pages):
        super().__init__(pages)
        self.slots = {}

    def allocate(self, count):
        pages = super().allocate(count)
        for page in pages.tolist():
            for offset in range(PAGE_SIZE):
                self.slots.pop(page * PAGE_SIZE + offset, None)
        return pages


class Device:
    """The content of a pool's slots."""

    def __init__(self, pages):
        self.pool = WatchedPool(pages)
        self.rounds = 0
        self.computed = Counter()  # rows by seat, in the last round
        self._slots = self.pool.slots

    def run(self, opened, score, *, steps=None):
        """Carries out all steps of an open round, or the first `steps` of them.

        A look returns `score(seat, shape)` for each of its lanes.
        """
        self.rounds += 1
        self.computed = Counter()
        scores = None
        for _ in range(10_000 if steps is None else steps):
            try:
                step = opened.steps.send(scores)
            except StopIteration:
                return
            scores = None
            match step:
                case Compute() | Rest():
                    for lane, seat in zip(step.lanes, step.seats, strict=True):
                        self._compute(lane, seat)
                case Link():
                    self._link(step)
                case Look():
                    pairs = list(zip(step.lanes, step.seats, strict=True))
                    scores = [score(seat, self._look(step, lane, seat)) for lane, seat in pairs]
            self.check_counts(opened)

    def break_round(self):
        """Makes everything that the last round wrote unreadable."""
        for slot, held in list(self._slots.items()):
            if held.writer[0] == self.rounds:
                self._slots[slot] = dataclasses.replace(held, source=None)

    def answer(self, lane, seat, tokens):
        """Decodes answer tokens into slots that nobody has written."""
        before = 0
        for source in self.sources(lane):
            before = behind(before, source)
        position = len(lane.token_ids) + np.arange(len(tokens), dtype=np.int32)
        for token, slot, canonical in zip(tokens, *self._located(lane, position), strict=True):
            source = row(before, token)
            before = behind(before, source)
            assert slot not in self._slots
            self._slots[slot] = Held(token, canonical, source, (self.rounds, seat))

    def sources(self, lane):
        """Returns the sources of a lane's prompt, which must be written completely."""
        position = np.arange(len(lane.token_ids), dtype=np.int32)
        where = zip(lane.token_ids.tolist(), *self._located(lane, position), strict=True)
        return [self._read(*what) for what in where]

    def check_counts(self, opened):
        """Checks that references are those of all tables and of pages kept for later choices."""
        held = Counter()
        for lane in opened.lanes:
            held.update(lane.page.tolist())
        held.update(opened.base_pages.tolist())
        for lane in getattr(opened, "collective", ()):
            held.update(lane.spare.tolist())
        if hasattr(opened, "reserved"):
            held.update(opened.reserved.tolist())
        counted = {page: self.pool.refcount(page) for page in range(1, self.pool.total)}
        assert held == Counter(counted)
        self.pool.check()

    def _located(self, lane, position):
        return [found.tolist() for found in lane.locate(position, PAGE_SIZE)]

    def _read(self, token, slot, canonical, *, whole=True):
        held = self._slots.get(slot)
        assert held is not None, "nobody wrote this slot"
        assert (held.token, held.canonical) == (token, canonical)
        assert held.source is not None or not whole, "only the lower layers of this slot are there"
        return held.source

    def _write(self, slot, held):
        before = self._slots.get(slot)
        if before is not None:  # the agent's own row, or a copy that was made for it
            assert (before.token, before.canonical) == (held.token, held.canonical)
            assert before.writer in (held.writer, (self.rounds, None))
        self._slots[slot] = held

    def _compute(self, lane, seat):
        assert (np.diff(lane.computed) > 0).all()
        rows, before = set(lane.computed.tolist()), 0
        position = np.arange(max(rows, default=-1) + 1, dtype=np.int32)
        for at, (slot, canonical) in enumerate(zip(*self._located(lane, position), strict=True)):
            token = int(lane.token_ids[at])
            if at in rows:
                source = row(before, token)
                self._write(slot, Held(token, canonical, source, (self.rounds, seat)))
            else:
                source = self._read(token, slot, canonical)
            before = behind(before, source)
        self.computed[seat] += len(rows)

    def _link(self, step):
        (slots,) = {len(step.source), len(step.target), len(step.shift)}
        assert not set(step.source.tolist()) & set(step.target.tolist())
        assert len(set(step.target.tolist())) == slots
        columns = (step.source.tolist(), step.target.tolist(), step.shift.tolist())
        for slot, target, shift in zip(*columns, strict=True):
            held = self._slots[slot]
            assert held.source is not None
            assert target not in self._slots
            source = hash((held.source, "copied"))
            to = held.canonical + shift
            self._slots[target] = Held(held.token, to, source, (self.rounds, None))

    def _look(self, step, lane, seat):
        """Checks what a look reads; returns the shape of its scores."""
        assert seat != NOBODY
        rows = lane.computed.tolist()
        position = np.arange(max(rows) + 1, dtype=np.int32)
        located = list(zip(*self._located(lane, position), strict=True))
        own = np.repeat(lane.base == 0, lane.slots)
        for at, (slot, canonical) in enumerate(located):
            token = int(lane.token_ids[at])
            writes = at in rows and own[at]
            if writes and slot not in self._slots:
                self._write(slot, Held(token, canonical, None, (self.rounds, seat)))
            # In a look of several agents at layer 1, agents also read layer 0 of each other's rows.
            self._read(token, slot, canonical, whole=not (writes or step.resume))
        return (len(lane.page),) if step.what == "attention" else (2, len(rows))


def serve(device, policy, prompts, random, *, check=None, fails=False):
    """Opens a round, computes it, answers it and closes it.

    Args:
      device: the device.
      policy: a policy over its pool.
      prompts: the prompts.
      random: the generator that draws answers, the room for them, and scores.
      check: called with the open round, its prompts and its rooms once everything is computed.
      fails: whether the round stops after a few of its steps.

    Returns:
      The open round, after it was closed.

    Raises:
      OutOfPages: the pool is too small; no page is held.
    """
    rooms = random.integers(0, 6, len(prompts)).tolist()
    try:
        opened = policy.open(prompts, rooms)
    except OutOfPages:
        assert device.pool.live == 0
        device.pool.check()
        raise
    device.check_counts(opened)
    if fails:
        device.run(opened, drawn(random), steps=int(random.integers(0, 5)))
        device.break_round()
        policy.close(opened, None)
    else:
        device.run(opened, drawn(random))
        for lane in opened.bases:  # a base depends on its key alone: its own tokens
            assert device.sources(lane) == exact_sources(lane.token_ids.tolist())
        if check is not None:
            check(opened, prompts, rooms)
        written = []
        for seat, (lane, room) in enumerate(zip(opened.lanes, rooms, strict=True)):
            answer = random.integers(0, 5, int(random.integers(0, room + 1))).astype(np.int32)
            device.answer(lane, seat, answer.tolist())
            written.append(np.concatenate([lane.token_ids, answer]))
        policy.close(opened, written)
    assert device.pool.live == 0
    device.pool.check()
    return opened


def entries_of(lane, chosen):
    """Returns the logical positions of the chosen entries' slots."""
    return set(np.flatnonzero(np.repeat(chosen, lane.slots)).tolist())


def patches_of(lane):
    return (lane.base != 0) & (lane.page != lane.base)


def checked_lanes(device, opened, prompts, rooms):
    """Checks what holds for the lanes of any policy.

    Yields:
      For each agent its lane, its prompt, the number of leading tokens that are exact, the sources
      of its slots, and the sources of an exact computation.
    """
    for seat, (lane, whole, room) in enumerate(zip(opened.lanes, prompts, rooms, strict=True)):
        tokens, hits = whole.token_ids.tolist(), opened.exact_hits[seat]
        assert lane.token_ids.tolist() == tokens
        assert lane.slots.sum() >= len(tokens) + room
        found, exact = device.sources(lane), exact_sources(tokens)
        assert found[:hits] == exact[:hits]
        yield lane, whole, hits, found, exact


def check_lanes(device):
    """Returns a check of what holds for the lanes of any computed round."""

    def check(opened, prompts, rooms):
        for lane, whole, hits, found, exact in checked_lanes(device, opened, prompts, rooms):
            tokens = whole.token_ids
            if whole.fidelity == "exact":
                assert found == exact
                assert not lane.base.any()
            # Own text and patches are computed in this round or read from pages of exactly this
            # prefix. Nothing else is computed.
            own = entries_of(lane, (lane.base == 0) | patches_of(lane))
            computed = set(range(len(tokens))) & own - set(range(hits))
            assert lane.computed.tolist() == sorted(computed)
            # A patch has the slots, the frame and the tokens of the base entry that it replaces.
            shown = np.where(lane.base == 0, lane.page, lane.base)
            device.sources(dataclasses.replace(lane, page=shown))

    return check

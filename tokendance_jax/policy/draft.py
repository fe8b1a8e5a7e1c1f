"""Decides what the agents of a round share, before any page is taken."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int32

from tokendance_jax.paged.prefix_cache import PrefixCache
from tokendance_jax.plan.shapes import Shapes
from tokendance_jax.policy.bases import BaseStore, Layout, Placed, content_key
from tokendance_jax.policy.order import canonical_order
from tokendance_jax.policy.parts import Part, Run, parts_of, run_of, shared_keys
from tokendance_jax.policy.selection import Selection
from tokendance_jax.policy.table import fitting_parts
from tokendance_jax.prompt.tokenized import TokenizedPrompt, TokenSpan

# The fewest common leading tokens that serve as a preamble; fewer tokens name the first agent or
# quote a template.
_LEAST_PREAMBLE = 16
_NO_TOKENS = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LaneDraft:
    """The draft for an agent that reads shared text from bases.

    Attributes:
      parts: the agent's prompt.
      run: its shared text; negative numbers (see `Layout`) stand in for pages not taken yet.
      chosen: entries of `run` that the agent computes itself, chosen before anything is computed.
      private: number of leading tokens that are the agent's own text; their K and V are exact.
      blocks: the content of the pages that can be found as an exact prefix: pages of the private
        text, then patches that continue it.
      keys: the keys of the blocks.
      head: how many of the blocks are patches.
      later: most entries of `run` that may be chosen later, by scores.
    """

    parts: list[Part]
    run: Run
    chosen: Bool[np.ndarray, " entries"]
    private: int
    blocks: list[bytes]
    keys: list[bytes]
    head: int
    later: int

    def hit_tokens(self, hits: int, page_size: int) -> int:
        """Returns the number of leading tokens in the first `hits` blocks."""
        full, rest = divmod(self.private, page_size)
        if hits <= full:
            return hits * page_size
        return self.private + int(self.run.slots[: hits - full - (rest > 0)].sum())

    def most_computed(self, hits: int, page_size: int) -> int:
        """Returns the most tokens that the agent computes behind `hits` blocks.

        Entries that are chosen later are included.
        """
        read = int(self.run.slots[~self.chosen].sum())
        own = self.parts[-1].stop - self.hit_tokens(hits, page_size) - read
        return own + min(self.later * page_size, read)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """A round before its pages are taken.

    Attributes:
      lanes: what each agent reads from bases; None: the agent is served exactly.
      bases: the bases that the agents read.
      preamble_tokens: number of tokens of the preamble in front of the bases.
    """

    lanes: list[LaneDraft | None]
    bases: list[Layout] = dataclasses.field(default_factory=list)
    preamble_tokens: int = 0

    @property
    def shares(self) -> bool:
        """Whether any agent reads from a base."""
        return any(lane is not None for lane in self.lanes)


class Drafter:
    """Decides for each round what is shared, without taking pages or changing caches."""

    def __init__(
        self,
        store: BaseStore,
        cache: PrefixCache,
        page_size: int,
        *,
        base: str,
        selection: Selection,
        preamble: Int32[np.ndarray, " preamble"],
        least_saving: float | None,
        context: int,
    ):
        """Sets what drafts depend on besides the round; see `Collective`."""
        self._store = store
        self._cache = cache
        self._page_size = page_size
        self._base = base
        self._selection = selection
        self._preamble = preamble
        self._least_saving = least_saving
        self._context = context
        self._entries = Shapes.most_entries(context, page_size)
        # Shared text behind the head of a run must be longer than half the head; otherwise the
        # agent computes the whole run.
        head = 0 if least_saving is None else selection.head
        self._least_run = (head + head // 2) * page_size + 1

    def draft(self, prompts: Sequence[TokenizedPrompt], rooms: Sequence[int]) -> Draft:
        """Decides what a round shares.

        An agent is served exactly if sharing saves it nothing. The whole round is served exactly
        if sharing saves less than the least saving. The count covers the tokens that agents, bases
        and preamble compute, given what the caches hold now. If the pool runs out of free pages
        while the round opens, it may evict cached pages that were counted.

        Args:
          prompts: the agents' prompts.
          rooms: for each lane, how many more tokens it must have room for.
        """
        sharing = [prompt.fidelity == "collective" for prompt in prompts]
        if self._least_saving is None:
            return self._draft(prompts, rooms, sharing)
        best = nothing = Draft([None] * len(prompts))
        chains = [list(self._cache.keys(self._cache.split(p.token_ids))) for p in prompts]
        order = _ascending(prompts)
        exact, alone = self._exact_tokens(prompts, chains, order)
        least = exact
        while any(sharing):
            draft = self._draft(prompts, rooms, sharing)
            reading = [lane is not None for lane in draft.lanes]
            computed = self._most_tokens(draft, prompts, chains, order[::-1])
            if computed < least:
                best, least = draft, computed
            sharing = [
                lane is not None
                and lane.most_computed(self._cache.peek(lane.keys), self._page_size) < theirs
                for lane, theirs in zip(draft.lanes, alone, strict=True)
            ]
            if sharing == reading:
                break
        return best if exact - least >= self._least_saving * exact else nothing

    def draft_joining(
        self, prompt: TokenizedPrompt, room: int, placed: Mapping[bytes, Placed]
    ) -> LaneDraft | None:
        """Drafts a lane that joins a round and reads what the round's bases hold.

        Args:
          prompt: the agent's prompt. Shared segments that the bases do not hold are its own text.
          room: how many more tokens its lane must have room for.
          placed: where the segments of the round's bases lie, by `content_key`.

        Returns:
          What the agent reads from bases; None: reading them saves nothing.
        """
        if prompt.fidelity != "collective":
            return None
        lane = self._lane(prompt, room, placed, [])
        if lane is None or self._least_saving is None:
            return lane
        chain = self._cache.keys(self._cache.split(prompt.token_ids))
        exact = self._exact(prompt, self._cache.peek(chain))
        hits = self._cache.peek(lane.keys)
        return lane if lane.most_computed(hits, self._page_size) < exact else None

    # Decisions must not depend on the order of agents, but the number of computed tokens may: a
    # prompt that fills its last page computes this page even if an agent before it did. So exact
    # rounds are counted in their best order, and other rounds in their worst.

    def _exact_tokens(
        self,
        prompts: Sequence[TokenizedPrompt],
        chains: Sequence[Sequence[bytes]],
        order: Sequence[int],
    ) -> tuple[int, list[int]]:
        """Returns the fewest tokens that an exact round computes, and those of each agent alone.

        Args:
          prompts: the agents' prompts.
          chains: for each prompt, the keys of its full pages.
          order: the seats in the order in which they are counted.
        """
        hits = self._cache.count(chains[seat] for seat in order)
        together = sum(
            self._exact(prompts[seat], hit) for seat, hit in zip(order, hits, strict=True)
        )
        pairs = zip(prompts, chains, strict=True)
        return together, [self._exact(p, self._cache.peek(chain)) for p, chain in pairs]

    def _most_tokens(
        self,
        draft: Draft,
        prompts: Sequence[TokenizedPrompt],
        chains: Sequence[Sequence[bytes]],
        order: Sequence[int],
    ) -> int:
        """Returns the most tokens that a round computes, bases included; see `_exact_tokens`."""
        tokens = sum(self._store.to_compute(draft.bases))
        if self._base == "joint-agent" and draft.bases:  # computed again, behind the Master
            tokens += len(draft.bases[0].token_ids) - draft.preamble_tokens
        pairs = [(prompts[seat], draft.lanes[seat]) for seat in order]
        hits = self._cache.count(
            chains[seat] if lane is None else lane.keys
            for seat, (_, lane) in zip(order, pairs, strict=True)
        )
        for (prompt, lane), hit in zip(pairs, hits, strict=True):
            if lane is None:
                tokens += self._exact(prompt, hit)
            else:
                tokens += lane.most_computed(hit, self._page_size)
        return tokens

    def _exact(self, prompt: TokenizedPrompt, hits: int) -> int:
        """Returns the tokens that an exact agent computes if `hits` leading pages are cached."""
        tokens = len(prompt.token_ids)
        findable = (tokens - prompt.answer_tokens - 1) // self._page_size
        return tokens - min(hits, findable) * self._page_size

    def _draft(
        self, prompts: Sequence[TokenizedPrompt], rooms: Sequence[int], sharing: Sequence[bool]
    ) -> Draft:
        """Drafts a round in which some agents share. Bases hold only segments that are read."""
        together = [prompt for prompt, shares in zip(prompts, sharing, strict=True) if shares]
        sequences = shared_keys(together)
        while True:
            preamble, bases, placed = self._lay_out(together, sequences)
            keys = [key for layout in bases for key in layout.keys]
            lanes = [
                self._lane(prompt, room, placed, keys) if shares else None
                for prompt, room, shares in zip(prompts, rooms, sharing, strict=True)
            ]
            read = {id(part.placed) for lane in lanes if lane for part in lane.parts}
            kept = {key for key, place in placed.items() if id(place) in read}
            if len(kept) == len(placed):
                return Draft(lanes, bases, preamble)
            sequences = [[key for key in some if key in kept] for some in sequences]

    def _lay_out(
        self, prompts: Sequence[TokenizedPrompt], sequences: Sequence[Sequence[bytes]]
    ) -> tuple[int, list[Layout], dict[bytes, Placed]]:
        """Lays out the round's bundle in bases, none of them longer than the context.

        Returns:
          Number of tokens of the preamble, the bases, and the place of each segment that fits.
        """
        order = canonical_order(sequences)
        if not order:
            return 0, [], {}
        segments = {
            content_key(ids): ids
            for prompt in prompts
            for span in prompt.spans
            for ids in [prompt.token_ids[span.start : span.stop]]
        }
        preamble = _NO_TOKENS if self._base == "isolated" else self._preamble_of(prompts)
        most = self._context - len(preamble)
        groups: list[list[bytes]] = []
        tokens = most
        for key in order:
            length = len(segments[key])
            if length > most:
                continue
            if self._base.startswith("joint") and tokens + length <= most:
                groups[-1].append(key)
                tokens += length
            else:
                groups.append([key])
                tokens = length
        bases: list[Layout] = []
        placed: dict[bytes, Placed] = {}
        pages = 0
        for group in groups:
            layout = self._store.lay_out(preamble, [segments[key] for key in group], before=pages)
            placed.update(zip(group, layout.placed, strict=True))
            bases.append(layout)
            pages += len(layout.slots)
        return len(preamble) if bases else 0, bases, placed

    def _preamble_of(self, prompts: Sequence[TokenizedPrompt]) -> Int32[np.ndarray, " preamble"]:
        """Returns the leading system text that all agents share, or the configured preamble.

        If all prompts begin with shared text, nothing stands in front of the bases: they are then
        computed at the positions where the agents have them.
        """
        leading = [_leading_system(prompt) for prompt in prompts]
        if all(prompt.spans[0].kind == "shared" for prompt in prompts):
            return _NO_TOKENS
        least = min(map(len, leading))
        equal = np.all([ids[:least] == leading[0][:least] for ids in leading], axis=0)
        common = least if equal.all() else int(np.argmin(equal))
        # The leading text of a single agent is not neutral.
        if len(prompts) > 1 and common >= _LEAST_PREAMBLE:
            return leading[0][:common]
        return self._preamble

    def _lane(
        self,
        prompt: TokenizedPrompt,
        room: int,
        placed: Mapping[bytes, Placed],
        keys: Sequence[bytes],
    ) -> LaneDraft | None:
        """Drafts what an agent reads from bases, and which part of it the agent computes anyway.

        Args:
          prompt: the agent's prompt.
          room: how many more tokens the agent's lane must have room for.
          placed: where the segments of the bundle lie.
          keys: the keys of the layouts' pages, in the order of their negative numbers.
        """
        size, ids = self._page_size, prompt.token_ids

        def place(span: TokenSpan, key: bytes, token_ids: Int32[np.ndarray, " _"]) -> Placed | None:
            if span.kind in ("shared", "task"):
                return placed.get(key)
            if span.kind == "history":  # quotes text shared in this round or an older one
                return placed.get(key) or self._store.find(token_ids)
            return None

        parts = fitting_parts(
            parts_of(prompt, place),
            room=room,
            least=self._least_run,
            entries=self._entries,
            page_size=size,
        )
        if all(part.placed is None for part in parts):
            return None
        private = parts[0].stop if parts[0].placed is None else 0
        run = run_of(parts)
        chosen = self._selection.pick(run, size)
        # Patches that continue the private text are exact and may be found again. Patches behind
        # further own text are not found, and neither are patches that a Master moves.
        first = np.cumsum(run.offset == 0) == 1
        head = 0 if self._base == "joint-agent" else leading_entries(chosen[first])
        blocks = self._cache.split(ids[:private])
        if head:
            rest = private % size
            blocks += [ids[private - rest : private].tobytes()] * (rest > 0)
            blocks += [_patch_block(ids, run, entry) for entry in range(head)]
        later = 0
        if self._selection.look is not None:  # several entries may read one page
            pages = run.page.tolist()
            times = Counter(keys[-1 - p] if p < 0 else self._store.key(p) for p in pages)
            later = sum(count for _, count in times.most_common(self._selection.pages))
        chain = list(self._cache.keys(blocks))
        return LaneDraft(parts, run, chosen, private, blocks, chain, head, later)


def _ascending(prompts: Sequence[TokenizedPrompt]) -> list[int]:
    """Returns the seats sorted by prompt; a prompt comes before prompts that continue it."""
    return sorted(range(len(prompts)), key=lambda seat: prompts[seat].token_ids.tobytes())


def _leading_system(prompt: TokenizedPrompt) -> Int32[np.ndarray, " leading"]:
    """Returns a prompt's tokens up to the first that is neither system text nor markup."""
    stop = 0
    for span in prompt.spans:
        if span.kind not in ("system", "markup"):
            break
        stop = span.stop
    return prompt.token_ids[:stop]


def leading_entries(chosen: Bool[np.ndarray, " entries"]) -> int:
    """Returns how many leading entries are chosen."""
    return len(chosen) if chosen.all() else int(np.argmin(chosen))


def _patch_block(ids: Int32[np.ndarray, " tokens"], run: Run, entry: int) -> bytes:
    """Returns all that a patch of the exact head depends on besides the tokens before it."""
    start, slots = int(run.start[entry]), int(run.slots[entry])
    where = np.array([run.frame[entry], run.first[entry]], np.int32)
    return b"patch" + where.tobytes() + ids[start : start + slots].tobytes()

"""Whose answer a shared block of a recording is, where the trace does not say so.

A block is taken for an answer by its id, if it names round and agent as those of `gather` do, else
by its text, which is compared without the white space around it. An id that ends in an agent's name
tells equal answers apart; where ids do not, the order of the agents does, provided that all of them
have a block. A block that was there before an answer was given is not that answer. Whatever can't
be told is an error: a live run must never show a recorded answer as its own.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from tokendance_jax.prompt.round import AgentPrompt, Author, PromptError, Round, Segment
from tokendance_jax.prompt.trace import Trace

# An answer of fewer characters may stand in another text by chance.
_TELLING = 12
_GATHERED = re.compile(r"(?:.*/)?out/r(\d+)/(.+)", re.DOTALL)
_REMEDY = "name its author in the trace (the field 'author' of a segment)"

Recorded = Sequence[Mapping[str, str | None]]


def name_authors(trace: Trace) -> Trace:
    """Names the author of every shared block that is an answer of an earlier round.

    Args:
      trace: a recording; authors that it names are kept.

    Returns:
      The trace with the authors. Blocks that have none are nobody's answer.

    Raises:
      PromptError: the author of a block can't be told; names round, block and remedy.
    """
    contents: dict[str, set[object]] = {}
    for round_ in trace.rounds:
        for block in _blocks(round_):
            contents.setdefault(block.id, set()).add(_content(block))
    recorded = [{p.agent: p.recorded_output for p in round_.agents} for round_ in trace.rounds]
    namer = Namer(recorded, reused_ids=any(len(found) > 1 for found in contents.values()))
    return dataclasses.replace(trace, rounds=tuple(map(namer.name, trace.rounds)))


class Namer:
    """Names the authors of blocks, one round after the other."""

    def __init__(self, recorded: Recorded, *, reused_ids: bool = False):
        """Takes what is known of the recording.

        Args:
          recorded: the recorded answers of each round by agent; None where one is not known.
          reused_ids: whether an id may stand for another answer in every round.
        """
        self._recorded = recorded
        self._reused_ids = reused_ids
        self._seen: dict[tuple[str, object], Author | None] = {}

    def name(self, round_: Round) -> Round:
        """Names the authors of a round's blocks.

        Raises:
          PromptError: one of them can't be told.
        """
        found = _RoundNamer(round_, self._recorded, self._reused_ids, self._seen).authors()
        for block in _blocks(round_):
            self._seen[block.id, _content(block)] = found[block.id]

        def named(prompt: AgentPrompt) -> AgentPrompt:
            segments = tuple(
                dataclasses.replace(s, author=found[s.id]) if s.kind == "shared" else s
                for s in prompt.segments
            )
            return dataclasses.replace(prompt, segments=segments)

        return dataclasses.replace(round_, agents=tuple(map(named, round_.agents)))


class _RoundNamer:
    """Finds the authors of one round's blocks."""

    def __init__(
        self,
        round_: Round,
        recorded: Recorded,
        reused_ids: bool,
        seen: Mapping[tuple[str, object], Author | None],
    ):
        self._moment = round_
        # What was said before this round, by round.
        self._recorded = recorded[: round_.index]
        self._reused_ids = reused_ids
        self._seen = seen
        self._found: dict[str, Author | None] = {}

    def authors(self) -> dict[str, Author | None]:
        """The author of each block by its id; None: it is nobody's answer."""
        blocks = _blocks(self._moment)
        if not self._recorded:
            return dict.fromkeys((block.id for block in blocks), None)
        for block in blocks:
            if (author := block.author or self._by_id(block)) is not None:
                self._found[block.id] = author
        rest = [block for block in blocks if block.id not in self._found]
        old = [block for block in rest if (block.id, _content(block)) in self._seen]
        self._deduce([block for block in rest if block not in old])
        # Only now is it known which of the last answers have blocks of their own.
        self._deduce([block for block in old if not self._stays(block)])
        for block in blocks:
            if block.id not in self._found:
                self._check_nobodys(block)
                self._found[block.id] = None
        return self._found

    def _by_id(self, block: Segment) -> Author | None:
        """The author whom an id as those of `gather` names, if the trace has the answer."""
        match = _GATHERED.fullmatch(block.id)
        if match is None:
            return None
        index, agent = int(match[1]), match[2]
        if index >= len(self._recorded) or agent not in self._recorded[index]:
            return None
        answer = self._recorded[index][agent]
        if answer is None or block.text is None:
            return Author(index, agent)
        if _bare(answer) != _bare(block.text):
            raise self._error(
                block,
                f"is named after {agent!r} in round {index}, whose recorded answer is another",
            )
        return Author(index, agent)

    def _deduce(self, blocks: Iterable[Segment]) -> None:
        """Finds the authors of blocks that equal answers, or are named after one not known."""
        equal: dict[str, list[Segment]] = {}
        last = len(self._recorded) - 1
        for block in blocks:
            name = _named(block.id, self._recorded[last])
            if name is not None and self._recorded[last][name] is None:
                self._found[block.id] = Author(last, name)
            elif block.text is not None:
                equal.setdefault(_bare(block.text), []).append(block)
        for text, group in equal.items():
            if authors := self._who_said(text):
                self._share_out(group, authors)

    def _who_said(self, text: str) -> list[Author]:
        """Who gave an answer, in the latest round in which somebody did."""
        for index in reversed(range(len(self._recorded))):
            answers = self._recorded[index].items()
            authors = [
                Author(index, agent)
                for agent, answer in answers
                if answer is not None and _bare(answer) == text
            ]
            if authors:
                return authors
        return []

    def _share_out(self, blocks: Sequence[Segment], authors: Sequence[Author]) -> None:
        """Finds the authors of blocks of one text, given all who are known to have said it."""
        agents = {author.agent: author for author in authors}
        left = []
        for block in blocks:
            name = _named(block.id, self._recorded[authors[0].round])
            if name is None:
                left.append(block)
            elif name in agents:
                self._found[block.id] = agents[name]
            else:
                raise self._error(
                    block, f"is named after {name!r}, but has the text of {_names(authors)}"
                )
        if not left:
            return
        unknown = self._unknown()
        free = [author for author in authors if author not in self._found.values()]
        if len(authors) == 1 and not unknown:
            free = [authors[0]] * len(left)  # nobody else said it, however often it stands there
        self._found |= {block.id: author for block, author in zip(left, free, strict=False)}
        told = len(authors) == 1 or (not unknown and (len(left) == 1 or self._in_order(left)))
        if len(free) != len(left) or not told:
            raise self._error(
                left[0],
                f"may be an answer of {_names([*authors, *unknown])}: they can't be told apart",
            )

    def _in_order(self, blocks: Sequence[Segment]) -> bool:
        """Whether a prompt holds all of these answers, and all prompts the order of the agents."""
        agents = [Author(i, agent) for i, said in enumerate(self._recorded) for agent in said]
        order = {author: number for number, author in enumerate(agents)}
        held = []
        for prompt in self._moment.agents:
            ids = [segment.id for segment in prompt.segments if segment.kind == "shared"]
            held.append(all(block.id in ids for block in blocks))
            authors = [author for at in ids if (author := self._found.get(at)) is not None]
            places = [order[author] for author in authors if author in order]
            if any(block.id in ids for block in blocks) and places != sorted(set(places)):
                return False
        return any(held)

    def _stays(self, block: Segment) -> bool:
        """Whether a block that an earlier round had is what it was there; then notes its author.

        Under the same id may stand another answer, of the same text.
        """
        before = self._seen[block.id, _content(block)]
        last = len(self._recorded) - 1
        again = [] if block.text is None else self._who_said(_bare(block.text))
        again = [author for author in again if author.round == last]
        name = _named(block.id, self._recorded[last])
        if name is not None and self._recorded[last][name] is None:
            again.append(Author(last, name))
        if before is None:  # it was there before anybody said it
            again = [author for author in again if author.agent == name]
        again = [author for author in again if author not in self._found.values()]
        if again and not self._reused_ids:
            raise self._error(
                block, f"stood in an earlier round, and may be a new answer of {_names(again)}"
            )
        if not again:
            self._found[block.id] = before
        return not again

    def _check_nobodys(self, block: Segment) -> None:
        """Refuses a block that looks like an answer, or holds one, but is none that is known."""
        if block.text is None:
            raise self._error(block, "holds token ids, which no answer is compared with")
        if _GATHERED.fullmatch(block.id):
            raise self._error(block, "is named as an answer, but the trace has no such answer")
        if unknown := self._unknown():
            raise self._error(
                block, f"may be the answer of {_names(unknown)}, whose recorded_output is missing"
            )
        for index, answers in enumerate(self._recorded):
            for agent, answer in answers.items():
                if answer is not None and _quotes(_bare(block.text), _bare(answer)):
                    author = _names([Author(index, agent)])
                    raise self._error(block, f"quotes {author}, but is not that answer alone")

    def _unknown(self) -> list[Author]:
        """Who gave answers that are not known, and have no block yet."""
        taken = {*self._seen.values(), *self._found.values()}
        given = [
            Author(index, agent)
            for index, answers in enumerate(self._recorded)
            for agent, answer in answers.items()
            if answer is None
        ]
        return [author for author in given if author not in taken]

    def _error(self, block: Segment, what: str) -> PromptError:
        return PromptError(
            f"round {self._moment.index}: shared segment {block.id!r} {what}; {_REMEDY}"
        )


def _blocks(round_: Round) -> list[Segment]:
    """The shared segments of a round, each once, in the order of the prompts."""
    found = (s for prompt in round_.agents for s in prompt.segments if s.kind == "shared")
    return list({segment.id: segment for segment in found}.values())


def _content(block: Segment) -> object:
    return block.token_ids if block.text is None else block.text


def _bare(text: str) -> str:
    """An answer without what `gather`, or whoever recorded it, may have changed."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").strip()


def _named(segment_id: str, agents: Iterable[str]) -> str | None:
    """The agent whose name ends an id; of several, the longest."""
    fits = [
        agent
        for agent in agents
        if segment_id.endswith(agent) and not segment_id.removesuffix(agent)[-1:].isalnum()
    ]
    return max(fits, key=len, default=None)


def _quotes(text: str, answer: str) -> bool:
    """Whether a text holds an answer, or its beginning, too long to stand there by chance."""
    if min(len(answer), len(text)) < _TELLING:
        return False
    whole = rf"(?<!\w){re.escape(answer)}(?!\w)"
    return answer.startswith(text) or (answer in text and re.search(whole, text) is not None)


def _names(authors: Sequence[Author]) -> str:
    names = [f"{author.agent!r} in round {author.round}" for author in authors]
    return " or ".join(names if len(names) < 4 else [*names[:2], f"{len(names) - 2} others"])

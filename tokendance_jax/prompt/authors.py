"""Finds whose answer each shared block of a recording is, where the trace does not name an author.

A block is identified as an answer by its id, if the id names a round and an agent in the format of
`gather`, otherwise by its text, compared without the white space around it. If several agents gave
the same answer, an id that ends in an agent's name tells the blocks apart. Without such ids the
order of the agents does, provided that every one of them has a block. A block that stood in a
prompt before an answer was given is not that answer. A block whose author cannot be determined is
an error, because a live run must never show a recorded answer as its own.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from tokendance_jax.prompt.round import AgentPrompt, Author, PromptError, Round, Segment
from tokendance_jax.prompt.trace import Trace

# An answer with fewer characters may occur in another text by chance.
_TELLING = 12
_GATHERED = re.compile(r"(?:.*/)?out/r(\d+)/(.+)", re.DOTALL)
_REMEDY = "name its author in the trace (the field 'author' of a segment)"

Recorded = Sequence[Mapping[str, str | None]]


def name_authors(trace: Trace) -> Trace:
    """Names the author of every shared block that is an answer of an earlier round.

    Args:
      trace: a recording. Authors that it already names are kept.

    Returns:
      The trace with authors. A block without an author is nobody's answer.

    Raises:
      PromptError: the author of a block cannot be determined; names round, block and remedy.
    """
    contents: dict[str, set[object]] = {}
    for round_ in trace.rounds:
        for block in _blocks(round_):
            contents.setdefault(block.id, set()).add(_content(block))
    recorded = [{p.agent: p.recorded_output for p in round_.agents} for round_ in trace.rounds]
    namer = Namer(recorded, reused_ids=any(len(found) > 1 for found in contents.values()))
    return dataclasses.replace(trace, rounds=tuple(map(namer.name, trace.rounds)))


class Namer:
    """Names the authors of blocks. Expects the rounds in order, one per call of `name`."""

    def __init__(self, recorded: Recorded, *, reused_ids: bool = False):
        """Stores the recorded answers.

        Args:
          recorded: the recorded answers of each round by agent; None for an unknown answer.
          reused_ids: whether one id may stand for different answers in different rounds.
        """
        self._recorded = recorded
        self._reused_ids = reused_ids
        self._seen: dict[tuple[str, object], Author | None] = {}

    def name(self, round_: Round) -> Round:
        """Names the authors of a round's blocks.

        Raises:
          PromptError: one of the authors cannot be determined.
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
        # The answers of each earlier round.
        self._recorded = recorded[: round_.index]
        self._reused_ids = reused_ids
        self._seen = seen
        self._found: dict[str, Author | None] = {}

    def authors(self) -> dict[str, Author | None]:
        """Returns the author of each block by its id, or None for nobody's answer."""
        blocks = _blocks(self._moment)
        if not self._recorded:
            return dict.fromkeys((block.id for block in blocks), None)
        for block in blocks:
            if (author := block.author or self._by_id(block)) is not None:
                self._found[block.id] = author
        rest = [block for block in blocks if block.id not in self._found]
        old = [block for block in rest if (block.id, _content(block)) in self._seen]
        self._deduce([block for block in rest if block not in old])
        # Blocks of earlier rounds come last: by now it is known which of the last round's answers
        # have new blocks.
        self._deduce([block for block in old if not self._stays(block)])
        for block in blocks:
            if block.id not in self._found:
                self._check_nobodys(block)
                self._found[block.id] = None
        return self._found

    def _by_id(self, block: Segment) -> Author | None:
        """Returns the author that an id in `gather`'s format names, if the recording has both."""
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
        """Finds authors by text, or by id if the last answer of the agent it names is unknown."""
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
        """Returns all authors of an answer, in the latest round in which anyone gave it."""
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
        """Assigns blocks of one text to authors, given all who are known to have answered so."""
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
            free = [authors[0]] * len(left)  # the only author, of however many blocks
        self._found |= {block.id: author for block, author in zip(left, free, strict=False)}
        told = len(authors) == 1 or (not unknown and (len(left) == 1 or self._in_order(left)))
        if len(free) != len(left) or not told:
            raise self._error(
                left[0],
                f"may be an answer of {_names([*authors, *unknown])}: they can't be told apart",
            )

    def _in_order(self, blocks: Sequence[Segment]) -> bool:
        """Whether the order of the agents tells blocks of equal text apart.

        It does if some prompt holds all of these blocks, and each prompt that holds any of them
        shows the answers in the order of the agents.
        """
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
        """Whether a block of an earlier round still has its author from there; if so, records it.

        The same id and text may also stand for a new answer that happens to be equal.
        """
        before = self._seen[block.id, _content(block)]
        last = len(self._recorded) - 1
        again = [] if block.text is None else self._who_said(_bare(block.text))
        again = [author for author in again if author.round == last]
        name = _named(block.id, self._recorded[last])
        if name is not None and self._recorded[last][name] is None:
            again.append(Author(last, name))
        if before is None:  # it was nobody's answer then; only its id can make it one now
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
        """Raises if a block without an author looks like an answer or contains one."""
        if block.text is None:
            raise self._error(block, "holds token ids, which can't be compared with answers")
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
        """Returns the agents and rounds of unknown answers that have no block yet."""
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
    """Normalises an answer: `gather` and recordings may change NUL and outer white space."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").strip()


def _named(segment_id: str, agents: Iterable[str]) -> str | None:
    """Returns the agent whose name the id ends in; if several fit, the longest name."""
    fits = [
        agent
        for agent in agents
        if segment_id.endswith(agent) and not segment_id.removesuffix(agent)[-1:].isalnum()
    ]
    return max(fits, key=len, default=None)


def _quotes(text: str, answer: str) -> bool:
    """Whether a text contains an answer, or begins one, at a length that rules out chance."""
    if min(len(answer), len(text)) < _TELLING:
        return False
    whole = rf"(?<!\w){re.escape(answer)}(?!\w)"
    return answer.startswith(text) or (answer in text and re.search(whole, text) is not None)


def _names(authors: Sequence[Author]) -> str:
    names = [f"{author.agent!r} in round {author.round}" for author in authors]
    return " or ".join(names if len(names) < 4 else [*names[:2], f"{len(names) - 2} others"])

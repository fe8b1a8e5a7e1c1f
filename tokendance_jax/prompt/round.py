"""The caller's input: one round of agents, each with a prompt in segments.

All classes here validate their fields on construction, so later stages never see malformed input.
Every error is a `PromptError` that names the agent, segment or field and the remedy.
"""

import dataclasses
import math
from typing import Literal, get_args

Kind = Literal["system", "history", "shared", "task"]
Fidelity = Literal["collective", "exact"]

# Most log-probabilities per token that `Sampling.logprobs` may request.
MAX_LOGPROBS = 20
# Most tokens that `Sampling.logit_bias` may name.
MAX_BIASES = 300

# Token ids and numbers of tokens travel as int32, seeds as uint32, real numbers as float32.
_MAX_INT = 2**31 - 1
_MAX_SEED = 2**32 - 1
_MAX_REAL = 3.4e38


class PromptError(ValueError):
    """A prompt, a trace, a tokenizer or a chat template that cannot be used as given."""


def check_text(text: object, what: str) -> None:
    """Raises if a value cannot be part of a prompt: non-strings, NUL and lone surrogates.

    Args:
      text: the value to check.
      what: name of the value in the error message, e.g. "segment 'a' of agent 'b'".

    Raises:
      PromptError: `text` is not a string, or holds a NUL character or a lone surrogate.
    """
    if not isinstance(text, str):
        raise PromptError(f"{what}: expected a string, got {type(text).__name__}")
    nul = text.find("\0")
    if nul >= 0:
        raise PromptError(f"{what}: NUL character at position {nul}; remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{what}: lone surrogate U+{ord(text[error.start]):04X} at position {error.start}; "
            "decode the text with errors='replace'"
        ) from None


def check_name(name: object, what: str) -> None:
    """Raises if a name is empty, or if `check_text` raises for it.

    Args:
      name: the value to check.
      what: name of the value in the error message.

    Raises:
      PromptError: `name` is empty, or `check_text` raises for it.
    """
    check_text(name, what)
    if not name:
        raise PromptError(f"{what} is empty; give it a name")


def check_integer(value: object, what: str, low: int, high: int | None = None) -> None:
    """Raises unless a value is an `int` from `low` to `high`; a `bool` does not count as one.

    Args:
      value: the value to check.
      what: name of the value in the error message.
      low: smallest allowed value.
      high: largest allowed value; None for no bound.

    Raises:
      PromptError: `value` is not such an integer.
    """
    if type(value) is not int or value < low or (high is not None and value > high):
        wanted = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
        raise PromptError(f"{what} must be {wanted}, got {value!r}")


def _check_real(value: object, what: str) -> None:
    real = type(value) is int or (isinstance(value, float) and math.isfinite(value))
    if not real:
        raise PromptError(f"{what} must be a finite number, got {value!r}")


def _check_between(value: object, what: str, low: int, high: int) -> None:
    _check_real(value, what)
    if not low <= value <= high:  # pyright: ignore[reportOperatorIssue]
        raise PromptError(f"{what} must be from {low} to {high}, got {value!r:.80}")


def _check_tuple(value: object, element: type, what: str) -> None:
    if not isinstance(value, tuple) or not all(isinstance(item, element) for item in value):
        raise PromptError(f"{what} must be a tuple of {element.__name__}, got {value!r:.80}")


@dataclasses.dataclass(frozen=True, slots=True)
class Author:
    """The agent and round whose answer a shared block is.

    Attributes:
      round: number of the round in which the answer was given, from 0.
      agent: name of the agent.

    Raises:
      PromptError: a negative number, an empty name.
    """

    round: int
    agent: str

    def __post_init__(self) -> None:
        check_integer(self.round, "author: round", 0)
        check_name(self.agent, "author: agent")


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of one kind in an agent's prompt, as text or as token ids.

    Attributes:
      kind: "system" (persona) and "history" (memory) are private to the agent, "shared" is a block
        that other agents of the round may hold too, "task" is the agent's own question.
      id: name of the segment. Within a round, shared segments with the same id have the same
        content.
      text: the content as text; strings of control tokens in it are ordinary characters. Pass
        exactly one of `text` and `token_ids`.
      token_ids: the content as token ids, used unchanged.
      author: whose answer a shared block is; None if it is nobody's. Live runs replace the block by
        the author's live answer.

    Raises:
      PromptError: unknown kind, empty id, both or neither of text and token ids, NUL or lone
        surrogate, a token id out of range, an author of a segment that is not shared.
    """

    kind: Kind
    id: str
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    author: Author | None = None

    def __post_init__(self) -> None:
        check_name(self.id, "the id of a segment")
        where = f"segment {self.id!r}"
        if self.kind not in get_args(Kind):
            raise PromptError(f"{where}: kind {self.kind!r} is none of {', '.join(get_args(Kind))}")
        if (self.text is None) == (self.token_ids is None):
            raise PromptError(f"{where}: give exactly one of text and token_ids")
        if self.text is not None:
            check_text(self.text, f"{where}: text")
        if self.token_ids is not None:
            _check_tuple(self.token_ids, int, f"{where}: token_ids")
            for token_id in self.token_ids:
                check_integer(token_id, f"{where}: a token id", 0, _MAX_INT)
        if self.author is not None:
            if not isinstance(self.author, Author):
                raise PromptError(f"{where}: author must be an Author, got {self.author!r:.80}")
            if self.kind != "shared":
                raise PromptError(
                    f"{where}: a {self.kind} segment has no author; make it shared, or leave out "
                    "the author"
                )

    @property
    def empty(self) -> bool:
        """Whether the segment has no content."""
        return not self.text and not self.token_ids


@dataclasses.dataclass(frozen=True, slots=True)
class AgentPrompt:
    """One agent's prompt of one round: its segments in order, the task last.

    Attributes:
      agent: name of the agent, the key of its output.
      segments: the prompt. It ends with one or more non-empty task segments and has none elsewhere.
      max_new_tokens: limit for this agent's answer; None for the round's limit.
      recorded_output: the agent's answer in a recording, for replays.
      fidelity: "collective": the policy decides what the agent reads. "exact": everything that the
        agent reads was computed in its own context, for agents such as judges and callers of tools.
      sampling: how this agent's answer is sampled; None: as the round says.

    Raises:
      PromptError: empty name, a prompt that does not end with its task, a limit below 1, an unknown
        fidelity.
    """

    agent: str
    segments: tuple[Segment, ...]
    max_new_tokens: int | None = None
    recorded_output: str | None = None
    fidelity: Fidelity = "collective"
    sampling: "Sampling | None" = None

    def __post_init__(self) -> None:
        check_name(self.agent, "the name of an agent")
        where = f"agent {self.agent!r}"
        if self.fidelity not in get_args(Fidelity):
            raise PromptError(
                f"{where}: fidelity {self.fidelity!r} is none of {', '.join(get_args(Fidelity))}"
            )
        _check_tuple(self.segments, Segment, f"{where}: segments")
        if not self.segments or self.segments[-1].kind != "task":
            raise PromptError(f"{where}: the last segment must be a task; add one at the end")
        ended = False
        for segment in self.segments:
            if segment.kind == "task" and segment.empty:
                raise PromptError(f"{where}: task segment {segment.id!r} is empty; fill it")
            if ended and segment.kind != "task":
                raise PromptError(
                    f"{where}: {segment.kind} segment {segment.id!r} stands after a task; "
                    "put the tasks last"
                )
            ended = segment.kind == "task"
        if self.max_new_tokens is not None:
            check_integer(self.max_new_tokens, f"{where}: max_new_tokens", 1)
        if not isinstance(self.sampling, Sampling | None):
            raise PromptError(f"{where}: sampling must be a Sampling, got {self.sampling!r:.80}")
        if self.recorded_output is not None:
            check_text(self.recorded_output, f"{where}: recorded_output")


@dataclasses.dataclass(frozen=True, slots=True)
class Sampling:
    """How a round's answers are sampled and when they end.

    Attributes:
      temperature: 0 selects the most probable token; above 0, logits are divided by it.
      top_k: sample from this many most probable tokens; 0 for all tokens.
      top_p: sample from the smallest set of tokens with this total probability, in (0, 1].
      seed: from 0 to 2**32 - 1. The same seed and round produce the same answers.
      stop: an answer ends before the first of these strings.
      stop_token_ids: an answer ends at the first of these tokens, in addition to the model's own
        stop tokens.
      min_p: never sample tokens with less than this share of the most probable token's
        probability, from 0 to 1; 0 is off.
      repetition_penalty: positive logits of tokens in the prompt or the answer are divided by it,
        negative ones multiplied; above 0, 1 is off.
      presence_penalty: subtracted from the logits of tokens in the answer, from -2 to 2.
      frequency_penalty: subtracted from the logits of tokens in the answer once per occurrence,
        from -2 to 2.
      logit_bias: pairs of a token id and a number from -100 to 100 that is added to the token's
        logit; at most 300 pairs, each with another token.
      ignore_eos: whether the model's own stop tokens do not end an answer. `stop_token_ids` still
        do.
      logprobs: how many of the most probable tokens to report log-probabilities of, next to that
        of the chosen token, from 0 to 20; None reports none.

    Raises:
      PromptError: a value out of its range.
    """

    temperature: float | int = 0.0
    top_k: int = 0
    top_p: float | int = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_p: float | int = 0.0
    repetition_penalty: float | int = 1.0
    presence_penalty: float | int = 0.0
    frequency_penalty: float | int = 0.0
    logit_bias: tuple[tuple[int, float | int], ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_real(self.temperature, "sampling: temperature")
        if self.temperature < 0:
            raise PromptError(f"sampling: temperature must be >= 0, got {self.temperature!r}")
        if self.temperature > _MAX_REAL:
            raise PromptError(f"sampling: temperature must be at most {_MAX_REAL}")
        check_integer(self.top_k, "sampling: top_k", 0, _MAX_INT)
        _check_real(self.top_p, "sampling: top_p")
        if not 0 < self.top_p <= 1:
            raise PromptError(f"sampling: top_p must be in (0, 1], got {self.top_p!r}")
        check_integer(self.seed, "sampling: seed", 0, _MAX_SEED)
        _check_tuple(self.stop, str, "sampling: stop")
        _check_tuple(self.stop_token_ids, int, "sampling: stop_token_ids")
        for string in self.stop:
            check_name(string, "sampling: a stop string")
        for token_id in self.stop_token_ids:
            check_integer(token_id, "sampling: a stop token id", 0, _MAX_INT)
        _check_between(self.min_p, "sampling: min_p", 0, 1)
        _check_real(self.repetition_penalty, "sampling: repetition_penalty")
        if not 0 < self.repetition_penalty <= _MAX_REAL:
            raise PromptError(
                f"sampling: repetition_penalty must be above 0 and at most {_MAX_REAL}, "
                f"got {self.repetition_penalty!r:.80}"
            )
        _check_between(self.presence_penalty, "sampling: presence_penalty", -2, 2)
        _check_between(self.frequency_penalty, "sampling: frequency_penalty", -2, 2)
        self._check_bias()
        if not isinstance(self.ignore_eos, bool):
            raise PromptError(f"sampling: ignore_eos must be a bool, got {self.ignore_eos!r:.80}")
        if self.logprobs is not None:
            check_integer(self.logprobs, "sampling: logprobs", 0, MAX_LOGPROBS)

    def _check_bias(self) -> None:
        _check_tuple(self.logit_bias, tuple, "sampling: logit_bias")
        if len(self.logit_bias) > MAX_BIASES:
            raise PromptError(
                f"sampling: logit_bias has {len(self.logit_bias)} entries; give at most "
                f"{MAX_BIASES}"
            )
        named: set[int] = set()
        for entry in self.logit_bias:
            if len(entry) != 2:
                raise PromptError(
                    f"sampling: logit_bias must hold pairs of token id and bias, got {entry!r:.80}"
                )
            token_id, bias = entry
            check_integer(token_id, "sampling: a token id of logit_bias", 0, _MAX_INT)
            _check_between(bias, f"sampling: logit_bias of token {token_id}", -100, 100)
            if token_id in named:
                raise PromptError(f"sampling: logit_bias names token {token_id} twice; remove one")
            named.add(token_id)

    @property
    def penalises(self) -> bool:
        """Whether tokens that occurred before have other logits."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @property
    def adjusts(self) -> bool:
        """Whether the settings need more than temperature, top-k, top-p and min-p."""
        return self.penalises or bool(self.logit_bias) or self.logprobs is not None


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    """One synchronised step of all agents.

    Attributes:
      agents: the prompts; names are unique, the order is the caller's.
      max_new_tokens: limit for the answers of agents without a limit of their own.
      sampling: how answers are sampled whose agents have no sampling of their own.
      index: number of the round, from 0.

    Raises:
      PromptError: no agents, two agents with the same name, a limit below 1, two contents or
        authors for one shared id.
    """

    agents: tuple[AgentPrompt, ...]
    max_new_tokens: int = 128
    sampling: Sampling = Sampling()
    index: int = 0

    def __post_init__(self) -> None:
        check_integer(self.index, "round: index", 0)
        where = f"round {self.index}"
        check_integer(self.max_new_tokens, f"{where}: max_new_tokens", 1)
        _check_tuple(self.agents, AgentPrompt, f"{where}: agents")
        if not self.agents:
            raise PromptError(f"{where}: no agents; give at least one")
        names: set[str] = set()
        shared: dict[str, Segment] = {}
        for prompt in self.agents:
            if prompt.agent in names:
                raise PromptError(f"{where}: agent {prompt.agent!r} occurs twice; rename one")
            names.add(prompt.agent)
            for segment in prompt.segments:
                if segment.kind == "shared" and shared.setdefault(segment.id, segment) != segment:
                    raise PromptError(
                        f"{where}: agent {prompt.agent!r}: shared segment {segment.id!r} "
                        "had another content or author before; give one id to one content"
                    )

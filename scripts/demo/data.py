"""Training data of the demo model: texts for the tokenizer, and conversations as token ids."""

import dataclasses
import math
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32

from scripts.demo.tokenizer import texts_of
from tokendance_jax.demo import harbour_trace
from tokendance_jax.demo.town import (
    KINDS,
    Probe,
    ProbeKind,
    View,
    draw_town,
    probes,
    prompt_of,
    story,
    view_of,
    words,
)
from tokendance_jax.prompt import Tokenizer, tokenize_prompt

# How often a question is of each kind, if the view allows all kinds.
_SHARES: dict[ProbeKind, float] = {
    "retrieve": 0.3,
    "combine": 0.2,
    "recall": 0.12,
    "abstain": 0.16,
    "repeat": 0.12,
    "tell": 0.1,
}
# How often an agent does not see its own statement, how often it sees only some of the other
# statements, and how often it sees no statement at all.
_WITHOUT_OWN, _SUBSET, _SILENT = 0.3, 0.25, 0.03
_QUESTIONS = (6, 20)
# Fewest and most tokens of an echo; choices for the number of different tokens in it.
_ECHO, _DIFFERENT = (8, 48), (4, 8, 64)
_TEXTS = 500
# Chat markup as the template writes it: at the end of an answer, before and after a further
# question, and at the end of a conversation.
_STOP, _BETWEEN, _BEHIND, _END = (
    "<|im_end|>",
    "\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
    "\n<|endoftext|>",
)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens, each filled with conversations.

    Attributes:
      token: token ids; each row has one more than the model reads.
      weight: weight of predicting this token in the loss.
      conversation: number of the conversation within the row; attention stays within one.
      answer: number of the answer that the token belongs to, from 0; -1: none. Answers that are cut
        off by the end of the row do not count.
      kinds: kind of each answer.
    """

    token: Int32[np.ndarray, "batch length"]
    weight: Float32[np.ndarray, "batch length"]
    conversation: Int32[np.ndarray, "batch length"]
    answer: Int32[np.ndarray, "batch length"]
    kinds: tuple[ProbeKind, ...]

    def correct(self, hit: Bool[np.ndarray, "batch shorter"]) -> dict[ProbeKind, tuple[int, int]]:
        """Counts the right answers.

        Args:
          hit: whether each token after the first of a row is the model's most probable one.

        Returns:
          For each kind, the number of answers without a miss, and the number of all answers. Each
          token of an answer is predicted from the right answer so far, so greedy decoding gives
          exactly the answers without a miss.
        """
        answer = self.answer[:, 1:]
        missed = set(np.unique(answer[~hit]).tolist())
        counts: dict[ProbeKind, tuple[int, int]] = {kind: (0, 0) for kind in KINDS}
        for number, kind in enumerate(self.kinds):
            right, total = counts[kind]
            counts[kind] = right + (number not in missed), total + 1
        return counts


def tokenizer_texts() -> Iterator[str]:
    """Yields texts of the training split, then those of the harbour trace.

    Names are split between their two syllables, so that no name becomes one token. The harbour
    trace adds words of ordinary English.
    """
    starts, ends = "|".join(words.NAME_STARTS), "|".join(words.NAME_ENDS)
    seam = re.compile(rf"\b({starts})({ends})\b")
    for seed in range(_TEXTS):
        trace = story(seed, random.Random(seed).randint(3, 8))
        for round_ in trace.rounds:
            for prompt in round_.agents:
                for segment in prompt.segments:
                    yield seam.sub(r"\1\n\2", segment.text or "")
                yield seam.sub(r"\1\n\2", prompt.recorded_output or "")
    yield from texts_of(harbour_trace())


def draw_batch(
    tokenizer: Tokenizer,
    seed: tuple[int, ...],
    *,
    rows: int,
    length: int,
    agents: tuple[int, int],
    text_weight: float,
    split: words.Split = "train",
    questions: tuple[int, int] = _QUESTIONS,
) -> Batch:
    """Draws a batch; the same arguments give the same batch.

    Args:
      tokenizer: the demo's, with its chat template.
      seed: numbers that together seed the draw.
      rows: number of rows.
      length: number of tokens that the model reads in a row.
      agents: fewest and most agents of a town. If the most is 0, rows are drills: random tokens
        that are repeated, which teach the model to look up and copy any token.
      text_weight: weight of tokens outside of answers; tokens of answers have weight 1.
      split: which names and places occur.
      questions: fewest and most questions of a conversation.
    """
    rng = random.Random(repr(seed))
    shape = rows, length + 1
    token = np.zeros(shape, np.int32)
    weight = np.zeros(shape, np.float32)
    conversation = np.zeros(shape, np.int32)
    answer = np.full(shape, -1, np.int32)
    kinds: list[ProbeKind] = []
    for row in range(rows):
        if not agents[1]:
            token[row], weight[row] = _drill(tokenizer, rng, length + 1)
            continue
        start = number = 0
        while start <= length:
            town_size = rng.randint(*agents)
            parts = _conversation(tokenizer, rng, town_size, split, rng.randint(*questions))
            for ids, kind in parts:
                stop = min(start + len(ids), length + 1)
                token[row, start:stop] = ids[: stop - start]
                weight[row, start:stop] = text_weight if kind is None else 1.0
                conversation[row, start:stop] = number
                if kind is not None and stop - start == len(ids):
                    answer[row, start:stop] = len(kinds)
                    kinds.append(kind)
                start = stop
            number += 1
    return Batch(token, weight, conversation, answer, tuple(kinds))


def _drill(
    tokenizer: Tokenizer, rng: random.Random, length: int
) -> tuple[Int32[np.ndarray, " length"], Float32[np.ndarray, " length"]]:
    """Draws the tokens and weights of an echo or of records."""
    plain = sorted(set(range(tokenizer.vocab_size)) - tokenizer.control_ids)
    return rng.choice((_echo, _records))(plain, rng, length)


def _echo(
    plain: Sequence[int], rng: random.Random, length: int
) -> tuple[Int32[np.ndarray, " length"], Float32[np.ndarray, " length"]]:
    """Draws random tokens and repeats them. Their first occurrence has no weight.

    There are few different tokens, so that only several tokens together determine the next one.
    """
    few = rng.sample(plain, rng.choice(_DIFFERENT))
    said = np.array(rng.choices(few, k=rng.randint(*_ECHO)), np.int32)
    weight = np.ones(length, np.float32)
    weight[: len(said)] = 0.0
    return np.resize(said, length), weight


def _records(
    plain: Sequence[int], rng: random.Random, length: int
) -> tuple[Int32[np.ndarray, " length"], Float32[np.ndarray, " length"]]:
    """Draws records of random tokens, and repeats the same records in other orders.

    A record is a key, filling, and a value. A key has up to four tokens, which also occur in other
    keys. Values have weight once they have occurred before.
    """
    columns = [rng.sample(plain, rng.randint(2, 8)) for _ in range(rng.randint(1, 4))]
    most = math.prod(map(len, columns))
    keys = set[tuple[int, ...]]()
    for _ in range(min(rng.randint(3, 16), most)):
        keys.add(tuple(map(rng.choice, columns)))
    filling = tuple(rng.sample(plain, rng.randint(0, 2)))
    size = rng.randint(1, 3)
    end = tuple(rng.sample(plain, rng.randint(0, 1)))
    records = [(*key, *filling, *rng.choices(plain, k=size), *end) for key in sorted(keys)]
    token, weight = [], []
    before = len(columns) + len(filling)
    while len(token) < length:
        rng.shuffle(records)
        said = float(bool(token))
        for record in records:
            token += record
            weight += [0.0] * before + [said] * size + [0.0] * len(end)
    return np.array(token[:length], np.int32), np.array(weight[:length], np.float32)


def _conversation(
    tokenizer: Tokenizer, rng: random.Random, agents: int, split: words.Split, questions: int
) -> Iterator[tuple[Any, ProbeKind | None]]:
    """Yields a prompt, its answer, and further questions and answers: ids, and kinds of answers."""
    town = draw_town(rng, agents, split)
    seat = rng.randrange(agents)
    others = [other for other in range(agents) if other != seat]
    if rng.random() < _SUBSET:
        others = rng.sample(others, rng.randint(1, len(others)))
    seen = others + [seat] * (rng.random() >= _WITHOUT_OWN)
    if rng.random() < _SILENT:
        seen = []
    rng.shuffle(seen)
    view = view_of(town, seat, seen)
    asked = _questions(view, rng, questions)
    stop, between, behind, end = map(tokenizer.encode_markup, (_STOP, _BETWEEN, _BEHIND, _END))
    yield tokenize_prompt(prompt_of(view, asked[0]), tokenizer, chat=True).token_ids, None
    for index, probe in enumerate(asked):
        if index:
            yield between + tokenizer.encode_text(probe.question) + behind, None
        yield tokenizer.encode_text(probe.answer) + stop, probe.kind
    yield end, None


def _questions(view: View, rng: random.Random, count: int) -> list[Probe]:
    """Draws different questions of all kinds."""
    left: dict[ProbeKind, list[Probe]] = {kind: probes(view, kind, rng) for kind in KINDS}
    drawn = []
    while len(drawn) < count:
        kinds: list[ProbeKind] = [kind for kind in KINDS if left[kind]]
        if not kinds:
            break
        (kind,) = rng.choices(kinds, [_SHARES[kind] for kind in kinds])
        drawn.append(left[kind].pop())
    return drawn

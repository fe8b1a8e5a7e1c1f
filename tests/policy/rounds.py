"""Prompts of a few token ids and random rounds of them, without a tokenizer or a model."""

import numpy as np
from hypothesis import strategies as st

from tokendance_jax.prompt.tokenized import TokenizedPrompt, TokenSpan

PAGE_SIZE = 4


def ids(tokens):
    return np.array(tokens, np.int32)


def prompt(agent, *segments, **fields):
    """Returns a prompt of segments (kind, id, token ids), without the empty ones."""
    spans, tokens = [], []
    for kind, id, new in segments:
        if len(new):
            spans.append(TokenSpan(kind, id, len(tokens), len(tokens) + len(new)))
            tokens.extend(new)
    return TokenizedPrompt(agent, ids(tokens), tuple(spans), **fields)


def common_round(agents=4, blocks=4, *, shared=40, private=30, task=20):
    """Returns a usual round: every agent sees all blocks in the same order; no token repeats."""
    fresh = iter(range(10_000))

    def some(count):
        return [next(fresh) for _ in range(count)]

    out = [("shared", f"out/{index}", some(shared + index)) for index in range(blocks)]
    return [
        prompt(
            str(index),
            ("system", "sys", some(private + index)),
            *out,
            ("task", "task", some(task + index)),
        )
        for index in range(agents)
    ]


def made(recipes):
    """Makes the prompts of a round that `rounds` drew."""
    return [prompt(name, *segments, fidelity=fidelity) for name, segments, fidelity in recipes]


# Few texts, of few lengths: prefixes, blocks, placements and whole rounds often recur.
TEXTS = st.builds(
    lambda start, length: [(start + 2 * step) % 5 for step in range(length)],
    st.integers(0, 2),
    st.sampled_from([1, 3, 4, 6, 9]),
)
NAMES = "abcde"


@st.composite
def rounds(draw, most=4):
    """Draws rounds of agents that join and leave, over a small set of texts.

    Each agent sees some shared blocks in an order of its own, some of them twice. Histories quote
    blocks of this round and of other rounds, and some private texts stand between blocks. Many
    prompts differ in one segment from an earlier prompt.

    Returns:
      For each round, the recipes from which `made` makes prompts. The strategy does not make them
      itself, because the tests' type checker draws random numbers, which a strategy must not do.
    """
    blocks = draw(st.lists(TEXTS, min_size=1, max_size=5))
    town = draw(st.sampled_from([[], [1] * 18]))
    starts_shared = draw(st.booleans())
    some = st.sampled_from
    fidelity = some(["collective"] * 5 + ["exact"])

    def middle():
        kind = draw(some(["shared"] * 4 + ["quote", "history", "markup"]))
        if kind in ("history", "markup"):
            return kind, "own", draw(TEXTS)
        number = draw(st.integers(0, len(blocks) - 1))
        id = f"out/{NAMES[number]}"
        return ("shared" if kind == "shared" else "history", id, blocks[number])

    def system():
        return "system", "sys", [] if starts_shared else [*town, *draw(st.just([]) | TEXTS)]

    def segments():
        yield system()
        for _ in range(draw(st.integers(0, 5))):
            yield middle()
        yield "task", "task", draw(TEXTS)
        yield "markup", "end", draw(some([[], [2, 2]]))

    def nearly(before):
        """Returns the segments with one of them replaced or removed."""
        at = draw(st.integers(0, len(before) - 2))
        instead = {"system": system, "task": lambda: ("task", "task", draw(TEXTS))}
        new = instead.get(before[at][0], middle)
        removed = before[at][0] not in instead and draw(st.booleans())
        return [*before[:at], *([] if removed else [new()]), *before[at + 1 :]]

    drawn, prompts = [], []
    for _ in range(draw(st.integers(1, most))):
        names = draw(st.lists(some(NAMES), min_size=1, max_size=4, unique=True))
        recipes = []
        for name in names:
            how = draw(some(["new", "same", "nearly", "nearly"])) if prompts else "new"
            if how == "new":
                made_of = list(segments())
            else:
                made_of = draw(some(prompts))
                made_of = made_of if how == "same" else nearly(made_of)
            prompts.append(made_of)
            recipes.append((name, made_of, draw(fidelity)))
        drawn.append(recipes)
    return drawn

"""Small rounds for the engine's tests, and engine sizes that need few programs."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.models.decoder.tiny import tiny_model
from tokendance_jax.engine.rounds import RoundEngine
from tokendance_jax.prompt import AgentPrompt, Round, Sampling, Segment

# There is one bucket of rows, so rounds take several calls. The pool has 96 pages of the tiny model
# and a round takes up to 80 of them, so cached pages are soon evicted.
SMALL: dict[str, Any] = {
    "kv_memory": 96 * (8 << 10),
    "row_budget": 64,
    "max_agents": 8,
    "decode_steps": 3,
}
# All policies, with options that need every program.
POLICIES: dict[str, dict[str, Any]] = {
    "dense": {},
    "prefix": {},
    "tokendance": {},
    "tokendance deviation": {"selection": "deviation", "head_pages": 2},
    "tokendance query": {"selection": "query", "head_pages": 2},
    "tokendance joint-agent": {"base": "joint-agent", "selection": "own"},
    "blend": {},
    "blend-batched": {},
    "epic": {},
}
tiny = functools.cache(tiny_model)


@functools.cache
def small_programs():
    """The programs that all engines with the sizes `SMALL` share."""
    return RoundEngine(tiny(), **SMALL).programs


def small_engine(policy, options, **settings):
    """An engine with the sizes `SMALL` that shares whatever that costs. Its pool is full of NaN.

    Further settings must not change the sizes.
    """
    options = dataclasses.replace(options, least_saving=None)
    settings = {**SMALL, **settings, "programs": small_programs()}
    engine = RoundEngine(tiny(), policy=policy, options=options, **settings)
    engine.runner.kv = jax.tree.map(lambda a: jnp.full(a.shape, jnp.nan, a.dtype), engine.runner.kv)
    return engine


SHARED = (
    Segment("shared", "out/a", text="Edda mends the long net by the old quay.\n"),
    Segment("shared", "out/b", text="Tomas counts the barrels, then counts them again.\n"),
)


def agent(name, *, persona="", shared=SHARED, task="What do you do now?\n", limit=None):
    segments = (
        Segment("system", f"sys/{name}", text=f"You are {name}. {persona}\n"),
        *shared,
        Segment("task", f"task/{name}", text=task),
    )
    return AgentPrompt(name, segments, max_new_tokens=limit)


def three(**sampling):
    """Three agents with personas of different lengths."""
    agents = (
        agent("Edda", persona="You mend nets. " * 5),
        agent("Tomas", persona="You keep the store. " * 11),
        agent("Ines", persona="You pilot ships through the sound at night. " * 2),
    )
    return Round(agents, max_new_tokens=12, sampling=Sampling(**sampling))


def words(count, seed):
    """Returns `count` random token ids of the demo's tokenizer, without special tokens."""
    return tuple(np.random.default_rng(seed).integers(10, 1000, count).tolist())


def block(name, tokens=35):
    """What an agent said in the round before. It has the same tokens wherever it stands."""
    return Segment("shared", f"out/{name}", token_ids=words(tokens, seed=ord(name)))


def member(name, *middle, private=21, task=12, **fields):
    """An agent with private text, anything in the middle, and a task of its own."""
    segments = (
        Segment("system", f"sys/{name}", token_ids=words(private, seed=100 * ord(name) + private)),
        *middle,
        Segment("task", f"task/{name}", token_ids=words(task, seed=200 * ord(name))),
    )
    segments = tuple(segment for segment in segments if not segment.empty)
    return AgentPrompt(name, segments, **fields)


def gathering(names="abc", **fields):
    """A typical round: all agents see what all of them said, in one order."""
    blocks = [block(name) for name in names]
    agents = tuple(
        member(name, *blocks, private=19 + 6 * place) for place, name in enumerate(names)
    )
    return Round(agents, max_new_tokens=6, **fields)


def mixed():
    """A round with everything that can occur in prompts."""
    a, b, c = block("a", 40), block("b", 5), block("c", 23)
    own = Segment("history", "own", token_ids=words(9, seed=1))
    quote = Segment("history", "quote", token_ids=c.token_ids)
    again = Segment("task", "again", token_ids=words(30, seed=2))
    return Round(
        (
            member("a", a, b, c, private=33),
            member("b", c, own, a, private=17),  # another order, text in between, one left out
            member("c", a, b, a, again, private=0),  # one twice; begins with shared text
            member("d", quote, own, b, again, private=50),
            member("e", a, b, c, fidelity="exact"),
        ),
        max_new_tokens=6,
    )


class Broken(Exception):
    pass


@contextlib.contextmanager
def breaking(engine, how, when):
    """Makes the `when`-th call of a program, or of the callback that it yields, raise an error."""
    calls = iter(range(10_000))
    inner, programs = engine.programs.call, engine.programs

    def call(program, *arguments):
        mine = how in ("before", "after") and next(calls) == when
        if mine and how == "before":
            raise Broken
        result = inner(program, *arguments)
        if mine:  # donated arrays are gone, and results are lost
            raise KeyboardInterrupt
        return result

    def heard(*_):
        if how in ("callback", "interrupt") and next(calls) == when:
            raise Broken if how == "callback" else KeyboardInterrupt

    programs.call = call
    try:
        yield heard
    finally:
        programs.call = inner

"""The work on which kernels are timed: a round's pages, tables and rows at a model's sizes."""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokendance_jax.kernels import storage
from tokendance_jax.kernels.lanes import KEY_BLOCK, Array, GroupTables, LaneTables
from tokendance_jax.kernels.page_diff import DiffPlan
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.sparse_restore import RestorePlan
from tokendance_jax.models.decoder.config import DecoderConfig
from tokendance_jax.plan.buckets import Buckets
from tokendance_jax.plan.groups import group_tables
from tokendance_jax.plan.lane import LanePlan
from tokendance_jax.plan.round_plan import RoundPlan, pack
from tokendance_jax.plan.shapes import PACKING, Shapes
from tokendance_jax.policy.policies import PolicyOptions

# Number of patches of every mirror; they replace the first pages of the base.
PATCHES = PolicyOptions().head_pages
# Rows that a reference computes at a time, as it gathers all keys of each row.
_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Work:
    """A round of agents that share a base and compute the end of their own text.

    Each agent reads the base under its own frame. The pool holds page 0, the base, and for every
    agent its own pages, its patches, and room for a copy of the base.

    Attributes:
      config: sizes of the model; the pool has as many layers.
      dtype: precision of the pool, "float32" or "bfloat16".
      page_size: token slots in a page.
      agents: number of agents, each of which has a lane.
      shared: tokens of the base; a multiple of `KEY_BLOCK`.
      own: tokens of each agent's own text, after the base; a multiple of `KEY_BLOCK`.
      rows: how many of its own tokens each agent computes, at the end.

    Raises:
      ValueError: an agent would compute more rows than it has own tokens, or the tokens are not
        multiples of `KEY_BLOCK`.
    """

    config: DecoderConfig
    dtype: str
    page_size: int
    agents: int
    shared: int
    own: int
    rows: int

    def __post_init__(self) -> None:
        if self.rows > self.own:
            raise ValueError(f"rows: {self.rows} of {self.own} own tokens; give fewer")
        if self.shared % KEY_BLOCK or self.own % KEY_BLOCK:
            raise ValueError(f"shared, own: give multiples of {KEY_BLOCK}")

    @property
    def base(self) -> np.ndarray:
        """i32 [shared pages]; the pages of the base."""
        return 1 + np.arange(self.shared // self.page_size, dtype=np.int32)

    def pages_of(self, agent: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns an agent's own pages, its patches, and the pages of its copy of the base."""
        counts = self.own // self.page_size, PATCHES, len(self.base)
        start = 1 + len(self.base) + agent * sum(counts)
        pages = np.arange(start, start + sum(counts), dtype=np.int32)
        own, patches, copy = np.split(pages, np.cumsum(counts)[:-1])
        return own, patches, copy

    def frame_of(self, agent: int) -> int:
        """The frame of the base in an agent's lane, as if after a private text of any length."""
        return 1 + agent

    @cached_property
    def shapes(self) -> Shapes:
        """Static shapes whose buckets have exactly the sizes of this work."""
        rows, entries = self.agents * self.rows, (self.shared + self.own) // self.page_size
        return Shapes(
            rows=Buckets(rows, rows),
            lanes=Buckets(self.agents, self.agents),
            entries=Buckets(entries, entries),
            pages=int(self.pages_of(self.agents)[0][0]),
            page_size=self.page_size,
            packing=PACKING.get(jax.default_backend()),  # as in the engine
        )

    @cached_property
    def kv(self) -> PagedKV:
        """A pool of random numbers."""
        c = self.config
        stored = storage.storage_dtype(jnp.dtype(self.dtype), jax.default_backend())
        shape = self.shapes.pages, self.page_size, c.num_key_value_heads, c.head_dim

        @jax.jit
        def draw(keys: jax.Array) -> jax.Array:
            return jax.lax.map(
                lambda key: storage.store(jax.random.normal(key, shape), stored), keys
            )

        keys = jax.random.split(jax.random.key(0), (2, c.num_hidden_layers))
        return PagedKV(draw(keys[0]), draw(keys[1]))

    def lanes(self, *, copied: bool = False) -> list[LanePlan]:
        """Makes every agent's lane; `copied`: over its copy of the base, which has frame 0."""
        lanes = []
        for agent in range(self.agents):
            own, _, copy = self.pages_of(agent)
            page = np.concatenate([copy if copied else self.base, own])
            frame = np.zeros_like(page)
            frame[: len(copy)] = 0 if copied else self.frame_of(agent)
            tokens = self.shared + self.own
            lanes.append(
                LanePlan(
                    token_ids=np.zeros(tokens, np.int32),
                    computed=np.arange(tokens - self.rows, tokens, dtype=np.int32),
                    page=page,
                    frame=frame,
                    first=np.zeros_like(page),
                    slots=np.full_like(page, self.page_size),
                    base=np.zeros_like(page),
                )
            )
        return lanes

    @cached_property
    def prefill(self) -> RoundPlan:
        """The plan of one call that computes the rows of all agents."""
        (plan,) = pack(self.lanes(), self.shapes)
        return plan

    @cached_property
    def decode(self) -> tuple[GroupTables, LaneTables]:
        """The tables of what the planner has agents read together, and of what each reads alone."""
        return group_tables(self.lanes(), self.shapes)

    @cached_property
    def last(self) -> np.ndarray:
        """i32 [agents]; position of the row that each agent decodes."""
        return np.full(self.agents, self.shared + self.own - 1, np.int32)

    def restore(self, *, patched: bool = True) -> RestorePlan:
        """Plans every agent's copy of the base: keys rotated by the frame, patches if `patched`."""
        columns = []
        for agent in range(self.agents):
            _, patches, copy = self.pages_of(agent)
            source = self.base.copy()
            if patched:
                source[: len(patches)] = patches[: len(source)]
            columns.append((source, copy, np.full_like(copy, self.frame_of(agent))))
        source, target, turn = (np.concatenate(column) for column in zip(*columns, strict=True))
        offset = np.arange(self.page_size, dtype=np.int32)
        source, target = (
            (page[:, None] * self.page_size + offset[None, :]).reshape(-1)
            for page in (source, target)
        )
        turn = np.repeat(turn, self.page_size)
        return RestorePlan.of_slots(source, target, turn, page_size=self.page_size)

    def comparisons(self) -> DiffPlan:
        """Plans the comparisons of the base with every agent's copy of it, page by page."""
        siblings = np.stack([self.pages_of(agent)[2] for agent in range(self.agents)], axis=1)
        frame = np.array([self.frame_of(agent) for agent in range(self.agents)])
        base = np.repeat(self.base, self.agents)
        return DiffPlan.of_comparisons(
            base,
            siblings.reshape(-1),
            np.tile(frame, len(self.base)),
            np.zeros_like(base),
            np.full_like(base, self.page_size),
        )

    def queries(self, rows: int) -> jax.Array:
        """Draws random queries f32 [rows, heads, head_dim]."""
        shape = rows, self.config.num_attention_heads, self.config.head_dim
        return jax.random.normal(jax.random.key(1), shape)

    def expected(
        self,
        reference: Callable[..., jax.Array],
        q: jax.Array,
        layer: int,
        position: Array,
        lane: Array,
    ) -> jax.Array:
        """Computes rows with a reference of round attention, a few rows at a time."""
        rope = self.config.rope

        @jax.jit
        def call(kv: PagedKV, rows: Any, tables: LaneTables) -> jax.Array:
            def one(row: tuple[jax.Array, ...]) -> jax.Array:
                q, *at = (x[None] for x in row)
                return reference(q, kv, layer, *at, tables, rope=rope)[0]

            return jax.lax.map(one, rows, batch_size=_ROWS)

        return call(self.kv, (q, position, lane), self.prefill.tables)

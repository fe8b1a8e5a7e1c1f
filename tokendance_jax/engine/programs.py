"""The jitted programs of a round, compiled ahead of time for bucket shapes."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int32

from tokendance_jax.collector.plan import RoundPlan, Shapes, blank_plan
from tokendance_jax.engine.sampling import SamplingArrays, is_stop, sample, sampling_arrays
from tokendance_jax.kernels.decode_attention import decode_attention
from tokendance_jax.kernels.flash import block_pages
from tokendance_jax.kernels.lanes import Array, LaneTables
from tokendance_jax.kernels.round_attention import round_attention
from tokendance_jax.model import Model
from tokendance_jax.models.qwen2.model import Rows
from tokendance_jax.paged.kv import PagedKV


@no_type_check  # JAX also builds pytrees of stand-ins that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Where each lane stands before a decode call.

    Attributes:
      token: the last token chosen, whose K and V are not written yet.
      position: its logical position.
      live: whether the lane goes on.
      generated: tokens chosen so far.
    """

    token: Int32[Array, " lanes"]
    position: Int32[Array, " lanes"]
    live: Bool[Array, " lanes"]
    generated: Int32[Array, " lanes"]


class Programs:
    """A model's programs: prefill, first token, decode.

    Each is traced and compiled once per bucket shape, when it is first asked for; `compile_s` adds
    up what that took, so that callers can keep it out of their timings. Calls trace nothing.
    """

    def __init__(self, model: Model, shapes: Shapes):
        self.shapes = shapes
        self.compile_s = 0.0
        self._graph = model.graph
        self._state = model.state
        self._width = model.config.hidden_size
        self._jitted = {
            "prefill": jax.jit(self._prefill, donate_argnames=("kv", "hidden")),
            "rows": jax.jit(self._rows, donate_argnames=("kv",)),
            "first_token": jax.jit(self._first_token),
            "logits": jax.jit(self._logits),
            "decode": jax.jit(self._decode, donate_argnames=("kv",)),
        }
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def prefill(
        self, kv: PagedKV, hidden: Float[jax.Array, "lanes width"], plan: RoundPlan
    ) -> tuple[PagedKV, Float[jax.Array, "lanes width"]]:
        """Computes a plan's rows. Takes `kv` and `hidden` donated.

        Args:
          kv: the pool.
          hidden: residual stream at the lanes' last tokens, as far as earlier calls computed it.
          plan: the rows.

        Returns:
          The pool with the rows written, and `hidden` with this call's lanes filled in.
        """
        return self._call("prefill", kv, hidden, plan)

    def rows(self, kv: PagedKV, plan: RoundPlan) -> tuple[PagedKV, Float[jax.Array, "rows width"]]:
        """Computes a plan's rows and returns the residual stream of all. Takes `kv` donated."""
        return self._call("rows", kv, plan)

    def first_token(
        self, hidden: Float[jax.Array, "lanes width"], sampling: SamplingArrays
    ) -> Int32[jax.Array, " lanes"]:
        """Chooses each lane's first token from the residual stream at its last prompt token."""
        return self._call("first_token", hidden, sampling)

    def logits(self, hidden: Float[Array, "rows width"]) -> Float[jax.Array, "rows vocab"]:
        """Next-token logits f32 of residual-stream rows."""
        return self._call("logits", hidden)

    def decode(
        self,
        kv: PagedKV,
        state: DecodeState,
        tables: LaneTables,
        slot: Int32[np.ndarray, "lanes steps"],
        sampling: SamplingArrays,
    ) -> tuple[PagedKV, Int32[jax.Array, "lanes steps"]]:
        """Generates up to `steps` tokens per lane without leaving the device.

        Takes `kv` donated. Stops early when no lane is live.

        Args:
          kv: the pool.
          state: where each lane stands.
          tables: block tables that cover the positions to come.
          slot: write slots of the positions to come.
          sampling: how each lane samples and when it ends.

        Returns:
          The pool and the tokens, -1 where a lane was not live.
        """
        return self._call("decode", kv, state, tables, slot, sampling)

    def new_hidden(self, lanes: int) -> Float[jax.Array, "lanes width"]:
        """An empty residual stream for `lanes` lanes (a bucket)."""
        return jax.device_put(np.zeros((lanes, self._width), np.float32))

    def warm_up(self, kv: PagedKV, *, agents: int, tokens: int, steps: int) -> None:
        """Compiles what rounds of up to `agents` lanes and `tokens` positions may need.

        Args:
          kv: the pool; only its shapes are used.
          agents: most lanes.
          tokens: most positions of a lane, the answer included.
          steps: tokens of a decode call.
        """
        shapes = self.shapes
        block = block_pages(shapes.page_size)
        most = shapes.entries.fit(-(-tokens // (block * shapes.page_size)) * block)
        for lanes in shapes.lanes.upto(agents):
            sampling = sampling_arrays(
                lanes, temperature=0.0, top_k=0, top_p=1.0, keys=[], limits=[], stop_ids=[]
            )
            hidden = self.new_hidden(lanes)
            self._program("first_token", hidden, sampling)
            idle = np.zeros(lanes, np.int32)
            state = DecodeState(idle, idle, np.zeros(lanes, np.bool_), idle)
            slot = np.full((lanes, steps), shapes.no_slot, np.int32)
            for entries in shapes.entries.upto(most):
                for rows in shapes.rows.sizes:
                    plan = blank_plan(rows=rows, lanes=lanes, entries=entries, shapes=shapes)
                    self._program("prefill", kv, hidden, plan)
                self._program("decode", kv, state, plan.tables, slot, sampling)

    def _call(self, name: str, *arguments: Any) -> Any:
        return self._program(name, *arguments)(self._state, *arguments)

    def _program(self, name: str, *arguments: Any) -> Callable[..., Any]:
        """The compiled program for arguments of these shapes."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arguments))
        program = self._compiled.get((name, shapes))
        if program is None:
            # Calls return before their work is done: let it end, or it would hide behind the
            # compilation and be missing from the caller's timings.
            jax.block_until_ready(arguments)
            started = time.perf_counter()
            program = self._jitted[name].lower(self._state, *arguments).compile()
            self._compiled[name, shapes] = program
            self.compile_s += time.perf_counter() - started
        return program

    def _rows(self, state: nnx.State, kv: PagedKV, plan: RoundPlan) -> tuple[PagedKV, jax.Array]:
        model = nnx.merge(self._graph, state)
        theta = model.config.rope_theta
        position = jnp.asarray(plan.rows.position)

        def attend(q: jax.Array, kv: PagedKV, layer: int) -> jax.Array:
            return round_attention(
                q, kv.k, kv.v, layer, position, plan.tables, plan.tiles, theta=theta
            )

        x, kv = model.hidden(plan.rows, kv, attend)
        return kv, x

    def _prefill(
        self, state: nnx.State, kv: PagedKV, hidden: jax.Array, plan: RoundPlan
    ) -> tuple[PagedKV, jax.Array]:
        kv, x = self._rows(state, kv, plan)
        ends_here = (plan.out_row < x.shape[0])[:, None]
        return kv, jnp.where(ends_here, x.at[plan.out_row].get(mode="clip"), hidden)

    def _first_token(
        self, state: nnx.State, hidden: jax.Array, sampling: SamplingArrays
    ) -> jax.Array:
        logits = self._logits(state, hidden)
        return sample(logits, sampling, jnp.zeros(hidden.shape[:1], jnp.int32))

    def _logits(self, state: nnx.State, hidden: jax.Array) -> jax.Array:
        return nnx.merge(self._graph, state).logits(hidden)

    def _decode(
        self,
        state: nnx.State,
        kv: PagedKV,
        start: DecodeState,
        tables: LaneTables,
        slot: jax.Array,
        sampling: SamplingArrays,
    ) -> tuple[PagedKV, jax.Array]:
        model = nnx.merge(self._graph, state)
        theta = model.config.rope_theta
        lanes, steps = slot.shape

        def go_on(carry: tuple[jax.Array, PagedKV, DecodeState, jax.Array]) -> jax.Array:
            index, _, at, _ = carry
            return (index < steps) & jnp.any(at.live)

        def step(
            carry: tuple[jax.Array, PagedKV, DecodeState, jax.Array],
        ) -> tuple[jax.Array, PagedKV, DecodeState, jax.Array]:
            index, kv, at, tokens = carry
            position = jnp.where(at.live, at.position, -1)
            target = jnp.where(at.live, slot[:, index], self.shapes.no_slot)
            # The pages that answers are written to are the lane's own: they lie in frame 0.
            rows = Rows(token=at.token, position=position, canonical=position, slot=target)

            def attend(q: jax.Array, kv: PagedKV, layer: int) -> jax.Array:
                return decode_attention(q, kv.k, kv.v, layer, position, tables, theta=theta)

            hidden, kv = model.hidden(rows, kv, attend)
            chosen = sample(model.logits(hidden), sampling, jnp.asarray(at.generated))
            chosen = jnp.where(at.live, chosen, -1)
            generated = at.generated + at.live.astype(jnp.int32)
            after = DecodeState(
                token=jnp.where(at.live, chosen, at.token),
                position=at.position + at.live.astype(jnp.int32),
                live=at.live & ~is_stop(chosen, sampling) & (generated < sampling.limit),
                generated=generated,
            )
            tokens = jax.lax.dynamic_update_slice(tokens, chosen[:, None], (0, index))
            return index + 1, kv, after, tokens

        start = jax.tree.map(jnp.asarray, start)
        carry = (jnp.int32(0), kv, start, jnp.full((lanes, steps), -1, jnp.int32))
        _, kv, _, tokens = jax.lax.while_loop(go_on, step, carry)
        return kv, tokens

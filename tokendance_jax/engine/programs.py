"""The jitted programs of a round, compiled ahead of time for bucket shapes."""

import dataclasses
import inspect
import time
from collections.abc import Callable
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int32

from tokendance_jax.collector.groups import empty_groups
from tokendance_jax.collector.plan import RoundPlan, blank_plan
from tokendance_jax.collector.policy import Policy
from tokendance_jax.collector.shapes import Shapes
from tokendance_jax.engine.sampling import SamplingArrays, is_stop, sample, sampling_arrays
from tokendance_jax.kernels import storage
from tokendance_jax.kernels.decode_attention import decode_attention
from tokendance_jax.kernels.flash import block_pages
from tokendance_jax.kernels.lanes import Array, GroupTables, LaneTables
from tokendance_jax.kernels.round_attention import attention_mass, round_attention
from tokendance_jax.kernels.sparse_restore import RestorePlan, sparse_restore
from tokendance_jax.model import Model
from tokendance_jax.models.product import ROW_GROUP
from tokendance_jax.models.qwen2.model import Qwen2, Rows
from tokendance_jax.paged.kv import PagedKV, pool_format


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

    def __init__(
        self,
        model: Model,
        shapes: Shapes,
        *,
        implementation: str | None = None,
        device: jax.Device | None = None,
    ):
        """Compiles nothing yet.

        Args:
          model: the model.
          shapes: the static shapes.
          implementation: which kernels run (see `kernels.dispatch`).
          device: where the programs run; None: the default device.
        """
        self.model = model
        self.shapes = shapes
        self.implementation = implementation
        self.compile_s = 0.0
        platform = (jax.devices()[0] if device is None else device).platform
        # XLA counts a donated pool twice, and then computes products twice to save memory.
        self._compiler_options = (
            {"xla_disable_hlo_passes": "rematerialization"} if platform in ("cuda", "gpu") else None
        )
        # Attention is XLA code there, which takes long to compile for every layer.
        self._rolled = platform == "cpu"
        self._jitted = {
            "prefill": _jit(self._prefill, device, results=3, donate=("kv", "hidden")),
            "link": _jit(self._link, device),
            "deviation": _jit(self._deviation, device, results=3),
            "attention": _jit(self._attention, device, results=2),
            "rest": _jit(self._rest, device, results=3, donate=("kv", "hidden")),
            "first_token": jax.jit(self._first_token),
            "logits": jax.jit(self._logits),
            "decode": _jit(self._decode, device, results=2),
        }
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
        return self.model.config.num_hidden_layers

    def look_layers(self, what: str) -> float:
        """Layers that a look runs rows through, and of the one it looks at, its weights' share."""
        c = self.model.config
        kv, q = (heads * c.head_dim for heads in (c.num_key_value_heads, c.num_attention_heads))
        if what == "deviation":
            return 1 + c.hidden_size * 2 * kv / c.layer_weights
        return self.layers // 2 + c.hidden_size * (q + 2 * kv) / c.layer_weights

    def prefill(
        self, kv: PagedKV, hidden: Float[jax.Array, "seats width"], plan: RoundPlan
    ) -> tuple[PagedKV, Float[jax.Array, "seats width"], Float[jax.Array, "rows width"]]:
        """Computes a plan's rows. Takes `kv` and `hidden` donated.

        Args:
          kv: the pool.
          hidden: residual stream at the agents' last tokens, as far as earlier calls computed it.
          plan: the rows.

        Returns:
          The pool with the rows written, `hidden` with this call's agents filled in, and the
          residual stream of all rows.
        """
        return self._call("prefill", kv, hidden, plan)

    def rest(
        self,
        kv: PagedKV,
        hidden: Float[jax.Array, "seats width"],
        x: Float[Array, "rows width"],
        plan: RoundPlan,
    ) -> tuple[PagedKV, Float[jax.Array, "seats width"], Float[jax.Array, "rows width"]]:
        """As `prefill`, for rows that have their residual stream `x` behind layer 0 already."""
        return self._call("rest", kv, hidden, x, plan)

    def link(self, kv: PagedKV, plan: RestorePlan) -> PagedKV:
        """Copies pieces of the pool's pages, keys rotated on. Takes `kv` donated."""
        return self._call("link", kv, plan)

    def deviation(
        self, kv: PagedKV, plan: RoundPlan, shown: Int32[np.ndarray, " rows"]
    ) -> tuple[PagedKV, Float[jax.Array, "rows width"], Float[jax.Array, "2 rows"]]:
        """Takes rows through layer 0 and compares their K and V at layer 1 with what slots hold.

        The measure of CacheBlend (arXiv 2405.16444, section 4.3). Takes `kv` donated.

        Args:
          kv: the pool.
          plan: the rows; where they have slots to write, layer 0 is written.
          shown: the slots to compare with.

        Returns:
          The pool, the residual stream behind layer 0, and the squared differences of each row's K
          and V.
        """
        return self._call("deviation", kv, plan, shown)

    def attention(
        self, kv: PagedKV, plan: RoundPlan
    ) -> tuple[PagedKV, Float[jax.Array, "lanes entries"]]:
        """How much a plan's rows attend to each entry of their lanes' tables, in the middle layer.

        The rows run through the layers before it, and write their K and V there and in it. Takes
        `kv` donated.
        """
        return self._call("attention", kv, plan)

    def first_token(
        self, hidden: Float[jax.Array, "lanes width"], sampling: SamplingArrays
    ) -> Int32[jax.Array, " lanes"]:
        """Chooses each lane's first token from the residual stream at its last prompt token.

        It is `sampling.NOT_FINITE` where logits are not finite.
        """
        return self._call("first_token", hidden, sampling)

    def logits(self, hidden: Float[Array, "rows width"]) -> Float[jax.Array, "rows vocab"]:
        """Next-token logits f32 of residual-stream rows."""
        return self._call("logits", hidden)

    def decode(
        self,
        kv: PagedKV,
        state: DecodeState,
        tables: LaneTables,
        groups: GroupTables,
        slot: Int32[np.ndarray, "lanes steps"],
        sampling: SamplingArrays,
    ) -> tuple[PagedKV, Int32[jax.Array, "lanes steps"]]:
        """Generates up to `steps` tokens per lane without leaving the device.

        Takes `kv` donated. Stops early when no lane is live.

        Args:
          kv: the pool.
          state: where each lane stands.
          tables: block tables that cover the positions to come, without what groups hold.
          groups: what several lanes hold.
          slot: write slots of the positions to come.
          sampling: how each lane samples and when it ends.

        Returns:
          The pool and the tokens, -1 where a lane was not live. `sampling.NOT_FINITE` is the last
          of a lane whose logits are not finite.
        """
        return self._call("decode", kv, state, tables, groups, slot, sampling)

    def new_hidden(self, lanes: int) -> Float[jax.Array, "lanes width"]:
        """An empty residual stream for `lanes` lanes (a bucket)."""
        return jax.device_put(np.zeros((lanes, self.model.config.hidden_size), np.float32))

    def warm_up(self, kv: PagedKV, policy: Policy, *, agents: int, tokens: int, steps: int) -> None:
        """Compiles what rounds of up to `agents` agents and `tokens` positions may need.

        Args:
          kv: the pool; only its shapes are used.
          policy: what plans the rounds.
          agents: most agents.
          tokens: most positions of a lane, the answer included.
          steps: tokens of a decode call.
        """
        shapes = self.shapes
        entries = shapes.entries_of(tokens, shapes.page_size)
        # Another key block begins where the frame changes.
        blocks = policy.frames * block_pages(shapes.page_size)
        room = max(0, min(blocks, shapes.entries.budget - entries))
        most = shapes.entries.fit(entries + room)
        for rows in shapes.rows.sizes if "link" in policy.programs else ():
            nothing = np.zeros(0, np.int32)
            plan = RestorePlan.of_slots(nothing, nothing, nothing, page_size=shapes.page_size)
            self._program("link", kv, plan.padded(rows, rows))
        for lanes in shapes.lanes.upto(agents):
            hidden = self.new_hidden(lanes)
            self._program("first_token", hidden, blank_sampling(lanes))
            for entries in shapes.entries.upto(most):
                for rows in shapes.rows.sizes:
                    self._warm_up_prefill(kv, policy, agents, hidden, rows, entries)
                idle = blank_decode(lanes=lanes, entries=entries, steps=steps, shapes=shapes)
                self._program("decode", kv, *idle)

    def _warm_up_prefill(
        self,
        kv: PagedKV,
        policy: Policy,
        agents: int,
        hidden: Float[jax.Array, "seats width"],
        rows: int,
        entries: int,
    ) -> None:
        """Compiles what takes plans of these shapes; bases may bring prefills of more lanes."""
        shapes, seats = self.shapes, len(hidden)
        most = min(min(agents, seats) + policy.bases, shapes.lanes.budget)
        for lanes in shapes.lanes.upto(max(seats, most)):
            if lanes < seats:
                continue
            plan = blank_plan(rows=rows, lanes=lanes, seats=seats, entries=entries, shapes=shapes)
            self._program("prefill", kv, hidden, plan)
            if lanes > seats:
                continue
            nowhere = np.full(rows, shapes.no_slot, np.int32)
            x = np.zeros((rows, hidden.shape[1]), np.float32)
            looks = {"deviation": (kv, plan, nowhere), "attention": (kv, plan)}
            for name, arguments in {**looks, "rest": (kv, hidden, x, plan)}.items():
                if name in policy.programs:
                    self._program(name, *arguments)

    def compile(self, name: str, *arguments: Any) -> jax.stages.Compiled:
        """The program of that name, compiled for arguments of these shapes."""
        lowered = self._jitted[name].lower(self.model.state, *arguments)
        return lowered.compile(compiler_options=self._compiler_options)

    def _call(self, name: str, *arguments: Any) -> Any:
        return self._program(name, *arguments)(self.model.state, *arguments)

    def _program(self, name: str, *arguments: Any) -> Callable[..., Any]:
        """The compiled program for arguments of these shapes."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arguments))
        program = self._compiled.get((name, shapes))
        if program is None:
            # Calls return before their work is done: let it end, or it would hide behind the
            # compilation and be missing from the caller's timings.
            jax.block_until_ready(arguments)
            started = time.perf_counter()
            program = self.compile(name, *arguments)
            self._compiled[name, shapes] = program
            self.compile_s += time.perf_counter() - started
        return program

    def _hidden(
        self, model: Qwen2, plan: RoundPlan, kv: PagedKV, **options: Any
    ) -> tuple[jax.Array, PagedKV]:
        """Runs a plan's rows, that meet the pages of their lanes; options as `Qwen2.hidden`."""
        theta = self.model.config.rope_theta
        position = jnp.asarray(plan.rows.position)

        def attend(q: jax.Array, kv: PagedKV, layer: int | jax.Array) -> jax.Array:
            return round_attention(
                q,
                kv.k,
                kv.v,
                layer,
                position,
                plan.tables,
                plan.tiles,
                shared=plan.shared,
                theta=theta,
                implementation=self.implementation,
            )

        return model.hidden(plan.rows, kv, attend, rolled=self._rolled, **options)

    def _prefill(
        self, state: nnx.State, kv: PagedKV, hidden: jax.Array, plan: RoundPlan
    ) -> tuple[PagedKV, jax.Array, jax.Array]:
        model = nnx.merge(self.model.graph, state)
        x, kv = self._hidden(model, plan, kv)
        return kv, _keep(hidden, x, plan), x

    def _rest(
        self, state: nnx.State, kv: PagedKV, hidden: jax.Array, x: jax.Array, plan: RoundPlan
    ) -> tuple[PagedKV, jax.Array, jax.Array]:
        model = nnx.merge(self.model.graph, state)
        layers = range(1, len(model.layers))
        x, kv = self._hidden(model, plan, kv, x=x, layers=layers)
        return kv, _keep(hidden, x, plan), x

    def _link(self, state: nnx.State, kv: PagedKV, plan: RestorePlan) -> PagedKV:
        del state
        theta, implementation = self.model.config.rope_theta, self.implementation
        pools = sparse_restore(kv.k, kv.v, None, plan, theta=theta, implementation=implementation)
        return PagedKV(*pools)

    def _deviation(
        self, state: nnx.State, kv: PagedKV, plan: RoundPlan, shown: jax.Array
    ) -> tuple[PagedKV, jax.Array, jax.Array]:
        model = nnx.merge(self.model.graph, state)
        x, kv = self._hidden(model, plan, kv, layers=range(1))
        page_size = self.shapes.page_size
        index = jnp.ones_like(shown), shown // page_size, shown % page_size
        _, *keys_values = model.queries_keys_values(1, x, plan.rows)
        squares = [
            jnp.sum(
                (fresh - storage.load(pool.at[index].get(mode="clip")).astype(jnp.float32)) ** 2,
                axis=(1, 2),
            )
            for fresh, pool in zip(keys_values, (kv.k, kv.v), strict=True)
        ]
        return kv, x, jnp.stack(squares)

    def _attention(
        self, state: nnx.State, kv: PagedKV, plan: RoundPlan
    ) -> tuple[PagedKV, jax.Array]:
        model = nnx.merge(self.model.graph, state)
        middle = self.layers // 2
        x, kv = self._hidden(model, plan, kv, layers=range(middle))
        q, k, v = model.queries_keys_values(middle, x, plan.rows)
        kv = kv.write(middle, jnp.asarray(plan.rows.slot), k, v)
        position, theta = jnp.asarray(plan.rows.position), self.model.config.rope_theta
        return kv, attention_mass(q, kv.k, middle, position, plan.tables, plan.tiles, theta=theta)

    def _first_token(
        self, state: nnx.State, hidden: jax.Array, sampling: SamplingArrays
    ) -> jax.Array:
        lanes = hidden.shape[0]
        hidden, sampling = jax.tree.map(_filled, (hidden, sampling))
        logits = self._logits(state, hidden)
        return sample(logits, sampling, jnp.zeros(hidden.shape[:1], jnp.int32))[:lanes]

    def _logits(self, state: nnx.State, hidden: jax.Array) -> jax.Array:
        return nnx.merge(self.model.graph, state).logits(hidden)

    def _decode(
        self,
        state: nnx.State,
        kv: PagedKV,
        start: DecodeState,
        tables: LaneTables,
        groups: GroupTables,
        slot: jax.Array,
        sampling: SamplingArrays,
    ) -> tuple[PagedKV, jax.Array]:
        model = nnx.merge(self.model.graph, state)
        theta = model.config.rope_theta
        lanes, steps = slot.shape
        # Idle lanes fill the last group of rows; attention does without.
        start, slot, sampling = jax.tree.map(_filled, (start, slot, sampling))

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

            def attend(q: jax.Array, kv: PagedKV, layer: int | jax.Array) -> jax.Array:
                attended = decode_attention(
                    q[:lanes],
                    kv.k,
                    kv.v,
                    layer,
                    position[:lanes],
                    tables,
                    groups,
                    theta=theta,
                    implementation=self.implementation,
                )
                return _filled(attended)

            hidden, kv = model.hidden(rows, kv, attend, rolled=self._rolled)
            chosen = sample(model.logits(hidden), sampling, jnp.asarray(at.generated))
            chosen = jnp.where(at.live, chosen, -1)
            live = chosen >= 0
            generated = at.generated + live.astype(jnp.int32)
            after = DecodeState(
                token=jnp.where(live, chosen, at.token),
                position=at.position + live.astype(jnp.int32),
                live=live & ~is_stop(chosen, sampling) & (generated < sampling.limit),
                generated=generated,
            )
            tokens = jax.lax.dynamic_update_slice(tokens, chosen[:, None], (0, index))
            return index + 1, kv, after, tokens

        carry = (jnp.int32(0), kv, start, jnp.full(slot.shape, -1, jnp.int32))
        _, kv, _, tokens = jax.lax.while_loop(go_on, step, carry)
        return kv, tokens[:lanes]


def _filled(x: jax.Array) -> jax.Array:
    """Fills the first axis with zeros up to whole groups of rows (`models.product`)."""
    return jnp.pad(x, [(0, -x.shape[0] % ROW_GROUP)] + [(0, 0)] * (x.ndim - 1))


def blank_decode(
    *, lanes: int, entries: int, steps: int, shapes: Shapes
) -> tuple[DecodeState, LaneTables, GroupTables, np.ndarray, SamplingArrays]:
    """What a decode call takes behind the pool, of idle lanes: to compile for."""
    idle = np.zeros(lanes, np.int32)
    plan = blank_plan(rows=1, lanes=lanes, seats=lanes, entries=entries, shapes=shapes)
    return (
        DecodeState(idle, idle, np.zeros(lanes, np.bool_), idle),
        plan.tables,
        empty_groups(lanes=lanes, entries=entries, page_size=shapes.page_size),
        np.full((lanes, steps), shapes.no_slot, np.int32),
        blank_sampling(lanes),
    )


def blank_sampling(lanes: int) -> SamplingArrays:
    """Greedy settings of lanes that generate nothing: to compile for."""
    return sampling_arrays(
        lanes, temperature=0.0, top_k=0, top_p=1.0, keys=[], limits=[], stop_ids=[]
    )


def _jit(
    function: Callable[..., Any],
    device: jax.Device | None,
    *,
    results: int = 1,
    donate: tuple[str, ...] = ("kv",),
) -> Any:
    """Jits a function of the model's state, a pool and more, that returns the pool and more."""
    pool = pool_format(device)
    more = len(inspect.signature(function).parameters) - 2
    return jax.jit(
        function,
        donate_argnames=donate,
        in_shardings=(None, pool, *[None] * more),
        out_shardings=(pool, *[None] * (results - 1)) if results > 1 else pool,
    )


def _keep(hidden: jax.Array, x: jax.Array, plan: RoundPlan) -> jax.Array:
    """Fills in the residual stream of the agents whose last tokens are among the rows."""
    ends_here = (plan.out_row < x.shape[0])[:, None]
    return jnp.where(ends_here, x.at[plan.out_row].get(mode="clip"), hidden)

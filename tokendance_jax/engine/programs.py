"""The programs of a round. `Runner.run` compiles them for the shapes of their arguments."""

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int32

from tokendance_jax.engine.adjust import Adjustments, Expanded, Logprobs, choose, expand
from tokendance_jax.engine.compiling import Build, pool_program, program
from tokendance_jax.engine.sampling import SamplingArrays, is_stop, sample
from tokendance_jax.kernels import storage
from tokendance_jax.kernels.attention_mass import attention_mass
from tokendance_jax.kernels.decode_attention import decode_attention
from tokendance_jax.kernels.kv_write import kv_write
from tokendance_jax.kernels.lanes import Array, GroupTables, LaneTables, Rows
from tokendance_jax.kernels.round_attention import round_attention
from tokendance_jax.kernels.sparse_restore import RestorePlan, sparse_restore
from tokendance_jax.models.decoder.model import Decoder
from tokendance_jax.models.product import ROW_GROUP
from tokendance_jax.paged.kv import PagedKV
from tokendance_jax.plan.round_plan import RoundPlan


@no_type_check  # JAX also builds this pytree with leaves that are not arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of each lane before a decode call.

    Attributes:
      token: the last token chosen, whose K and V are not written yet.
      position: its logical position.
      live: whether the lane is still generating.
      generated: tokens chosen so far.
    """

    token: Int32[Array, " lanes"]
    position: Int32[Array, " lanes"]
    live: Bool[Array, " lanes"]
    generated: Int32[Array, " lanes"]


# Step, pool, state, adjustments, and the results so far: tokens and log-probabilities. The
# adjustments and the log-probabilities are None if no lane has any.
_Carry = tuple[jax.Array, PagedKV, DecodeState, Expanded | None, tuple[jax.Array, Logprobs | None]]


@pool_program("hidden")
def prefill(
    build: Build,
    model: Decoder,
    kv: PagedKV,
    hidden: Float[jax.Array, "seats width"],
    plan: RoundPlan,
) -> tuple[PagedKV, tuple[Float[jax.Array, "seats width"], Float[jax.Array, "rows width"]]]:
    """Computes a plan's rows. `hidden` is donated.

    Args:
      build: what the program is compiled for.
      model: the model.
      kv: the pool.
      hidden: residual stream at the agents' last tokens, as far as earlier calls computed it.
      plan: the rows.

    Returns:
      The pool with the rows' K and V written; `hidden` with this call's agents filled in, and the
      residual stream of all rows.
    """
    x, kv = _hidden(build, model, kv, plan)
    return kv, (_keep(hidden, x, plan), x)


@pool_program("hidden")
def rest(
    build: Build,
    model: Decoder,
    kv: PagedKV,
    hidden: Float[jax.Array, "seats width"],
    x: Float[Array, "rows width"],
    plan: RoundPlan,
) -> tuple[PagedKV, tuple[Float[jax.Array, "seats width"], Float[jax.Array, "rows width"]]]:
    """As `prefill`, for rows whose residual stream `x` after layer 0 is already computed."""
    x, kv = _hidden(build, model, kv, plan, x=x, layers=range(1, len(model.layers)))
    return kv, (_keep(hidden, x, plan), x)


@pool_program()
def link(build: Build, model: Decoder, kv: PagedKV, plan: RestorePlan) -> tuple[PagedKV, None]:
    """Copies pieces of pages within the pool, with keys rotated to their new positions."""
    del model
    rope, implementation = build.config.rope, build.implementation
    return sparse_restore(kv, None, plan, rope=rope, implementation=implementation), None


@pool_program()
def deviation(
    build: Build, model: Decoder, kv: PagedKV, plan: RoundPlan, shown: Int32[Array, " rows"]
) -> tuple[PagedKV, tuple[Float[jax.Array, "rows width"], Float[jax.Array, "2 rows"]]]:
    """Runs rows through layer 0 and compares their K and V at layer 1 with those in the pool.

    This is the measure of CacheBlend (arXiv 2405.16444, section 4.3).

    Args:
      build: what the program is compiled for.
      model: the model.
      kv: the pool.
      plan: the rows. Rows with a write slot also write their K and V of layer 0.
      shown: the slots to compare with.

    Returns:
      The pool; the residual stream after layer 0, and the squared differences of each row's K and
      V.
    """
    x, kv = _hidden(build, model, kv, plan, layers=range(1))
    index = jnp.ones_like(shown), shown // build.page_size, shown % build.page_size
    _, *keys_values = model.queries_keys_values(1, x, plan.rows)
    squares = [
        jnp.sum(
            (fresh - storage.load(pool.at[index].get(mode="clip")).astype(jnp.float32)) ** 2,
            axis=(1, 2),
        )
        for fresh, pool in zip(keys_values, (kv.k, kv.v), strict=True)
    ]
    return kv, (x, jnp.stack(squares))


@pool_program()
def attention(
    build: Build, model: Decoder, kv: PagedKV, plan: RoundPlan
) -> tuple[PagedKV, Float[jax.Array, "lanes entries"]]:
    """Returns how much rows attend to each entry of their lanes' tables, in the middle layer.

    The rows run through the layers before the middle layer. They write their K and V in those
    layers and in the middle layer.
    """
    middle = len(model.layers) // 2
    x, kv = _hidden(build, model, kv, plan, layers=range(middle))
    q, k, v = model.queries_keys_values(middle, x, plan.rows)
    kv = kv_write(kv, middle, jnp.asarray(plan.rows.slot), k, v)
    position, rope = jnp.asarray(plan.rows.position), build.config.rope
    return kv, attention_mass(q, kv, middle, position, plan.tables, plan.tiles, rope=rope)


@program
def first_token(
    build: Build, model: Decoder, hidden: Float[jax.Array, "lanes width"], sampling: SamplingArrays
) -> Int32[jax.Array, " lanes"]:
    """Chooses each lane's first token from the residual stream at its last prompt token.

    The token is `sampling.NOT_FINITE` if the lane's logits are not finite.
    """
    del build
    lanes = hidden.shape[0]
    hidden, sampling = jax.tree.map(_filled, (hidden, sampling))
    return sample(model.logits(hidden), sampling, jnp.zeros(hidden.shape[:1], jnp.int32))[:lanes]


@program
def first_token_adjusted(
    build: Build,
    model: Decoder,
    hidden: Float[jax.Array, "lanes width"],
    sampling: SamplingArrays,
    adjustments: Adjustments,
) -> tuple[Int32[jax.Array, " lanes"], Logprobs]:
    """As `first_token`, from adjusted logits. The log-probabilities are those of one step."""
    lanes, vocab = hidden.shape[0], build.config.vocab_size
    live = jnp.ones(lanes, jnp.bool_)
    filled = jax.tree.map(_filled, (hidden, sampling, live, adjustments))
    hidden, sampling, live, adjustments = filled
    nothing = jnp.zeros(live.shape, jnp.int32)
    expanded = expand(adjustments, vocab)
    tokens, _, logprobs = choose(model.logits(hidden), sampling, nothing, live, expanded)
    return tokens[:lanes], jax.tree.map(lambda x: x[:lanes, None], logprobs)


@program
def logits(
    build: Build, model: Decoder, hidden: Float[Array, "rows width"]
) -> Float[jax.Array, "rows vocab"]:
    """Returns the next-token logits (f32) of residual-stream rows."""
    del build
    return model.logits(jnp.asarray(hidden))


@pool_program()
def decode(
    build: Build,
    model: Decoder,
    kv: PagedKV,
    start: DecodeState,
    tables: LaneTables,
    groups: GroupTables,
    slot: Int32[Array, "lanes steps"],
    sampling: SamplingArrays,
) -> tuple[PagedKV, Int32[jax.Array, "lanes steps"]]:
    """Generates up to `steps` tokens per lane without leaving the device.

    Stops early when no lane is live.

    Args:
      build: what the program is compiled for.
      model: the model.
      kv: the pool.
      start: the state of each lane.
      tables: block tables without the entries in `groups`; they cover the positions to generate.
      groups: the entries that several lanes hold.
      slot: write slots of the positions to generate.
      sampling: how each lane samples and when it ends.

    Returns:
      The pool and the tokens, -1 where a lane was not live. A lane whose logits are not finite
      ends with `sampling.NOT_FINITE`.
    """
    kv, (tokens, _) = _decode(build, model, kv, start, tables, groups, slot, sampling, None)
    return kv, tokens


@pool_program()
def decode_adjusted(
    build: Build,
    model: Decoder,
    kv: PagedKV,
    start: DecodeState,
    tables: LaneTables,
    groups: GroupTables,
    slot: Int32[Array, "lanes steps"],
    sampling: SamplingArrays,
    adjustments: Adjustments,
) -> tuple[PagedKV, tuple[Int32[jax.Array, "lanes steps"], Logprobs]]:
    """As `decode`, from adjusted logits. Each step counts the tokens of the steps before it.

    Returns:
      The pool; the tokens and their log-probabilities.
    """
    return _decode(build, model, kv, start, tables, groups, slot, sampling, adjustments)


def _decode(
    build: Build,
    model: Decoder,
    kv: PagedKV,
    start: DecodeState,
    tables: LaneTables,
    groups: GroupTables,
    slot: Array,
    sampling: SamplingArrays,
    adjustments: Adjustments | None,
) -> tuple[PagedKV, tuple[jax.Array, Any]]:
    """Decodes with or without adjustments; without them, there are no log-probabilities."""
    rope = build.config.rope
    lanes, steps = slot.shape
    # Idle lanes fill the last group of rows (`_filled`). Attention does not need them.
    filled = jax.tree.map(_filled, (start, slot, sampling, adjustments))
    start, slot, sampling, adjustments = filled
    expanded = logprobs = None
    if adjustments is not None:
        expanded = expand(adjustments, build.config.vocab_size)
        logprobs = Logprobs.blank(*slot.shape)

    def go_on(carry: _Carry) -> jax.Array:
        index, _, at, _, _ = carry
        return (index < steps) & jnp.any(at.live)

    def step(carry: _Carry) -> _Carry:
        index, kv, at, expanded, results = carry
        position = jnp.where(at.live, at.position, -1)
        target = jnp.where(at.live, slot[:, index], build.no_slot)
        # Answers are written to the lane's own pages, which have frame 0.
        rows = Rows(token=at.token, position=position, canonical=position, slot=target)

        def attend(q: jax.Array, kv: PagedKV, layer: int | jax.Array) -> jax.Array:
            attended = decode_attention(
                q[:lanes],
                kv,
                layer,
                position[:lanes],
                tables,
                groups,
                rope=rope,
                implementation=build.implementation,
            )
            return _filled(attended)

        hidden, kv = model.hidden(rows, kv, attend, rolled=build.rolled)
        chosen, expanded, logprobs = choose(
            model.logits(hidden),
            sampling,
            jnp.asarray(at.generated),
            jnp.asarray(at.live),
            expanded,
        )
        live = chosen >= 0
        generated = at.generated + live.astype(jnp.int32)
        after = DecodeState(
            token=jnp.where(live, chosen, at.token),
            position=at.position + live.astype(jnp.int32),
            live=live & ~is_stop(chosen, sampling) & (generated < sampling.limit),
            generated=generated,
        )

        def put(x: jax.Array, fresh: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(x, fresh[:, None], index, axis=1)

        results = jax.tree.map(put, results, (chosen, logprobs))
        return index + 1, kv, after, expanded, results

    tokens = jnp.full(slot.shape, -1, jnp.int32)
    carry = (jnp.int32(0), kv, start, expanded, (tokens, logprobs))
    _, kv, _, _, results = jax.lax.while_loop(go_on, step, carry)
    return kv, jax.tree.map(lambda x: x[:lanes], results)


def _hidden(
    build: Build, model: Decoder, kv: PagedKV, plan: RoundPlan, **options: Any
) -> tuple[jax.Array, PagedKV]:
    """Runs a plan's rows, which attend to their lanes' pages; options as for `Decoder.hidden`."""
    position = jnp.asarray(plan.rows.position)

    def attend(q: jax.Array, kv: PagedKV, layer: int | jax.Array) -> jax.Array:
        return round_attention(
            q,
            kv,
            layer,
            position,
            plan.tables,
            plan.tiles,
            shared=plan.shared,
            rope=build.config.rope,
            implementation=build.implementation,
        )

    return model.hidden(plan.rows, kv, attend, rolled=build.rolled, **options)


def _keep(hidden: jax.Array, x: jax.Array, plan: RoundPlan) -> jax.Array:
    """Fills in the residual stream of the agents whose last tokens are among the rows."""
    ends_here = (plan.out_row < x.shape[0])[:, None]
    return jnp.where(ends_here, x.at[plan.out_row].get(mode="clip"), hidden)


def _filled(x: jax.Array) -> jax.Array:
    """Pads the first axis with zeros to whole groups of rows (see `models.product`)."""
    return jnp.pad(x, [(0, -x.shape[0] % ROW_GROUP)] + [(0, 0)] * (x.ndim - 1))

"""Training of the demo model: recipe, initial parameters, forward pass, loss and step."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from tokendance_jax.kernels.lanes import Rows
from tokendance_jax.models.decoder.config import DecoderConfig
from tokendance_jax.models.decoder.model import state_from_parameters
from tokendance_jax.models.decoder.parameters import parameter_dtype, parameter_shapes

Params = dict[str, jax.Array]

# Queries in a block of attention; the keys after a block are never multiplied.
_QUERY_BLOCK = 128
_EMBEDDING_SCALE = 0.12
_INTO_STREAM = 0.02
# Number of layers that match; bias of the queries and keys that look back; looking back uses
# frequencies above _FAST, and matching those below _SLOW.
_MATCHING, _BIAS, _FAST, _SLOW = 2, 5.0, 0.05, 1.5e-3
# Scale of the random numbers in matrices that also hold constructed parts.
_ELSEWHERE = 0.1


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the curriculum.

    Attributes:
      share: share of all steps.
      length: tokens in a row.
      rows: rows in a batch.
      agents: most agents of a town; 0: the rows are drills.
    """

    share: float
    length: int
    rows: int
    agents: int


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings of a training run. The same recipe and seed give the same model.

    Attributes:
      steps: optimiser steps of all stages.
      learning_rate: the peak; warm-up is linear, decay is half a cosine to a twentieth of the peak.
      warmup: steps of the warm-up.
      weight_decay: weight decay of matrices; vectors have none.
      text_weight: loss weight of tokens outside of answers.
      dtype: precision of the matrices in products.
      seed: seed of parameters and data.
      stages: the curriculum.
    """

    steps: int
    learning_rate: float
    warmup: int
    weight_decay: float
    text_weight: float
    dtype: str
    seed: int
    stages: tuple[Stage, ...]

    def stage(self, step: int) -> Stage:
        """Returns the stage of a step."""
        bound = 0.0
        for stage in self.stages:
            bound += stage.share * self.steps
            if step < bound:
                return stage
        return self.stages[-1]

    def optimizer(self) -> optax.GradientTransformation:
        """Makes the optimiser: AdamW, after clipping of the gradient's norm."""
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, self.warmup, self.steps, self.learning_rate / 20
        )
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(
                schedule,
                b2=0.95,
                weight_decay=self.weight_decay,
                mask=_matrices,
            ),
        )


def _matrices(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda array: array.ndim == 2, params)


def initial_parameters(config: DecoderConfig, seed: int) -> Params:
    """Draws initial parameters that can look things up from the first step on.

    Finding what followed an earlier occurrence of the same words takes two layers, which small
    models learn late, and together (Olsson et al. 2022, "In-context learning and induction heads").
    These parameters contain such layers from the start. Token embeddings use the first quarter of
    the residual stream. The heads of the first layer copy the tokens that stand one, two, three and
    so on positions back, each head to its own part of the stream. The heads of the next layers
    attend to the positions that follow an earlier occurrence of the same tokens, and predict the
    token there. All other parameters are normal and small.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    params = {}
    for path, shape in parameter_shapes(config).items():
        if len(shape) == 1:
            fill = 0.0 if path.endswith("bias") else 1.0
            params[path] = np.full(shape, fill, np.float32)
            continue
        scale = shape[1] ** -0.5
        if path.startswith("embed"):
            scale = _EMBEDDING_SCALE
        elif path.endswith(("o_proj.weight", "down_proj.weight")):
            scale *= _INTO_STREAM
        params[path] = generator.standard_normal(shape, np.float32) * np.float32(scale)
    token = config.hidden_size // 4
    params["embed_tokens.weight"][:, token:] *= _ELSEWHERE
    part = min((config.hidden_size - token) // config.num_attention_heads, config.head_dim)
    said = generator.standard_normal((part, token), np.float32) * np.float32(token**-0.5)
    _look_back(config, params, said)
    for layer in range(1, min(1 + _MATCHING, config.num_hidden_layers)):
        _match(config, params, layer, said, generator)
    return {path: jnp.asarray(array) for path, array in params.items()}


def _look_back(
    config: DecoderConfig, params: dict[str, np.ndarray], said: Float[np.ndarray, "part token"]
) -> None:
    """Makes head h of the first layer copy the token that stands h + 1 positions back.

    The product of a query's pair at angle -d and a key's pair at angle 0, both rotated, is largest
    where they are d tokens apart. Summed over several frequencies, it is largest only there.
    """
    attention = "layers.0.self_attn"
    frequency = config.rope.frequencies(config.head_dim)
    size = np.where(frequency > _FAST, _BIAS, 0.0)

    def pairs(back: int) -> np.ndarray:
        turned = np.cos(back * frequency), -np.sin(back * frequency)
        return np.concatenate(turned) * np.tile(size, 2)

    heads = range(config.num_attention_heads)
    queries = np.concatenate([pairs(head + 1) for head in heads])
    params[f"{attention}.q_proj.bias"] = queries.astype(np.float32)
    keys = np.tile(pairs(0), config.num_key_value_heads)
    params[f"{attention}.k_proj.bias"] = keys.astype(np.float32)
    for name in "qk":
        params[f"{attention}.{name}_proj.weight"] *= _ELSEWHERE
    part, token = said.shape
    values = params[f"{attention}.v_proj.weight"]
    values *= _ELSEWHERE
    for head in range(config.num_key_value_heads):
        values[head * config.head_dim :][:part, :token] = said
    output = params[f"{attention}.o_proj.weight"]
    for head in heads:
        rows = output[token + head * part :][:part]
        rows[:, head * config.head_dim :][:, :part] = np.eye(part) * (_EMBEDDING_SCALE / 2)


def _match(
    config: DecoderConfig,
    params: dict[str, np.ndarray],
    layer: int,
    said: Float[np.ndarray, "part token"],
    generator: np.random.Generator,
) -> None:
    """Makes head h of a layer attend to what followed the last h + 1 tokens, and predict it."""
    attention = f"layers.{layer}.self_attn"
    part, token = said.shape
    heads, size = config.num_attention_heads, config.head_dim
    # At slow frequencies, products do not depend on the distance.
    slow = np.flatnonzero(np.tile(config.rope.frequencies(size) < _SLOW, 2))
    values = generator.standard_normal((token, size), np.float32) * np.float32(size**-0.5)
    # A key holds the tokens before it, each projected by its own matrix.
    seen = generator.standard_normal((heads, len(slow), part), np.float32)
    seen *= np.float32(part**-0.5)
    before = [slice(token + back * part, token + (back + 1) * part) for back in range(heads)]
    queries, keys = (params[f"{attention}.{name}_proj.weight"] for name in "qk")
    keys *= _ELSEWHERE
    queries *= _ELSEWHERE
    for group in range(config.num_key_value_heads):
        rows = group * size + slow
        for back in range(heads):
            keys[rows, before[back]] = seen[back]
        params[f"{attention}.v_proj.weight"][group * size :][:size, :token] = values.T
    for head in range(heads):
        rows = head * size + slow
        queries[rows, :token] = seen[0] @ said
        for back in range(head):
            queries[rows, before[back]] = seen[back + 1]
        columns = slice(head * size, (head + 1) * size)
        params[f"{attention}.o_proj.weight"][:token, columns] = values * _EMBEDDING_SCALE


def start(config: DecoderConfig, recipe: Recipe) -> dict:
    """Makes the state before the first step."""
    params = initial_parameters(config, recipe.seed)
    return {"params": params, "opt": recipe.optimizer().init(params)}


def logits_of(
    config: DecoderConfig,
    params: Mapping[str, jax.Array],
    token: Int32[Array, "batch length"],
    conversation: Int32[Array, "batch length"],
    *,
    dtype: str,
) -> Float[Array, "batch length vocab"]:
    """Computes next-token logits under dense causal attention within conversations.

    Args:
      config: sizes.
      params: arrays by path; matrices are rounded to `dtype` for products.
      token: token ids.
      conversation: number of each token's conversation in its row.
      dtype: "float32" or "bfloat16".
    """
    batch, length = token.shape
    rounded = {p: a.astype(parameter_dtype(a.shape, jnp.dtype(dtype))) for p, a in params.items()}
    model = nnx.merge(*state_from_parameters(config, rounded, dtype))
    # Rotary attention depends on position differences alone, so positions need not restart at 0 in
    # each conversation.
    position = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
    rows = Rows(token.reshape(-1), position, position, jnp.zeros_like(position))
    x = model.embed_tokens(token.reshape(-1))
    for layer, block in enumerate(model.layers):
        q, k, v = (
            y.reshape(batch, length, -1, config.head_dim).astype(dtype)
            for y in model.queries_keys_values(layer, x, rows)
        )
        attended = _attend(q, k, v, conversation)
        x = block.finish(x, attended.reshape(batch * length, -1, config.head_dim))
    return model.logits(x).reshape(batch, length, -1)


def _attend(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    conversation: Int32[Array, "batch length"],
) -> Float[Array, "batch length heads head_dim"]:
    """Causal attention within conversations, in f32 except for the inputs of products."""
    batch, length, heads, head_dim = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, head_dim)
    results = []
    for start in range(0, length, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, length)
        scores = product("bqkgh,bskh->bkgqs", q[:, start:stop], k[:, :stop])
        seen = jnp.arange(stop)[None, :] <= jnp.arange(start, stop)[:, None]
        same = conversation[:, start:stop, None] == conversation[:, None, :stop]
        mask = (seen[None] & same)[:, None, None]
        scores = jnp.where(mask, scores * np.float32(head_dim**-0.5), np.float32(-1e9))
        weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
        results.append(product("bkgqs,bskh->bqkgh", weights, v[:, :stop]))
    return jnp.concatenate(results, axis=1).reshape(batch, length, heads, head_dim)


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes an einsum of two arrays of one precision, with a float32 result.

    Its gradients are computed in the same way, and rounded to the precision of the arrays.
    """
    return _product(spec, a, b)


def _forward(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _forward_and_saved(spec: str, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple]:
    return _forward(spec, a, b), (a, b)


def _backward(spec: str, saved: tuple, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = saved
    inputs, output = spec.split("->")
    of_a, of_b = inputs.split(",")
    cotangent = cotangent.astype(a.dtype)
    grad_a = _forward(f"{output},{of_b}->{of_a}", cotangent, b)
    grad_b = _forward(f"{output},{of_a}->{of_b}", cotangent, a)
    return grad_a.astype(a.dtype), grad_b.astype(b.dtype)


_product: Callable[[str, jax.Array, jax.Array], jax.Array] = jax.custom_vjp(
    _forward, nondiff_argnums=(0,)
)
_product.defvjp(_forward_and_saved, _backward)  # pyright: ignore[reportFunctionMemberAccess]


@functools.partial(jax.jit, static_argnames=("config", "recipe"), donate_argnames=("state",))
def train_step(
    state: dict, arrays: tuple, *, config: DecoderConfig, recipe: Recipe
) -> tuple[dict, jax.Array]:
    """Runs one training step.

    Args:
      state: parameters and the optimiser's state, donated.
      arrays: token, weight and conversation of a batch.
      config: sizes.
      recipe: the recipe.

    Returns:
      The new state, and f32 [2]: the mean loss of tokens of answers, and of all other tokens.
    """

    def loss_of(params: Params) -> tuple[jax.Array, jax.Array]:
        token, weight, conversation = arrays
        logits = logits_of(config, params, token[:, :-1], conversation[:, :-1], dtype=recipe.dtype)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, token[:, 1:])
        weight = weight[:, 1:]
        answers = weight == 1.0
        parts = jnp.stack([_mean(losses, answers), _mean(losses, ~answers)])
        return jnp.sum(losses * weight) / jnp.sum(weight), parts

    grads, parts = jax.grad(loss_of, has_aux=True)(state["params"])
    updates, opt = recipe.optimizer().update(grads, state["opt"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, parts


def _mean(values: Float[Array, "..."], where: Bool[Array, "..."]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(where, values, 0.0)) / jnp.maximum(jnp.sum(where), 1)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def hits(
    params: Params, token: jax.Array, conversation: jax.Array, *, config: DecoderConfig, dtype: str
) -> Bool[Array, "batch shorter"]:
    """Whether each token after the first of a row is the model's most probable one."""
    logits = logits_of(config, params, token[:, :-1], conversation[:, :-1], dtype=dtype)
    return jnp.argmax(logits, axis=-1) == token[:, 1:]

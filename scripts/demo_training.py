"""Training of the demo model: start, forward pass, loss, step, plan and checkpoints."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from tokendance_jax.models.qwen2.config import Qwen2Config
from tokendance_jax.models.qwen2.model import Rows, state_from_parameters
from tokendance_jax.models.qwen2.parameters import parameter_dtype, parameter_shapes

Params = dict[str, jax.Array]

# Queries that attend at once: what lies behind them is never multiplied.
_QUERY_BLOCK = 128
_EMBEDDING_SCALE = 0.06
_INTO_STREAM = 0.1
# Layers whose heads look back at first; the size of their biases, and the lowest frequency of one.
_ALIKE, _COPY = 0.5, 0.1
_LOOKING_BACK, _BIAS, _FREQUENCY = 2, 5.0, 0.05


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the curriculum.

    Attributes:
      share: of all steps.
      length: tokens in a row.
      rows: rows in a batch.
      agents: most agents of a town; 0: echoes.
    """

    share: float
    length: int
    rows: int
    agents: int


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a training run is made of. The same recipe and seed give the same model.

    Attributes:
      steps: optimiser steps of all stages.
      learning_rate: peak; warm-up is linear, decay is half a cosine down to a twentieth.
      warmup: steps of the warm-up.
      weight_decay: of matrices; vectors have none.
      text_weight: weight in the loss of tokens that are no answer.
      dtype: precision of the matrices in products.
      seed: of parameters and data.
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
        """The stage of a step."""
        bound = 0.0
        for stage in self.stages:
            bound += stage.share * self.steps
            if step < bound:
                return stage
        return self.stages[-1]

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW behind a clip of the gradient's norm."""
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


def initial_parameters(config: Qwen2Config, seed: int) -> Params:
    """Draws parameters to train from.

    Matrices are normal. What goes into the residual stream is small beside the embedding, so that
    tokens stay what they are at first. Heads of the first layers look one, two, three and so on
    tokens back: what text before a token says is the hard half of looking things up, and biases of
    rotated queries and keys can say it at once.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    params = {}
    for path, shape in parameter_shapes(config).items():
        if len(shape) == 1:
            fill = 0.0 if path.endswith("bias") else 1.0
            params[path] = jnp.full(shape, fill, jnp.float32)
            continue
        scale = _EMBEDDING_SCALE if path.startswith("embed") else shape[1] ** -0.5
        if path.endswith(("o_proj.weight", "down_proj.weight")):
            scale *= _INTO_STREAM
        drawn = generator.standard_normal(shape, np.float32)
        params[path] = jnp.asarray(drawn * np.float32(scale))
    for layer in range(config.num_hidden_layers):
        name = f"layers.{layer}.self_attn"
        params |= _mimetic(config, params, name)
    for layer in range(min(_LOOKING_BACK, config.num_hidden_layers)):
        queries, keys = _looking_back(config)
        params[f"layers.{layer}.self_attn.q_proj.bias"] = jnp.asarray(queries)
        params[f"layers.{layer}.self_attn.k_proj.bias"] = jnp.asarray(keys)
    return params


def _mimetic(config: Qwen2Config, params: Params, name: str) -> Params:
    """Queries that look for what is like themselves, and values that come out as they went in."""
    groups, width = config.num_key_value_heads, config.hidden_size
    shape = groups, config.head_dim, width
    heads = config.num_attention_heads // groups
    keys, values = (
        jnp.repeat(params[f"{name}.{part}_proj.weight"].reshape(shape), heads, axis=0)
        for part in "kv"
    )
    q, o = params[f"{name}.q_proj.weight"], params[f"{name}.o_proj.weight"]
    return {
        f"{name}.q_proj.weight": q * (1 - _ALIKE**2) ** 0.5 + keys.reshape(-1, width) * _ALIKE,
        f"{name}.o_proj.weight": o + values.reshape(-1, width).T * _COPY,
    }


def _looking_back(
    config: Qwen2Config,
) -> tuple[Float[np.ndarray, " queries"], Float[np.ndarray, " keys"]]:
    """Biases of queries and keys by which head h attends h + 1 tokens back.

    The product of a rotated pair of a query at angle -d and of a key at angle 0 is largest d tokens
    apart; of several frequencies together, only there.
    """
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-np.arange(half) / half)
    size = np.where(frequency > _FREQUENCY, _BIAS, 0.0)

    def pairs(back: int) -> np.ndarray:
        return np.concatenate([np.cos(back * frequency), -np.sin(back * frequency)]) * np.tile(
            size, 2
        )

    queries = np.concatenate([pairs(head + 1) for head in range(config.num_attention_heads)])
    keys = np.tile(pairs(0), config.num_key_value_heads)
    return queries.astype(np.float32), keys.astype(np.float32)


def start(config: Qwen2Config, recipe: Recipe) -> dict:
    """The state before the first step."""
    params = initial_parameters(config, recipe.seed)
    return {"params": params, "opt": recipe.optimizer().init(params)}


def logits_of(
    config: Qwen2Config,
    params: Mapping[str, jax.Array],
    token: Int32[Array, "batch length"],
    conversation: Int32[Array, "batch length"],
    *,
    dtype: str,
) -> Float[Array, "batch length vocab"]:
    """The model's next-token logits under dense causal attention within conversations.

    Args:
      config: sizes.
      params: path to array; matrices are rounded to `dtype` for products.
      token: ids.
      conversation: number of each token's conversation in its row.
      dtype: "float32" or "bfloat16".
    """
    batch, length = token.shape
    rounded = {p: a.astype(parameter_dtype(a.shape, jnp.dtype(dtype))) for p, a in params.items()}
    model = nnx.merge(*state_from_parameters(config, rounded, dtype))
    # Rotary attention depends on differences alone: conversations need no positions of their own.
    position = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
    rows = Rows(token.reshape(-1), position, position, jnp.zeros_like(position))
    x = model.embed_tokens(token.reshape(-1))
    for layer, block in enumerate(model.layers):
        q = model.queries(layer, x, rows).reshape(batch, length, -1, config.head_dim)
        k, v = model.keys_values(layer, x, rows)
        k = k.reshape(batch, length, -1, config.head_dim)
        v = v.reshape(batch, length, -1, config.head_dim)
        attended = _attend(q.astype(dtype), k.astype(dtype), v.astype(dtype), conversation)
        x = x + block.self_attn.o_proj(attended.reshape(batch * length, -1))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return model.logits(x).reshape(batch, length, -1)


def _attend(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    conversation: Int32[Array, "batch length"],
) -> Float[Array, "batch length heads head_dim"]:
    """Causal attention within conversations, in f32 but for the products' inputs."""
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
    """An einsum of two arrays of one precision, with a float32 result; so are its gradients."""
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
    state: dict, arrays: tuple, *, config: Qwen2Config, recipe: Recipe
) -> tuple[dict, jax.Array]:
    """One step.

    Args:
      state: parameters and the optimiser's state, donated.
      arrays: token, weight, conversation of a batch.
      config: sizes.
      recipe: the recipe.

    Returns:
      The state, and f32 [2]: the mean loss of the answers' tokens, and of all others.
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
    params: Params, token: jax.Array, conversation: jax.Array, *, config: Qwen2Config, dtype: str
) -> Bool[Array, "batch shorter"]:
    """Whether each token but the first of a row is the most probable one."""
    logits = logits_of(config, params, token[:, :-1], conversation[:, :-1], dtype=dtype)
    return jnp.argmax(logits, axis=-1) == token[:, 1:]

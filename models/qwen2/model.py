"""Qwen2.5 as Flax NNX modules over rows and pages.

A forward pass knows rows, not sequences: each row brings its token, its positions and the slot that
its K and V go to. How rows attend is the caller's: prefill and decode pass different functions.
Matrices are stored [out, in] as published and multiplied in their own precision with float32
results; the residual stream, norms, rotary embedding and softmax are float32.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Int32

from tokendance_jax.kernels import rope
from tokendance_jax.kernels.lanes import Array
from tokendance_jax.models.product import matmul
from tokendance_jax.models.qwen2.config import Qwen2Config
from tokendance_jax.paged.kv import PagedKV

# (queries f32 [rows, heads, head_dim], pool, layer) -> f32 [rows, heads, head_dim]
Attend = Callable[[jax.Array, PagedKV, int], jax.Array]


@no_type_check  # JAX also builds pytrees of stand-ins that are no arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The tokens that a forward pass computes.

    Attributes:
      token: token ids.
      position: logical positions, at which queries are rotated.
      canonical: canonical positions, at which keys are rotated.
      slot: page * page_size + offset; past the pool where nothing is to be written.
    """

    token: Int32[Array, " rows"]
    position: Int32[Array, " rows"]
    canonical: Int32[Array, " rows"]
    slot: Int32[Array, " rows"]


class Linear(nnx.Module):
    """A matrix product in the matrix's own precision, with a float32 result."""

    def __init__(self, outputs: int, inputs: int, *, bias: bool, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.zeros((outputs, inputs), dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32)) if bias else None

    def __call__(self, x: Float[jax.Array, "rows inputs"]) -> Float[jax.Array, "rows outputs"]:
        y = matmul(x, self.weight[...])
        return y if self.bias is None else y + self.bias[...][None, :]


class Embedding(nnx.Module):
    """A table of token vectors."""

    def __init__(self, vocab: int, width: int, *, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.zeros((vocab, width), dtype))

    def __call__(self, token: Int32[jax.Array, " rows"]) -> Float[jax.Array, "rows width"]:
        # XLA's CPU backend widens a bfloat16 table to gather from it, and takes that out of the
        # decode loop: 540 MB and 60 ms a call for a vocabulary of 152k. The barrier ties the table
        # to the tokens, so that only the rows are widened.
        table, token = jax.lax.optimization_barrier((self.weight[...], token))
        return table.at[token].get(mode="clip").astype(jnp.float32)


class RMSNorm(nnx.Module):
    """Root mean square normalisation (Zhang and Sennrich, 2019) in float32."""

    def __init__(self, width: int, *, eps: float):
        self.weight = nnx.Param(jnp.ones((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[jax.Array, "rows width"]) -> Float[jax.Array, "rows width"]:
        square = jnp.mean(x * x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(square + self.eps) * self.weight[...][None, :]


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., 2023) with biases on Q, K and V."""

    def __init__(self, config: Qwen2Config, *, dtype: DTypeLike):
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        width, head_dim = config.hidden_size, config.head_dim
        self.q_proj = Linear(heads * head_dim, width, bias=True, dtype=dtype)
        self.k_proj = Linear(kv_heads * head_dim, width, bias=True, dtype=dtype)
        self.v_proj = Linear(kv_heads * head_dim, width, bias=True, dtype=dtype)
        self.o_proj = Linear(width, heads * head_dim, bias=False, dtype=dtype)
        self.head_dim = head_dim

    def __call__(
        self,
        x: Float[jax.Array, "rows width"],
        slot: Int32[jax.Array, " rows"],
        q_rotation: tuple[jax.Array, jax.Array],
        k_rotation: tuple[jax.Array, jax.Array],
        kv: PagedKV,
        layer: int,
        attend: Attend,
    ) -> tuple[Float[jax.Array, "rows width"], PagedKV]:
        q = self.q_proj(x).reshape(x.shape[0], -1, self.head_dim)
        kv = kv.write(layer, slot, *self.keys_values(x, k_rotation))
        attended = attend(rope.rotate(q, *q_rotation), kv, layer)
        return self.o_proj(attended.reshape(x.shape[0], -1)), kv

    def keys_values(
        self, x: Float[jax.Array, "rows width"], k_rotation: tuple[jax.Array, jax.Array]
    ) -> tuple[
        Float[jax.Array, "rows kv_heads head_dim"], Float[jax.Array, "rows kv_heads head_dim"]
    ]:
        """Rotated keys, and values, of normalised rows."""
        k = self.k_proj(x).reshape(x.shape[0], -1, self.head_dim)
        v = self.v_proj(x).reshape(x.shape[0], -1, self.head_dim)
        return rope.rotate(k, *k_rotation), v


class MLP(nnx.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: Qwen2Config, *, dtype: DTypeLike):
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(inner, width, bias=False, dtype=dtype)
        self.up_proj = Linear(inner, width, bias=False, dtype=dtype)
        self.down_proj = Linear(width, inner, bias=False, dtype=dtype)

    def __call__(self, x: Float[jax.Array, "rows width"]) -> Float[jax.Array, "rows width"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """One decoder layer."""

    def __init__(self, config: Qwen2Config, *, dtype: DTypeLike):
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config, dtype=dtype)


class Qwen2(nnx.Module):
    """The decoder and its output matrix.

    The module is a description: programs take its state split off (`nnx.split`) as an argument of
    `jax.jit` and merge the two inside.
    """

    def __init__(self, config: Qwen2Config, *, dtype: DTypeLike):
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nnx.List(
            [Block(config, dtype=dtype) for _ in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.vocab_size, config.hidden_size, bias=False, dtype=dtype)
        )

    def hidden(
        self,
        rows: Rows,
        kv: PagedKV,
        attend: Attend,
        *,
        x: Float[jax.Array, "rows width"] | None = None,
        layers: range | None = None,
        watch: Callable[[jax.Array], None] | None = None,
    ) -> tuple[Float[jax.Array, "rows width"], PagedKV]:
        """Runs layers; writes the rows' K and V.

        The pool runs through an unrolled loop of in-place writes: scanned over layers it would be
        copied (as inputs and outputs), or slow XLA's CPU code down (as a carry).

        Args:
          rows: the tokens to compute.
          kv: the pool.
          attend: how rows meet the pages of their lanes.
          x: the residual stream before the first of the layers; None: the tokens' embeddings.
          layers: which layers, one after the other; None: all.
          watch: called with the residual stream after the embedding and after each layer.

        Returns:
          The residual stream behind the layers, before the final norm, f32 [rows, width], and the
          pool.
        """
        q_rotation, k_rotation = self._rotation(rows.position), self._rotation(rows.canonical)
        if x is None:
            x = self.embed_tokens(rows.token)
        if watch is not None:
            watch(x)
        for layer in range(len(self.layers)) if layers is None else layers:
            block = self.layers[layer]
            with jax.named_scope(f"layer_{layer}"):
                attended, kv = block.self_attn(
                    block.input_layernorm(x), rows.slot, q_rotation, k_rotation, kv, layer, attend
                )
                x = x + attended
                x = x + block.mlp(block.post_attention_layernorm(x))
            if watch is not None:
                watch(x)
        return x, kv

    def queries(
        self, layer: int, x: Float[jax.Array, "rows width"], rows: Rows
    ) -> Float[jax.Array, "rows heads head_dim"]:
        """Rotated queries of a layer, given the residual stream before it."""
        block = self.layers[layer]
        q = block.self_attn.q_proj(block.input_layernorm(x))
        q = q.reshape(x.shape[0], -1, self.config.head_dim)
        return rope.rotate(q, *self._rotation(rows.position))

    def keys_values(
        self, layer: int, x: Float[jax.Array, "rows width"], rows: Rows
    ) -> tuple[
        Float[jax.Array, "rows kv_heads head_dim"], Float[jax.Array, "rows kv_heads head_dim"]
    ]:
        """Rotated keys, and values, of a layer, given the residual stream before it."""
        block = self.layers[layer]
        return block.self_attn.keys_values(block.input_layernorm(x), self._rotation(rows.canonical))

    def _rotation(self, position: Int32[Array, " rows"]) -> tuple[jax.Array, jax.Array]:
        theta, head_dim = self.config.rope_theta, self.config.head_dim
        cos, sin = rope.rotation(jnp.asarray(position), theta=theta, head_dim=head_dim)
        return cos[:, None, :], sin[:, None, :]

    def logits(self, hidden: Float[jax.Array, "rows width"]) -> Float[jax.Array, "rows vocab"]:
        """Next-token logits f32 [rows, vocab] of residual-stream rows."""
        normed = self.norm(hidden)
        if self.lm_head is None:
            return matmul(normed, self.embed_tokens.weight[...])
        return self.lm_head(normed)


def abstract_parameters(
    config: Qwen2Config, dtype: DTypeLike
) -> tuple[nnx.GraphDef[Qwen2], nnx.State]:
    """The module's graph and its state as shapes: no memory is used."""
    model = nnx.eval_shape(lambda: Qwen2(config, dtype=dtype))
    return nnx.split(model)


def state_from_parameters(
    config: Qwen2Config, params: Mapping[str, jax.Array], dtype: DTypeLike
) -> tuple[nnx.GraphDef[Qwen2], nnx.State]:
    """Puts loaded arrays into the module's state without a copy.

    Args:
      config: the model's configuration.
      params: path (published tensor name without "model.") to array.
      dtype: precision of the matrices.

    Returns:
      The module's graph and its state.

    Raises:
      ValueError: if a path is missing or unknown, or an array has another shape or dtype.
    """
    graph, state = abstract_parameters(config, dtype)
    flat = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(state)}
    if flat.keys() != params.keys():
        raise ValueError(
            f"params: paths differ from the model's: {sorted(flat.keys() ^ params.keys())}"
        )
    for path, variable in flat.items():
        expected, array = variable.get_value(), params[path]
        if (array.shape, array.dtype) != (expected.shape, expected.dtype):
            raise ValueError(
                f"params: {path} is {array.dtype}{list(array.shape)}, "
                f"the model takes {expected.dtype}{list(expected.shape)}"
            )
        variable.set_value(array)
    return graph, state

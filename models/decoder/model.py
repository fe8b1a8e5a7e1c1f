"""A decoder as Flax NNX modules over rows and pages.

A forward pass computes rows, not sequences: each row has a token, positions, and the slot that its
K and V are written to. The caller passes the attention function; prefill and decode use different
ones. Matrices are stored [out, in] as published and multiplied in their own precision with float32
results; the residual stream, norms, rotary embedding and softmax are float32.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Int32

from tokendance_jax.kernels.kv_write import kv_write
from tokendance_jax.kernels.lanes import Rows
from tokendance_jax.kernels.paged_kv import PagedKV
from tokendance_jax.kernels.rope import rotate
from tokendance_jax.models.decoder.config import DecoderConfig
from tokendance_jax.models.product import matmul

QueriesKeysValues = tuple[
    Float[jax.Array, "rows heads head_dim"],
    Float[jax.Array, "rows kv_heads head_dim"],
    Float[jax.Array, "rows kv_heads head_dim"],
]
# (queries f32 [rows, heads, head_dim], pool, layer) -> f32 [rows, heads, head_dim]
Attend = Callable[[jax.Array, PagedKV, int | jax.Array], jax.Array]


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
        # To gather from a bfloat16 table, XLA's CPU backend widens all of it, and hoists that out
        # of the decode loop: 540 MB and 60 ms a call for a vocabulary of 152k. The barrier ties the
        # table to the tokens, so that only the gathered rows are widened.
        table, token = jax.lax.optimization_barrier((self.weight[...], token))
        return table.at[token].get(mode="clip").astype(jnp.float32)


class RMSNorm(nnx.Module):
    """Root mean square normalisation of the last axis (Zhang and Sennrich, 2019) in float32."""

    def __init__(self, width: int, *, eps: float):
        self.weight = nnx.Param(jnp.ones((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[jax.Array, "*rows width"]) -> Float[jax.Array, "*rows width"]:
        square = jnp.mean(x * x, axis=-1, keepdims=True)
        weight = jnp.expand_dims(self.weight[...], range(x.ndim - 1))
        return x * jax.lax.rsqrt(square + self.eps) * weight


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., 2023), up to the rotation of queries and keys."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike):
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        width, head_dim = config.hidden_size, config.head_dim
        bias, eps = config.attention_bias, config.rms_norm_eps
        self.q_proj = Linear(heads * head_dim, width, bias=bias, dtype=dtype)
        self.k_proj = Linear(kv_heads * head_dim, width, bias=bias, dtype=dtype)
        self.v_proj = Linear(kv_heads * head_dim, width, bias=bias, dtype=dtype)
        self.q_norm = RMSNorm(head_dim, eps=eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=eps) if config.qk_norm else None
        self.o_proj = Linear(width, heads * head_dim, bias=False, dtype=dtype)
        self.head_dim = head_dim

    def project(self, x: Float[jax.Array, "rows width"]) -> QueriesKeysValues:
        """Returns the queries, keys and values of normalised rows, before rotation."""
        q, k, v = (
            projection(x).reshape(x.shape[0], -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


class MLP(nnx.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike):
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(inner, width, bias=False, dtype=dtype)
        self.up_proj = Linear(inner, width, bias=False, dtype=dtype)
        self.down_proj = Linear(width, inner, bias=False, dtype=dtype)

    def __call__(self, x: Float[jax.Array, "rows width"]) -> Float[jax.Array, "rows width"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """One decoder layer."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike):
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config, dtype=dtype)

    def project(self, x: Float[jax.Array, "rows width"]) -> QueriesKeysValues:
        """Returns queries, keys and values before rotation, given the residual stream `x`."""
        return self.self_attn.project(self.input_layernorm(x))

    def finish(
        self,
        x: Float[jax.Array, "rows width"],
        attended: Float[jax.Array, "rows heads head_dim"],
    ) -> Float[jax.Array, "rows width"]:
        """Returns the residual stream after the layer, given `x` before it and `attended`."""
        x = x + self.self_attn.o_proj(attended.reshape(x.shape[0], -1))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nnx.Module):
    """The decoder and its output matrix.

    The module only describes the model. Programs take its state, split off with `nnx.split`, as an
    argument of `jax.jit`, and merge module and state inside.
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike):
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
        rolled: bool = False,
        watch: Callable[[jax.Array], None] | None = None,
    ) -> tuple[Float[jax.Array, "rows width"], PagedKV]:
        """Runs layers and writes the rows' K and V to the pool.

        The pool is carried through the layers and written in place. Weights are used where they
        are, even in a loop: stacking them for a scan would copy them layer by layer.

        Args:
          rows: the tokens to compute.
          kv: the pool.
          attend: computes the attention of rows to the pages of their lanes.
          x: the residual stream before the first of the layers; None: the tokens' embeddings.
          layers: the layers to run, in order; None: all.
          rolled: whether the program has one loop over layers that branches to each layer's
            products. Attention as XLA code, much larger than the rest, is then compiled once and
            runs as fast on a CPU. On an accelerator the branches would cost more than they save.
          watch: called while tracing, with the residual stream after the embedding and after each
            layer. If layers are rolled, it is called inside the loop, once for all layers.

        Returns:
          The residual stream after the layers, before the final norm, f32 [rows, width], and the
          pool.
        """
        span = range(len(self.layers)) if layers is None else layers
        blocks = [self.layers[layer] for layer in span]
        q_rotation, k_rotation = self._rotations(rows)

        def of_layer(
            layer: int | jax.Array, function: Callable[..., Any], *arguments: jax.Array
        ) -> Any:
            index = layer - span.start
            if isinstance(index, int):
                return function(blocks[index], *arguments)
            branches = [functools.partial(function, block) for block in blocks]
            return jax.lax.switch(index, branches, *arguments)

        def run(
            layer: int | jax.Array, carry: tuple[jax.Array, PagedKV]
        ) -> tuple[jax.Array, PagedKV]:
            x, kv = carry
            q, k, v = of_layer(layer, Block.project, x)
            kv = kv_write(kv, layer, jnp.asarray(rows.slot), rotate(k, *k_rotation), v)
            attended = attend(rotate(q, *q_rotation), kv, layer)
            x = of_layer(layer, Block.finish, x, attended)
            if watch is not None:
                watch(x)
            return x, kv

        if x is None:
            x = self.embed_tokens(jnp.asarray(rows.token))
        if watch is not None:
            watch(x)
        if rolled and len(span) > 1:
            return jax.lax.fori_loop(span.start, span.stop, run, (x, kv))
        for layer in span:
            with jax.named_scope(f"layer_{layer}"):
                x, kv = run(layer, (x, kv))
        return x, kv

    def queries_keys_values(
        self, layer: int, x: Float[jax.Array, "rows width"], rows: Rows
    ) -> QueriesKeysValues:
        """Returns a layer's rotated queries and keys, and its values.

        Args:
          layer: index of the layer.
          x: the residual stream before the layer.
          rows: the rows' positions.
        """
        q, k, v = self.layers[layer].project(x)
        q_rotation, k_rotation = self._rotations(rows)
        return rotate(q, *q_rotation), rotate(k, *k_rotation), v

    def _rotations(self, rows: Rows) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """Returns cosines and sines for queries, which carry the scale of scores, and for keys."""
        rope, head_dim = self.config.rope, self.config.head_dim
        q, k = (
            tuple(x[:, None, :] for x in rope.rotation(jnp.asarray(position), head_dim))
            for position in (rows.position, rows.canonical)
        )
        if rope.score_scale != 1:
            q = tuple(x * np.float32(rope.score_scale) for x in q)
        return q, k

    def logits(self, hidden: Float[jax.Array, "rows width"]) -> Float[jax.Array, "rows vocab"]:
        """Returns the next-token logits f32 [rows, vocab] of rows of the residual stream."""
        normed = self.norm(hidden)
        if self.lm_head is None:
            return matmul(normed, self.embed_tokens.weight[...])
        return self.lm_head(normed)


def abstract_parameters(
    config: DecoderConfig, dtype: DTypeLike
) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """Returns the module's graph and its state as shapes, without allocating memory."""
    model = nnx.eval_shape(lambda: Decoder(config, dtype=dtype))
    return nnx.split(model)


def state_from_parameters(
    config: DecoderConfig, params: Mapping[str, jax.Array], dtype: DTypeLike
) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
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
                f"the model needs {expected.dtype}{list(expected.shape)}"
            )
        variable.set_value(array)
    return graph, state

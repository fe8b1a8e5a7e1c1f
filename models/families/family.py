"""What a model family is: its flags, how its configurations are read, how its tensors are named."""

import dataclasses
from collections.abc import Mapping

from tokendance_jax.models.decoder.config import DecoderConfig
from tokendance_jax.models.errors import CheckpointError
from tokendance_jax.models.families.fields import Fields, from_float32, malformed
from tokendance_jax.models.families.scaling import (
    context,
    rope_from_gguf,
    rope_from_hf,
    rope_to_hf,
)

_GGUF_TOP = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of decoders with the same flags and names.

    Families that name their fields or tensors differently override the methods.

    Attributes:
      name: `model_type` in a `config.json`, and the architecture of a GGUF file.
      architecture: name of the class in transformers.
      attention_bias: see `DecoderConfig`.
      qk_norm: see `DecoderConfig`.
    """

    name: str
    architecture: str
    attention_bias: bool
    qk_norm: bool

    def config(self, **sizes: object) -> DecoderConfig:
        """Returns a configuration of this family, given the other fields."""
        flags = {"attention_bias": self.attention_bias, "qk_norm": self.qk_norm}
        return DecoderConfig(family=self.name, **flags, **sizes)  # pyright: ignore[reportArgumentType]

    def from_hf(self, fields: Mapping[str, object], where: str) -> DecoderConfig:
        """Reads the content of a `config.json`.

        Args:
          fields: The parsed JSON object.
          where: Its file, for error messages.

        Raises:
          CheckpointError: A field is missing or malformed, or a variant (rope scaling other than
            YaRN, sliding window, quantised weights, other biases) is not supported.
        """
        for key, value in (("hidden_act", "silu"), ("attention_bias", self.attention_bias)):
            if fields.get(key, value) != value:
                problem = f"is {fields[key]!r}"
                raise CheckpointError(where, key, problem, f"only {value!r} is supported")
        if fields.get("quantization_config") is not None:
            raise CheckpointError(
                where,
                "quantization_config",
                "the weights are quantised",
                "only float32, float16 and bfloat16 safetensors are supported; for quantised "
                "weights use a GGUF file",
            )
        layer_types = fields.get("layer_types") or []
        sliding = isinstance(layer_types, list) and set(layer_types) - {"full_attention"}
        if fields.get("use_sliding_window") or sliding:
            field = "use_sliding_window" if fields.get("use_sliding_window") else "layer_types"
            raise CheckpointError(
                where, field, "sliding-window attention", "only full attention is supported"
            )
        read = Fields(fields, where)
        heads, hidden = read.size("num_attention_heads"), read.size("hidden_size")
        # transformers omits the field when it equals the architecture's default.
        tied = fields.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise malformed(where, "tie_word_embeddings", tied, "true or false")
        rope = rope_from_hf(fields, where)
        sizes = dict(
            vocab_size=read.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.size("intermediate_size"),
            num_hidden_layers=read.size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=read.size("num_key_value_heads"),
            head_dim=read.head_dim("head_dim", hidden, heads, "hidden_size"),
            max_position_embeddings=context(read.size("max_position_embeddings"), rope),
            rope=rope,
            rms_norm_eps=read.positive("rms_norm_eps"),
            tie_word_embeddings=tied,
        )
        return self._checked(sizes, where)

    def from_gguf(
        self, fields: Mapping[str, object], where: str, *, tied: bool, vocab_size: int
    ) -> DecoderConfig:
        """Reads the metadata of a GGUF file.

        Args:
          fields: Metadata values by key, such as `qwen2.block_count`.
          where: The file, for error messages.
          tied: Whether the file has no output matrix of its own.
          vocab_size: Rows of its embedding matrix. The metadata may omit this number.

        Raises:
          CheckpointError: A field is missing or malformed, or the file has rope scaling other than
            YaRN.
        """
        read, prefix = Fields(fields, where), self.name
        rope = rope_from_gguf(fields, where, prefix)
        heads = read.size(f"{prefix}.attention.head_count")
        hidden = read.size(f"{prefix}.embedding_length")
        head_dim = read.head_dim(
            f"{prefix}.attention.key_length", hidden, heads, f"{prefix}.embedding_length"
        )
        # Only some files have these fields. llama.cpp defaults both to the key width.
        for key in (f"{prefix}.attention.value_length", f"{prefix}.rope.dimension_count"):
            if fields.get(key, head_dim) != head_dim:
                raise malformed(where, key, fields[key], f"the head width {head_dim}")
        sizes = dict(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=read.size(f"{prefix}.feed_forward_length"),
            num_hidden_layers=read.size(f"{prefix}.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=read.size(f"{prefix}.attention.head_count_kv"),
            head_dim=head_dim,
            max_position_embeddings=context(read.size(f"{prefix}.context_length"), rope),
            rope=rope,
            rms_norm_eps=from_float32(read.positive(f"{prefix}.attention.layer_norm_rms_epsilon")),
            tie_word_embeddings=tied,
        )
        return self._checked(sizes, where)

    def to_hf(self, config: DecoderConfig) -> dict[str, object]:
        """Returns a `config.json` object that `from_hf` reads back."""
        fields = dataclasses.asdict(config)
        for name in ("family", "rope", "attention_bias", "qk_norm"):
            del fields[name]
        return {"model_type": self.name, **fields, **rope_to_hf(config.rope)}

    def hf_name(self, path: str) -> str:
        """Returns the Hugging Face tensor name of a parameter path."""
        return path if path == "lm_head.weight" else f"model.{path}"

    def gguf_name(self, path: str) -> str:
        """Returns the GGUF tensor name of a parameter path."""
        if path in _GGUF_TOP:
            return _GGUF_TOP[path]
        _, index, rest = path.split(".", 2)
        module, kind = rest.rsplit(".", 1)
        return f"blk.{index}.{_GGUF_LAYER[module]}.{kind}"

    def _checked(self, sizes: Mapping[str, object], where: str) -> DecoderConfig:
        try:
            return self.config(**sizes)
        except CheckpointError as error:
            raise CheckpointError(where, *error.args[1:]) from None

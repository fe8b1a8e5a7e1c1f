"""Sizes and constants of a Qwen2 model: published presets, `config.json` and GGUF metadata."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from tokendance_jax.models.qwen2.errors import CheckpointError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config:
    """Sizes and constants of a Qwen2 or Qwen2.5 model, under their Hugging Face names.

    Attributes:
      vocab_size: Rows of the embedding, padding rows included.
      hidden_size: Width of the residual stream.
      intermediate_size: Width of the gated MLP.
      num_hidden_layers: Decoder layers.
      num_attention_heads: Query heads.
      num_key_value_heads: Key and value heads; divides the query heads.
      head_dim: Width of one head; even, because rotary embedding works on pairs.
      max_position_embeddings: Longest context in tokens.
      rope_theta: Base of the rotary frequencies.
      rms_norm_eps: Added to the mean square in every RMSNorm.
      tie_word_embeddings: Whether the logits come from the embedding matrix.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        self._validate("Qwen2Config")

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of a layer: half the operations that they cost per token."""
        q, kv = (n * self.head_dim for n in (self.num_attention_heads, self.num_key_value_heads))
        return self.hidden_size * (2 * q + 2 * kv + 3 * self.intermediate_size)

    @classmethod
    def preset(cls, name: str) -> "Qwen2Config":
        """Returns the sizes of a published Qwen2.5 Instruct model.

        Args:
          name: "0.5B", "1.5B", "3B", "7B", "14B", "32B" or "72B".

        Raises:
          ValueError: There is no preset of this name.
        """
        if name not in _PRESETS:
            raise ValueError(
                f"Qwen2Config.preset: no preset {name!r}; one of {', '.join(_PRESETS)}"
            )
        hidden, intermediate, layers, heads, kv_heads, vocab, tied = _PRESETS[name]
        return cls(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=hidden // heads,
            max_position_embeddings=32768,
            rope_theta=1e6,
            rms_norm_eps=1e-6,
            tie_word_embeddings=tied,
        )

    @classmethod
    def from_hf(cls, fields: Mapping[str, object], where: str) -> "Qwen2Config":
        """Reads the content of a `config.json`.

        Args:
          fields: The parsed JSON object.
          where: Its file, for error messages.

        Raises:
          CheckpointError: The architecture is not Qwen2, a field is missing or malformed, or a
            variant (rope scaling, sliding window, quantised weights) is not supported.
        """
        _require_equal(fields, "model_type", "qwen2", where)
        _require_equal({"hidden_act": "silu", **fields}, "hidden_act", "silu", where)
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
        read = _Fields(fields, where)
        heads = read.size("num_attention_heads")
        hidden = read.size("hidden_size")
        # transformers omits the field when it equals this architecture's default.
        tied = fields.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise _malformed(where, "tie_word_embeddings", tied, "true or false")
        config = dict(
            vocab_size=read.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.size("intermediate_size"),
            num_hidden_layers=read.size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=read.size("num_key_value_heads"),
            head_dim=read.head_dim("head_dim", hidden, heads, "hidden_size"),
            max_position_embeddings=read.size("max_position_embeddings"),
            rope_theta=_rope_theta(fields, where),
            rms_norm_eps=read.positive("rms_norm_eps"),
            tie_word_embeddings=tied,
        )
        return cls._checked(config, where)

    @classmethod
    def from_gguf(
        cls, fields: Mapping[str, object], where: str, *, tied: bool, vocab_size: int
    ) -> "Qwen2Config":
        """Reads the metadata of a GGUF file.

        Args:
          fields: Metadata values by key, such as `qwen2.block_count`.
          where: The file, for error messages.
          tied: Whether the file has no output matrix of its own.
          vocab_size: Rows of its embedding matrix. The metadata may omit this number.

        Raises:
          CheckpointError: The architecture is not Qwen2, a field is missing or malformed, or the
            file has rope scaling.
        """
        _require_equal(fields, "general.architecture", "qwen2", where)
        kind = fields.get("qwen2.rope.scaling.type")
        if kind not in (None, "none"):
            raise _rope_scaling(where, "qwen2.rope.scaling.type", repr(kind))
        # llama.cpp scales linearly if there is a factor without a type. 0 and 1 mean no scaling.
        for key in ("qwen2.rope.scaling.factor", "qwen2.rope.scale_linear"):
            if kind is None and fields.get(key, 0) not in (0, 1):
                raise _rope_scaling(where, key, f"by {fields[key]!r} without a type")
        read = _Fields(fields, where)
        heads = read.size("qwen2.attention.head_count")
        hidden = read.size("qwen2.embedding_length")
        head_dim = read.head_dim(
            "qwen2.attention.key_length", hidden, heads, "qwen2.embedding_length"
        )
        # Only some files have these fields. llama.cpp defaults both to the key width.
        for key in ("qwen2.attention.value_length", "qwen2.rope.dimension_count"):
            if fields.get(key, head_dim) != head_dim:
                raise _malformed(where, key, fields[key], f"the head width {head_dim}")
        config = dict(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=read.size("qwen2.feed_forward_length"),
            num_hidden_layers=read.size("qwen2.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=read.size("qwen2.attention.head_count_kv"),
            head_dim=head_dim,
            max_position_embeddings=read.size("qwen2.context_length"),
            rope_theta=_from_float32(read.positive("qwen2.rope.freq_base")),
            rms_norm_eps=_from_float32(read.positive("qwen2.attention.layer_norm_rms_epsilon")),
            tie_word_embeddings=tied,
        )
        return cls._checked(config, where)

    def to_hf(self) -> dict[str, object]:
        """Returns a `config.json` object that `from_hf` reads back."""
        return {"model_type": "qwen2", **dataclasses.asdict(self)}

    @classmethod
    def _checked(cls, config: dict, where: str) -> "Qwen2Config":
        try:
            return cls(**config)
        except CheckpointError as error:
            raise CheckpointError(where, *error.args[1:]) from None

    def _validate(self, where: str) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "tie_word_embeddings" and value <= 0:
                raise _malformed(where, field.name, value, "a positive number")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                where,
                "num_key_value_heads",
                f"{self.num_key_value_heads} does not divide the "
                f"{self.num_attention_heads} attention heads",
                "grouped-query attention needs groups of equal size",
            )
        if self.head_dim % 2:
            raise CheckpointError(
                where,
                "head_dim",
                f"{self.head_dim} is odd",
                "rotary embedding needs an even head width",
            )


# hidden, intermediate, layers, query heads, key/value heads, vocabulary, tied embedding
_PRESETS = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "14B": (5120, 13824, 48, 40, 8, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
    "72B": (8192, 29568, 80, 64, 8, 152064, False),
}


class _Fields:
    """Reads required numbers from metadata and raises errors that name file and field."""

    def __init__(self, fields: Mapping[str, object], where: str) -> None:
        self._fields = fields
        self._where = where

    def size(self, key: str) -> int:
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise _malformed(self._where, key, value, "a positive integer")
        return value

    def positive(self, key: str) -> float:
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise _malformed(self._where, key, value, "a positive number")
        return float(value)

    def head_dim(self, key: str, hidden: int, heads: int, hidden_key: str) -> int:
        """Reads the head width, which both formats may omit when it is hidden / heads."""
        if self._fields.get(key) is not None:
            return self.size(key)
        if hidden % heads:
            raise CheckpointError(
                self._where,
                hidden_key,
                f"{hidden} is not divisible by {heads} attention heads",
                f"set {key} if the head width is not the quotient",
            )
        return hidden // heads

    def _get(self, key: str) -> object:
        if key not in self._fields:
            raise CheckpointError(
                self._where, key, "the field is missing", "every Qwen2 checkpoint must have it"
            )
        return self._fields[key]


def _rope_theta(fields: Mapping[str, object], where: str) -> float:
    """Reads the base of the rotary frequencies, and refuses scaled ones.

    transformers 5 moved `rope_theta` and `rope_scaling` into one object, `rope_parameters`. It
    looks for the base in this object first, even if the object has the old name `rope_scaling`. If
    the object has no type, other fields in it are refused, because they cannot be ignored.
    """
    theta = fields, where
    for key in ("rope_parameters", "rope_scaling"):
        rope = fields.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise _malformed(where, key, rope, "an object or null")
        told = {name: value for name, value in rope.items() if value is not None}
        kinds = [told.pop(name) for name in ("rope_type", "type") if name in told]
        for kind in kinds:
            if kind != "default":
                raise _rope_scaling(where, key, repr(kind))
        if "rope_theta" in told:
            theta = rope, f"{where}: {key}"
            del told["rope_theta"]
        if told and not kinds:
            raise _rope_scaling(where, key, f"by {', '.join(sorted(told))} without a rope_type")
    return _Fields(*theta).positive("rope_theta")


def _from_float32(value: float) -> float:
    # GGUF stores float32. The shortest decimal of 9.99999997e-07 is the published 1e-6.
    return float(str(np.float32(value)))


def _require_equal(fields: Mapping[str, object], key: str, value: str, where: str) -> None:
    if fields.get(key) != value:
        raise CheckpointError(
            where,
            key,
            f"is {fields[key]!r}" if key in fields else "the field is missing",
            f"only {value!r} is supported",
        )


def _malformed(where: str, key: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(where, key, f"is {value!r}", f"must be {expected}")


def _rope_scaling(where: str, key: str, how: str) -> CheckpointError:
    return CheckpointError(
        where, key, f"rope scaling {how}", "only unscaled rotary embedding is supported"
    )

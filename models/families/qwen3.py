"""Qwen3, dense sizes: queries and keys are normalised, and there are no biases."""

from tokendance_jax.models.families.family import Family

QWEN3 = Family(name="qwen3", architecture="Qwen3ForCausalLM", attention_bias=False, qk_norm=True)

"""Loads checkpoints: safetensors, GGUF, Orbax and the Hugging Face hub."""

from tokendance_jax.models.errors import CheckpointError
from tokendance_jax.models.loading.checkpoint import Checkpoint
from tokendance_jax.models.loading.huggingface import save_huggingface
from tokendance_jax.models.loading.load import load_checkpoint
from tokendance_jax.models.loading.orbax_folder import save_orbax

__all__ = ["Checkpoint", "CheckpointError", "load_checkpoint", "save_huggingface", "save_orbax"]

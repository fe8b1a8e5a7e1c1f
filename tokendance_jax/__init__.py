"""TokenDance-JAX: serves rounds of many LLM agents on a paged KV state, in JAX."""

from tokendance_jax.demo import demo_trace
from tokendance_jax.demo.model import demo_model
from tokendance_jax.engine.config import EngineConfig
from tokendance_jax.engine.engine import RoundEngine
from tokendance_jax.engine.errors import NotFiniteError
from tokendance_jax.engine.result import RoundResult, Timings
from tokendance_jax.mirror import MasterMirror, restore_mirrors, save_mirrors
from tokendance_jax.model import Model, load_model
from tokendance_jax.models.loading import CheckpointError
from tokendance_jax.paged import OutOfPages
from tokendance_jax.policy.policies import PolicyOptions
from tokendance_jax.prompt import (
    AgentPrompt,
    Author,
    PromptError,
    Round,
    Sampling,
    Segment,
    Trace,
    gather,
    read_trace,
    split_prompt,
    write_trace,
)

__version__ = "0.1.0"

__all__ = [
    "AgentPrompt",
    "Author",
    "CheckpointError",
    "EngineConfig",
    "MasterMirror",
    "Model",
    "NotFiniteError",
    "OutOfPages",
    "PolicyOptions",
    "PromptError",
    "Round",
    "RoundEngine",
    "RoundResult",
    "Sampling",
    "Segment",
    "Timings",
    "Trace",
    "__version__",
    "demo_model",
    "demo_trace",
    "gather",
    "load_model",
    "read_trace",
    "restore_mirrors",
    "save_mirrors",
    "split_prompt",
    "write_trace",
]

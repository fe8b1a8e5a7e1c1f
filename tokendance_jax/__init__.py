"""TokenDance-JAX: serves rounds of many LLM agents on a paged KV state, in JAX."""

from tokendance_jax.demo import demo_trace
from tokendance_jax.demo.model import demo_model
from tokendance_jax.engine.admission import QueueFull
from tokendance_jax.engine.config import EngineConfig
from tokendance_jax.engine.counters import Counters
from tokendance_jax.engine.engine import Engine
from tokendance_jax.engine.errors import NotFiniteError
from tokendance_jax.engine.result import RoundResult, Timings
from tokendance_jax.engine.rounds import RoundEngine
from tokendance_jax.engine.sequence import Event, Handle, Sequence, TokenLogprobs
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
    TokenizedPrompt,
    TokenSpan,
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
    "Counters",
    "Engine",
    "EngineConfig",
    "Event",
    "Handle",
    "MasterMirror",
    "Model",
    "NotFiniteError",
    "OutOfPages",
    "PolicyOptions",
    "PromptError",
    "QueueFull",
    "Round",
    "RoundEngine",
    "RoundResult",
    "Sampling",
    "Segment",
    "Sequence",
    "Timings",
    "TokenLogprobs",
    "TokenSpan",
    "TokenizedPrompt",
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

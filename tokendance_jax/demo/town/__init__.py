"""A small town with a grammar of its own: rounds, stories, and probes about what people say.

Host only. Every round, story and probe is drawn from a seed.
"""

from tokendance_jax.demo.town import words
from tokendance_jax.demo.town.probes import KINDS, Probe, ProbeKind, probes
from tokendance_jax.demo.town.rounds import (
    GRADED,
    GUIDE,
    MAX_NEW_TOKENS,
    drifting_rounds,
    probe_round,
    prompt_of,
    story,
)
from tokendance_jax.demo.town.town import Town, View, draw_town, view_of

__all__ = [
    "GRADED",
    "GUIDE",
    "KINDS",
    "MAX_NEW_TOKENS",
    "Probe",
    "ProbeKind",
    "Town",
    "View",
    "draw_town",
    "drifting_rounds",
    "probe_round",
    "probes",
    "prompt_of",
    "story",
    "view_of",
    "words",
]

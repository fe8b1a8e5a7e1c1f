"""A small town that people of our own grammar live in: rounds, stories, and probes of what is said.

Host only. Every round, story and probe is drawn from a seed.
"""

from tokendance_jax.demo.town import words
from tokendance_jax.demo.town.probes import KINDS, Probe, ProbeKind, probes
from tokendance_jax.demo.town.rounds import GRADED, MAX_NEW_TOKENS, probe_round, prompt_of, story
from tokendance_jax.demo.town.town import Town, View, draw_town, view_of

__all__ = [
    "GRADED",
    "KINDS",
    "MAX_NEW_TOKENS",
    "Probe",
    "ProbeKind",
    "Town",
    "View",
    "draw_town",
    "probe_round",
    "probes",
    "prompt_of",
    "story",
    "view_of",
    "words",
]

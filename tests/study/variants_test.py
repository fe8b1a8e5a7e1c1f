"""Variants that are compared, and which of them an audit repeats."""

from tokendance_jax.policy.policies import PolicyOptions
from tokendance_jax.study.variants import Variant, audited


def test_an_audit_repeats_the_first_variant_that_keeps_bases():
    blend = Variant("blend")
    bases = "joint-agent", "alone", "joint"
    agent, alone, joint = (Variant("tokendance", PolicyOptions(base=base)) for base in bases)
    assert audited([blend, agent, alone, joint]) == alone
    assert audited([joint, alone]) == joint
    assert audited([blend, agent]) is None

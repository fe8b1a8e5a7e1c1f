import pytest

import tokendance_jax as td


def test_the_default_policy_is_the_collective_one():
    assert td.EngineConfig().policy == "tokendance"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "tokendence"}, r"policy: 'tokendence' is unknown; choose one of dense, prefix"),
        ({"row_budget": 0}, "row_budget: 0 is too small; give at least 1"),
        ({"max_agents": 0}, "max_agents: 0"),
        ({"decode_steps": -1}, "decode_steps: -1"),
        ({"page_size": 24}, "page_size: 24 is not a power of two"),
        ({"kv_memory": 1 << 60}, "kv_memory: a pool of .* GiB is too large"),
    ],
)
def test_settings_are_checked_when_they_are_made(settings, message):
    with pytest.raises(ValueError, match=message):
        td.EngineConfig(**settings)

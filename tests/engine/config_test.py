import types

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tokendance_jax as td
from tests.engine.rounds import tiny
from tokendance_jax import host
from tokendance_jax.engine.limits import DEFAULT_KV_MEMORY, pool_pages

GIB = 1 << 30


def set_free(patch, free, platform="cpu"):
    """Makes a device of this platform the default one, with so many free bytes."""
    stats = None if free is None else {"bytes_limit": free + GIB, "bytes_in_use": GIB}
    device = types.SimpleNamespace(platform=platform, memory_stats=lambda: stats)
    patch.setattr(jax, "devices", lambda: [device])
    if platform == "cpu":
        patch.setattr(host, "free_memory", lambda: free)


def automatic(room=1, fraction=0.9, most=1 << 60):
    """The pages of a pool of kv_memory="auto"."""
    return pool_pages("auto", room, memory_fraction=fraction, most=most)


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
        ({"kv_memory": "2GiB"}, "kv_memory: '2GiB' is unknown; give a number of bytes or 'auto'"),
        ({"memory_fraction": 0.0}, "memory_fraction: 0.0 is out of range; give a number above 0"),
        ({"memory_fraction": 1.1}, "memory_fraction: 1.1"),
        ({"memory_fraction": float("nan")}, "memory_fraction: nan"),
    ],
)
def test_settings_are_checked_when_they_are_made(settings, message):
    with pytest.raises(ValueError, match=message):
        td.EngineConfig(**settings)


@given(
    free=st.integers(min_value=0, max_value=1 << 40),
    fraction=st.floats(min_value=0, max_value=1, exclude_min=True),
    room=st.integers(min_value=1, max_value=1 << 24),
    most=st.integers(min_value=2, max_value=1 << 20),
    platform=st.sampled_from(["cpu", "gpu", "tpu"]),
)
def test_an_automatic_pool_is_nearly_the_share_and_never_more(free, fraction, room, most, platform):
    share = fraction * free
    if platform == "cpu":
        share = min(share, DEFAULT_KV_MEMORY)
    with pytest.MonkeyPatch.context() as patch:
        set_free(patch, free, platform)
        try:
            pages = automatic(room, fraction, most)
        except ValueError:
            assert (share - 1) * 31 / 32 < 2 * room
            return
    assert pages * room <= share
    assert pages <= most
    assert pages == most or (pages + 1) * room > (share - 1) * 31 / 32


def test_small_changes_of_the_free_memory_keep_the_size(monkeypatch):
    sizes = set()
    for change in range(8):
        set_free(monkeypatch, 45 * GIB + (change << 20), "gpu")
        sizes.add(automatic())
    assert len(sizes) == 1


def test_an_automatic_pool_has_the_default_size_if_the_free_memory_is_unknown(monkeypatch):
    for platform in ("cpu", "tpu"):
        set_free(monkeypatch, None, platform)
        assert automatic() == DEFAULT_KV_MEMORY


def test_too_little_free_memory_is_named(monkeypatch):
    model = tiny()
    monkeypatch.setattr(host, "free_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"kv_memory: 'auto' .* hold 0 pages .* memory_fraction"):
        td.RoundEngine(model)


def test_an_automatic_pool_is_no_larger_than_the_largest_round(monkeypatch):
    monkeypatch.setattr(host, "free_memory", lambda: 1 << 40)
    config = td.EngineConfig(max_agents=2, page_size=16)
    assert config.kv_memory == "auto"
    engine = td.RoundEngine(tiny(), config)
    context = tiny().config.max_position_embeddings
    assert 2 * context < engine.shapes.pages * 16 <= 3 * (context + 512) + 16

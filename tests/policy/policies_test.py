import pytest

from tokendance_jax.paged import PagePool
from tokendance_jax.policy.policies import POLICIES, PolicyOptions, make_policy

CLASSES = ["Dense", "Prefix", "Blend", "Blend", "Epic", "Collective"]


def test_policies_are_made_by_name():
    made = [type(make_policy(name, PagePool(2), 2, "")).__name__ for name in POLICIES]
    assert made == CLASSES


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("best", {}, "'best' is unknown; choose one of dense, prefix"),
        ("tokendance", {"base": "b"}, "base: 'b' is unknown; choose one of joint"),
        ("tokendance", {"selection": "s"}, "selection: 's' is unknown; choose one of head"),
        ("tokendance", {"head_pages": -1}, "head_pages: -1 is negative"),
        ("tokendance", {"base": "joint-agent", "selection": "query"}, "selection without scores"),
        ("tokendance", {"least_saving": 1.2}, "least_saving: 1.2 is not a fraction; give a number"),
        ("tokendance", {"least_saving": -0.1}, "least_saving: -0.1 is not a fraction"),
        ("tokendance", {"least_saving": float("nan")}, "least_saving: nan is not a fraction"),
        ("blend", {"blend_ratio": 1.5}, "blend_ratio: 1.5 is not a fraction"),
        ("epic", {"epic_tokens": -1}, "epic_tokens: -1 is negative"),
    ],
)
def test_unknown_names_and_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_policy(name, PagePool(2), 2, "", options=PolicyOptions(**options))

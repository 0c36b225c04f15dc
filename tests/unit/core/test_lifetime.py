"""Until when an exchanged token may be handed out again."""

from typing import Any

import pytest

from kong_token_exchange.core.lifetime import reuse_deadline

NOW = 1_800_000_000.0

# Everything far away but what a row names.
FAR: dict[str, Any] = {
    "now": NOW,
    "expires_in": 10_000,
    "result_exp": NOW + 10_000,
    "subject_exp": NOW + 10_000,
    "ttl": 10_000,
    "max_lifetime": None,
    "margin": 0,
}


@pytest.mark.parametrize(
    "bound",
    [
        {"expires_in": 100},
        {"result_exp": NOW + 100},
        {"subject_exp": NOW + 100},
        {"ttl": 100},
        {"max_lifetime": 100},
        {"expires_in": None, "result_exp": NOW + 100},
        {"expires_in": 100, "result_exp": None},
        {"expires_in": 100, "subject_exp": NOW + 101, "ttl": 102},
    ],
    ids="-".join,
)
def test_earliest_bound_decides(bound: dict[str, Any]) -> None:
    assert reuse_deadline(**{**FAR, **bound}) == NOW + 100
    assert reuse_deadline(**{**FAR, **bound, "margin": 5}) == NOW + 95


@pytest.mark.parametrize(("margin", "left"), [(99, NOW + 1), (100, None), (101, None)])
@pytest.mark.parametrize("bound", ["expires_in", "ttl", "max_lifetime"])
def test_nothing_at_or_below_zero_is_kept(bound: str, margin: float, left: float | None) -> None:
    assert reuse_deadline(**{**FAR, bound: 100, "margin": margin}) == left


@pytest.mark.parametrize("bound", ["expires_in", "ttl", "max_lifetime"])
@pytest.mark.parametrize("value", [0, -1, -(2**31)])
def test_spent_lifetimes_are_not_kept(bound: str, value: int) -> None:
    assert reuse_deadline(**{**FAR, bound: value}) is None


@pytest.mark.parametrize("bound", ["result_exp", "subject_exp"])
@pytest.mark.parametrize(("exp", "left"), [(NOW - 1, None), (NOW, None), (NOW + 1, NOW + 1)])
def test_tokens_that_end_now_are_not_kept(bound: str, exp: float, left: float | None) -> None:
    assert reuse_deadline(**{**FAR, bound: exp}) == left


def test_result_without_any_expiry_is_not_kept() -> None:
    assert reuse_deadline(**{**FAR, "expires_in": None, "result_exp": None}) is None
    assert reuse_deadline(**{**FAR, "expires_in": None, "result_exp": None, "max_lifetime": 60}) is None

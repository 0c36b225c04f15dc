"""Until when an exchanged token may be handed out again."""

from typing import Any

import pytest

from kong_token_exchange.core.lifetime import MIN_LIFE_TO_REFRESH_S, refresh_instant, reuse_deadline

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


# --- ahead of the end -----------------------------------------------------------------


@pytest.mark.parametrize(("spread", "share"), [(0.0, 0.8), (0.5, 0.85), (1.0, 0.9)])
def test_res_04_a_token_is_renewed_in_the_last_part_of_its_life(spread: float, share: float) -> None:
    instant = refresh_instant(now=NOW, reuse_until=NOW + 100, subject_end=NOW + 500, spread=spread)

    assert instant == pytest.approx(NOW + 100 * share)


@pytest.mark.parametrize(
    ("life", "outlives", "renewed"),
    [
        (100, 20, True),
        (100, 19.999, False),
        (100, 0, False),
        (100, -1, False),
        (MIN_LIFE_TO_REFRESH_S, 100, True),
        (MIN_LIFE_TO_REFRESH_S - 0.001, 100, False),
    ],
    ids=["as-long-as-the-window", "a-little-less", "with-it", "before-it", "shortest-life", "shorter"],
)
def test_a_token_is_renewed_where_that_lengthens_its_use(life: float, outlives: float, renewed: bool) -> None:
    instant = refresh_instant(now=NOW, reuse_until=NOW + life, subject_end=NOW + life + outlives, spread=0.0)

    assert renewed is (instant is not None)


def test_what_is_not_kept_is_not_renewed() -> None:
    assert None is refresh_instant(now=NOW, reuse_until=None, subject_end=NOW + 500, spread=0.0)

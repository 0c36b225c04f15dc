"""What came out of an exchange against what policy lets out."""

from typing import Any, Literal

import pytest

from kong_token_exchange.core.claims import Claims, parse_claims
from kong_token_exchange.core.decision import Relation
from kong_token_exchange.core.narrowing import check_same_subject, find_widening
from kong_token_exchange.core.policy import ClaimPair, ResultPolicy
from kong_token_exchange.errors import ExchangedTokenError
from tests.support.minting import ABSENT, NOW, FakeIssuer
from tests.unit.core.pipeline import refused

SUBJECT = parse_claims(FakeIssuer().claims(scope="read write"))


def result_of(**changes: Any) -> Claims:
    return parse_claims(FakeIssuer("https://target.test").claims(**{"scope": "read", **changes}))


def widening(
    policy: ResultPolicy,
    result: Claims | None = None,
    *,
    answered: frozenset[str] | None = None,
    downscoping: bool = False,
    subject: Claims = SUBJECT,
    now: float = NOW,
    leeway: float = 0.0,
    requested: frozenset[str] = frozenset(),
) -> tuple[str, ...]:
    return find_widening(
        policy,
        subject=subject,
        result=result,
        answered_scopes=answered,
        downscoping=downscoping,
        now=now,
        leeway=leeway,
        requested_audience=requested,
    )


READ = ResultPolicy(allowed_scopes=frozenset({"read"}))
API = ResultPolicy(allowed_audience=frozenset({"api"}))
MINUTE = ResultPolicy(max_lifetime=60)


def test_nothing_is_wider_than_no_limit() -> None:
    wide = result_of(scope="admin root", aud=["a", "b"], exp=2**53 - 1)
    assert widening(ResultPolicy(), wide, answered=frozenset({"more"})) == ()
    assert widening(ResultPolicy(), None) == ()


@pytest.mark.parametrize(
    ("members", "answered", "wider"),
    [
        ({}, None, False),
        ({"scope": ABSENT}, None, False),
        ({"scope": ""}, frozenset(), False),
        ({}, frozenset({"read"}), False),
        ({"scope": "read admin"}, None, True),
        ({"scope": "Read"}, None, True),
        ({"scope": "readx"}, None, True),
        # The token says one thing, the answer another: both are judged.
        ({"scope": "read"}, frozenset({"read", "admin"}), True),
        ({"scope": "admin"}, frozenset({"read"}), True),
        ({"scope": ABSENT}, frozenset({"admin"}), True),
        # A spelling that is not the configured one is no way around the limit.
        ({"scope": ABSENT, "scp": "admin"}, None, True),
        ({"scope": "read", "scp": ["read", "admin"]}, None, True),
        ({"scope": "read", "scp": ["read"]}, None, False),
    ],
)
def test_scopes_stay_within_the_limit(
    members: dict[str, Any],
    answered: frozenset[str] | None,
    wider: bool,
) -> None:
    expected = ("scope_not_allowed",) if wider else ()
    assert widening(READ, result_of(**members), answered=answered) == expected


def test_scopes_of_a_result_that_is_not_read_are_those_of_the_answer() -> None:
    assert widening(READ, None, answered=frozenset({"read"})) == ()
    assert widening(READ, None, answered=frozenset({"admin"})) == ("scope_not_allowed",)
    assert widening(READ, None) == ()


def test_empty_limit_lets_nothing_out() -> None:
    nothing = ResultPolicy(allowed_scopes=frozenset(), allowed_audience=frozenset())
    assert widening(nothing, result_of()) == ("scope_not_allowed", "audience_not_allowed")
    assert widening(nothing, result_of(scope=ABSENT, aud=ABSENT)) == ("audience_not_allowed",)


@pytest.mark.parametrize(
    ("aud", "wider"),
    [
        ("api", False),
        (["api"], False),
        (["api", "api"], False),
        ("billing", True),
        (["api", "billing"], True),
        ("API", True),
        ("api2", True),
        # A token for nobody in particular is a token for everybody.
        (ABSENT, True),
    ],
)
def test_audience_stays_within_the_limit(aud: object, wider: bool) -> None:
    assert widening(API, result_of(aud=aud)) == (("audience_not_allowed",) if wider else ())


@pytest.mark.parametrize(
    ("aud", "wider"),
    [
        ("api", False),
        (ABSENT, False),
        ("billing", True),
        ({"api": 1}, True),
        ([["api"]], True),
        (["api", {}], True),
        (7, True),
        (None, False),
    ],
)
def test_clm_18_an_audience_beside_the_configured_one_is_judged_whatever_its_type(
    aud: object, wider: bool
) -> None:
    members = FakeIssuer("https://target.test").claims(aud=aud, resource="api")
    result = parse_claims(members, audience_claim=("resource",))

    assert widening(API, result) == (("audience_not_allowed",) if wider else ())


@pytest.mark.parametrize(
    ("exp", "leeway", "wider"),
    [
        (NOW + 59, 0.0, False),
        (NOW + 60, 0.0, False),
        (NOW + 61, 0.0, True),
        (NOW + 61, 1.0, False),
        (NOW + 62, 1.0, True),
        (2**53 - 1, 60.0, True),
    ],
)
def test_lifetime_stays_within_the_limit(exp: int, leeway: float, wider: bool) -> None:
    assert widening(MINUTE, result_of(exp=exp), leeway=leeway) == (("lifetime_not_allowed",) if wider else ())


@pytest.mark.parametrize(
    ("scope", "answered", "wider"),
    [
        ("read", None, False),
        ("read write", None, False),
        ("", None, False),
        ("read admin", None, True),
        ("read", frozenset({"admin"}), True),
    ],
)
def test_downscoping_gives_a_subset_of_the_subjects_scopes(
    scope: str,
    answered: frozenset[str] | None,
    wider: bool,
) -> None:
    expected = ("scope_beyond_subject",) if wider else ()
    assert widening(ResultPolicy(), result_of(scope=scope), answered=answered, downscoping=True) == expected
    assert widening(ResultPolicy(), result_of(scope=scope), answered=answered) == ()


def test_downscoping_from_a_subject_without_scopes_gives_none() -> None:
    bare = parse_claims(FakeIssuer().claims(scope=ABSENT, scp="read"))
    assert widening(ResultPolicy(), result_of(), downscoping=True, subject=bare) == ("scope_beyond_subject",)
    assert widening(ResultPolicy(), result_of(scope=ABSENT), downscoping=True, subject=bare) == ()


def test_every_excess_is_named() -> None:
    tight = ResultPolicy(allowed_scopes=frozenset({"x"}), allowed_audience=frozenset({"x"}), max_lifetime=1)
    assert widening(tight, result_of(scope="admin"), downscoping=True) == (
        "scope_not_allowed",
        "audience_not_allowed",
        "lifetime_not_allowed",
        "scope_beyond_subject",
    )


# --- same subject ---------------------------------------------------------------------

SameSubject = Literal["sub", "off"] | tuple[ClaimPair, ...] | None
MAPPED = (ClaimPair(subject_claim="email", result_claim="upn"),)


@pytest.mark.parametrize(
    ("same_subject", "relation", "proven"),
    [
        (None, "same_issuer", True),
        (None, "cross_issuer", False),
        ("sub", "same_issuer", True),
        ("sub", "cross_issuer", True),
        ("off", "same_issuer", False),
        ("off", "cross_issuer", False),
        # No pair is no statement: the default holds.
        ((), "same_issuer", True),
        ((), "cross_issuer", False),
    ],
)
def test_subject_is_compared_where_policy_says(
    same_subject: SameSubject,
    relation: Relation,
    proven: bool,
) -> None:
    policy = ResultPolicy(same_subject=same_subject)
    same, other = result_of(), result_of(sub="user-2")

    assert proven is check_same_subject(policy, relation=relation, subject=SUBJECT, result=same)
    if proven:
        error = refused(
            ExchangedTokenError,
            "subject_differs",
            check_same_subject,
            policy,
            relation=relation,
            subject=SUBJECT,
            result=other,
        )
        assert error.facts == {"claim": "sub"}
    else:
        assert check_same_subject(policy, relation=relation, subject=SUBJECT, result=other) is False


@pytest.mark.parametrize(
    ("wanted", "found", "same"),
    [
        ("alice", "alice", True),
        (7, 7, True),
        ("alice", "Alice", False),
        ("alice", "alice ", False),
        ("é", "e\u0301", False),
        ("7", 7, False),
        (7, "7", False),
        (1, True, False),
        (1, 1.0, False),
        (True, 1, False),
        (True, True, False),
        (1.5, 1.5, False),
        (0, 0, False),
        ("", "", False),
        ([], [], False),
        (["alice"], ["alice"], False),
        ({}, {}, False),
        ({"a": 1}, {"a": 1}, False),
        (None, None, False),
        (ABSENT, ABSENT, False),
        ("alice", ABSENT, False),
        (ABSENT, "alice", False),
        ("alice", None, False),
        ("alice", ["alice"], False),
    ],
)
def test_mapped_claims_are_the_same_text_or_number(
    wanted: object,
    found: object,
    same: bool,
) -> None:
    policy = ResultPolicy(same_subject=MAPPED)
    subject = parse_claims(FakeIssuer().claims(email=wanted))
    result = result_of(upn=found, sub="another")

    if same:
        assert check_same_subject(policy, relation="cross_issuer", subject=subject, result=result) is True
    else:
        error = refused(
            ExchangedTokenError,
            "subject_differs",
            check_same_subject,
            policy,
            relation="cross_issuer",
            subject=subject,
            result=result,
        )
        assert error.facts == {"claim": "upn"}


def test_every_pair_must_hold() -> None:
    pairs = (*MAPPED, ClaimPair(subject_claim="sub", result_claim="sub"))
    policy = ResultPolicy(same_subject=pairs)
    subject = parse_claims(FakeIssuer().claims(email="a"))

    assert (
        check_same_subject(policy, relation="cross_issuer", subject=subject, result=result_of(upn="a"))
        is True
    )
    for changes in ({"upn": "a", "sub": "user-2"}, {"upn": "b"}):
        with pytest.raises(ExchangedTokenError):
            check_same_subject(policy, relation="cross_issuer", subject=subject, result=result_of(**changes))


@pytest.mark.parametrize(
    ("aud", "beyond"),
    [
        ("orders", False),
        (["orders"], False),
        (["orders", "reports"], False),
        ("other", True),
        (["orders", "other"], True),
        ("ORDERS", True),
        (ABSENT, True),
    ],
)
def test_exc_17_an_audience_that_was_not_asked_for_is_found(aud: object, beyond: bool) -> None:
    requested = frozenset({"orders", "reports"})

    expected = ("audience_beyond_request",) if beyond else ()
    assert expected == widening(ResultPolicy(), result_of(aud=aud), requested=requested)


def test_an_allowed_audience_stands_in_place_of_what_was_asked_for() -> None:
    assert widening(API, result_of(aud="api"), requested=frozenset({"orders"})) == ()
    assert widening(API, result_of(aud="orders"), requested=frozenset({"orders"})) == (
        "audience_not_allowed",
    )


def test_what_is_not_read_has_no_audience_to_judge() -> None:
    assert widening(ResultPolicy(), None, requested=frozenset({"orders"})) == ()

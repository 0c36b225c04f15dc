"""Who is trusted, and forward or exchange, as a table."""

from typing import Any

import pytest

from kong_token_exchange.core.claims import Claims, parse_claims
from kong_token_exchange.core.decision import Exchange, Forward, conditions_match, decide, trusted_issuer
from kong_token_exchange.core.policy import Conditions, SubjectTokenIssuer
from kong_token_exchange.errors import UnknownIssuerError
from tests.support.minting import ABSENT, FakeIssuer
from tests.unit.core.pipeline import refused

TARGET = "https://target.test"
FOREIGN = "https://foreign.test"


def claims_of(iss: str = TARGET, **changes: Any) -> Claims:
    return parse_claims(FakeIssuer(iss).claims(**changes))


def entry(issuer: str = TARGET, conditions: Conditions | None = None, **changes: Any) -> SubjectTokenIssuer:
    return SubjectTokenIssuer(issuer=issuer, discovery_url=None, conditions=conditions, **changes)


def having(**members: tuple[str, ...]) -> Conditions:
    return Conditions(**members)


A, B, C = "a", "b", "c"

# The token has aud a and b, scopes a and b.
CONDITIONS: list[tuple[str, Conditions, bool]] = [
    ("has-one", having(has_audience=(A,)), True),
    ("has-all", having(has_audience=(A, B)), True),
    ("has-not-all", having(has_audience=(A, C)), False),
    ("has-none", having(has_audience=(C,)), False),
    ("has-case", having(has_audience=("A",)), False),
    ("has-substring", having(has_audience=("",)), False),
    ("missing-one", having(missing_audience=(C,)), True),
    ("missing-one-of-two", having(missing_audience=(A, C)), True),
    ("missing-none", having(missing_audience=(A, B)), False),
    ("missing-present", having(missing_audience=(A,)), False),
    ("scope-has", having(has_scopes=(A, B)), True),
    ("scope-has-not-all", having(has_scopes=(B, C)), False),
    ("scope-missing", having(missing_scopes=(B, C)), True),
    ("scope-missing-none", having(missing_scopes=(B,)), False),
    ("both-hold", having(has_audience=(A,), missing_scopes=(C,)), True),
    ("first-fails", having(has_audience=(C,), missing_scopes=(C,)), False),
    ("second-fails", having(has_audience=(A,), missing_scopes=(A,)), False),
    ("has-and-missing-the-same", having(has_audience=(A,), missing_audience=(A,)), False),
    (
        "all-four",
        having(has_audience=(A,), missing_audience=(C,), has_scopes=(B,), missing_scopes=(C,)),
        True,
    ),
    (
        "one-of-four-fails",
        having(has_audience=(A,), missing_audience=(C,), has_scopes=(C,), missing_scopes=(C,)),
        False,
    ),
    ("empty-members-say-nothing", having(has_audience=(), missing_audience=(C,), has_scopes=()), True),
    ("empty", having(), False),
    ("all-empty", having(has_audience=(), missing_audience=(), has_scopes=(), missing_scopes=()), False),
]


@pytest.mark.parametrize(("conditions", "holds"), [pytest.param(c, h, id=i) for i, c, h in CONDITIONS])
def test_conditions(conditions: Conditions, holds: bool) -> None:
    claims = claims_of(aud=[A, B], scope="a b")

    assert holds is conditions_match(claims, conditions)
    expected = Exchange("same_issuer", entry(conditions=conditions)) if holds else Forward()
    assert decide(claims, issuers=(entry(conditions=conditions),), target_issuer=TARGET) == expected


@pytest.mark.parametrize(
    ("conditions", "holds"),
    [
        (having(has_audience=(A,)), False),
        (having(missing_audience=(A,)), True),
        (having(has_scopes=(A,)), False),
        (having(missing_scopes=(A,)), True),
        (having(), False),
    ],
)
def test_conditions_on_a_token_without_audience_and_scopes(
    conditions: Conditions,
    holds: bool,
) -> None:
    assert holds is conditions_match(claims_of(aud=ABSENT, scope=ABSENT), conditions)


def test_empty_conditions_are_false() -> None:
    assert not having()
    assert not having(has_audience=(), missing_scopes=())
    for name in ("has_audience", "missing_audience", "has_scopes", "missing_scopes"):
        assert having(**{name: (A,)})


def test_token_of_a_foreign_issuer_is_always_exchanged() -> None:
    foreign = entry(FOREIGN)
    assert decide(claims_of(FOREIGN), issuers=(foreign,), target_issuer=TARGET) == Exchange(
        "cross_issuer", foreign
    )
    # A configuration refuses conditions there; were they to come in, they could not turn an exchange off.
    never = entry(FOREIGN, having(has_audience=("nobody",)))
    assert decide(claims_of(FOREIGN), issuers=(never,), target_issuer=TARGET) == Exchange(
        "cross_issuer", never
    )


def test_token_of_the_target_is_forwarded_where_nothing_asks_for_an_exchange() -> None:
    for issuers in ((), (entry(FOREIGN),), (entry(),), (entry(conditions=having()),)):
        assert decide(claims_of(), issuers=issuers, target_issuer=TARGET) == Forward()


def test_first_matching_entry_decides() -> None:
    first, second = having(has_audience=("nobody",)), having(missing_scopes=("nobody",))
    issuers = (
        entry(FOREIGN, second),
        entry(conditions=first, subject_token_type="urn:1"),
        entry(conditions=second, subject_token_type="urn:2"),
        entry(conditions=second, subject_token_type="urn:3"),
    )

    decision = decide(claims_of(), issuers=issuers, target_issuer=TARGET)
    assert isinstance(decision, Exchange)
    assert (decision.relation, decision.entry.subject_token_type) == ("same_issuer", "urn:2")
    decision = decide(claims_of(aud="nobody"), issuers=issuers, target_issuer=TARGET)
    assert isinstance(decision, Exchange)
    assert decision.entry.subject_token_type == "urn:1"


@pytest.mark.parametrize("iss", [FOREIGN + "/", FOREIGN.upper(), TARGET + "/", "https://target.tes", "other"])
def test_token_of_an_issuer_without_an_entry_is_not_decided_on(iss: str) -> None:
    refused(
        UnknownIssuerError,
        "issuer_unknown",
        decide,
        claims_of(iss),
        issuers=(entry(FOREIGN),),
        target_issuer=TARGET,
    )


def test_trust_is_an_exact_match_of_the_first_entry() -> None:
    target, first, second = entry(), entry(FOREIGN, typ=("first",)), entry(FOREIGN, typ=("second",))
    issuers = (first, second)

    assert trusted_issuer(FOREIGN, issuers=issuers, target=target) is first
    assert trusted_issuer(TARGET, issuers=issuers, target=target) is target
    listed = entry(audience=("api",))
    assert trusted_issuer(TARGET, issuers=(listed,), target=target) is listed


@pytest.mark.parametrize(
    "iss", [None, "", 1, True, [TARGET], {TARGET: 1}, TARGET + "/", TARGET[:-1], [], {}, 1.5]
)
def test_anything_else_is_trusted_by_nobody(iss: object) -> None:
    error = refused(
        UnknownIssuerError, "issuer_unknown", trusted_issuer, iss, issuers=(entry(FOREIGN),), target=entry()
    )
    assert error.facts == {}

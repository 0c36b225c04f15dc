"""The one tree of errors: what each class says, and what it never shows."""

import inspect
import re

import pytest

from kong_token_exchange import errors
from kong_token_exchange.errors import (
    ClaimError,
    ConfigError,
    GatewayError,
    InsufficientScopeError,
    InvalidTokenError,
    IssuerUnavailableError,
    MalformedRequestError,
    ProtocolError,
    RejectionError,
    TimestampError,
    TokenExchangeError,
)

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]


def test_every_error_is_in_the_tree() -> None:
    assert all(issubclass(kind, TokenExchangeError) for kind in CLASSES)
    assert TokenExchangeError.__base__ is Exception


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_tree_in_the_docstring_names_every_class_with_its_status(kind: type[TokenExchangeError]) -> None:
    [line] = [
        line for line in (errors.__doc__ or "").splitlines() if re.search(rf"\b{kind.__name__}\b", line)
    ]
    status = re.search(rf"{kind.__name__}\s+([45]\d\d)", line)
    if status:
        assert int(status[1]) == kind.status


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_status_says_whose_fault_it_is(kind: type[TokenExchangeError]) -> None:
    assert (400 <= kind.status < 500) is issubclass(kind, RejectionError)
    assert (500 <= kind.status < 600) is not issubclass(kind, RejectionError)
    if issubclass(kind, InvalidTokenError):
        assert (kind.status, kind.error) == (401, "invalid_token")
    if kind.error == "temporarily_unavailable":
        assert kind.status in {503, 504}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_wire_texts_fit_a_quoted_string(kind: type[TokenExchangeError]) -> None:
    # RFC 6750 section 3: error and error_description are of these characters alone.
    assert re.fullmatch(r"[\x20\x21\x23-\x5b\x5d-\x7e]+", kind.description)
    assert kind.error is None or re.fullmatch(r"[a-z_]+", kind.error)


def test_message_is_the_reason_and_facts_stay_beside_it() -> None:
    facts = {"kid": "MARK"}
    error = MalformedRequestError(reason="some_reason", facts=facts)

    assert ("some_reason", "some_reason", ("some_reason",)) == (str(error), error.reason, error.args)
    assert repr(error) == "MalformedRequestError('some_reason')"
    assert error.facts == facts
    facts["kid"] = "changed"
    assert error.facts == {"kid": "MARK"}
    assert MalformedRequestError(reason="x").facts == {}


@pytest.mark.parametrize(("kind", "reason"), [(TimestampError, "jwt_timestamp"), (ClaimError, "jwt_claim")])
def test_claim_is_named(kind: type[TimestampError | ClaimError], reason: str) -> None:
    error = kind(claim="exp", facts={"exp": 1})

    assert (reason, "exp", {"claim": "exp", "exp": 1}) == (error.reason, error.claim, error.facts)
    assert str(error) == reason


def test_extra_members_have_defaults() -> None:
    assert InsufficientScopeError(reason="x").scope == ""
    assert InsufficientScopeError(reason="x", scope="a b").scope == "a b"
    assert IssuerUnavailableError(reason="x").retry_after == 1
    assert IssuerUnavailableError(reason="x", retry_after=9).retry_after == 9


def test_configuration_error_names_the_path() -> None:
    error = ConfigError("token_exchange.result", "must not be empty")

    assert str(error) == "token_exchange.result: must not be empty"
    assert ("config_invalid", {"path": "token_exchange.result"}) == (error.reason, error.facts)


def test_roots_tell_the_three_sides_apart() -> None:
    sides = (RejectionError, GatewayError, ProtocolError)
    for kind in CLASSES:
        if kind not in {TokenExchangeError, ConfigError}:
            assert [issubclass(kind, side) for side in sides].count(True) == 1

"""What one process leaves for another: round trips, and everything else is refused."""

import json
from typing import Any

import pytest

from kong_token_exchange.errors import NonConformingResponseError
from kong_token_exchange.protocol.exchange import MAX_RESPONSE_BYTES, ActorToken, ExchangeResponse
from kong_token_exchange.protocol.shared_grant import build_shared_grant, process_shared_grant
from kong_token_exchange.secret import Secret
from tests.support.minting import NOW

TYPE = "urn:ietf:params:oauth:token-type:access_token"


def response(**changes: Any) -> ExchangeResponse:
    good: dict[str, Any] = {
        "access_token": Secret("result"),
        "issued_token_type": TYPE,
        "expires_in": 300,
        "scopes": frozenset({"read", "write"}),
    }
    return ExchangeResponse(**{**good, **changes})


def read(data: bytes, **changes: Any) -> tuple[ExchangeResponse, float]:
    arguments: dict[str, Any] = {
        "grant_type": "token_exchange",
        "subject_token": "subject",
        "max_token_size": 100,
    }
    return process_shared_grant(data, **{**arguments, **changes})


@pytest.mark.parametrize(
    "changes",
    [{}, {"expires_in": None}, {"scopes": None}, {"scopes": frozenset()}],
    ids=["all", "no-expires_in", "no-scope", "empty-scope"],
)
def test_what_was_judged_comes_back(changes: dict[str, Any]) -> None:
    given = response(**changes)

    assert (given, NOW + 0.5) == read(build_shared_grant(given, sent_at=NOW + 0.5))


def test_a_jwt_bearer_answer_comes_back_without_an_issued_type() -> None:
    given = response(issued_token_type=None)

    assert given == read(build_shared_grant(given, sent_at=NOW), grant_type="jwt_bearer")[0]


def test_nothing_but_what_was_judged_is_written() -> None:
    written = json.loads(build_shared_grant(response(), sent_at=NOW))

    assert {"access_token", "token_type", "issued_token_type", "expires_in", "scope", "sent_at"} == set(
        written
    )


@pytest.mark.parametrize(
    ("member", "value", "reason"),
    [
        ("sent_at", ..., "shared_grant_unusable"),
        ("sent_at", None, "shared_grant_unusable"),
        ("sent_at", True, "shared_grant_unusable"),
        ("sent_at", "1800000000", "shared_grant_unusable"),
        ("sent_at", -1, "shared_grant_unusable"),
        ("sent_at", 10**400, "shared_grant_unusable"),
        ("access_token", "subject", "subject_token_echoed"),
        ("access_token", "a b", "access_token_malformed"),
        ("access_token", "a" * 101, "access_token_malformed"),
        ("token_type", "mac", "token_type_not_bearer"),
        ("issued_token_type", ..., "issued_token_type_missing"),
        ("expires_in", "300", "expires_in_unusable"),
        ("scope", ["read"], "scope_malformed"),
    ],
)
def test_it_is_judged_like_an_answer_of_the_token_endpoint(member: str, value: Any, reason: str) -> None:
    document = {**json.loads(build_shared_grant(response(), sent_at=NOW)), member: value}
    data = json.dumps({name: item for name, item in document.items() if item is not ...}).encode()

    with pytest.raises(NonConformingResponseError) as caught:
        read(data)

    assert reason == caught.value.reason


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04N.",
        b"[]",
        b"{",
        b'{"access_token":"a","access_token":"b"}',
        b'{"sent_at":NaN}',
        b"\xff{}",
    ],
    ids=["empty", "pickle", "array", "truncated", "twice", "nan", "not-utf-8"],
)
def test_what_is_no_strict_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(NonConformingResponseError) as caught:
        read(data)

    assert "response_not_json" == caught.value.reason


def test_what_is_longer_than_an_answer_may_be_is_refused() -> None:
    data = build_shared_grant(response(), sent_at=NOW)

    with pytest.raises(NonConformingResponseError):
        read(data + b" " * (MAX_RESPONSE_BYTES + 1 - len(data)))


def test_exc_20_the_actor_token_is_no_result_here_either() -> None:
    data = build_shared_grant(response(access_token=Secret("actor")), sent_at=NOW)

    with pytest.raises(NonConformingResponseError) as caught:
        read(data, actor=ActorToken(token="actor", token_type=TYPE))

    assert "actor_token_echoed" == caught.value.reason
    assert "actor" == read(data)[0].access_token.reveal()

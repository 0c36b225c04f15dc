"""The metadata of a protected resource goes to whoever asks for it, and nothing else does."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from kong_token_exchange.errors import InsufficientScopeError, SignatureError
from kong_token_exchange.flow import FlowResult
from kong_token_exchange.plugin import TokenExchangeInstance
from kong_token_exchange.published import PublishedInstance
from tests.unit.test_plugin import FakeFlow, exchanged, read_calls, refused, start
from tests.unit.test_plugin_possession import FactsKong

PATH = "/orders/.well-known/oauth-protected-resource"
STANDARD = "/.well-known/oauth-protected-resource/orders"
METADATA = {
    "resource": "https://api.test/orders",
    "authorization_servers": ["https://idp.test"],
    "scopes_supported": ["orders:read", "orders:write"],
}


def published(
    answer: Callable[[float | None], FlowResult] = exchanged, **changes: Any
) -> tuple[Any, FakeFlow]:
    return start(answer, protected_resource_metadata=METADATA, **changes)


def warm(instance: Any, header: str = "", *, method: str = "GET", path: str = "/orders") -> Any:
    return instance.warm(["", header, method, path])


def test_an_api_without_metadata_has_nothing_around_it() -> None:
    instance, _ = start()

    assert TokenExchangeInstance is type(instance)
    assert PublishedInstance is type(published()[0])


@pytest.mark.parametrize("path", [PATH, STANDARD])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("header", ["", "Bearer a.b.c", "Bearer garbage\x01"])
def test_the_document_needs_no_token(path: str, method: str, header: str) -> None:
    instance, flow = published()

    ((name, answer),) = read_calls(warm(instance, header, method=method, path=path))

    assert ("kong.response.exit", 200, []) == (name, answer.status, flow.tokens)
    assert {**METADATA, "bearer_methods_supported": ["header"]} == json.loads(answer.body)
    assert "application/json" == answer.headers["Content-Type"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", PATH),
        ("OPTIONS", PATH),
        ("get", PATH),
        ("GET", f"{PATH}/"),
        ("GET", f"{PATH}/x"),
        ("GET", f"/x{PATH}"),
        ("GET", PATH.upper()),
        ("GET", "/orders"),
        ("GET", ""),
    ],
)
def test_everything_else_needs_one(method: str, path: str) -> None:
    instance, flow = published()

    assert 401 == warm(instance, method=method, path=path).status
    assert warm(instance, "Bearer a.b.c", method=method, path=path).status is None
    assert ["a.b.c"] == flow.tokens


URL = f"https://api.test{PATH}"
REFUSALS: list[tuple[Any, str, str]] = [
    (None, "", f'Bearer realm="kong", scope="orders:read orders:write", resource_metadata="{URL}"'),
    (
        SignatureError(reason="jwt_signature"),
        "Bearer a.b.c",
        (
            'Bearer realm="kong", error="invalid_token", error_description="the token is not acceptable",'
            f' scope="orders:read orders:write", resource_metadata="{URL}"'
        ),
    ),
    (
        InsufficientScopeError(reason="scopes_required", scope="orders:admin"),
        "Bearer a.b.c",
        (
            'Bearer realm="kong", error="insufficient_scope",'
            ' error_description="the token lacks a required scope", scope="orders:admin",'
            f' resource_metadata="{URL}"'
        ),
    ),
]


@pytest.mark.parametrize(("error", "header", "challenge"), REFUSALS)
def test_every_challenge_says_where_the_document_is(error: Any, header: str, challenge: str) -> None:
    instance, _ = published(refused(error) if error else exchanged)

    ((_, answer),) = read_calls(warm(instance, header))

    assert challenge == answer.headers["WWW-Authenticate"]


def test_a_pool_thread_and_kong_pdk_give_it_as_well() -> None:
    instance, flow = published()
    facts = {("kong.request.get_method", ""): "GET", ("kong.request.get_path", ""): PATH}
    kong = FactsKong(facts)

    instance.access(kong)

    assert [("kong.response.exit", 200)] == [call[:2] for call in kong.calls if "exit" in call[0]]
    assert [] == flow.tokens
    pairs = FactsKong({name: (value, None) for name, value in facts.items()})
    instance.access(pairs)
    assert kong.calls == pairs.calls


def test_a_pool_thread_judges_everything_else() -> None:
    instance, flow = published()
    facts = {
        ("kong.request.get_method", ""): "GET",
        ("kong.request.get_path", ""): "/orders",
        ("kong.request.get_header", "authorization"): "Bearer a.b.c",
    }

    instance.access(FactsKong(facts))

    assert ["a.b.c"] == flow.tokens


def test_requests_that_come_together_wait_as_they_would_without_it() -> None:
    instance, flow = published()
    patience = instance.coalesce(["", "Bearer a.b.c", "GET", "/orders"])

    assert patience is not None
    outcome = patience.overdue(["", "Bearer a.b.c", "GET", "/orders"])

    assert (504, ["deadline_waiting"]) == (outcome.status, [error.reason for error in flow.refusals])
    assert published(proof_of_possession_mtls="optional")[0].coalesce(["", "", "", "GET", "/"]) is None
    instance.close()

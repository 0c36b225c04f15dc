"""
The pure middle in the order in which the flow runs it, and one way to assert a refusal.

Each row of the tests beside this starts from one good token and changes one thing.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest

from kong_token_exchange.core.claims import (
    Claims,
    check_audience,
    check_bearer,
    check_client,
    check_issuer,
    check_required_claims,
    check_timestamps,
    check_type,
    parse_claims,
)
from kong_token_exchange.core.decision import trusted_issuer
from kong_token_exchange.core.jwk import parse_jwk_set, select_verification_key
from kong_token_exchange.core.jws import (
    ASYMMETRIC_ALGORITHMS,
    check_algorithm,
    parse_compact,
    verify_signature,
)
from kong_token_exchange.core.policy import SubjectTokenIssuer
from kong_token_exchange.errors import TokenExchangeError
from kong_token_exchange.protocol.bearer import render
from tests.support.minting import NOW, FakeIssuer

MAX_TOKEN = 16 * 1024

BARE = 'Bearer realm="kong"'
INVALID_REQUEST = f'{BARE}, error="invalid_request", error_description="the bearer credential is malformed"'
INVALID_TOKEN = f'{BARE}, error="invalid_token", error_description="the token is not acceptable"'
INVALID_PROOF = f'{BARE}, error="invalid_dpop_proof", error_description="the DPoP proof is not acceptable"'
INSUFFICIENT_SCOPE = (
    f'{BARE}, error="insufficient_scope", error_description="the token lacks a required scope"'
)

issuer = FakeIssuer()
stranger = FakeIssuer(issuer.issuer, label="stranger")


def trust(**changes: Any) -> SubjectTokenIssuer:
    """Return how tokens of the issuer are proven, with *changes*."""
    return SubjectTokenIssuer(**{"issuer": issuer.issuer, "discovery_url": None, **changes})


def accept(
    token: str,
    *,
    jwks: bytes | None = None,
    entry: SubjectTokenIssuer | None = None,
    now: float = NOW,
    leeway: float = 0.0,
    max_token: int = MAX_TOKEN,
    algorithms: Collection[str] = ASYMMETRIC_ALGORITHMS,
    audience_claim: Sequence[str] = ("aud",),
    scopes_claim: Sequence[str] = ("scope",),
) -> Claims:
    """Take one token through the pure middle; return its claims or raise the refusal."""
    entry = entry or trust()
    jws = parse_compact(token, max_bytes=max_token)
    entry = trusted_issuer(jws.payload.get("iss"), issuers=(entry,), target=entry)
    check_algorithm(jws, algorithms=algorithms)
    key = select_verification_key(
        parse_jwk_set(issuer.jwks() if jwks is None else jwks), alg=jws.alg, kid=jws.kid
    )
    verify_signature(jws, key, algorithms=algorithms)
    claims = parse_claims(jws.payload, audience_claim=audience_claim, scopes_claim=scopes_claim)
    check_issuer(claims, expected=entry.issuer)
    check_timestamps(claims, now=now, leeway=leeway, max_age=entry.max_age)
    check_type(claims, typ=jws.typ, accepted=entry.typ)
    check_bearer(claims)
    check_audience(claims, accepted=entry.audience)
    check_required_claims(claims, required=entry.required_claims)
    check_client(claims, allowed=entry.clients)
    return claims


def refused(
    kind: type[TokenExchangeError], reason: str, action: Callable[..., object], *args: Any, **kwargs: Any
) -> TokenExchangeError:
    """Assert that *action* raises exactly *kind* for *reason*, and what the caller is told."""
    with pytest.raises(TokenExchangeError) as caught:
        action(*args, **kwargs)
    assert (kind, reason) == (type(caught.value), caught.value.reason)
    answer = render(caught.value)
    assert (kind.status, _challenge(kind)) == (answer.status, answer.headers.get("WWW-Authenticate"))
    return caught.value


def _challenge(kind: type[TokenExchangeError]) -> str | None:
    by_error = {
        None: BARE,
        "invalid_request": INVALID_REQUEST,
        "invalid_token": INVALID_TOKEN,
        "insufficient_scope": INSUFFICIENT_SCOPE,
        "access_denied": BARE,
    }
    return by_error[kind.error] if kind.status < 500 else None

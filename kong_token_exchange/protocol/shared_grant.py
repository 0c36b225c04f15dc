"""
A token response as one process leaves it for another: read back like an answer of a stranger.

It is a token response once more, with `sent_at` beside it; so whoever reads it applies the very
checks that the token endpoint's own answer gets. Only members that were judged are written: a
refresh token or an ID token in the answer is never kept.

Source: docs/adr/0010-second-level-cache.md; RFC 8693 section 2.2.1.
"""

from __future__ import annotations

import json

from kong_token_exchange.core.strict_json import JsonError, parse_json_object
from kong_token_exchange.errors import NonConformingResponseError
from kong_token_exchange.protocol.exchange import (
    MAX_RESPONSE_BYTES,
    ActorToken,
    ExchangeResponse,
    GrantType,
    process_exchange_response,
)
from kong_token_exchange.protocol.http_message import HttpResponse

# The year 36812: a whole number of any size is JSON, and not every one is a float.
_LATEST = 2.0**40

_JSON = {"content-type": "application/json"}


def build_shared_grant(response: ExchangeResponse, *, sent_at: float) -> bytes:
    """
    Return a judged token response as JSON; the caller seals it, since it holds the token.

    Args:
        response: The answer.
        sent_at: NumericDate of the question, seconds: `expires_in` counts from it.
    """
    document: dict[str, object] = {
        "access_token": response.access_token.reveal(),
        "token_type": "Bearer",
        "sent_at": sent_at,
    }
    optional = {
        "issued_token_type": response.issued_token_type,
        "expires_in": response.expires_in,
        "scope": None if response.scopes is None else " ".join(sorted(response.scopes)),
    }
    document.update({name: value for name, value in optional.items() if value is not None})
    return json.dumps(document, separators=(",", ":")).encode("ascii")


def process_shared_grant(
    data: bytes,
    *,
    grant_type: GrantType,
    subject_token: str,
    max_token_size: int,
    actor: ActorToken | None = None,
) -> tuple[ExchangeResponse, float]:
    """
    Judge the form of what another process left; the caller proves the token itself.

    Returns:
        The token response, and the NumericDate when it was asked for.

    Raises:
        NonConformingResponseError: anything but a usable token response with its time.
    """
    response = process_exchange_response(
        HttpResponse(status=200, headers=_JSON, body=data),
        grant_type=grant_type,
        subject_token=subject_token,
        max_token_size=max_token_size,
        actor=actor,
    )
    return response, _sent_at(data)


def _sent_at(data: bytes) -> float:
    try:
        value = parse_json_object(data, max_bytes=MAX_RESPONSE_BYTES).get("sent_at")
    except JsonError:
        value = None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LATEST:
        raise NonConformingResponseError(reason="shared_grant_unusable")
    return float(value)

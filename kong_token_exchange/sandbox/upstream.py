"""
An API that answers with what it received: the proof of what the gateway let through.

Every request gets 200 and a JSON document: method, path, query, headers as a list
of pairs, the length and SHA-256 of the body, and the claims of a bearer JWT.
The claims are **not verified**: they are there to be looked at.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from typing import Any

from kong_token_exchange.sandbox.serving import HttpServer, Request, RequestLog, Response, json_headers


def read_claims(token: str) -> dict[str, Any] | None:
    """Return the claims of a JWT without verifying anything; None when it is not one."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        padded = parts[1] + "=" * (-len(parts[1]) % 4)
        claims = json.loads(base64.urlsafe_b64decode(padded))
    except (binascii.Error, ValueError):
        return None
    return claims if isinstance(claims, dict) else None


def bearer_token(request: Request) -> str | None:
    """Return the bearer token of *request*, or None."""
    scheme, _, token = (request.header("authorization") or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def describe(request: Request) -> dict[str, Any]:
    """Return what `EchoUpstream` answers for *request*."""
    token = bearer_token(request)
    return {
        "method": request.method,
        "path": request.path,
        "query": request.query,
        "headers": [list(pair) for pair in request.headers],
        "body_length": len(request.body),
        "body_sha256": hashlib.sha256(request.body).hexdigest(),
        "claims": read_claims(token) if token else None,
    }


class EchoUpstream(HttpServer):
    """The echo API; `log` counts the hits and keeps the last requests."""

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__(_echo, host=host, port=port, name="sandbox-upstream")

    @property
    def hits(self) -> int:
        """Return how many requests have arrived, whatever their path."""
        return sum(self.log.hits.values())

    def last_request(self) -> Request | None:
        """Return the newest request."""
        return self.log.last()

    def last_claims(self) -> dict[str, Any] | None:
        """Return the unverified claims of the newest request's token."""
        request = self.log.last()
        token = bearer_token(request) if request else None
        return read_claims(token) if token else None


def _echo(request: Request) -> Response:
    # Header bytes that are not UTF-8 are lone surrogates here; ASCII-only JSON can show them.
    return Response(200, json_headers(), json.dumps(describe(request)).encode("ascii"))


__all__ = ["EchoUpstream", "RequestLog", "bearer_token", "describe", "read_claims"]

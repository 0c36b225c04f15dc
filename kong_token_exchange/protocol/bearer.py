"""
Bearer credentials: read the one that was offered; render any error as an answer.

The gate works on the text as it came, before anything is decoded, logged or hashed.
An answer is made from the error's class alone, so that nothing a client or an issuer
wrote is reflected.

Source: RFC 6750 sections 2 and 3; RFC 9110 section 11; docs/errors.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType

from kong_token_exchange.errors import (
    GatewayError,
    InsufficientScopeError,
    IssuerUnavailableError,
    MalformedRequestError,
    MissingTokenError,
    TokenExchangeError,
)

REALM = "kong"

# RFC 6750 section 2.1: b64token = 1*( ALPHA / DIGIT / "-" / "." / "_" / "~" / "+" / "/" ) *"="
_B64TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]+=*", re.ASCII)
# What nginx lets through that no credential may hold: controls, tab, DEL and every byte above ASCII.
_NOT_VISIBLE_ASCII = re.compile(r"[^\x20-\x7e]")
_SCOPE_TOKEN = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+( [\x21\x23-\x5b\x5d-\x7e]+)*", re.ASCII)


def is_b64token(text: str) -> bool:
    """Tell whether *text* may stand after `Bearer` (RFC 6750 section 2.1)."""
    return _B64TOKEN.fullmatch(text) is not None


def parse_authorization(value: str, *, max_length: int, scheme: str = "bearer") -> str | None:
    """
    Read the token of an `Authorization` header.

    The scheme is compared without case and may be followed by several spaces, not by a tab.
    The scheme with nothing after it is malformed, not absent. An unknown scheme is never stripped,
    and a bare token is none.

    Args:
        value: The header as it came; bytes that are not UTF-8 as lone surrogates.
        max_length: Longest token, in characters.
        scheme: `bearer` or `dpop`.

    Returns:
        The token, or None when no such credential is offered (absent, or another scheme).

    Raises:
        MalformedRequestError: the header holds bytes no credential has, or the scheme is not
            followed by one b64token within the length.

    Source: RFC 6750 section 2.1; RFC 9449 section 7.1; RFC 9110 section 11.4 (`1*SP` after the scheme).
    """
    if not value:
        return None
    # The length first: "Bearer" and a few spaces on top of the token. A long credential of another
    # scheme (Kerberos) is not ours to judge.
    if len(value) > max_length + 16:
        if value[: len(scheme)].lower() != scheme:
            return None
        raise MalformedRequestError(reason="credential_too_long")
    if _NOT_VISIBLE_ASCII.search(value):
        raise MalformedRequestError(reason="credential_bytes")
    offered, _, rest = value.partition(" ")
    if offered.lower() != scheme:
        return None
    return _token(rest.lstrip(" "), max_length)


def parse_token(value: str, *, max_length: int) -> str | None:
    """
    Read a token that stands alone: of a named header, a cookie or a query argument.

    A named header may also carry the `Bearer` scheme.

    Returns:
        The token, or None when there is none.

    Raises:
        MalformedRequestError: anything else than one b64token within the length.
    """
    if not value:
        return None
    if value[:7].lower() == "bearer ":
        value = value[7:].lstrip(" ")
    return _token(value, max_length)


def select_credential(found: tuple[str | None, ...]) -> str:
    """
    Require exactly one credential among the places where one was looked for.

    Raises:
        MissingTokenError: none.
        MalformedRequestError: more than one, equal or not (RFC 6750 section 2).
    """
    tokens = [token for token in found if token is not None]
    if not tokens:
        raise MissingTokenError(reason="token_missing")
    if len(tokens) > 1:
        raise MalformedRequestError(reason="credential_repeated")
    return tokens[0]


def _token(text: str, max_length: int) -> str:
    if len(text) > max_length:
        raise MalformedRequestError(reason="credential_too_long")
    if not is_b64token(text):
        raise MalformedRequestError(reason="credential_malformed")
    return text


# --- answers --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """What a refused caller gets."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Challenge:
    """
    How a configuration asks for credentials; the first scheme is told the error.

    `algs` are for proofs; `resource_metadata` and `scope` (for 401) come from the configuration.

    Source: RFC 6750 section 3; RFC 9449 section 7.1; RFC 9728 section 5.1.
    """

    schemes: tuple[str, ...] = ("Bearer",)
    algs: str = ""
    resource_metadata: str = ""
    scope: str = ""


BEARER = Challenge()


def render(error: BaseException, challenge: Challenge = BEARER) -> ErrorAnswer:
    """
    Turn any error into the answer for the caller.

    Anything outside our tree becomes the constant 500 `server_error`.

    Source: RFC 6750 section 3; RFC 9111 section 5.2.2.5 (`no-store`); docs/errors.md.
    """
    if not isinstance(error, TokenExchangeError):
        return _answer(GatewayError, "", 0, BEARER)
    scope = error.scope if isinstance(error, InsufficientScopeError) else ""
    retry_after = error.retry_after if isinstance(error, IssuerUnavailableError) else 0
    scope = scope if _SCOPE_TOKEN.fullmatch(scope) else ""
    return _answer(type(error), scope, retry_after, challenge)  # type: ignore[arg-type] # an exception class is hashable


# Bounded: classes times the scopes, waits and challenges that configuration and bounds allow.
@lru_cache(maxsize=512)
def _answer(kind: type[TokenExchangeError], scope: str, retry_after: int, asked: Challenge) -> ErrorAnswer:
    headers = {"Content-Type": "application/json; charset=utf-8", "Cache-Control": "no-store"}
    challenge = _challenge(kind, scope, asked)
    if challenge:
        headers["WWW-Authenticate"] = challenge
    if retry_after:
        headers["Retry-After"] = str(retry_after)
    # A bare challenge has no error code (RFC 6750 section 3.1); the body keeps one word for clients
    # that read JSON only.
    body = {"error": kind.error or "unauthorized", "error_description": kind.description}
    # Read-only, because one answer is handed to many requests.
    return ErrorAnswer(
        kind.status, MappingProxyType(headers), json.dumps(body, separators=(",", ":")).encode("ascii")
    )


# `access_denied` is no code of RFC 6750 or RFC 9449; it stands in the body alone.
_CHALLENGE_ERRORS = ("invalid_request", "invalid_token", "insufficient_scope", "invalid_dpop_proof")


def _challenge(kind: type[TokenExchangeError], scope: str, asked: Challenge) -> str:
    if kind.status >= 500:
        return ""
    scope = scope or (asked.scope if kind.status == 401 else "")
    challenges = []
    for scheme in asked.schemes:
        parts = [f'{scheme} realm="{REALM}"']
        if scheme == asked.schemes[0] and kind.error in _CHALLENGE_ERRORS:
            parts += [f'error="{kind.error}"', f'error_description="{kind.description}"']
        if scope:
            parts.append(f'scope="{scope}"')
        if scheme == "DPoP":
            parts.append(f'algs="{asked.algs}"')
        if asked.resource_metadata:
            parts.append(f'resource_metadata="{asked.resource_metadata}"')
        challenges.append(", ".join(parts))
    return ", ".join(challenges)

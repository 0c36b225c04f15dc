"""
The token exchange request and its answer.

Two requests share one answer: RFC 8693 token exchange, and the RFC 7523 JWT bearer grant
that some servers offer instead. The request is built without credentials; client
authentication is applied to it afterwards.

Source: RFC 8693 section 2; RFC 7523 section 2.1; RFC 6749 section 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NoReturn, Protocol
from urllib.parse import quote_plus, urlencode

from kong_token_exchange.core.strict_json import Json, JsonError, parse_json_object
from kong_token_exchange.errors import (
    AccessDeniedError,
    ClientRefusedError,
    Fact,
    InsufficientScopeError,
    IssuerUnavailableError,
    NonConformingResponseError,
    RefusedTokenError,
    TokenExchangeError,
)
from kong_token_exchange.protocol.bearer import is_b64token
from kong_token_exchange.protocol.http_message import HttpRequest, HttpResponse
from kong_token_exchange.secret import Secret

GrantType = Literal["token_exchange", "jwt_bearer"]

GRANT_TOKEN_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"  # noqa: S105 - a name, not a secret
GRANT_JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
_TOKEN_TYPE = "urn:ietf:params:oauth:token-type:"  # noqa: S105 - a name, not a secret

# What may be issued for a bearer token upstream (RFC 8693 section 3); an ID token or a refresh
# token is no credential for an API.
_USABLE_ISSUED_TYPES = frozenset({_TOKEN_TYPE + "access_token", _TOKEN_TYPE + "jwt"})

# A token response with a 16 KB token and every optional member stays below this.
MAX_RESPONSE_BYTES = 64 * 1024

# 68 years, RFC 6749's 32-bit clients' limit; a longer life is nonsense and would only overflow things.
_MAX_EXPIRES_IN = 2**31 - 1

# A wait longer than this is no advice to a caller but an outage.
_MAX_RETRY_AFTER = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeParameters:
    """What every exchange request of one plugin configuration says."""

    grant_type: GrantType = "token_exchange"
    audience: tuple[str, ...] = ()
    resource: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()
    requested_token_type: str | None = None
    subject_token_type: str = _TOKEN_TYPE + "access_token"
    extra_parameters: tuple[tuple[str, str], ...] = ()
    extra_headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorToken:
    """The acting party's token with its type: sent together or not at all (RFC 8693 section 2.1)."""

    token: str = field(repr=False)
    token_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeResponse:
    """
    A token response that passed every check of form.

    `expires_in` is in seconds; `scopes` is None when the answer names none.
    """

    access_token: Secret
    issued_token_type: str | None
    expires_in: int | None
    scopes: frozenset[str] | None


def build_exchange_request(
    token_endpoint: str,
    *,
    parameters: ExchangeParameters,
    subject_token: str,
    subject_token_type: str,
    actor: ActorToken | None = None,
) -> HttpRequest:
    """
    Build the request that exchanges *subject_token*, still without client authentication.

    Every value is form-encoded; optional parameters are sent only where they are configured.
    The JWT bearer grant has no actor.

    Source: RFC 8693 section 2.1; RFC 7523 section 2.1.
    """
    jwt_bearer = parameters.grant_type == "jwt_bearer"
    head = _JWT_BEARER_HEAD if jwt_bearer else _TOKEN_EXCHANGE_HEAD
    form = head + quote_plus(subject_token) + _constant_form(parameters, subject_token_type)
    if actor is not None and not jwt_bearer:
        form += "&" + urlencode([("actor_token", actor.token), ("actor_token_type", actor.token_type)])
    headers = {
        **dict(parameters.extra_headers),
        "Accept": "application/json",
        "Content-Type": "application/x-www-form-urlencoded",
    }
    return HttpRequest(method="POST", url=token_endpoint, headers=headers, body=form.encode("ascii"))


_TOKEN_EXCHANGE_HEAD = urlencode({"grant_type": GRANT_TOKEN_EXCHANGE, "subject_token": ""})
_JWT_BEARER_HEAD = urlencode({"grant_type": GRANT_JWT_BEARER, "assertion": ""})


# One for each plugin configuration and type of subject token.
@lru_cache(1024)
def _constant_form(parameters: ExchangeParameters, subject_token_type: str) -> str:
    """Return what every request says alike, form-encoded, to be appended."""
    form = []
    if parameters.grant_type != "jwt_bearer":
        form.append(("subject_token_type", subject_token_type))
        if parameters.requested_token_type:
            form.append(("requested_token_type", parameters.requested_token_type))
    form += [("audience", value) for value in parameters.audience]
    form += [("resource", value) for value in parameters.resource]
    if parameters.scopes:
        form.append(("scope", " ".join(parameters.scopes)))
    form += parameters.extra_parameters
    return "&" + urlencode(form) if form else ""


def process_exchange_response(
    response: HttpResponse,
    *,
    grant_type: GrantType,
    subject_token: str,
    max_token_size: int,
    actor: ActorToken | None = None,
) -> ExchangeResponse:
    """
    Judge the answer of the token endpoint.

    Raises:
        RefusedTokenError: the subject token was refused.
        InsufficientScopeError, AccessDeniedError: the server's policy refused the target.
        ClientRefusedError: our credentials or our request were refused.
        IssuerUnavailableError: overloaded or broken for now, or a single-use assertion was used up.
        NonConformingResponseError: anything else that is not a usable token.

    Source: RFC 8693 section 2.2; RFC 6749 sections 5.1 and 5.2; docs/errors.md.
    """
    if response.status != 200:
        _raise_error(response)
    document = _document(response)
    if document is None:
        raise NonConformingResponseError(reason="response_not_json")
    token = document.get("access_token")
    if not isinstance(token, str) or len(token) > max_token_size or not is_b64token(token):
        raise NonConformingResponseError(reason="access_token_malformed")
    if token == subject_token:
        raise NonConformingResponseError(reason="subject_token_echoed")
    if actor is not None and token == actor.token:
        raise NonConformingResponseError(reason="actor_token_echoed")
    token_type = document.get("token_type")
    if not isinstance(token_type, str) or token_type.lower() != "bearer":
        raise NonConformingResponseError(reason="token_type_not_bearer")
    return ExchangeResponse(
        access_token=Secret(token),
        issued_token_type=_issued_token_type(document, grant_type),
        expires_in=_expires_in(document),
        scopes=_scopes(document),
    )


def _document(response: HttpResponse) -> dict[str, Json] | None:
    if response.media_type() != "application/json":
        return None
    try:
        return parse_json_object(response.body, max_bytes=MAX_RESPONSE_BYTES)
    except JsonError:
        return None


def _issued_token_type(document: dict[str, Json], grant_type: GrantType) -> str | None:
    issued = document.get("issued_token_type")
    # RFC 8693 section 2.2.1 requires it; RFC 7523 does not know it.
    if issued is None and grant_type == "jwt_bearer":
        return None
    if not isinstance(issued, str) or issued not in _USABLE_ISSUED_TYPES:
        reason = "issued_token_type_missing" if issued is None else "issued_token_type_unusable"
        raise NonConformingResponseError(reason=reason)
    return issued


def _expires_in(document: dict[str, Json]) -> int | None:
    value = document.get("expires_in")
    if value is None and "expires_in" not in document:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MAX_EXPIRES_IN:
        raise NonConformingResponseError(reason="expires_in_unusable")
    return value


def _scopes(document: dict[str, Json]) -> frozenset[str] | None:
    value = document.get("scope")
    if value is None:
        return None
    if not isinstance(value, str):
        raise NonConformingResponseError(reason="scope_malformed")
    return frozenset(value.split())


# --- error answers --------------------------------------------------------------------


def _raise_error(response: HttpResponse) -> NoReturn:
    status = response.status
    if status in _PASSING_STATUSES or status >= 500:
        raise IssuerUnavailableError(
            reason="token_endpoint_overloaded" if status == 429 else "token_endpoint_failed",
            retry_after=_retry_after(response),
            facts={"http_status": status},
        )
    document = (_document(response) if 400 <= status < 500 else None) or {}
    error = document.get("error")
    if isinstance(error, str):
        raise _oauth_error(error, document.get("error_description"), status)
    if status in _REFUSING_STATUSES:
        # No OAuth error at all: the address or the credentials are wrong.
        raise ClientRefusedError(reason="token_endpoint_refused", facts={"http_status": status})
    raise NonConformingResponseError(reason="response_status", facts={"http_status": status})


# Request Timeout, Too Early and Too Many Requests pass by themselves (RFC 9110 section 15.5.9,
# RFC 8470 section 5.2, RFC 6585 section 4).
_PASSING_STATUSES = frozenset({408, 425, 429})
_REFUSING_STATUSES = frozenset({401, 404, 405})


def _oauth_error(error: str, description: Json, status: int) -> TokenExchangeError:
    """Return what an OAuth error means: by its text, by its status, or by its code alone."""
    text = description.partition(":")[0] if isinstance(description, str) else ""
    meaning = _BY_TEXT.get((error, text)) or _BY_STATUS.get((error, status)) or _BY_CODE.get(error)
    make, reason = meaning or (ClientRefusedError, "client_refused")
    # A code that the server made up may not stand in a log.
    return make(reason=reason, facts={"http_status": status, "error": error if error in _CODES else "other"})


class _MakeError(Protocol):
    def __call__(self, *, reason: str, facts: Mapping[str, Fact]) -> TokenExchangeError: ...


_Meaning = tuple[_MakeError, str]
_SUBJECT_REFUSED: _Meaning = (RefusedTokenError, "subject_token_refused")
_NOT_SET_UP: _Meaning = (ClientRefusedError, "grant_not_set_up")
_AUDIENCE_UNKNOWN: _Meaning = (ClientRefusedError, "audience_unknown")

# Servers give one code several meanings, and the text up to a colon is the only difference. It is
# compared whole and never kept. Keycloak's, but for one:
_BY_TEXT: dict[tuple[str, str], _Meaning] = {
    # An expired, revoked or foreign subject token in the standard exchange, which has no invalid_grant.
    ("invalid_request", "Invalid token"): _SUBJECT_REFUSED,
    # Okta's.
    ("invalid_request", "'subject_token' is invalid"): _SUBJECT_REFUSED,
    # A JWT authorization grant works once. Token and caller are good: somebody else used it up, or
    # its result was lost here.
    ("invalid_grant", "Token reuse detected"): (IssuerUnavailableError, "assertion_reused"),
    # The signature was proven here before it was sent: a server that cannot prove it lacks the keys.
    ("invalid_grant", "Invalid signature"): (IssuerUnavailableError, "assertion_keys_missing"),
    # The same grant reports what is not set up for our client as invalid_grant, too.
    ("invalid_grant", "JWT Authorization Grant is not supported for the requested client"): _NOT_SET_UP,
    ("invalid_grant", "Public client not allowed to use authorization grant"): _NOT_SET_UP,
    ("invalid_grant", "No Identity Provider for provided issuer"): _NOT_SET_UP,
    ("invalid_grant", "Identity Provider is not enabled"): _NOT_SET_UP,
    ("invalid_grant", "Identity Provider is not allowed for the client"): _NOT_SET_UP,
    ("invalid_grant", "Identity Provider is not configured for JWT Authorization Grant"): _NOT_SET_UP,
    # These speak of our `audience` parameter, not of our credentials.
    ("invalid_client", "Audience not found"): _AUDIENCE_UNKNOWN,
    ("invalid_client", "Client disabled"): _AUDIENCE_UNKNOWN,
    ("invalid_request", "Requested audience not available"): _AUDIENCE_UNKNOWN,
}

# dex answers so when the connector does not accept the subject token.
_BY_STATUS: dict[tuple[str, int], _Meaning] = {("access_denied", 401): _SUBJECT_REFUSED}

_BY_CODE: dict[str, _Meaning] = {
    "access_denied": (AccessDeniedError, "target_refused"),
    # Entra: the user must do something first, and only the caller can ask for that.
    "consent_required": (RefusedTokenError, "interaction_required"),
    "interaction_required": (RefusedTokenError, "interaction_required"),
    "invalid_grant": _SUBJECT_REFUSED,
    "invalid_scope": (InsufficientScopeError, "scope_refused"),
    "invalid_target": (AccessDeniedError, "target_refused"),
    "invalid_token": _SUBJECT_REFUSED,
    "login_required": (RefusedTokenError, "interaction_required"),
    "server_error": (IssuerUnavailableError, "token_endpoint_failed"),
    "slow_down": (IssuerUnavailableError, "token_endpoint_overloaded"),
    "temporarily_unavailable": (IssuerUnavailableError, "token_endpoint_failed"),
}

# What the same request would be told again a moment later. Not among these: what somebody may be doing
# something about just now (`interaction_required`), and whatever speaks of us or of the server's state.
LASTING_REFUSALS = frozenset({"scope_refused", "subject_token_refused", "target_refused"})

# Our own credentials or request are meant by these and by every other code.
_CODES = frozenset(_BY_CODE) | {
    "invalid_client",
    "invalid_dpop_proof",
    "invalid_issuer",
    "invalid_request",
    "unauthorized_client",
    "unsupported_grant_type",
    "unsupported_token_type",
    "use_dpop_nonce",
}


def _retry_after(response: HttpResponse) -> int:
    value = response.headers.get("retry-after", "").strip()
    # A date would need a clock; such an answer gets the default wait.
    if not (value.isascii() and value.isdigit() and len(value) < 7):
        return 1
    return min(max(int(value), 1), _MAX_RETRY_AFTER)

"""
Every error of the project, in one tree.

    TokenExchangeError                     root, never raised itself
      ConfigError                          a plugin configuration; names the path
      RejectionError                       the caller's side: 4xx
        MissingTokenError            401   bare challenge
        MalformedRequestError        400   invalid_request
        InvalidTokenError            401   invalid_token
          MalformedTokenError  UnsupportedAlgorithmError  KeySelectionError
          UnknownIssuerError  SignatureError  TimestampError  ClaimError  RefusedTokenError
          PossessionError
        ProofError                   401   invalid_dpop_proof
        InsufficientScopeError       403   insufficient_scope
        AccessDeniedError            403   access_denied
      GatewayError                         our side or the issuer's: 5xx
        ClientRefusedError           500   our credentials or configuration were refused
        ConfigurationInvalidError    500   the instance has an invalid configuration
        NonConformingResponseError   502   the token endpoint's answer fails a check
        ExchangedTokenError          502   the exchanged token fails a check
        IssuerUnavailableError       503   unreachable, 429, 5xx, shed
        DeadlineError                504   our deadline passed
      ProtocolError                        the plugin socket; a caller never sees it
        LocalProtocolError                 we spoke out of turn: a bug
        RemoteProtocolError                the peer's bytes break the protocol

Each class carries `status` and `error` (wire code); each raise adds `reason`, a
stable snake_case id for logs, metrics and tests, and `facts`: named, harmless
values for the log. Tokens, secrets, subjects and response bodies stay out of both.
What a caller sees is rendered from the class alone (`protocol.bearer.render`),
so nothing that an attacker or an issuer wrote is reflected.

Source: docs/errors.md; RFC 6750 section 3.1; RFC 6749 section 5.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

Fact = str | int | float | bool | None


class TokenExchangeError(Exception):
    """Root of the tree."""

    status: ClassVar[int] = 500
    error: ClassVar[str | None] = "server_error"
    description: ClassVar[str] = "the gateway could not process the request"

    def __init__(self, *, reason: str, facts: Mapping[str, Fact] | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.facts: dict[str, Fact] = dict(facts or {})

    def __str__(self) -> str:
        """Show the reason alone: facts belong in structured logs."""
        return self.reason


class ConfigError(TokenExchangeError):
    """A plugin configuration is invalid; *path* names the place in it."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(reason="config_invalid", facts={"path": path})
        self.path = path
        self.message = message

    def __str__(self) -> str:
        """Show path and message; neither ever holds a configured value that is secret."""
        return f"{self.path}: {self.message}"


# --- the caller's side ----------------------------------------------------------------


class RejectionError(TokenExchangeError):
    """The request is refused, and the caller can change that."""

    status = 401


class MissingTokenError(RejectionError):
    """No bearer credential was offered: a bare challenge, no error code (RFC 6750 section 3.1)."""

    error = None
    description = "a bearer token is required"


class MalformedRequestError(RejectionError):
    """The credential is malformed, or more than one was offered."""

    status = 400
    error = "invalid_request"
    description = "the bearer credential is malformed"


class InvalidTokenError(RejectionError):
    """The subject token is refused, here or by the token endpoint."""

    error = "invalid_token"
    description = "the token is not acceptable"


class MalformedTokenError(InvalidTokenError):
    """The token is not a compact JWS of the form we read."""


class UnsupportedAlgorithmError(InvalidTokenError):
    """`alg` is not in the issuer's allow-list."""


class UnknownIssuerError(InvalidTokenError):
    """`iss` is not a configured issuer."""


class KeySelectionError(InvalidTokenError):
    """Not exactly one key of the issuer fits the token's header."""


class SignatureError(InvalidTokenError):
    """The signature does not verify."""


class TimestampError(InvalidTokenError):
    """`exp`, `nbf` or `iat` refuse the token now."""

    def __init__(self, *, claim: str, facts: Mapping[str, Fact] | None = None) -> None:
        super().__init__(reason="jwt_timestamp", facts={"claim": claim, **(facts or {})})
        self.claim = claim


class ClaimError(InvalidTokenError):
    """A claim is absent, of the wrong type or of an unwanted value."""

    def __init__(self, *, claim: str, facts: Mapping[str, Fact] | None = None) -> None:
        super().__init__(reason="jwt_claim", facts={"claim": claim, **(facts or {})})
        self.claim = claim


class RefusedTokenError(InvalidTokenError):
    """The token endpoint refused the subject token."""


class PossessionError(InvalidTokenError):
    """Nothing shows that who sends the token holds the key that it is bound to."""


class ProofError(RejectionError):
    """The DPoP proof is absent, malformed, of another request, or was used before (RFC 9449 section 7.1)."""

    error = "invalid_dpop_proof"
    description = "the DPoP proof is not acceptable"


class InsufficientScopeError(RejectionError):
    """The token lacks a scope that policy asks for; *scope* is named in the challenge."""

    status = 403
    error = "insufficient_scope"
    description = "the token lacks a required scope"

    def __init__(self, *, reason: str, scope: str = "", facts: Mapping[str, Fact] | None = None) -> None:
        super().__init__(reason=reason, facts=facts)
        self.scope = scope


class AccessDeniedError(RejectionError):
    """Policy, here or at the issuer, does not allow this token at this target."""

    status = 403
    error = "access_denied"
    description = "the token may not be used here"


# --- our side or the issuer's ---------------------------------------------------------


class GatewayError(TokenExchangeError):
    """The request is refused, and the caller can do nothing about it."""


class ClientRefusedError(GatewayError):
    """The token endpoint refused our own credentials, grant or request: an operator's problem."""


class ConfigurationInvalidError(GatewayError):
    """The instance was started with a configuration that does not load."""


class NonConformingResponseError(GatewayError):
    """The token endpoint's answer is not what RFC 8693 section 2.2.1 asks for."""

    status = 502
    description = "the authorization server gave an unusable answer"


class ExchangedTokenError(GatewayError):
    """The exchanged token fails our checks: a security event."""

    status = 502
    description = "the authorization server gave an unusable answer"


class IssuerUnavailableError(GatewayError):
    """The issuer, its keys or its token endpoint cannot be reached now."""

    status = 503
    error = "temporarily_unavailable"
    description = "the authorization server is not available"

    def __init__(self, *, reason: str, retry_after: int = 1, facts: Mapping[str, Fact] | None = None) -> None:
        super().__init__(reason=reason, facts=facts)
        self.retry_after = retry_after


class DeadlineError(GatewayError):
    """The request's own deadline passed."""

    status = 504
    error = "temporarily_unavailable"
    description = "the authorization server did not answer in time"


# --- the plugin socket ----------------------------------------------------------------


class ProtocolError(TokenExchangeError):
    """The plugin socket's protocol was broken."""


class LocalProtocolError(ProtocolError):
    """We spoke out of turn: a bug of ours."""


class RemoteProtocolError(ProtocolError):
    """The peer's bytes break the protocol."""

"""
Sender-constrained tokens: what a token is bound to, and what its sender must therefore prove.

The proof itself is judged elsewhere: `dpop` for a key, and for a certificate by comparing its
digest here.

Source: RFC 7800 section 3; RFC 8705 section 3; RFC 9449 sections 6 and 7; docs/adr/0012-possession.md.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass, field
from typing import Literal

from kong_token_exchange.core.claims import Claims
from kong_token_exchange.core.policy import PossessionPolicy
from kong_token_exchange.errors import ClaimError, PossessionError

# The base64url form of 32 bytes.
_SHA256 = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """
    What a request brings beside its token.

    Args:
        scheme: The scheme of `Authorization` under which the token came.
        proof: The `DPoP` header as nginx gives it: several are joined by a comma.
        method: The request's method.
        path: Its target as it came, with or without the query.
        origins: Where the client may believe that the request goes, as `target_uri` writes them.
        x5t_s256: Base64url of the SHA-256 of the client's certificate; None without one.
    """

    scheme: Literal["bearer", "dpop"] = "bearer"
    proof: str = field(default="", repr=False)
    method: str = ""
    path: str = field(default="", repr=False)
    origins: frozenset[str] = frozenset()
    x5t_s256: str | None = None


NO_EVIDENCE = Evidence()


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """What a token is bound to: the thumbprint of a key, of a certificate, both, or nothing."""

    jkt: str | None = None
    x5t_s256: str | None = None


def required_confirmation(claims: Claims, *, policy: PossessionPolicy) -> Confirmation:
    """
    Return what must be proven for this token; a member that is set must be.

    Raises:
        ClaimError: `cnf` is malformed, or holds what no switched-on proof covers.
        PossessionError: the token is not bound in a way that `strict` demands.
    """
    bound = Confirmation()
    if claims.sender_constrained:
        bound = _parse_confirmation(claims)
        if (bound.jkt is not None and policy.dpop == "off") or (
            bound.x5t_s256 is not None and policy.mtls == "off"
        ):
            raise ClaimError(claim="cnf")
    if (bound.jkt is None and policy.dpop == "strict") or (
        bound.x5t_s256 is None and policy.mtls == "strict"
    ):
        raise PossessionError(reason="token_not_bound")
    return bound


def proven_members(claims: Claims) -> str:
    """Name what a token is bound to, for the audit of one that was accepted: `jkt`, `x5t#S256` or both."""
    cnf = claims.members.get("cnf")
    return ",".join(sorted(cnf)) if isinstance(cnf, dict) else ""


def check_scheme(evidence: Evidence, *, bound: Confirmation) -> None:
    """
    Require `DPoP` for a token that is bound to a key, and `Bearer` for any other.

    Raises:
        PossessionError: the other scheme, or a place that has none.

    Source: RFC 9449 sections 7.1 and 7.2.
    """
    if (bound.jkt is not None) != (evidence.scheme == "dpop"):
        raise PossessionError(reason="scheme_not_for_this_token")


def check_certificate(evidence: Evidence, *, x5t_s256: str) -> None:
    """
    Require the certificate that the token is bound to.

    Raises:
        PossessionError: none came, or another one.

    Source: RFC 8705 section 3.
    """
    if evidence.x5t_s256 is None:
        raise PossessionError(reason="certificate_missing")
    if not hmac.compare_digest(evidence.x5t_s256, x5t_s256):
        raise PossessionError(reason="certificate_differs")


def _parse_confirmation(claims: Claims) -> Confirmation:
    cnf = claims.members.get("cnf")
    # Another member would be another key: what is not understood is not proven.
    if not isinstance(cnf, dict) or not cnf or not cnf.keys() <= {"jkt", "x5t#S256"}:
        raise ClaimError(claim="cnf")
    for value in cnf.values():
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            raise ClaimError(claim="cnf")
    return Confirmation(jkt=_text(cnf.get("jkt")), x5t_s256=_text(cnf.get("x5t#S256")))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None

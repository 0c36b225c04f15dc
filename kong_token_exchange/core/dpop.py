"""
DPoP proofs: that who sends a request holds the key, for this request and this token, just now.

The token has been verified before, so nobody without one makes us compute a signature, and the
key must be the token's before it is read. Whether a proof was used before is its caller's to ask.

Source: RFC 9449 sections 4 and 11; docs/adr/0012-possession.md.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

from cryptography.hazmat.primitives.asymmetric import rsa

from kong_token_exchange.core.cache_key import digest_fields
from kong_token_exchange.core.jwk import Jwk, key_fits_algorithm, parse_public_jwk, thumbprint
from kong_token_exchange.core.jws import (
    ASYMMETRIC_ALGORITHMS,
    Jws,
    check_algorithm,
    read_compact,
    verify_signature,
)
from kong_token_exchange.core.strict_json import Json
from kong_token_exchange.core.target_uri import normalise_path, normalise_uri
from kong_token_exchange.errors import InvalidTokenError, PossessionError, ProofError, SignatureError

PROOF_ALGORITHMS = ASYMMETRIC_ALGORITHMS

# A proof with an RSA key of 4,096 bits has under 3 KB; a header line has 8 KB in nginx.
MAX_PROOF_BYTES = 8 * 1024

# Each request costs one verification, on the loop: longer keys are for issuers, whose tokens are
# verified once.
MAX_PROOF_RSA_BITS = 4096

# A client's clock is nobody's to keep (RFC 9449 section 11.1 leaves room for it).
PROOF_SKEW_S = 5.0

# 96 bits of chance are under 40 characters; UUIDs and digests too.
_MAX_JTI = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """A proof that was found good: `key` tells it from every other one, `iat` is NumericDate."""

    key: bytes = field(repr=False)
    iat: float


def verify_proof(
    text: str,
    *,
    access_token: str,
    jkt: str,
    method: str,
    path: str,
    origins: Collection[str],
    now: float,
    lifetime: float,
) -> Proof:
    """
    Judge the proof that came with a request.

    Args:
        text: The `DPoP` header; several come joined by a comma and so are none.
        access_token: The token as it was sent.
        jkt: The thumbprint that the token is bound to.
        method: The request's method.
        path: The request's target as it came, with or without a query.
        origins: Origins that the request may have been meant for, as `target_uri` writes them.
        now: NumericDate, seconds.
        lifetime: How long a proof is good after its `iat`, seconds.

    Raises:
        ProofError: it is absent, malformed, or of another request, token or time.
        PossessionError: it is a proof of another key than the token's.

    Source: RFC 9449 section 4.3.
    """
    if not text:
        raise ProofError(reason="dpop_missing")
    if "," in text:
        raise ProofError(reason="dpop_repeated")
    payload = _verified_payload(text, jkt=jkt)
    if payload.get("htm") != method:
        raise ProofError(reason="dpop_claim", facts={"claim": "htm"})
    _check_uri(payload, origins=origins, path=path)
    _check_token(payload, access_token)
    iat = _check_times(payload, now=now, lifetime=lifetime)
    return Proof(key=digest_fields(("dpop", jkt, _jti(payload)))[:16], iat=iat)


def _verified_payload(text: str, *, jkt: str) -> Mapping[str, Json]:
    try:
        jws, header = read_compact(text, max_bytes=MAX_PROOF_BYTES)
        check_algorithm(jws, algorithms=PROOF_ALGORITHMS)
    except InvalidTokenError as error:
        raise ProofError(reason="dpop_" + error.reason, facts=error.facts) from None
    if jws.typ != "dpop+jwt":
        raise ProofError(reason="dpop_typ")
    if thumbprint(header.get("jwk")) != jkt:
        raise PossessionError(reason="dpop_key_differs")
    try:
        verify_signature(jws, _embedded_key(jws, header), algorithms=PROOF_ALGORITHMS)
    except SignatureError:
        raise ProofError(reason="dpop_signature") from None
    return jws.payload


def _embedded_key(jws: Jws, header: Mapping[str, Json]) -> Jwk:
    key = parse_public_jwk(header.get("jwk"))
    if key is None or not key_fits_algorithm(key, jws.alg):
        raise ProofError(reason="dpop_key")
    if isinstance(key.public_key, rsa.RSAPublicKey) and key.public_key.key_size > MAX_PROOF_RSA_BITS:
        raise ProofError(reason="dpop_key")
    return key


def _check_uri(payload: Mapping[str, Json], *, origins: Collection[str], path: str) -> None:
    htu = payload.get("htu")
    found = normalise_uri(htu) if isinstance(htu, str) else None
    if found is None or found[0] not in origins or found[1] != normalise_path(path.partition("?")[0]):
        raise ProofError(reason="dpop_claim", facts={"claim": "htu"})


def _check_token(payload: Mapping[str, Json], access_token: str) -> None:
    digest = hashlib.sha256(access_token.encode("ascii")).digest()
    expected = base64.urlsafe_b64encode(digest).rstrip(b"=")
    ath = payload.get("ath")
    if not isinstance(ath, str) or not hmac.compare_digest(ath.encode("utf-8", "replace"), expected):
        raise ProofError(reason="dpop_claim", facts={"claim": "ath"})


def _check_times(payload: Mapping[str, Json], *, now: float, lifetime: float) -> float:
    """Require an `iat` within the window, and `nbf` and `exp` where the client set them (RFC 7519)."""
    iat = payload.get("iat")
    if not _is_time(iat) or not now - lifetime < iat <= now + PROOF_SKEW_S:
        raise ProofError(reason="dpop_claim", facts={"claim": "iat"})
    exp, nbf = payload.get("exp", now + 1), payload.get("nbf", now)
    if not _is_time(exp) or now >= exp:
        raise ProofError(reason="dpop_claim", facts={"claim": "exp"})
    if not _is_time(nbf) or nbf > now + PROOF_SKEW_S:
        raise ProofError(reason="dpop_claim", facts={"claim": "nbf"})
    return iat


def _is_time(value: Json) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _jti(payload: Mapping[str, Json]) -> str:
    jti = payload.get("jti")
    if not isinstance(jti, str) or not 0 < len(jti) <= _MAX_JTI:
        raise ProofError(reason="dpop_claim", facts={"claim": "jti"})
    return jti

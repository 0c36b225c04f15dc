"""
Compact JWS: split and decode within limits, then verify with one key.

Owns the outer form (RFC 7515 section 7.1) and the header rules (section 4).
Which key to use is `jwk`'s business, what the claims mean is `claims`'.
PyJWT's algorithm objects do the cryptography.

Source: RFC 7515; RFC 8725.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import jwt
from jwt.exceptions import PyJWTError

from kong_token_exchange.core.jwk import KEY_OF_ALGORITHM, SHOWN_KID, Jwk, key_fits_algorithm
from kong_token_exchange.core.strict_json import Json, JsonError, parse_json_object
from kong_token_exchange.errors import MalformedTokenError, SignatureError, UnsupportedAlgorithmError

ASYMMETRIC_ALGORITHMS = tuple(KEY_OF_ALGORITHM)

# Names worth telling an operator; any other `alg` is the sender's text and is logged as "other".
_NAMED_ALGORITHMS = frozenset(
    {*ASYMMETRIC_ALGORITHMS, "none", "HS256", "HS384", "HS512", "ES256K", "Ed25519", "Ed448"}
)

# A header with kid, x5t and typ is under 300 bytes; some providers inline x5c (about 4 KB).
MAX_HEADER_BYTES = 8 * 1024

# RFC 7515 leaves kid free; every provider surveyed stays under 100 visible characters.
_KID = re.compile(r"[\x21-\x7e]{1,256}", re.ASCII)
_BASE64URL = re.compile(r"[A-Za-z0-9_-]*", re.ASCII)
# The last of two characters stands for 2 bits of data, the last of three for 4.
_LAST = {2: "AQgw", 3: "AEIMQUYcgkosw048"}

# Members that change how the token would have to be read (RFC 7515 section 4.1.11, RFC 7797,
# nested and encrypted tokens of RFC 7516/7519). We support none of them, so none may be there.
# Members that offer a key (jwk, jku, x5u, x5c) may: some issuers send them, and nothing reads them.
_REFUSED_MEMBERS = frozenset({"crit", "b64", "zip", "enc", "cty", "p2s", "p2c", "epk", "apu", "apv"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Jws:
    """
    A decoded compact JWS whose signature has not been looked at.

    `payload` is untrusted until `verify_signature` has returned.
    """

    alg: str
    kid: str | None
    typ: str | None
    payload: Mapping[str, Json] = field(repr=False)
    signing_input: bytes = field(repr=False)
    signature: bytes = field(repr=False)


def parse_compact(token: str, *, max_bytes: int) -> Jws:
    """
    Decode a compact JWS without believing any of it.

    Args:
        token: The token as it came.
        max_bytes: Longest token that is read, in characters.

    Raises:
        MalformedTokenError: opaque, encrypted, nested, or not of the form; `reason` says which.

    Source: RFC 7515 sections 4 and 7.1.
    """
    return read_compact(token, max_bytes=max_bytes)[0]


def read_compact(token: str, *, max_bytes: int) -> tuple[Jws, Mapping[str, Json]]:
    """
    Decode as `parse_compact` does, and return the header's members too.

    For a DPoP proof, whose header brings its key; no token's header is read for one.

    Raises:
        MalformedTokenError: as `parse_compact`.
    """
    if len(token) > max_bytes:
        raise MalformedTokenError(reason="token_too_long")
    dots = token.count(".")
    if dots != 2:
        raise MalformedTokenError(reason="token_encrypted" if dots == 4 else "token_opaque")
    head, body, tail = token.split(".")
    header = _decode_object(head, max_bytes=MAX_HEADER_BYTES, reason="jws_header")
    payload = _decode_object(body, max_bytes=max_bytes, reason="jws_payload")
    signature = decode_base64url(tail)
    if not signature:
        raise MalformedTokenError(reason="jws_signature_empty")
    if not _REFUSED_MEMBERS.isdisjoint(header):
        raise MalformedTokenError(reason="jws_header_unsupported")
    jws = Jws(
        alg=_text_member(header, "alg", required=True) or "",
        kid=_kid(header),
        typ=_text_member(header, "typ"),
        payload=payload,
        signing_input=f"{head}.{body}".encode("ascii"),
        signature=signature,
    )
    return jws, header


def decode_base64url(text: str) -> bytes:
    """
    Decode base64url in its one canonical spelling: no padding, no stray bits.

    Raises:
        MalformedTokenError: another alphabet, padding, or unused bits that are set.

    Source: RFC 7515 section 2; RFC 4648 section 3.5.
    """
    over = len(text) % 4
    # Of an incomplete last group only some characters leave the unused bits at zero.
    if not _BASE64URL.fullmatch(text) or over == 1 or (over and text[-1] not in _LAST[over]):
        raise MalformedTokenError(reason="jws_base64url")
    # Of this alphabet and length nothing is left that the decoder would refuse or skip.
    return base64.urlsafe_b64decode(text + "=" * (-over % 4))


def check_algorithm(jws: Jws, *, algorithms: Collection[str]) -> None:
    """
    Require the token's `alg` in the issuer's allow-list, as an exact string.

    Raises:
        UnsupportedAlgorithmError: it is not.

    Source: RFC 8725 section 3.1.
    """
    if jws.alg not in algorithms or jws.alg not in ASYMMETRIC_ALGORITHMS:
        named = jws.alg if jws.alg in _NAMED_ALGORITHMS else "other"
        raise UnsupportedAlgorithmError(reason="jwt_algorithm", facts={"alg": named})


def verify_signature(jws: Jws, key: Jwk, *, algorithms: Collection[str]) -> None:
    """
    Verify the signature with one key.

    Checks alg against the allow-list and the key; the caller has chosen the key and
    checks the claims afterwards.

    Raises:
        UnsupportedAlgorithmError: `alg` is not allowed.
        SignatureError: the key does not fit the algorithm, or the signature is wrong.

    Source: RFC 7515 section 5.2.
    """
    check_algorithm(jws, algorithms=algorithms)
    if not key_fits_algorithm(key, jws.alg):
        raise SignatureError(reason="jwt_key_algorithm", facts={"alg": jws.alg})
    try:
        valid = jwt.get_algorithm_by_name(jws.alg).verify(jws.signing_input, key.public_key, jws.signature)
    except (PyJWTError, ValueError, TypeError):
        valid = False
    if not valid:
        raise SignatureError(
            reason="jwt_signature", facts={"alg": jws.alg, "kid": jws.kid and jws.kid[:SHOWN_KID]}
        )


def _decode_object(segment: str, *, max_bytes: int, reason: str) -> dict[str, Json]:
    try:
        return parse_json_object(decode_base64url(segment), max_bytes=max_bytes)
    except JsonError as exc:
        raise MalformedTokenError(reason=reason, facts={"json": str(exc)}) from None


def _text_member(header: Mapping[str, Json], name: str, *, required: bool = False) -> str | None:
    value = header.get(name)
    if value is None and name not in header and not required:
        return None
    if not isinstance(value, str) or not value:
        raise MalformedTokenError(reason="jws_header_member", facts={"member": name})
    return value


def _kid(header: Mapping[str, Json]) -> str | None:
    kid = _text_member(header, "kid")
    if kid is not None and not _KID.fullmatch(kid):
        raise MalformedTokenError(reason="jws_header_member", facts={"member": "kid"})
    return kid

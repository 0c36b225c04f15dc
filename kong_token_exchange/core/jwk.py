"""
JSON Web Keys: read a set, keep the keys that may verify, select exactly one.

A key that cannot or must not verify (symmetric, private, weak, for encryption,
malformed) is dropped with a reason; one odd key never spoils the set.

Source: RFC 7517; RFC 7518 section 6; RFC 8037; docs/threats.md KEY rows.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from kong_token_exchange.core.strict_json import Json, JsonError, parse_json_object
from kong_token_exchange.errors import IssuerUnavailableError, KeySelectionError

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey

# Keycloak publishes 2 to 4 keys, Entra and Google 2 to 8; a set beyond these is an attack or an error.
MAX_SET_BYTES = 256 * 1024
MAX_KEYS = 100

# RFC 7518 section 3.3 sets the lower bound; above the upper one a verification costs milliseconds.
MIN_RSA_BITS = 2048
MAX_RSA_BITS = 8192
# OpenSSL's own bound for large moduli; an exponent as long as the modulus makes each check cost a signature.
_MAX_RSA_EXPONENT_BITS = 64

# A token's kid is anybody's text: this much of it is enough to find the key in a set.
SHOWN_KID = 64

_PRIVATE_MEMBERS = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})

# Every asymmetric algorithm of RFC 7518 section 3.1 and RFC 8037 with the `kty` and the curves of
# the keys it takes. There is no HMAC and no "none" in the table, so no configuration can reach them.
# RFC 9864's own names for EdDSA ("Ed25519", "Ed448") are not in it: PyJWT does not know them yet.
KEY_OF_ALGORITHM: Final[Mapping[str, tuple[str, tuple[str | None, ...]]]] = {
    "RS256": ("RSA", (None,)),
    "RS384": ("RSA", (None,)),
    "RS512": ("RSA", (None,)),
    "PS256": ("RSA", (None,)),
    "PS384": ("RSA", (None,)),
    "PS512": ("RSA", (None,)),
    "ES256": ("EC", ("P-256",)),
    "ES384": ("EC", ("P-384",)),
    "ES512": ("EC", ("P-521",)),
    "EdDSA": ("OKP", ("Ed25519", "Ed448")),
}
_KEY_SHAPES: Final = frozenset((kty, crv) for kty, curves in KEY_OF_ALGORITHM.values() for crv in curves)


@dataclass(frozen=True, slots=True, kw_only=True)
class Jwk:
    """One public key that may verify signatures; `crv` is None for RSA."""

    kty: str
    kid: str | None
    alg: str | None
    crv: str | None
    public_key: PublicKey = field(repr=False, compare=False)
    # SHA-256 over the members that say what the key is and may do: tells whether a later set still
    # holds this very key for this very use.
    fingerprint: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class JwkSet:
    """The usable keys of one issuer, and why others were dropped: one word a key."""

    keys: tuple[Jwk, ...]
    dropped: tuple[str, ...] = ()

    def holds(self, fingerprint: bytes) -> bool:
        """Tell whether the key with this fingerprint is in the set."""
        return any(key.fingerprint == fingerprint for key in self.keys)


class _DroppedKeyError(Exception):
    """This member of the set is not used; the message is the reason."""


def parse_jwk_set(body: bytes) -> JwkSet:
    """
    Read a JWK Set and keep the keys that may verify.

    A key listed twice is kept once. Different keys that share a kid and could verify the same
    token are all dropped (`duplicate_kid`): the first one is no better than the second.

    Returns:
        At least one key, in the order of the document.

    Raises:
        IssuerUnavailableError: not a JWK Set, too large, or without one usable key.

    Source: RFC 7517 section 5.
    """
    try:
        document = parse_json_object(body, max_bytes=MAX_SET_BYTES)
    except JsonError as exc:
        raise IssuerUnavailableError(reason="jwks_malformed", facts={"json": str(exc)}) from None
    members = document.get("keys")
    if not isinstance(members, list) or len(members) > MAX_KEYS:
        raise IssuerUnavailableError(reason="jwks_malformed")
    keys: list[Jwk] = []
    dropped: list[str] = []
    for member in members:
        try:
            keys.append(_parse_jwk(member))
        except _DroppedKeyError as exc:
            dropped.append(str(exc))
    keys, repeated = _drop_repeated(keys)
    dropped += repeated
    if not keys:
        raise IssuerUnavailableError(
            reason="jwks_without_usable_key", facts={"dropped": ",".join(dropped)[:200]}
        )
    return JwkSet(keys=tuple(keys), dropped=tuple(dropped))


def select_verification_key(jwks: JwkSet, *, alg: str, kid: str | None) -> Jwk:
    """
    Return the one key that fits a token's header.

    Filters by kty, crv and alg, then by kid; a token without kid is accepted only
    where a single key fits, so a set with two keys never means "try both". A kid is
    compared and nothing else: it never becomes part of an address or a file name.

    Raises:
        KeySelectionError: none fits (`key_not_found`) or several do (`key_ambiguous`).

    Source: RFC 7515 section 4.1.4; RFC 8725 section 3.10.
    """
    fitting = [key for key in jwks.keys if key_fits_algorithm(key, alg) and (kid is None or key.kid == kid)]
    if len(fitting) != 1:
        reason = "key_ambiguous" if fitting else "key_not_found"
        raise KeySelectionError(reason=reason, facts={"kid": kid and kid[:SHOWN_KID], "alg": alg})
    return fitting[0]


def key_fits_algorithm(key: Jwk, alg: str) -> bool:
    """Tell whether a key may verify this algorithm: kty, crv and the key's own `alg`."""
    kty, curves = KEY_OF_ALGORITHM.get(alg, ("", ()))
    return key.kty == kty and key.crv in curves and key.alg in (None, alg)


def parse_public_jwk(member: Json) -> Jwk | None:
    """
    Read one public key that stands alone; None where a key set would drop it.

    Symmetric, private, weak and malformed keys are dropped there, and keys for another use.
    """
    try:
        return _parse_jwk(member)
    except _DroppedKeyError:
        return None


# The members that RFC 7638 section 3.2 and RFC 8037 section 2 hash, in the order of their names.
_THUMBPRINT_MEMBERS: Final[Mapping[str, tuple[str, ...]]] = {
    "RSA": ("e", "kty", "n"),
    "EC": ("crv", "kty", "x", "y"),
    "OKP": ("crv", "kty", "x"),
}


def thumbprint(member: Json) -> str | None:
    """
    Return the SHA-256 thumbprint of a key, base64url; None for what is no public key by its members.

    Source: RFC 7638 section 3; RFC 9449 section 6.1 (`jkt`).
    """
    if not isinstance(member, dict):
        return None
    names = _THUMBPRINT_MEMBERS.get(str(member.get("kty")), ())
    material = {name: member.get(name) for name in names}
    if not names or not all(isinstance(value, str) for value in material.values()):
        return None
    canonical = json.dumps(material, separators=(",", ":")).encode("ascii")
    return base64.urlsafe_b64encode(hashlib.sha256(canonical).digest()).rstrip(b"=").decode("ascii")


def _parse_jwk(member: Json) -> Jwk:
    if not isinstance(member, dict):
        raise _DroppedKeyError("not_an_object")
    kty = _text(member, "kty")
    reader = _READERS.get(kty or "")
    if reader is None:
        raise _DroppedKeyError("symmetric" if kty == "oct" else "kty_unknown")
    if not _PRIVATE_MEMBERS.isdisjoint(member):
        raise _DroppedKeyError("private")
    use, key_ops = _text(member, "use"), member.get("key_ops")
    if use not in (None, "sig"):
        raise _DroppedKeyError("use")
    if key_ops is not None and not (isinstance(key_ops, list) and "verify" in key_ops):
        raise _DroppedKeyError("key_ops")
    crv = None if kty == "RSA" else _text(member, "crv")
    if (kty, crv) not in _KEY_SHAPES:
        raise _DroppedKeyError("curve")
    public_key = _read_public_key(reader, member)
    if isinstance(public_key, rsa.RSAPublicKey):
        _check_rsa(public_key)
    return Jwk(
        kty=kty or "",
        kid=_text(member, "kid"),
        alg=_text(member, "alg"),
        crv=crv,
        public_key=public_key,
        fingerprint=_fingerprint(member),
    )


def _read_public_key(reader: Callable[[str], object], member: Mapping[str, Json]) -> PublicKey:
    try:
        key = reader(json.dumps(member))
    except Exception:  # noqa: BLE001 - see below
        # PyJWT and cryptography raise a dozen classes here; all mean "not a key we can use".
        raise _DroppedKeyError("malformed") from None
    if not isinstance(key, PublicKey):
        raise _DroppedKeyError("malformed")
    return key


_READERS: Final[Mapping[str, Callable[[str], object]]] = {
    "RSA": RSAAlgorithm.from_jwk,
    "EC": ECAlgorithm.from_jwk,
    "OKP": OKPAlgorithm.from_jwk,
}


def _text(member: Mapping[str, Json], name: str) -> str | None:
    value = member.get(name)
    if value is not None and (not isinstance(value, str) or not value):
        raise _DroppedKeyError("member_type")
    return value


def _fingerprint(member: Mapping[str, Json]) -> bytes:
    material = {name: member.get(name) for name in ("kty", "kid", "alg", "crv", "n", "e", "x", "y")}
    return hashlib.sha256(json.dumps(material, sort_keys=True).encode("utf-8")).digest()


def _drop_repeated(keys: list[Jwk]) -> tuple[list[Jwk], list[str]]:
    """Split off the keys that stand there twice, and those no header could tell apart."""
    unique = list({key.fingerprint: key for key in keys}.values())
    kept = [key for key in unique if not any(_confusable(key, other) for other in unique)]
    return kept, ["duplicate"] * (len(keys) - len(unique)) + ["duplicate_kid"] * (len(unique) - len(kept))


def _confusable(key: Jwk, other: Jwk) -> bool:
    if key is other or key.kid is None or key.kid != other.kid:
        return False
    return (key.kty, key.crv) == (other.kty, other.crv) and (
        key.alg == other.alg or None in (key.alg, other.alg)
    )


def _check_rsa(key: rsa.RSAPublicKey) -> None:
    numbers = key.public_numbers()
    if not MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
        raise _DroppedKeyError("rsa_size")
    if numbers.n % 2 == 0:
        raise _DroppedKeyError("rsa_modulus")
    if numbers.e < 3 or numbers.e % 2 == 0 or numbers.e.bit_length() > _MAX_RSA_EXPONENT_BITS:
        raise _DroppedKeyError("rsa_exponent")
    if _has_roca_shape(numbers.n):
        raise _DroppedKeyError("roca")


# The moduli of CVE-2017-15361 are powers of 65537 modulo each of these primes; a random
# modulus is so by chance about once in 2**27. Source: Nemec et al., ACM CCS 2017, section 3.
_ROCA_PRIMES = (11, 13, 17, 19, 37, 53, 61, 71, 73, 79, 97, 103, 107, 109, 127, 151, 157)
_ROCA_POWERS = {p: frozenset(pow(65537, i, p) for i in range(p - 1)) for p in _ROCA_PRIMES}


def _has_roca_shape(modulus: int) -> bool:
    return all(modulus % prime in powers for prime, powers in _ROCA_POWERS.items())

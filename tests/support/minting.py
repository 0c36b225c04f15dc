"""
An issuer for tests: real keys, made once a session, and tokens good or hostile.

    issuer = FakeIssuer("https://idp.test")
    issuer.mint()                                  a good RS256 access token, valid at NOW
    issuer.mint(aud="other", exp=ABSENT)           the same with claims changed or left out
    issuer.mint(key="ES256", header={"typ": "JWT"})
    issuer.craft(b'{"alg":"RS256"...}', b"...")    signed bytes of any shape
    issuer.jwks()                                  the key set as the issuer serves it

Nothing of the project is used to mint, so that no mistake is made twice.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

# NumericDate, seconds: what "now" is where a test does not say otherwise.
NOW: Final = 1_800_000_000
LIFETIME: Final = 300

# Given as a claim or header member: leave that one out.
ABSENT: Final = object()

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

_CURVES: Final[Mapping[str, tuple[type[ec.EllipticCurve], str, int]]] = {
    "ES256": (ec.SECP256R1, "P-256", 32),
    "ES384": (ec.SECP384R1, "P-384", 48),
    "ES512": (ec.SECP521R1, "P-521", 66),
}
_HASHES: Final[Mapping[str, type[hashes.HashAlgorithm]]] = {
    "256": hashes.SHA256,
    "384": hashes.SHA384,
    "512": hashes.SHA512,
}

# The keys every issuer has, by the algorithm that its JWK names.
DEFAULT_ALGORITHMS: Final = ("RS256", "PS256", "ES256", "ES384", "ES512", "EdDSA")


@dataclass(frozen=True)
class SigningKey:
    """A private key with what its JWK says of it."""

    kid: str | None
    alg: str
    private: PrivateKey

    def jwk(self, **changes: Any) -> dict[str, Any]:
        """Return the public JWK; ABSENT leaves a member out."""
        named = {"kid": self.kid} if self.kid is not None else {}
        return _changed({**_public_members(self.private), **named, "alg": self.alg, "use": "sig"}, changes)

    def sign(self, signing_input: bytes, *, alg: str | None = None) -> bytes:
        """Sign as *alg* says, by default as the key's own."""
        return sign(self.private, alg or self.alg, signing_input)


class FakeIssuer:
    """
    One issuer with a key for every algorithm.

    Args:
        issuer: Its identifier.
        now: NumericDate around which its tokens are valid, seconds.
        label: Issuers of the same label share keys; another label has other keys.
    """

    def __init__(self, issuer: str = "https://idp.test", *, now: float = NOW, label: str = "issuer") -> None:
        self.issuer = issuer
        self.now = int(now)
        self.keys = {
            alg: SigningKey(f"{label}-{alg}", alg, private_key(alg, label)) for alg in DEFAULT_ALGORITHMS
        }

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Return the claims of a good access token with *changes*; ABSENT leaves a claim out."""
        good = {
            "iss": self.issuer,
            "sub": "user-1",
            "aud": "api",
            "azp": "client-1",
            "iat": self.now,
            "exp": self.now + LIFETIME,
            "jti": "token-1",
            "scope": "openid read",
        }
        return _changed(good, changes)

    def header(self, key: str | SigningKey = "RS256", **changes: Any) -> dict[str, Any]:
        """Return the header of a good token signed by *key*, with *changes*."""
        signer = self._signer(key)
        return _changed({"alg": signer.alg, "typ": "at+jwt", "kid": signer.kid}, changes)

    def mint(
        self,
        *,
        header: Mapping[str, Any] | None = None,
        key: str | SigningKey = "RS256",
        **claim_changes: Any,
    ) -> str:
        """Sign a good access token with *header* members and claims changed."""
        signer = self._signer(key)
        members = self.header(signer, **(header or {}))
        return self.craft(to_json(members), to_json(self.claims(**claim_changes)), key=signer)

    def craft(
        self, header: bytes, payload: bytes, *, key: str | SigningKey = "RS256", alg: str | None = None
    ) -> str:
        """Sign exactly these bytes, whatever they are."""
        signing_input = f"{b64(header)}.{b64(payload)}"
        return f"{signing_input}.{b64(self._signer(key).sign(signing_input.encode(), alg=alg))}"

    def jwks(self, *algorithms: str, extra: tuple[object, ...] = ()) -> bytes:
        """Return the key set as served: all keys, or those of *algorithms*; *extra* members come first."""
        keys = [self.keys[alg].jwk() for alg in algorithms or self.keys]
        return to_json({"keys": [*extra, *keys]})

    def _signer(self, key: str | SigningKey) -> SigningKey:
        return key if isinstance(key, SigningKey) else self.keys[key]


def private_key(alg: str, label: str = "issuer") -> PrivateKey:
    """Return this session's key for an algorithm; *label* tells key pairs apart."""
    return _generate(alg, label)


# Not on the function above: a call that leaves the default out would have another cache key.
@cache
def _generate(alg: str, _label: str) -> PrivateKey:
    if alg in _CURVES:
        return ec.generate_private_key(_CURVES[alg][0]())
    if alg == "EdDSA":
        return ed25519.Ed25519PrivateKey.generate()
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def sign(private: PrivateKey, alg: str, data: bytes) -> bytes:
    """Sign *data* in the form that JWS wants (RFC 7518 section 3)."""
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return private.sign(data)
    digest = _HASHES[alg[2:]]()
    if isinstance(private, ec.EllipticCurvePrivateKey):
        size = (private.key_size + 7) // 8
        return raw_signature(*decode_dss_signature(private.sign(data, ec.ECDSA(digest))), size=size)
    if alg.startswith("PS"):
        return private.sign(data, padding.PSS(padding.MGF1(digest), digest.digest_size), digest)
    return private.sign(data, padding.PKCS1v15(), digest)


def raw_signature(r: int, s: int, *, size: int) -> bytes:
    """Return r and s side by side (RFC 7518 section 3.4)."""
    return r.to_bytes(size, "big") + s.to_bytes(size, "big")


def public_pem(private: PrivateKey) -> bytes:
    """Return the public key as PEM, for those who take it for a shared secret."""
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    return private.public_key().public_bytes(serialization.Encoding.PEM, spki)


def b64(data: bytes) -> str:
    """Return base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def b64_uint(value: int) -> str:
    """Return Base64urlUInt (RFC 7518 section 2)."""
    return b64(value.to_bytes(max(1, (value.bit_length() + 7) // 8), "big"))


def to_json(value: object) -> bytes:
    """Return compact JSON; NaN and numbers beyond a double come out as Python writes them."""
    return json.dumps(value, separators=(",", ":")).encode()


def with_member(document: Mapping[str, object], name: str, raw: str) -> bytes:
    """Return *document* as JSON with one more member whose value is the text *raw*, never mind the rest."""
    text = to_json(dict(document)).decode()
    comma = "," if document else ""
    return f"{text[:-1]}{comma}{json.dumps(name)}:{raw}}}".encode()


def _public_members(private: PrivateKey) -> dict[str, Any]:
    if isinstance(private, rsa.RSAPrivateKey):
        numbers = private.public_key().public_numbers()
        return {"kty": "RSA", "n": b64_uint(numbers.n), "e": b64_uint(numbers.e)}
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return {"kty": "OKP", "crv": "Ed25519", "x": b64(private.public_key().public_bytes_raw())}
    point = private.public_key().public_numbers()
    _, crv, size = _CURVES[{256: "ES256", 384: "ES384", 521: "ES512"}[private.key_size]]
    x, y = b64(point.x.to_bytes(size, "big")), b64(point.y.to_bytes(size, "big"))
    return {"kty": "EC", "crv": crv, "x": x, "y": y}


def _changed(members: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**members, **changes}.items() if value is not ABSENT}

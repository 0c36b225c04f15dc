"""
Clients that hold a key, for tests: tokens bound to it and proofs made with it (RFC 9449).

    holder = Holder()
    token = issuer.mint(cnf=holder.cnf)
    holder.prove(token)                              a good proof for GET https://api.test/orders
    holder.prove(token, htm="POST", jti=ABSENT)      the same with claims changed or left out

Nothing of the project is used, so that no mistake is made twice.
"""

import base64
import hashlib
import itertools
from collections.abc import Mapping
from typing import Any

from tests.support.minting import ABSENT, NOW, SigningKey, b64, private_key, sign, to_json

METHOD, URI = "GET", "https://api.test/orders"

_numbers = itertools.count(1)


class Holder:
    """One client with one key."""

    def __init__(self, alg: str = "ES256", *, label: str = "holder") -> None:
        self.alg = alg
        self.private = private_key(alg, label)
        self.jwk: dict[str, Any] = SigningKey(None, alg, self.private).jwk(alg=ABSENT, use=ABSENT)

    @property
    def jkt(self) -> str:
        """The key's thumbprint (RFC 7638)."""
        return b64(hashlib.sha256(to_json(dict(sorted(self.jwk.items())))).digest())

    @property
    def cnf(self) -> dict[str, str]:
        """What a token says that is bound to this key."""
        return {"jkt": self.jkt}

    def prove(
        self, token: str, *, header: Mapping[str, Any] | None = None, now: float = NOW, **claims: Any
    ) -> str:
        """Make a proof with *header* members and claims changed; ABSENT leaves one out."""
        members = {"typ": "dpop+jwt", "alg": self.alg, "jwk": self.jwk, **(header or {})}
        payload = {
            "jti": f"proof-{next(_numbers)}",
            "htm": METHOD,
            "htu": URI,
            "iat": int(now),
            "ath": b64(hashlib.sha256(token.encode()).digest()),
            **claims,
        }
        signing_input = ".".join(
            b64(to_json({name: value for name, value in part.items() if value is not ABSENT}))
            for part in (members, payload)
        )
        return f"{signing_input}.{b64(sign(self.private, self.alg, signing_input.encode()))}"


def certificate_digest(der: bytes) -> str:
    """Return `x5t#S256` of a certificate (RFC 8705 section 3.1)."""
    return base64.urlsafe_b64encode(hashlib.sha256(der).digest()).rstrip(b"=").decode()

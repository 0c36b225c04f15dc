"""
A flood of valid tokens stays within its bound: `python -m benchmarks.memory [--tokens 1000000]`.

Each token is new, is exchanged, and is then asked for once more, so that its answer is encoded and
stands for a while. Everything of ours runs as it does in a server, but for cryptography: the tokens
are a partner's whose signature is not looked at (`insecure_skip_subject_signature`), the results are
judged by their claims (`result.validation: claims`), and the token endpoint answers in this process.
What is kept of a token is the same in either case, less 32 bytes for the fingerprint of its key.

The memory of the process may grow by the bound and a fifth.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import parse_qs

from benchmarks.machine import peak_resident_bytes, resident_bytes
from kong_token_exchange.config import load_config
from kong_token_exchange.core.jwk import JwkSet
from kong_token_exchange.plugin import TokenExchangePlugin
from kong_token_exchange.ports import IssuerEndpoints
from kong_token_exchange.protocol.http_message import HttpRequest, HttpResponse
from kong_token_exchange.wiring import Shells

DEFAULT_TOKENS = 1_000_000
DEFAULT_MIB = 128
ALLOWED = 1.2

_TARGET, _PARTNER = "https://idp.example.com/realms/internal", "https://partner.example.org"
_CONFIG: dict[str, Any] = {
    "issuer": _TARGET,
    "token_endpoint": f"{_TARGET}/token",
    "client_id": ["gateway"],
    "client_secret": ["secret"],
    "token_exchange": {
        "subject_token_issuers": [
            {"issuer": _PARTNER, "verify_signature": False, "insecure_skip_subject_signature": True}
        ],
        "result": {"validation": "claims"},
    },
}

_LIFE_S = 3600
# As long as that of RS256.
_SIGNATURE = urlsafe_b64encode(bytes(range(256))).rstrip(b"=").decode("ascii")
# The look-ups of the interpreter and the first entries are no part of the flood.
_WARMUP = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a flood did; bytes, seconds."""

    tokens: int
    bound: int
    grown: int
    kept_verified: int
    kept_exchanged: int
    weighed: int
    evictions: int
    seconds: float

    @property
    def holds(self) -> bool:
        """Tell whether the memory grew by the bound and a fifth at most, and the rest was counted."""
        kept = self.kept_verified + self.kept_exchanged
        return self.grown <= ALLOWED * self.bound and self.evictions == 2 * self.tokens - kept


def make_token(issuer: str, number: int, now: int) -> str:
    """Return a token of usual claims, about a kilobyte, whose signature is nobody's."""
    header = {"alg": "RS256", "typ": "at+jwt", "kid": "2026-11"}
    claims = {
        "iss": issuer,
        "sub": f"user-{number}",
        "aud": ["orders", "account"],
        "exp": now + _LIFE_S,
        "iat": now,
        "jti": f"{number:032x}",
        "azp": "web-app",
        "scope": "openid profile email orders:read orders:write",
        "realm_access": {"roles": ["default-roles-internal", "offline_access", "uma_authorization"]},
        "resource_access": {"account": {"roles": ["manage-account", "view-profile"]}},
        "name": f"User {number}",
        "email": f"user-{number}@example.org",
    }
    parts = (json.dumps(part, separators=(",", ":")).encode("ascii") for part in (header, claims))
    return ".".join((*(urlsafe_b64encode(part).rstrip(b"=").decode("ascii") for part in parts), _SIGNATURE))


class _Issuer:
    """Answers in this process; implements the ports `HttpSender` and `KeySource`."""

    generation = 0

    def __init__(self, now: int) -> None:
        self._now = now

    def send(self, request: HttpRequest, *, deadline: float, max_body: int) -> HttpResponse:
        (token,) = parse_qs(request.body.decode("ascii"))["subject_token"]
        number = int(json.loads(_decoded(token))["sub"].removeprefix("user-"))
        document = {
            "access_token": make_token(_TARGET, number, self._now),
            "issued_token_type": "urn:ietf:params:oauth:token-type:access_token",
            "token_type": "Bearer",
            "expires_in": _LIFE_S,
        }
        body = json.dumps(document).encode("ascii")
        return HttpResponse(status=200, headers={"content-type": "application/json"}, body=body)

    def keys(self, endpoints: IssuerEndpoints, *, deadline: float | None) -> JwkSet:
        raise AssertionError("no signature is looked at")

    def newer_keys(self, endpoints: IssuerEndpoints, *, deadline: float | None) -> JwkSet | None:
        raise AssertionError("no signature is looked at")

    def settled_until(self, endpoints: IssuerEndpoints) -> float:
        return float("inf")

    def token_endpoint(self, endpoints: IssuerEndpoints, *, deadline: float | None) -> str:
        return f"{_TARGET}/token"


def _decoded(token: str) -> bytes:
    return urlsafe_b64decode(token.split(".")[1] + "==")


def flood(tokens: int, mib: int, entries: int) -> Figures:
    """Let *tokens* new tokens through, each twice."""
    bound = mib * 1024 * 1024
    shells = Shells(cache_bytes=bound, cache_entries=entries)
    now = int(shells.clock.now())
    issuer = _Issuer(now)
    flow = shells.make_flow(load_config(_CONFIG))
    flow._sender = flow._keys = flow._verifier._keys = issuer
    instance: Any = TokenExchangePlugin(lambda _: flow, shells.clock).start(_CONFIG)
    header_at = [fetch.argument for fetch in instance.prefetch].index("authorization")

    def ask(number: int) -> None:
        token = make_token(_PARTNER, number, now)
        flow.run(token, deadline=shells.clock.monotonic() + 5)
        facts = [""] * len(instance.prefetch)
        facts[header_at] = f"Bearer {token}"
        outcome = instance.warm(facts)
        assert outcome is not None
        assert not outcome.is_exit

    for number in range(_WARMUP):
        ask(number)
    before = resident_bytes([os.getpid()])
    started = time.monotonic()
    for number in range(_WARMUP, tokens):
        ask(number)
    seconds, sizes = time.monotonic() - started, shells.cache.sizes()
    return Figures(
        tokens=tokens,
        bound=bound,
        grown=peak_resident_bytes([os.getpid()]) - before,
        kept_verified=sizes["verified_entries"],
        kept_exchanged=sizes["exchanged_entries"],
        weighed=sizes["verified_bytes"] + sizes["exchanged_bytes"],
        evictions=sum(
            count for name, count in shells.metrics.snapshot().items() if name.startswith("cache_evictions")
        ),
        seconds=seconds,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures as JSON; 1 where the bound does not hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS)
    parser.add_argument("--cache-size", type=int, default=DEFAULT_MIB, metavar="MIB")
    parser.add_argument("--cache-entries", type=int, default=10_000, metavar="N")
    options = parser.parse_args(arguments)
    figures = flood(options.tokens, options.cache_size, options.cache_entries)
    grown, bound = figures.grown / 2**20, figures.bound / 2**20
    print(json.dumps({**asdict(figures), "holds": figures.holds}))
    print(
        f"{figures.tokens:,} tokens in {figures.seconds:.0f} s; memory grew by {grown:.0f} MiB, bound"
        f" {bound:.0f} MiB + 20 %: {'holds' if figures.holds else 'BROKEN'}",
        file=sys.stderr,
    )
    return 0 if figures.holds else 1


if __name__ == "__main__":
    sys.exit(main())

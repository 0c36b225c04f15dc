"""
The stories that the demo shows and the integration tests assert.

A story sends one request through a gateway and is judged from outside alone: by the status,
by what reached the upstream, and by whether the very token of an earlier exchange came back.
So the same stories run over the sandbox, over Kong, and over any identity provider that has
the realms of `docker/keycloak`.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import requests

from kong_token_exchange.sandbox.serving import Request
from kong_token_exchange.sandbox.upstream import bearer_token, read_claims

REQUEST_TIMEOUT_S = 30.0

INTERNAL = "http://keycloak:8080/realms/internal"
PARTNER = "http://keycloak:8080/realms/partner"

Claims = Mapping[str, Any]


class IdentityProvider(Protocol):
    """Issues tokens to the demo's applications, and can be stopped."""

    name: str
    address: tuple[str, int]

    def stop(self) -> None:
        """Stop listening; may be called again."""
        ...


class Upstream(Protocol):
    """An API that remembers what has reached it."""

    @property
    def hits(self) -> int:
        """Return how many requests have arrived, whatever their path."""
        ...

    def last_request(self) -> Request | None:
        """Return the newest request."""
        ...


def mint(provider: IdentityProvider, realm: str, client: str, scope: str = "") -> str:
    """
    Log alex in at one client by the password grant and return the access token.

    Source: RFC 6749 section 4.3.
    """
    host, port = provider.address
    form = {"grant_type": "password", "username": "alex", "password": "doe"}
    answer = _session().post(
        f"http://{host}:{port}/realms/{realm}/protocol/openid-connect/token",
        data={**form, "scope": scope} if scope else form,
        auth=(client, f"{client}-secret"),
        timeout=REQUEST_TIMEOUT_S,
    )
    answer.raise_for_status()
    token: str = answer.json()["access_token"]
    return token


class Wallet:
    """Tokens by name, each minted once, so that a later story can send an earlier one's again."""

    def __init__(self, provider: IdentityProvider) -> None:
        self.provider = provider
        self._tokens: dict[str, str] = {}

    def token(self, name: str) -> str:
        """Return the token of that name (see `TOKENS`)."""
        if name not in self._tokens:
            realm, client, scope = TOKENS[name]
            self._tokens[name] = mint(self.provider, realm, client, scope)
        return self._tokens[name]


# Realm, client and scope of each token the stories send.
TOKENS: Mapping[str, tuple[str, str, str]] = {
    "for-the-gateway": ("internal", "client-1", "openid profile orders add-client-2-as-audience"),
    "for-orders-alone": ("internal", "client-1", "openid profile orders"),
    "for-several-apis": ("internal", "client-1", "openid orders reports add-client-2-as-audience"),
    "several-apis-not-the-gateway": ("internal", "client-1", "openid orders reports"),
    "for-nobody-here": ("internal", "client-1", "openid inventory"),
    "short-lived": ("internal", "client-short", "openid orders add-client-2-as-audience"),
    "partner": ("partner", "partner-app", ""),
    "late": ("internal", "client-1", "openid profile orders add-client-2-as-audience"),
}


@dataclass(frozen=True, kw_only=True)
class Story:
    """
    One request and what must come of it.

    `forwarded` lists claims of the token the upstream must have received.
    """

    name: str
    path: str
    decision: str
    status: int
    authorization: Callable[[Wallet], str | None]
    cache: str = ""
    forwarded: Claims = field(default_factory=dict)
    before: Callable[[Wallet], None] | None = None


@dataclass(kw_only=True)
class Row:
    """What happened, as the demo prints it and as JSON has it."""

    story: str
    decision: str
    status: int
    inbound: dict[str, Any] | None
    forwarded: dict[str, Any] | None
    cache: str
    upstream_hits: int
    complaints: list[str] = field(default_factory=list)


def _bearer(name: str) -> Callable[[Wallet], str]:
    return lambda wallet: f"Bearer {wallet.token(name)}"


def _changed(name: str, change: Callable[[str], str]) -> Callable[[Wallet], str]:
    return lambda wallet: f"Bearer {change(wallet.token(name))}"


def _forge(token: str) -> str:
    """Keep header and payload, spoil the signature."""
    head, _, signature = token.rpartition(".")
    return f"{head}.{'B' if signature[0] == 'A' else 'A'}{signature[1:]}"


def _rename_issuer(token: str) -> str:
    """Let the token say that a stranger issued it."""
    head, payload, signature = token.split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    claims["iss"] = "https://stranger.example"
    renamed = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"{head}.{renamed}.{signature}"


def _await_expiry(wallet: Wallet) -> None:
    claims = read_claims(wallet.token("short-lived")) or {}
    time.sleep(max(0.0, min(float(claims["exp"]) - time.time() + 0.2, 10.0)))


def _stop_provider(wallet: Wallet) -> None:
    wallet.token("late")
    wallet.provider.stop()


# The order matters: a cached answer follows the exchange that fills the cache, and the
# identity provider is stopped last.
STORIES: Sequence[Story] = (
    Story(
        name="transformation: client-1's token becomes the gateway's, with less scope",
        path="/orders",
        decision="exchange same_issuer",
        status=200,
        authorization=_bearer("for-the-gateway"),
        cache="miss",
        forwarded={"iss": INTERNAL, "azp": "client-2", "aud": ["orders-api"]},
    ),
    Story(
        name="the same token again",
        path="/orders",
        decision="exchange same_issuer",
        status=200,
        authorization=_bearer("for-the-gateway"),
        cache="hit",
        forwarded={"iss": INTERNAL, "azp": "client-2", "aud": ["orders-api"]},
    ),
    Story(
        name="downscoping: one of several audiences",
        path="/reports",
        decision="exchange same_issuer",
        status=200,
        authorization=_bearer("for-several-apis"),
        cache="miss",
        forwarded={"iss": INTERNAL, "azp": "client-2", "aud": ["reports-api"]},
    ),
    Story(
        name="federation: a partner's token becomes one of ours",
        path="/inventory",
        decision="exchange cross_issuer",
        status=200,
        authorization=_bearer("partner"),
        cache="miss",
        forwarded={"iss": INTERNAL, "azp": "client-2", "aud": ["inventory-api"]},
    ),
    Story(
        name="the partner's single-use assertion again",
        path="/inventory",
        decision="exchange cross_issuer",
        status=200,
        authorization=_bearer("partner"),
        cache="hit",
        forwarded={"iss": INTERNAL, "azp": "client-2", "aud": ["inventory-api"]},
    ),
    Story(
        name="conditions do not match: validated and forwarded as it is",
        path="/orders",
        decision="forward",
        status=200,
        authorization=_bearer("for-orders-alone"),
        forwarded={"iss": INTERNAL, "azp": "client-1", "aud": ["orders-api"]},
    ),
    Story(name="no token", path="/orders", decision="refuse", status=401, authorization=lambda _: None),
    Story(
        name="two tokens in one header",
        path="/orders",
        decision="refuse",
        status=400,
        authorization=lambda wallet: (
            f"Bearer {wallet.token('for-the-gateway')} {wallet.token('for-orders-alone')}"
        ),
    ),
    Story(
        name="expired token",
        path="/orders",
        decision="refuse",
        status=401,
        authorization=_bearer("short-lived"),
        before=_await_expiry,
    ),
    Story(
        name="forged signature",
        path="/orders",
        decision="refuse",
        status=401,
        authorization=_changed("for-the-gateway", _forge),
    ),
    Story(
        name="unknown issuer",
        path="/orders",
        decision="refuse",
        status=401,
        authorization=_changed("for-the-gateway", _rename_issuer),
    ),
    Story(
        name="a partner's token where only our own are exchanged",
        path="/orders",
        decision="refuse",
        status=401,
        authorization=_bearer("partner"),
    ),
    Story(
        name="forwarding refused: the token is for another API",
        path="/orders",
        decision="refuse",
        status=403,
        authorization=_bearer("for-nobody-here"),
    ),
    Story(
        name="the issuer refuses: the token does not name the gateway",
        path="/reports",
        decision="refuse",
        status=403,
        authorization=_bearer("several-apis-not-the-gateway"),
    ),
    Story(
        name="identity provider down, token not cached",
        path="/orders",
        decision="refuse",
        status=503,
        authorization=_bearer("late"),
        before=_stop_provider,
    ),
    Story(
        name="identity provider down, token cached",
        path="/orders",
        decision="exchange same_issuer",
        status=200,
        authorization=_bearer("for-the-gateway"),
        cache="hit",
        forwarded={"iss": INTERNAL, "azp": "client-2", "aud": ["orders-api"]},
    ),
)


class StoryTeller:
    """Tells stories through one gateway and judges them by what the upstreams received."""

    def __init__(self, *, gateway_url: str, wallet: Wallet, upstreams: Mapping[str, Upstream]) -> None:
        self._gateway_url = gateway_url
        self._wallet = wallet
        self._upstreams = upstreams
        # The token each inbound token became at each path, to tell a cached one from a new one.
        self._exchanged: dict[tuple[str, str], str] = {}

    def tell(self, story: Story) -> Row:
        """Send the story's request and return what happened, with every complaint about it."""
        if story.before is not None:
            story.before(self._wallet)
        authorization = story.authorization(self._wallet)
        inbound = (authorization or "").removeprefix("Bearer ")
        hits_before = {name: upstream.hits for name, upstream in self._upstreams.items()}
        answer = _session().get(
            self._gateway_url + story.path,
            headers={"Authorization": authorization} if authorization else {},
            timeout=REQUEST_TIMEOUT_S,
            allow_redirects=False,
        )
        hits = sum(upstream.hits - hits_before[name] for name, upstream in self._upstreams.items())
        forwarded = self._forwarded(hits_before)
        row = Row(
            story=story.name,
            decision=_observed_decision(inbound, forwarded, hits),
            status=answer.status_code,
            inbound=_shown(read_claims(inbound)),
            forwarded=_shown(read_claims(forwarded)) if forwarded else None,
            cache=self._observed_cache(story.path, inbound, forwarded),
            upstream_hits=hits,
        )
        row.complaints = _complaints(story, row)
        return row

    def _forwarded(self, hits_before: Mapping[str, int]) -> str | None:
        for name, upstream in self._upstreams.items():
            if upstream.hits > hits_before[name]:
                request = upstream.last_request()
                return bearer_token(request) if request else None
        return None

    def _observed_cache(self, path: str, inbound: str, forwarded: str | None) -> str:
        if forwarded is None or forwarded == inbound:
            return ""
        earlier = self._exchanged.get((path, inbound))
        self._exchanged[path, inbound] = forwarded
        return "hit" if forwarded == earlier else "miss"


def _observed_decision(inbound: str, forwarded: str | None, hits: int) -> str:
    if not hits:
        return "refuse"
    if forwarded is None:
        return "forward without token"
    if forwarded == inbound:
        return "forward"
    before, after = read_claims(inbound) or {}, read_claims(forwarded) or {}
    return "exchange " + ("same_issuer" if before.get("iss") == after.get("iss") else "cross_issuer")


def _complaints(story: Story, row: Row) -> list[str]:
    found = [
        f"{name} is {got!r}, expected {wanted!r}"
        for name, got, wanted in (
            ("decision", row.decision, story.decision),
            ("status", row.status, story.status),
            ("cache", row.cache, story.cache),
            ("upstream_hits", row.upstream_hits, 0 if story.decision == "refuse" else 1),
        )
        if got != wanted
    ]
    for name, wanted in story.forwarded.items():
        got = (row.forwarded or {}).get(name)
        if got != wanted:
            found.append(f"forwarded {name} is {got!r}, expected {wanted!r}")
    if row.decision.startswith("exchange same") and row.inbound and row.forwarded:
        before, after = set(row.inbound["scope"].split()), set(row.forwarded["scope"].split())
        if not after < before:
            found.append("the forwarded scope is not narrower")
        if row.inbound["sub"] != row.forwarded["sub"]:
            found.append("the subject changed")
    return found


def _shown(claims: Claims | None) -> dict[str, Any] | None:
    if claims is None:
        return None
    aud = claims.get("aud", [])
    return {
        "iss": claims.get("iss"),
        "aud": sorted([aud] if isinstance(aud, str) else aud),
        "azp": claims.get("azp"),
        "sub": claims.get("sub"),
        "scope": claims.get("scope", ""),
    }


def _session() -> requests.Session:
    session = requests.Session()
    # The environment's proxies and .netrc have no say on loopback.
    session.trust_env = False
    return session

"""
Marked tokens and secrets through every outcome; the marks may reach the upstream, and nothing else.

OUT-12, OUT-13, OUT-14; invariant I6.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from kong_token_exchange.sandbox.demo import ISSUER_ADDRESS, UPSTREAM_ADDRESSES
from kong_token_exchange.sandbox.issuer import Issuer, IssuerServer, SigningKey, default_realms
from kong_token_exchange.sandbox.serving import Fault
from kong_token_exchange.sandbox.upstream import EchoUpstream, bearer_token
from tests.support.gateways import KongOnPath, SandboxBackend, kong_version, load_declarative

pytestmark = pytest.mark.integration

SECRET = "MARKsecretQ7w"
CLAIM = "MARKclaimX9z"
ISSUER_TEXT = "MARKissuertextP3k"


def marked_issuers() -> dict[str, Issuer]:
    issuers = default_realms()
    internal = issuers["internal"]
    clients = dict(internal.realm.clients)
    clients["client-2"] = dataclasses.replace(clients["client-2"], secret=SECRET)
    internal.realm = dataclasses.replace(internal.realm, clients=clients)
    return issuers


def marked_config(secret: str = SECRET) -> dict[str, Any]:
    config = load_declarative()
    for service in config["services"]:
        for route in service["routes"]:
            for plugin in route["plugins"]:
                plugin["config"]["client_secret"] = [secret]
    return config


@pytest.fixture
def issuer_server() -> Iterator[IssuerServer]:
    with IssuerServer(marked_issuers()) as server:
        yield server


@pytest.fixture(params=["kong", "sandbox"])
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "sandbox":
        return SandboxBackend
    if kong_version() is None:
        pytest.skip("no real Kong: no `kong` on PATH")
    return KongOnPath


class Probe:
    """Sends marked requests and keeps everything that comes back."""

    def __init__(self, url: str, server: IssuerServer) -> None:
        self.url = url
        self.server = server
        self.statuses: list[int] = []
        self.answers: list[str] = []
        self.tokens: list[str] = []

    def send(self, path: str, token: str | None, header: str | None = None) -> None:
        if token is not None:
            self.tokens.append(token)
        value = header if header is not None else (f"Bearer {token}" if token else None)
        headers = {"Authorization": value.encode("latin-1")} if value else {}
        answer = requests.get(self.url + path, headers=headers, timeout=30)
        self.statuses.append(answer.status_code)
        if answer.status_code != 200:
            self.answers.append(f"{dict(answer.headers)} {answer.text}")

    def token(self, *scopes: str, **changes: Any) -> str:
        return self.server.issuers["internal"].mint(scopes=scopes, mark=CLAIM, **changes)


def tell_every_outcome(probe: Probe) -> None:
    server = probe.server
    endpoint = server.token_path("internal")
    gateway = "add-client-2-as-audience"
    good = probe.token("orders", gateway)
    probe.send("/orders", good)
    probe.send("/orders", good)
    probe.send("/orders", probe.token("orders"))
    probe.send("/orders", None)
    probe.send("/orders", good, f"Bearer {good} {good}")
    probe.send("/orders", good, f"Bearer {good}\xff")
    probe.send("/orders", good, f"Bearer {good}\t")
    probe.send("/orders", probe.token("orders", gateway, life_s=-10))
    probe.send("/orders", probe.token("orders", gateway, key=SigningKey.generate()))
    probe.send("/orders", probe.token("orders", gateway, header={"kid": "stranger-kid"}))
    probe.send("/orders", probe.token("orders", gateway, header={"alg": CLAIM[:31]}))
    probe.send("/orders", probe.token("orders", gateway, iss=f"https://{CLAIM}.example"))
    probe.send("/orders", probe.token("orders", gateway, aud=[CLAIM]))
    probe.send("/orders", probe.token("orders", gateway, sub={"x": CLAIM}))
    probe.send("/reports", probe.token("orders", "reports"))
    for fault in (
        Fault(status=400, body=b'{"error":"invalid_grant","error_description":"%s"}' % ISSUER_TEXT.encode()),
        Fault(status=400, body=b'{"error":"%s"}' % ISSUER_TEXT.encode()),
        Fault(status=401, body=b'{"error":"invalid_client","error_description":"%s"}' % SECRET.encode()),
        Fault(status=403, body=b'{"error":"access_denied","error_description":"%s"}' % ISSUER_TEXT.encode()),
        Fault(status=200, body=b"<html>%s</html>" % ISSUER_TEXT.encode()),
        Fault(status=200, body=b'{"access_token":"%s","token_type":"Bearer"}' % ISSUER_TEXT.encode()),
        Fault(status=302, headers=(("Location", f"http://127.0.0.1:1/{ISSUER_TEXT}"),), body=b""),
        Fault(status=500, body=ISSUER_TEXT.encode()),
        Fault(status=429, body=ISSUER_TEXT.encode()),
        Fault(drop=True),
    ):
        server.set_fault(endpoint, fault)
        probe.send("/orders", probe.token("orders", gateway))
    server.clear_faults()


def marks_of(token: str) -> list[str]:
    # Header and signature of every kind of token; the header alone is the same for all.
    _, payload, signature = token.split(".")
    return [payload[-40:], signature[:40]]


@pytest.mark.parametrize("secret", [SECRET, "MARKwrongsecretL5"], ids=["secret-accepted", "secret-refused"])
def test_out_12_marks_reach_the_upstream_alone(
    backend: Any, issuer_server: IssuerServer, upstreams: dict[str, EchoUpstream], secret: str
) -> None:
    gateway = backend(
        marked_config(secret),
        upstreams={UPSTREAM_ADDRESSES[name]: server.address for name, server in upstreams.items()},
        issuers={ISSUER_ADDRESS: issuer_server.address},
        log_level="debug",
    )
    try:
        probe = Probe(gateway.url, issuer_server)
        tell_every_outcome(probe)
    finally:
        gateway.stop()

    exchanged = [
        bearer_token(request) or "" for server in upstreams.values() for request in server.log.requests
    ]
    told = gateway.logs() + "\n".join(probe.answers)
    marks = [SECRET, secret, ISSUER_TEXT, CLAIM]
    marks += [
        mark for token in {*probe.tokens, *exchanged} if token.count(".") == 2 for mark in marks_of(token)
    ]
    assert [] == [mark for mark in marks if mark in told]
    assert {200, 400, 401, 403, 500, 502, 503} >= set(probe.statuses) >= {200, 400, 401, 500}
    if secret == SECRET:
        assert exchanged
        assert {200, 400, 401, 403, 500, 502, 503} == set(probe.statuses)

"""
Fixtures over every backend that is present, in the order of docs/testing.md.

A test that takes `gateway` and `identity_provider` runs once per pair of backends; what is not
there is skipped with its reason, and the run's last lines say what was used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from kong_token_exchange.sandbox.demo import (
    ISSUER_ADDRESS,
    REALMS,
    UPSTREAM_ADDRESSES,
    KeycloakProvider,
    SandboxProvider,
)
from kong_token_exchange.sandbox.issuer import IssuerServer
from kong_token_exchange.sandbox.keycloak import KeycloakUnavailableError, find_distribution
from kong_token_exchange.sandbox.upstream import EchoUpstream
from tests.support.gateways import ROOT, Gateway, KongOnPath, SandboxBackend, kong_version, load_declarative
from tests.support.relay import Relay
from tests.support.stage import Stage

GATEWAYS = ("kong", "sandbox")
PROVIDERS = ("keycloak", "sandbox")


@dataclass
class RelayedProvider:
    """An identity provider behind a relay, so that it can go down and come back."""

    name: str
    relay: Relay

    @property
    def address(self) -> tuple[str, int]:
        return self.relay.address

    def stop(self) -> None:
        self.relay.down()


@pytest.fixture(scope="session")
def started_providers() -> Iterator[dict[str, Any]]:
    """Providers that have been started, by name: a Keycloak serves the whole session."""
    started: dict[str, Any] = {}
    yield started
    for provider in started.values():
        provider.stop()


@pytest.fixture(params=PROVIDERS, scope="session")
def provider_backend(
    request: pytest.FixtureRequest, started_providers: dict[str, Any], pytestconfig: pytest.Config
) -> Any:
    kind: str = request.param
    if kind not in started_providers:
        if kind == "keycloak":
            try:
                find_distribution()
            except KeycloakUnavailableError as exc:
                pytest.skip(f"no real Keycloak: {exc}")
            started_providers[kind] = KeycloakProvider(ROOT / REALMS)
        else:
            started_providers[kind] = SandboxProvider()
    note_backend(pytestconfig, "identity_provider", started_providers[kind].name)
    return started_providers[kind]


@pytest.fixture
def identity_provider(provider_backend: Any) -> Iterator[RelayedProvider]:
    relay = Relay(provider_backend.address)
    yield RelayedProvider(provider_backend.name, relay)
    relay.down()


@pytest.fixture
def upstreams() -> Iterator[dict[str, EchoUpstream]]:
    servers = {name: EchoUpstream() for name in UPSTREAM_ADDRESSES}
    for server in servers.values():
        server.start()
    yield servers
    for server in servers.values():
        server.stop()


@pytest.fixture(params=GATEWAYS)
def make_gateway(
    request: pytest.FixtureRequest,
    identity_provider: RelayedProvider,
    upstreams: dict[str, EchoUpstream],
    pytestconfig: pytest.Config,
) -> Iterator[Any]:
    """Start a gateway of this backend over a declarative configuration; stopped after the test."""
    if request.param == "kong" and kong_version() is None:
        pytest.skip("no real Kong: no `kong` on PATH")
    started: list[Gateway] = []

    def make(config: Any = None) -> Gateway:
        backend = KongOnPath if request.param == "kong" else SandboxBackend
        gateway = backend(
            load_declarative() if config is None else config,
            upstreams={UPSTREAM_ADDRESSES[name]: server.address for name, server in upstreams.items()},
            issuers={ISSUER_ADDRESS: identity_provider.address},
        )
        started.append(gateway)
        note_backend(pytestconfig, "gateway", gateway.name)
        return gateway

    yield make
    for gateway in started:
        gateway.stop()


@pytest.fixture
def gateway(make_gateway: Any) -> Gateway:
    return make_gateway()


@pytest.fixture(params=["kong", "sandbox"])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    if request.param == "kong" and kong_version() is None:
        pytest.skip("no real Kong: no `kong` on PATH")
    with IssuerServer() as issuers, EchoUpstream() as upstream:
        made = Stage(KongOnPath if request.param == "kong" else SandboxBackend, issuers, upstream)
        yield made
        if made.gateway is not None:
            made.gateway.stop()


# --- what was used --------------------------------------------------------------------

_USED = pytest.StashKey[dict[str, list[str]]]()


def note_backend(config: pytest.Config, kind: str, name: str) -> None:
    used = config.stash.setdefault(_USED, {}).setdefault(kind, [])
    if name not in used:
        used.append(name)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    used = config.stash.get(_USED, {})
    if used:
        parts = (
            f"{kind}={'|'.join(used.get(kind, ['none']))}"
            for kind in ("gateway", "identity_provider", "redis")
        )
        terminalreporter.write_line("backends: " + " ".join(parts))
    if os.environ.get("CI") and "gateway" not in used:
        terminalreporter.write_line("backends: no integration test ran")

"""
Fixtures over every backend that is present, in the order of docs/testing.md.

A test that takes `gateway` and `identity_provider` runs once per pair of backends (`PAIRS`); what is
not there is skipped with its reason, and the run's last lines say what was used.
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
from tests.support.containers import (
    KONG_IMAGE,
    PLUGIN_SERVER_IMAGE,
    ContainersUnavailableError,
    KeycloakContainer,
    KongContainers,
    require_images,
)
from tests.support.gateways import ROOT, Gateway, KongOnPath, SandboxBackend, kong_version, load_declarative
from tests.support.relay import Relay
from tests.support.stage import Stage

GATEWAYS = ("containers", "kong", "sandbox")
PROVIDERS = ("keycloak-container", "keycloak", "sandbox")

# Containers meet each other alone: whatever they could show beside the others, these show already.
PAIRS = [
    ("containers", "keycloak-container"),
    *((gateway, provider) for gateway in ("kong", "sandbox") for provider in ("keycloak", "sandbox")),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Drop the pairs of backends that nobody needs."""

    def wanted(item: pytest.Item) -> bool:
        parameters = getattr(item, "callspec", None)
        chosen = parameters.params if parameters is not None else {}
        pair = (chosen.get("make_gateway"), chosen.get("provider_backend"))
        return None in pair or pair in PAIRS

    items[:] = [item for item in items if wanted(item)]


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
        elif kind == "keycloak-container":
            try:
                started_providers[kind] = KeycloakContainer(ROOT / REALMS)
            except ContainersUnavailableError as exc:
                pytest.skip(f"no containers: {exc}")
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
    backend = gateway_backend(request.param)
    started: list[Gateway] = []

    def make(config: Any = None) -> Gateway:
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


def gateway_backend(kind: str) -> Any:
    """Return the class of that backend, or skip the test with the reason."""
    if kind == "sandbox":
        return SandboxBackend
    if kind == "kong":
        if kong_version() is None:
            pytest.skip("no real Kong: no `kong` on PATH")
        return KongOnPath
    try:
        require_images(KONG_IMAGE, PLUGIN_SERVER_IMAGE)
    except ContainersUnavailableError as exc:
        pytest.skip(f"no containers: {exc}")
    return KongContainers


@pytest.fixture(params=["kong", "sandbox"])
def stage(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Iterator[Stage]:
    """One real Kong and the sandbox: that on PATH, which starts fastest, else containers."""
    kind = "containers" if request.param == "kong" and kong_version() is None else request.param
    with IssuerServer() as issuers, EchoUpstream() as upstream:
        made = Stage(gateway_backend(kind), issuers, upstream)
        yield made
        if made.gateway is not None:
            note_backend(pytestconfig, "gateway", made.gateway.name)
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

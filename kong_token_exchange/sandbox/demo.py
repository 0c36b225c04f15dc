"""
The demo: a gateway, an identity provider and upstreams on loopback, and every story through them.

It starts the real plugin server process; the gateway and, unless a Keycloak is asked for, the
issuers are the sandbox's. Or it takes what `docker/compose.yml` has started: real Kong, the plugin
server as its sidecar, real Keycloak.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kong_token_exchange.sandbox.compose import (
    COMPOSE_FILE,
    ComposeStage,
    ComposeUnavailableError,
    compose_command,
)
from kong_token_exchange.sandbox.gateway import SandboxGateway
from kong_token_exchange.sandbox.issuer import IssuerServer
from kong_token_exchange.sandbox.keycloak import Keycloak, KeycloakUnavailableError
from kong_token_exchange.sandbox.stories import STORIES, Row, StoryTeller, Wallet
from kong_token_exchange.sandbox.upstream import EchoUpstream

# Names of the compose network, which kong.yml uses.
ISSUER_ADDRESS = "keycloak:8080"
UPSTREAM_ADDRESSES = {"orders": "orders:8080", "inventory": "inventory:8080"}
REALMS = Path("docker/keycloak")


class SandboxProvider:
    """The sandbox's issuers as an identity provider of the stories."""

    name = "sandbox"

    def __init__(self) -> None:
        self.server = IssuerServer()
        self.server.start()
        self.address = self.server.address

    def stop(self) -> None:
        """Stop listening."""
        self.server.stop()


class KeycloakProvider:
    """A real Keycloak from its distribution, with the realms of `docker/keycloak`."""

    def __init__(self, realms: Path = REALMS) -> None:
        self.keycloak = Keycloak.start(realms=realms)
        self.name = f"keycloak-{self.keycloak.version}(distribution)"
        self.address = ("127.0.0.1", self.keycloak.port)

    def stop(self) -> None:
        """Stop the server; may be called again."""
        self.keycloak.stop()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage that is up, the names of what is on it, and who tells the stories there."""

    gateway: str
    identity_provider: str
    teller: StoryTeller


def run_demo(*, config: Path, gateway: str, identity_provider: str | None, json_path: Path | None) -> int:
    """
    Tell every story, print the table and return 0 when each row is as expected.

    Args:
        config: The declarative configuration of the gateway.
        gateway: `sandbox`, or `compose` for what `docker/compose.yml` has started.
        identity_provider: `sandbox` or `keycloak`; None takes the gateway's own.
        json_path: Where the rows are written as JSON, too.
    """
    try:
        with _stage(config, gateway, identity_provider) as stage:
            print(f"gateway: {stage.gateway}   identity provider: {stage.identity_provider}", end="")
            print(f"   configuration: {config}\n")
            rows = [_tell(stage.teller, number, index) for number, index in enumerate(STORIES, 1)]
    except KeycloakUnavailableError as exc:
        print(f"no Keycloak here: {exc}", file=sys.stderr)
        return 2
    except ComposeUnavailableError as exc:
        print(f"no compose stage here: {exc}", file=sys.stderr)
        return 2
    if json_path is not None:
        json_path.write_text(json.dumps(_as_json(stage, rows), indent=2) + "\n", encoding="utf-8")
    failed = [row for row in rows if row.complaints]
    print(f"\n{len(rows) - len(failed)} of {len(rows)} rows are as expected")
    return 1 if failed else 0


def _stage(
    config: Path, gateway: str, identity_provider: str | None
) -> contextlib.AbstractContextManager[Stage]:
    if gateway != "compose":
        return embedded_stage(config, identity_provider or "sandbox")
    # Its Kong has read the file beside the compose file already.
    if identity_provider == "sandbox" or config.resolve() != (COMPOSE_FILE.parent / "../kong.yml").resolve():
        raise ComposeUnavailableError("its configuration is kong.yml, and its identity provider is Keycloak")
    return compose_stage()


@contextlib.contextmanager
def embedded_stage(config: Path, identity_provider: str) -> Iterator[Stage]:
    """Start everything on loopback and stop it again."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kong-token-exchange-")))
        provider = KeycloakProvider() if identity_provider == "keycloak" else SandboxProvider()
        stack.callback(provider.stop)
        upstreams = {name: stack.enter_context(EchoUpstream()) for name in UPSTREAM_ADDRESSES}
        resolve = {UPSTREAM_ADDRESSES[name]: upstream.address for name, upstream in upstreams.items()}
        socket_path = folder / "token-exchange.socket"
        gateway = stack.enter_context(
            SandboxGateway(
                config,
                plugin_command=serve_command(socket_path, {ISSUER_ADDRESS: provider.address}),
                query_command=[sys.executable, "-m", "kong_token_exchange", "describe"],
                socket_path=socket_path,
                resolve=resolve,
                log=folder / "gateway.log",
            )
        )
        teller = StoryTeller(gateway_url=gateway.url, wallet=Wallet(provider), upstreams=upstreams)
        yield Stage(gateway="sandbox", identity_provider=provider.name, teller=teller)


@contextlib.contextmanager
def compose_stage() -> Iterator[Stage]:
    """Take what is up, and leave it as it was: the stories stop Keycloak."""
    up = ComposeStage(compose_command(COMPOSE_FILE))
    up.provider.await_ready()
    try:
        teller = StoryTeller(gateway_url=up.url, wallet=Wallet(up.provider), upstreams=up.upstreams)
        yield Stage(gateway=up.gateway_name, identity_provider=up.provider.name, teller=teller)
    finally:
        up.provider.start()


def serve_command(
    socket_path: Path, resolve: Mapping[str, tuple[str, int]], *, log_level: str = "info"
) -> list[str]:
    """Return the command that serves the plugin, with names of the compose network resolved."""
    command = [sys.executable, "-m", "kong_token_exchange", "serve", "--socket", str(socket_path)]
    command += ["--exit-with-parent", "--log-level", log_level]
    for name, (host, port) in resolve.items():
        command += ["--resolve", f"{name}={host}:{port}"]
    return command


# --- the table ------------------------------------------------------------------------


def _tell(teller: StoryTeller, number: int, story: Any) -> Row:
    row = teller.tell(story)
    print_row(number, row)
    return row


def print_row(number: int, row: Row) -> None:
    """Print one row: what happened, then the claims that came in and the claims that went on."""
    mark = "  " if not row.complaints else "!!"
    print(f"{mark}{number:2} {row.story}")
    print(
        f"      {row.decision:<22} {row.status}   "
        f"cache: {row.cache or '-':<4} upstream hits: {row.upstream_hits}"
    )
    for label, claims in (("inbound", row.inbound), ("forwarded", row.forwarded)):
        if claims is not None:
            print(f"      {label:<10}{_claims_line(claims)}")
    for complaint in row.complaints:
        print(f"      NOT AS EXPECTED: {complaint}")


def _claims_line(claims: Mapping[str, Any]) -> str:
    realm = str(claims["iss"]).rpartition("/")[2]
    aud = ",".join(value.rpartition("/")[2] if "/realms/" in value else value for value in claims["aud"])
    subject = str(claims["sub"])[:8]
    return f"iss={realm} aud={aud or '-'} azp={claims['azp']} sub={subject} scope={claims['scope']}"


def _as_json(stage: Stage, rows: Sequence[Row]) -> dict[str, Any]:
    members = [{name: value for name, value in asdict(row).items() if name != "complaints"} for row in rows]
    return {"gateway": stage.gateway, "identity_provider": stage.identity_provider, "rows": members}

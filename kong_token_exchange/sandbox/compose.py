"""
The services of `docker/compose.yml` as they run: for the demo, and for the integration tests.

Nothing is built or pulled here: `make up` does that. Addresses come from the engine, so ports that
were set in the environment of `make up` need not be set again.

Source: docker/README.md.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import requests

from kong_token_exchange.sandbox.serving import Request

COMPOSE_FILE = Path("docker/compose.yml")

# The port inside each container that the demo talks to.
PORTS: Mapping[str, int] = {"kong": 8000, "keycloak": 8080, "orders": 8081, "inventory": 8081}
SERVICES = ("plugin-server", *PORTS)
REALMS = ("internal", "partner")

# A Java process on a small, busy machine: minutes rather than seconds.
START_TIMEOUT_S = 600.0
_COMMAND_TIMEOUT_S = 120.0
_REQUEST_TIMEOUT_S = 30.0
_PAUSE_S = 0.2


class ComposeUnavailableError(Exception):
    """No engine answers, or the services are not up; the text says which."""


Run = Callable[[Sequence[str]], str]


def compose_command(file: Path) -> Run:
    """Return a function that runs one `docker compose` command on *file*'s own project."""

    def run(arguments: Sequence[str]) -> str:
        command = ["docker", "compose", "-f", str(file), *arguments]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=_COMMAND_TIMEOUT_S
            )
        except FileNotFoundError:
            raise ComposeUnavailableError("no `docker` on PATH") from None
        except subprocess.TimeoutExpired:
            raise ComposeUnavailableError(f"docker compose {arguments[0]}: no answer") from None
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ComposeUnavailableError(f"docker compose {arguments[0]}: {last}")
        return done.stdout

    return run


class ComposeStage:
    """
    Gateway, identity provider and upstreams of a compose project that is up.

    Args:
        run: Runs one `docker compose` command on the project.

    Raises:
        ComposeUnavailableError: no engine, or a service is not running.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        addresses = _addresses(run(["ps", "--format", "json"]))
        missing = [service for service in SERVICES if service not in addresses]
        if missing:
            raise ComposeUnavailableError(f"not running: {', '.join(missing)} (make up)")
        self.addresses = {service: addresses[service] for service in PORTS}
        self.url = _url(self.addresses["kong"])
        self.provider = ComposeProvider(run, self.addresses["keycloak"])
        self.upstreams = {
            name: RemoteUpstream(_url(self.addresses[name])) for name in ("orders", "inventory")
        }

    @property
    def gateway_name(self) -> str:
        """Return Kong's name and version, as Kong answers."""
        server = _get(self.url + "/no-such-route").headers.get("Server", "unknown")
        return f"{server.replace('/', '-')}(compose)"


class ComposeProvider:
    """The project's Keycloak as an identity provider of the stories."""

    def __init__(self, run: Run, address: tuple[str, int]) -> None:
        self._run = run
        self.address = address
        told = re.search(r"\d+(\.\d+)+", run(["exec", "-T", "keycloak", "cat", "/opt/keycloak/version.txt"]))
        self.name = f"keycloak-{told[0] if told else 'unknown'}(compose)"

    def await_ready(self) -> None:
        """
        Return once every realm answers.

        Raises:
            ComposeUnavailableError: not within 600 s.
        """
        for realm in REALMS:
            await_status(f"{_url(self.address)}/realms/{realm}", 200)

    def stop(self) -> None:
        """Stop the container; may be called again."""
        self._run(["stop", "--timeout", "1", "keycloak"])

    def start(self) -> None:
        """Start the container again; `await_ready` tells when it answers."""
        self._run(["start", "keycloak"])


class RemoteUpstream:
    """An echo API in a container, seen through its second port."""

    def __init__(self, log_url: str) -> None:
        self._log_url = log_url

    @property
    def hits(self) -> int:
        """Return how many requests have arrived, whatever their path."""
        hits: int = self._shown()["hits"]
        return hits

    def last_request(self) -> Request | None:
        """Return the newest request, without its body."""
        last = self._shown()["last"]
        if last is None:
            return None
        return Request("GET", last["path"], tuple((name, value) for name, value in last["headers"]), b"")

    def _shown(self) -> Any:
        return _get(self._log_url).json()


def await_status(url: str, status: int) -> None:
    """
    Wait until *url* answers so.

    Raises:
        ComposeUnavailableError: not within 600 s.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if _get(url).status_code == status:
                return
        except requests.RequestException:
            pass
        time.sleep(_PAUSE_S)
    raise ComposeUnavailableError(f"{url} does not answer {status}")


def _addresses(listed: str) -> dict[str, tuple[str, int]]:
    """Return where each running service is published; the sidecar, which is not, has port 0."""
    # One object a line, or one list of them: that differs between versions of compose.
    documents = [json.loads(line) for line in listed.splitlines() if line.strip()]
    services = documents[0] if documents and isinstance(documents[0], list) else documents
    found = {}
    for one in services:
        wanted = PORTS.get(one["Service"])
        published = [
            port["PublishedPort"]
            for port in one.get("Publishers") or ()
            if port["TargetPort"] == wanted and port["PublishedPort"]
        ]
        if one["State"] == "running" and (published or wanted is None):
            found[one["Service"]] = ("127.0.0.1", published[0] if published else 0)
    return found


def _url(address: tuple[str, int]) -> str:
    return f"http://{address[0]}:{address[1]}"


def _get(url: str) -> requests.Response:
    with requests.Session() as session:
        # The environment's proxies have no say on loopback.
        session.trust_env = False
        return session.get(url, timeout=_REQUEST_TIMEOUT_S, allow_redirects=False)

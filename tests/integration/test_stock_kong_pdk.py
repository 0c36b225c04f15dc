"""
The plugin under kong-pdk's own server, on a real Kong, behind the latch of docs/operations.md.

That server speaks MsgPack:1, with which Kong lets requests through when the server fails: the
tests without the latch show the hole, so that nobody takes the latch for decoration.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from kong_token_exchange.sandbox.issuer import IssuerServer
from kong_token_exchange.sandbox.upstream import EchoUpstream, bearer_token
from tests.support.gateways import ROOT, KongOnPath, kong_version, load_declarative, wait_until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(kong_version() is None, reason="no real Kong: no `kong` on PATH"),
]

# How long Kong waits for a plugin server that hangs; 60 s unless set.
READ_TIMEOUT_S = 6


def documented_latch() -> dict[str, Any]:
    """The second plugin of the first block in docs/operations.md that has a latch."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        for plugin in yaml.safe_load(block).get("plugins", []):
            if plugin["name"] == "post-function":
                found: dict[str, Any] = plugin
                return found
    raise LookupError("the latch")


class StockKong(KongOnPath):
    """A Kong whose plugin server is kong-pdk's."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kte-", dir="/tmp"))
        command = f"{sys.executable} -m kong_token_exchange.stock"
        super().__init__(
            config,
            upstreams={},
            issuers={},
            settings={
                "pluginserver_token_exchange_socket": str(self.folder / "token-exchange.sock"),
                "pluginserver_token_exchange_query_cmd": f"{command} --dump",
                "pluginserver_token_exchange_start_cmd": f"{command} -p {self.folder}",
                "nginx_http_lua_socket_read_timeout": f"{READ_TIMEOUT_S}s",
            },
        )

    def _await_ready(self) -> None:
        self.socket_path = self.folder / "token-exchange.sock"
        super()._await_ready()

    def stop(self) -> None:
        super().stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def server_pid(self) -> int | None:
        """The plugin server, by its command line; None while there is none."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    command = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if b"kong_token_exchange.stock" in command and os.fsencode(self.folder) in command:
                    return int(entry.name)
        return None


class Stage:
    def __init__(self, issuers: IssuerServer, upstream: EchoUpstream, *, latch: bool) -> None:
        self.issuers = issuers
        self.upstream = upstream
        self.kong = StockKong(self._config(latch=latch))

    def _config(self, *, latch: bool) -> dict[str, Any]:
        config = load_declarative()["services"][0]["routes"][0]["plugins"][0]["config"]
        realm = f"{self.issuers.url}/realms/internal/protocol/openid-connect"
        # This server takes no `--resolve`, so the endpoints are named instead of discovered.
        config.update(token_endpoint=f"{realm}/token", jwks_endpoint=f"{realm}/certs")
        plugins = [{"name": "token-exchange", "config": config}, *([documented_latch()] if latch else [])]
        routes = [{"name": "orders", "paths": ["/orders"], "plugins": plugins}]
        return {
            "_format_version": "3.0",
            "services": [{"name": "orders", "url": self.upstream.url, "routes": routes}],
        }

    def token(self) -> str:
        return self.issuers.issuers["internal"].mint(scopes=("orders", "add-client-2-as-audience"))

    def get(self, token: str | None, **headers: Any) -> requests.Response:
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        return requests.get(self.kong.url + "/orders", headers=headers, timeout=30)

    def forwarded(self) -> str | None:
        request = self.upstream.log.last()
        return bearer_token(request) if request else None


@pytest.fixture(params=[True, False], ids=["latch", "no-latch"])
def either(request: pytest.FixtureRequest) -> Iterator[Stage]:
    yield from staged(latch=request.param)


@pytest.fixture
def stage() -> Iterator[Stage]:
    yield from staged(latch=True)


def staged(*, latch: bool) -> Iterator[Stage]:
    with IssuerServer() as issuers, EchoUpstream() as upstream:
        made = Stage(issuers, upstream, latch=latch)
        yield made
        made.kong.stop()


def test_the_main_job_works_and_refuses(stage: Stage) -> None:
    token = stage.token()

    answer = stage.get(token)

    assert (200, "client-2") == (answer.status_code, answer.json()["claims"]["azp"])
    exchanged = stage.forwarded()
    assert (200, exchanged) == (stage.get(token).status_code, stage.forwarded())
    hits = stage.upstream.hits
    no_token, garbage = stage.get(None), stage.get("garbage")
    assert (401, "Bearer") == (no_token.status_code, no_token.headers["WWW-Authenticate"].partition(" ")[0])
    assert (401, "invalid_token") == (garbage.status_code, garbage.json()["error"])
    assert hits == stage.upstream.hits
    # A refusal must not leave the next request without an answer.
    assert 200 == stage.get(token).status_code


def kill_server(stage: Stage) -> None:
    """Kill the server and whatever Kong starts in its place, until one request was answered without any."""
    pid = stage.kong.server_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def test_gw_01_a_killed_server_opens_the_gate_unless_it_is_latched(either: Stage, request: Any) -> None:
    latched = "no-latch" not in request.node.callspec.id
    token = either.token()
    assert 200 == either.get(token).status_code
    hits = either.upstream.hits

    kill_server(either)
    during = [either.get("not-even-a-token").status_code for _ in range(10)]

    if latched:
        assert set(during) <= {503, 401, 500}
        assert 503 in during
        assert hits == either.upstream.hits
    else:
        # If this fails, Kong has become safe by itself and the latch is no longer needed.
        assert 200 in during
        assert "not-even-a-token" == either.forwarded()
    assert wait_until(lambda: either.get(token).status_code == 200 and either.forwarded() != token)


def test_gw_03_a_server_that_hangs_does_not_open_the_gate(stage: Stage) -> None:
    token = stage.token()
    assert 200 == stage.get(token).status_code
    hits = stage.upstream.hits
    pid = stage.kong.server_pid()
    assert pid is not None

    os.kill(pid, signal.SIGSTOP)
    try:
        answer = stage.get(token)
    finally:
        os.kill(pid, signal.SIGCONT)

    assert (503, hits) == (answer.status_code, stage.upstream.hits)
    assert wait_until(lambda: stage.get(token).status_code == 200)


def test_gw_04_bytes_above_ascii_do_not_open_the_gate(stage: Stage) -> None:
    token = stage.token()
    assert 200 == stage.get(token).status_code
    hits = stage.upstream.hits

    answer = stage.get(None, Authorization=b"Bearer evil\xff")

    assert 400 <= answer.status_code < 600
    assert hits == stage.upstream.hits
    assert wait_until(lambda: stage.get(token).status_code == 200)

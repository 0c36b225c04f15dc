"""What a gateway and the plugin server do together, beyond the stories."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from kong_token_exchange.sandbox.demo import ISSUER_ADDRESS, UPSTREAM_ADDRESSES
from kong_token_exchange.sandbox.issuer import IssuerServer
from kong_token_exchange.sandbox.upstream import EchoUpstream, bearer_token
from tests.support.gateways import (
    KongOnPath,
    SandboxBackend,
    kong_version,
    load_declarative,
    plugin_server_pids,
    wait_until,
)

pytestmark = pytest.mark.integration


class Stage:
    """One gateway over the sandbox issuers and an echo upstream."""

    def __init__(self, backend: Any, issuers: IssuerServer, upstream: EchoUpstream) -> None:
        self._backend = backend
        self.issuers = issuers
        self.upstream = upstream
        self.gateway: Any = None

    def start(self, config: dict[str, Any]) -> None:
        self.gateway = self._backend(
            config,
            upstreams=dict.fromkeys(UPSTREAM_ADDRESSES.values(), self.upstream.address),
            issuers={ISSUER_ADDRESS: self.issuers.address},
        )

    def token(self, *scopes: str, **changes: Any) -> str:
        return self.issuers.issuers["internal"].mint(
            scopes=scopes or ("orders", "add-client-2-as-audience"), **changes
        )

    def get(self, path: str = "/orders", token: str | None = None, **options: Any) -> requests.Response:
        headers = options.pop("headers", {})
        if token is not None:
            headers = {"Authorization": f"Bearer {token}", **headers}
        return requests.get(self.gateway.url + path, headers=headers, timeout=30, **options)

    def forwarded(self) -> str | None:
        request = self.upstream.log.last()
        return bearer_token(request) if request else None


@pytest.fixture(params=["kong", "sandbox"])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    if request.param == "kong" and kong_version() is None:
        pytest.skip("no real Kong: no `kong` on PATH")
    with IssuerServer() as issuers, EchoUpstream() as upstream:
        made = Stage(KongOnPath if request.param == "kong" else SandboxBackend, issuers, upstream)
        yield made
        if made.gateway is not None:
            made.gateway.stop()


def one_route(**changes: Any) -> dict[str, Any]:
    """`kong.yml` with the first route's plugin alone, its configuration changed."""
    config = load_declarative()
    service = config["services"][0]
    route = service["routes"][0]
    route["plugins"][0]["config"].update(changes)
    return {**config, "services": [{**service, "routes": [route]}]}


def test_gw_01_nothing_passes_while_the_plugin_server_is_dead(stage: Stage) -> None:
    stage.start(one_route())
    token = stage.token()
    assert 200 == stage.get(token=token).status_code
    hits = stage.upstream.hits

    (pid,) = plugin_server_pids(stage.gateway.socket_path)
    os.kill(pid, signal.SIGKILL)
    statuses = {stage.get(token="not-even-a-token").status_code for _ in range(20)}

    assert statuses <= {401, 500}
    assert hits == stage.upstream.hits
    assert wait_until(lambda: stage.get(token=token).status_code == 200)
    assert stage.forwarded() not in (None, token)


def test_gw_04_and_hdr_13_bytes_above_ascii_are_a_bad_request(stage: Stage) -> None:
    stage.start(one_route())

    answer = stage.get(headers={"Authorization": b"Bearer evil\xff"})

    assert (400, 0) == (answer.status_code, stage.upstream.hits)
    assert {
        "error": "invalid_request",
        "error_description": "the bearer credential is malformed",
    } == answer.json()


def test_hdr_08_two_authorization_headers_are_a_bad_request(stage: Stage) -> None:
    stage.start(one_route())
    host, _, port = stage.gateway.url.removeprefix("http://").partition(":")
    token = stage.token()

    status = raw_status(host, int(port), [f"Authorization: Bearer {token}"] * 2)

    assert (400, 0) == (status, stage.upstream.hits)


@pytest.mark.parametrize("listed", ["Authorization", "keep-alive, AUTHORIZATION"])
def test_gw_20_out_03_connection_cannot_strip_the_credential(stage: Stage, listed: str) -> None:
    stage.start(one_route())
    host, _, port = stage.gateway.url.removeprefix("http://").partition(":")
    lines = [f"Authorization: Bearer {stage.token()}", f"Connection: {listed}"]

    assert (400, 0) == (raw_status(host, int(port), lines), stage.upstream.hits)
    # In a header line of its own, too: nginx joins repeated ones.
    lines = [lines[0], "Connection: keep-alive", f"Connection: {listed}"]
    assert (400, 0) == (raw_status(host, int(port), lines), stage.upstream.hits)


def raw_status(host: str, port: int, lines: list[str]) -> int:
    import socket

    with socket.create_connection((host, port), 10) as sock:
        head = "\r\n".join(["GET /orders HTTP/1.1", f"Host: {host}", *lines, "", ""])
        sock.sendall(head.encode("latin-1"))
        return int(sock.recv(65536).split(b" ", 2)[1])


def test_an_invalid_configuration_refuses_everything_and_names_its_mistake(stage: Stage) -> None:
    stage.start(one_route(audience_required=["orders-api"], issuer="ftp://keycloak:8080/realms/internal"))

    answer = stage.get(token=stage.token())

    assert (500, 0) == (answer.status_code, stage.upstream.hits)
    assert "server_error" == answer.json()["error"]
    assert wait_until(lambda: "issuer" in stage.gateway.logs() and "config_invalid" in stage.gateway.logs())


def test_a_changed_configuration_is_in_force_at_once(stage: Stage) -> None:
    stage.start(one_route())
    token = stage.token("orders", "reports", "add-client-2-as-audience")
    stage.get(token=token)
    before = stage.forwarded()

    changed = one_route(audience_required=["reports-api"])
    changed["services"][0]["routes"][0]["plugins"][0]["config"]["token_exchange"]["request"] = {
        "scopes": ["reports"]
    }
    stage.gateway.reload(changed)

    def serves_the_new_one() -> bool:
        answer = stage.get(token=token)
        return answer.status_code == 200 and answer.json()["claims"]["aud"] == "reports-api"

    assert wait_until(serves_the_new_one)
    assert before != stage.forwarded()


def test_a_token_in_the_query_is_exchanged_and_removed(stage: Stage) -> None:
    stage.start(one_route(bearer_token_param_type=["query"]))
    token = stage.token()

    answer = stage.get(f"/orders?a=1&access_token={token}&b=2")

    assert 200 == answer.status_code
    assert "a=1&b=2" == answer.json()["query"]
    assert "client-2" == answer.json()["claims"]["azp"]


def test_a_token_in_a_cookie_is_exchanged_and_removed(stage: Stage) -> None:
    stage.start(one_route(bearer_token_param_type=["cookie"], bearer_token_cookie_name="session"))
    token = stage.token()

    answer = stage.get(headers={"Cookie": f"a=1; session={token}; b=2"})

    assert 200 == answer.status_code
    headers = dict(answer.json()["headers"])
    assert "a=1; b=2" == {name.lower(): value for name, value in headers.items()}["cookie"]
    assert token not in answer.text


def test_another_upstream_header_takes_the_result_and_the_credential_goes(stage: Stage) -> None:
    stage.start(one_route(upstream_access_token_header="x-api-token"))
    token = stage.token()

    answer = stage.get(token=token, headers={"X_Api_Token": "forged"})

    headers = {name.lower(): value for name, value in answer.json()["headers"]}
    assert 200 == answer.status_code
    assert 2 == headers["x-api-token"].count(".")
    assert "authorization" not in headers
    assert "x_api_token" not in headers
    assert token not in answer.text


def test_hdr_11_two_places_are_a_bad_request(stage: Stage) -> None:
    stage.start(one_route(bearer_token_param_type=["header", "query"]))
    token = stage.token()

    assert (400, 0) == (
        stage.get(f"/orders?access_token={token}", token=token).status_code,
        stage.upstream.hits,
    )


def test_facts_are_shared_with_later_plugins(stage: Stage) -> None:
    if not isinstance(stage._backend, type) or stage._backend is not KongOnPath:
        pytest.skip("the sandbox runs one plugin")
    config = one_route()
    code = 'kong.service.request.set_header("x-seen", kong.ctx.shared.token_exchange.decision)'
    config["services"][0]["routes"][0]["plugins"].append(
        {"name": "post-function", "config": {"access": [code]}}
    )
    stage.start(config)

    answer = stage.get(token=stage.token())

    assert "exchange" == {name.lower(): value for name, value in answer.json()["headers"]}["x-seen"]

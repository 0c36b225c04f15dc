"""The services of the compose file, as the engine lists them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from kong_token_exchange import cli
from kong_token_exchange.sandbox.compose import (
    PORTS,
    SERVICES,
    ComposeStage,
    ComposeUnavailableError,
    compose_command,
)
from kong_token_exchange.sandbox.serving import HttpServer, Request, Response, json_headers

ROOT = Path(__file__).resolve().parents[3]


def listed(**changes: dict[str, Any]) -> list[dict[str, Any]]:
    """What `docker compose ps --format json` tells of a project that is up."""
    services = []
    for number, name in enumerate(SERVICES):
        port = PORTS.get(name)
        publishers = [{"URL": "", "TargetPort": 9000, "PublishedPort": 0}]
        if port is not None:
            publishers.append({"URL": "127.0.0.1", "TargetPort": port, "PublishedPort": 18000 + number})
        one = {"Service": name, "State": "running", "Publishers": publishers}
        services.append({**one, **changes.get(name.replace("-", "_"), {})})
    return services


class FakeCompose:
    def __init__(self, listing: str) -> None:
        self.listing = listing
        self.commands: list[tuple[str, ...]] = []

    def __call__(self, arguments: Sequence[str]) -> str:
        self.commands.append(tuple(arguments))
        return {"ps": self.listing, "exec": "Keycloak - Version 26.7.3\n"}.get(arguments[0], "")


def lines(services: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(service) + "\n" for service in services)


@pytest.mark.parametrize("write", [lines, json.dumps], ids=["one-a-line", "one-list"])
def test_addresses_come_from_the_engine(write: Any) -> None:
    stage = ComposeStage(FakeCompose(write(listed())))

    assert "http://127.0.0.1:18001" == stage.url
    assert ("127.0.0.1", 18002) == stage.provider.address
    assert "keycloak-26.7.3(compose)" == stage.provider.name
    assert {"orders", "inventory"} == set(stage.upstreams)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"keycloak": {"State": "exited"}}, "keycloak"),
        ({"plugin_server": {"State": "restarting"}}, "plugin-server"),
        ({"orders": {"Publishers": None}}, "orders"),
        ({"kong": {"Publishers": [{"TargetPort": 8001, "PublishedPort": 8001}]}}, "kong"),
    ],
)
def test_a_service_that_is_not_there_is_named(changes: Any, missing: str) -> None:
    with pytest.raises(ComposeUnavailableError) as caught:
        ComposeStage(FakeCompose(lines(listed(**changes))))

    assert f"not running: {missing} (make up)" == str(caught.value)


def test_the_stories_stop_keycloak_and_it_can_be_started_again() -> None:
    run = FakeCompose(lines(listed()))
    stage = ComposeStage(run)

    stage.provider.stop()
    stage.provider.start()

    assert [("stop", "--timeout", "1", "keycloak"), ("start", "keycloak")] == run.commands[-2:]


def test_gateway_and_upstream_tell_about_themselves() -> None:
    def answer(request: Request) -> Response:
        if request.path == "/no-such-route":
            return Response(404, (("Server", "kong/3.9.1"),), b"{}")
        last = {"path": "/orders", "headers": [["Authorization", "Bearer one"]]}
        return Response(200, json_headers(), json.dumps({"hits": 3, "last": last}).encode())

    with HttpServer(answer, name="fake") as server:
        published = [{"TargetPort": port, "PublishedPort": server.address[1]} for port in set(PORTS.values())]
        services = [{**one, "Publishers": published} for one in listed()]
        stage = ComposeStage(FakeCompose(lines(services)))

        assert "kong-3.9.1(compose)" == stage.gateway_name
        assert 3 == stage.upstreams["orders"].hits
        request = stage.upstreams["orders"].last_request()
        assert request is not None
        assert ("/orders", "Bearer one") == (request.path, request.header("authorization"))


def test_without_an_engine_the_demo_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert 2 == cli.main(["demo", "--gateway", "compose"])
    assert "no compose stage here: no `docker` on PATH\n" == capsys.readouterr().err


def test_a_command_that_fails_tells_its_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\necho first >&2\necho Cannot connect >&2\nexit 1\n", encoding="utf-8")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    with pytest.raises(ComposeUnavailableError) as caught:
        compose_command(Path("docker/compose.yml"))(["ps"])

    assert "docker compose ps: Cannot connect" == str(caught.value)


@pytest.mark.parametrize(
    "arguments", [["--idp", "sandbox"], ["--config", "docs/other.yml"]], ids=["idp", "config"]
)
def test_the_compose_stage_has_its_own_configuration_and_provider(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)

    assert 2 == cli.main(["demo", "--gateway", "compose", *arguments])
    assert "its configuration is kong.yml" in capsys.readouterr().err


def test_ports_and_services_are_those_of_the_compose_file() -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yml").read_text(encoding="utf-8"))["services"]

    for name in SERVICES:
        published = [str(port).rpartition(":")[2] for port in services[name].get("ports", ())]
        assert name not in PORTS or str(PORTS[name]) in published


def test_the_echo_api_of_the_compose_file_shows_what_a_remote_upstream_reads() -> None:
    spec = importlib.util.spec_from_file_location("upstream", ROOT / "docker" / "upstream.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    with module.EchoUpstream() as api, HttpServer(module.log_of(api), name="log") as log:
        published = [{"TargetPort": port, "PublishedPort": log.address[1]} for port in set(PORTS.values())]
        services = [{**one, "Publishers": published} for one in listed()]
        upstream = ComposeStage(FakeCompose(lines(services))).upstreams["orders"]
        assert (0, None) == (upstream.hits, upstream.last_request())

        requests.get(f"http://127.0.0.1:{api.address[1]}/orders", headers={"X-One": "1"}, timeout=10)

        request = upstream.last_request()
        assert request is not None
        assert (1, "/orders", "1") == (upstream.hits, request.path, request.header("x-one"))

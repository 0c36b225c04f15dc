"""Hybrid mode on a real Kong: a control plane that has the schema alone, and a data plane that obeys."""

from __future__ import annotations

import copy
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from kong_token_exchange import cli
from kong_token_exchange.sandbox.demo import ISSUER_ADDRESS
from kong_token_exchange.sandbox.issuer import IssuerServer
from kong_token_exchange.sandbox.upstream import EchoUpstream
from tests.support.admin_api import (
    AdminApi,
    PostgresCluster,
    PostgresUnavailableError,
    find_postgres,
    run_migrations,
)
from tests.support.gateways import (
    START_TIMEOUT_S,
    KongOnPath,
    free_port,
    kong_version,
    load_declarative,
    wait_until,
)

pytestmark = [
    pytest.mark.long,
    pytest.mark.integration,
    pytest.mark.skipif(kong_version() is None, reason="no real Kong: no `kong` on PATH"),
]

EMPTY = {"_format_version": "3.0"}

# A node that runs no plugin server: it knows the plugin by a file.
NO_SERVER = {"pluginserver_token_exchange_start_cmd": ""}


class SchemaOnly(KongOnPath):
    """A Kong that starts no plugin server, so that only its Admin API is waited for."""

    def __init__(self, settings: dict[str, str]) -> None:
        super().__init__(EMPTY, upstreams={}, issuers={}, settings={**NO_SERVER, **settings})

    def _await_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                if requests.get(self.admin_url + "/status", timeout=10).status_code == 200:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.1)
        raise RuntimeError(f"Kong is not ready:\n{self.logs()[-3000:]}")


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """How a node without a plugin server gets the schema, by format: its settings."""
    folder = tmp_path_factory.mktemp("described")
    lua = folder / "kong" / "plugins" / "token-exchange"
    assert 0 == cli.main(["describe", "--format", "lua", "--output", str(lua)])
    assert 0 == cli.main(["describe", "--output", str(folder / "plugin.json")])
    return {
        "lua": {"pluginserver_names": "", "lua_package_path": f"{folder}/?.lua;;"},
        "json": {"pluginserver_token_exchange_query_cmd": f"cat {folder}/plugin.json"},
    }


def example() -> dict[str, Any]:
    config: dict[str, Any] = load_declarative()["services"][0]["routes"][0]["plugins"][0]["config"]
    return copy.deepcopy(config)


def changed(path: str, value: Any) -> dict[str, Any]:
    config = example()
    *parents, last = path.split(".")
    place: Any = config
    for name in parents:
        place = place[int(name)] if name.isdigit() else place[name]
    place[last] = value
    return config


CONFIGS = {
    "good": example(),
    "good-defaults": {
        "issuer": "https://id.example.com",
        "client_id": ["gateway"],
        "token_exchange": {"subject_token_issuers": [{"issuer": "https://partner.example.org"}]},
    },
    "good-vault": changed("client_secret", ["{vault://env/gateway}"]),
    "required": {"client_id": ["gateway"]},
    "unknown": changed("surprise", 1),
    "unknown-inside": changed("token_exchange.surprise", 1),
    "type": changed("issuer", 7),
    "one-of": changed("token_exchange.grant_type", "password"),
    "between": changed("token_exchange.deadline", -1),
    "elements": changed("client_id", [{}]),
    "len-min": changed("client_id", []),
}


def test_a_schema_in_lua_is_the_schema_of_the_query_command(described: dict[str, dict[str, str]]) -> None:
    seen: dict[str, Any] = {}
    for form, settings in described.items():
        kong = SchemaOnly(settings)
        admin = AdminApi(kong.admin_url)
        try:
            verdicts = {name: admin.validate(config) for name, config in CONFIGS.items()}
            seen[form] = (admin.call("GET", "/schemas/plugins/token-exchange"), verdicts)
        finally:
            admin.close()
            kong.stop()

    assert seen["json"][0] == seen["lua"][0]
    assert seen["json"][1] == seen["lua"][1]
    statuses = {name: status for name, (status, _) in seen["lua"][1].items()}
    assert {name: 200 if name.startswith("good") else 400 for name in CONFIGS} == statuses


def test_gw_11_the_control_planes_handler_on_a_data_plane_lets_nothing_through(
    described: dict[str, dict[str, str]],
) -> None:
    with EchoUpstream() as upstream:
        kong = SchemaOnly(described["lua"])
        try:
            config = load_declarative()
            config["services"] = [{**config["services"][0], "url": upstream.url}]
            AdminApi(kong.admin_url).load(config)
            answers = [requests.get(kong.url + "/orders", timeout=30, headers=headers) for headers in HEADERS]
        finally:
            kong.stop()
        hits = upstream.hits

    assert ({(500, "server_error")}, 0) == (
        {(answer.status_code, answer.json()["error"]) for answer in answers},
        hits,
    )
    assert "handler.lua of a control plane on a data plane" in kong.logs()


HEADERS: tuple[dict[str, str], ...] = ({}, {"Authorization": "Bearer one.two.three"})


# --- both planes ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[PostgresCluster]:
    try:
        find_postgres()
    except PostgresUnavailableError as exc:
        pytest.skip(f"no PostgreSQL: {exc}")
    with PostgresCluster() as started:
        run_migrations(started)
        yield started


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("hybrid")
    files = [str(folder / name) for name in ("cluster.crt", "cluster.key")]
    subprocess.run(
        ["kong", "hybrid", "gen_cert", *files], check=True, capture_output=True, timeout=60, cwd=folder
    )
    return dict(zip(("cluster_cert", "cluster_cert_key"), files, strict=True))


@pytest.mark.parametrize("form", ["lua", "json"])
def test_a_data_plane_runs_what_the_control_plane_has_checked(
    form: str, described: dict[str, dict[str, str]], cluster: PostgresCluster, certificate: dict[str, str]
) -> None:
    port = free_port()
    control = {
        **cluster.settings,
        **certificate,
        **described[form],
        "declarative_config": "",
        "role": "control_plane",
        "cluster_listen": f"127.0.0.1:{port}",
    }
    data = {
        **certificate,
        "declarative_config": "",
        "role": "data_plane",
        "cluster_control_plane": f"127.0.0.1:{port}",
    }
    with IssuerServer() as issuers, EchoUpstream() as upstream:
        manager = SchemaOnly(control)
        try:
            gateway = KongOnPath(
                EMPTY, upstreams={}, issuers={ISSUER_ADDRESS: issuers.address}, settings=data
            )
            try:
                manage_and_ask(AdminApi(manager.admin_url), gateway.url, issuers, upstream)
            finally:
                gateway.stop()
        finally:
            manager.stop()
    # Nothing that the data plane was told stands in a log.
    assert "client-2-secret" not in manager.logs() + gateway.logs()


def manage_and_ask(admin: AdminApi, url: str, issuers: IssuerServer, upstream: EchoUpstream) -> None:
    token = issuers.issuers["internal"].mint(scopes=("orders", "reports", "add-client-2-as-audience"))

    def audience() -> Any:
        headers = {"Authorization": f"Bearer {token}"}
        answer = requests.get(url + "/orders", headers=headers, timeout=30)
        return answer.json()["claims"]["aud"] if answer.status_code == 200 else answer.status_code

    try:
        admin.call("POST", "/services", {"name": "orders", "url": upstream.url})
        admin.call("POST", "/services/orders/routes", {"name": "orders", "paths": ["/orders"]})
        bad = {"name": "token-exchange", "config": changed("token_exchange.grant_type", "password")}
        told = admin.call("POST", "/routes/orders/plugins", bad, expect=(400,))
        assert "grant_type" in str(told["fields"])
        good = {"name": "token-exchange", "config": example()}
        plugin = admin.call("POST", "/routes/orders/plugins", good)["id"]
        assert wait_until(lambda: audience() == "orders-api", timeout_s=60), audience()

        config = changed("token_exchange.request", {"scopes": ["reports"]})
        admin.call(
            "PATCH", f"/plugins/{plugin}", {"config": {**config, "audience_required": ["reports-api"]}}
        )
        assert wait_until(lambda: audience() == "reports-api", timeout_s=60), audience()
        assert {"reports-api"} == {audience() for _ in range(20)}
        admin.remove_everything()
    finally:
        admin.close()

"""
The plugin as containers: the compose file with every story, and the images by themselves.

Runs where an engine has the images under their official names (see tests/support/containers.py);
nothing is pulled or built.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import requests

from kong_token_exchange.sandbox.compose import await_status
from kong_token_exchange.sandbox.demo import ISSUER_ADDRESS, UPSTREAM_ADDRESSES
from kong_token_exchange.sandbox.issuer import IssuerServer
from kong_token_exchange.sandbox.stories import STORIES, StoryTeller, Wallet, mint
from kong_token_exchange.sandbox.upstream import EchoUpstream, bearer_token
from tests.support.admin_api import AdminApi
from tests.support.containers import (
    ALL_IN_ONE_IMAGE,
    PLUGIN_SERVER_IMAGE,
    Compose,
    ContainersUnavailableError,
    KeycloakContainer,
    KongContainers,
    RedisContainer,
    docker,
    require_images,
)
from tests.support.gateways import ROOT, free_port, load_declarative, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    try:
        stage = Compose()
    except ContainersUnavailableError as exc:
        pytest.skip(f"no containers: {exc}")
    with stage:
        yield stage


def test_kong_keeps_nothing_open_while_the_sidecar_is_away(compose: Compose) -> None:
    stage = compose.stage()
    upstream = stage.upstreams["orders"]
    token = mint(stage.provider, "internal", "client-1", "openid orders add-client-2-as-audience")

    def status(bearer: str) -> int:
        answer = requests.get(
            compose.url + "/orders", headers={"Authorization": f"Bearer {bearer}"}, timeout=60
        )
        return answer.status_code

    assert 200 == status(token)
    compose.compose("stop", "--timeout", "5", "plugin-server")
    hits = upstream.hits
    assert {500} == {status(bearer) for bearer in (token, "not-even-a-token") for _ in range(5)}
    assert hits == upstream.hits
    compose.compose("start", "plugin-server")
    assert wait_until(lambda: status(token) == 200, timeout_s=120)


def test_the_dashboards_show_what_kong_counts(compose: Compose) -> None:
    # What the profile does once Kong is there; images of Prometheus and Grafana are not needed for it.
    compose.compose("--profile", "observability", "run", "--rm", "--no-deps", "enable-metrics")
    url = f"http://127.0.0.1:{compose.ports['KONG_STATUS_PORT']}/metrics"

    def counted() -> str:
        requests.get(compose.url + "/orders", timeout=60)
        return requests.get(url, timeout=60).text

    refusals = 'kong_http_requests_total{service="orders",route="orders",code="401",source="kong"'
    assert wait_until(lambda: refusals in counted(), timeout_s=60)
    told = counted()
    assert set() == {name for name in dashboard_metrics() if name not in told}


def test_every_story_through_the_compose_file(compose: Compose) -> None:
    # The last test on this stage: the stories end with Keycloak stopped.
    stage = compose.stage()
    wallet = Wallet(stage.provider)
    teller = StoryTeller(gateway_url=stage.url, wallet=wallet, upstreams=stage.upstreams)

    rows = [teller.tell(story) for story in STORIES]

    assert {} == {row.story: row.complaints for row in rows if row.complaints}
    token = wallet.token("for-the-gateway")
    logs = compose.compose("logs", "--no-color", "kong", "plugin-server")
    assert token.rpartition(".")[2] not in logs


def dashboard_metrics() -> set[str]:
    text = (ROOT / "docker" / "observability" / "dashboards" / "token-exchange.json").read_text("utf-8")
    found = set(re.findall(r"kong_\w+", text))
    assert found
    return found


# --- the images by themselves ---------------------------------------------------------


@pytest.fixture
def plugin_server_image() -> str:
    try:
        require_images(PLUGIN_SERVER_IMAGE)
    except ContainersUnavailableError as exc:
        pytest.skip(f"no containers: {exc}")
    return PLUGIN_SERVER_IMAGE


def run(image: str, *command: str) -> str:
    hardened = ["--rm", "--read-only", "--cap-drop=ALL", "--network=none"]
    return docker("run", *hardened, f"--entrypoint={command[0]}", image, *command[1:], timeout_s=120)


def test_the_image_runs_as_nobody_special_and_writes_nowhere(plugin_server_image: str) -> None:
    config = json.loads(docker("image", "inspect", plugin_server_image))[0]["Config"]

    assert "10001:10001" == config["User"]
    assert {"/run/token-exchange": {}} == config["Volumes"]
    assert config["Healthcheck"]["Test"][0] == "CMD"
    description = json.loads(run(plugin_server_image, "kong-token-exchange", "describe"))
    assert "ProtoBuf:1" == description["Protocol"]


def test_the_image_carries_its_bill_of_materials(plugin_server_image: str) -> None:
    bill = json.loads(run(plugin_server_image, "cat", "/opt/token-exchange/sbom.cdx.json"))

    assert ("CycloneDX", "kong-token-exchange") == (bill["bomFormat"], bill["metadata"]["component"]["name"])
    assert {"PyJWT", "cryptography", "requests", "redis"} <= {
        component["name"] for component in bill["components"]
    }


def test_the_all_in_one_image_starts_its_own_plugin_server() -> None:
    try:
        require_images(ALL_IN_ONE_IMAGE)
    except ContainersUnavailableError as exc:
        pytest.skip(f"no containers: {exc}")
    port = free_port()
    settings = {
        "KONG_DATABASE": "off",
        "KONG_DECLARATIVE_CONFIG": "/kong.yml",
        "KONG_PROXY_LISTEN": "0.0.0.0:8000",
    }
    environment = [part for name, value in settings.items() for part in ("--env", f"{name}={value}")]
    container = docker(
        *(
            "run",
            "--detach",
            "--publish",
            f"127.0.0.1:{port}:8000",
            "--volume",
            f"{ROOT / 'kong.yml'}:/kong.yml:ro",
        ),
        *(*environment, ALL_IN_ONE_IMAGE),
    ).strip()
    try:
        await_status(f"http://127.0.0.1:{port}/no-such-route", 404)
        # From the plugin: 500 is what Kong says while the plugin server is not there yet.
        await_status(f"http://127.0.0.1:{port}/orders", 401)
    finally:
        docker("rm", "--force", "--volumes", container)


# --- testcontainers -------------------------------------------------------------------


def test_a_real_keycloak_and_a_real_kong_from_testcontainers() -> None:
    try:
        keycloak: Any = KeycloakContainer()
    except ContainersUnavailableError as exc:
        pytest.skip(f"no containers: {exc}")
    try:
        with EchoUpstream() as upstream:
            gateway = start_kong({ISSUER_ADDRESS: keycloak.address}, upstream)
            try:
                token = mint(keycloak, "internal", "client-1", "openid orders add-client-2-as-audience")
                answer = ask(gateway, token)
            finally:
                gateway.stop()
    finally:
        keycloak.stop()

    assert (200, "client-2", "orders-api") == (
        answer.status_code,
        *(answer.json()["claims"][c] for c in ("azp", "aud")),
    )


def test_cache_22_two_nodes_share_a_single_use_assertions_result_through_redis() -> None:
    """Gateways, identity provider and Redis, all of them containers."""
    with ExitStack() as stack:
        try:
            keycloak: Any = KeycloakContainer()
            stack.callback(keycloak.stop)
            redis = RedisContainer()
            stack.callback(redis.stop)
        except ContainersUnavailableError as exc:
            pytest.skip(f"no containers: {exc}")
        upstream = stack.enter_context(EchoUpstream())
        config = load_declarative()
        plugin = config["services"][1]["routes"][0]["plugins"][0]["config"]
        plugin["cluster_cache_strategy"] = "redis"
        plugin["cluster_cache_items"] = ["tokens"]
        plugin["cluster_cache_redis"] = {"host": "127.0.0.1", "port": redis.port}
        plugin["token_exchange"]["cache"] = {"seal_keys": ["for-this-test-alone-" + "x" * 32]}
        nodes = []
        for _ in range(2):
            nodes.append(start_kong({ISSUER_ADDRESS: keycloak.address}, upstream, config))
            stack.callback(nodes[-1].stop)

        token = mint(keycloak, "partner", "partner-app")
        answers = [ask(node, token, "/inventory") for node in nodes]
        received = [bearer_token(request) for request in upstream.log.requests]

    # Keycloak takes an assertion once, so the second node can have the result from the first alone.
    assert [200, 200] == [answer.status_code for answer in answers]
    assert received[0] == received[1]
    assert received[0] not in (None, token)


def test_a_changed_file_and_a_lost_sidecar_on_containers() -> None:
    with IssuerServer() as issuers, EchoUpstream() as upstream:
        gateway = start_kong({ISSUER_ADDRESS: issuers.address}, upstream)
        try:
            scopes = ("orders", "reports", "add-client-2-as-audience")
            token = issuers.issuers["internal"].mint(scopes=scopes)
            assert "orders-api" == ask(gateway, token).json()["claims"]["aud"]

            config = load_declarative()
            plugin = config["services"][0]["routes"][0]["plugins"][0]["config"]
            plugin["audience_required"] = ["reports-api"]
            plugin["token_exchange"]["request"] = {"scopes": ["reports"]}
            gateway.reload(config)
            assert wait_until(lambda: aud(ask(gateway, token)) == "reports-api", timeout_s=60)

            hits = upstream.hits
            gateway._sidecar.get_wrapped_container().kill()
            assert {500} == {
                ask(gateway, one).status_code for one in (token, "not-even-a-token") for _ in range(5)
            }
            assert hits == upstream.hits
            gateway._sidecar.get_wrapped_container().start()
            assert wait_until(lambda: ask(gateway, token).status_code == 200, timeout_s=60)
            request = upstream.log.last()
            assert request is not None
            assert token != bearer_token(request)
        finally:
            gateway.stop()


def start_kong(
    issuers: dict[str, tuple[str, int]], upstream: EchoUpstream, config: dict[str, Any] | None = None
) -> KongContainers:
    upstreams = dict.fromkeys(UPSTREAM_ADDRESSES.values(), upstream.address)
    try:
        return KongContainers(config or load_declarative(), upstreams=upstreams, issuers=issuers)
    except ContainersUnavailableError as exc:
        pytest.skip(f"no containers: {exc}")


def ask(gateway: KongContainers, token: str, path: str = "/orders") -> requests.Response:
    return requests.get(gateway.url + path, headers={"Authorization": f"Bearer {token}"}, timeout=60)


def aud(answer: requests.Response) -> Any:
    return answer.json()["claims"]["aud"] if answer.status_code == 200 else None


# --- the profile with a database ------------------------------------------------------


def test_kong_on_postgres_is_managed_through_its_admin_api() -> None:
    try:
        require_images(os.environ.get("POSTGRES_IMAGE", "postgres:15"))
        stage = Compose("postgres")
    except ContainersUnavailableError as exc:
        pytest.skip(f"no containers: {exc}")
    with stage:
        admin = AdminApi(f"http://127.0.0.1:{stage.ports['KONG_POSTGRES_ADMIN_PORT']}")
        config = load_declarative()["services"][0]["routes"][0]["plugins"][0]["config"]
        admin.call("POST", "/services", {"name": "orders", "url": "http://orders:8080"})
        admin.call("POST", "/services/orders/routes", {"name": "orders", "paths": ["/orders"]})
        admin.call("POST", "/routes/orders/plugins", {"name": "token-exchange", "config": config})
        url = f"http://127.0.0.1:{stage.ports['KONG_POSTGRES_PROXY_PORT']}/orders"
        token = mint(stage.stage().provider, "internal", "client-1", "openid orders add-client-2-as-audience")

        def claims() -> Any:
            answer = requests.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=60)
            return answer.json().get("claims") if answer.status_code == 200 else None

        assert wait_until(lambda: claims() is not None, timeout_s=60)
        assert "client-2" == claims()["azp"]
        admin.close()

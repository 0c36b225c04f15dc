"""What a gateway and the plugin server do together, beyond the stories."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import requests

from tests.support.containers import KongContainers
from tests.support.gateways import SandboxBackend, plugin_server_pids, wait_until
from tests.support.stage import Stage, one_route, raw_request, raw_statuses

pytestmark = pytest.mark.integration


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


@pytest.mark.parametrize("listed", ["Authorization", "keep-alive, AUTHORIZATION"])
def test_gw_20_out_03_connection_cannot_strip_the_credential(stage: Stage, listed: str) -> None:
    stage.start(one_route())
    lines = [f"Authorization: Bearer {stage.token()}".encode(), f"Connection: {listed}".encode()]

    assert ([400], 0) == (raw_statuses(stage, raw_request(*lines)), stage.upstream.hits)
    # In a header line of its own, too: nginx joins repeated ones.
    lines.insert(1, b"Connection: keep-alive")
    assert ([400], 0) == (raw_statuses(stage, raw_request(*lines)), stage.upstream.hits)


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


@pytest.mark.parametrize("first", ["file", "issuer"])
def test_fault_96_a_secret_in_a_file_is_rotated_while_requests_flow(
    stage: Stage, tmp_path: Path, first: str
) -> None:
    if stage._backend is KongContainers:
        pytest.skip("the plugin server's container does not see this folder")
    secret = tmp_path / "secret"
    secret.write_text("client-2-secret\n", encoding="utf-8")
    issuer = stage.issuers.issuers["internal"]
    stage.start(one_route(client_secret=None, client_secret_file=str(secret)))

    def change_file() -> None:
        new = tmp_path / "new"
        new.write_text("rotated\n", encoding="utf-8")
        new.rename(secret)

    def change_issuer() -> None:
        rotated = replace(issuer.realm.clients["client-2"], secret="rotated")
        issuer.realm = replace(issuer.realm, clients={**issuer.realm.clients, "client-2": rotated})

    statuses: list[int] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            # A token that no cache has.
            statuses.append(stage.get(token=stage.token()).status_code)

    def goes_on() -> bool:
        seen = len(statuses)
        return wait_until(lambda: len(statuses) > seen + 5)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        assert goes_on()
        (change_file if first == "file" else change_issuer)()
        if first == "file":
            # Longer than the second in which the file is not looked at again.
            assert wait_until(lambda: "the one before it is tried" in stage.gateway.logs())
            assert goes_on()
        # The issuer ahead of the file refuses until the file follows.
        (change_issuer if first == "file" else change_file)()
        assert goes_on()
        settled = len(statuses)
        assert goes_on()
    finally:
        ended.set()
        asking.join(30)

    assert {200} == set(statuses[settled:])
    # Never the caller's fault.
    assert set(statuses) <= {200, 500}
    # With the file first: at most the one that had tried the new secret before the issuer changed.
    assert first == "issuer" or statuses.count(500) <= 1
    assert "rotated" not in stage.gateway.logs()


def test_out_07_a_token_in_the_query_is_exchanged_and_removed(stage: Stage) -> None:
    stage.start(one_route(bearer_token_param_type=["query"]))
    token = stage.token()

    answer = stage.get(f"/orders?a=1&access_token={token}&b=2")

    assert 200 == answer.status_code
    assert "a=1&b=2" == answer.json()["query"]
    assert "client-2" == answer.json()["claims"]["azp"]


def test_out_07_a_token_in_a_cookie_is_exchanged_and_removed(stage: Stage) -> None:
    stage.start(one_route(bearer_token_param_type=["cookie"], bearer_token_cookie_name="session"))
    token = stage.token()

    answer = stage.get(headers={"Cookie": f"a=1; session={token}; b=2"})

    assert 200 == answer.status_code
    headers = dict(answer.json()["headers"])
    assert "a=1; b=2" == {name.lower(): value for name, value in headers.items()}["cookie"]
    assert token not in answer.text


def test_out_01_02_another_upstream_header_takes_the_result_and_the_credential_goes(stage: Stage) -> None:
    stage.start(one_route(upstream_access_token_header="x-api-token"))
    token = stage.token()

    answer = stage.get(token=token, headers={"X_Api_Token": "forged"})

    headers = {name.lower(): value for name, value in answer.json()["headers"]}
    assert 200 == answer.status_code
    assert 2 == headers["x-api-token"].count(".")
    assert "authorization" not in headers
    assert "x_api_token" not in headers
    assert token not in answer.text


def test_out_10_a_preflight_passes_on_request_alone_and_without_a_credential(stage: Stage) -> None:
    stage.start(one_route(run_on_preflight=False))
    token = stage.token()
    headers = {"Authorization": f"Bearer {token}", "Origin": "https://app.example.com"}

    answer = requests.options(f"{stage.gateway.url}/orders", headers=headers, timeout=30)

    assert (200, 1) == (answer.status_code, stage.upstream.hits)
    request = stage.upstream.log.last()
    assert request is not None
    assert "authorization" not in {name.lower() for name, _ in request.headers}
    assert token not in answer.text
    assert 401 == stage.get().status_code


def test_out_13_14_17_a_refusal_is_made_of_constants_and_kept_by_nobody(stage: Stage) -> None:
    stage.start(one_route(scopes_required=["MARKED-by-us"]))
    forged = stage.token(header={"kid": "MARKED-kid"})

    refused = [
        (401, stage.get(token=forged)),
        (401, stage.get(token=stage.token(iss="https://MARKED.example.com"))),
        (400, stage.get(headers={"Authorization": "Bearer MARKED,"})),
        (401, stage.get(headers={"Authorization": "MARKED a"})),
        (403, stage.get(token=stage.token())),
    ]

    assert [status for status, _ in refused] == [answer.status_code for _, answer in refused]
    for status, answer in refused:
        assert {"error", "error_description"} == set(answer.json())
        assert "MARKED" not in answer.text
        assert "no-store" == answer.headers["Cache-Control"]
        # A scope that is asked for is ours to tell.
        assert (status == 403) == ('scope="MARKED-by-us"' in answer.headers["WWW-Authenticate"])
        told = answer.headers["WWW-Authenticate"].replace('scope="MARKED-by-us"', "")
        assert "MARKED" not in told
        assert told.startswith('Bearer realm="kong"')
    assert 0 == stage.upstream.hits


def test_hdr_11_two_places_are_a_bad_request(stage: Stage) -> None:
    stage.start(one_route(bearer_token_param_type=["header", "query"]))
    token = stage.token()

    assert (400, 0) == (
        stage.get(f"/orders?access_token={token}", token=token).status_code,
        stage.upstream.hits,
    )


def test_facts_are_shared_with_later_plugins(stage: Stage) -> None:
    if stage._backend is SandboxBackend:
        pytest.skip("the sandbox runs one plugin")
    config = one_route()
    code = 'kong.service.request.set_header("x-seen", kong.ctx.shared.token_exchange.decision)'
    config["services"][0]["routes"][0]["plugins"].append(
        {"name": "post-function", "config": {"access": [code]}}
    )
    stage.start(config)

    answer = stage.get(token=stage.token())

    assert "exchange" == {name.lower(): value for name, value in answer.json()["headers"]}["x-seen"]

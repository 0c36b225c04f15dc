"""Proof of possession through a gateway: the sandbox, and Kong where it is on the path."""

from __future__ import annotations

import functools
import ssl
import time
from contextlib import closing
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import pytest
import requests

from kong_token_exchange.sandbox.demo import ISSUER_ADDRESS, UPSTREAM_ADDRESSES
from kong_token_exchange.sandbox.issuer import IssuerServer
from kong_token_exchange.sandbox.upstream import EchoUpstream
from tests.support import gateways
from tests.support.fakes import run_in_threads
from tests.support.gateways import KongOnPath, free_port, kong_version, serve_command
from tests.support.proofs import Holder
from tests.support.stage import Stage, one_route
from tests.unit.protocol.test_certificate import DIGEST, OTHER_PEM, PEM, PRIVATE_PEM

# Long: each server takes proofs only some seconds after its start.
pytestmark = [pytest.mark.integration, pytest.mark.long]

holder = Holder()


def prove(stage: Stage, token: str, **changes: Any) -> str:
    claims = {"htu": f"{stage.gateway.url}/orders", "jti": uuid4().hex, **changes}
    return holder.prove(token, now=time.time(), **claims)


def get(stage: Stage, token: str, proof: str, **headers: str) -> requests.Response:
    """Ask once, and again where the server is too young to tell whether the proof was used (503)."""
    for _ in range(100):
        answer = stage.get(headers={"Authorization": f"DPoP {token}", "DPoP": proof, **headers})
        if answer.status_code != 503:
            break
        time.sleep(0.1)  # the server has to be older than a clock may be ahead
        proof = prove(stage, token)
    return answer


def test_clm_30_a_proof_is_good_for_one_request(stage: Stage) -> None:
    stage.start(one_route(proof_of_possession_dpop="optional"))
    token = stage.token(cnf=holder.cnf)
    assert 200 == get(stage, token, prove(stage, token)).status_code
    proof = prove(stage, token)
    hits = stage.upstream.hits

    answers = [get(stage, token, proof) for _ in range(3)]

    assert [200, 401, 401] == [answer.status_code for answer in answers]
    assert hits + 1 == stage.upstream.hits
    assert "invalid_dpop_proof" == answers[1].json()["error"]
    challenge = answers[1].headers["WWW-Authenticate"]
    assert challenge.startswith('DPoP realm="kong", error="invalid_dpop_proof", ')
    assert 'algs="RS256 ' in challenge
    request = stage.upstream.log.last()
    assert request is not None
    names = {name.lower() for name, _ in request.headers}
    assert "dpop" not in names
    assert stage.forwarded() not in (None, token)


@pytest.mark.skipif(kong_version() is None, reason="no real Kong: no `kong` on PATH")
def test_clm_30_a_proof_is_taken_by_one_worker_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_workers(*arguments: Any, **options: Any) -> list[str]:
        return [*serve_command(*arguments, **options), "--workers", "3"]

    monkeypatch.setattr(gateways, "serve_command", with_workers)
    with IssuerServer() as issuers, EchoUpstream() as upstream:
        stage = Stage(KongOnPath, issuers, upstream)
        stage.start(one_route(proof_of_possession_dpop="optional"))
        try:
            token = stage.token(cnf=holder.cnf)
            assert 200 == get(stage, token, prove(stage, token)).status_code
            for _ in range(10):
                proof = prove(stage, token)
                headers = {"Authorization": f"DPoP {token}", "DPoP": proof}
                answers = run_in_threads(functools.partial(stage.get, headers=headers), 8)
                statuses = sorted(answer.status_code for answer in answers)
                assert [200, *[401] * 7] == statuses
        finally:
            stage.gateway.stop()


def test_clm_27_31_a_bound_token_needs_its_proof(stage: Stage) -> None:
    stage.start(one_route(proof_of_possession_dpop="optional"))
    token = stage.token(cnf=holder.cnf)
    assert 200 == get(stage, token, prove(stage, token)).status_code
    hits = stage.upstream.hits
    thief = Holder(label="thief")

    refused = [
        stage.get(token=token),
        stage.get(headers={"Authorization": f"DPoP {token}"}),
        get(stage, token, prove(stage, token, htu=f"{stage.gateway.url}/invoices")),
        get(stage, token, prove(stage, token, htu="https://evil.test/orders")),
        get(stage, token, prove(stage, token, htm="POST")),
        get(stage, token, thief.prove(token, now=time.time(), htu=f"{stage.gateway.url}/orders")),
        get(stage, token, f"{prove(stage, token)}, {prove(stage, token)}"),
    ]

    assert [401] * 7 == [answer.status_code for answer in refused]
    assert hits == stage.upstream.hits
    assert 200 == stage.get(token=stage.token()).status_code


def test_clm_31_the_request_line_cannot_name_the_host_that_a_proof_is_for(stage: Stage) -> None:
    stage.start(one_route(proof_of_possession_dpop="optional"))
    token = stage.token(cnf=holder.cnf)
    assert 200 == get(stage, token, prove(stage, token)).status_code
    hits, authority = stage.upstream.hits, stage.gateway.url.removeprefix("http://")
    elsewhere = f"http://evil.test:{authority.rpartition(':')[2]}/orders"

    def status(target: str, **claims: str) -> int:
        with closing(HTTPConnection(authority, timeout=30)) as connection:
            headers = {
                "Host": authority,
                "X-Forwarded-Host": "evil.test",
                "Authorization": f"DPoP {token}",
                "DPoP": prove(stage, token, **claims),
            }
            connection.request("GET", target, headers=headers)
            return connection.getresponse().status

    # Kong's route is that of the `Host` header in each.
    assert 401 == status("http://evil.test/orders", htu=elsewhere)
    assert 401 == status("/orders", htu=elsewhere)
    assert hits == stage.upstream.hits
    assert 200 == status(f"{stage.gateway.url}/orders")


def test_strict_takes_bound_tokens_alone(stage: Stage) -> None:
    config = one_route(proof_of_possession_dpop="strict")
    stage.start(config)

    answer = stage.get(token=stage.token())

    assert (401, 0) == (answer.status_code, stage.upstream.hits)
    token = stage.token(cnf=holder.cnf)
    assert 200 == get(stage, token, prove(stage, token)).status_code


# --- certificates ---------------------------------------------------------------------


def from_header(trusted: str) -> dict[str, Any]:
    config = one_route(
        proof_of_possession_mtls="optional",
        proof_of_possession_mtls_from_header={"certificate_header_name": "X-Client-Cert"},
    )
    plugin = config["services"][0]["routes"][0]["plugins"][0]["config"]
    plugin["token_exchange"]["proof_of_possession"] = {"trusted_ips": [trusted]}
    return config


def test_clm_32_a_certificate_comes_in_the_header_of_a_trusted_proxy(stage: Stage) -> None:
    stage.start(from_header("127.0.0.0/8"))
    token = stage.token(cnf={"x5t#S256": DIGEST})
    sent = {"X-Client-Cert": quote(PEM, safe=""), "x_client_cert": quote(OTHER_PEM, safe="")}

    assert 200 == stage.get(token=token, headers=sent).status_code
    request = stage.upstream.log.last()
    assert request is not None
    assert {name.lower().replace("_", "-") for name, _ in request.headers}.isdisjoint({"x-client-cert"})

    refused = [
        stage.get(token=token),
        stage.get(token=token, headers={"X-Client-Cert": quote(OTHER_PEM, safe="")}),
        # What a proxy that sets X-Client-Cert need not look at.
        stage.get(token=token, headers={"x_client_cert": quote(PEM, safe="")}),
    ]
    assert [401] * 3 == [answer.status_code for answer in refused]
    assert 1 == stage.upstream.hits


def test_clm_32_anybody_elses_certificate_header_counts_for_nothing(stage: Stage) -> None:
    stage.start(from_header("192.0.2.0/24"))
    headers = {"X-Client-Cert": quote(PEM, safe="")}

    assert 401 == stage.get(token=stage.token(cnf={"x5t#S256": DIGEST}), headers=headers).status_code
    assert 0 == stage.upstream.hits
    # An unbound token needs none, and the header goes no further.
    assert 200 == stage.get(token=stage.token(), headers=headers).status_code
    request = stage.upstream.log.last()
    assert request is not None
    assert "x-client-cert" not in {name.lower() for name, _ in request.headers}


@pytest.mark.skipif(kong_version() is None, reason="no real Kong: no `kong` on PATH")
def test_kong_tells_the_certificate_of_a_tls_connection(tmp_path: Path) -> None:
    tls = free_port()
    client = tmp_path / "client.pem"
    client.write_bytes(PEM.encode() + PRIVATE_PEM)
    with IssuerServer() as issuers, EchoUpstream() as upstream:
        kong = KongOnPath(
            one_route(proof_of_possession_mtls="strict"),
            upstreams=dict.fromkeys(UPSTREAM_ADDRESSES.values(), upstream.address),
            issuers={ISSUER_ADDRESS: issuers.address},
            settings={"nginx_proxy_ssl_verify_client": "optional_no_ca"},
            also_listen=f", 127.0.0.1:{tls} ssl",
        )
        try:
            token = issuers.issuers["internal"].mint(
                scopes=("orders", "add-client-2-as-audience"), cnf={"x5t#S256": DIGEST}
            )

            def status(certificate: str | None) -> int:
                context = ssl.create_default_context()
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                if certificate:
                    context.load_cert_chain(certificate)
                with closing(HTTPSConnection("127.0.0.1", tls, context=context, timeout=30)) as connection:
                    headers = {"Host": "localhost", "Authorization": f"Bearer {token}"}
                    connection.request("GET", "/orders", headers=headers)
                    answer = connection.getresponse()
                    answer.read()
                    return answer.status

            assert (200, 1) == (status(str(client)), upstream.hits)
            assert (401, 1) == (status(None), upstream.hits)
        finally:
            kong.stop()

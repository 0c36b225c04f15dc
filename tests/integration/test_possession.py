"""Proof of possession through a gateway: the sandbox, and Kong where it is on the path."""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4

import pytest
import requests

from tests.integration.test_gateway import Stage, one_route, stage
from tests.support.proofs import Holder

__all__ = ["stage"]

pytestmark = pytest.mark.integration

holder = Holder()


def prove(stage: Stage, token: str, **changes: Any) -> str:
    claims = {"htu": f"{stage.gateway.url}/orders", "jti": uuid4().hex, **changes}
    return holder.prove(token, now=time.time(), **claims)


def get(stage: Stage, token: str, proof: str, **headers: str) -> requests.Response:
    """Ask once, and again where the server is too young to tell whether the proof was used (503)."""
    for _ in range(20):
        answer = stage.get(headers={"Authorization": f"DPoP {token}", "DPoP": proof, **headers})
        if answer.status_code != 503:
            break
        time.sleep(0.1)  # the server's clock has to reach the next second
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


def test_strict_takes_bound_tokens_alone(stage: Stage) -> None:
    config = one_route(proof_of_possession_dpop="strict")
    stage.start(config)

    answer = stage.get(token=stage.token())

    assert (401, 0) == (answer.status_code, stage.upstream.hits)
    token = stage.token(cnf=holder.cnf)
    assert 200 == get(stage, token, prove(stage, token)).status_code

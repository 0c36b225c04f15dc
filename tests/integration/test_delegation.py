"""Delegation, and headers of one's own, through a gateway: the sandbox, and Kong where it is on the path."""

from __future__ import annotations

from typing import Any

import pytest

from kong_token_exchange.sandbox.upstream import read_claims
from tests.support.stage import Stage, one_route, raw_request, raw_statuses

pytestmark = pytest.mark.integration

AGENT: dict[str, Any] = {"sub": "agent", "azp": "billing-agent"}
ACTOR_TOKEN = {"source": "header", "header_name": "X-Actor-Token"}


def delegating(stage: Stage, **policy: Any) -> None:
    config = one_route()
    exchange = config["services"][0]["routes"][0]["plugins"][0]["config"]["token_exchange"]
    exchange["request"]["actor_token"] = ACTOR_TOKEN
    exchange["actor"] = policy
    exchange["flow"]["kind"] = "delegation"
    stage.issuers.issuers["internal"].delegation = True
    stage.start(config)


def received(stage: Stage) -> tuple[dict[str, Any], set[str]]:
    """Return what the upstream got: the claims of its token, and the names of its headers."""
    request = stage.upstream.log.last()
    assert request is not None
    claims = read_claims(stage.forwarded() or "")
    assert claims is not None
    return dict(claims), {name.lower().replace("_", "-") for name, _ in request.headers}


def test_exc_09_an_agent_acts_for_a_user(stage: Stage) -> None:
    delegating(stage, required=True, enforce_may_act=True, clients=["billing-agent"])
    user, agent = stage.token(may_act={"sub": "agent"}), stage.token(**AGENT)
    subject = read_claims(user)
    assert subject is not None

    for _ in range(3):  # exchanged, from the cache, and as an answer that stands
        answer = stage.get(token=user, headers={"X-Actor-Token": agent})
        claims, names = received(stage)

        assert 200 == answer.status_code
        assert (subject["sub"], "agent", "billing-agent") == (
            claims["sub"],
            claims["act"]["sub"],
            claims["act"]["client_id"],
        )
        assert "x-actor-token" not in names
    assert 1 == stage.issuers.log.hits[stage.issuers.token_path("internal")]


def test_exc_09_nobody_acts_without_leave(stage: Stage) -> None:
    delegating(stage, required=True, enforce_may_act=True)
    user, agent = stage.token(may_act={"sub": "agent"}), stage.token(**AGENT)
    nobody = stage.token(may_act={})
    stranger = stage.issuers.issuers["partner"].mint(client="partner-app")

    statuses = [
        stage.get(token=user).status_code,
        stage.get(token=user, headers={"X-Actor-Token": "no token"}).status_code,
        stage.get(token=user, headers={"X-Actor-Token": stranger}).status_code,
        stage.get(token=user, headers={"X-Actor-Token": stage.token(life_s=-1, **AGENT)}).status_code,
        stage.get(token=user, headers={"X-Actor-Token": stage.token(sub="other")}).status_code,
        stage.get(token=nobody, headers={"X-Actor-Token": agent}).status_code,
        stage.get(token=stage.token(), headers={"X-Actor-Token": agent}).status_code,
    ]

    assert ([403, 400, 401, 401, 403, 403, 403], 0) == (statuses, stage.upstream.hits)


def test_exc_22_an_issuer_that_ignores_the_actor_is_found_out(stage: Stage) -> None:
    delegating(stage)
    stage.issuers.issuers["internal"].delegation = False

    answer = stage.get(token=stage.token(), headers={"X-Actor-Token": stage.token(**AGENT)})

    assert (502, 0) == (answer.status_code, stage.upstream.hits)


def test_exc_09_the_actors_header_goes_upstream_in_no_case(stage: Stage) -> None:
    delegating(stage)
    agent = stage.token(**AGENT)

    # Forwarded: for the API, and not for the gateway.
    assert 200 == stage.get(token=stage.token("orders"), headers={"X-Actor-Token": agent}).status_code
    claims, names = received(stage)
    assert "act" not in claims
    assert "x-actor-token" not in names


def test_gw_20_connection_cannot_take_the_actor_away(stage: Stage) -> None:
    delegating(stage)
    lines = [
        f"Authorization: Bearer {stage.token()}".encode(),
        f"X-Actor-Token: {stage.token(**AGENT)}".encode(),
        b"Connection: x-actor-token",
    ]

    assert ([400], 0) == (raw_statuses(stage, raw_request(*lines)), stage.upstream.hits)


def test_hdr_08_two_actors_are_none(stage: Stage) -> None:
    delegating(stage)
    actor = f"X-Actor-Token: {stage.token(**AGENT)}".encode()
    lines = [f"Authorization: Bearer {stage.token()}".encode(), actor, actor]

    assert ([400], 0) == (raw_statuses(stage, raw_request(*lines)), stage.upstream.hits)


def test_out_20_an_authorization_that_nobody_read_stays_behind(stage: Stage) -> None:
    stage.start(one_route(bearer_token_header_name="X-User", upstream_access_token_header="X-Token:bearer"))
    unread = {"X-User": stage.token(), "Authorization": f"Bearer {stage.token(**AGENT)}"}

    assert 200 == stage.get(headers=unread).status_code
    request = stage.upstream.log.last()
    assert request is not None
    names = {name.lower() for name, _ in request.headers}
    assert "x-token" in names
    assert not {"authorization", "x-user"} & names

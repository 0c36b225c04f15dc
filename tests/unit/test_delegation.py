"""Delegation through the flow and the plugin: the actor token in, `act` out, and nothing of it upstream."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from kong_token_exchange.config import load_config
from kong_token_exchange.core.policy import TOKEN_TYPE_ID_TOKEN
from kong_token_exchange.errors import ConfigError, TimestampError, TokenExchangeError
from kong_token_exchange.flow import REUSE_MARGIN_S, FlowResult
from kong_token_exchange.plugin import TokenExchangePlugin
from kong_token_exchange.ports import NotInMemoryError
from kong_token_exchange.protocol.bearer import render
from tests.support.fakes import ACCESS_TOKEN_TYPE, Answer, form_of, token_response
from tests.support.minting import ABSENT, NOW, FakeIssuer
from tests.unit.test_flow import (
    FOREIGN,
    FORWARDED,
    PARTNER,
    SUBJECT,
    TARGET,
    Bench,
    config_with,
    forger,
    partner,
    result_token,
    stranger,
    target,
)
from tests.unit.test_kong_examples import ACTOR_TOKEN, A, B
from tests.unit.test_plugin import read_calls, start, warm

HEADER = {"source": "header", "header_name": "X-Actor-Token"}


def agent(of: FakeIssuer = target, **claims: Any) -> str:
    return of.mint(**{"sub": "agent", "azp": "agent-client", "aud": "gateway", "jti": "agent", **claims})


AGENT = agent()
ACT = {"sub": "agent", "iss": TARGET}


def delegating(
    token: dict[str, Any] | None = None, *entries: dict[str, Any], **policy: Any
) -> dict[str, Any]:
    """Return a configuration with an actor token and *policy* about it."""
    raw = config_with(None, *entries, actor=policy)
    raw["token_exchange"]["request"] = {"actor_token": dict(token or HEADER)}
    return raw


def static(token: str, **more: Any) -> dict[str, Any]:
    return {"source": "config", "static_token": token, **more}


class Delegation(Bench):
    """A flow that is asked with an actor token."""

    def __init__(
        self, raw: dict[str, Any] | None = None, answer: Answer | list[Answer] | None = None
    ) -> None:
        super().__init__(
            delegating() if raw is None else raw, answer or token_response(result_token(act=ACT))
        )

    def ask(self, token: str = SUBJECT, actor: str | None = AGENT, *, warm: bool = False) -> FlowResult:
        deadline = None if warm else self.clock.monotonic() + 5
        return self.flow.run(token, deadline=deadline, actor_token=actor)

    def refuses(self, token: str = SUBJECT, actor: str | None = AGENT) -> TokenExchangeError:
        with pytest.raises(TokenExchangeError) as caught:
            self.ask(token, actor)
        event = self.audit.events[-1]
        assert ("refuse", caught.value.reason) == (event.outcome, event.reason)
        return caught.value

    @property
    def last_form(self) -> dict[str, str]:
        return dict(form_of(self.sender.requests[-1]))


# --- what is sent ---------------------------------------------------------------------


def test_exc_04_an_actor_token_is_sent_with_its_type() -> None:
    it = Delegation()
    result = it.ask()

    assert (AGENT, ACCESS_TOKEN_TYPE) == (it.last_form["actor_token"], it.last_form["actor_token_type"])
    assert SUBJECT == it.last_form["subject_token"]
    assert result.actor is not None
    assert ("agent", ()) == (result.actor.sub, result.notes)


def test_cache_12_a_result_is_not_shared_beyond_the_actor_tokens_own_end() -> None:
    it = Delegation()
    result = it.ask(actor=agent(exp=NOW + 10))
    it.clock.step_wall(9)
    assert it.flow.repeat(result).exchanged is result.exchanged
    it.clock.step_wall(1)

    with pytest.raises(TimestampError):
        it.flow.repeat(result)
    assert ("refuse", "jwt_timestamp") == (it.audit.events[-1].outcome, it.audit.events[-1].reason)


def test_exc_04_no_type_is_sent_without_an_actor_token() -> None:
    for it, actor in ((Delegation(), None), (Delegation(config_with()), AGENT)):
        it.ask(actor=actor)

        assert not {"actor_token", "actor_token_type"} & set(it.last_form)


def test_the_type_is_the_configured_one() -> None:
    it = Delegation(delegating({**HEADER, "type": "urn:ietf:params:oauth:token-type:jwt"}))
    it.ask()

    assert "urn:ietf:params:oauth:token-type:jwt" == it.last_form["actor_token_type"]


def test_a_configured_actor_token_is_sent_and_the_request_has_no_say() -> None:
    it = Delegation(delegating(static(AGENT)))
    it.ask(actor=agent(sub="other"))

    assert AGENT == it.last_form["actor_token"]


def test_a_token_that_is_forwarded_needs_no_actor_token() -> None:
    it = Delegation()

    assert "forward" == it.ask(FORWARDED, "not.a.token").decision
    assert 0 == it.exchanges


def test_kongs_own_example_delegates_without_a_field_of_ours() -> None:
    here, there = FakeIssuer(B), FakeIssuer(A, label="partner")
    it = Bench(
        {**ACTOR_TOKEN, "token_endpoint": B + "/token"},
        token_response(here.mint()),
        issuers=(here, there),
    )
    token = there.mint(sub="agent")
    result = it.flow.run(there.mint(), deadline=it.clock.monotonic() + 5, actor_token=token)

    assert token == dict(form_of(it.sender.requests[0]))["actor_token"]
    assert {"actor_not_in_result", "subject_unproven"} == set(result.notes)


# --- verified like a subject token ----------------------------------------------------

BAD_ACTORS: dict[str, tuple[str, str, int]] = {
    "unknown-issuer": (stranger.mint(aud="gateway"), "actor_issuer_unknown", 401),
    "forged": (agent(forger), "actor_key_not_found", 401),
    "signed-by-another": (
        forger.mint(sub="agent", header={"kid": "issuer-RS256"}),
        "actor_jwt_signature",
        401,
    ),
    "expired": (agent(exp=NOW), "actor_jwt_timestamp", 401),
    "not-yet": (agent(nbf=NOW + 1), "actor_jwt_timestamp", 401),
    "without-end": (agent(exp=ABSENT), "actor_jwt_claim", 401),
    "opaque": ("b3BhcXVl", "actor_token_opaque", 401),
    "encrypted": ("a.b.c.d.e", "actor_token_encrypted", 401),
    "id-token": (agent(header={"typ": "JWT"}, token_use="id"), "actor_jwt_claim", 401),
    "sender-constrained": (agent(cnf={"jkt": "x"}), "actor_jwt_claim", 401),
    "act-malformed": (agent(act=[]), "actor_jwt_claim", 401),
    "for-another-service": (agent(aud="elsewhere"), "actor_jwt_claim", 401),
    "of-another-client": (agent(azp="stranger"), "actor_client_not_allowed", 403),
}
STRICT_ENTRY = {
    "issuer": TARGET,
    "conditions": {"has_audience": ["gateway"]},
    "audience": ["gateway"],
    "clients": ["client-1", "agent-client"],
}


@pytest.mark.parametrize(
    ("token", "reason", "status"), BAD_ACTORS.values(), ids=[f"EXC-09-{name}" for name in BAD_ACTORS]
)
def test_an_actor_token_is_verified_like_a_subject_token(token: str, reason: str, status: int) -> None:
    it = Delegation(delegating(None, STRICT_ENTRY))

    error = it.refuses(actor=token)

    assert (reason, status, 0) == (error.reason, error.status, it.exchanges)
    assert render(error).status == status
    # The good one passes by the same rules.
    assert "exchange" == it.ask().decision


def test_exc_09_nothing_is_fetched_for_an_actor_of_an_unknown_issuer() -> None:
    it = Delegation()
    it.refuses(actor=stranger.mint())

    assert {TARGET} == set(it.keys.asked)


def test_exc_09_an_actor_of_an_issuer_whose_signatures_are_not_verified_is_refused() -> None:
    entry = {"issuer": PARTNER, "verify_signature": False, "insecure_skip_subject_signature": True}
    it = Delegation(delegating(None, entry))

    # The subject's signature may be skipped, and is remembered as such: the actor's is not.
    assert "actor_issuer_unverified" == it.refuses(FOREIGN, agent(partner)).reason
    assert "actor_issuer_unverified" == it.refuses(FOREIGN, FOREIGN).reason


def test_exc_09_an_id_token_is_an_actor_where_it_is_declared() -> None:
    it = Delegation(delegating({**HEADER, "type": TOKEN_TYPE_ID_TOKEN}))

    assert "exchange" == it.ask(actor=agent(header={"typ": "JWT"}, token_use="id")).decision
    assert "actor_jwt_claim" == it.refuses(actor=AGENT).reason


def test_actor_clients_stand_in_place_of_those_of_the_issuer() -> None:
    entry = {**STRICT_ENTRY, "clients": ["client-1"]}

    assert "actor_client_not_allowed" == Delegation(delegating(None, entry)).refuses().reason
    it = Delegation(delegating(None, entry, clients=["agent-client"]))
    assert "exchange" == it.ask().decision
    # And no client is accepted as a subject for that.
    assert "client_not_allowed" == it.refuses(agent(aud="gateway")).reason


@pytest.mark.parametrize("claims", [{"exp": NOW}, {"cnf": {"jkt": "x"}}])
def test_a_bad_actor_token_of_the_configuration_is_the_operators_fault(claims: dict[str, Any]) -> None:
    it = Delegation(delegating(static(agent(**claims))))

    error = it.refuses(actor=None)

    assert (500, "server_error", 0) == (error.status, error.error, it.exchanges)
    assert error.reason in {"actor_jwt_timestamp", "actor_jwt_claim"}


def test_an_opaque_actor_token_of_the_configuration_is_sent_as_it_stands() -> None:
    it = Delegation(delegating(static("b3BhcXVl")))
    result = it.ask(actor=None)

    assert "b3BhcXVl" == it.last_form["actor_token"]
    assert (None, ("actor_unproven",)) == (result.actor, result.notes)


def test_exc_09_a_required_actor_is_required() -> None:
    it = Delegation(delegating(required=True))

    error = it.refuses(actor=None)

    assert (403, "access_denied", "actor_missing", 0) == (
        error.status,
        error.error,
        error.reason,
        it.exchanges,
    )
    assert "exchange" == it.ask().decision


def test_a_token_that_is_forwarded_has_its_actor_already_where_one_is_required() -> None:
    it = Delegation(delegating(required=True))

    assert "actor_missing" == it.refuses(FORWARDED).reason
    assert "forward" == it.ask(target.mint(aud="api", act=ACT)).decision


# --- may_act --------------------------------------------------------------------------


def subject(**claims: Any) -> str:
    return target.mint(aud="gateway", **claims)


@pytest.mark.parametrize("named", [ABSENT, {}, {"sub": "other"}, {"iss": TARGET}, None, "agent"])
def test_clm_28_may_act_is_enforced_when_asked(named: object) -> None:
    token = subject(may_act=named)
    it = Delegation(delegating(enforce_may_act=True))

    error = it.refuses(token)

    assert (403, "access_denied", "actor_not_permitted", 0) == (
        error.status,
        error.error,
        error.reason,
        it.exchanges,
    )
    assert "exchange" == Delegation().ask(token).decision


def test_whoever_may_act_acts() -> None:
    it = Delegation(delegating(enforce_may_act=True))

    assert "exchange" == it.ask(subject(may_act={"sub": "agent"})).decision


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"clients": ["agent-client"]}, "actor_client_not_allowed"),
        ({"enforce_may_act": True}, "actor_not_permitted"),
    ],
)
def test_exc_09_a_caller_is_not_his_own_actor_where_actors_are_named(
    policy: dict[str, Any], reason: str
) -> None:
    it = Delegation(delegating(required=True, **policy))

    assert (reason, 403, 0) == (
        (refused := it.refuses(SUBJECT, SUBJECT)).reason,
        refused.status,
        it.exchanges,
    )


def test_may_act_is_judged_on_every_request() -> None:
    it = Delegation(delegating(enforce_may_act=True))
    token = subject(may_act={"sub": "agent"})
    it.ask(token)

    assert "hit" == it.ask(token, warm=True).cache
    assert "actor_not_permitted" == it.refuses(token, agent(sub="other")).reason


# --- the result -----------------------------------------------------------------------

DIFFERENT: dict[str, Any] = {
    "another-sub": {"sub": "other"},
    "another-issuer": {"sub": "agent", "iss": PARTNER},
    "inside-another": {"sub": "other", "act": ACT},
    "nobody": {"email": "agent@idp.test"},
}


@pytest.mark.parametrize("narrowing", ["enforce", "audit", "off"])
@pytest.mark.parametrize("act", DIFFERENT.values(), ids=[f"EXC-22-{name}" for name in DIFFERENT])
def test_a_result_of_another_actor_is_refused(act: object, narrowing: str) -> None:
    raw = delegating()
    raw["token_exchange"]["result"] = {"narrowing": narrowing}
    it = Delegation(raw, token_response(result_token(act=act)))

    error = it.refuses()

    assert (502, "server_error", "result_actor_differs") == (error.status, error.error, error.reason)
    # Refused once more: nothing of it was kept.
    assert "result_actor_differs" == it.refuses().reason


def test_exc_22_a_result_without_an_actor_is_noted() -> None:
    it = Delegation(answer=token_response(result_token()))

    assert ("actor_not_in_result",) == it.ask().notes
    assert 1 == it.metrics.counts["result_notes,note=actor_not_in_result"]
    assert "actor_not_in_result" == it.audit.events[-1].facts["notes"]


def test_exc_22_a_result_without_an_actor_is_refused_where_one_is_required() -> None:
    it = Delegation(delegating(required=True), token_response(result_token()))

    assert (502, "result_actor_missing") == ((error := it.refuses()).status, error.reason)


@pytest.mark.parametrize(("narrowing", "refused"), [("enforce", True), ("audit", False), ("off", False)])
def test_exc_22_a_flow_of_kind_delegation_asks_for_an_actor(narrowing: str, refused: bool) -> None:
    raw = delegating()
    raw["token_exchange"] |= {"flow": {"kind": "delegation"}, "result": {"narrowing": narrowing}}
    it = Delegation(raw, token_response(result_token()))

    if refused:
        assert "result_actor_missing" == it.refuses().reason
    else:
        assert ("actor_not_in_result",) == it.ask().notes
    # Without an actor token nobody was asked for.
    assert "exchange" == it.ask(actor=None).decision


def test_a_result_that_is_not_read_proves_no_actor() -> None:
    raw = delegating()
    raw["token_exchange"]["result"] = {"validation": "none"}
    it = Delegation(raw, token_response("b3BhcXVl"))

    assert ("actor_unproven",) == it.ask().notes


def test_exc_20_an_actor_token_is_no_result() -> None:
    it = Delegation(answer=token_response(AGENT))

    assert (502, "actor_token_echoed") == ((error := it.refuses()).status, error.reason)


def chain(depth: int) -> dict[str, Any]:
    return {"sub": "agent"} if depth == 1 else {"sub": "agent", "act": chain(depth - 1)}


@pytest.mark.parametrize(("bound", "longest"), [(None, 4), (1, 1), (6, 6)])
def test_exc_31_a_chain_of_actors_ends(bound: int | None, longest: int) -> None:
    raw = delegating(**({"max_chain_depth": bound} if bound else {}))

    # The subject's, the actor's and the result's, at the border and beyond it.
    assert "exchange" == Delegation(raw).ask(subject(act=chain(longest))).decision
    assert "jwt_claim" == Delegation(raw).refuses(subject(act=chain(longest + 1))).reason
    assert "actor_jwt_claim" == Delegation(raw).refuses(actor=agent(act=chain(longest + 1))).reason
    within, beyond = (token_response(result_token(act=chain(depth))) for depth in (longest, longest + 1))
    assert "exchange" == Delegation(raw, within).ask().decision
    assert "result_jwt_claim" == Delegation(raw, beyond).refuses().reason


def test_exc_31_a_result_that_comes_in_again_grows_until_the_bound() -> None:
    token: str = SUBJECT
    act: dict[str, Any] = {"sub": "agent"}
    for number in range(4):
        grown = target.mint(aud="gateway", azp="gateway", act=act, jti=f"round-{number}")
        result = Delegation(answer=token_response(grown)).ask(token)
        assert result.exchanged is not None
        token, act = result.exchanged.token.reveal(), {"sub": "agent", "act": act}

    grown = target.mint(aud="gateway", azp="gateway", act=act)
    assert "result_jwt_claim" == Delegation(answer=token_response(grown)).refuses(token).reason


# --- cache, lease, audit --------------------------------------------------------------


def test_cache_08_requests_of_different_actors_share_nothing() -> None:
    answers: list[Answer] = [
        token_response(result_token(act={"sub": name} if name else ABSENT, jti=f"for-{name}"))
        for name in ("agent", "other", None)
    ]
    it = Delegation(answer=answers)
    actors = (AGENT, agent(sub="other"), None)
    results = [it.ask(actor=actor) for actor in actors]

    assert ["miss", "miss", "miss"] == [result.cache for result in results]
    assert 3 == len({result.exchanged.token.reveal() for result in results if result.exchanged})
    again = [it.ask(actor=actor, warm=True) for actor in actors]
    assert [result.exchanged for result in results] == [result.exchanged for result in again]


def test_cache_08_an_actor_token_and_a_subject_token_do_not_change_places() -> None:
    it = Delegation(
        delegating(None, {"issuer": TARGET, "conditions": {"has_audience": ["gateway"]}}),
        [
            token_response(result_token(act=ACT)),
            token_response(result_token(sub="agent", act={"sub": "user-1"})),
        ],
    )

    assert ["miss", "miss"] == [it.ask(SUBJECT, AGENT).cache, it.ask(AGENT, SUBJECT).cache]


def test_an_exchange_is_kept_no_longer_than_the_actor_token() -> None:
    it = Delegation()
    actor = agent(exp=NOW + 60)
    it.ask(actor=actor)

    it.clock.advance(60 - REUSE_MARGIN_S - 1)
    assert "hit" == it.ask(actor=actor, warm=True).cache
    it.clock.advance(1)
    with pytest.raises(NotInMemoryError):
        it.ask(actor=actor, warm=True)


def test_a_cached_exchange_is_not_given_with_an_actor_token_that_ended() -> None:
    it = Delegation()
    actor = agent(exp=NOW + 60)
    it.ask(actor=actor)
    it.clock.step_wall(60)

    assert "actor_jwt_timestamp" == it.refuses(actor=actor).reason


def test_the_actor_is_audited_under_a_pseudonym() -> None:
    it = Delegation()
    it.ask()
    facts = it.audit.events[-1].facts

    assert (TARGET, "agent-client") == (facts["actor_iss"], facts["actor_client"])
    pseudonym = facts["actor"]
    assert isinstance(pseudonym, str)
    assert 16 == len(pseudonym)
    assert pseudonym != facts["subject"]
    # The same party as a subject has the same pseudonym; that the result is another's is another matter.
    it.refuses(AGENT, actor=None)
    assert pseudonym == it.audit.events[-1].facts["subject"]


def test_a_refusal_names_the_actor_once_it_is_proven() -> None:
    permitted = Delegation(delegating(enforce_may_act=True))
    permitted.refuses()
    assert TARGET == permitted.audit.events[-1].facts["actor_iss"]

    differs = Delegation(answer=token_response(result_token(act={"sub": "other"})))
    differs.refuses()
    assert "agent-client" == differs.audit.events[-1].facts["actor_client"]
    # The event alone: an alarm speaks of what an operator can mend.
    assert {"claim": "act"} == differs.refuses().facts

    unproven = Delegation()
    unproven.refuses(actor=stranger.mint())
    assert "actor_iss" not in unproven.audit.events[-1].facts


def test_no_event_holds_an_actor_token() -> None:
    for raw in (delegating(), delegating(static(AGENT))):
        it = Delegation(raw)
        it.ask()
        for part in AGENT.split("."):
            assert part not in repr([it.audit.events, it.config, it.metrics.counts])


# --- the plugin -----------------------------------------------------------------------


class Asked:
    """A PDK object: answers for headers, keeps what is set."""

    def __init__(self, **headers: str) -> None:
        self._headers = headers

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *arguments: Any) -> str:
        if arguments == ("authorization",):
            return self._headers.get("authorization", "")
        if arguments == ("http_x_actor_token",):
            return self._headers.get("actor", "")
        return ""


class Desk:
    """An instance of the plugin over a flow of fakes."""

    def __init__(self, raw: dict[str, Any] | None = None, answer: Answer | None = None) -> None:
        self.bench = Delegation(raw, answer)
        plugin = TokenExchangePlugin(lambda _: self.bench.flow, self.bench.clock)
        self.instance: Any = plugin.start(raw or delegating())

    def cold(self, actor: str = AGENT) -> None:
        self.instance.access(Asked(authorization="Bearer " + SUBJECT, actor=actor))

    def warm(self, actor: str = AGENT, **facts: str) -> Any:
        return warm(self.instance, header="Bearer " + SUBJECT, actor=actor, **facts)


def actor_plugin(**changes: Any) -> Any:
    exchange = {
        "subject_token_issuers": [{"issuer": TARGET, "conditions": {"has_audience": ["api"]}}],
        "request": {"actor_token": HEADER},
    }
    return start(issuer=TARGET, token_exchange=exchange, **changes)


def test_the_actors_header_is_asked_for_only_where_it_is_configured() -> None:
    with_actor, _ = actor_plugin()
    without, _ = start()

    assert "http_x_actor_token" in {fetch.argument for fetch in with_actor.prefetch}
    assert len(without.prefetch) + 1 == len(with_actor.prefetch)


@pytest.mark.parametrize("value", ["ac.tor.token", "Bearer ac.tor.token", "bearer  ac.tor.token"])
def test_the_header_holds_the_token_with_or_without_its_scheme(value: str) -> None:
    instance, flow = actor_plugin()
    warm(instance, header="Bearer a.b.c", actor=value)

    assert ["ac.tor.token"] == flow.actor_tokens


def test_an_empty_header_is_no_actor() -> None:
    instance, flow = actor_plugin()
    warm(instance, header="Bearer a.b.c")

    assert [None] == flow.actor_tokens


@pytest.mark.parametrize("value", ["a.b.c, d.e.f", "Basic YTpi", "a b", "\u00e4.b.c", "a\0b", "x" * 9000])
def test_exc_09_a_malformed_actor_token_is_400(value: str) -> None:
    instance, flow = actor_plugin()

    assert 400 == warm(instance, header="Bearer a.b.c", actor=value).status
    assert [] == flow.tokens
    assert flow.refusals[0].reason in {"actor_credential_malformed", "actor_credential_too_long"}


SPELLINGS = {"x-actor-token", "x_actor-token", "x-actor_token", "x_actor_token"}


def cleared(outcome: Any) -> set[str]:
    calls = read_calls(outcome)
    return {value for name, value in calls if name == "kong.service.request.clear_header"}


@pytest.mark.parametrize("hide", [True, False])
def test_exc_09_the_actors_header_never_goes_upstream(hide: bool) -> None:
    from tests.unit.test_plugin import forwarded

    exchanging, _ = actor_plugin(hide_credentials=hide)
    assert cleared(warm(exchanging, header="Bearer a.b.c", actor="a.b.c")) >= SPELLINGS

    exchange = {
        "subject_token_issuers": [{"issuer": TARGET, "conditions": {"has_audience": ["api"]}}],
        "request": {"actor_token": HEADER},
    }
    forwarding, _ = start(forwarded, issuer=TARGET, token_exchange=exchange, hide_credentials=hide)
    for actor in ("", "a.b.c"):
        assert cleared(warm(forwarding, header="Bearer a.b.c", actor=actor)) >= SPELLINGS


def test_exc_09_a_preflight_takes_no_actor_upstream() -> None:
    instance, _ = actor_plugin(run_on_preflight=False)

    assert cleared(warm(instance, method="OPTIONS", actor="no token at all")) >= SPELLINGS


@pytest.mark.parametrize("listed", ["X-Actor-Token", "close, x-actor-token", "x-ACTOR-token ,keep-alive"])
def test_gw_20_connection_may_not_name_the_actors_header(listed: str) -> None:
    instance, flow = actor_plugin()

    assert 400 == warm(instance, header="Bearer a.b.c", actor="a.b.c", connection=listed).status
    assert "connection_names_credential" == flow.refusals[0].reason


def test_the_actor_may_stand_in_authorization_where_the_subject_does_not() -> None:
    exchange = {
        "subject_token_issuers": [{"issuer": TARGET, "conditions": {"has_audience": ["api"]}}],
        "request": {"actor_token": {"source": "header", "header_name": "Authorization"}},
    }
    instance, flow = start(
        issuer=TARGET,
        token_exchange=exchange,
        bearer_token_header_name="X-User-Token",
        upstream_access_token_header="X-Token",
    )
    outcome = warm(instance, header="a.b.c", actor="Bearer ac.tor.token")

    assert ["ac.tor.token"] == flow.actor_tokens
    assert {"authorization", "x-user-token"} <= cleared(outcome)


def test_cache_08_a_lease_is_for_one_actor() -> None:
    desk = Desk()
    desk.cold()
    first = desk.warm()

    assert first is not None
    assert desk.warm() is first
    # Another actor, and none, take the long way.
    assert desk.warm(agent(sub="other")) is None
    assert desk.warm("") is None


def test_a_lease_ends_with_the_actor_token() -> None:
    # The cached result outlives it on the wall clock alone when its own end is later: the lease must not.
    desk = Desk()
    actor = agent(exp=NOW + 8)
    desk.cold(actor)
    assert desk.warm(actor).status is None

    desk.bench.clock.step_wall(8)

    assert 401 == desk.warm(actor).status


def test_later_plugins_learn_who_acts() -> None:
    desk = Desk()
    desk.cold()
    shared = dict(read_calls(desk.warm()))["kong.ctx.shared.set"][1]

    assert (TARGET, "agent") == (shared["actor_issuer"], shared["actor"])


# --- what loads -----------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no-header-name": ({"source": "header"}, {}, "request.actor_token.header_name"),
    "no-token": ({"source": "config"}, {}, "request.actor_token.static_token"),
    "subjects-header": (
        {"source": "header", "header_name": "authorization"},
        {},
        "request.actor_token.header_name",
    ),
    "cookie": ({"source": "header", "header_name": "Cookie"}, {}, "request.actor_token.header_name"),
    "underscore": ({"source": "header", "header_name": "x_actor"}, {}, "request.actor_token.header_name"),
    "no-uri": ({**HEADER, "type": "access_token"}, {}, "request.actor_token.type"),
    "no-token-characters": (static("a b"), {}, "request.actor_token.static_token"),
    "endless-token": (static("a" * 9000), {}, "request.actor_token.static_token"),
    "required-of-nobody": ({"source": "none"}, {"required": True}, "actor.required"),
    "may-act-of-nobody": ({"source": "none"}, {"enforce_may_act": True}, "actor.enforce_may_act"),
    "clients-of-nobody": ({"source": "none"}, {"clients": ["a"]}, "actor.clients"),
    "opaque-and-may-act": (static("b3BhcXVl"), {"enforce_may_act": True}, "actor.enforce_may_act"),
    "unknown-and-clients": (static(stranger.mint()), {"clients": ["a"]}, "actor.clients"),
    "no-depth": (HEADER, {"max_chain_depth": 0}, "actor.max_chain_depth"),
}


@pytest.mark.parametrize(("token", "policy", "path"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_kept_does_not_load(token: dict[str, Any], policy: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(delegating(token, **policy))

    assert "token_exchange." + path == caught.value.path
    assert str(token.get("static_token")) not in str(caught.value)


def test_the_jwt_bearer_grant_has_no_actor() -> None:
    raw = delegating()
    raw["token_exchange"]["grant_type"] = "jwt_bearer"
    with pytest.raises(ConfigError) as caught:
        load_config(raw)

    assert "token_exchange.request.actor_token.source" == caught.value.path


def test_a_required_actor_cannot_be_proven_in_a_result_that_is_not_read() -> None:
    raw = delegating(required=True)
    raw["token_exchange"]["result"] = {"validation": "none"}
    with pytest.raises(ConfigError) as caught:
        load_config(raw)

    assert "token_exchange.actor.required" == caught.value.path


def test_an_actor_token_and_a_proof_of_possession_have_headers_of_their_own() -> None:
    raw = delegating({"source": "header", "header_name": "dpop"})
    assert "dpop" == load_config(raw).actor.header_name
    with pytest.raises(ConfigError) as caught:
        load_config({**raw, "proof_of_possession_dpop": "optional"})

    assert "token_exchange.request.actor_token.header_name" == caught.value.path


def test_what_is_not_used_is_a_warning() -> None:
    warnings = load_config(delegating({"source": "none", "header_name": "X-Actor"})).warnings

    assert ("token_exchange.request.actor_token.header_name: not used: source is none",) == warnings


FINDINGS: list[tuple[dict[str, Any], dict[str, Any], set[str]]] = [
    (HEADER, {}, {"actor.required", "actor.enforce_may_act"}),
    (HEADER, {"required": True, "enforce_may_act": True}, set()),
    (static("b3BhcXVl"), {"required": True}, {"request.actor_token.static_token"}),
    ({"source": "none"}, {}, set()),
]


@pytest.mark.parametrize(("token", "policy", "paths"), FINDINGS)
def test_what_is_left_open_is_a_finding(
    token: dict[str, Any], policy: dict[str, Any], paths: set[str]
) -> None:
    found = {
        finding.path
        for finding in load_config(delegating(token, **policy)).findings
        if "actor" in finding.path
    }

    assert {"token_exchange." + path for path in paths} == found


def test_strict_wants_the_actor() -> None:
    raw = delegating()
    raw["audience_required"] = ["orders"]
    raw["token_exchange"] |= {"strict": True, "result": {"max_lifetime": 600, "same_subject": "sub"}}
    with pytest.raises(ConfigError) as caught:
        load_config(raw)
    assert "token_exchange.actor.required" == caught.value.path

    required = copy.deepcopy(raw)
    required["token_exchange"]["actor"] = {"required": True}
    assert load_config(required).actor.required


def test_a_reference_that_kong_resolves_is_a_token_for_a_linter() -> None:
    raw = delegating(static("{vault://env/actor}"), enforce_may_act=True)

    assert load_config(raw, allow_references=True).actor.verified
    with pytest.raises(ConfigError):
        load_config(raw)

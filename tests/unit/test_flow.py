"""The access pipeline over fakes: every decision, every refusal, and what is asked of whom."""

import copy
import hashlib
import hmac
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest

from kong_token_exchange.config import PluginConfig, load_config
from kong_token_exchange.core.cache_key import digest_fields
from kong_token_exchange.core.claims import parse_claims
from kong_token_exchange.core.jwk import parse_jwk_set
from kong_token_exchange.core.possession import NO_EVIDENCE, Evidence
from kong_token_exchange.errors import (
    AccessDeniedError,
    ClientRefusedError,
    DeadlineError,
    ExchangedTokenError,
    InsufficientScopeError,
    InvalidTokenError,
    IssuerUnavailableError,
    NonConformingResponseError,
    TimestampError,
    TokenExchangeError,
)
from kong_token_exchange.flow import REUSE_MARGIN_S, Flow, FlowResult
from kong_token_exchange.ports import AuditEvent, NotInMemoryError, Refresher, VerifiedToken
from kong_token_exchange.protocol.bearer import render
from kong_token_exchange.protocol.http_message import HttpRequest, HttpResponse
from kong_token_exchange.shell.audit_log import AuditLog
from kong_token_exchange.shell.clock import SystemClock
from kong_token_exchange.shell.proof_memory import SharedProofMemory
from kong_token_exchange.shell.token_cache import MemoryTokenCache
from tests.support.fakes import (
    ACCESS_TOKEN_TYPE,
    PATIENCE_S,
    Answer,
    FakeAudit,
    FakeClock,
    FakeKeySource,
    FakeMetrics,
    FakeSender,
    error_response,
    form_of,
    json_response,
    run_in_threads,
    token_response,
)
from tests.support.minting import ABSENT, LIFETIME, NOW, FakeIssuer, b64, public_pem, to_json
from tests.unit.test_kong_examples import CROSS_DOMAIN, KEYCLOAK, MULTI_IDP, TRANSFORMATION, A, B

TARGET, PARTNER = "https://idp.test/realms/a", "https://partner.test"
ENDPOINT = "https://idp.test/realms/a/token"
ID_TOKEN_TYPE = "urn:ietf:params:oauth:token-type:id_token"

target = FakeIssuer(TARGET)
partner = FakeIssuer(PARTNER, label="partner")
stranger = FakeIssuer("https://stranger.test", label="stranger")
# Says it is the target and has keys of its own.
forger = FakeIssuer(TARGET, label="stranger")

CONFIG: dict[str, Any] = {
    "issuer": TARGET,
    "token_endpoint": ENDPOINT,
    "client_id": ["gateway"],
    "client_secret": ["s3cret"],
    "token_exchange": {
        "subject_token_issuers": [
            {"issuer": TARGET, "conditions": {"has_audience": ["gateway"]}},
            {"issuer": PARTNER},
        ],
    },
}


def config_with(
    changes: dict[str, Any] | None = None, *entries: dict[str, Any], **exchange: Any
) -> dict[str, Any]:
    """Return CONFIG with top-level *changes*, other *entries*, and *exchange* members changed."""
    raw = copy.deepcopy(CONFIG)
    raw.update(changes or {})
    raw["token_exchange"].update(exchange)
    if entries:
        raw["token_exchange"]["subject_token_issuers"] = list(entries)
    return raw


def result_token(**claims: Any) -> str:
    """Mint what the target issuer gives for a good subject token."""
    return target.mint(**{"aud": "orders", "azp": "gateway", "jti": "result", **claims})


class Bench:
    """A flow over fakes, and what was asked of them."""

    def __init__(
        self,
        raw: dict[str, Any] | PluginConfig | None = None,
        answer: Answer | list[Answer] | None = None,
        *,
        cache: MemoryTokenCache | None = None,
        clock: FakeClock | SystemClock | None = None,
        issuers: tuple[FakeIssuer, ...] = (target, partner),
        refresher: Refresher | None = None,
    ) -> None:
        self.config = raw if isinstance(raw, PluginConfig) else load_config(CONFIG if raw is None else raw)
        self.clock: Any = clock or FakeClock()
        endpoint = self.config.target.token_endpoint or ENDPOINT
        self.sender = FakeSender({endpoint: answer or token_response(result_token())})
        self.keys = FakeKeySource(
            {issuer.issuer: issuer.jwks() for issuer in issuers}, token_endpoint=ENDPOINT
        )
        self.cache = cache or MemoryTokenCache(self.clock)
        self.audit = FakeAudit()
        self.metrics = FakeMetrics()
        self.proofs = SharedProofMemory(now=0.0)
        self.flow = Flow(
            self.config,
            sender=self.sender,
            keys=self.keys,
            cache=self.cache,
            clock=self.clock,
            audit=self.audit,
            metrics=self.metrics,
            proofs=self.proofs,
            refresher=refresher,
        )

    def run(self, token: str, *, within: float | None = 5.0, evidence: Evidence = NO_EVIDENCE) -> FlowResult:
        deadline = None if within is None else self.clock.monotonic() + within
        return self.flow.run(token, deadline=deadline, evidence=evidence)

    def token(self, token: str, *, within: float | None = 5.0) -> str:
        """Return the exchanged token."""
        result = self.run(token, within=within)
        assert result.exchanged is not None
        return result.exchanged.token.reveal()

    def refusal(self, token: str, *, within: float | None = 5.0) -> TokenExchangeError:
        with pytest.raises(TokenExchangeError) as caught:
            self.run(token, within=within)
        error = caught.value
        # Whoever is refused is told by class alone, counted and audited once.
        event = self.audit.events[-1]
        assert ("refuse", error.reason, error.status) == (event.outcome, event.reason, event.status)
        return error

    @property
    def exchanges(self) -> int:
        return self.sender.count()

    @property
    def nothing_asked(self) -> bool:
        return not (self.sender.count() or self.keys.asked or self.keys.asked_newer)


SUBJECT = target.mint(aud=["gateway", "other"])
FOREIGN = partner.mint()
FORWARDED = target.mint(aud="api")


# --- the three decisions --------------------------------------------------------------


def test_a_token_of_the_target_issuer_whose_conditions_match_is_exchanged() -> None:
    it = Bench()

    result = it.run(SUBJECT)

    assert ("exchange", "same_issuer", "miss") == (result.decision, result.relation, result.cache)
    assert result.exchanged is not None
    assert result.exchanged.claims is not None
    assert (("orders",), "gateway", "user-1") == (
        result.exchanged.claims.aud,
        result.exchanged.claims.client,
        result.exchanged.claims.sub,
    )
    assert [
        [
            ("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange"),
            ("subject_token", SUBJECT),
            ("subject_token_type", ACCESS_TOKEN_TYPE),
            ("scope", "openid"),
        ]
    ] == it.sender.forms()
    assert "Basic Z2F0ZXdheTpzM2NyZXQ=" == it.sender.requests[0].headers["Authorization"]


def test_a_token_of_the_target_issuer_whose_conditions_do_not_match_is_forwarded() -> None:
    it = Bench()

    result = it.run(FORWARDED)

    assert ("forward", "same_issuer", "none", None) == (
        result.decision,
        result.relation,
        result.cache,
        result.exchanged,
    )
    assert 0 == it.exchanges


def test_exc_06_a_token_is_forwarded_only_after_it_was_verified() -> None:
    forged = forger.mint(aud="api", header={"kid": "issuer-RS256"})

    assert "jwt_signature" == Bench().refusal(forged).reason


def test_a_token_of_another_issuer_is_always_exchanged() -> None:
    it = Bench()

    result = it.run(FOREIGN)

    assert ("exchange", "cross_issuer", "miss", 1) == (
        result.decision,
        result.relation,
        result.cache,
        it.exchanges,
    )
    assert (1, 1) == (it.keys.asked[PARTNER], it.keys.asked[TARGET])


def test_the_first_matching_entry_decides_how_the_token_is_named() -> None:
    raw = config_with(
        None,
        {"issuer": TARGET, "conditions": {"has_audience": ["first"]}, "subject_token_type": "urn:x:first"},
        {"issuer": TARGET, "conditions": {"has_audience": ["second"]}, "subject_token_type": "urn:x:second"},
    )
    it = Bench(raw)
    for audience in ("first", "second", ["second", "first"]):
        it.run(target.mint(aud=audience))

    named = [dict(form)["subject_token_type"] for form in it.sender.forms()]
    assert ["urn:x:first", "urn:x:second", "urn:x:first"] == named


def test_the_endpoint_is_discovered_where_none_is_configured() -> None:
    raw = config_with()
    del raw["token_endpoint"]
    it = Bench(raw)

    assert it.token(SUBJECT)
    assert ENDPOINT == it.sender.requests[0].url


def test_exc_05_each_issuers_keys_are_asked_of_that_issuer_alone() -> None:
    it = Bench()
    it.run(FOREIGN)

    assert [ENDPOINT] == [request.url for request in it.sender.requests]
    assert {PARTNER, TARGET} == set(it.keys.asked)


# --- subject tokens that are refused --------------------------------------------------

UNKNOWN_ISSUERS: dict[str, Any] = {
    "other": "https://stranger.test",
    "slash": TARGET + "/",
    "case": TARGET.upper(),
    "prefix": TARGET[:-1],
    "longer": TARGET + "a",
    "list": [TARGET],
    "object": {"iss": TARGET},
    "null": None,
    "number": 1,
    "absent": ABSENT,
    "empty": "",
    "internal-address": "http://169.254.169.254/",
}


@pytest.mark.parametrize(
    "issuer", UNKNOWN_ISSUERS.values(), ids=[f"KEY-02-{name}" for name in UNKNOWN_ISSUERS]
)
def test_nothing_is_asked_for_an_unknown_issuer(issuer: object) -> None:
    it = Bench()

    for within in (5.0, None):
        error = it.refusal(target.mint(iss=issuer), within=within)
        assert (401, "invalid_token", "issuer_unknown") == (error.status, error.error, error.reason)
    assert it.nothing_asked


HEADER = {"alg": "RS256", "typ": "at+jwt", "kid": "issuer-RS256"}
ENTRY = {"issuer": TARGET, "conditions": {"has_audience": ["gateway"]}}


def crafted(header: dict[str, Any] | None = None, payload: bytes | None = None) -> str:
    good = to_json(target.claims(aud="gateway"))
    return target.craft(to_json({**HEADER, **(header or {})}), good if payload is None else payload)


REFUSED_TOKENS: dict[str, tuple[str, str]] = {
    "opaque": ("b3BhcXVl", "token_opaque"),
    "encrypted": ("a.b.c.d.e", "token_encrypted"),
    "too-long": (target.mint(aud="gateway", x="y" * 9000), "token_too_long"),
    "no-algorithm": (crafted({"alg": "none"}), "jwt_algorithm"),
    "symmetric": (crafted({"alg": "HS256"}), "jwt_algorithm"),
    "critical": (crafted({"crit": ["exp"]}), "jws_header_unsupported"),
    "unknown-key": (crafted({"kid": "unknown"}), "key_not_found"),
    "EXC-07-forged": (forger.mint(aud="gateway", header={"kid": "issuer-RS256"}), "jwt_signature"),
    "EXC-07-claims-changed": (
        ".".join((SUBJECT.split(".")[0], b64(to_json(target.claims(sub="admin"))), SUBJECT.split(".")[2])),
        "jwt_signature",
    ),
    "no-exp": (target.mint(aud="gateway", exp=ABSENT), "jwt_claim"),
    "expired": (target.mint(aud="gateway", exp=NOW - 1), "jwt_timestamp"),
    "expires-now": (target.mint(aud="gateway", exp=NOW), "jwt_timestamp"),
    "not-yet": (target.mint(aud="gateway", nbf=NOW + 1), "jwt_timestamp"),
    "FAULT-51-issued-in-the-future": (target.mint(aud="gateway", iat=NOW + 1), "jwt_timestamp"),
    "id-token": (target.mint(aud="gateway", header={"typ": "JWT"}, token_use="id"), "jwt_claim"),
    "sender-constrained": (target.mint(aud="gateway", cnf={"jkt": "x"}), "jwt_claim"),
    "EXC-08-aud-is-an-object": (target.mint(aud={"gateway": True}), "jwt_claim"),
    "EXC-08-aud-holds-a-list": (target.mint(aud=["gateway", ["x"]]), "jwt_claim"),
    "EXC-08-scope-is-a-number": (target.mint(aud="gateway", scope=1), "jwt_claim"),
    "EXC-08-scope-has-two-spaces": (target.mint(aud="gateway", scope="a  b"), "jwt_claim"),
}


@pytest.mark.parametrize(("token", "reason"), REFUSED_TOKENS.values(), ids=REFUSED_TOKENS.keys())
def test_bad_subject_tokens_are_401_and_go_nowhere(token: str, reason: str) -> None:
    it = Bench()

    error = it.refusal(token)

    assert isinstance(error, InvalidTokenError)
    assert (401, "invalid_token", reason, 0) == (error.status, error.error, error.reason, it.exchanges)
    # On the loop it is refused as well: a bad token needs no thread.
    assert reason == it.refusal(token, within=None).reason


def test_exc_07_a_public_key_is_no_shared_secret() -> None:
    signing_input = f"{b64(to_json({**HEADER, 'alg': 'HS256'}))}.{b64(to_json(target.claims(aud='gateway')))}"
    secret = public_pem(target.keys["RS256"].private)
    token = f"{signing_input}.{b64(hmac.new(secret, signing_input.encode(), hashlib.sha256).digest())}"

    assert "jwt_algorithm" == Bench().refusal(token).reason


POLICY_REFUSALS: dict[str, tuple[dict[str, Any], str, type[TokenExchangeError], str]] = {
    "accepted-audience": (
        config_with(None, {**ENTRY, "audience": ["front"]}),
        SUBJECT,
        InvalidTokenError,
        "jwt_claim",
    ),
    "accepted-audience-foreign": (
        config_with(None, {"issuer": PARTNER, "audience": ["front"]}),
        FOREIGN,
        InvalidTokenError,
        "jwt_claim",
    ),
    "required-claim": (
        config_with(None, {**ENTRY, "required_claims": ["email"]}),
        SUBJECT,
        InvalidTokenError,
        "jwt_claim",
    ),
    "typ": (config_with(None, {**ENTRY, "typ": ["JWT"]}), SUBJECT, InvalidTokenError, "jwt_claim"),
    "algorithm": (
        config_with(None, {**ENTRY, "algorithms": ["ES256"]}),
        SUBJECT,
        InvalidTokenError,
        "jwt_algorithm",
    ),
    "age": (
        config_with(None, {**ENTRY, "max_age": 10}),
        target.mint(aud="gateway", iat=NOW - 11),
        InvalidTokenError,
        "jwt_timestamp",
    ),
    "client": (
        config_with(None, {**ENTRY, "clients": ["web"]}),
        SUBJECT,
        AccessDeniedError,
        "client_not_allowed",
    ),
    "EXC-06-audience-required": (
        config_with({"audience_required": ["orders"]}),
        FORWARDED,
        AccessDeniedError,
        "audience_required",
    ),
    "claims-forbidden": (
        config_with({"claims_forbidden": ["absent", "realm_access.admin"]}),
        target.mint(aud="api", realm_access={"admin": False}),
        AccessDeniedError,
        "claim_forbidden",
    ),
    "nested-required-claim": (
        config_with(None, {**ENTRY, "required_claims": ["realm_access.roles"]}),
        target.mint(aud="gateway", realm_access={"role": "x"}),
        InvalidTokenError,
        "jwt_claim",
    ),
    "scopes-required": (
        config_with({"scopes_required": ["admin write"]}),
        FORWARDED,
        InsufficientScopeError,
        "scopes_required",
    ),
}


@pytest.mark.parametrize(
    ("raw", "token", "kind", "reason"), POLICY_REFUSALS.values(), ids=POLICY_REFUSALS.keys()
)
def test_policy_refuses_before_anything_is_exchanged(
    raw: dict[str, Any], token: str, kind: type[TokenExchangeError], reason: str
) -> None:
    it = Bench(raw)

    error = it.refusal(token)

    assert isinstance(error, kind)
    assert (reason, 0) == (error.reason, it.exchanges)
    # A verified token that was refused is refused again: what was verified is not what is allowed.
    assert reason == it.refusal(token).reason
    assert reason == it.refusal(token, within=None).reason


STRICT: dict[str, Any] = {"strict": True, "result": {"max_lifetime": 900, "same_subject": "sub"}}


@pytest.mark.parametrize("subject", [SUBJECT, FOREIGN], ids=["EXC-17-same-issuer", "EXC-17-cross-issuer"])
@pytest.mark.parametrize("request_", [{"audience": ["reports"]}, {"resource": ["https://reports.test"]}])
def test_a_result_for_another_audience_than_was_asked_for(subject: str, request_: dict[str, Any]) -> None:
    noted = Bench(config_with(request=request_))
    assert "audience_beyond_request" in noted.run(subject).notes
    assert 1 == noted.metrics.counts["result_notes,note=audience_beyond_request"]

    strict = {"audience_required": ["orders", "api"]}
    error = Bench(config_with(strict, request=request_, **STRICT)).refusal(subject)
    assert (502, "result_wider_than_policy", "audience_beyond_request") == (
        error.status,
        error.reason,
        error.facts["widening"],
    )
    asked_for = config_with(strict, request={"audience": ["orders"]}, **STRICT)
    assert () == Bench(asked_for).run(subject).notes


def test_a_forbidden_claim_is_judged_in_the_token_that_goes_upstream() -> None:
    raw = config_with({"claims_forbidden": ["email"]})
    subject = target.mint(aud="gateway", email="a@b.test")

    assert "exchange" == Bench(raw).run(subject).decision
    error = Bench(raw, token_response(result_token(email=None))).refusal(SUBJECT)
    assert (502, "result_claim_forbidden", "email") == (error.status, error.reason, error.facts["claim"])
    assert "forward" == Bench(raw).run(FORWARDED).decision


def test_a_missing_scope_is_named_in_the_challenge() -> None:
    error = Bench(config_with({"scopes_required": ["admin write", "root"]})).refusal(FORWARDED)

    answer = render(error)
    assert 403 == answer.status
    assert 'error="insufficient_scope"' in answer.headers["WWW-Authenticate"]
    assert 'scope="admin write"' in answer.headers["WWW-Authenticate"]


# --- order ----------------------------------------------------------------------------

WORSE: dict[str, Any] = {"aud": "foreign", "exp": NOW - 100, "cnf": {"jkt": "x"}, "scope": 1, "azp": "other"}


def test_the_signature_is_judged_before_any_claim() -> None:
    raw = config_with(
        None, {**ENTRY, "audience": ["front"], "clients": ["web"], "required_claims": ["email"]}
    )

    assert "jwt_signature" == Bench(raw).refusal(forger.mint(**WORSE, header={"kid": "issuer-RS256"})).reason


def test_exc_07_claims_are_judged_before_the_decision() -> None:
    it = Bench()

    # Expired, and its conditions do not match: it is neither forwarded nor exchanged.
    assert "jwt_timestamp" == it.refusal(target.mint(aud="api", exp=NOW - 1)).reason
    assert "jwt_timestamp" == it.refusal(partner.mint(exp=NOW - 1)).reason
    assert 0 == it.exchanges


def test_a_bad_token_is_401_while_everything_is_down() -> None:
    down = IssuerUnavailableError(reason="connect_failed")
    it = Bench(answer=down)
    it.keys.endpoint = down

    assert 401 == it.refusal(target.mint(aud="gateway", exp=NOW - 1)).status
    it.keys.sets = {TARGET: down, PARTNER: down}
    assert 401 == it.refusal("b3BhcXVl").status
    assert 401 == it.refusal(stranger.mint()).status
    assert 401 == it.refusal(crafted({"alg": "HS256"})).status


def test_a_good_token_is_never_401_because_of_a_fault() -> None:
    down = IssuerUnavailableError(reason="connect_failed")
    for break_it in (
        lambda it: it.keys.sets.update({TARGET: down}),
        lambda it: setattr(it.keys, "endpoint", down),
        lambda it: it.sender.script.update({ENDPOINT: down}),
    ):
        raw = config_with()
        del raw["token_endpoint"]
        it = Bench(raw)
        break_it(it)

        error = it.refusal(SUBJECT)
        assert (IssuerUnavailableError, 503, "connect_failed") == (type(error), error.status, error.reason)


# --- unknown keys ---------------------------------------------------------------------

ROTATED = FakeIssuer(TARGET, label="rotated")


def test_key_10_a_token_with_a_new_key_is_verified_after_one_fetch() -> None:
    it = Bench(answer=token_response(ROTATED.mint(aud="orders")))
    it.keys.newer[TARGET] = parse_jwk_set(ROTATED.jwks())
    token = ROTATED.mint(aud="gateway")

    with pytest.raises(NotInMemoryError):
        it.run(token, within=None)
    assert "exchange" == it.run(token).decision
    # Once for the subject token, once for the result.
    assert 2 == it.keys.asked_newer[TARGET]


def test_a_key_that_is_not_in_the_newer_set_either_is_401() -> None:
    it = Bench()
    it.keys.newer[TARGET] = parse_jwk_set(target.jwks())

    error = it.refusal(ROTATED.mint(aud="gateway"))

    assert (401, "key_not_found") == (error.status, error.reason)
    assert 1 == it.keys.asked_newer[TARGET]


def test_fault_38_a_key_that_may_exist_is_503() -> None:
    it = Bench()
    it.keys.newer[TARGET] = IssuerUnavailableError(reason="connect_failed")

    assert 503 == it.refusal(ROTATED.mint(aud="gateway")).status


def test_an_ambiguous_key_asks_for_no_other_set() -> None:
    it = Bench()
    both = [json.loads(issuer.jwks("RS256"))["keys"][0] for issuer in (target, ROTATED)]
    it.keys.sets[TARGET] = parse_jwk_set(to_json({"keys": both}))

    assert "key_ambiguous" == it.refusal(target.mint(aud="gateway", header={"kid": ABSENT})).reason
    assert 0 == it.keys.asked_newer[TARGET]


# --- the token endpoint's refusals ----------------------------------------------------

ENDPOINT_REFUSALS: dict[str, tuple[Answer, type[TokenExchangeError], int, str, str]] = {
    "invalid-grant": (
        error_response("invalid_grant"),
        InvalidTokenError,
        401,
        "invalid_token",
        "subject_token_refused",
    ),
    "keycloak-invalid-token": (
        error_response("invalid_request", "Invalid token"),
        InvalidTokenError,
        401,
        "invalid_token",
        "subject_token_refused",
    ),
    "dex-access-denied": (
        error_response("access_denied", None, 401),
        InvalidTokenError,
        401,
        "invalid_token",
        "subject_token_refused",
    ),
    "invalid-scope": (
        error_response("invalid_scope"),
        InsufficientScopeError,
        403,
        "insufficient_scope",
        "scope_refused",
    ),
    "invalid-target": (
        error_response("invalid_target"),
        AccessDeniedError,
        403,
        "access_denied",
        "target_refused",
    ),
    "access-denied": (
        error_response("access_denied", "Client is not within the token audience", 403),
        AccessDeniedError,
        403,
        "access_denied",
        "target_refused",
    ),
    "FAULT-19-invalid-client": (
        error_response("invalid_client", "Invalid client or Invalid client credentials", 401),
        ClientRefusedError,
        500,
        "server_error",
        "client_refused",
    ),
    "audience-not-found": (
        error_response("invalid_client", "Audience not found"),
        ClientRefusedError,
        500,
        "server_error",
        "audience_unknown",
    ),
    "unauthorized-client": (
        error_response("unauthorized_client"),
        ClientRefusedError,
        500,
        "server_error",
        "client_refused",
    ),
    "unsupported-grant": (
        error_response("unsupported_grant_type"),
        ClientRefusedError,
        500,
        "server_error",
        "client_refused",
    ),
    "invalid-request": (
        error_response("invalid_request", "missing audience"),
        ClientRefusedError,
        500,
        "server_error",
        "client_refused",
    ),
    "not-found": (
        HttpResponse(status=404, body=b"<html>"),
        ClientRefusedError,
        500,
        "server_error",
        "token_endpoint_refused",
    ),
    "FAULT-16-html": (
        HttpResponse(status=200, headers={"content-type": "text/html"}, body=b"<html>"),
        NonConformingResponseError,
        502,
        "server_error",
        "response_not_json",
    ),
    "FAULT-17-redirect": (
        HttpResponse(status=307, headers={"location": "https://evil.test"}),
        NonConformingResponseError,
        502,
        "server_error",
        "response_status",
    ),
    "FAULT-18-too-long": (
        NonConformingResponseError(reason="response_too_long"),
        NonConformingResponseError,
        502,
        "server_error",
        "response_too_long",
    ),
    "EXC-20-echo": (
        token_response(SUBJECT),
        NonConformingResponseError,
        502,
        "server_error",
        "subject_token_echoed",
    ),
    "FAULT-01-down": (
        IssuerUnavailableError(reason="connect_failed"),
        IssuerUnavailableError,
        503,
        "temporarily_unavailable",
        "connect_failed",
    ),
    "FAULT-08-overloaded": (
        HttpResponse(status=429),
        IssuerUnavailableError,
        503,
        "temporarily_unavailable",
        "token_endpoint_overloaded",
    ),
    "FAULT-09-failed": (
        HttpResponse(status=500, headers={"content-type": "text/html"}, body=b"<html>"),
        IssuerUnavailableError,
        503,
        "temporarily_unavailable",
        "token_endpoint_failed",
    ),
    "FAULT-05-too-slow": (
        DeadlineError(reason="deadline"),
        DeadlineError,
        504,
        "temporarily_unavailable",
        "deadline",
    ),
}


@pytest.mark.parametrize(
    ("answer", "kind", "status", "error", "reason"),
    ENDPOINT_REFUSALS.values(),
    ids=ENDPOINT_REFUSALS.keys(),
)
def test_the_token_endpoints_refusals_have_their_status(
    answer: Answer, kind: type[TokenExchangeError], status: int, error: str, reason: str
) -> None:
    it = Bench(answer=answer)

    refused = it.refusal(SUBJECT)

    assert isinstance(refused, kind)
    assert (status, error, reason) == (refused.status, refused.error, refused.reason)
    assert 1 == it.exchanges
    # What is no definite refusal of this token is not kept: the next request asks again.
    kept = reason in {"subject_token_refused", "target_refused", "scope_refused"}
    assert (reason, status) == ((again := it.refusal(SUBJECT)).reason, again.status)
    assert (1 if kept else 2) == it.exchanges
    assert (kept or None) == again.facts.get("cached")
    assert None is refused.facts.get("cached")


def test_fault_07_retry_after_reaches_the_caller() -> None:
    it = Bench(answer=HttpResponse(status=429, headers={"retry-after": "7"}))

    assert "7" == render(it.refusal(SUBJECT)).headers["Retry-After"]


def test_a_reused_assertion_is_503_and_never_cached() -> None:
    raw = config_with(None, {"issuer": PARTNER}, grant_type="jwt_bearer")
    it = Bench(
        raw,
        [
            error_response("invalid_grant", "Token reuse detected"),
            error_response("invalid_grant", "Token reuse detected"),
            token_response(result_token(), issued_token_type=...),
        ],
    )

    for _ in range(2):
        error = it.refusal(FOREIGN)
        assert (503, "assertion_reused", "1") == (
            error.status,
            error.reason,
            render(error).headers["Retry-After"],
        )
    assert "exchange" == it.run(FOREIGN).decision
    assert 3 == it.exchanges
    assert ("assertion", FOREIGN) == it.sender.forms()[0][1]


# --- proof of the result --------------------------------------------------------------

BAD_RESULTS: dict[str, tuple[str, str]] = {
    "EXC-15-other-subject": (result_token(sub="user-2"), "subject_differs"),
    "EXC-15-service-account": (result_token(sub="service-account-gateway"), "subject_differs"),
    "EXC-15-no-subject": (result_token(sub=ABSENT), "result_jwt_claim"),
    "EXC-16-other-issuer": (
        FakeIssuer("https://evil.test").mint(aud="orders"),
        "result_jwt_claim",
    ),
    "EXC-16-issuer-slash": (result_token(iss=TARGET + "/"), "result_jwt_claim"),
    "EXC-16-partner": (partner.mint(aud="orders"), "result_key_not_found"),
    "EXC-18-expired": (result_token(exp=NOW - 1), "result_jwt_timestamp"),
    "EXC-18-expires-now": (result_token(exp=NOW), "result_jwt_timestamp"),
    "EXC-18-no-exp": (result_token(exp=ABSENT), "result_jwt_claim"),
    "EXC-18-not-yet": (result_token(nbf=NOW + 60), "result_jwt_timestamp"),
    "EXC-19-unsigned": (
        f"{b64(to_json({'alg': 'none'}))}.{b64(to_json(target.claims()))}.",
        "result_jws_signature_empty",
    ),
    "EXC-19-forged": (forger.mint(aud="orders", header={"kid": "issuer-RS256"}), "result_jwt_signature"),
    "EXC-19-symmetric": (crafted({"alg": "HS256"}), "result_jwt_algorithm"),
    "EXC-19-unknown-key": (forger.mint(aud="orders"), "result_key_not_found"),
    "EXC-21-bound": (result_token(cnf={"jkt": "x"}), "result_jwt_claim"),
    "EXC-12-id-token": (
        result_token(token_use="id"),
        "result_jwt_claim",
    ),
    "EXC-12-logout-token": (target.mint(header={"typ": "logout+jwt"}), "result_jwt_claim"),
    "EXC-24-opaque": ("b3BhcXVl", "result_token_opaque"),
    "EXC-24-encrypted": ("a.b.c.d.e", "result_token_encrypted"),
    "aud-is-an-object": (result_token(aud={"a": 1}), "result_jwt_claim"),
}


@pytest.mark.parametrize(("token", "reason"), BAD_RESULTS.values(), ids=BAD_RESULTS.keys())
def test_a_result_that_is_not_proven_is_502_and_not_kept(token: str, reason: str) -> None:
    it = Bench(answer=[token_response(token), token_response(result_token())])

    error = it.refusal(SUBJECT)

    assert (ExchangedTokenError, 502, "server_error", reason) == (
        type(error),
        error.status,
        error.error,
        error.reason,
    )
    assert result_token() == it.token(SUBJECT)
    assert 2 == it.exchanges


def test_a_result_has_the_type_that_the_target_issuers_tokens_must_have() -> None:
    raw = config_with(None, {**ENTRY, "typ": ["at+jwt"]})

    assert Bench(raw).token(SUBJECT)
    plain = result_token(header={"typ": "JWT"})
    assert "result_jwt_claim" == Bench(raw, token_response(plain)).refusal(SUBJECT).reason
    assert plain == Bench(answer=token_response(plain)).token(SUBJECT)


def test_exc_17_a_result_for_another_audience_is_502() -> None:
    it = Bench(config_with({"audience_required": ["orders"]}), token_response(result_token(aud="reports")))

    assert (502, "result_audience") == (it.refusal(SUBJECT).status, it.audit.events[-1].reason)


def test_exc_14_a_result_without_a_required_scope_is_403() -> None:
    it = Bench(config_with({"scopes_required": ["write"]}), token_response(result_token(scope="read")))

    assert (403, "scopes_required") == (it.refusal(SUBJECT).status, it.audit.events[-1].reason)


def test_exc_15_across_issuers_the_subject_is_unproven_and_that_is_told() -> None:
    it = Bench(answer=token_response(result_token(sub="other-name")))

    result = it.run(FOREIGN)

    assert ("subject_unproven",) == result.notes
    assert "subject_unproven" == it.audit.events[-1].facts["notes"]
    assert 1 == it.metrics.counts["result_notes,note=subject_unproven"]


def test_exc_15_across_issuers_mapped_claims_prove_the_subject() -> None:
    pairs = [{"subject_claim": "email", "result_claim": "partner_email"}]
    raw = config_with(None, {"issuer": PARTNER}, result={"same_subject_claims": pairs})
    token = partner.mint(email="alex@partner.test")
    good = result_token(sub="other", partner_email="alex@partner.test")
    bad = result_token(sub="other", partner_email="kim@partner.test")

    assert () == Bench(raw, token_response(good)).run(token).notes
    assert "subject_differs" == Bench(raw, token_response(bad)).refusal(token).reason
    assert "subject_differs" == Bench(raw, token_response(result_token())).refusal(token).reason


def test_fault_20_a_security_event_names_nobody() -> None:
    it = Bench(answer=token_response(result_token(sub="user-2")))
    it.refusal(SUBJECT)

    event = it.audit.events[-1]
    assert (TARGET, "client-1", "sub") == (event.facts["iss"], event.facts["client"], event.facts["claim"])
    assert 16 == len(str(event.facts["subject"]))
    assert "user-" not in repr(event)


# --- narrowing ------------------------------------------------------------------------

LIMITS: dict[str, tuple[dict[str, Any], HttpResponse, str]] = {
    "EXC-14-scope": (
        {"allowed_scopes": ["read", "openid"]},
        token_response(result_token(scope="openid read admin")),
        "scope_not_allowed",
    ),
    "EXC-14-scope-of-the-answer": (
        {"allowed_scopes": ["read", "openid"]},
        token_response(result_token(), scope="openid read admin"),
        "scope_not_allowed",
    ),
    "EXC-14-scope-in-another-spelling": (
        {"allowed_scopes": ["read", "openid"]},
        token_response(result_token(scp=["admin"])),
        "scope_not_allowed",
    ),
    "EXC-17-audience": (
        {"allowed_audience": ["orders"]},
        token_response(result_token(aud=["orders", "admin"])),
        "audience_not_allowed",
    ),
    "EXC-17-no-audience": (
        {"allowed_audience": ["orders"]},
        token_response(result_token(aud=ABSENT)),
        "audience_not_allowed",
    ),
    "EXC-18-lifetime": (
        {"max_lifetime": 299},
        token_response(result_token(exp=NOW + 300)),
        "lifetime_not_allowed",
    ),
}


@pytest.mark.parametrize(("limits", "answer", "word"), LIMITS.values(), ids=LIMITS.keys())
def test_a_result_wider_than_policy_is_refused_audited_or_let_pass(
    limits: dict[str, Any], answer: HttpResponse, word: str
) -> None:
    enforcing = Bench(config_with(result={**limits}), answer)
    auditing = Bench(config_with(result={**limits, "narrowing": "audit"}), answer)
    off = Bench(config_with(result={**limits, "narrowing": "off"}), answer)

    error = enforcing.refusal(SUBJECT)
    assert (502, "result_wider_than_policy", {"widening": word}) == (
        error.status,
        error.reason,
        {"widening": error.facts["widening"]},
    )
    assert word in auditing.run(SUBJECT).notes
    assert word in str(auditing.audit.events[-1].facts["notes"])
    assert () == off.run(SUBJECT).notes


def test_exc_14_a_result_within_every_limit_passes() -> None:
    raw = config_with(
        result={
            "allowed_scopes": ["openid", "read"],
            "allowed_audience": ["orders"],
            "max_lifetime": LIFETIME,
        }
    )

    assert () == Bench(raw, token_response(result_token(), scope="read")).run(SUBJECT).notes


def test_exc_14_downscoping_refuses_scopes_that_the_subject_token_has_not() -> None:
    wider = token_response(result_token(scope="openid read admin"))
    downscoping = Bench(config_with(flow={"kind": "downscoping"}), wider)
    plain = Bench(answer=wider)

    assert "scope_beyond_subject" == downscoping.refusal(SUBJECT).facts["widening"]
    # Without that promise it passes, as with Kong's own plugin, and is told.
    assert ("scope_beyond_subject",) == plain.run(SUBJECT).notes
    assert "scope_beyond_subject" == plain.audit.events[-1].facts["notes"]


def test_validation_by_claims_looks_at_everything_but_the_signature() -> None:
    raw = config_with(result={"validation": "claims"})
    unsigned_for_us = forger.mint(aud="orders")

    assert unsigned_for_us == Bench(raw, token_response(unsigned_for_us)).token(SUBJECT)
    for token, reason in (
        (result_token(sub="user-2"), "subject_differs"),
        (result_token(exp=NOW), "result_jwt_timestamp"),
        (result_token(iss=PARTNER), "result_jwt_claim"),
        ("b3BhcXVl", "result_token_opaque"),
    ):
        assert reason == Bench(raw, token_response(token)).refusal(SUBJECT).reason


UNREAD = {"validation": "none"}


def test_exc_24_an_opaque_result_passes_where_nothing_is_to_be_read() -> None:
    it = Bench(config_with(result=UNREAD), token_response("b3BhcXVl"))

    result = it.run(SUBJECT)

    assert result.exchanged is not None
    assert ("b3BhcXVl", None) == (result.exchanged.token.reveal(), result.exchanged.claims)
    assert NOW + 300 - REUSE_MARGIN_S == result.exchanged.reuse_until


UNREAD_LIMITS: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "scope-named": ({"allowed_scopes": ["openid"]}, {"scope": "openid"}, None),
    "scope-too-wide": ({"allowed_scopes": ["openid"]}, {"scope": "openid admin"}, "scope_not_allowed"),
    "scope-as-requested": ({"allowed_scopes": ["openid"]}, {}, None),
    "scope-requested-too-wide": ({"allowed_scopes": ["read"]}, {}, "scope_not_allowed"),
    "lifetime": ({"max_lifetime": 300}, {}, None),
    "lifetime-too-long": ({"max_lifetime": 299}, {}, "lifetime_not_allowed"),
    "lifetime-unknown": ({"max_lifetime": 300}, {"expires_in": ...}, "lifetime_unproven"),
}


@pytest.mark.parametrize(
    ("limits", "members", "word"),
    UNREAD_LIMITS.values(),
    ids=[f"EXC-24-{name}" for name in UNREAD_LIMITS],
)
def test_limits_hold_for_results_that_are_not_read(
    limits: dict[str, Any], members: dict[str, Any], word: str | None
) -> None:
    answer = token_response("b3BhcXVl", **members)
    it = Bench(config_with(result={**UNREAD, **limits}), answer)

    if word is None:
        assert "b3BhcXVl" == it.token(SUBJECT)
    else:
        assert word == it.refusal(SUBJECT).facts["widening"]
        audited = Bench(config_with(result={**UNREAD, **limits, "narrowing": "audit"}), answer)
        assert word in audited.run(SUBJECT).notes


def test_exc_24_what_cannot_be_shown_of_an_unread_result_is_not_taken_for_granted() -> None:
    answer = token_response("b3BhcXVl")
    nothing_asked: dict[str, Any] = {
        "request": {"empty_scopes": True},
        "result": {**UNREAD, "allowed_scopes": ["read"]},
    }

    assert "scope_unproven" == Bench(config_with(**nothing_asked), answer).refusal(SUBJECT).facts["widening"]
    loaded = load_config(config_with(result=UNREAD))
    for needed, reason in (
        ({"audience_required": (frozenset({"orders"}),)}, "result_audience_unproven"),
        ({"scopes_required": (frozenset({"write"}),)}, "scopes_required"),
    ):
        it = Bench(replace(loaded, **needed), answer)  # type: ignore[arg-type]
        assert reason == it.refusal(SUBJECT).reason
    unknown = replace(loaded, scopes_required=(frozenset({"write"}),))
    unknown = replace(unknown, request=replace(loaded.request, scopes=()))
    assert "result_scope_unproven" == Bench(unknown, answer).refusal(SUBJECT).reason


# --- the cache ------------------------------------------------------------------------


def test_the_second_request_is_answered_from_memory() -> None:
    it = Bench()
    first = it.run(SUBJECT)

    for within in (5.0, None):
        again = it.run(SUBJECT, within=within)
        assert ("hit", first.exchanged) == (again.cache, again.exchanged)
    assert 1 == it.exchanges
    # The exchange is audited, hits are counted.
    assert ["exchange"] == [event.outcome for event in it.audit.events]
    assert 2 == it.metrics.counts["requests,outcome=exchange,reason=same_issuer,cache=hit"]
    assert 1 == it.metrics.counts["requests,outcome=exchange,reason=same_issuer,cache=miss"]


def test_a_result_that_is_shared_is_counted_like_a_hit_and_audited_once() -> None:
    it = Bench()
    first = it.run(SUBJECT)

    repeated = it.flow.repeat(first)

    assert ("hit", first.exchanged) == (repeated.cache, repeated.exchanged)
    assert (1, 1) == (it.exchanges, len(it.audit.events))
    assert 1 == it.metrics.counts["requests,outcome=exchange,reason=same_issuer,cache=hit"]


def test_a_forwarded_token_that_is_shared_is_audited_each_time() -> None:
    it = Bench()
    result = it.run(FORWARDED)

    assert it.flow.repeat(result) == result
    assert ["forward", "forward"] == [event.outcome for event in it.audit.events]


def test_cache_12_a_result_is_not_shared_beyond_the_subject_tokens_own_end() -> None:
    it = Bench()
    result = it.run(target.mint(aud=["gateway", "other"], exp=NOW + 10))
    it.clock.step_wall(9)
    assert it.flow.repeat(result).exchanged is result.exchanged
    it.clock.step_wall(1)

    with pytest.raises(TimestampError):
        it.flow.repeat(result)
    assert ("refuse", "jwt_timestamp") == (it.audit.events[-1].outcome, it.audit.events[-1].reason)


def test_a_subject_is_known_once_its_token_was_proven() -> None:
    it = Bench()
    assert it.flow.known_subject(SUBJECT) is None
    result = it.run(SUBJECT)

    assert result.subject == it.flow.known_subject(SUBJECT)
    assert it.flow.known_subject("") is None


def test_cache_14_a_cache_that_is_off_is_off() -> None:
    it = Bench(config_with(cache={"enabled": False}))

    assert ["miss"] * 3 == [it.run(SUBJECT).cache for _ in range(3)]
    assert 3 == it.exchanges
    with pytest.raises(NotInMemoryError):
        it.run(SUBJECT, within=None)
    # What another instance stored under the very same key is not used either.
    on = Bench()
    on.run(SUBJECT)
    off = Bench(replace(on.config, cache=replace(on.config.cache, enabled=False)), cache=on.cache)
    assert "miss" == off.run(SUBJECT).cache


ENDS: dict[str, tuple[dict[str, Any], str, HttpResponse, float]] = {
    "CACHE-13-expires-in": ({}, SUBJECT, token_response(result_token(exp=NOW + 900), expires_in=60), 55),
    "CACHE-13-result": ({}, SUBJECT, token_response(result_token(exp=NOW + 90), expires_in=900), 85),
    "CACHE-13-subject": (
        {},
        target.mint(aud="gateway", exp=NOW + 40),
        token_response(result_token(exp=NOW + 900), expires_in=900),
        35,
    ),
    "CACHE-24-ttl": (
        {"cache": {"ttl": 20}},
        SUBJECT,
        token_response(result_token(exp=NOW + 900), expires_in=900),
        15,
    ),
    "CACHE-13-max-lifetime": (
        {"result": {"max_lifetime": 70, "narrowing": "audit"}},
        SUBJECT,
        token_response(result_token(exp=NOW + 900), expires_in=900),
        65,
    ),
}


@pytest.mark.parametrize(("exchange", "token", "answer", "life"), ENDS.values(), ids=ENDS.keys())
def test_an_entry_ends_with_the_first_of_its_bounds(
    exchange: dict[str, Any], token: str, answer: HttpResponse, life: float
) -> None:
    it = Bench(config_with(**exchange), answer)
    it.run(token)

    it.clock.advance(life - 0.001)
    assert "hit" == it.run(token).cache
    it.clock.advance(0.001)
    assert "miss" == it.run(token).cache


def test_cache_13_the_life_of_a_slow_answer_counts_from_the_question() -> None:
    it = Bench(answer=None)

    def slow(_: HttpRequest) -> HttpResponse:
        it.clock.advance(4)
        return token_response(result_token(exp=NOW + 900), expires_in=60)

    it.sender.script[ENDPOINT] = slow
    result = it.run(SUBJECT)

    assert result.exchanged is not None
    assert (NOW + 55, 1000 + 55) == (
        result.exchanged.reuse_until,
        result.exchanged.reuse_until_monotonic,
    )


def test_fault_53_a_clock_that_steps_back_during_the_call_lengthens_nothing() -> None:
    it = Bench(answer=None)

    def stepping(_: HttpRequest) -> HttpResponse:
        it.clock.step_wall(-5)
        return token_response(result_token(iat=NOW - 10, exp=NOW + 900), expires_in=60)

    it.sender.script[ENDPOINT] = stepping
    result = it.run(SUBJECT)

    assert result.exchanged is not None
    assert 1000 + 55 == result.exchanged.reuse_until_monotonic


@pytest.mark.parametrize("expires_in", [1, 4, 5], ids=["EXC-13-one", "EXC-13-below-margin", "EXC-13-margin"])
def test_a_result_that_ends_within_the_margin_is_not_kept(expires_in: int) -> None:
    it = Bench(answer=token_response(result_token(), expires_in=expires_in))

    assert ["miss", "miss"] == [it.run(SUBJECT).cache for _ in range(2)]


def test_cache_15_an_opaque_result_without_an_end_is_not_kept() -> None:
    it = Bench(config_with(result=UNREAD), token_response("b3BhcXVl", expires_in=...))

    assert ["miss", "miss"] == [it.run(SUBJECT).cache for _ in range(2)]


def test_cache_12_the_subject_token_is_judged_again_on_every_hit() -> None:
    token = target.mint(aud="gateway", exp=NOW + 100)
    it = Bench(config_with({"leeway": 60}), token_response(result_token(exp=NOW + 900), expires_in=900))
    it.run(token)

    it.clock.advance(94)
    assert "hit" == it.run(token, within=None).cache
    it.clock.advance(66)
    for within in (5.0, None):
        assert "jwt_timestamp" == it.refusal(token, within=within).reason
    assert 1 == it.exchanges


def test_fault_50_a_clock_that_jumps_ahead_ends_tokens_at_once() -> None:
    it = Bench()
    it.run(SUBJECT)
    it.clock.step_wall(600)

    assert "jwt_timestamp" == it.refusal(SUBJECT).reason


def test_fault_51_a_clock_that_jumps_back_refuses_what_is_of_the_future() -> None:
    it = Bench()
    it.run(SUBJECT)
    it.clock.step_wall(-600)

    assert ("jwt_timestamp", "iat") == (it.refusal(SUBJECT).reason, it.audit.events[-1].facts["claim"])


@pytest.mark.parametrize(("slept_s", "cached"), [(240, True), (294.999, True), (295, False), (28_800, False)])
def test_fault_50_a_machine_that_slept_hands_out_nothing_that_ended_meanwhile(
    slept_s: float, cached: bool
) -> None:
    # Linux: CLOCK_MONOTONIC stands still while the machine sleeps, and the wall clock is right after it.
    token = target.mint(aud="gateway", exp=NOW + 90_000)
    it = Bench(answer=token_response(result_token(exp=NOW + 90_000), expires_in=300))
    it.run(token)

    it.clock.step_wall(slept_s)

    assert ("hit" if cached else "miss") == it.run(token).cache


def test_fault_50_after_a_jump_and_its_correction_nothing_that_ended_comes_back() -> None:
    token = target.mint(aud="gateway", exp=NOW + 90_000)
    it = Bench(answer=token_response(result_token(exp=NOW + 90_000), expires_in=300))
    it.run(token)
    it.clock.step_wall(600)
    second = it.run(token)
    it.clock.step_wall(-600)

    # What was exchanged while the clock was wrong ends by the monotonic clock, when it should.
    assert ("miss", "hit") == (second.cache, it.run(token).cache)
    it.clock.advance(294.999)
    assert "hit" == it.run(token).cache
    it.clock.advance(0.001)
    assert "miss" == it.run(token).cache


@pytest.mark.parametrize("step", [-1, 1], ids=["FAULT-53-inserted", "FAULT-53-removed"])
def test_a_leap_second_changes_nothing_but_by_that_second(step: int) -> None:
    token = target.mint(aud="gateway", iat=NOW - 60, nbf=NOW - 60, exp=NOW + 3600)
    it = Bench(answer=token_response(result_token(exp=NOW + 3600), expires_in=300))
    it.run(token)
    it.clock.step_wall(step)

    # Whichever clock comes first: one second early where the wall clock went ahead, never late.
    life = 295 - max(step, 0)
    it.clock.advance(life - 0.001)
    assert "hit" == it.run(token).cache
    it.clock.advance(0.001)
    assert "miss" == it.run(token).cache


@pytest.mark.parametrize("step", [-60, 60], ids=["FAULT-53-back", "FAULT-53-ahead"])
def test_a_clock_that_is_stepped_during_the_exchange_hangs_nobody_and_lengthens_nothing(step: int) -> None:
    token = target.mint(aud="gateway", iat=NOW - 300, exp=NOW + 3600)
    it = Bench(answer=None)

    def stepping(_: HttpRequest) -> HttpResponse:
        it.clock.step_wall(step)
        return token_response(result_token(iat=NOW - 300, exp=NOW + 3600), expires_in=300)

    it.sender.script[ENDPOINT] = stepping
    began = it.clock.monotonic()
    assert "miss" == it.run(token).cache

    # The deadline that the sender was given is of the monotonic clock.
    assert [began + 5] == it.sender.deadlines
    it.clock.advance(295 - max(step, 0) - 0.001)
    assert "hit" == it.run(token).cache
    it.clock.advance(0.001)
    it.sender.script[ENDPOINT] = token_response(result_token(exp=NOW + 7200))
    assert "miss" == it.run(token).cache


def test_fault_52_skew_within_the_leeway_passes() -> None:
    it = Bench(config_with({"leeway": 30}))
    it.clock.step_wall(-25)

    assert "exchange" == it.run(SUBJECT).decision


@pytest.mark.parametrize("year", [2_147_483_648, 4_102_444_800], ids=["FAULT-54-2038", "FAULT-54-2100"])
def test_nothing_overflows_in_far_years(year: int) -> None:
    far = FakeIssuer(TARGET, now=year)
    it = Bench(answer=token_response(far.mint(aud="orders"), expires_in=2**31 - 1), clock=FakeClock(now=year))
    token = far.mint(aud="gateway")

    assert ["miss", "hit"] == [it.run(token).cache for _ in range(2)]


def test_cache_26_a_token_whose_key_was_removed_is_no_longer_trusted() -> None:
    it = Bench()
    it.run(SUBJECT)
    assert "hit" == it.run(SUBJECT, within=None).cache

    it.keys.sets[TARGET] = parse_jwk_set(target.jwks("ES256"))

    for within in (5.0, None):
        assert (401, "key_not_found") == (
            it.refusal(SUBJECT, within=within).status,
            it.audit.events[-1].reason,
        )
    assert 1 == it.exchanges


def test_cache_26_a_key_that_was_replaced_under_its_name_verifies_nothing() -> None:
    it = Bench()
    it.run(SUBJECT)
    replaced = json.loads(ROTATED.jwks("RS256"))["keys"][0] | {"kid": "issuer-RS256"}
    it.keys.sets[TARGET] = parse_jwk_set(to_json({"keys": [replaced]}))

    assert "jwt_signature" == it.refusal(SUBJECT).reason


def test_cache_13_a_result_whose_key_was_removed_is_exchanged_anew() -> None:
    old, new = result_token(), target.mint(aud="orders", key="ES256")
    it = Bench(answer=[token_response(old), token_response(new)])
    assert old == it.token(FOREIGN)

    it.keys.sets[TARGET] = parse_jwk_set(target.jwks("ES256"))

    with pytest.raises(NotInMemoryError):
        it.run(FOREIGN, within=None)
    assert [new, new] == [it.token(FOREIGN), it.token(FOREIGN, within=None)]
    assert 2 == it.exchanges


def test_fault_02_res_01_cached_results_work_while_the_target_is_down() -> None:
    down = IssuerUnavailableError(reason="connect_failed")
    it = Bench(answer=[token_response(result_token()), down])
    it.run(FOREIGN)
    it.keys.sets[TARGET] = down

    for within in (5.0, None):
        assert "hit" == it.run(FOREIGN, within=within).cache
    it.clock.advance(LIFETIME - REUSE_MARGIN_S)
    assert 503 == it.refusal(FOREIGN).status


def test_cache_26_unverified_tokens_are_not_trusted_once_signatures_are_verified() -> None:
    skipping = {"issuer": PARTNER, "verify_signature": False, "insecure_skip_subject_signature": True}
    forged = FakeIssuer(PARTNER, label="stranger").mint()
    careless = Bench(config_with(None, skipping))
    careful = Bench(config_with(None, {"issuer": PARTNER}), cache=careless.cache)

    assert "exchange" == careless.run(forged).decision
    assert "key_not_found" == careful.refusal(forged).reason


def test_cache_26_an_entry_without_a_key_is_not_trusted_where_keys_are_asked_for() -> None:
    it = Bench()
    forged = forger.mint(aud="gateway", header={"kid": "issuer-RS256"})
    claims = parse_claims(target.claims(aud="gateway"))
    it.cache.store_verified(
        digest_fields((it.config.identity, forged)),
        VerifiedToken(claims=claims, typ=None, fingerprint=None),
    )

    assert "jwt_signature" == it.refusal(forged).reason


PAIRS: dict[str, dict[str, Any]] = {
    "CACHE-01-audience": config_with({"audience": ["reports"]}),
    "CACHE-01-extra-parameter": config_with(
        request={"post_args_names": ["tenant"], "post_args_values": ["b"]}
    ),
    "CACHE-01-extra-header": config_with(request={"headers_names": ["X-Tenant"], "headers_values": ["b"]}),
    "CACHE-03-scope": config_with({"scopes": ["write"]}),
    "CACHE-03-no-scope": config_with(request={"empty_scopes": True}),
    "CACHE-04-endpoint": config_with({"token_endpoint": ENDPOINT + "2"}),
    "CACHE-05-client": config_with({"client_id": ["other"]}),
    "CACHE-05-secret": config_with({"client_secret": ["other"]}),
    "CACHE-05-client-auth": config_with({"client_auth": ["client_secret_post"]}),
    "CACHE-08-requested-type": config_with(
        request={"requested_token_type": "urn:ietf:params:oauth:token-type:jwt"}
    ),
    "CACHE-08-subject-type": config_with(request={"subject_token_type": "urn:x:other"}),
    "CACHE-08-grant": config_with(grant_type="jwt_bearer"),
    "CACHE-09-resource": config_with(request={"resource": ["https://api.test/"]}),
    "CACHE-10-result-policy": config_with(result={"allowed_scopes": ["openid", "read"]}),
    "CACHE-10-requirement": config_with({"audience_required": ["orders"]}),
    "CACHE-12-entry": config_with(None, {**ENTRY, "audience": ["gateway"]}, {"issuer": PARTNER}),
    "CACHE-10-ttl": config_with(cache={"ttl": 10}),
}


@pytest.mark.parametrize("raw", PAIRS.values(), ids=PAIRS.keys())
def test_configurations_that_differ_share_no_entry(raw: dict[str, Any]) -> None:
    one = Bench()
    other = Bench(raw, cache=one.cache)

    assert ("miss", "miss", "hit", "hit") == (
        one.run(SUBJECT).cache,
        other.run(SUBJECT).cache,
        one.run(SUBJECT).cache,
        other.run(SUBJECT).cache,
    )


def test_cache_01_configurations_that_say_the_same_share_entries() -> None:
    one = Bench()
    spelt_out = Bench(
        config_with({"scopes": ["openid"], "__plugin_id": "b", "route_id": "r"}), cache=one.cache
    )

    assert ("miss", "hit") == (one.run(SUBJECT).cache, spelt_out.run(SUBJECT).cache)


def test_cache_04_another_discovered_endpoint_is_another_entry() -> None:
    raw = config_with()
    del raw["token_endpoint"]
    it = Bench(raw)
    it.sender.script[ENDPOINT + "2"] = token_response(result_token(jti="second"))
    it.run(SUBJECT)
    it.keys.endpoint = ENDPOINT + "2"

    assert "miss" == it.run(SUBJECT).cache


def test_cache_06_07_tokens_that_say_the_same_share_no_entry() -> None:
    it = Bench()
    # Equal claims and key, another signature; and all but the last claim equal.
    tokens = [
        target.mint(aud="gateway", key="PS256"),
        target.mint(aud="gateway", key="PS256"),
        target.mint(aud="gateway"),
        target.mint(aud="gateway", x=1),
    ]

    assert ["miss"] * 4 == [it.run(token).cache for token in tokens]
    assert ["hit"] * 4 == [it.run(token).cache for token in tokens]


def test_cache_12_rules_of_one_route_do_not_open_another() -> None:
    open_route = Bench()
    strict_route = Bench(config_with(None, {**ENTRY, "clients": ["web"]}), cache=open_route.cache)
    open_route.run(SUBJECT)

    assert "client_not_allowed" == strict_route.refusal(SUBJECT).reason


def test_cache_21_names_that_only_look_alike_are_two() -> None:
    it = Bench()
    # The same letter, composed and decomposed.
    for name in ("caf\u00e9", "cafe\u0301"):
        assert "miss" == it.run(target.mint(aud="gateway", name=name)).cache
    assert 2 == it.exchanges


def test_cache_18_res_08_refused_tokens_are_not_kept() -> None:
    it = Bench()
    for number in range(20):
        it.refusal(forger.mint(aud="gateway", x=number, header={"kid": "issuer-RS256"}))
        it.refusal(stranger.mint(x=number))

    assert (0, 0) == (len(it.cache._verified), len(it.cache._exchanged))


# Refused, though each is signed by a trusted issuer.
REFUSED: dict[str, dict[str, Any]] = {
    "expired": {"exp": NOW - 31},
    "not-yet": {"nbf": NOW + 31},
    "audience": {"aud": "other"},
    "client": {"azp": "other"},
    "claim": {"tenant": ABSENT},
    "typ": {"header": {"typ": "other"}},
    "bound-to-a-key": {"cnf": {"jkt": "x"}},
    "forwarding": {"aud": "api"},
}


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED.keys())
def test_cache_18_a_flood_of_refused_tokens_pushes_nothing_out(changes: dict[str, Any]) -> None:
    entry = {**ENTRY, "audience": ["gateway", "api"], "clients": ["web"], "required_claims": ["tenant"]}
    raw = config_with({"audience_required": ["orders"]}, entry, {"issuer": PARTNER})
    it = Bench(raw, cache=MemoryTokenCache(FakeClock(), max_entries=2))
    good: dict[str, Any] = {"aud": "gateway", "azp": "web", "tenant": "a"}
    kept = target.mint(**good)
    it.run(kept)

    for number in range(3):
        it.refusal(target.mint(**{**good, **changes, "x": number}), within=None)

    assert "hit" == it.run(kept, within=None).cache
    assert (1, 1) == (len(it.cache._verified), len(it.cache._exchanged))


# --- refusals that are remembered -----------------------------------------------------

REFUSAL = error_response("invalid_grant")


def test_cache_20_a_refusal_stands_for_seconds_and_is_answered_from_memory() -> None:
    it = Bench(answer=[REFUSAL, token_response(result_token())])
    it.refusal(SUBJECT)

    it.clock.advance(1.999)
    again = it.refusal(SUBJECT, within=None)
    assert (InvalidTokenError, "subject_token_refused") == (type(again).__mro__[1], again.reason)
    assert {"http_status": 400, "error": "invalid_grant", "cached": True} == again.facts
    assert 1 == it.exchanges
    assert 1 == it.metrics.counts["refusal_hits,reason=subject_token_refused"]
    assert 2 == it.metrics.counts["requests,outcome=refuse,reason=subject_token_refused"]
    assert [None, True] == [event.facts.get("cached") for event in it.audit.events]

    it.clock.advance(0.001)
    assert "miss" == it.run(SUBJECT).cache
    assert "hit" == it.run(SUBJECT, within=None).cache


@pytest.mark.parametrize(
    ("raw", "stands_s"),
    [
        (config_with(cache={"ttl_neg": 0}), 0),
        (config_with(cache={"enabled": False}), 0),
        (config_with({"cache_ttl_neg": 0}), 0),
        (config_with(cache={"ttl_neg": 7}), 7),
        (config_with({"cache_ttl_neg": 7}), 7),
        (config_with({"cache_ttl_neg": 7}, cache={"ttl_neg": 1}), 1),
        (config_with({"cache_ttl_neg": 3600}), 60),
        # What a server calls invalid_grant may be a second use; the first one's result is on its way.
        (config_with(None, {"issuer": TARGET, **ENTRY}, grant_type="jwt_bearer"), 0),
    ],
    ids=["off", "no-cache", "kongs-off", "set", "kongs", "both", "bounded", "assertion"],
)
def test_cache_20_the_time_that_a_refusal_stands(raw: dict[str, Any], stands_s: float) -> None:
    it = Bench(raw, REFUSAL)
    it.refusal(SUBJECT)
    if stands_s:
        it.clock.advance(stands_s - 0.001)
        it.refusal(SUBJECT)
        assert 1 == it.exchanges
        it.clock.advance(0.001)

    it.refusal(SUBJECT)
    assert 2 == it.exchanges


def test_cache_20_a_refusal_is_of_one_token_under_one_configuration() -> None:
    it = Bench(answer=[REFUSAL, token_response(result_token())])
    mended = Bench(config_with({"audience": ["orders"]}), cache=it.cache)
    it.refusal(SUBJECT)

    # The same claims under another signature: a spoilt copy must not block the good token.
    assert "miss" == it.run(target.mint(aud=["gateway", "other"], key="PS256")).cache
    assert "miss" == mended.run(SUBJECT).cache


def test_cache_20_what_is_refused_here_is_not_remembered() -> None:
    raw = config_with({"scopes_required": ["admin"]})
    it = Bench(raw, [token_response(result_token()), token_response(result_token(scope="admin"))])

    assert "scopes_required" == it.refusal(SUBJECT).reason
    assert "miss" == it.run(SUBJECT).cache


def test_cache_20_a_refusal_does_not_touch_what_is_in_use() -> None:
    it = Bench(answer=[token_response(result_token()), REFUSAL])
    it.run(SUBJECT)
    it.refusal(target.mint(aud="gateway", x=1))

    assert "hit" == it.run(SUBJECT, within=None).cache


# --- memory alone ---------------------------------------------------------------------


def test_the_loop_never_touches_the_network() -> None:
    it = Bench()

    with pytest.raises(NotInMemoryError):
        it.run(SUBJECT, within=None)
    assert (0, []) == (it.exchanges, it.audit.events)
    assert {} == it.metrics.counts

    it.run(SUBJECT)
    assert "hit" == it.run(SUBJECT, within=None).cache


@pytest.mark.parametrize("issuer", [TARGET, PARTNER])
def test_keys_that_are_not_in_memory_send_the_loop_to_the_pool(issuer: str) -> None:
    it = Bench()
    it.keys.cold = {issuer}
    token = SUBJECT if issuer == TARGET else FOREIGN

    with pytest.raises(NotInMemoryError):
        it.run(token, within=None)
    assert "exchange" == it.run(token).decision


def test_an_endpoint_that_is_not_in_memory_sends_the_loop_to_the_pool() -> None:
    raw = config_with()
    del raw["token_endpoint"]
    it = Bench(raw)
    it.run(FOREIGN)
    it.keys.cold = {TARGET}

    with pytest.raises(NotInMemoryError):
        it.run(FOREIGN, within=None)


def test_forwarding_needs_no_pool() -> None:
    assert "forward" == Bench().run(FORWARDED, within=None).decision


def test_verification_on_the_loop_is_not_done_again_in_the_pool() -> None:
    it = Bench()
    with pytest.raises(NotInMemoryError):
        it.run(SUBJECT, within=None)

    assert 1 == len(it.cache._verified)


# --- single flight --------------------------------------------------------------------


def crowd(it: Bench, token: str, count: int) -> list[Any]:
    """Let *count* requests with one new token arrive while its exchange runs."""
    joined = threading.Semaphore(0)
    wait = it.cache._wait

    def join(*flight: Any) -> Any:
        joined.release()
        return wait(*flight)

    with patch.object(it.cache, "_wait", join), it.sender.held() as hold:

        def let_go() -> None:
            for _ in range(count - 1):
                assert joined.acquire(timeout=PATIENCE_S)
            hold.released.set()

        threading.Thread(target=let_go, daemon=True).start()
        return run_in_threads(lambda: it.run(token), count)


def test_cache_16_res_04_a_crowd_with_one_new_token_makes_one_exchange() -> None:
    clock = SystemClock()
    now = int(clock.now())
    issuer = FakeIssuer(TARGET, now=now)
    it = Bench(answer=token_response(issuer.mint(aud="orders")), clock=clock)

    results = crowd(it, issuer.mint(aud="gateway"), 40)

    assert 1 == it.exchanges
    assert 1 == len({id(result.exchanged) for result in results})
    assert (1, 39) == tuple(sum(result.cache == word for result in results) for word in ("miss", "hit"))
    # One exchange is one audit event, whoever shares its result.
    assert ["exchange"] == [event.outcome for event in it.audit.events]


def test_fault_114_a_crowd_with_a_failing_issuer_makes_one_call() -> None:
    clock = SystemClock()
    issuer = FakeIssuer(TARGET, now=int(clock.now()))
    it = Bench(answer=HttpResponse(status=503, headers={"retry-after": "9"}), clock=clock)

    results = crowd(it, issuer.mint(aud="gateway"), 40)

    assert 1 == it.exchanges
    assert {(IssuerUnavailableError, "token_endpoint_failed", 9)} == {
        (type(error), error.reason, error.retry_after) for error in results
    }
    assert 40 == it.metrics.counts["requests,outcome=refuse,reason=token_endpoint_failed"]


def test_a_waiters_deadline_is_its_own() -> None:
    clock = SystemClock()
    issuer = FakeIssuer(TARGET, now=int(clock.now()))
    it = Bench(answer=token_response(issuer.mint(aud="orders")), clock=clock)
    token = issuer.mint(aud="gateway")
    owner: list[FlowResult] = []

    with it.sender.held() as hold:
        thread = threading.Thread(target=lambda: owner.append(it.run(token)), daemon=True)
        thread.start()
        assert hold.entered.wait(PATIENCE_S)
        assert "deadline_waiting" == it.refusal(token, within=0.05).reason
    thread.join(PATIENCE_S)

    assert ["miss"] == [result.cache for result in owner]
    assert 1 == it.exchanges


def test_the_deadline_reaches_the_sender() -> None:
    it = Bench()
    it.run(SUBJECT, within=3.5)

    assert [it.clock.monotonic() + 3.5] == it.sender.deadlines


# --- Kong's own examples --------------------------------------------------------------


def kong(raw: dict[str, Any], target_issuer: str, **claims: Any) -> Bench:
    it = FakeIssuer(target_issuer)
    other = FakeIssuer(A if target_issuer != A else B, label="partner")
    return Bench(
        raw,
        token_response(it.mint(aud="api", **claims)),
        issuers=(it, other, FakeIssuer("https://idp-b.example.com", label="partner")),
    )


def test_kongs_cross_domain_example_exchanges_every_token_of_the_other_domain() -> None:
    it = kong(CROSS_DOMAIN, B)

    assert ("exchange", "cross_issuer") == (
        it.run(FakeIssuer(A, label="partner").mint()).decision,
        it.run(FakeIssuer(A, label="partner").mint(aud=ABSENT, scope=ABSENT)).relation,
    )
    assert {"client_id": "kong", "client_secret": "a-secret", "scope": "openid"}.items() <= dict(
        form_of(it.sender.requests[0])
    ).items()
    # A token that is already of the target domain goes on as it is.
    assert "forward" == it.run(FakeIssuer(B).mint()).decision


def test_kongs_transformation_example_exchanges_tokens_without_the_scope() -> None:
    it = kong(TRANSFORMATION, B)
    own = FakeIssuer(B)

    assert "exchange" == it.run(own.mint(scope="openid")).decision
    assert "exchange" == it.run(own.mint(scope=ABSENT)).decision
    assert "forward" == it.run(own.mint(scope="openid profile")).decision
    assert "issuer_unknown" == it.refusal(FakeIssuer(A, label="partner").mint()).reason


def test_kongs_keycloak_example_exchanges_tokens_for_the_gateways_client() -> None:
    issuer = KEYCLOAK["issuer"]
    it = kong({**KEYCLOAK, "insecure_allow_http": True}, issuer, azp="client-2")
    own = FakeIssuer(issuer)

    assert "exchange" == it.run(own.mint(aud=["client-2", "account"])).decision
    assert "forward" == it.run(own.mint(aud="account")).decision
    assert KEYCLOAK["token_endpoint"] == it.sender.requests[0].url
    assert "profile" == dict(form_of(it.sender.requests[0]))["scope"]


def test_kongs_example_of_several_issuers_takes_both() -> None:
    it = kong(MULTI_IDP, MULTI_IDP["issuer"])
    other = FakeIssuer("https://idp-b.example.com", label="partner")

    assert ("exchange", "forward") == (
        it.run(other.mint()).decision,
        it.run(FakeIssuer(MULTI_IDP["issuer"]).mint()).decision,
    )


# --- what is told ---------------------------------------------------------------------


def test_an_exchange_is_audited_with_who_for_what_and_why() -> None:
    flow = {"name": "orders", "kind": "transformation", "owner": "team-a", "review_by": "2030-01-01"}
    it = Bench(config_with(flow=flow))
    it.run(SUBJECT)

    event = it.audit.events[0]
    assert ("exchange", "same_issuer", 200) == (event.outcome, event.reason, event.status)
    facts = dict(event.facts)
    assert 16 == len(str(facts.pop("subject")))
    assert {
        "flow": "orders",
        "kind": "transformation",
        "owner": "team-a",
        "relation": "same_issuer",
        "iss": TARGET,
        "client": "client-1",
        "aud": "orders",
        "scope": "openid read",
    } == facts


def subject_in(event: AuditEvent) -> object:
    return event.facts["subject"]


def test_one_subject_has_one_pseudonym_in_one_configuration() -> None:
    it, other = Bench(), Bench(config_with({"client_secret": ["other"]}))
    it.run(SUBJECT)
    it.run(target.mint(aud="gateway", jti="another"))
    it.sender.script[ENDPOINT] = token_response(result_token(sub="user-2"))
    it.run(target.mint(aud="gateway", sub="user-2"))
    other.run(SUBJECT)

    first, again, second = (subject_in(event) for event in it.audit.events)
    assert first == again
    assert 3 == len({first, second, subject_in(other.audit.events[0])})


def test_a_refusal_names_nobody_before_the_token_is_proven() -> None:
    it = Bench()
    it.refusal(forger.mint(aud="gateway", header={"kid": "issuer-RS256"}))

    assert not {"iss", "client", "subject"} & it.audit.events[0].facts.keys()


MARK = "mark5f3a"

MARKED_ANSWERS: dict[str, Callable[[], Answer]] = {
    "good": lambda: token_response(
        result_token(email=MARK), refresh_token=MARK + "r", id_token=MARK + "i", session_state=MARK
    ),
    "bad-result": lambda: token_response(result_token(sub=MARK, email=MARK)),
    "forged-result": lambda: token_response(forger.mint(sub=MARK, header={"kid": "issuer-RS256"})),
    "opaque-result": lambda: token_response(MARK),
    "wrong-result": lambda: token_response(result_token(aud=MARK, exp=NOW - 1)),
    "malformed": lambda: token_response(MARK + " x", token_type=MARK, scope=[MARK]),
    "not-bearer": lambda: token_response(MARK, token_type=MARK),
    "issued-type": lambda: token_response(MARK, issued_token_type=MARK),
    "invalid-grant": lambda: error_response("invalid_grant", MARK),
    "unknown-error": lambda: error_response(MARK, MARK),
    "invalid-scope": lambda: error_response("invalid_scope", f"Invalid scopes: {MARK}"),
    "html": lambda: HttpResponse(
        status=500, headers={"content-type": MARK, "retry-after": MARK, "x": MARK}, body=MARK.encode()
    ),
    "redirect": lambda: HttpResponse(status=302, headers={"location": f"https://{MARK}.test/"}),
    "json-list": lambda: json_response([MARK]),
    "json-cut": lambda: HttpResponse(
        status=200, headers={"content-type": "application/json"}, body=b'{"access_token":"' + MARK.encode()
    ),
}


@pytest.mark.parametrize("answer", MARKED_ANSWERS.values(), ids=MARKED_ANSWERS.keys())
def test_marks_in_tokens_secrets_and_answers_are_told_to_nobody(
    answer: Callable[[], Answer], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(1)
    raw = config_with(
        {"client_secret": [MARK + "s"]},
        request={
            "post_args_names": ["p"],
            "post_args_values": [MARK],
            "headers_names": ["X-H"],
            "headers_values": [MARK],
        },
    )
    it = Bench(raw, answer())
    it.flow._recorder._audit = AuditLog(it.clock)
    tokens = [
        target.mint(aud="gateway", sub=MARK, email=MARK, jti=MARK),
        partner.mint(sub=MARK, email=MARK),
        target.mint(aud="api", sub=MARK),
        target.mint(aud="gateway", sub=MARK, exp=NOW - 1),
        forger.mint(sub=MARK, aud=MARK, header={"kid": "issuer-RS256"}),
        stranger.mint(iss=f"https://{MARK}.test", sub=MARK),
        target.mint(aud={MARK: MARK}),
        target.craft(to_json({"alg": MARK, "x": MARK}), to_json({"iss": MARK})),
        MARK,
    ]
    told: list[str] = []
    for token in [*tokens, *tokens]:
        try:
            result = it.run(token)
        except TokenExchangeError as error:
            rendered = render(error)
            told += [repr(error), str(error), repr(error.args), repr(error.facts), repr(error.__dict__)]
            told += [repr(rendered.headers), rendered.body.decode()]
            told += [repr(error.__cause__), repr(error.__context__) if not error.__suppress_context__ else ""]
        else:
            told += [repr(result.exchanged), repr(it.flow), repr(it.config.client)]
    told += [record.getMessage() for record in caplog.records]
    told += [repr(record.__dict__) for record in caplog.records]
    told += list(it.metrics.counts)

    # `alg` is of a header that is not believed; it is shown, cut short, so that an operator sees why.
    algorithm = "{'alg': '" + MARK + "'}"
    shown = [line for line in told if MARK in line.replace(f'"alg":"{MARK}"', "").replace(algorithm, "")]
    assert [] == [line for line in shown if "jwt_algorithm" not in line]
    assert caplog.records

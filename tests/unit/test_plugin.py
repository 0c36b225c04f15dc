"""The plugin class: what it reads, what it answers, what it tells Kong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kong_token_exchange.config import PluginConfig
from kong_token_exchange.core.claims import Claims
from kong_token_exchange.core.possession import NO_EVIDENCE, Evidence
from kong_token_exchange.errors import (
    ClientRefusedError,
    ConfigError,
    DeadlineError,
    InsufficientScopeError,
    IssuerUnavailableError,
    SignatureError,
    TimestampError,
    TokenExchangeError,
)
from kong_token_exchange.flow import FlowResult
from kong_token_exchange.lease import Leases, Terms
from kong_token_exchange.plugin import ALARM_INTERVAL_S, PRIORITY, TokenExchangeInstance, TokenExchangePlugin
from kong_token_exchange.pluginserver.contract import Outcome
from kong_token_exchange.pluginserver.pdk import METHODS
from kong_token_exchange.pluginserver.wire import (
    FrameReader,
    decode_exit,
    decode_kv,
    decode_list,
    decode_string,
)
from kong_token_exchange.ports import ExchangedToken, NotInMemoryError
from kong_token_exchange.secret import Secret
from tests.support.fakes import FakeKeySource

ISSUER = "https://idp.test"
CLAIMS = Claims(
    iss=ISSUER,
    sub="alex",
    aud=("api",),
    exp=2e9,
    nbf=None,
    iat=None,
    client="app",
    scopes=frozenset(),
    sender_constrained=False,
    members={},
)


class FakeClock:
    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time


class FakeFlow:
    """Answers with what it was given; keeps the tokens it was asked about."""

    def __init__(self, answer: Callable[[float | None], FlowResult]) -> None:
        self.answer = answer
        self.tokens: list[str] = []
        self.actor_tokens: list[str | None] = []
        self.evidence: list[Evidence] = []
        self.deadlines: list[float | None] = []
        self.refusals: list[TokenExchangeError] = []
        self.subjects: list[Claims | None] = []
        self.repeated = 0

    def run(
        self,
        token: str,
        *,
        deadline: float | None,
        actor_token: str | None = None,
        evidence: Evidence = NO_EVIDENCE,
    ) -> FlowResult:
        self.tokens.append(token)
        self.actor_tokens.append(actor_token)
        self.evidence.append(evidence)
        self.deadlines.append(deadline)
        return self.answer(deadline)

    def record_refusal(self, error: TokenExchangeError, *, subject: Claims | None = None) -> None:
        self.refusals.append(error)
        self.subjects.append(subject)

    def known_subject(self, token: str) -> Claims | None:
        return CLAIMS if token == "a.b.c" else None

    def repeat(self, result: FlowResult) -> FlowResult:
        self.repeated += 1
        return replace(result, cache="hit")

    def leases(self) -> Leases[Any]:
        return Leases(FakeClock(), FakeKeySource({}))

    def terms(self, result: FlowResult) -> Terms | None:
        """Every answer here is judged; tests/unit/test_lease.py has those that stand."""
        return None


def exchanged(_: float | None = None, *, cache: Any = "hit") -> FlowResult:
    token = ExchangedToken(
        token=Secret("ex.chan.ged"), claims=CLAIMS, reuse_until=2e9, reuse_until_monotonic=2e9
    )
    return FlowResult(
        decision="exchange", relation="same_issuer", cache=cache, subject=CLAIMS, exchanged=token
    )


def forwarded(_: float | None = None) -> FlowResult:
    return FlowResult(
        decision="forward", relation="same_issuer", cache="none", subject=CLAIMS, exchanged=None
    )


def refused(error: TokenExchangeError) -> Callable[[float | None], FlowResult]:
    def answer(_: float | None) -> FlowResult:
        raise error

    return answer


def config(**changes: Any) -> dict[str, Any]:
    return {
        "issuer": ISSUER,
        "client_id": ["gateway"],
        "client_secret": ["MARKED-secret"],
        "token_exchange": {
            "subject_token_issuers": [{"issuer": ISSUER, "conditions": {"has_audience": ["api"]}}]
        },
        **changes,
    }


def start(answer: Callable[[float | None], FlowResult] = exchanged, **changes: Any) -> tuple[Any, FakeFlow]:
    flow = FakeFlow(answer)
    plugin = TokenExchangePlugin(lambda _: flow, FakeClock())  # type: ignore[arg-type, return-value]
    return plugin.start(config(**changes)), flow


def read_calls(outcome: Any) -> list[tuple[str, Any]]:
    """Decode an outcome as Kong would: the calls in order, then how it ends."""
    reader = FrameReader()
    reader.feed(outcome.frames)
    calls: list[tuple[str, Any]] = []
    while (name := reader.next_frame()) is not None:
        if name == b"":
            calls.append(("end", None))
            continue
        payload = reader.next_frame()
        assert payload is not None
        method = METHODS[name.decode()]
        decode = {"KV": decode_kv, "ExitArgs": decode_exit, "ListValue": decode_list}.get(
            method.argument.name, decode_string
        )
        calls.append((name.decode(), decode(payload)))
    return calls


def warm(instance: Any, **facts: str) -> Any:
    values = {"connection": "", "header": "", "query": "", "cookie": "", "actor": "", "method": "GET"}
    values |= facts
    return instance.warm([values[kind] for kind in instance._kinds])


def test_kong_is_told_what_openid_connect_says() -> None:
    plugin = TokenExchangePlugin(lambda _: None, FakeClock())  # type: ignore[arg-type, return-value]

    assert ("token-exchange", 1050, ("access",)) == (plugin.name, plugin.priority, plugin.phases)
    assert PRIORITY == plugin.priority
    assert "token-exchange" == plugin.schema["name"]


def test_a_cached_token_replaces_the_header_in_one_answer() -> None:
    instance, flow = start()

    outcome = warm(instance, header="Bearer sub.ject.token")

    shared = {
        "decision": "exchange",
        "relation": "same_issuer",
        "subject_issuer": ISSUER,
        "subject": "alex",
        "client": "app",
    }
    assert [
        ("kong.service.request.set_header", ("authorization", "Bearer ex.chan.ged")),
        ("kong.ctx.shared.set", ("token_exchange", shared)),
        ("end", None),
    ] == read_calls(outcome)
    assert (["sub.ject.token"], [None]) == (flow.tokens, flow.deadlines)


def test_a_second_hit_is_not_encoded_again() -> None:
    result = exchanged()
    instance, _ = start(lambda _: result)

    assert warm(instance, header="Bearer a.b.c") is warm(instance, header="Bearer a.b.c")


def test_what_needs_the_network_is_left_to_the_pool() -> None:
    def answer(deadline: float | None) -> FlowResult:
        if deadline is None:
            raise NotInMemoryError
        return exchanged(cache="miss")

    instance, flow = start(answer)

    assert warm(instance, header="Bearer a.b.c") is None
    kong = RecordingKong({"authorization": "Bearer a.b.c"})
    instance.access(kong)
    assert ("service.request.set_header", ("authorization", "Bearer ex.chan.ged")) in kong.calls
    assert [None, 1005.0] == flow.deadlines


def test_waiting_for_a_thread_counts_against_the_deadline() -> None:
    instance, flow = start()
    kong = RecordingKong({"authorization": "Bearer a.b.c"})
    kong.received_at = 990.0

    instance.access(kong)

    assert [995.0] == flow.deadlines


@pytest.mark.parametrize(("deadline", "starts"), [(4999, True), (5000, True), (5001, False)])
def test_a_deadline_above_the_servers_own_is_an_invalid_configuration(deadline: int, starts: bool) -> None:
    plugin = TokenExchangePlugin(lambda _: FakeFlow(exchanged), FakeClock(), max_deadline_ms=5000)  # type: ignore[arg-type, return-value]
    changed = config()
    changed["token_exchange"]["deadline"] = deadline

    assert starts == isinstance(plugin.start(changed), TokenExchangeInstance)


@pytest.mark.parametrize(
    ("error", "status", "challenge"),
    [
        (
            SignatureError(reason="jwt_signature"),
            401,
            'Bearer realm="kong", error="invalid_token", error_description="the token is not acceptable"',
        ),
        (
            InsufficientScopeError(reason="scopes_required", scope="orders:read"),
            403,
            (
                'Bearer realm="kong", error="insufficient_scope",'
                ' error_description="the token lacks a required scope", scope="orders:read"'
            ),
        ),
    ],
)
def test_out_17_a_refusal_exits_with_its_challenge(
    error: TokenExchangeError, status: int, challenge: str
) -> None:
    instance, _ = start(refused(error))

    ((name, exit_args),) = read_calls(warm(instance, header="Bearer a.b.c"))

    assert ("kong.response.exit", status) == (name, exit_args.status)
    assert challenge == exit_args.headers["WWW-Authenticate"]
    assert "no-store" == exit_args.headers["Cache-Control"]


def test_res_07_a_refused_credential_never_reaches_the_flow_and_is_recorded() -> None:
    instance, flow = start()

    ((_, exit_args),) = read_calls(warm(instance, header="Bearer a.b.c d"))

    assert (400, []) == (exit_args.status, flow.tokens)
    assert ["credential_malformed"] == [error.reason for error in flow.refusals]


def test_res_19_an_operators_fault_is_told_to_kongs_log_once_a_minute() -> None:
    clock = FakeClock()
    flow = FakeFlow(refused(ClientRefusedError(reason="client_refused", facts={"error": "invalid_client"})))
    instance = TokenExchangePlugin(lambda _: flow, clock).start(config())  # type: ignore[arg-type, return-value]

    def lines() -> list[Any]:
        calls = read_calls(warm(instance, header="Bearer a.b.c"))
        assert ("kong.response.exit", 500) == (calls[-1][0], calls[-1][1].status)
        return [argument for name, argument in calls if name == "kong.log.err"]

    assert [["token-exchange: 500 client_refused error=invalid_client"]] == lines()
    clock.time += ALARM_INTERVAL_S - 0.1
    assert [] == lines()
    clock.time += 0.1
    assert 1 == len(lines())


def test_the_callers_fault_is_no_alarm() -> None:
    instance, _ = start(refused(SignatureError(reason="jwt_signature")))

    assert ["kong.response.exit"] == [name for name, _ in read_calls(warm(instance, header="Bearer a.b.c"))]


def test_an_invalid_configuration_answers_500_and_names_the_path(caplog: pytest.LogCaptureFixture) -> None:
    instance, flow = start(issuer="ftp://idp.test")

    calls = read_calls(instance.warm([]))

    assert ["kong.log.err", "kong.response.exit"] == [name for name, _ in calls]
    assert "path=issuer" in calls[0][1][0]
    assert 500 == calls[1][1].status
    assert [] == flow.tokens
    assert "issuer: " in caplog.text
    assert "MARKED" not in caplog.text + calls[0][1][0]


def test_a_flow_that_cannot_be_made_is_an_invalid_configuration() -> None:
    def make(_: PluginConfig) -> Any:
        raise ConfigError("ca_file", "cannot be read as PEM certificates")

    instance = TokenExchangePlugin(make, FakeClock()).start(config())

    assert instance.start_again
    assert 500 == read_calls(instance.warm([]))[-1][1].status


@pytest.mark.parametrize("listed", ["authorization", "close, Authorization", " AUTHORIZATION ,te"])
def test_gw_20_a_connection_header_that_names_the_credential_is_refused(listed: str) -> None:
    instance, flow = start()

    ((_, exit_args),) = read_calls(warm(instance, header="Bearer a.b.c", connection=listed))

    assert (400, []) == (exit_args.status, flow.tokens)


def test_gw_20_the_upstream_header_is_protected_too() -> None:
    instance, _ = start(upstream_access_token_header="x-token")

    assert 400 == warm(instance, header="Bearer a.b.c", connection="X-Token").status


def test_forwarding_keeps_the_token_and_shares_the_decision() -> None:
    instance, _ = start(forwarded)

    calls = read_calls(warm(instance, header="bearer  a.b.c"))

    assert ("kong.service.request.set_header", ("authorization", "Bearer a.b.c")) == calls[0]
    assert "forward" == calls[1][1][1]["decision"]


def test_hdr_22_out_01_another_upstream_header_empties_the_first_place_and_look_alikes() -> None:
    instance, _ = start(upstream_access_token_header="x-token")

    names = [
        (name, argument if isinstance(argument, str) else argument[0])
        for name, argument in read_calls(warm(instance, header="Bearer a.b.c"))
        if name.startswith("kong.service")
    ]

    assert [
        ("kong.service.request.clear_header", "authorization"),
        ("kong.service.request.clear_header", "x_token"),
        ("kong.service.request.set_header", "x-token"),
    ] == names


@pytest.mark.parametrize("answer", [exchanged, forwarded])
@pytest.mark.parametrize("hide", [True, False])
def test_out_20_an_authorization_that_nobody_read_does_not_go_upstream(
    answer: Callable[[float | None], FlowResult], hide: bool
) -> None:
    own: dict[str, Any] = {"bearer_token_header_name": "X-User", "upstream_access_token_header": "X-Token"}
    instance, _ = start(answer, hide_credentials=hide, run_on_preflight=False, **own)

    for request in ({"header": "a.b.c"}, {"method": "OPTIONS"}):
        calls = read_calls(warm(instance, **request))
        assert hide == (("kong.service.request.clear_header", "authorization") in calls)


def test_the_header_that_is_set_is_not_cleared_first() -> None:
    instance, _ = start(bearer_token_header_name="X-User")

    calls = read_calls(warm(instance, header="a.b.c"))

    assert ("kong.service.request.clear_header", "authorization") not in calls
    assert ("kong.service.request.set_header", ("authorization", "Bearer ex.chan.ged")) in calls


@pytest.mark.parametrize("name", ["X-My-Token", "x-my-token"])
def test_out_02_every_spelling_of_a_custom_header_is_cleared(name: str) -> None:
    instance, _ = start(bearer_token_header_name=name)

    cleared = {
        argument
        for call, argument in read_calls(warm(instance, header="a.b.c"))
        if call == "kong.service.request.clear_header"
    }

    assert {"x-my-token", "x-my_token", "x_my-token", "x_my_token"} == cleared


def test_hdr_08_two_headers_of_a_custom_name_are_refused() -> None:
    instance, flow = start(bearer_token_header_name="X-My-Token")

    assert "http_x_my_token" in [fetch.argument for fetch in instance.prefetch]
    assert (400, []) == (warm(instance, header="a.b.c, a.b.c").status, flow.tokens)


def test_out_12_no_alarm_goes_through_kong_where_tokens_travel_in_the_query(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failing = refused(ClientRefusedError(reason="client_refused"))
    instance, _ = start(failing, bearer_token_param_type=["query"])

    calls = read_calls(warm(instance, query="access_token=a.b.c"))

    assert ["kong.response.exit"] == [name for name, _ in calls]
    assert "token-exchange: 500 client_refused" in caplog.text


def test_hide_credentials_false_keeps_a_forwarded_token_but_never_an_exchanged_one() -> None:
    for answer, cleared in ((forwarded, False), (exchanged, True)):
        instance, _ = start(answer, upstream_access_token_header="x-token", hide_credentials=False)

        calls = read_calls(warm(instance, header="Bearer a.b.c"))

        assert cleared == (("kong.service.request.clear_header", "authorization") in calls)


def test_hdr_11_out_07_query_and_cookie_are_emptied() -> None:
    instance, flow = start(bearer_token_param_type=["query", "cookie"], bearer_token_cookie_name="t")

    by_query = read_calls(warm(instance, query="a=1&access_token=q.q.q"))
    by_cookie = read_calls(warm(instance, cookie="a=1; t=c.c.c"))
    by_lone_cookie = read_calls(warm(instance, cookie="t=c.c.c"))

    assert ["q.q.q", "c.c.c", "c.c.c"] == flow.tokens
    assert ("kong.service.request.set_raw_query", "a=1") in by_query
    assert ("kong.service.request.set_header", ("cookie", "a=1")) in by_cookie
    assert ("kong.service.request.clear_header", "cookie") in by_lone_cookie


def test_hdr_11_a_token_in_two_places_is_refused() -> None:
    instance, flow = start(bearer_token_param_type=["header", "query"])

    assert 400 == warm(instance, header="Bearer a.b.c", query="access_token=a.b.c").status
    assert [] == flow.tokens


def test_out_10_a_preflight_passes_without_any_credential() -> None:
    instance, flow = start(run_on_preflight=False, bearer_token_param_type=["header", "query"])

    calls = read_calls(warm(instance, method="OPTIONS", header="Bearer a.b.c", query="access_token=x&a=1"))

    assert ("kong.service.request.clear_header", "authorization") in calls
    assert ("kong.service.request.set_raw_query", "a=1") in calls
    assert ("end", None) == calls[-1]
    assert [] == flow.tokens


def test_out_10_a_preflight_is_judged_like_any_request_by_default() -> None:
    instance, flow = start()

    warm(instance, header="Bearer a.b.c", method="OPTIONS")

    assert ["a.b.c"] == flow.tokens


class RecordingKong:
    """A PDK object that records calls; getters answer from *headers*."""

    def __init__(self, headers: dict[str, str], path: str = "", calls: list[Any] | None = None) -> None:
        self._headers = headers
        self._path = path
        self.calls: list[Any] = [] if calls is None else calls

    def __getattr__(self, name: str) -> RecordingKong:
        return RecordingKong(self._headers, f"{self._path}.{name}".lstrip("."), self.calls)

    def __call__(self, *arguments: Any) -> Any:
        self.calls.append((self._path, arguments))
        # kong-pdk answers (data, err) in its Lua style.
        return (self._headers.get(arguments[0]) if self._path.endswith("get_header") else None, None)


class SharingKong(RecordingKong):
    """Our own server's PDK object, as far as the plugin asks for it."""

    def __init__(self, headers: dict[str, str]) -> None:
        super().__init__(headers)
        self.received_at = 1000.0
        self.offered: list[Callable[[], Outcome | None]] = []
        self.share: Any = self.offered.append


def shared(answer: Callable[[float | None], FlowResult]) -> tuple[list[Callable[[], Any]], FakeFlow]:
    """Let one request through `access`; return what it offers to those who wait."""
    instance, flow = start(answer)
    kong = SharingKong({"authorization": "Bearer a.b.c"})
    instance.access(kong)
    return list(kong.offered), flow


def test_a_result_is_offered_to_those_who_wait_and_counted_for_each() -> None:
    (again,), flow = shared(lambda _: exchanged(cache="miss"))

    for number in (1, 2):
        outcome = again()
        assert ("kong.service.request.set_header", ("authorization", "Bearer ex.chan.ged")) == read_calls(
            outcome
        )[0]
        assert number == flow.repeated


def test_a_result_that_is_over_by_then_is_refused() -> None:
    instance, flow = start()
    kong = SharingKong({"authorization": "Bearer a.b.c"})
    instance.access(kong)
    (again,) = kong.offered

    def over(result: FlowResult) -> FlowResult:
        raise TimestampError(claim="exp")

    flow.repeat = over  # type: ignore[method-assign]

    assert 401 == again().status  # type: ignore[union-attr]


def test_a_refusal_is_offered_recorded_for_each_and_told_to_the_operator_once() -> None:
    (again,), flow = shared(refused(IssuerUnavailableError(reason="down")))

    for number in (1, 2):
        ((name, exit_args),) = read_calls(again())
        assert ("kong.response.exit", 503) == (name, exit_args.status)
        # `run` has recorded the first one's.
        assert (["down"] * number, [CLAIMS] * number) == (
            [error.reason for error in flow.refusals],
            flow.subjects,
        )


def test_a_deadline_that_passed_is_not_offered() -> None:
    assert [] == shared(refused(DeadlineError(reason="deadline_reading")))[0]


def test_nothing_is_offered_under_kong_pdk_which_has_a_stand_in_for_every_name() -> None:
    instance, _ = start()
    kong = RecordingKong({"authorization": "Bearer a.b.c"})

    instance.access(kong)

    assert "share" not in [path for path, _ in kong.calls]


def test_waiting_for_another_request_ends_with_the_configured_deadline() -> None:
    instance, flow = start()
    facts = {"connection": "", "header": "Bearer a.b.c", "method": "GET"}
    asked = [facts[kind] for kind in instance._kinds]
    patience = instance.coalesce(asked)

    assert 5.0 == patience.within_s
    *_, (name, exit_args) = read_calls(patience.overdue(asked))
    assert ("kong.response.exit", 504) == (name, exit_args.status)
    assert (["deadline_waiting"], [CLAIMS]) == ([error.reason for error in flow.refusals], flow.subjects)


def test_facts_without_a_credential_name_no_subject() -> None:
    instance, flow = start()

    instance.coalesce([]).overdue(["" for _ in instance._kinds])

    assert [None] == flow.subjects


def test_gw_09_nothing_runs_after_an_exit_under_kong_pdk() -> None:
    instance, _ = start(refused(SignatureError(reason="jwt_signature")))
    kong = RecordingKong({"authorization": "Bearer a.b.c"})

    instance.access(kong)

    path, arguments = kong.calls[-1]
    assert ("response.exit", 401) == (path, arguments[0])
    assert isinstance(arguments[1], str)


def test_the_class_loads_in_the_shape_of_kong_pdk() -> None:
    from kong_pdk.module import Module

    from kong_token_exchange import stock

    module = Module("token-exchange", module=stock)

    assert ["access"] == list(module.phases)
    assert PRIORITY == module.priority
    assert "issuer" in module.schema[0]


def test_kong_pdk_gets_an_exit_whatever_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    from kong_token_exchange import stock

    flow = FakeFlow(refused(SystemExit("MARKED")))  # type: ignore[arg-type]
    plugin = TokenExchangePlugin(lambda _: flow, FakeClock())  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(stock, "_plugin", lambda: plugin)
    kong = RecordingKong({"authorization": "Bearer a.b.c"})

    stock.Plugin(config()).access(kong)

    assert "request.get_method" == kong.calls[0][0]
    assert ("response.exit", 500) == (kong.calls[-1][0], kong.calls[-1][1][0])
    assert "MARKED" not in str(kong.calls)

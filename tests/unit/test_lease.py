"""Answers that stand: they are given again only while a full judgement would give the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from kong_token_exchange.errors import IssuerUnavailableError
from kong_token_exchange.lease import LEASE_S, Leases, Terms
from kong_token_exchange.plugin import TokenExchangePlugin
from kong_token_exchange.pluginserver.contract import Outcome
from kong_token_exchange.ports import ExchangedToken, IssuerEndpoints
from kong_token_exchange.secret import Secret
from kong_token_exchange.shell.key_source import REFRESH_S, RETRY_S, STALE_S, IssuerKeySource
from tests.support.fakes import FakeClock, FakeKeySource, FakeSender, json_response, token_response
from tests.support.minting import ABSENT, LIFETIME, NOW
from tests.unit.test_flow import TARGET, Bench, config_with, result_token, target

DOWN = IssuerUnavailableError(reason="down")
HIT = "requests,outcome=exchange,reason=same_issuer,cache=hit"


class Recorder:
    """A PDK object that answers with the header and takes everything else."""

    def __init__(self, header: str) -> None:
        self._header = header

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *arguments: Any) -> str:
        return self._header if arguments == ("authorization",) else ""


class Desk:
    """An instance of the plugin over a flow of fakes, with one token in its cache."""

    def __init__(self, raw: dict[str, Any] | None = None, **claims: Any) -> None:
        self.bench = Bench(raw, token_response(result_token()))
        self.clock, self.keys = self.bench.clock, self.bench.keys
        plugin = TokenExchangePlugin(lambda _: self.bench.flow, self.clock)
        self.instance: Any = plugin.start(raw or config_with())
        self.header = "Bearer " + target.mint(**{"aud": "gateway", **claims})
        self.instance.access(Recorder(self.header))
        # The first hit is judged, and from then on its answer stands.
        assert self.warm() is not None

    def warm(self, header: str | None = None, *, connection: str = "", **others: str) -> Outcome | None:
        facts = {
            "connection": connection,
            "header": header or self.header,
            "query": "",
            "method": "GET",
            **others,
        }
        outcome: Outcome | None = self.instance.warm([facts[kind] for kind in self.instance._kinds])
        return outcome

    def judged(self, ask: Callable[[], Any]) -> tuple[Any, bool]:
        """Return what *ask* gives, and whether keys were asked for it: whether it took the long way."""
        before = self.keys.asked[TARGET]
        return ask(), self.keys.asked[TARGET] > before


def test_the_same_request_is_answered_without_being_judged_again_and_counted_like_one_that_was() -> None:
    desk = Desk()
    counted = desk.bench.metrics.counts[HIT]

    outcome, judged = desk.judged(desk.warm)

    assert outcome is desk.warm()
    assert not judged
    assert counted + 2 == desk.bench.metrics.counts[HIT]


def test_an_answer_stands_for_so_long_at_most() -> None:
    desk = Desk()

    desk.clock.advance(LEASE_S - 0.01)
    assert not desk.judged(desk.warm)[1]

    desk.clock.advance(0.01)
    outcome, judged = desk.judged(desk.warm)
    assert judged
    assert outcome.status is None
    assert not desk.judged(desk.warm)[1]


def test_an_answer_ends_with_the_subject_token() -> None:
    desk = Desk(exp=NOW + 8)

    desk.clock.step_wall(7)

    # The cached result ended 5 s before: the margin.
    assert desk.warm() is None
    desk.clock.step_wall(1)
    assert desk.warm().status == 401


def test_an_answer_ends_with_the_subject_token_though_its_result_lives_on() -> None:
    desk = Desk()
    desk.instance._leases._leases.clear()
    desk.clock.step_wall(LIFETIME - 6)
    assert desk.warm().status is None

    desk.clock.step_wall(1)

    assert desk.warm() is None


def test_an_answer_ends_with_the_greatest_age() -> None:
    entry = {"issuer": TARGET, "conditions": {"has_audience": ["gateway"]}, "max_age": 3}
    desk = Desk(config_with(None, entry))

    desk.clock.step_wall(2.9)
    assert not desk.judged(desk.warm)[1]

    desk.clock.step_wall(0.2)
    assert desk.warm().status == 401


@pytest.mark.parametrize("claim", ["iat", "nbf"])
def test_a_clock_that_steps_back_before_the_token_ends_the_answer(claim: str) -> None:
    desk = Desk(**{"iat": ABSENT, claim: NOW})

    desk.clock.step_wall(-1)

    assert desk.warm().status == 401


def test_a_result_that_ended_on_the_monotonic_clock_is_not_handed_out() -> None:
    desk = Desk()
    (cached,) = desk.bench.cache._exchanged.values()
    cached.reuse_until_monotonic = desk.clock.monotonic() + 1
    desk.keys.generation += 1
    assert desk.warm().status is None

    desk.clock.advance(1)
    desk.clock.step_wall(-1)

    assert desk.warm() is None


def test_key_11_a_fetch_of_keys_ends_every_answer() -> None:
    desk = Desk()

    desk.keys.generation += 1

    assert desk.judged(desk.warm)[1]
    assert not desk.judged(desk.warm)[1]


def test_key_11_a_key_that_is_gone_ends_the_answer() -> None:
    desk = Desk()

    desk.keys.sets = FakeKeySource({TARGET: target.jwks("ES256")}).sets
    desk.keys.generation += 1

    assert desk.warm().status == 401


def test_an_answer_stands_no_longer_than_the_keys_are_settled() -> None:
    desk = Desk()
    desk.keys.generation += 1
    desk.keys.settled = desk.clock.monotonic() + 1
    assert desk.judged(desk.warm)[1]

    desk.clock.advance(0.99)
    assert not desk.judged(desk.warm)[1]
    desk.clock.advance(0.01)
    assert desk.judged(desk.warm)[1]


def test_a_cached_token_that_was_dropped_is_not_handed_out() -> None:
    desk = Desk()
    cache = desk.bench.cache
    (key,) = cache._exchanged

    cache.forget_exchanged(key)

    assert desk.warm() is None


def test_another_header_is_judged() -> None:
    desk = Desk()

    assert desk.warm(desk.header + " ").status == 400
    assert desk.warm(desk.header[:-4] + "AAAA").status == 401


@pytest.mark.parametrize(
    "connection", ["authorization", "Authorization, keep-alive", "keep-alive,authorization"]
)
def test_gw_20_a_connection_header_is_judged_whatever_stands(connection: str) -> None:
    assert Desk().warm(connection=connection).status == 400


def test_the_parts_of_a_request_never_run_together() -> None:
    desk = Desk(config_with({"run_on_preflight": False}))

    assert desk.warm(method="GET").status is None
    assert desk.warm(method="GET") is desk.warm(method="GET")
    assert desk.judged(lambda: desk.warm(method="POST"))[1]
    # What a join of the parts could be taken for.
    assert desk.warm(desk.header + "\0GET", method="").status == 400


def test_no_answer_stands_for_a_forwarded_token() -> None:
    desk = Desk()
    header = "Bearer " + target.mint(aud="orders")
    audited = len(desk.bench.audit.events)

    assert desk.warm(header).status is None
    assert desk.warm(header).status is None
    assert audited + 2 == len(desk.bench.audit.events)


def test_no_answer_stands_where_the_credential_may_come_from_the_query() -> None:
    raw = config_with({"bearer_token_param_type": ["header", "query"]})
    desk = Desk(raw)

    assert desk.judged(lambda: desk.warm(query="a=1"))[1]
    assert desk.judged(lambda: desk.warm(query="a=1"))[1]


def test_no_answer_stands_for_the_request_that_made_the_exchange() -> None:
    bench = Bench()
    token = target.mint(aud="gateway")

    assert bench.flow.terms(bench.run(token)) is None
    assert bench.flow.terms(bench.run(token)) is not None


def test_a_fetch_that_lands_while_a_request_is_judged_ends_its_answer() -> None:
    desk = Desk()
    desk.keys.generation += 1
    judge = desk.keys.keys

    def land_meanwhile(*arguments: Any, **named: Any) -> Any:
        desk.keys.generation += 1
        return judge(*arguments, **named)

    desk.keys.keys = land_meanwhile  # type: ignore[method-assign]
    assert desk.judged(desk.warm)[1]
    desk.keys.keys = judge  # type: ignore[method-assign]

    assert desk.judged(desk.warm)[1]
    assert not desk.judged(desk.warm)[1]


def test_no_answer_stands_beside_an_unusual_connection_header() -> None:
    desk = Desk()

    assert desk.judged(lambda: desk.warm(connection="upgrade"))[1]
    assert desk.judged(lambda: desk.warm(connection="upgrade"))[1]


def test_answers_are_bounded_and_those_that_are_over_go() -> None:
    clock = FakeClock()
    leases: Leases[str] = Leases(clock, FakeKeySource({}), max_leases=2)

    kept = []

    def give(key: bytes, seconds: float) -> None:
        kept.append(_terms(clock, seconds))
        leases.give(key, kept[-1], key.decode(), lambda: None)

    give(b"a", 5)
    give(b"b", 5)
    give(b"c", 5)
    assert [None, "b", "c"] == [leases.find(key) for key in (b"a", b"b", b"c")]

    clock.advance(5)
    give(b"d", 5)
    assert [b"d"] == list(leases._leases)


def test_cache_17_an_answer_does_not_outlive_the_entry_that_it_was_made_from() -> None:
    clock = FakeClock()
    leases: Leases[str] = Leases(clock, FakeKeySource({}))
    kept = [_terms(clock, 5) for _ in range(3)]
    for number, terms in enumerate(kept):
        terms.exchanged.rendered = f"answer {number}"
        leases.give(bytes([number]), terms, terms.exchanged.rendered, lambda: None)
    assert ["answer 0", "answer 1", "answer 2"] == [leases.find(bytes([number])) for number in range(3)]

    # As the cache pushes out what was not used for longest; nothing here keeps it alive.
    del kept[:2], terms
    assert [None, None, "answer 2"] == [leases.find(bytes([number])) for number in range(3)]
    # And the next one that is given takes along what is over.
    other = _terms(clock, 5)
    leases.give(b"other", other, "other", lambda: None)
    assert [bytes([2]), b"other"] == list(leases._leases)


def test_the_key_source_says_how_long_its_sets_stand_and_when_one_came() -> None:
    clock = FakeClock()
    sender = FakeSender({"https://idp.test/keys": [json_response(json.loads(target.jwks())), DOWN]})
    source = IssuerKeySource(sender, clock, submit=lambda fetch: fetch())
    endpoints = IssuerEndpoints(issuer=TARGET, discovery_url=None, jwks_uri="https://idp.test/keys")
    assert clock.monotonic() == source.settled_until(endpoints)
    started, before = clock.monotonic(), source.generation

    source.keys(endpoints, deadline=started + 5)
    fetched = source.generation
    assert fetched != before
    assert started + REFRESH_S == source.settled_until(endpoints)

    clock.advance(REFRESH_S)
    source.keys(endpoints, deadline=None)
    assert clock.monotonic() + RETRY_S == source.settled_until(endpoints)
    assert fetched == source.generation

    clock.advance(STALE_S - REFRESH_S - 0.5)
    assert started + STALE_S == source.settled_until(endpoints)


def test_a_new_discovery_document_ends_answers_though_its_keys_are_not_to_be_had() -> None:
    document = {"issuer": TARGET, "jwks_uri": f"{TARGET}/keys", "token_endpoint": f"{TARGET}/token"}
    url = f"{TARGET}/.well-known/openid-configuration"
    sender = FakeSender({url: json_response(document), f"{TARGET}/keys": DOWN})
    source = IssuerKeySource(sender, FakeClock(), submit=lambda fetch: fetch())
    before = source.generation

    source.token_endpoint(IssuerEndpoints(issuer=TARGET, discovery_url=url), deadline=2_000)

    assert before != source.generation


def _terms(clock: FakeClock, seconds: float) -> Terms:
    ends = clock.monotonic() + seconds
    token = ExchangedToken(token=Secret("t"), claims=None, reuse_until=2e9, reuse_until_monotonic=ends)
    return Terms(begins=0, ends=2e9, ends_monotonic=ends, generation=0, exchanged=token)

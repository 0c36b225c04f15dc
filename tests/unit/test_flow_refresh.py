"""Tokens in use are renewed ahead of their end: in the background, once, proven, and at nobody's cost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from kong_token_exchange.core.policy import BreakerPolicy
from kong_token_exchange.errors import DeadlineError, IssuerUnavailableError
from kong_token_exchange.flow import REUSE_MARGIN_S
from kong_token_exchange.plugin import TokenExchangePlugin
from kong_token_exchange.protocol.http_message import HttpRequest, HttpResponse
from kong_token_exchange.shell.breaker import GuardedSender
from kong_token_exchange.shell.refresher import BackgroundRefresher
from tests.support.fakes import PATIENCE_S, Answer, error_response, token_response
from tests.support.minting import NOW
from tests.unit.test_flow import ENDPOINT, ENTRY, PARTNER, TARGET, Bench, config_with, result_token, target

# The first result may be handed out for so long; its renewal begins after 80 to 90 % of that.
LIFE = 300 - REUSE_MARGIN_S
NEVER, SURE = 0.8 * LIFE - 0.001, 0.9 * LIFE

SUBJECT = target.mint(aud=["gateway"], exp=NOW + 3600)


class FakeRefresher:
    """Keeps what is offered until a test runs it."""

    def __init__(self) -> None:
        self.offered: list[tuple[Callable[[], None], str]] = []
        self.full = False

    def offer(self, work: Callable[[], None], *, group: str) -> bool:
        if not self.full:
            self.offered.append((work, group))
        return not self.full

    def run(self) -> None:
        offered, self.offered = self.offered, []
        for work, _ in offered:
            work()


class Renewal(Bench):
    """A flow with one token in its cache, and what is to be answered when that is renewed."""

    def __init__(self, *answers: Answer, raw: dict[str, Any] | None = None, subject: str = SUBJECT) -> None:
        self.refresher = FakeRefresher()
        first = token_response(result_token(jti="first", exp=NOW + 900), issued_token_type=...)
        if raw is None or raw["token_exchange"].get("grant_type") != "jwt_bearer":
            first = token_response(result_token(jti="first", exp=NOW + 900))
        super().__init__(raw, [first, *answers], refresher=self.refresher)
        self.subject = subject
        self.first = self.token(subject)

    def hit(self) -> str:
        """Return what a request is given on the loop, which may not wait."""
        return self.token(self.subject, within=None)

    @property
    def renewals(self) -> dict[str, int]:
        counts = self.metrics.counts
        return {key.partition("=")[2]: n for key, n in counts.items() if key.startswith("refreshes")}


def renewed(**claims: Any) -> HttpResponse:
    return token_response(result_token(**{"jti": "second", "exp": NOW + 1800, **claims}))


def test_res_04_a_token_in_use_is_renewed_before_its_end() -> None:
    it = Renewal(renewed())

    it.clock.advance(NEVER)
    assert it.first == it.hit()
    assert [] == it.refresher.offered
    it.clock.advance(SURE - NEVER)
    # Whoever comes now still gets the old one, at once, and one of them has it renewed.
    assert [it.first] * 3 == [it.hit() for _ in range(3)]
    assert [ENDPOINT] == [group for _, group in it.refresher.offered]
    assert 1 == it.exchanges

    it.refresher.run()
    assert 2 == it.exchanges
    assert it.sender.requests[0].body == it.sender.requests[1].body
    second = it.hit()
    assert second != it.first
    # It lives as long as a first one would, from its own beginning.
    it.clock.advance(LIFE - 0.001)
    assert second == it.hit()
    assert {"renewed": 1} == it.renewals
    assert ["exchange", "exchange"] == [event.outcome for event in it.audit.events]
    assert [None, True] == [event.facts.get("refresh") for event in it.audit.events]
    first, again = (dict(event.facts) for event in it.audit.events)
    assert again.pop("refresh")
    assert first == again


def test_a_token_that_nobody_uses_is_not_renewed() -> None:
    it = Renewal(renewed())
    it.clock.advance(LIFE)

    assert [] == it.refresher.offered


@pytest.mark.parametrize(
    ("raw", "subject"),
    [
        (config_with(cache={"refresh_ahead": False}), SUBJECT),
        # An assertion may be good for one use.
        (config_with(None, {**ENTRY, "issuer": TARGET}, grant_type="jwt_bearer"), SUBJECT),
        (config_with(), target.mint(aud="gateway", exp=NOW + 300)),
        (config_with(), target.mint(aud="gateway", exp=NOW + 310)),
        (config_with(None, {**ENTRY, "max_age": 310}, {"issuer": PARTNER}), SUBJECT),
        (config_with(cache={"ttl": 14}), SUBJECT),
    ],
    ids=["off", "assertion", "ends-with-its-subject", "or-soon-after", "greatest-age", "short-life"],
)
def test_what_gains_nothing_or_may_not_be_sent_again_is_not_renewed(
    raw: dict[str, Any], subject: str
) -> None:
    it = Renewal(renewed(), raw=raw, subject=subject)
    life = it.run(subject).exchanged
    assert life is not None
    assert life.reuse_until is not None

    it.clock.advance(life.reuse_until - NOW - 0.001)
    assert it.first == it.hit()
    assert [] == it.refresher.offered


FAULTS: dict[str, Answer] = {
    "FAULT-01-down": IssuerUnavailableError(reason="connect_failed"),
    "FAULT-05-too-slow": DeadlineError(reason="deadline"),
    "FAULT-07-overloaded": HttpResponse(status=429, headers={"retry-after": "7"}),
    "FAULT-09-failed": HttpResponse(status=500),
    "our-own-credentials": error_response("invalid_client", status=401),
    "EXC-26-no-json": HttpResponse(status=200, body=b"<html>"),
    "EXC-15-another-subject": renewed(sub="somebody-else"),
    "EXC-16-another-issuer": renewed(iss=PARTNER),
    "EXC-12-expired": renewed(exp=NOW - 100),
}


@pytest.mark.parametrize("answer", FAULTS.values(), ids=FAULTS.keys())
def test_res_01_a_renewal_that_fails_hurts_nobody_and_backs_off(answer: Answer) -> None:
    it = Renewal(answer)
    it.clock.advance(SURE)
    left = LIFE - SURE
    waits = []
    began = it.clock.monotonic()
    # A request each tenth of a second until the old one ends.
    for _ in range(int(left * 10)):
        assert it.first == it.hit()
        if it.refresher.offered:
            waits.append(it.clock.monotonic() - began)
            it.refresher.run()
        it.clock.advance(0.1)

    assert waits == pytest.approx([0, 5, 15], abs=0.2)
    assert {"failed": 3} == it.renewals
    assert 4 == it.exchanges
    # No request was refused, and each try is told to the auditor.
    assert not [key for key in it.metrics.counts if "outcome=refuse" in key]
    events = it.audit.events[1:]
    assert [("refuse", True)] * 3 == [(event.outcome, event.facts["refresh"]) for event in events]
    assert all(event.status >= 500 and event.facts["subject"] for event in events)

    it.clock.advance(left)
    it.refusal(SUBJECT)


@pytest.mark.parametrize(
    ("raw", "answer", "reason", "cached"),
    [
        (config_with(), error_response("invalid_grant"), "subject_token_refused", True),
        (config_with(), error_response("invalid_target"), "target_refused", True),
        # The right to a scope was taken away.
        (config_with({"scopes_required": ["read"]}), renewed(scope="other"), "scopes_required", None),
    ],
    ids=["CACHE-24-subject", "CACHE-24-target", "CACHE-24-scope"],
)
def test_a_renewal_that_is_refused_ends_the_old_token(
    raw: dict[str, Any], answer: Answer, reason: str, cached: bool | None
) -> None:
    it = Renewal(answer, raw=raw)
    plugin = TokenExchangePlugin(lambda _: it.flow, it.clock)
    instance: Any = plugin.start(raw)
    header = "Bearer " + it.subject
    it.clock.advance(NEVER)
    standing = instance.warm(["", header])
    it.clock.advance(0.01)
    assert standing is instance.warm(["", header])

    it.clock.advance(SURE - NEVER)
    it.hit()
    it.refresher.run()

    assert {"refused": 1} == it.renewals
    refused = it.refusal(it.subject)
    assert (reason, cached) == (refused.reason, refused.facts.get("cached"))
    # The answer that stood for the old one does not stand any more.
    outcome = instance.warm(["", header])
    assert outcome is None or outcome.is_exit


def test_no_answer_stands_beyond_the_moment_of_renewal() -> None:
    it = Renewal(renewed())
    found = it.run(it.subject, within=None)
    terms = it.flow.terms(found)
    assert terms is not None
    assert found.exchanged is not None
    begin = found.exchanged.refresh_at_monotonic
    assert 0.8 * LIFE <= begin - it.clock.monotonic() <= 0.9 * LIFE

    it.clock.advance(begin - it.clock.monotonic() - 3)
    terms = it.flow.terms(it.run(it.subject, within=None))
    assert terms is not None
    assert begin == terms.ends_monotonic
    # Once it is being renewed, answers stand again.
    it.clock.advance(3)
    terms = it.flow.terms(it.run(it.subject, within=None))
    assert terms is not None
    assert it.clock.monotonic() + 5 == terms.ends_monotonic


def test_res_04_where_there_is_no_place_the_token_is_renewed_later() -> None:
    it = Renewal(renewed())
    it.clock.advance(SURE)
    it.refresher.full = True
    it.hit()
    it.hit()
    assert {"no_place": 1} == it.renewals

    it.refresher.full = False
    it.clock.advance(5)
    it.hit()
    it.refresher.run()
    assert {"no_place": 1, "renewed": 1} == it.renewals


@pytest.mark.parametrize("move", ["wall", "both"])
def test_a_renewal_that_comes_too_late_asks_nobody(move: str) -> None:
    it = Renewal(renewed())
    it.clock.advance(SURE)
    it.hit()
    if move == "wall":
        it.clock.step_wall(LIFE - SURE)
    else:
        it.clock.advance(LIFE - SURE)

    it.refresher.run()
    assert ({"not_needed": 1}, 1) == (it.renewals, it.exchanges)
    assert "miss" == it.run(it.subject).cache


def test_a_renewal_of_what_is_gone_asks_nobody() -> None:
    it = Renewal(renewed())
    it.clock.advance(SURE)
    it.hit()
    ((work, _),) = it.refresher.offered
    it.clock.step_wall(3000)
    # The jump of the clock ended it, and the look-up dropped it.
    assert it.cache.exchanged(next(iter(it.cache._exchanged)), now=it.clock.now(), monotonic=0) is None

    work()
    assert ({"not_needed": 1}, 1) == (it.renewals, it.exchanges)


def test_one_token_is_renewed_once_at_a_time() -> None:
    it = Renewal(renewed())
    it.clock.advance(SURE)
    it.hit()
    ((work, _),) = it.refresher.offered

    work()
    work()
    assert ({"renewed": 1, "not_needed": 1}, 2) == (it.renewals, it.exchanges)


def test_res_05_a_breaker_that_is_open_is_respected() -> None:
    it = Renewal(HttpResponse(status=500), renewed())
    it.flow._sender = GuardedSender(it.sender, it.clock, it.metrics, policy=BreakerPolicy(failures=1))
    it.clock.advance(SURE)
    assert "token_endpoint_failed" == it.refusal(target.mint(aud="gateway", x=1)).reason

    it.hit()
    it.refresher.run()
    assert ({"failed": 1}, 2) == (it.renewals, it.exchanges)
    assert ("breaker_open", True) == (it.audit.events[-1].reason, it.audit.events[-1].facts["refresh"])

    it.clock.advance(5)
    it.hit()
    it.refresher.run()
    assert ({"failed": 1, "renewed": 1}, 3) == (it.renewals, it.exchanges)


def test_res_04_the_loop_never_waits_for_a_renewal_and_who_needs_the_new_one_shares_it() -> None:
    it = Renewal(renewed())
    it.flow._refresher = BackgroundRefresher()
    it.clock.advance(SURE)
    threads = []

    def note(_: HttpRequest) -> HttpResponse:
        threads.append(threading.current_thread().name)
        return renewed()

    it.sender.script[ENDPOINT] = note
    with it.sender.held() as hold:
        assert it.first == it.hit()
        assert hold.entered.wait(PATIENCE_S)
        assert it.first == it.hit()
        # The old one ends while its renewal hangs: the next request joins that.
        it.clock.advance(LIFE - SURE)
        joined = threading.Event()
        wait = it.cache._wait

        def join(*flight: Any) -> Any:
            joined.set()
            return wait(*flight)

        it.cache._wait = join  # type: ignore[method-assign]
        tokens: list[str] = []
        waiter = threading.Thread(target=lambda: tokens.append(it.token(it.subject)), daemon=True)
        waiter.start()
        assert joined.wait(PATIENCE_S)
    waiter.join(PATIENCE_S)

    assert ["refresh"] == threads
    assert 1 == len(tokens)
    assert it.first not in tokens
    assert 2 == it.exchanges

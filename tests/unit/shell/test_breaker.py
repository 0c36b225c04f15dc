"""Breaker, rest and shedding, with a clock that stands still until it is moved."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from kong_token_exchange.config import load_config
from kong_token_exchange.core.policy import BreakerPolicy
from kong_token_exchange.errors import (
    DeadlineError,
    IssuerUnavailableError,
    NonConformingResponseError,
    TokenExchangeError,
)
from kong_token_exchange.protocol.http_message import HttpRequest, HttpResponse
from kong_token_exchange.shell.breaker import MAX_REST_S, GuardedSender

REQUEST = HttpRequest(method="POST", url="https://idp.test/token")
OTHER = HttpRequest(method="POST", url="https://other.test/token")
OK = HttpResponse(status=200)


class Clock:
    time = 1000.0

    def monotonic(self) -> float:
        return self.time

    def now(self) -> float:
        raise AssertionError("a guard lives on the monotonic clock")


class Counting:
    def __init__(self) -> None:
        self.counts: list[str] = []
        self.times: list[tuple[str, float, dict[str, str]]] = []

    def count(self, name: str, **labels: str) -> None:
        self.counts.append(labels.get("reason", name))

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        self.times.append((name, seconds, labels))


class Inner:
    """Answers each request with the next of its answers, the last one for ever."""

    def __init__(self, *answers: HttpResponse | TokenExchangeError) -> None:
        self.answers = list(answers)
        self.sent: list[str] = []

    def send(self, request: HttpRequest, *, deadline: float, max_body: int) -> HttpResponse:
        self.sent.append(request.url)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, TokenExchangeError):
            raise answer
        return answer


def guard(inner: Any, **options: Any) -> tuple[GuardedSender, Clock, Counting]:
    clock, metrics = Clock(), Counting()
    options.setdefault("policy", BreakerPolicy(failures=3, open_for_s=5.0))
    return GuardedSender(inner, clock, metrics, jitter=lambda: 1.0, **options), clock, metrics


def send(sender: GuardedSender, request: HttpRequest = REQUEST) -> str:
    """`200`, or the reason of what was raised."""
    try:
        return str(sender.send(request, deadline=2000.0, max_body=100).status)
    except TokenExchangeError as error:
        return error.reason


def down() -> IssuerUnavailableError:
    return IssuerUnavailableError(reason="connect_failed")


@pytest.mark.parametrize(
    "fault", [down(), DeadlineError(reason="deadline"), HttpResponse(status=500), HttpResponse(status=503)]
)
def test_res_05_faults_in_a_row_open_the_breaker_for_this_endpoint_alone(
    fault: HttpResponse | TokenExchangeError,
) -> None:
    inner = Inner(fault)
    sender, _, metrics = guard(inner)

    for _ in range(3):
        assert "breaker_open" != send(sender)
    assert "breaker_open" == send(sender)

    assert 3 == len(inner.sent)
    assert metrics.counts == ["breaker_opened", "breaker_open"]
    inner.answers = [OK]
    assert "200" == send(sender, OTHER)


@pytest.mark.parametrize(
    "answer",
    [
        HttpResponse(status=400),
        HttpResponse(status=401),
        HttpResponse(status=200),
        NonConformingResponseError(reason="response_too_long"),
    ],
)
def test_what_is_no_fault_opens_nothing(answer: HttpResponse | TokenExchangeError) -> None:
    inner = Inner(answer)
    sender, _, _ = guard(inner)

    for _ in range(20):
        assert "breaker_open" != send(sender)

    assert 20 == len(inner.sent)


def test_an_answer_between_two_faults_starts_the_count_anew() -> None:
    inner = Inner(down(), down(), OK, down(), down(), OK)
    sender, _, _ = guard(inner)

    assert ["connect_failed", "connect_failed", "200"] * 2 == [send(sender) for _ in range(6)]


def test_the_breaker_stays_open_to_the_last_moment_and_tells_how_long() -> None:
    inner = Inner(down())
    sender, clock, _ = guard(inner)
    for _ in range(3):
        send(sender)

    clock.time += 3.5
    with pytest.raises(IssuerUnavailableError) as caught:
        sender.send(REQUEST, deadline=2000.0, max_body=100)
    assert 2 == caught.value.retry_after
    clock.time += 1.49
    assert "breaker_open" == send(sender)
    inner.answers = [OK]
    clock.time += 0.01
    assert "200" == send(sender)


def test_fault_23_one_probe_goes_first_and_the_rest_waits_for_it() -> None:
    inner = Inner(down())
    sender, clock, _ = guard(inner)
    for _ in range(3):
        send(sender)
    clock.time += 5.0
    seen: list[str] = []

    class Probing(Inner):
        def send(self, request: HttpRequest, *, deadline: float, max_body: int) -> HttpResponse:
            seen.append(send(sender))
            return OK

    sender._sender = Probing(OK)
    assert "200" == send(sender)

    assert ["breaker_open"] == seen
    sender._sender = Inner(OK)
    assert ["200"] * 3 == [send(sender) for _ in range(3)]


def test_a_failed_probe_opens_again_at_once() -> None:
    inner = Inner(down())
    sender, clock, _ = guard(inner)
    for _ in range(3):
        send(sender)
    clock.time += 5.0

    assert ["connect_failed", "breaker_open"] == [send(sender), send(sender)]
    clock.time += 5.0
    assert "connect_failed" == send(sender)


def test_a_probe_that_ends_in_a_bug_lets_another_one_try() -> None:
    inner = Inner(down())
    sender, clock, _ = guard(inner)
    for _ in range(3):
        send(sender)
    clock.time += 5.0

    class Broken(Inner):
        def send(self, request: HttpRequest, *, deadline: float, max_body: int) -> HttpResponse:
            raise ZeroDivisionError

    sender._sender = Broken(OK)
    with pytest.raises(ZeroDivisionError):
        sender.send(REQUEST, deadline=2000.0, max_body=100)
    sender._sender = Inner(OK)
    assert "200" == send(sender)


def test_no_failures_means_no_breaker() -> None:
    sender, _, _ = guard(Inner(down()), policy=BreakerPolicy(failures=0))

    assert {"connect_failed"} == {send(sender) for _ in range(50)}


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(("asked", "rest"), [("7", 7.0), ("100", MAX_REST_S)])
def test_fault_07_res_06_a_retry_after_is_obeyed_and_bounded(status: int, asked: str, rest: float) -> None:
    inner = Inner(HttpResponse(status=status, headers={"retry-after": asked}), OK)
    sender, clock, _ = guard(inner)

    assert str(status) == send(sender)
    clock.time += rest - 0.01
    assert "endpoint_rests" == send(sender)
    clock.time += 0.01
    assert "200" == send(sender)
    assert 2 == len(inner.sent)


@pytest.mark.parametrize(
    "asked", [None, "", "soon", "-1", "0", "Sat, 01 Jan 2028 00:00:00 GMT", "9" * 30, "٣"]
)
def test_fault_08_without_a_usable_retry_after_the_wait_doubles_to_its_bound(asked: str | None) -> None:
    headers = {} if asked is None else {"retry-after": asked}
    inner = Inner(HttpResponse(status=429, headers=headers))
    sender, clock, _ = guard(inner)

    for wait in (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0):
        assert "429" == send(sender)
        clock.time += wait - 0.001
        assert "endpoint_rests" == send(sender)
        clock.time += 0.001


def test_jitter_shortens_a_wait_by_half_at_most() -> None:
    inner = Inner(HttpResponse(status=429))
    sender, clock, _ = guard(inner)
    sender._jitter = lambda: 0.0
    send(sender)

    clock.time += 0.499
    assert "endpoint_rests" == send(sender)
    clock.time += 0.001
    assert "429" == send(sender)


def test_res_13_more_than_the_bound_is_shed_at_once_and_the_rest_goes_on() -> None:
    release = threading.Event()
    entered = threading.Semaphore(0)

    class Slow(Inner):
        def send(self, request: HttpRequest, *, deadline: float, max_body: int) -> HttpResponse:
            entered.release()
            assert release.wait(10)
            return OK

    sender, _, metrics = guard(Slow(OK), max_in_flight=2)
    results: list[str] = []
    run: Callable[[], None] = lambda: results.append(send(sender))  # noqa: E731 - a thread's body
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
        assert entered.acquire(timeout=10)

    assert "exchange_shed" == send(sender)
    assert ["exchange_shed"] == metrics.counts
    release.set()
    for thread in threads:
        thread.join(10)
    assert ["200", "200"] == results
    assert "200" == send(sender)


def test_a_deadline_that_has_passed_sends_nothing_and_blames_nobody() -> None:
    inner = Inner(OK)
    sender, clock, _ = guard(inner)

    for _ in range(10):
        with pytest.raises(DeadlineError):
            sender.send(REQUEST, deadline=clock.time, max_body=100)

    assert [] == inner.sent
    assert "200" == send(sender)


@pytest.mark.parametrize(("time_left_s", "blamed"), [(0.99, False), (1.0, True)])
def test_an_endpoint_that_had_no_fair_time_is_not_blamed(time_left_s: float, blamed: bool) -> None:
    sender, clock, _ = guard(Inner(DeadlineError(reason="deadline")))

    for _ in range(5):
        with pytest.raises((DeadlineError, IssuerUnavailableError)):
            sender.send(REQUEST, deadline=clock.time + time_left_s, max_body=100)

    sender._sender = Inner(OK)
    assert ("breaker_open" if blamed else "200") == send(sender)


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        (HttpResponse(status=200), "answered"),
        (HttpResponse(status=500), "answered"),
        (down(), "failed"),
        (DeadlineError(reason="deadline"), "deadline"),
    ],
    ids=["answer", "fault", "no-connection", "deadline"],
)
def test_the_time_of_each_exchange_is_told(answer: HttpResponse | TokenExchangeError, result: str) -> None:
    class Slow(Inner):
        def send(self, request: HttpRequest, *, deadline: float, max_body: int) -> HttpResponse:
            clock.time += 0.25
            return super().send(request, deadline=deadline, max_body=max_body)

    sender, clock, metrics = guard(Slow(answer), policy=BreakerPolicy(failures=1))
    send(sender)

    assert [("exchange_seconds", 0.25, {"result": result})] == metrics.times
    # What was held back took no time of the endpoint.
    sender._endpoint(REQUEST.url).rest_until = clock.time + 5
    send(sender)
    assert 1 == len(metrics.times)


@pytest.mark.parametrize(("deadline_ms", "fair_s"), [(1, 0.0005), (800, 0.4), (2000, 1.0), (5000, 1.0)])
def test_res_01_the_deadline_is_a_fault_however_short_it_is_configured(
    deadline_ms: int, fair_s: float
) -> None:
    inner = Inner(DeadlineError(reason="deadline"))
    policy = load_config(
        {
            "issuer": "https://idp.test",
            "client_id": ["gateway"],
            "client_secret": ["s3cr3t"],
            "token_exchange": {
                "subject_token_issuers": [{"issuer": "https://partner.test"}],
                "deadline": deadline_ms,
            },
        }
    ).breaker
    sender, clock, _ = guard(inner, policy=policy)

    def send_within(seconds: float) -> str:
        with pytest.raises(TokenExchangeError) as caught:
            sender.send(REQUEST, deadline=clock.time + seconds, max_body=100)
        return caught.value.reason

    # Who waited for a thread until little was left says nothing of the endpoint.
    assert ["deadline"] * 10 == [send_within(fair_s * 0.9) for _ in range(10)]
    # A little of the time has always gone by when it is sent.
    assert ["deadline"] * policy.failures == [
        send_within(deadline_ms / 1000 * 0.9) for _ in range(policy.failures)
    ]
    assert "breaker_open" == send_within(deadline_ms / 1000)

"""CACHE rows of the first level: ends, bounds, and one exchange for all who wait."""

import gc
import json
import threading
import tracemalloc
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import pytest

from kong_token_exchange.core.claims import Claims
from kong_token_exchange.core.strict_json import parse_json_object
from kong_token_exchange.errors import (
    DeadlineError,
    GatewayError,
    InsufficientScopeError,
    IssuerUnavailableError,
    RefusedTokenError,
    TimestampError,
    TokenExchangeError,
)
from kong_token_exchange.ports import ExchangedToken, VerifiedToken
from kong_token_exchange.secret import Secret
from kong_token_exchange.shell.clock import SystemClock
from kong_token_exchange.shell.token_cache import (
    WORTH_A_TRY_S,
    MemoryTokenCache,
    weigh,
    weigh_exchanged,
    weigh_verified,
)
from tests.support.fakes import PATIENCE_S, FakeClock, FakeMetrics, run_in_threads
from tests.support.minting import NOW

KEY = b"k" * 32


def claims(**members: Any) -> Claims:
    return Claims(
        iss="https://idp.test",
        sub="user-1",
        aud=("api",),
        exp=NOW + 300,
        nbf=None,
        iat=None,
        client=None,
        scopes=frozenset(),
        sender_constrained=False,
        members=members,
    )


def exchanged(
    token: str = "token", *, ends_in: float | None = 100, clock: FakeClock | None = None
) -> ExchangedToken:
    clock = clock or FakeClock()
    return ExchangedToken(
        token=Secret(token),
        claims=None,
        reuse_until=None if ends_in is None else clock.now() + ends_in,
        reuse_until_monotonic=clock.monotonic() + (ends_in or 0),
    )


def verified(**members: Any) -> VerifiedToken:
    return VerifiedToken(claims=claims(**members), typ=None, fingerprint=b"f")


def store(cache: MemoryTokenCache, key: bytes, entry: ExchangedToken | BaseException) -> ExchangedToken:
    def exchange() -> ExchangedToken:
        if isinstance(entry, BaseException):
            raise entry
        return entry

    return cache.exchange_once(key, exchange, deadline=FakeClock().monotonic() + 5, store=True)


def look_up(cache: MemoryTokenCache, key: bytes, clock: FakeClock) -> ExchangedToken | None:
    return cache.exchanged(key, now=clock.now(), monotonic=clock.monotonic())


# --- ends -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("move", "alive"),
    [
        (lambda clock: clock.advance(99), True),
        (lambda clock: clock.advance(99.999), True),
        (lambda clock: clock.advance(100), False),
        (lambda clock: clock.advance(101), False),
        (lambda clock: clock.step_wall(600), False),
        (lambda clock: (clock.step_wall(-600), clock.advance(99)), True),
        (lambda clock: (clock.step_wall(-600), clock.advance(100)), False),
    ],
    ids=[
        "CACHE-13-before", "CACHE-13-just-before", "CACHE-13-end", "CACHE-13-after",
        "CACHE-23-FAULT-50-wall-ahead", "CACHE-23-wall-back", "CACHE-23-FAULT-51-monotonic-end",
    ],
)  # fmt: skip
def test_an_entry_ends_by_the_earlier_of_two_clocks(move: Callable[[FakeClock], object], alive: bool) -> None:
    clock = FakeClock()
    cache = MemoryTokenCache(clock)
    entry = store(cache, KEY, exchanged(clock=clock))

    move(clock)

    assert (entry if alive else None) is look_up(cache, KEY, clock)


def test_an_entry_that_has_ended_is_gone_even_when_the_clock_steps_back() -> None:
    clock = FakeClock()
    cache = MemoryTokenCache(clock)
    store(cache, KEY, exchanged(clock=clock))

    clock.step_wall(600)
    look_up(cache, KEY, clock)
    clock.step_wall(-600)

    assert look_up(cache, KEY, clock) is None


def test_cache_15_a_result_without_an_end_is_not_kept() -> None:
    clock = FakeClock()
    cache = MemoryTokenCache(clock)

    store(cache, KEY, exchanged(ends_in=None))

    assert look_up(cache, KEY, clock) is None


def test_cache_14_what_is_not_to_be_stored_is_not_stored_and_not_found() -> None:
    clock = FakeClock()
    cache = MemoryTokenCache(clock)
    stored = store(cache, KEY, exchanged("stored"))

    result = cache.exchange_once(KEY, lambda: exchanged("fresh"), deadline=clock.monotonic() + 5, store=False)

    assert "fresh" == result.token.reveal()
    assert stored is look_up(cache, KEY, clock)


def test_an_entry_can_be_forgotten() -> None:
    clock = FakeClock()
    cache = MemoryTokenCache(clock)
    store(cache, KEY, exchanged())

    cache.forget_exchanged(KEY)
    cache.forget_exchanged(KEY)

    assert look_up(cache, KEY, clock) is None


def test_keys_are_kept_apart() -> None:
    clock = FakeClock()
    cache = MemoryTokenCache(clock)
    entries = {key: store(cache, key, exchanged()) for key in (b"a" * 32, b"b" * 32)}
    token = verified()
    cache.store_verified(KEY, token)

    assert entries == {key: look_up(cache, key, clock) for key in entries}
    assert (token, None) == (cache.verified(KEY), cache.verified(b"a" * 32))
    assert look_up(cache, KEY, clock) is None


# --- bounds ---------------------------------------------------------------------------


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


def test_cache_17_the_number_of_entries_is_bounded_and_evictions_are_counted() -> None:
    clock, metrics = FakeClock(), FakeMetrics()
    cache = MemoryTokenCache(clock, metrics=metrics, max_entries=10)

    for number in range(25):
        store(cache, key_of(number), exchanged())
        cache.store_verified(key_of(number), verified())

    assert list(range(15, 25)) == [n for n in range(25) if look_up(cache, key_of(n), clock)]
    assert list(range(15, 25)) == [n for n in range(25) if cache.verified(key_of(n))]
    assert {"cache_evictions,part=exchanged": 15, "cache_evictions,part=verified": 15} == metrics.counts


def test_cache_17_the_bytes_are_bounded_and_evictions_are_counted() -> None:
    clock, metrics = FakeClock(), FakeMetrics()
    entry = exchanged("x" * 5000)
    cache = MemoryTokenCache(clock, metrics=metrics, max_bytes=4 * weigh_exchanged(entry))

    for number in range(10):
        store(cache, key_of(number), exchanged("x" * 5000))

    assert [6, 7, 8, 9] == [n for n in range(10) if look_up(cache, key_of(n), clock)]
    assert {"cache_evictions,part=exchanged": 6} == metrics.counts


def test_cache_17_big_claims_are_bounded_by_bytes() -> None:
    big = verified(groups=[f"group-{number}" for number in range(500)])
    metrics = FakeMetrics()
    cache = MemoryTokenCache(FakeClock(), metrics=metrics, max_bytes=2 * weigh_verified(big))

    for number in range(5):
        cache.store_verified(key_of(number), big)

    assert [3, 4] == [n for n in range(5) if cache.verified(key_of(n))]
    assert 3 == metrics.counts["cache_evictions,part=verified"]


def test_cache_18_entries_in_use_outlive_a_flood() -> None:
    clock = FakeClock()
    cache = MemoryTokenCache(clock, max_entries=10)
    store(cache, KEY, exchanged())
    cache.store_verified(KEY, verified())

    for number in range(1000):
        store(cache, key_of(number), exchanged())
        cache.store_verified(key_of(number), verified())
        if number % 5 == 0:
            assert look_up(cache, KEY, clock)
            assert cache.verified(KEY)


def test_an_entry_too_heavy_for_the_cache_is_handed_out_and_not_kept() -> None:
    clock, metrics = FakeClock(), FakeMetrics()
    cache = MemoryTokenCache(clock, metrics=metrics, max_bytes=2000)

    for _ in range(2):
        assert "x" * 5000 == store(cache, KEY, exchanged("x" * 5000)).token.reveal()
    cache.store_verified(KEY, verified(x=["y" * 100] * 100))

    assert (None, None) == (look_up(cache, KEY, clock), cache.verified(KEY))
    assert {"cache_evictions,part=exchanged": 2, "cache_evictions,part=verified": 1} == metrics.counts


def test_a_heavy_entry_does_not_leave_the_old_one_in_its_place() -> None:
    cache = MemoryTokenCache(FakeClock(), max_bytes=3000)
    cache.store_verified(KEY, verified(x="old"))

    cache.store_verified(KEY, verified(x="y" * 5000))

    assert cache.verified(KEY) is None


def keycloak_payload(number: int) -> bytes:
    roles = {"roles": [f"role-{index}" for index in range(8)]}
    payload = {
        "iss": "https://idp.test/realms/a",
        "sub": f"user-{number}",
        "aud": ["orders", "reports"],
        "exp": NOW + 300,
        "iat": NOW,
        "jti": f"onrtro:{number:032x}",
        "azp": "client-1",
        "scope": "openid profile email orders",
        "realm_access": roles,
        "resource_access": {"orders": roles, "account": roles},
        "name": f"User {number}",
        "email": f"user-{number}@example.test",
    }
    return json.dumps(payload).encode()


@pytest.mark.parametrize(
    "payload", [keycloak_payload, lambda number: b'{"a":[' + b"1e3," * 900 + b"%d]}" % number]
)
def test_fault_112_the_weight_covers_what_python_needs(payload: Callable[[int], bytes]) -> None:
    count = 300
    cache = MemoryTokenCache(FakeClock())

    def fill() -> None:
        for number in range(count):
            members = parse_json_object(payload(number), max_bytes=8192)
            cache.store_verified(
                key_of(number),
                VerifiedToken(claims=claims(**members), typ="JWT", fingerprint=b"f" * 32),
            )
            entry = exchanged("x" * 1500 + str(number))
            entry.claims, entry.rendered = claims(**members), b"y" * 1600 + b"%d" % number
            store(cache, key_of(number), entry)

    gc.collect()
    tracemalloc.start()
    fill()
    gc.collect()
    needed = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()

    # Both parts weigh the claims, which they share here: that share is taken off.
    shared = sum(weigh(entry.claims.members) for entry in cache._verified.values())
    weighed = cache._verified.currsize + cache._exchanged.currsize - shared
    assert needed <= 1.2 * weighed


# --- refusals -------------------------------------------------------------------------

REFUSED = RefusedTokenError(reason="subject_token_refused", facts={"http_status": 400})


def test_cache_20_a_refusal_is_told_anew_each_time_until_its_end() -> None:
    clock = FakeClock()
    cache = MemoryTokenCache(clock)
    cache.store_refusal(KEY, REFUSED, ttl=2)

    clock.step_wall(-3600)
    clock.advance(1.999)
    one, other = cache.refusal(KEY), cache.refusal(KEY)
    assert one is not None
    assert other is not None
    assert one is not other
    assert (RefusedTokenError, {"http_status": 400, "cached": True}) == (type(one), one.facts)
    assert {"http_status": 400} == REFUSED.facts
    assert None is cache.refusal(b"o" * 32)

    clock.advance(0.001)
    assert None is cache.refusal(KEY)
    assert 0 == len(cache._refusals)


def test_cache_20_a_refusal_that_landed_meanwhile_is_not_asked_for_again() -> None:
    clock = FakeClock()
    cache = MemoryTokenCache(clock)
    cache.store_refusal(KEY, REFUSED, ttl=2)

    with pytest.raises(RefusedTokenError):
        store(cache, KEY, exchanged())
    assert {} == cache._flights
    # Where nothing is to be stored, nothing stored is used.
    other = exchanged()
    assert other is cache.exchange_once(KEY, lambda: other, deadline=clock.monotonic() + 5, store=False)


def test_cache_20_refusals_are_bounded_and_push_out_none_but_their_own_kind() -> None:
    metrics = FakeMetrics()
    clock = FakeClock()
    cache = MemoryTokenCache(clock, metrics=metrics, max_refusals=3)
    store(cache, KEY, exchanged())
    for number in range(5):
        cache.store_refusal(bytes([number]) * 32, REFUSED, ttl=2)

    assert [False, False, True, True, True] == [
        cache.refusal(bytes([number]) * 32) is not None for number in range(5)
    ]
    assert {"cache_evictions,part=refused": 2} == metrics.counts
    assert look_up(cache, KEY, clock) is not None


def test_cache_20_a_refusal_keeps_no_frame_alive() -> None:
    cache = MemoryTokenCache(FakeClock())
    with pytest.raises(RefusedTokenError) as caught:
        store(cache, KEY, RefusedTokenError(reason="subject_token_refused"))
    caught.value.__cause__ = ValueError("mark")
    assert caught.value.__traceback__ is not None
    cache.store_refusal(KEY, caught.value, ttl=2)

    kept = cache._refusals[KEY][0]
    assert (None, None, None) == (kept.__traceback__, kept.__cause__, kept.__context__)


# --- single flight --------------------------------------------------------------------


class Work:
    """An exchange that waits until it is let go, and counts how often it runs."""

    def __init__(self, outcome: ExchangedToken | BaseException) -> None:
        self.outcome = outcome
        self.calls = 0
        self.entered = threading.Event()
        self.release = threading.Event()

    def __call__(self) -> ExchangedToken:
        self.calls += 1
        self.entered.set()
        assert self.release.wait(PATIENCE_S)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def let_go(self) -> None:
        self.release.set()


class Rounds:
    """The same over several flights, each of which is let go by itself."""

    def __init__(self, *outcomes: ExchangedToken | BaseException) -> None:
        self.outcomes = outcomes
        self.calls = 0
        self.turns = threading.Semaphore(0)

    def __call__(self) -> ExchangedToken:
        outcome = self.outcomes[self.calls]
        self.calls += 1
        assert self.turns.acquire(timeout=PATIENCE_S)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def let_go(self) -> None:
        self.turns.release()


def share(
    cache: MemoryTokenCache,
    work: Work | Rounds,
    count: int,
    *,
    store: bool = True,
    calls: int = 1,
    time_left_s: float = PATIENCE_S,
) -> list[Any]:
    """Let *count* callers ask while one exchange runs, which ends once all others wait for it."""
    deadline = SystemClock().monotonic() + time_left_s
    joined = threading.Semaphore(0)
    wait = cache._wait

    def join(*flight: Any) -> ExchangedToken:
        joined.release()
        return wait(*flight)

    def let_go() -> None:
        # In each round one owns the flight, and those before have left.
        for done in range(calls):
            for _ in range(count - 1 - done):
                assert joined.acquire(timeout=PATIENCE_S)
            work.let_go()

    with patch.object(cache, "_wait", join):
        releaser = threading.Thread(target=let_go, daemon=True)
        releaser.start()
        results = run_in_threads(
            lambda: cache.exchange_once(KEY, work, deadline=deadline, store=store), count
        )
        releaser.join(PATIENCE_S)
    assert calls == work.calls
    assert {} == cache._flights
    return results


@pytest.mark.parametrize("store", [True, False], ids=["CACHE-16-FAULT-113-stored", "CACHE-16-not-stored"])
def test_many_callers_make_one_exchange(store: bool) -> None:
    clock = SystemClock()
    cache = MemoryTokenCache(clock)
    result = ExchangedToken(
        token=Secret("t"),
        claims=None,
        reuse_until=clock.now() + 100,
        reuse_until_monotonic=clock.monotonic() + 100,
    )
    work = Work(result)

    assert [result] * 50 == share(cache, work, 50, store=store)
    stored = cache.exchanged(KEY, now=clock.now(), monotonic=clock.monotonic())
    assert (result if store else None) is stored


def test_waiting_for_another_ones_exchange_is_timed() -> None:
    metrics = FakeMetrics()
    share(MemoryTokenCache(SystemClock(), metrics=metrics), Work(IssuerUnavailableError(reason="down")), 5)

    assert ["flight_wait_seconds"] * 4 == [name for name, _, _ in metrics.times]
    assert all(0 <= seconds < PATIENCE_S for _, seconds, _ in metrics.times)


def test_cache_16_fault_114_a_failure_wakes_all_and_stores_nothing() -> None:
    clock = SystemClock()
    cache = MemoryTokenCache(clock)
    error = IssuerUnavailableError(reason="token_endpoint_failed", retry_after=7, facts={"http_status": 503})

    results = share(cache, Work(error), 50)

    assert 50 == len(results)
    assert {(IssuerUnavailableError, "token_endpoint_failed", 7, 503)} == {
        (type(e), e.reason, e.retry_after, e.facts["http_status"]) for e in results
    }
    assert cache.exchanged(KEY, now=clock.now(), monotonic=clock.monotonic()) is None
    # The next caller tries again.
    assert "new" == store(cache, KEY, exchanged("new")).token.reveal()


def test_waiters_do_not_share_one_error_instance() -> None:
    cache = MemoryTokenCache(SystemClock())
    error = RefusedTokenError(reason="subject_token_refused", facts={"http_status": 400})

    results = share(cache, Work(error), 10)

    assert 10 == len({id(result) for result in results})
    assert all(isinstance(result, RefusedTokenError) for result in results)


@pytest.mark.parametrize(
    "error",
    [
        InsufficientScopeError(reason="scopes_required", scope="read write"),
        IssuerUnavailableError(reason="down", retry_after=9),
        TimestampError(claim="exp", facts={"exp": 1}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_error_reaches_the_waiters_whole(error: TokenExchangeError) -> None:
    results = share(MemoryTokenCache(SystemClock()), Work(error), 5)

    for result in results:
        assert isinstance(result, TokenExchangeError)
        assert (type(error), error.__dict__, str(error)) == (type(result), result.__dict__, str(result))


@pytest.mark.parametrize("store", [True, False], ids=["stored", "not-stored"])
def test_the_deadline_of_one_request_is_not_that_of_the_others(store: bool) -> None:
    clock = SystemClock()
    result = ExchangedToken(
        token=Secret("t"),
        claims=None,
        reuse_until=clock.now() + 100,
        reuse_until_monotonic=clock.monotonic() + 100,
    )
    late = DeadlineError(reason="deadline", facts={"host": "idp.test"})
    # One of those who waited owns the second flight, in which the others wait again.
    results = share(MemoryTokenCache(clock), Rounds(late, result), 5, store=store, calls=2)
    assert [late] == [found for found in results if isinstance(found, DeadlineError)]
    assert [result] * 4 == [found for found in results if not isinstance(found, DeadlineError)]


def test_one_who_has_no_time_left_asks_nobody() -> None:
    late = DeadlineError(reason="deadline", facts={"host": "idp.test"})
    results = share(MemoryTokenCache(SystemClock()), Work(late), 5, time_left_s=WORTH_A_TRY_S - 0.05)

    assert [DeadlineError] * 5 == [type(found) for found in results]


def test_a_second_deadline_is_the_last() -> None:
    late = DeadlineError(reason="deadline", facts={"host": "idp.test"})
    cache = MemoryTokenCache(SystemClock())
    results = share(cache, Rounds(late, late), 5, calls=2)

    assert [("deadline", "idp.test")] * 5 == [(found.reason, found.facts["host"]) for found in results]


@pytest.mark.parametrize("bug", [ValueError("mark-token"), SystemExit(3), KeyboardInterrupt("mark")])
def test_a_bug_in_one_thread_is_a_plain_error_in_the_others(bug: BaseException) -> None:
    cache = MemoryTokenCache(SystemClock())
    results = share(cache, Work(bug), 5)

    own = [result for result in results if type(result) is type(bug)]
    others = [result for result in results if type(result) is not type(bug)]
    assert [bug] == own[:1]
    assert {(GatewayError, "exchange_failed", 500)} == {(type(e), e.reason, e.status) for e in others}
    assert "mark" not in repr([(e.args, e.facts) for e in others])


def test_a_waiter_keeps_to_its_own_deadline_and_the_owner_goes_on() -> None:
    clock = SystemClock()
    cache = MemoryTokenCache(clock)
    result = exchanged()
    work = Work(result)
    owner: list[object] = []
    thread = threading.Thread(
        target=lambda: owner.append(
            cache.exchange_once(KEY, work, deadline=clock.monotonic() + PATIENCE_S, store=True)
        ),
        daemon=True,
    )
    thread.start()
    assert work.entered.wait(PATIENCE_S)

    for late in (0.05, -1):
        with pytest.raises(DeadlineError) as caught:
            cache.exchange_once(KEY, work, deadline=clock.monotonic() + late, store=True)
        assert ("deadline_waiting", 504) == (caught.value.reason, caught.value.status)

    work.release.set()
    thread.join(PATIENCE_S)
    assert [result] == owner
    assert 1 == work.calls


def test_a_result_that_landed_meanwhile_is_not_fetched_again() -> None:
    clock = FakeClock()
    cache = MemoryTokenCache(clock)
    landed = store(cache, KEY, exchanged())

    def never() -> ExchangedToken:
        raise AssertionError("there is a result")

    assert landed is cache.exchange_once(KEY, never, deadline=clock.monotonic() + 5, store=True)
    clock.advance(100)
    assert "new" == store(cache, KEY, exchanged("new", clock=clock)).token.reveal()


def test_nothing_of_a_failed_exchange_stays_in_memory() -> None:
    class Mark:
        pass

    cache = MemoryTokenCache(SystemClock())

    def attempt() -> weakref.ref[Mark]:
        mark = Mark()

        def exchange() -> ExchangedToken:
            assert mark is not None
            raise IssuerUnavailableError(reason="down")

        with suppress(IssuerUnavailableError):
            cache.exchange_once(KEY, exchange, deadline=SystemClock().monotonic() + 5, store=True)
        return weakref.ref(mark)

    gc.disable()
    try:
        assert attempt()() is None
    finally:
        gc.enable()

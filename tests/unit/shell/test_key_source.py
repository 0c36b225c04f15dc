"""KEY rows of fetching: how often, how long, and whose trouble it is."""

import itertools
import logging
import threading
from collections.abc import Callable
from functools import partial

import pytest

from kong_token_exchange.core.jwk import JwkSet
from kong_token_exchange.errors import (
    DeadlineError,
    IssuerUnavailableError,
    NonConformingResponseError,
    TokenExchangeError,
)
from kong_token_exchange.ports import IssuerEndpoints, NotInMemoryError
from kong_token_exchange.protocol.http_message import HttpRequest, HttpResponse
from kong_token_exchange.shell import key_source
from kong_token_exchange.shell.clock import SystemClock
from kong_token_exchange.shell.key_source import (
    COOL_DOWN_S,
    FETCH_DEADLINE_S,
    FIRST_RETRY_S,
    JUST_FETCHED_S,
    MAX_WAITING,
    REFRESH_S,
    RETRY_S,
    STALE_S,
    TROUBLE_S,
    TTL_S,
    IssuerKeySource,
)
from tests.support.fakes import (
    PATIENCE_S,
    Answer,
    FakeClock,
    FakeMetrics,
    FakeSender,
    json_response,
    run_in_threads,
)
from tests.support.minting import FakeIssuer, SigningKey, private_key, to_json
from tests.support.running import eventually

ISSUER = "https://idp.test/realms/a"
DISCOVERY = ISSUER + "/.well-known/openid-configuration"
OAUTH_DISCOVERY = "https://idp.test/.well-known/oauth-authorization-server/realms/a"
JWKS = ISSUER + "/keys"
TOKEN = ISSUER + "/token"

PLAIN = IssuerEndpoints(issuer=ISSUER, discovery_url=None, jwks_uri=JWKS)
DISCOVERED = IssuerEndpoints(issuer=ISSUER, discovery_url=DISCOVERY)

OLD, NEW = FakeIssuer(ISSUER, label="old"), FakeIssuer(ISSUER, label="new")
DOWN = IssuerUnavailableError(reason="connect_failed", facts={"host": "idp.test"})


def served(issuer: FakeIssuer, *algorithms: str) -> HttpResponse:
    return HttpResponse(status=200, body=issuer.jwks(*(algorithms or ("RS256",))))


def metadata(**members: object) -> HttpResponse:
    return json_response({"issuer": ISSUER, "jwks_uri": JWKS, "token_endpoint": TOKEN, **members})


def kids(jwks: JwkSet | None) -> list[str | None]:
    assert jwks is not None
    return [key.kid for key in jwks.keys]


OLD_KIDS, NEW_KIDS = ["old-RS256"], ["new-RS256"]


class Background:
    """Keeps fetches until the test runs them."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def __call__(self, fetch: Callable[[], None]) -> None:
        self.waiting.append(fetch)

    def run(self) -> int:
        """Run what waits; return how many fetches that were."""
        fetches, self.waiting = self.waiting, []
        for fetch in fetches:
            fetch()
        return len(fetches)


class Source:
    """A key source over a scripted sender, whose fetches end before the caller goes on."""

    def __init__(
        self,
        script: dict[str, Answer | list[Answer]] | None = None,
        *,
        submit: Callable[[Callable[[], None]], object] | None = None,
        allow_http: bool = False,
    ) -> None:
        self.clock = FakeClock()
        self.sender = FakeSender(script or {JWKS: served(OLD)})
        self.source = IssuerKeySource(
            self.sender, self.clock, allow_http=allow_http, submit=submit or (lambda fetch: fetch())
        )

    def keys(self, endpoints: IssuerEndpoints = PLAIN, *, within: float | None = 5.0) -> JwkSet:
        return self.source.keys(endpoints, deadline=self._deadline(within))

    def newer(self, endpoints: IssuerEndpoints = PLAIN, *, within: float | None = 5.0) -> JwkSet | None:
        return self.source.newer_keys(endpoints, deadline=self._deadline(within))

    def token_endpoint(self, endpoints: IssuerEndpoints = DISCOVERED, *, within: float | None = 5.0) -> str:
        return self.source.token_endpoint(endpoints, deadline=self._deadline(within))

    def refusal(self, ask: Callable[[], object]) -> TokenExchangeError:
        with pytest.raises(TokenExchangeError) as caught:
            ask()
        return caught.value

    def _deadline(self, within: float | None) -> float | None:
        return None if within is None else self.clock.monotonic() + within


# --- the first fetch ------------------------------------------------------------------


def test_keys_are_fetched_once_and_kept() -> None:
    it = Source()

    assert [OLD_KIDS] * 100 == [kids(it.keys()) for _ in range(100)]
    assert 1 == it.sender.count()
    request = it.sender.requests[0]
    assert ("GET", JWKS, {"Accept": "application/json"}, b"") == (
        request.method,
        request.url,
        request.headers,
        request.body,
    )


def test_keys_are_found_through_the_metadata() -> None:
    it = Source({DISCOVERY: metadata(), JWKS: served(OLD)})

    assert OLD_KIDS == kids(it.keys(DISCOVERED))
    assert TOKEN == it.token_endpoint()
    assert [DISCOVERY, JWKS] == [request.url for request in it.sender.requests]


def test_configured_addresses_win_over_discovered_ones() -> None:
    both = IssuerEndpoints(
        issuer=ISSUER,
        discovery_url=DISCOVERY,
        jwks_uri="https://keys.test/",
        token_endpoint="https://t.test/",
    )
    it = Source({"https://keys.test/": served(NEW)})

    assert ("https://t.test/", NEW_KIDS) == (it.token_endpoint(both), kids(it.keys(both)))
    assert 1 == it.sender.count()


def test_one_configured_address_leaves_the_other_to_the_metadata() -> None:
    it = Source({DISCOVERY: metadata(jwks_uri="https://other.test/"), "https://keys.test/": served(NEW)})
    endpoints = IssuerEndpoints(issuer=ISSUER, discovery_url=DISCOVERY, jwks_uri="https://keys.test/")

    assert (NEW_KIDS, TOKEN) == (kids(it.keys(endpoints)), it.token_endpoint(endpoints))


def test_whoever_may_not_wait_is_told_so_and_nothing_is_fetched_for_them() -> None:
    it = Source({DISCOVERY: metadata(), JWKS: served(OLD)})

    for ask in (it.keys, it.token_endpoint):
        with pytest.raises(NotInMemoryError):
            ask(DISCOVERED, within=None)
    assert 0 == it.sender.count()

    it.keys(DISCOVERED)
    assert (OLD_KIDS, TOKEN) == (
        kids(it.keys(DISCOVERED, within=None)),
        it.token_endpoint(within=None),
    )


def test_a_fetch_keeps_to_its_own_time() -> None:
    it = Source({DISCOVERY: metadata(), JWKS: served(OLD)})

    it.keys(DISCOVERED, within=0.5)

    now = it.clock.monotonic()
    assert [now + FETCH_DEADLINE_S / 2, now + FETCH_DEADLINE_S] == it.sender.deadlines


def test_an_impatient_caller_does_not_cancel_the_fetch() -> None:
    background = Background()
    it = Source(submit=background)

    error = it.refusal(lambda: it.keys(within=0.02))
    assert (DeadlineError, "deadline_keys", 504) == (type(error), error.reason, error.status)
    assert 1 == background.run()

    assert OLD_KIDS == kids(it.keys(within=None))
    assert 1 == it.sender.count()


def test_key_14_many_callers_make_one_fetch() -> None:
    sender = FakeSender({DISCOVERY: metadata(), JWKS: served(OLD)})
    clock = SystemClock()
    source = IssuerKeySource(sender, clock)

    with sender.held() as hold:
        threading.Thread(target=hold.release_first, daemon=True).start()
        found = run_in_threads(
            lambda: kids(source.keys(DISCOVERED, deadline=clock.monotonic() + PATIENCE_S)), 20
        )

    assert [OLD_KIDS] * 20 == found
    assert (1, 1) == (sender.count(DISCOVERY), sender.count(JWKS))


# --- age ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age", "fetches"),
    [(REFRESH_S - 1, 0), (REFRESH_S, 1), (TTL_S - 1, 1)],
    ids=["fresh", "KEY-14-refresh", "KEY-14-last-second"],
)
def test_a_set_is_refreshed_in_the_background_before_it_is_old(age: float, fetches: int) -> None:
    background = Background()
    it = Source({JWKS: [served(OLD), served(NEW)]}, submit=background)
    it.refusal(lambda: it.keys(within=0.02))
    background.run()
    it.clock.advance(age)

    # Nobody waits, not even on the loop, and there is one fetch for all.
    assert [OLD_KIDS] * 10 == [kids(it.keys(within=None)) for _ in range(10)]
    assert fetches == background.run()
    assert (NEW_KIDS if fetches else OLD_KIDS) == kids(it.keys(within=None))


@pytest.mark.parametrize("age", [TTL_S, TTL_S + 1, STALE_S - 1, STALE_S, STALE_S * 100])
def test_key_11_a_removed_key_is_not_trusted_beyond_its_time_because_nobody_asked(age: float) -> None:
    it = Source({JWKS: [served(OLD), served(NEW)]})
    it.keys()
    it.clock.advance(age)

    assert NEW_KIDS == kids(it.keys())
    assert 2 == it.sender.count()


def test_key_11_an_old_set_sends_the_loop_to_the_pool() -> None:
    background = Background()
    it = Source({JWKS: [served(OLD), served(NEW)]}, submit=background)
    it.refusal(lambda: it.keys(within=0.02))
    background.run()
    it.clock.advance(TTL_S)

    with pytest.raises(NotInMemoryError):
        it.keys(within=None)
    assert 1 == background.run()
    assert NEW_KIDS == kids(it.keys(within=None))


def test_key_11_fault_35_a_removed_key_is_gone_with_the_next_refresh() -> None:
    it = Source({JWKS: [served(OLD, "RS256", "ES256"), served(OLD, "ES256")]})
    removed = next(key.fingerprint for key in it.keys().keys if key.kid == "old-RS256")

    it.clock.advance(REFRESH_S)
    it.keys()

    assert not it.keys().holds(removed)


def test_fault_31_an_issuer_that_is_down_is_not_noticed_while_its_keys_are_fresh() -> None:
    it = Source({JWKS: [served(OLD), DOWN]})
    it.keys()
    it.clock.advance(REFRESH_S - 1)

    assert OLD_KIDS == kids(it.keys(within=None))
    assert 1 == it.sender.count()


def test_key_15_fault_32_keys_are_used_beyond_their_time_while_the_issuer_is_down() -> None:
    it = Source({JWKS: [served(OLD), DOWN]})
    it.keys()

    for _ in range(int((STALE_S - 1) / 50)):
        it.clock.advance(50)
        assert OLD_KIDS == kids(it.keys())
    # Once the issuer is known to be down, the loop does not wait either.
    assert OLD_KIDS == kids(it.keys(within=None))


def test_key_15_nobody_waits_for_a_refresh_while_the_issuer_is_in_trouble() -> None:
    background = Background()
    it = Source({JWKS: [served(OLD), DOWN]}, submit=background)
    it.refusal(lambda: it.keys(within=0.02))
    background.run()
    it.clock.advance(TTL_S - RETRY_S)
    it.keys(within=None)
    background.run()
    it.clock.advance(RETRY_S)

    # The next attempt is under way and nothing runs it: whoever waited would hang.
    assert OLD_KIDS == kids(it.keys(within=None))
    assert "connect_failed" == it.refusal(lambda: it.newer(within=None)).reason
    assert 1 == background.run()


def test_fault_33_keys_are_not_used_beyond_the_stale_bound() -> None:
    it = Source({JWKS: [served(OLD), DOWN]})
    it.keys()
    it.clock.advance(STALE_S - 1)
    assert OLD_KIDS == kids(it.keys())
    it.clock.advance(1)

    for within in (5.0, None):
        error = it.refusal(partial(it.keys, within=within))
        assert (503, "connect_failed", {"host": "idp.test"}) == (error.status, error.reason, error.facts)


def test_fault_32_res_20_keys_come_back_with_the_issuer() -> None:
    it = Source({JWKS: [served(OLD), DOWN, DOWN, served(NEW)]})
    it.keys()
    it.clock.advance(TTL_S)
    it.keys()
    for _ in range(2):
        it.clock.advance(RETRY_S)
        it.keys()

    assert NEW_KIDS == kids(it.keys(within=None))


def test_res_02_a_slow_issuer_delays_callers_by_their_patience_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(key_source, "PATIENCE_S", 0.05)
    background = Background()
    it = Source({JWKS: [served(OLD), served(NEW)]}, submit=background)
    it.refusal(lambda: it.keys(within=0.02))
    background.run()
    it.clock.advance(TTL_S)

    assert OLD_KIDS == kids(it.keys())
    # FAULT-39: whoever comes while the fetch takes its time does not wait at all.
    it.clock.advance(0.05)
    assert OLD_KIDS == kids(it.keys(within=None))
    assert 1 == background.run()
    assert NEW_KIDS == kids(it.keys(within=None))


def test_fault_39_a_slow_refresh_delays_nobody() -> None:
    sender = FakeSender({JWKS: [served(OLD), served(NEW)]})
    clock = FakeClock()
    source = IssuerKeySource(sender, clock)
    source.keys(PLAIN, deadline=clock.monotonic() + PATIENCE_S)
    clock.advance(REFRESH_S)

    with sender.held() as hold:
        assert [OLD_KIDS] * 10 == [kids(source.keys(PLAIN, deadline=None)) for _ in range(10)]
        assert hold.entered.wait(PATIENCE_S)
        assert 2 == sender.count()


def test_fault_50_to_53_the_wall_clock_says_nothing_about_age() -> None:
    it = Source()
    it.keys()
    for step in (600, -1200, 10**10, -(10**10)):
        it.clock.step_wall(step)
        assert OLD_KIDS == kids(it.keys(within=None))

    assert 1 == it.sender.count()


# --- an unknown key -------------------------------------------------------------------


def test_key_10_fault_34_a_new_key_is_found_by_one_fetch() -> None:
    it = Source({JWKS: [served(OLD), served(NEW)]})
    it.keys()
    it.clock.advance(JUST_FETCHED_S)

    assert NEW_KIDS == kids(it.newer())
    assert NEW_KIDS == kids(it.keys())
    assert 2 == it.sender.count()


def test_key_10_fault_34_callers_that_came_meanwhile_get_the_new_set_too() -> None:
    sender = FakeSender({JWKS: [served(OLD), served(NEW)]})
    clock = SystemClock()
    source = IssuerKeySource(sender, clock)
    source.keys(PLAIN, deadline=clock.monotonic() + PATIENCE_S)
    record = source._records[PLAIN]
    assert record.fetched is not None
    # As if it had been fetched a while ago.
    record.fetched = type(record.fetched)(record.fetched.jwks, clock.monotonic() - 10, clock.monotonic() - 10)

    with sender.held() as hold:
        threading.Thread(target=hold.release_first, daemon=True).start()
        found = run_in_threads(
            lambda: kids(source.newer_keys(PLAIN, deadline=clock.monotonic() + PATIENCE_S)), 20
        )

    assert [NEW_KIDS] * 20 == found
    assert 2 == sender.count()


def test_a_set_that_came_while_the_token_was_judged_by_the_one_before_is_handed_out() -> None:
    it = Source({JWKS: [served(OLD), served(NEW)]})
    it.keys()
    it.clock.advance(JUST_FETCHED_S)
    it.newer()
    it.clock.advance(JUST_FETCHED_S / 2)

    assert NEW_KIDS == kids(it.newer(within=None))
    assert 2 == it.sender.count()


def test_key_12_fault_37_a_spray_of_unknown_keys_costs_one_fetch_for_each_cool_down() -> None:
    it = Source()
    it.keys()
    it.clock.advance(JUST_FETCHED_S)

    assert OLD_KIDS == kids(it.newer())
    it.clock.advance(JUST_FETCHED_S)
    for _ in range(5000):
        assert it.newer() is None
        assert it.newer(within=None) is None
    assert 2 == it.sender.count()

    it.clock.advance(COOL_DOWN_S - JUST_FETCHED_S)
    it.newer()
    assert 3 == it.sender.count()


@pytest.mark.parametrize(
    ("wait", "fetches"),
    [(COOL_DOWN_S - 0.001, 2), (COOL_DOWN_S, 3)],
    ids=["KEY-12-just-before", "KEY-12-over"],
)
def test_the_cool_down_counts_from_the_attempt(wait: float, fetches: int) -> None:
    it = Source()
    it.keys()
    it.clock.advance(JUST_FETCHED_S)
    it.newer()
    it.clock.advance(wait)
    it.newer()

    assert fetches == it.sender.count()


def test_fault_36_a_key_that_is_published_late_is_found_after_the_cool_down() -> None:
    it = Source({JWKS: [served(OLD), served(OLD), served(NEW)]})
    it.keys()
    it.clock.advance(JUST_FETCHED_S)
    assert OLD_KIDS == kids(it.newer())
    it.clock.advance(COOL_DOWN_S - 1)
    assert it.newer() is None
    it.clock.advance(1)

    assert NEW_KIDS == kids(it.newer())


def test_key_13_fault_38_a_spray_while_the_fetch_fails_costs_one_fetch_for_each_cool_down() -> None:
    it = Source({JWKS: [served(OLD), DOWN]})
    it.keys()
    it.clock.advance(JUST_FETCHED_S)

    for _ in range(1000):
        for within in (5.0, None):
            error = it.refusal(partial(it.newer, within=within))
            # Not 401: the key may exist.
            assert (IssuerUnavailableError, "connect_failed") == (type(error), error.reason)
        assert OLD_KIDS == kids(it.keys(within=None))
    assert 2 == it.sender.count()

    it.clock.advance(COOL_DOWN_S)
    it.refusal(it.newer)
    assert 3 == it.sender.count()


def test_an_unknown_key_on_the_loop_goes_to_the_pool_where_a_fetch_is_due() -> None:
    background = Background()
    it = Source({JWKS: [served(OLD), served(NEW)]}, submit=background)
    it.refusal(lambda: it.keys(within=0.02))
    background.run()
    it.clock.advance(JUST_FETCHED_S)

    for _ in range(5):
        with pytest.raises(NotInMemoryError):
            it.newer(within=None)
    assert 1 == background.run()
    assert NEW_KIDS == kids(it.newer(within=None))


def test_an_unknown_key_waits_no_longer_than_its_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_source, "PATIENCE_S", 0.05)
    background = Background()
    it = Source({JWKS: [served(OLD), served(NEW)]}, submit=background)
    it.refusal(lambda: it.keys(within=0.02))
    background.run()
    it.clock.advance(JUST_FETCHED_S)

    assert "keys_pending" == it.refusal(it.newer).reason
    it.clock.advance(0.05)
    # A spray at a slow issuer must not fill the pool: the answer comes from memory.
    assert "keys_pending" == it.refusal(lambda: it.newer(within=None)).reason
    assert 1 == len(background.waiting)


# --- trouble --------------------------------------------------------------------------


def test_key_17_fault_30_res_20_without_keys_nothing_is_trusted() -> None:
    it = Source({JWKS: DOWN})

    error = it.refusal(it.keys)

    assert (IssuerUnavailableError, 503, "connect_failed", {"host": "idp.test"}) == (
        type(error),
        error.status,
        error.reason,
        error.facts,
    )


def test_fault_30_nobody_waits_for_an_issuer_in_trouble() -> None:
    background = Background()
    it = Source({JWKS: [DOWN, DOWN, served(OLD)]}, submit=background)
    it.refusal(lambda: it.keys(within=0.02))
    background.run()

    # Each of these would hang if it waited: nothing runs the fetches.
    for _ in range(100):
        for within in (5.0, None):
            assert "connect_failed" == it.refusal(partial(it.keys, within=within)).reason
    assert 0 == len(background.waiting)

    it.clock.advance(RETRY_S)
    for _ in range(100):
        it.refusal(lambda: it.keys(within=None))
    assert 1 == background.run()

    it.clock.advance(RETRY_S)
    it.refusal(lambda: it.keys(within=None))
    assert 1 == background.run()
    assert OLD_KIDS == kids(it.keys(within=None))


NO_THREAD, NO_TIME = RuntimeError("can't start new thread"), DeadlineError(reason="deadline")


@pytest.mark.parametrize("failure", [NO_THREAD, NO_TIME, DOWN], ids=["FAULT-116-thread", "deadline", "down"])
def test_res_20_a_start_that_stumbles_once_is_soon_right(failure: BaseException) -> None:
    stumbled = False

    def submit(fetch: Callable[[], None]) -> None:
        nonlocal stumbled
        if failure is NO_THREAD and not stumbled:
            stumbled = True
            raise failure
        fetch()

    answers = [served(OLD)] if failure is NO_THREAD else [failure, served(OLD)]
    it = Source({JWKS: answers}, submit=submit)
    it.refusal(it.keys)

    it.clock.advance(FIRST_RETRY_S)
    # Who finds out is refused; who comes next is not.
    it.refusal(it.keys)
    assert OLD_KIDS == kids(it.keys(within=None))


def test_fault_30_an_issuer_that_is_down_at_the_start_is_soon_asked_once_a_second_only() -> None:
    it = Source({JWKS: DOWN})
    asked = []
    # In steps of a binary fraction, so that no wait is missed by a rounding.
    for step in range(64 * 10):
        before = it.sender.count()
        for within in (5.0, None):
            it.refusal(partial(it.keys, within=within))
        if it.sender.count() != before:
            asked.append(step / 64)
        it.clock.advance(1 / 64)

    assert 13 == len(asked) == it.sender.count()
    pauses = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert [0.1, 0.2, 0.4, 0.8] == pytest.approx(pauses[:4], abs=1 / 64)
    assert {RETRY_S} == set(pauses[4:])


def test_res_20_once_there_were_keys_each_failure_costs_a_second() -> None:
    it = Source({JWKS: [DOWN, served(OLD), DOWN]})
    it.refusal(it.keys)
    it.clock.advance(FIRST_RETRY_S)
    it.refusal(it.keys)
    it.clock.advance(STALE_S)
    it.refusal(it.keys)
    asked = it.sender.count()

    it.clock.advance(RETRY_S / 2)
    it.refusal(it.keys)
    assert asked == it.sender.count()


def test_an_old_failure_says_nothing_about_now() -> None:
    it = Source({JWKS: [DOWN, served(OLD)]})
    it.refusal(it.keys)
    it.clock.advance(TROUBLE_S)

    with pytest.raises(NotInMemoryError):
        it.keys(within=None)
    assert OLD_KIDS == kids(it.keys())


def test_key_16_fault_40_one_issuers_trouble_is_not_anothers() -> None:
    other = IssuerEndpoints(issuer="https://b.test", discovery_url=None, jwks_uri="https://b.test/keys")
    broken = [
        IssuerEndpoints(issuer=f"https://{n}.test", discovery_url=None, jwks_uri=f"https://{n}.test/keys")
        for n in range(40)
    ]
    hold = threading.Event()

    def hang(_: HttpRequest) -> HttpResponse:
        assert hold.wait(PATIENCE_S)
        raise DOWN

    sender = FakeSender({"https://b.test/keys": served(NEW), **{b.jwks_uri or "": hang for b in broken}})
    clock = SystemClock()
    source = IssuerKeySource(sender, clock)
    try:
        for endpoints in broken:
            with pytest.raises(DeadlineError):
                source.keys(endpoints, deadline=clock.monotonic())

        assert NEW_KIDS == kids(source.keys(other, deadline=clock.monotonic() + PATIENCE_S))
    finally:
        hold.set()


def test_key_16_failures_are_kept_apart() -> None:
    other = IssuerEndpoints(issuer="https://b.test", discovery_url=None, jwks_uri="https://b.test/keys")
    it = Source({JWKS: DOWN, "https://b.test/keys": served(NEW)})

    it.refusal(it.keys)

    assert NEW_KIDS == kids(it.keys(other))
    it.refusal(it.keys)


def test_key_33_the_same_key_id_at_two_issuers_is_two_keys() -> None:
    twin = SigningKey("old-RS256", "RS256", private_key("RS256", "twin"))
    other = IssuerEndpoints(issuer="https://b.test", discovery_url=None, jwks_uri="https://b.test/keys")
    body = to_json({"keys": [twin.jwk()]})
    it = Source({JWKS: served(OLD), "https://b.test/keys": HttpResponse(status=200, body=body)})

    ours, theirs = it.keys().keys[0], it.keys(other).keys[0]

    assert ours.kid == theirs.kid
    assert ours.fingerprint != theirs.fingerprint


BAD_SETS: dict[str, Answer] = {
    "FAULT-41-html": HttpResponse(status=200, headers={"content-type": "text/html"}, body=b"<html>"),
    "FAULT-41-empty": HttpResponse(status=200, body=b'{"keys":[]}'),
    "FAULT-41-too-long": NonConformingResponseError(reason="response_too_long"),
    "FAULT-41-error": HttpResponse(status=500, body=OLD.jwks()),
    "KEY-05-redirect": HttpResponse(status=302, headers={"location": "https://evil.test"}, body=OLD.jwks()),
    "KEY-06-encoded": NonConformingResponseError(reason="response_encoded"),
    "KEY-06-drip": DeadlineError(reason="deadline"),
    "FAULT-42-symmetric": HttpResponse(status=200, body=b'{"keys":[{"kty":"oct","k":"c2VjcmV0"}]}'),
    "FAULT-42-private": HttpResponse(status=200, body=to_json({"keys": [OLD.keys["RS256"].jwk(d="AQAB")]})),
    "KEY-20-list": HttpResponse(status=200, body=b"[]"),
    "KEY-20-null": HttpResponse(status=200, body=b"null"),
    "KEY-20-bug": RecursionError("too deep"),
    "KEY-20-exit": SystemExit(1),
}


@pytest.mark.parametrize("bad", BAD_SETS.values(), ids=BAD_SETS.keys())
def test_a_bad_set_is_an_outage_and_the_good_one_is_kept(bad: Answer) -> None:
    it = Source({JWKS: [served(OLD), bad]})
    it.keys()
    it.clock.advance(TTL_S)

    assert OLD_KIDS == kids(it.keys())
    it.clock.advance(STALE_S)
    error = it.refusal(it.keys)
    assert (IssuerUnavailableError, 503) == (type(error), error.status)


def test_after_a_bug_the_next_fetch_runs() -> None:
    it = Source({JWKS: [RecursionError("too deep"), served(OLD)]})
    assert "keys_fetch_bug" == it.refusal(it.keys).reason
    it.clock.advance(TROUBLE_S)

    assert OLD_KIDS == kids(it.keys())


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()], ids=repr)
def test_fault_116_no_thread_for_a_fetch_is_an_outage_that_passes(error: Exception) -> None:
    threads_left = False

    def submit(fetch: Callable[[], None]) -> None:
        if not threads_left:
            raise error
        fetch()

    it = Source(submit=submit)
    assert "keys_no_thread" == it.refusal(it.keys).reason
    threads_left = True
    it.clock.advance(TROUBLE_S)

    assert OLD_KIDS == kids(it.keys())


def test_every_caller_gets_an_error_of_its_own() -> None:
    it = Source({JWKS: DOWN})

    errors = [it.refusal(it.keys) for _ in range(3)]
    assert 3 == len({id(error) for error in errors})
    assert all(error is not DOWN for error in errors)


def test_fault_11_the_log_says_what_is_wrong_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    refused = IssuerUnavailableError(reason="tls_refused", facts={"tls": "certificate has expired"})
    it = Source({JWKS: [DOWN, *[refused] * 1000]})

    for _ in range(50):
        it.refusal(it.keys)
        it.clock.advance(RETRY_S)
    said = [record.getMessage() for record in caplog.records]
    assert 2 == len(said)
    assert "connect_failed" in said[0]
    assert "certificate has expired" in said[1]

    it.clock.advance(60)
    it.refusal(it.keys)
    assert 3 == len(caplog.records)


def test_key_21_keys_that_are_not_used_are_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    it = Source(
        {JWKS: HttpResponse(status=200, body=OLD.jwks("RS256", extra=({"kty": "oct", "k": "mark"},)))}
    )

    assert OLD_KIDS == kids(it.keys())
    assert "symmetric" in caplog.text
    assert "mark" not in caplog.text


# --- discovery ------------------------------------------------------------------------


def test_rfc_8414_is_asked_where_openid_discovery_is_not_found() -> None:
    it = Source({DISCOVERY: HttpResponse(status=404), OAUTH_DISCOVERY: metadata(), JWKS: served(OLD)})

    assert (OLD_KIDS, TOKEN) == (kids(it.keys(DISCOVERED)), it.token_endpoint())
    assert [DISCOVERY, OAUTH_DISCOVERY, JWKS] == [request.url for request in it.sender.requests]


@pytest.mark.parametrize("status", [200, 301, 400, 401, 403, 500, 503])
def test_rfc_8414_is_not_asked_for_any_other_reason(status: int) -> None:
    it = Source({DISCOVERY: HttpResponse(status=status, body=b"{}")})

    it.refusal(lambda: it.keys(DISCOVERED))

    assert [DISCOVERY] == [request.url for request in it.sender.requests]


def test_rfc_8414_is_not_asked_where_the_address_was_given() -> None:
    given = "https://idp.test/.well-known/oauth-authorization-server/realms/a"
    it = Source({given: HttpResponse(status=404)})

    error = it.refusal(lambda: it.keys(IssuerEndpoints(issuer=ISSUER, discovery_url=given)))

    assert ("metadata_status", {"http_status": 404}, 1) == (error.reason, error.facts, it.sender.count())


REFUSED_DOCUMENTS: dict[str, tuple[HttpResponse, str]] = {
    "KEY-01-issuer": (metadata(issuer="https://evil.test"), "metadata_issuer_differs"),
    "KEY-03-http": (metadata(jwks_uri="http://idp.test/keys"), "metadata_endpoint"),
    "KEY-03-file": (metadata(jwks_uri="file:///etc/passwd"), "metadata_endpoint"),
    "KEY-03-link-local": (metadata(jwks_uri="https://169.254.169.254/"), "jwks_uri_foreign_host"),
    "KEY-03-absent": (metadata(jwks_uri=None), "jwks_uri_unknown"),
    "KEY-20-html": (HttpResponse(status=200, body=b"<html>"), "metadata_malformed"),
}


@pytest.mark.parametrize(("answer", "reason"), REFUSED_DOCUMENTS.values(), ids=REFUSED_DOCUMENTS.keys())
def test_a_refused_document_sends_us_nowhere(answer: HttpResponse, reason: str) -> None:
    it = Source({DISCOVERY: answer})

    error = it.refusal(lambda: it.keys(DISCOVERED))

    assert (503, reason, 1) == (error.status, error.reason, it.sender.count())


def test_keys_may_be_on_another_host() -> None:
    it = Source(
        {DISCOVERY: metadata(jwks_uri="https://keys.test/certs"), "https://keys.test/certs": served(NEW)}
    )

    assert NEW_KIDS == kids(it.keys(DISCOVERED))


def test_key_04_a_token_endpoint_on_another_host_is_not_used_and_keys_are() -> None:
    it = Source({DISCOVERY: metadata(token_endpoint="https://evil.test/token"), JWKS: served(OLD)})

    assert OLD_KIDS == kids(it.keys(DISCOVERED))
    error = it.refusal(it.token_endpoint)
    assert (503, "token_endpoint_foreign_host", {"iss": ISSUER}) == (error.status, error.reason, error.facts)


def test_a_document_without_a_token_endpoint() -> None:
    it = Source({DISCOVERY: metadata(token_endpoint=None), JWKS: served(OLD)})
    it.keys(DISCOVERED)

    assert "token_endpoint_not_discovered" == it.refusal(lambda: it.token_endpoint(within=None)).reason


def test_key_04_a_document_that_turns_bad_does_not_move_the_token_endpoint_of_before() -> None:
    it = Source(
        {
            DISCOVERY: [
                metadata(),
                metadata(issuer="https://evil.test", token_endpoint="https://idp.test/evil"),
            ],
            JWKS: served(OLD),
        }
    )
    it.keys(DISCOVERED)
    it.clock.advance(REFRESH_S)
    it.keys(DISCOVERED)

    assert TOKEN == it.token_endpoint(within=None)


def test_fault_43_a_document_that_turns_bad_is_refused_and_keys_come_from_where_they_were() -> None:
    it = Source(
        {
            DISCOVERY: [metadata(), metadata(issuer="https://evil.test", jwks_uri="https://evil.test/keys")],
            JWKS: [served(OLD), served(NEW)],
        }
    )
    it.keys(DISCOVERED)
    it.clock.advance(REFRESH_S)
    it.keys(DISCOVERED)

    assert NEW_KIDS == kids(it.keys(DISCOVERED, within=None))
    assert {DISCOVERY, JWKS} == {request.url for request in it.sender.requests}


def test_fault_43_the_address_of_the_keys_is_believed_no_longer_than_keys_are() -> None:
    it = Source({DISCOVERY: [metadata(), metadata(issuer="https://evil.test")], JWKS: served(OLD)})
    it.keys(DISCOVERED)
    while it.clock.monotonic() < 1_000 + STALE_S - REFRESH_S:
        it.clock.advance(REFRESH_S)
        it.keys(DISCOVERED)
    asked = it.sender.count(JWKS)

    it.clock.advance(STALE_S)

    error = it.refusal(lambda: it.keys(DISCOVERED))
    assert (503, "metadata_issuer_differs") == (error.status, error.reason)
    assert asked == it.sender.count(JWKS)


def test_configured_keys_do_not_depend_on_the_metadata() -> None:
    it = Source({DISCOVERY: DOWN, JWKS: served(OLD)})
    endpoints = IssuerEndpoints(issuer=ISSUER, discovery_url=DISCOVERY, jwks_uri=JWKS)

    assert OLD_KIDS == kids(it.keys(endpoints))
    assert "connect_failed" == it.refusal(lambda: it.token_endpoint(endpoints)).reason


def test_a_token_endpoint_that_could_not_be_found_is_looked_for_again() -> None:
    it = Source({DISCOVERY: [DOWN, metadata()], JWKS: served(OLD)})
    it.refusal(it.token_endpoint)
    it.clock.advance(RETRY_S)
    it.refusal(it.token_endpoint)

    assert TOKEN == it.token_endpoint(within=None)


def test_an_issuer_without_any_address_has_no_keys() -> None:
    it = Source()

    error = it.refusal(lambda: it.keys(IssuerEndpoints(issuer=ISSUER, discovery_url=None)))

    assert ("jwks_uri_unknown", 0) == (error.reason, it.sender.count())


@pytest.mark.parametrize("allow_http", [False, True], ids=["KEY-07-refused", "KEY-07-allowed"])
def test_plain_http_is_not_asked_without_the_switch(allow_http: bool) -> None:
    it = Source({"http://idp.test/keys": served(OLD)}, allow_http=allow_http)
    endpoints = IssuerEndpoints(issuer=ISSUER, discovery_url=None, jwks_uri="http://idp.test/keys")

    if allow_http:
        assert OLD_KIDS == kids(it.keys(endpoints))
    else:
        assert ("endpoint_not_https", 0) == (it.refusal(lambda: it.keys(endpoints)).reason, it.sender.count())


def test_res_09_no_more_than_a_bound_of_threads_wait_for_one_issuers_keys() -> None:
    background = Background()
    source = IssuerKeySource(FakeSender({JWKS: served(OLD)}), FakeClock(), submit=background)
    record = source._record(PLAIN)
    record.waiting = MAX_WAITING

    # On the loop and in a thread alike: an answer at once, and no thread is asked for.
    for deadline in (None, 2000.0):
        with pytest.raises(IssuerUnavailableError):
            source.keys(PLAIN, deadline=deadline)

    record.waiting = MAX_WAITING - 1
    with pytest.raises(NotInMemoryError):
        source.keys(PLAIN, deadline=None)


def test_res_09_threads_that_wait_for_keys_are_counted_and_all_get_them() -> None:
    background = Background()
    source = IssuerKeySource(FakeSender({JWKS: served(OLD)}), SystemClock(), submit=background)
    record = source._record(PLAIN)
    got: list[list[str | None]] = []

    def ask() -> None:
        got.append(kids(source.keys(PLAIN, deadline=source._clock.monotonic() + 10)))

    threads = [threading.Thread(target=ask) for _ in range(MAX_WAITING)]
    for thread in threads:
        thread.start()
    assert eventually(lambda: record.waiting == MAX_WAITING)

    # One more is answered at once: nothing is fetched before `run`, so waiting would take its 10 s.
    with pytest.raises(IssuerUnavailableError):
        source.keys(PLAIN, deadline=source._clock.monotonic() + 10)
    assert background.run() == 1
    for thread in threads:
        thread.join(10)

    assert [OLD_KIDS] * MAX_WAITING == got
    assert record.waiting == 0


def test_fetches_are_timed_by_their_result() -> None:
    clock, metrics = FakeClock(), FakeMetrics()

    def slow(_: HttpRequest) -> HttpResponse:
        clock.advance(0.5)
        return served(OLD)

    sender = FakeSender({JWKS: [slow, IssuerUnavailableError(reason="connect_failed")]})
    source = IssuerKeySource(sender, clock, submit=lambda fetch: fetch(), metrics=metrics)
    source.keys(PLAIN, deadline=clock.monotonic() + 5)
    assert [("key_fetch_seconds", 0.5, {"result": "fetched"})] == metrics.times

    clock.advance(REFRESH_S)
    source.keys(PLAIN, deadline=clock.monotonic() + 5)
    assert ("key_fetch_seconds", 0.0, {"result": "failed"}) == metrics.times[-1]

"""
Keys and endpoints of configured issuers: fetched, kept, refreshed.

One record an issuer, with its own lock, its own times and a thread of its own for each fetch,
so that one issuer's trouble never delays another's tokens. By the age of its key set:

    under REFRESH_S    used
    under TTL_S        used, while a fetch runs in the background
    under STALE_S      used where the fetch that is due has failed or takes long
    above, or none     a fetch must succeed first

While an issuer is in trouble nobody waits for it: one attempt a second in the background finds
out when it is back, and a few more at first where nothing has been fetched yet. A fetch for an
unknown key happens at most once per `COOL_DOWN_S`, counted from the attempt, so that failures
count too.

Source: docs/adr/0004-keys.md; docs/threats.md KEY-10 to KEY-17.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field

from kong_token_exchange.core.jwk import MAX_SET_BYTES, JwkSet, parse_jwk_set
from kong_token_exchange.errors import DeadlineError, Fact, IssuerUnavailableError, TokenExchangeError
from kong_token_exchange.ports import Clock, HttpSender, IssuerEndpoints, Metrics, NotInMemoryError
from kong_token_exchange.protocol.http_message import HttpRequest, HttpResponse
from kong_token_exchange.protocol.metadata import (
    MAX_METADATA_BYTES,
    IssuerMetadata,
    is_acceptable_endpoint,
    oauth_metadata_url,
    process_metadata,
)

# A removed key is trusted this long at most while the issuer can be reached (KEY-11); providers
# rotate with overlaps of hours.
TTL_S = 300.0
REFRESH_S = 240.0
STALE_S = 3600.0
COOL_DOWN_S = 30.0

# A fetch keeps to its own deadline: one impatient caller does not cancel it for the others. Shorter
# than a request's 5 s, so that a caller who waits learns of it.
FETCH_DEADLINE_S = 4.0
# How long callers wait for a fetch that a set in memory makes optional: a slow issuer must not fill
# the thread pool with those who could be answered without it.
PATIENCE_S = 1.0
# Half of the plugin server's threads (64) may wait for the keys of one issuer: anybody can make up a
# key id, without any token, and a start under load needs more than a few.
MAX_WAITING = 32
# A set this young is as good as a newer one: fetching again shows nothing new.
JUST_FETCHED_S = 1.0
# After a failed fetch the next one waits: an issuer that is down is not asked for each request.
RETRY_S = 1.0
# While there is nothing in memory yet, the wait begins here and doubles up to `RETRY_S`: a start that
# stumbled once, on a machine that is busy with it, must not cost a second more.
FIRST_RETRY_S = 0.1
# A failure this young stands for the issuer's state. Requests renew it once a second.
TROUBLE_S = 30.0

# One line a minute says what is wrong; the counters say how often.
_LOG_INTERVAL_S = 60.0

_log = logging.getLogger("kong_token_exchange.keys")


@dataclass(frozen=True, slots=True)
class _Fetched:
    """A key set, when its fetch began and when it ended; never changed, so readers need no lock."""

    jwks: JwkSet
    began_at: float
    ended_at: float


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why the last fetch failed, and when; not the error itself, which holds on to its frames."""

    reason: str
    facts: Mapping[str, Fact]
    at: float


@dataclass(frozen=True, slots=True)
class _Flight:
    """A fetch under way."""

    began_at: float
    landed: Future[None] = field(default_factory=Future)


@dataclass(slots=True)
class _Record:
    endpoints: IssuerEndpoints
    lock: threading.Lock = field(default_factory=threading.Lock)
    fetched: _Fetched | None = None
    metadata: IssuerMetadata | None = None
    metadata_at: float = float("-inf")
    unknown_key_at: float = float("-inf")
    failure: _Failure | None = None
    # Whether any fetch has succeeded yet, and how many failed before.
    started: bool = False
    false_starts: int = 0
    flight: _Flight | None = None
    waiting: int = 0
    logged: tuple[str, float] = ("", float("-inf"))

    def in_trouble(self, now: float) -> bool:
        """Tell whether the last fetch failed, and not long ago."""
        failure = self.failure
        return failure is not None and now - failure.at < TROUBLE_S

    def must_rest(self, now: float) -> bool:
        """Tell whether a fetch has failed a moment ago, so that the next one waits."""
        failure = self.failure
        if failure is None:
            return False
        rest_s = RETRY_S
        if not self.started:
            rest_s = min(RETRY_S, FIRST_RETRY_S * 2 ** min(self.false_starts - 1, 8))
        return now - failure.at < rest_s

    def unavailable(self) -> IssuerUnavailableError:
        """Make the error anew: one instance raised again and again would collect tracebacks."""
        failure = self.failure
        if failure is None:
            return IssuerUnavailableError(reason="keys_pending")
        return IssuerUnavailableError(reason=failure.reason, facts=failure.facts)


class IssuerKeySource:
    """
    Implements `ports.KeySource` over an `HttpSender`.

    Args:
        sender: Fetches documents and sets; already bound to its TLS settings.
        clock: Times everything by its monotonic side.
        allow_http: Whether plain http beyond loopback is allowed (`insecure_allow_http`).
        submit: Runs a fetch in the background; a thread for each by default. There are never
            more than one for each configured issuer.
        metrics: Counts and times fetches, by result.
    """

    def __init__(
        self,
        sender: HttpSender,
        clock: Clock,
        *,
        allow_http: bool = False,
        submit: Callable[[Callable[[], None]], object] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._sender = sender
        self._clock = clock
        self._allow_http = allow_http
        self._records: dict[IssuerEndpoints, _Record] = {}
        self._records_lock = threading.Lock()
        self._submit = submit or _start_thread
        self._metrics = metrics
        self._generations = itertools.count(1)
        self.generation = 0

    def keys(self, endpoints: IssuerEndpoints, *, deadline: float | None) -> JwkSet:
        """Return the issuer's keys, from memory where their age allows it."""
        record = self._record(endpoints)
        now = self._clock.monotonic()
        fetched = record.fetched
        age = now - fetched.began_at if fetched is not None else STALE_S
        if fetched is None or age >= STALE_S:
            return self._first_keys(record, now, deadline)
        if age < REFRESH_S:
            return fetched.jwks
        flight = self._start(record, now)
        if age >= TTL_S and flight is not None and not record.in_trouble(now):
            self._wait(record, flight, now, deadline)
        newer = record.fetched
        return (newer or fetched).jwks

    def newer_keys(self, endpoints: IssuerEndpoints, *, deadline: float | None) -> JwkSet | None:
        """Fetch the keys anew for a key that is not among them, at most once per cool-down."""
        record = self._record(endpoints)
        now = self._clock.monotonic()
        before = record.fetched
        if before is not None and now - before.ended_at < JUST_FETCHED_S:
            # It may have come while the caller judged the token by the one before.
            return before.jwks
        flight = self._start_for_unknown_key(record, now)
        if flight is not None and not record.in_trouble(now):
            self._wait(record, flight, now, deadline)
        if record.fetched is not None and record.fetched is not before:
            return record.fetched.jwks
        if flight is not None or record.in_trouble(now):
            # The key may exist: whoever holds it must not be told that the token is bad (FAULT-38).
            raise record.unavailable()
        return None

    def settled_until(self, endpoints: IssuerEndpoints) -> float:
        """Return when the set in memory is due: for a refresh, and once a second while that fails."""
        fetched = self._record(endpoints).fetched
        now = self._clock.monotonic()
        if fetched is None:
            return now
        refresh_at, stale_at = fetched.began_at + REFRESH_S, fetched.began_at + STALE_S
        return refresh_at if now < refresh_at else min(now + RETRY_S, stale_at)

    def token_endpoint(self, endpoints: IssuerEndpoints, *, deadline: float | None) -> str:
        """Return the configured or discovered token endpoint."""
        if endpoints.token_endpoint is not None:
            return endpoints.token_endpoint
        record = self._record(endpoints)
        if record.metadata is None:
            self._await_first(record, self._clock.monotonic(), deadline)
        metadata = record.metadata
        if metadata is None:
            raise record.unavailable()
        if metadata.token_endpoint is None:
            foreign = metadata.token_endpoint_foreign
            reason = "token_endpoint_foreign_host" if foreign else "token_endpoint_not_discovered"
            raise IssuerUnavailableError(reason=reason, facts={"iss": endpoints.issuer})
        return metadata.token_endpoint

    # --- waiting ----------------------------------------------------------------------

    def _record(self, endpoints: IssuerEndpoints) -> _Record:
        record = self._records.get(endpoints)
        if record is None:
            with self._records_lock:
                record = self._records.setdefault(endpoints, _Record(endpoints))
        return record

    def _first_keys(self, record: _Record, now: float, deadline: float | None) -> JwkSet:
        self._await_first(record, now, deadline)
        fetched = record.fetched
        if fetched is None or self._clock.monotonic() - fetched.began_at >= STALE_S:
            raise record.unavailable()
        return fetched.jwks

    def _await_first(self, record: _Record, now: float, deadline: float | None) -> None:
        """Wait for what there is nothing in memory for, unless the issuer is in trouble."""
        if record.in_trouble(now):
            # Failing at once keeps an outage from filling the thread pool.
            self._start(record, now)
            raise record.unavailable()
        if record.waiting >= MAX_WAITING:
            raise record.unavailable()
        if deadline is None:
            raise NotInMemoryError
        flight = self._start(record, now)
        try:
            if flight is not None:
                self._wait_among_others(record, flight, deadline)
        except FutureTimeoutError:
            raise DeadlineError(reason="deadline_keys", facts={"iss": record.endpoints.issuer}) from None

    def _wait(self, record: _Record, flight: _Flight, now: float, deadline: float | None) -> None:
        """Wait for a fetch that is optional, no longer than `PATIENCE_S` from its start."""
        if flight.landed.done():
            return
        until = flight.began_at + PATIENCE_S
        if now >= until or record.waiting >= MAX_WAITING:
            return
        if deadline is None:
            raise NotInMemoryError
        try:
            self._wait_among_others(record, flight, min(until, deadline))
        except FutureTimeoutError:
            return

    def _wait_among_others(self, record: _Record, flight: _Flight, until: float) -> None:
        with record.lock:
            crowded = record.waiting >= MAX_WAITING
            record.waiting += not crowded
        if crowded:
            return
        try:
            flight.landed.result(max(0.0, until - self._clock.monotonic()))
        finally:
            with record.lock:
                record.waiting -= 1

    # --- fetching ---------------------------------------------------------------------

    def _start_for_unknown_key(self, record: _Record, now: float) -> _Flight | None:
        with record.lock:
            if record.flight is not None:
                return record.flight
            if now - record.unknown_key_at < COOL_DOWN_S:
                return None
            record.unknown_key_at = now
        return self._start(record, now, force=True)

    def _start(self, record: _Record, now: float, *, force: bool = False) -> _Flight | None:
        """Start a fetch unless one runs, or one has failed a moment ago; return the one that runs."""
        with record.lock:
            if record.flight is not None:
                return record.flight
            if not force and record.must_rest(now):
                return None
            record.flight = flight = _Flight(began_at=now)
        try:
            self._submit(lambda: self._fetch(record, flight))
        except (RuntimeError, MemoryError):
            # No thread to be had: the next request tries again.
            self._note_failure(record, IssuerUnavailableError(reason="keys_no_thread"))
            self._land(record, flight)
        return flight

    def _fetch(self, record: _Record, flight: _Flight) -> None:
        result = "failed"
        try:
            self._fetch_into(record, flight.began_at)
            record.failure = None
            record.started = True
            result = "fetched"
        except TokenExchangeError as error:
            self._note_failure(record, error)
        except BaseException as error:  # noqa: BLE001 - a bug here must not leave callers waiting
            self._note_failure(record, IssuerUnavailableError(reason="keys_fetch_bug"))
            _log.error("fetch of keys failed: %s", type(error).__name__)
        finally:
            self._land(record, flight)
            if self._metrics is not None:
                took_s = self._clock.monotonic() - flight.began_at
                self._metrics.observe("key_fetch_seconds", took_s, result=result)

    def _land(self, record: _Record, flight: _Flight) -> None:
        with record.lock:
            record.flight = None
        flight.landed.set_result(None)

    def _note_failure(self, record: _Record, error: TokenExchangeError) -> None:
        # Whatever it was, to those who need the keys it is an outage.
        outage = isinstance(error, IssuerUnavailableError)
        reason = error.reason if outage else "keys_" + error.reason
        now = self._clock.monotonic()
        record.false_starts += not record.started
        record.failure = _Failure(reason, error.facts, now)
        logged_reason, logged_at = record.logged
        if reason != logged_reason or now - logged_at >= _LOG_INTERVAL_S:
            record.logged = (reason, now)
            issuer = record.endpoints.issuer
            _log.warning("keys of %s are not to be had: %s %s", issuer, reason, error.facts)

    def _fetch_into(self, record: _Record, began_at: float) -> None:
        endpoints = record.endpoints
        deadline = self._clock.monotonic() + FETCH_DEADLINE_S
        trouble: TokenExchangeError | None = None
        if endpoints.discovery_url is not None and None in (endpoints.jwks_uri, endpoints.token_endpoint):
            try:
                # Half of the time: where the keys are may be known from before.
                record.metadata = self._discover(endpoints, deadline - FETCH_DEADLINE_S / 2)
                record.metadata_at = began_at
                self.generation = next(self._generations)
            except TokenExchangeError as error:
                trouble = error
        jwks_uri = endpoints.jwks_uri or self._known_jwks_uri(record, began_at)
        if jwks_uri is None:
            raise trouble or IssuerUnavailableError(reason="jwks_uri_unknown")
        jwks = parse_jwk_set(self._get(jwks_uri, deadline, MAX_SET_BYTES))
        if jwks.dropped:
            _log.info("keys of %s not used: %s", endpoints.issuer, ",".join(jwks.dropped))
        record.fetched = _Fetched(jwks, began_at, self._clock.monotonic())
        self.generation = next(self._generations)
        if trouble is not None:
            # Fresh keys from where they were known to be; that the document is refused stays an alarm.
            raise trouble

    def _known_jwks_uri(self, record: _Record, now: float) -> str | None:
        if record.metadata is None or now - record.metadata_at >= STALE_S:
            return None
        return record.metadata.jwks_uri

    def _discover(self, endpoints: IssuerEndpoints, deadline: float) -> IssuerMetadata:
        url = endpoints.discovery_url or ""
        response = self._send(url, deadline, MAX_METADATA_BYTES)
        if response.status == 404 and url.endswith("/.well-known/openid-configuration"):
            url = oauth_metadata_url(endpoints.issuer)
            response = self._send(url, deadline, MAX_METADATA_BYTES)
        return process_metadata(response, issuer=endpoints.issuer, url=url, allow_http=self._allow_http)

    def _get(self, url: str, deadline: float, max_body: int) -> bytes:
        response = self._send(url, deadline, max_body)
        if response.status != 200:
            raise IssuerUnavailableError(reason="jwks_status", facts={"http_status": response.status})
        return response.body

    def _send(self, url: str, deadline: float, max_body: int) -> HttpResponse:
        if not is_acceptable_endpoint(url, allow_http=self._allow_http):
            raise IssuerUnavailableError(reason="endpoint_not_https")
        request = HttpRequest(method="GET", url=url, headers={"Accept": "application/json"})
        return self._sender.send(request, deadline=deadline, max_body=max_body)


def _start_thread(fetch: Callable[[], None]) -> None:
    threading.Thread(target=fetch, name="keys", daemon=True).start()

"""
The second cache level: exchanged tokens that processes and nodes share through Redis.

- *Asked, never believed*: what is found is opened, then proven by the caller's own code; anything
  wrong counts as nothing found, by reason.
- *Bounded*: a request waits for one look-up, at most the configured timeout. The look-up itself
  runs in a helper thread, so that the bound holds whatever the network does.
- *Its own breaker*: after some faults in a row nobody waits any more. A probe beside the requests
  finds out when Redis is back.
- *Writing* happens beside the requests, from a bounded queue.
- *One exchange among nodes*: who finds nothing takes a lock that ends by itself; who finds the
  lock taken asks for the entry now and then, for a bounded time, and then makes the exchange
  itself. No result depends on a lock.

Source: docs/adr/0010-second-level-cache.md; docs/security.md CACHE-11, CACHE-19, CACHE-22.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from kong_token_exchange.core.sealing import (
    MAX_SEALED_BYTES,
    NONCE_BYTES,
    SealError,
    derive_seal_key,
    entry_name,
    open_sealed,
    seal,
)
from kong_token_exchange.errors import DeadlineError, IssuerUnavailableError, TokenExchangeError
from kong_token_exchange.ports import Clock, ExchangedToken, Metrics
from kong_token_exchange.secret import Secret
from kong_token_exchange.shell.redis_store import StoreError

# A look-up takes a fraction of a millisecond; four at a time serve thousands a second.
READERS = 4
# Look-ups that may wait for a reader: beyond it Redis is slower than what is asked of it.
MAX_WAITING = 64
# Entries that may wait to be written, each at most 64 KB.
MAX_UNWRITTEN = 256

# What a look-up may take that nobody waits for any more; each timeout in it is of one read alone.
LONGEST_LOOK_S = 1.0

# After this time without work a helper thread ends, seconds.
IDLE_S = 30.0

FAILURES = 3
OPEN_FOR_S = 2.0

# Longest wait for another node's exchange, and longest pause between two looks.
MAX_WAIT_S = 2.0
_FIRST_PAUSE_S = 0.005
_LONGEST_PAUSE_S = 0.05

# What a lock outlives its owner's deadline by: the result is written after the answer.
_LOCK_SLACK_S = 1.0
_OWNER_BYTES = 16

# In braces what Redis Cluster places by: an entry and its lock stand on the same node.
_ENTRY = "token-exchange:{{{}}}:1"
_LOCK = "token-exchange:{{{}}}:lock"
_PROBE = "token-exchange:probe"

_log = logging.getLogger(__name__)


class Store(Protocol):
    """What is needed of Redis; each call may raise `StoreError` and may take its time."""

    def read(self, name: str, *, limit: int) -> bytes | None:
        """Return at most *limit* + 1 bytes of a value, or None."""
        ...

    def write(self, name: str, value: bytes, *, life_ms: int) -> None:
        """Keep a value for a while."""
        ...

    def delete(self, name: str) -> None:
        """Drop a value."""
        ...

    def lock(self, name: str, owner: bytes, *, life_ms: int) -> bool:
        """Take a lock that ends by itself."""
        ...

    def unlock(self, name: str, owner: bytes) -> None:
        """Give a lock back, if it is still *owner*'s."""
        ...

    def drop(self) -> None:
        """Close all connections."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where an entry may be: under a name for each seal key, the first of which is written."""

    entry: bytes = field(repr=False)
    names: tuple[str, ...]
    lock: str


@dataclass(slots=True, kw_only=True)
class _Asking:
    """One look-up; `given_up` once nobody waits for it any more."""

    place: _Place
    owner: bytes | None
    lock_ms: int
    given_up: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What a look-up saw: a value, or else whether the lock is ours now."""

    value: bytes | None = field(default=None, repr=False)
    locked: bool = False


class RedisTokenCache:
    """
    Implements `ports.SharedCache` over a store.

    Args:
        store: Redis.
        seal_keys: The first one writes, all of them read; not empty.
        clock: Ends entries by its wall side, times waits by its monotonic side.
        metrics: Counts look-ups, what was found unacceptable, faults, writes and the breaker.
        timeout_s: Longest time that one look-up may cost a request, seconds.
        pause: Waits between two looks for another node's entry.
    """

    def __init__(
        self,
        store: Store,
        *,
        seal_keys: Sequence[Secret],
        clock: Clock,
        metrics: Metrics,
        timeout_s: float,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._keys = tuple(derive_seal_key(secret) for secret in seal_keys)
        self._clock = clock
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._pause = pause
        self._readers = _Helpers("shared-cache-read", READERS, MAX_WAITING)
        self._writer = _Helpers("shared-cache-write", 1, MAX_UNWRITTEN)
        self._breaker = _Breaker(clock, metrics, on_open=store.drop)

    def exchange_once(
        self,
        key: bytes,
        *,
        exchange: Callable[[], tuple[ExchangedToken, bytes]],
        prove: Callable[[bytes], ExchangedToken],
        deadline: float,
    ) -> tuple[ExchangedToken, bool]:
        """
        Take what another process left under *key*, else exchange and leave the result there.

        Raises:
            TokenExchangeError: what *exchange* raised.
        """
        place = self._place(key)
        owner = os.urandom(_OWNER_BYTES)
        seen = self._look(place, deadline=deadline, owner=owner)
        found = self._accept(place, seen, prove)
        if found is None and seen is not None and seen.value is None and not seen.locked:
            seen = self._wait(place, owner=owner, deadline=deadline)
            found = self._accept(place, seen, prove)
        locked = seen is not None and seen.locked
        if found is not None:
            self._metrics.count("shared_cache_lookups", result="hit")
            if locked:
                self._release(place, owner)
            return found, False
        self._metrics.count("shared_cache_lookups", result="miss" if seen is not None else "unknown")
        if seen is None:
            # A Redis that just failed is not given the result either.
            return exchange()[0], True
        return self._exchange(place, owner if locked else None, exchange, prove, deadline=deadline)

    def forget(self, key: bytes) -> None:
        """Have an entry dropped that the issuer took back, beside the requests; a fault leaves it there."""
        names = self._place(key).names

        def delete() -> None:
            try:
                for name in names:
                    self._store.delete(name)
            except StoreError as error:
                self._breaker.fault(error.kind)

        self._writer.start(delete)

    def close(self) -> None:
        """Close the connections to Redis."""
        self._store.drop()

    def _exchange(
        self,
        place: _Place,
        owner: bytes | None,
        exchange: Callable[[], tuple[ExchangedToken, bytes]],
        prove: Callable[[bytes], ExchangedToken],
        *,
        deadline: float,
    ) -> tuple[ExchangedToken, bool]:
        try:
            exchanged, plain = exchange()
        except BaseException as error:
            if owner is not None:
                self._release(place, owner)
            if isinstance(error, IssuerUnavailableError) and error.reason == "assertion_reused":
                # It works once, so somebody else has the result, or is about to leave it here.
                found = self._accept(place, self._wait(place, owner=None, deadline=deadline), prove)
                if found is not None:
                    return found, False
            raise
        self._leave(place, owner, exchanged, plain)
        return exchanged, True

    def _place(self, key: bytes) -> _Place:
        digits = [entry_name(key, key=seal_key) for seal_key in self._keys]
        return _Place(entry=key, names=tuple(map(_ENTRY.format, digits)), lock=_LOCK.format(digits[0]))

    # --- reading ----------------------------------------------------------------------

    def _look(self, place: _Place, *, deadline: float, owner: bytes | None) -> _Seen | None:
        """Look once, and take the lock as *owner* where nothing is found; None where Redis cannot say."""
        time_left_s = deadline - self._clock.monotonic()
        if time_left_s <= 0:
            return None
        if not self._breaker.closed:
            self._breaker.probe(self._readers, self._write_probe)
            return None
        asking = _Asking(place=place, owner=owner, lock_ms=_milliseconds(time_left_s + _LOCK_SLACK_S))
        answer = self._readers.start(lambda: self._ask(asking))
        if answer is None:
            self._metrics.count("shared_cache_faults", kind="busy")
            return None
        try:
            seen = answer.result(min(self._timeout_s, time_left_s))
        except FutureTimeoutError:
            asking.given_up = True
            if not answer.cancel():
                self._end_later(answer)
            # Who comes with little time left says nothing of Redis.
            if time_left_s >= self._timeout_s:
                self._breaker.fault("timeout")
            return None
        except StoreError as error:
            self._breaker.fault(error.kind)
            return None
        self._breaker.success()
        return seen

    def _end_later(self, answer: Future[_Seen]) -> None:
        """Close the connections where a look-up that nobody waits for goes on, as a dripping answer would."""

        def end() -> None:
            if not answer.done():
                self._store.drop()

        timer = threading.Timer(LONGEST_LOOK_S, end)
        timer.daemon = True
        try:
            timer.start()
        except (RuntimeError, MemoryError):
            # No thread to wait in.
            end()

    def _ask(self, asking: _Asking) -> _Seen:
        """Run in a helper thread: read, lock, and read again what came between the two."""
        place, owner = asking.place, asking.owner
        value = self._read(place.names)
        if value is not None or owner is None:
            return _Seen(value=value)
        if not self._store.lock(place.lock, owner, life_ms=asking.lock_ms):
            return _Seen()
        if asking.given_up:
            self._store.unlock(place.lock, owner)
            return _Seen()
        return _Seen(value=self._read(place.names[:1]), locked=True)

    def _read(self, names: Sequence[str]) -> bytes | None:
        for name in names:
            value = self._store.read(name, limit=MAX_SEALED_BYTES)
            if value is not None:
                return value
        return None

    def _accept(
        self, place: _Place, seen: _Seen | None, prove: Callable[[bytes], ExchangedToken]
    ) -> ExchangedToken | None:
        """Open and prove what was seen; None, and counted by reason, where it is not acceptable."""
        if seen is None or seen.value is None:
            return None
        try:
            found = prove(open_sealed(seen.value, entry=place.entry, keys=self._keys))
        except SealError as error:
            self._metrics.count("shared_cache_refused", flaw=error.flaw)
            return None
        except (IssuerUnavailableError, DeadlineError):
            # Keys that cannot be had say nothing against the entry.
            self._metrics.count("shared_cache_refused", flaw="unprovable")
            return None
        except TokenExchangeError:
            self._metrics.count("shared_cache_refused", flaw="unproven")
            return None
        if found.reuse_until is None or found.reuse_until <= self._clock.now():
            self._metrics.count("shared_cache_refused", flaw="expired")
            return None
        return found

    def _wait(self, place: _Place, *, owner: bytes | None, deadline: float) -> _Seen | None:
        """
        Wait a bounded time for what another process is about to leave.

        Args:
            place: Where it will be.
            owner: Takes the lock once it is free; None to look only.
            deadline: The request's; half of what is left is kept for an exchange of our own.
        """
        began = self._clock.monotonic()
        until = began + min(MAX_WAIT_S, (deadline - began) / 2)
        pause_s, seen = _FIRST_PAUSE_S, None
        while (now := self._clock.monotonic()) < until:
            # Not in step with the other waiters.
            self._pause(min(pause_s * random.uniform(0.5, 1.0), until - now))  # noqa: S311 - no secret
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            seen = self._look(place, deadline=deadline, owner=owner)
            if seen is None or seen.value is not None or seen.locked:
                break
        ended = "gave_up" if seen is None or not (seen.value or seen.locked) else "ended"
        self._metrics.count("shared_cache_waits", result=ended)
        return seen

    # --- writing ----------------------------------------------------------------------

    def _leave(self, place: _Place, owner: bytes | None, exchanged: ExchangedToken, plain: bytes) -> None:
        """Have the result written beside the requests, and the lock given back after that."""
        ends = exchanged.reuse_until
        if (
            not self._breaker.closed
            or self._writer.start(lambda: self._write(place, owner, ends, plain)) is None
        ):
            self._metrics.count("shared_cache_writes", result="dropped")

    def _write(self, place: _Place, owner: bytes | None, ends: float | None, plain: bytes) -> None:
        """Run in the writer's thread."""
        if not self._breaker.closed:
            # It opened while this waited: what is left behind it in the queue must not wait as well.
            self._metrics.count("shared_cache_writes", result="dropped")
            return
        life_ms = 0 if ends is None else _milliseconds(ends - self._clock.now())
        result = "too_short"
        try:
            if life_ms > 0:
                nonce = os.urandom(NONCE_BYTES)
                sealed = seal(plain, entry=place.entry, key=self._keys[0], nonce=nonce)
                self._store.write(place.names[0], sealed, life_ms=life_ms)
                result = "stored"
            if owner is not None:
                self._store.unlock(place.lock, owner)
        except SealError:
            result = "too_large"
        except StoreError as error:
            result = "failed"
            self._breaker.fault(error.kind)
        self._metrics.count("shared_cache_writes", result=result)

    def _release(self, place: _Place, owner: bytes) -> None:
        def unlock() -> None:
            try:
                self._store.unlock(place.lock, owner)
            except StoreError as error:
                # It ends by itself.
                self._breaker.fault(error.kind)

        self._writer.start(unlock)

    def _write_probe(self) -> None:
        # Written, not read: a replica or a full Redis answers reads and is of no use.
        self._store.write(_PROBE, b"1", life_ms=1000)


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


# --- breaker --------------------------------------------------------------------------


class _Breaker:
    """Leaves Redis alone for a while after some faults in a row; then a probe goes first, in no request."""

    def __init__(self, clock: Clock, metrics: Metrics, *, on_open: Callable[[], None]) -> None:
        self._clock = clock
        self._metrics = metrics
        self._on_open = on_open
        self._lock = threading.Lock()
        self._faults = 0
        self._open_until = float("-inf")
        self._probing = False
        self.closed = True

    def success(self) -> None:
        self._faults = 0

    def fault(self, kind: str) -> None:
        self._metrics.count("shared_cache_faults", kind=kind)
        with self._lock:
            self._faults += 1
            if not self.closed or self._faults < FAILURES:
                return
            self.closed = False
            self._open_until = self._clock.monotonic() + OPEN_FOR_S
        self._metrics.count("shared_cache_breaker", state="opened")
        _log.warning(
            "second-level cache: left alone after %d faults in a row, the last one: %s", FAILURES, kind
        )
        # What hangs on a connection ends here; what comes after starts with a new one.
        self._on_open()

    def probe(self, helpers: _Helpers, work: Callable[[], None]) -> None:
        """Try whether Redis is back, at most once in `OPEN_FOR_S`, in a helper thread."""
        with self._lock:
            if self.closed or self._probing or self._clock.monotonic() < self._open_until:
                return
            self._probing = True
        if helpers.start(lambda: self._run_probe(work)) is None:
            self._end_probe(good=False)

    def _run_probe(self, work: Callable[[], None]) -> None:
        good = False
        try:
            work()
            good = True
        except StoreError as error:
            self._metrics.count("shared_cache_faults", kind=error.kind)
        finally:
            self._end_probe(good=good)

    def _end_probe(self, *, good: bool) -> None:
        with self._lock:
            self._probing = False
            self._open_until = self._clock.monotonic() + OPEN_FOR_S
            if not good:
                return
            self._faults, self.closed = 0, True
        self._metrics.count("shared_cache_breaker", state="closed")
        _log.warning("second-level cache: in use again")


# --- threads --------------------------------------------------------------------------


Result = TypeVar("Result")


class _Helpers:
    """
    A few daemon threads and a bounded queue: whoever asks waits no longer than it wants to.

    Started when needed, which is after any fork, and gone when idle: a configuration that is replaced
    leaves none behind.
    """

    def __init__(self, name: str, count: int, backlog: int) -> None:
        self._name = name
        self._count = self._missing = count
        self._backlog = backlog
        self._changed = threading.Condition()
        self._work: deque[Callable[[], None]] = deque()

    def start(self, work: Callable[[], Result]) -> Future[Result] | None:
        """Have *work* done unless it is cancelled first; None: too much waits, or there is no thread."""
        done: Future[Result] = Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001 - handed to who asked; the thread goes on
                done.set_exception(error)
            else:
                done.set_result(result)

        with self._changed:
            if len(self._work) >= self._backlog:
                return None
            self._work.append(run)
            if self._missing:
                self._start_thread()
            if self._missing == self._count:
                # Nobody would ever take it, and it may hold a token.
                self._work.pop()
                return None
            self._changed.notify()
        return done

    def _start_thread(self) -> None:
        try:
            threading.Thread(target=self._serve, name=self._name, daemon=True).start()
        except (RuntimeError, MemoryError):
            # The machine has none left: those that run do it later.
            return
        self._missing -= 1

    def _serve(self) -> None:
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._work, IDLE_S):
                    # Whoever asks from here on starts a thread for it.
                    self._missing += 1
                    return
                work = self._work.popleft()
            work()
            # Not kept while the next one is waited for: it holds a token.
            del work

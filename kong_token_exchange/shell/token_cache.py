"""
The first-level cache: bounded memory over `cachetools`, and single flight.

Keys are digests; values are proven tokens. Every hand-out judges the entry's end by the wall
clock and by the monotonic clock, and the earlier one counts. Each part is bounded by the number
of its entries and by their estimated bytes; what is pushed out was not used for longest, and is
counted.

Source: docs/adr/0005-caching.md; docs/threats.md CACHE rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Generic, TypeVar

from cachetools import LRUCache

from kong_token_exchange.errors import DeadlineError, GatewayError, RejectionError, TokenExchangeError
from kong_token_exchange.ports import Clock, ExchangedToken, Metrics, VerifiedToken

# An entry is 5 to 10 KB with the claims of a usual token, so that both bounds are reached about together.
MAX_ENTRIES = 10_000
MAX_BYTES = 64 * 1024 * 1024

# A waiter whose owner ran out of time asks itself when it has this much left: an answer takes about so long.
WORTH_A_TRY_S = 0.2

# Refusals live for seconds; one weighs about a kilobyte.
MAX_REFUSALS = 10_000

# What an entry weighs beside its claims and token: the objects around them, key and links of the cache.
_ENTRY_BYTES = 1024

Entry = TypeVar("Entry")
Refusal = TypeVar("Refusal", bound=TokenExchangeError)


class MemoryTokenCache:
    """
    Implements `ports.TokenCache` for one process.

    Args:
        clock: Judges a result that landed between a caller's look-up and its flight.
        metrics: Counts evictions, and times those who wait for another one's exchange.
        max_entries: Most entries in each of the two parts.
        max_bytes: Most estimated bytes in each of the two parts.
        max_refusals: Most refusals that are remembered.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        metrics: Metrics | None = None,
        max_entries: int = MAX_ENTRIES,
        max_bytes: int = MAX_BYTES,
        max_refusals: int = MAX_REFUSALS,
    ) -> None:
        self._clock = clock
        self._metrics = metrics
        self._lock = threading.Lock()
        self._exchanged: _Bounded[ExchangedToken] = _Bounded(
            max_entries, max_bytes, weigh_exchanged, _eviction_counter(metrics, "exchanged")
        )
        self._verified: _Bounded[VerifiedToken] = _Bounded(
            max_entries, max_bytes, weigh_verified, _eviction_counter(metrics, "verified")
        )
        # The refusal, and until when it stands on the monotonic clock.
        self._refusals: _Bounded[tuple[RejectionError, float]] = _Bounded(
            max_refusals, max_refusals, lambda _: 1, _eviction_counter(metrics, "refused")
        )
        self._flights: dict[bytes, Future[ExchangedToken]] = {}

    def verified(self, key: bytes) -> VerifiedToken | None:
        """Return a verified token, or None; the caller judges its times and its key again."""
        with self._lock:
            return self._verified.get(key)

    def store_verified(self, key: bytes, token: VerifiedToken) -> None:
        """Keep a verified token."""
        with self._lock:
            self._verified.store(key, token)

    def exchanged(self, key: bytes, *, now: float, monotonic: float) -> ExchangedToken | None:
        """Return an exchanged token that may still be handed out, or None."""
        with self._lock:
            entry = self._exchanged.get(key)
            if entry is None or _is_fresh(entry, now, monotonic):
                return entry
            del self._exchanged[key]
            return None

    def forget_exchanged(self, key: bytes) -> None:
        """Drop an exchanged token that its caller no longer trusts."""
        with self._lock:
            entry = self._exchanged.pop(key, None)
        if entry is not None:
            entry.dropped = True

    def sizes(self) -> dict[str, int]:
        """Return the entries of each part and their estimated bytes, and how many exchanges are under way."""
        with self._lock:
            return {
                "exchanged_entries": len(self._exchanged),
                "exchanged_bytes": int(self._exchanged.currsize),
                "verified_entries": len(self._verified),
                "verified_bytes": int(self._verified.currsize),
                "refusals": len(self._refusals),
                "flights": len(self._flights),
            }

    def refusal(self, key: bytes) -> RejectionError | None:
        """Return the issuer's refusal of a moment ago, made anew, or None."""
        with self._lock:
            return self._standing_refusal(key)

    def store_refusal(self, key: bytes, error: RejectionError, *, ttl: float) -> None:
        """Keep a refusal for *ttl* seconds, without the frames that it was raised through."""
        twin = _twin(error)
        twin.facts["cached"] = True
        with self._lock:
            self._refusals.store(key, (twin, self._clock.monotonic() + ttl))

    def exchange_once(
        self, key: bytes, exchange: Callable[[], ExchangedToken], *, deadline: float, store: bool
    ) -> ExchangedToken:
        """
        Run *exchange*, or wait for the one that runs for *key*.

        The thread that starts a flight owns it: it alone stores the result, wakes the waiters
        with result or error, and removes the flight. A failure stores nothing. The owner's
        deadline is no failure of the others: who has time left takes part in one more flight.

        Args:
            key: Everything that shapes the result.
            exchange: Does it, and keeps to a deadline of its own.
            deadline: Monotonic instant until which this caller waits for another one's flight.
            store: Whether the result may be handed out again.

        Raises:
            DeadlineError: another one's flight did not end in time; it goes on for its owner.
            RejectionError: the issuer refused the same a moment ago.
        """
        for may_repeat in (True, False):
            flight, landed = self._board(key, store=store)
            if landed is not None:
                return landed
            if flight is None:
                break
            began = self._clock.monotonic()
            try:
                return self._wait(flight, deadline)
            except DeadlineError:
                if not may_repeat or deadline - self._clock.monotonic() < WORTH_A_TRY_S:
                    raise
            finally:
                if self._metrics is not None:
                    self._metrics.observe("flight_wait_seconds", self._clock.monotonic() - began)
        return self._fly(key, exchange, store=store)

    def renew(
        self, key: bytes, old: ExchangedToken, exchange: Callable[[], ExchangedToken]
    ) -> ExchangedToken | None:
        """
        Put what *exchange* gives in the place of *old*; None where *old* is gone or one is under way.

        It is a flight like any other: should *old* end meanwhile, whoever needs a new one waits for it.

        Raises:
            TokenExchangeError: what *exchange* raised; *old* stays.
        """
        with self._lock:
            if key in self._flights or self._exchanged.get(key) is not old:
                return None
            # It waited for a thread too long: whoever needs a new one asks, with a token that is good now.
            if not _is_fresh(old, self._clock.now(), self._clock.monotonic()):
                return None
            self._flights[key] = Future()
        return self._fly(key, exchange, store=True)

    def _board(
        self, key: bytes, *, store: bool
    ) -> tuple[Future[ExchangedToken] | None, ExchangedToken | None]:
        """Return another one's flight, or what landed meanwhile; neither, and the caller owns a new one."""
        with self._lock:
            flight = self._flights.get(key)
            if flight is not None:
                return flight, None
            # A flight may have landed between the caller's look-up and this lock.
            entry = self._exchanged.get(key) if store else None
            if entry is not None and _is_fresh(entry, self._clock.now(), self._clock.monotonic()):
                return None, entry
            refusal = self._standing_refusal(key) if store else None
            if refusal is not None:
                raise refusal
            self._flights[key] = Future()
            return None, None

    def _standing_refusal(self, key: bytes) -> RejectionError | None:
        found = self._refusals.get(key)
        if found is None:
            return None
        if self._clock.monotonic() < found[1]:
            return _twin(found[0])
        del self._refusals[key]
        return None

    def _fly(self, key: bytes, exchange: Callable[[], ExchangedToken], *, store: bool) -> ExchangedToken:
        """Run the flight that this thread owns."""
        own = self._flights[key]
        try:
            result = exchange()
        except BaseException as error:
            self._land(key, None)
            own.set_exception(_without_traceback(error))
            raise
        self._land(key, result if store else None)
        own.set_result(result)
        return result

    def _wait(self, flight: Future[ExchangedToken], deadline: float) -> ExchangedToken:
        try:
            error = flight.exception(max(0.0, deadline - self._clock.monotonic()))
        except FutureTimeoutError:
            raise DeadlineError(reason="deadline_waiting") from None
        if error is not None:
            raise _without_traceback(error)
        return flight.result()

    def _land(self, key: bytes, result: ExchangedToken | None) -> None:
        """Store a result and end the flight in one step, so that nobody starts another in between."""
        with self._lock:
            self._flights.pop(key, None)
            if result is not None and result.reuse_until is not None:
                self._exchanged.store(key, result)


def _is_fresh(entry: ExchangedToken, now: float, monotonic: float) -> bool:
    return (
        entry.reuse_until is not None and now < entry.reuse_until and monotonic < entry.reuse_until_monotonic
    )


def _without_traceback(error: BaseException) -> BaseException:
    """
    Make the same error anew.

    One instance raised by a thousand threads would collect their tracebacks, and with them every
    token in their frames. What is not of our tree is a bug in one thread, and may even end it
    (`SystemExit`): the others get a plain error.
    """
    if not isinstance(error, TokenExchangeError):
        return GatewayError(reason="exchange_failed", facts={"cause": type(error).__name__})
    return _twin(error)


def _twin(error: Refusal) -> Refusal:
    twin = type(error).__new__(type(error), *error.args)
    twin.__dict__.update(error.__dict__)
    twin.facts = dict(error.facts)
    return twin


# --- bounds ---------------------------------------------------------------------------


class _Bounded(LRUCache[bytes, Entry], Generic[Entry]):
    """An LRU cache bounded by count and by weight."""

    def __init__(
        self, max_entries: int, max_bytes: int, weigh: Callable[[Entry], int], evicted: Callable[[], None]
    ) -> None:
        super().__init__(max_bytes, getsizeof=weigh)
        self._max_entries = max_entries
        self._evicted = evicted

    def store(self, key: bytes, entry: Entry) -> None:
        """Keep *entry*, pushing out those unused for longest; one that is too heavy alone is not kept."""
        # The old entry goes first: where the new one is too heavy, it must not stay in its place.
        self.pop(key, None)
        try:
            self[key] = entry
        except ValueError:
            self._evicted()
        while len(self) > self._max_entries:
            self.popitem()

    def popitem(self) -> tuple[bytes, Entry]:
        """Push out the entry unused for longest, and count it."""
        self._evicted()
        return super().popitem()


def _eviction_counter(metrics: Metrics | None, part: str) -> Callable[[], None]:
    if metrics is None:
        return lambda: None
    return lambda: metrics.count("cache_evictions", part=part)


def weigh_exchanged(entry: ExchangedToken) -> int:
    """Estimate an entry's bytes; the answer that is later rendered from it holds the token once more."""
    claims = entry.claims
    return _ENTRY_BYTES + 3 * len(entry.token.reveal()) + (weigh(claims.members) if claims is not None else 0)


def weigh_verified(entry: VerifiedToken) -> int:
    """Estimate an entry's bytes."""
    return _ENTRY_BYTES + weigh(entry.claims.members)


def weigh(value: object) -> int:
    """
    Estimate the bytes of parsed JSON: a little more than CPython needs.

    Nothing is asked of the interpreter, which would cost more than the rest of storing an entry.
    """
    size = 0
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            size += _STR_BYTES + len(item)
            continue
        values: Iterable[object]
        if isinstance(item, dict):
            size += _DICT_BYTES + (_MEMBER_BYTES + _STR_BYTES) * len(item) + sum(map(len, item))
            values = item.values()
        elif isinstance(item, list):
            size += _LIST_BYTES + _ITEM_BYTES * len(item)
            values = item
        else:
            size += _NUMBER_BYTES
            continue
        # Most of what tokens hold is text, which needs no turn of its own.
        for inner in values:
            if type(inner) is str:
                size += _STR_BYTES + len(inner)
            else:
                stack.append(inner)
    return size


# As CPython 3.11 lays them out on a 64-bit machine, with the allocator's rounding.
_STR_BYTES = 64
_DICT_BYTES = 240
_MEMBER_BYTES = 40
_LIST_BYTES = 80
_ITEM_BYTES = 12
_NUMBER_BYTES = 32

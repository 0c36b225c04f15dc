"""
Answers that stand for a moment: the same request gets the same encoded answer without being judged again.

A lease is given for a cached exchange that was judged in full just now, and holds only while every
judgement would come out the same: the facts are the same bytes, both clocks are within all times that
were judged, no key set was fetched since, and the cached token was not dropped. Whatever fails one of
these takes the long way; nothing is ever refused from here.

Source: docs/adr/0005-caching.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from weakref import ref

from kong_token_exchange.ports import Clock, ExchangedToken, KeySource

# The longest lease. It bounds what a mistake in the conditions above could cost, and the long way keeps
# the caches' order of use and refreshes keys.
LEASE_S = 10.0

# As many as the caches behind hold by default; a lease that is over goes when the next one is given.
MAX_LEASES = 10_000

Encoded = TypeVar("Encoded")


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """
    Within what an answer may be given again.

    `begins` and `ends` are NumericDate, `ends_monotonic` is on the monotonic clock; the ends are
    excluded. `generation` is the key source's from before the judgement.
    """

    begins: float
    ends: float
    ends_monotonic: float
    generation: int
    exchanged: ExchangedToken = field(repr=False)


@dataclass(slots=True)
class _Lease(Generic[Encoded]):
    begins: float
    ends: float
    ends_monotonic: float
    generation: int
    # Weak: what the cache has pushed out must not live on here, nor what was encoded from it.
    exchanged: ref[ExchangedToken]
    answer: Encoded | None
    count: Callable[[], None]


class Leases(Generic[Encoded]):
    """The leases of one plugin instance; used on the event loop alone, so without a lock."""

    def __init__(self, clock: Clock, keys: KeySource, *, max_leases: int = MAX_LEASES) -> None:
        self._now = clock.now
        self._monotonic = clock.monotonic
        self._keys = keys
        self._max_leases = max_leases
        # In the order in which they were given, which is about the order of their ends.
        self._leases: dict[bytes, _Lease[Encoded]] = {}

    def find(self, key: bytes) -> Encoded | None:
        """Return the answer that stands for *key*, and count it; None where it must be judged again."""
        lease = self._leases.get(key)
        if (
            lease is not None
            and (exchanged := lease.exchanged()) is not None
            and lease.begins <= self._now() < lease.ends
            and self._monotonic() < lease.ends_monotonic
            and lease.generation == self._keys.generation
            and not exchanged.dropped
        ):
            lease.count()
            return lease.answer or exchanged.rendered
        return None

    def give(self, key: bytes, terms: Terms, answer: Encoded, count: Callable[[], None]) -> None:
        """Let *answer* stand for *key* within *terms*; *count* is called for each time it is given."""
        leases = self._leases
        leases.pop(key, None)
        now = self._monotonic()
        while leases:
            oldest, lease = next(iter(leases.items()))
            over = lease.ends_monotonic <= now or lease.exchanged() is None
            if len(leases) < self._max_leases and not over:
                break
            del leases[oldest]
        exchanged = terms.exchanged
        leases[key] = _Lease(
            terms.begins,
            terms.ends,
            terms.ends_monotonic,
            terms.generation,
            ref(exchanged),
            None if answer is exchanged.rendered else answer,
            count,
        )

"""
Audit events and operator messages as JSON lines.

Kong merges a plugin server's output into its error log at level *info*, one line a message;
a sidecar's goes to the container's log. Lines are bounded in length and in number per second,
so that a flood of bad tokens does not fill a disk. Each kind of event has a bound of its own: a
flood of one kind cannot push another out of the log. What was left out is counted in the next
line of its kind.

Source: docs/operations.md; docs/threats.md RES-17, OUT-12.
"""

from __future__ import annotations

import json
import logging
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from kong_token_exchange.ports import AuditEvent, Clock

# More than this a second says nothing new to a reader; the counters keep the exact number.
MAX_EVENTS_PER_SECOND = 50
# Each exchange is worth a line: it happened at the issuer, and at no other place here it is told.
MAX_EXCHANGES_PER_SECOND = 1_000

# Longest text in a line: an issuer fits, a token does not.
_MAX_TEXT = 256

_log = logging.getLogger("kong_token_exchange.audit")


@dataclass(slots=True)
class _Budget:
    limit: int
    second: int = 0
    written: int = 0
    left_out: int = 0


class AuditLog:
    """
    Implements `ports.AuditSink` over `logging`.

    Args:
        clock: Tells the second that a line is counted in.
        max_per_second: Most lines of one kind; exchanges have their own, higher bound.
    """

    def __init__(self, clock: Clock, *, max_per_second: int = MAX_EVENTS_PER_SECOND) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        limits = {"exchange": max(max_per_second, MAX_EXCHANGES_PER_SECOND)}
        kinds = ("exchange", "forward", "refuse", "fault")
        self._budgets = {kind: _Budget(limits.get(kind, max_per_second)) for kind in kinds}

    def record(self, event: AuditEvent) -> None:
        """Write one event as a JSON line, or count it as left out."""
        now = self._clock.now()
        left_out = self._spend("fault" if event.status >= 500 else event.outcome, int(now))
        if left_out is None:
            return
        line: dict[str, object] = {
            "event": "token_exchange",
            "time": round(now, 3),
            "outcome": event.outcome,
            "reason": event.reason,
            "status": event.status,
        }
        # A fact never takes the place of what the event itself says.
        line.update({name: value for name, value in event.facts.items() if name not in line})
        if left_out:
            line["left_out"] = left_out
        shown = {name: _bounded(value) for name, value in line.items() if value is not None}
        # 5xx means an operator: an outage, an alarm, or a security event.
        level = logging.WARNING if event.status >= 500 else logging.INFO
        _log.log(level, "%s", json.dumps(shown, separators=(",", ":")))

    def _spend(self, kind: str, second: int) -> int | None:
        """Take one line from the budget; return how many were left out before it, None if it is spent."""
        with self._lock:
            budget = self._budgets[kind]
            if second != budget.second:
                budget.second, budget.written = second, 0
            if budget.written >= budget.limit:
                budget.left_out += 1
                return None
            budget.written += 1
            left_out, budget.left_out = budget.left_out, 0
            return left_out


def _bounded(value: object) -> object:
    return value[:_MAX_TEXT] if isinstance(value, str) else value


# Upper bounds of the classes that times are counted in, seconds: from a token endpoint next door to the
# longest deadline. What took longer is in none of them, and in `count`.
TIME_CLASSES_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(slots=True)
class Times:
    """How often something took how long, in sum and at most, seconds; each class counts those below, too."""

    count: int = 0
    total: float = 0.0
    longest: float = 0.0
    classes: list[int] = field(default_factory=lambda: [0] * len(TIME_CLASSES_S))

    def take(self, seconds: float) -> None:
        """Take in one."""
        self.count += 1
        self.total += seconds
        self.longest = max(self.longest, seconds)
        for index in range(bisect_left(TIME_CLASSES_S, seconds), len(TIME_CLASSES_S)):
            self.classes[index] += 1


class CountingMetrics:
    """Implements `ports.Metrics` in memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._times: dict[str, Times] = {}

    def count(self, name: str, **labels: str) -> None:
        """Add one to the counter of that name and those labels."""
        self.counter(name, **labels)()

    def counter(self, name: str, **labels: str) -> Callable[[], None]:
        """Return what adds one to that counter: for a place that counts the same thing at every request."""
        key = _key(name, labels)
        counts, lock = self._counts, self._lock

        def add() -> None:
            with lock:
                counts[key] += 1

        return add

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Take in how long something took."""
        key = _key(name, labels)
        with self._lock:
            self._times.setdefault(key, Times()).take(seconds)

    def snapshot(self) -> dict[str, int]:
        """Return all counters."""
        with self._lock:
            return dict(self._counts)

    def times(self) -> dict[str, Times]:
        """Return all times."""
        with self._lock:
            return {key: replace(times, classes=list(times.classes)) for key, times in self._times.items()}


def _key(name: str, labels: Mapping[str, str]) -> str:
    return name + "".join(f",{label}={value}" for label, value in labels.items())

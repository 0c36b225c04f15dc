"""
Work in the background: a few threads, a bounded queue, and a share for each endpoint.

Cached tokens are renewed here before they end. Nothing waits for it: what finds no place is
dropped and counted, and its entry is offered again later or ends as any other.

Source: docs/adr/0005-caching.md; docs/threats.md RES-04, RES-05.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable

# At 50 ms an exchange this renews 10,000 tokens in use within the last part of a life of five minutes.
MAX_THREADS = 8
# One endpoint that hangs holds half of the threads, not all.
MAX_THREADS_PER_GROUP = 4
# Each holds a subject token; beyond this the issuer is too slow for a renewal to come in time.
MAX_WAITING = 256

# An idle thread is kept for so long.
_IDLE_S = 30.0

_log = logging.getLogger("kong_token_exchange.refresh")


class BackgroundRefresher:
    """
    Implements `ports.Refresher`; threads are made when needed, so none before a fork.

    Args:
        max_threads: Most threads.
        max_threads_per_group: Most of them at work for one group.
        max_waiting: Most pieces of work that wait.
        idle_s: Seconds after which an idle thread ends.
    """

    def __init__(
        self,
        *,
        max_threads: int = MAX_THREADS,
        max_threads_per_group: int = MAX_THREADS_PER_GROUP,
        max_waiting: int = MAX_WAITING,
        idle_s: float = _IDLE_S,
    ) -> None:
        self._max_threads = max_threads
        self._max_threads_per_group = max_threads_per_group
        self._max_waiting = max_waiting
        self._idle_s = idle_s
        self._changed = threading.Condition()
        self._waiting: deque[tuple[str, Callable[[], None]]] = deque()
        self._working: Counter[str] = Counter()
        self._threads = 0

    def offer(self, work: Callable[[], None], *, group: str) -> bool:
        """Take *work* on, or say at once that there is no place for it."""
        with self._changed:
            if len(self._waiting) >= self._max_waiting:
                return False
            self._waiting.append((group, work))
            if self._lacks_a_thread() and not self._start_thread() and not self._threads:
                self._waiting.pop()
                return False
            self._changed.notify()
            return True

    def _lacks_a_thread(self) -> bool:
        """Tell whether one more thread would find work: those that are free have some each already."""
        if self._threads >= self._max_threads:
            return False
        waiting = Counter(group for group, _ in self._waiting)
        share = self._max_threads_per_group
        ready = sum(min(count, share - self._working[group]) for group, count in waiting.items())
        return ready > self._threads - self._working.total()

    def _start_thread(self) -> bool:
        try:
            threading.Thread(target=self._serve, name="refresh", daemon=True).start()
        except RuntimeError:
            # The machine has none left: those that run do it later.
            return False
        self._threads += 1
        return True

    def _serve(self) -> None:
        while (taken := self._next()) is not None:
            group, work = taken
            # Not kept while the next one is waited for: it holds a token.
            del taken
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - the thread serves others after this
                _log.error("renewing failed: %s", type(error).__name__)
            del work
            with self._changed:
                self._working[group] -= 1
                if not self._working[group]:
                    del self._working[group]
                self._changed.notify()

    def _next(self) -> tuple[str, Callable[[], None]] | None:
        """Wait for work that may be done now; None where there was none for a while."""
        with self._changed:
            while (taken := self._take()) is None:
                notified = self._changed.wait(self._idle_s)
                if not notified and (taken := self._take()) is None:
                    self._threads -= 1
                    return None
                if taken is not None:
                    break
            return taken

    def _take(self) -> tuple[str, Callable[[], None]] | None:
        for index, (group, work) in enumerate(self._waiting):
            if self._working[group] < self._max_threads_per_group:
                del self._waiting[index]
                self._working[group] += 1
                return group, work
        return None

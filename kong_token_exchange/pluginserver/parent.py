"""
Notice that the process which started this one is gone, and know when to end then.

A gateway that is killed leaves its plugin server behind, which would hold the path
and its memory for ever. At a reload of Kong, however, the server is needed until the next
one listens: Kong's new worker connects to the same path from its first request on.

    this process -> its parent (the keeper) -> the starter (a worker) -> the gateway (its master)

Source: prctl(2), PR_SET_PDEATHSIG; docs/plugin-socket.md, section Reload.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

_PR_SET_PDEATHSIG = 1

# How often the parent's id is compared.
CHECK_S = 0.25

# How long a successor is waited for; a start takes about one second.
HANDOVER_S = 5.0

# A Kong worker kills the process it started just before it ends itself. One that is still there
# after this time is not being replaced: it starts another server as soon as this one has ended.
STARTER_GRACE_S = 1.0

# Who looked up the path before it was taken over may still be about to connect.
SETTLE_S = 0.2

# Fields of /proc/PID/stat behind the name: state, the parent's id, start in clock ticks.
_STATE, _PARENT, _STARTED = 0, 1, 19

logger = logging.getLogger(__name__)


class _Stoppable(Protocol):
    def request_stop(self) -> None: ...


class Parent:
    """The parent as it is now; make one before anything that takes time."""

    def __init__(self, pid: int | None = None) -> None:
        # Compared with its value at start and not with 1: an orphan goes to the nearest
        # subreaper, and in a container the parent may be 1 from the beginning.
        self.pid = os.getppid() if pid is None else pid

    def is_gone(self) -> bool:
        """Tell whether another process is the parent by now."""
        return os.getppid() != self.pid

    def signal_on_death(self) -> None:
        """Ask the kernel for a SIGTERM when the parent dies; look at `is_gone` afterwards."""
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


class Ancestor:
    """A process further up, told from a later one of the same id by its start."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._started = _stat(pid)[_STARTED:]

    def is_alive(self) -> bool:
        """Tell whether it runs still; False where nothing can be seen of it."""
        fields = _stat(self.pid)
        return bool(fields) and fields[_STATE] != "Z" and fields[_STARTED:] == self._started

    def parent(self) -> Ancestor:
        """Return its parent; one that is not alive where nothing can be seen."""
        fields = _stat(self.pid)
        return Ancestor(int(fields[_PARENT]) if fields else 0)


def _stat(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    # The name may hold blanks and brackets.
    return text.rpartition(")")[2].split()[: _STARTED + 1]


class Handover:
    """
    When a server whose parent is gone may end: it is asked again and again.

    Args:
        parent: Whose end begins it.
        is_current: Tells whether the socket's path still leads here.
        wait_s: How long a successor is waited for.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        parent: Parent,
        is_current: Callable[[], bool],
        *,
        wait_s: float = HANDOVER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._parent = parent
        self._is_current = is_current
        self._wait_s = wait_s
        self._clock = clock
        self._starter = Ancestor(parent.pid).parent()
        self._gateway = self._starter.parent()
        self._began_at: float | None = None
        self._over_at: float | None = None

    def is_over(self) -> bool:
        """Tell whether the parent is gone and nobody needs this server any more."""
        if not self._parent.is_gone():
            return False
        now = self._clock()
        if self._began_at is None:
            self._began_at = now
            logger.info("the parent process is gone: looking for a successor")
        if self._over_at is None and not self._is_awaited(now - self._began_at):
            self._over_at = now + SETTLE_S
        return self._over_at is not None and now >= self._over_at

    def _is_awaited(self, waited_s: float) -> bool:
        if not self._is_current():
            return False
        if self._starter.is_alive():
            return waited_s < STARTER_GRACE_S
        # Without a gateway nobody starts one.
        return self._gateway.is_alive() and waited_s < self._wait_s

    @contextlib.contextmanager
    def watched(self, process: _Stoppable, *, check_s: float = CHECK_S) -> Iterator[None]:
        """Stop *process* when it is over; with a thread, so not before a fork."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(check_s):
                if self.is_over():
                    process.request_stop()
                    return

        thread = threading.Thread(target=watch, name="parent", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

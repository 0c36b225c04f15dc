"""
Notice that the process which started this one is gone.

A gateway that is killed leaves its plugin server behind, which would hold the path
and its memory for ever. The kernel is asked for a SIGTERM at the parent's death,
and the parent's id is looked at as well, since a container may refuse the former.

Source: prctl(2), PR_SET_PDEATHSIG.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from typing import Protocol

_PR_SET_PDEATHSIG = 1

# How often the parent's id is compared.
CHECK_S = 1.0


class _Stoppable(Protocol):
    def request_stop(self) -> None: ...


class Parent:
    """The parent as it is now; make one before anything that takes time."""

    def __init__(self, pid: int | None = None) -> None:
        # Compared with its value at start and not with 1: an orphan goes to the nearest
        # subreaper, and in a container the parent may be 1 from the beginning.
        self._pid = os.getppid() if pid is None else pid

    def is_gone(self) -> bool:
        """Tell whether another process is the parent by now."""
        return os.getppid() != self._pid

    def signal_on_death(self) -> None:
        """Ask the kernel for a SIGTERM when the parent dies; look at `is_gone` afterwards."""
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)

    @contextlib.contextmanager
    def watched(self, process: _Stoppable, *, check_s: float = CHECK_S) -> Iterator[None]:
        """Stop *process* when the parent is gone; with a thread, so not before a fork."""
        over = threading.Event()

        def watch() -> None:
            while not over.is_set():
                if self.is_gone():
                    process.request_stop()
                    return
                over.wait(check_s)

        thread = threading.Thread(target=watch, name="parent", daemon=True)
        self.signal_on_death()
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

"""
A report on SIGUSR1, written outside of the signal's handler.

A handler runs between any two steps of the main thread, also where that holds a lock which the
report needs. So it only writes a byte, and a thread of its own does the rest.

Source: docs/operations.md.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable

_log = logging.getLogger("kong_token_exchange.metrics")


def report_on_signal(report: Callable[[], None], number: int = signal.SIGUSR1) -> None:
    """
    Call *report* after each signal *number*, in a thread of its own, from now until the process ends.

    Signals that come while one is reported are one. Outside of the main thread, where no handler can
    be set, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def note(*_: object) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(writer, b"r")

    threading.Thread(target=_serve, args=(reader, report), name="report", daemon=True).start()
    signal.signal(number, note)


def _serve(reader: int, report: Callable[[], None]) -> None:
    while os.read(reader, 4096):
        try:
            report()
        except Exception as error:  # noqa: BLE001 - the next signal is answered all the same
            _log.error("no report: %s", type(error).__name__)

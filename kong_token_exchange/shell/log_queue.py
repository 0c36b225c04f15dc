"""
Log lines that never hold up the event loop.

Kong reads a plugin server's output through a pipe of 64 KB; a reader that stops would stop
whoever writes, and any caller can make lines. So lines go into a bounded queue, one thread
writes them, and what does not fit is dropped and counted.

Source: docs/operations.md; docs/threats.md RES-17.
"""

from __future__ import annotations

import logging
import queue
from logging.handlers import QueueHandler, QueueListener

# Some minutes of lines at the rate that the audit log allows itself, and a few MB at most.
MAX_LINES = 10_000


class DroppingQueueHandler(QueueHandler):
    """Puts a record into the queue, or counts it as dropped; never waits."""

    def __init__(self, lines: queue.Queue[logging.LogRecord]) -> None:
        super().__init__(lines)
        self.dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        """Put one record; say in it how many were dropped before."""
        if self.dropped:
            record.msg = f"{record.msg} ({self.dropped} lines dropped before)"
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1
        else:
            self.dropped = 0


def queue_log_lines(logger: logging.Logger, *, max_lines: int = MAX_LINES) -> QueueListener:
    """
    Put a queue and a thread before *logger*'s handlers; to be called after any fork.

    Returns:
        The listener; `stop()` writes what is queued and ends the thread.
    """
    lines: queue.Queue[logging.LogRecord] = queue.Queue(max_lines)
    listener = QueueListener(lines, *logger.handlers)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.addHandler(DroppingQueueHandler(lines))
    listener.start()
    return listener

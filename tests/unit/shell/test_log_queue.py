"""Lines are written by a thread of their own, and a reader that stops holds nobody up."""

from __future__ import annotations

import logging
import threading

from kong_token_exchange.shell.log_queue import queue_log_lines


class Blocked(logging.Handler):
    """A handler like a full pipe, until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.entered.set()
        assert self.gate.wait(10)
        self.lines.append(record.getMessage())


def make_logger(handler: logging.Handler) -> logging.Logger:
    logger = logging.Logger("test")  # noqa: LOG001 - one that no other test sees
    logger.addHandler(handler)
    return logger


def test_every_line_is_written_in_order() -> None:
    handler = Blocked()
    handler.gate.set()
    logger = make_logger(handler)

    listener = queue_log_lines(logger)
    for number in range(100):
        logger.info("line %d", number)
    listener.stop()

    assert [f"line {number}" for number in range(100)] == handler.lines


def test_a_writer_that_is_stuck_holds_nobody_up_and_what_was_dropped_is_counted() -> None:
    handler = Blocked()
    logger = make_logger(handler)
    listener = queue_log_lines(logger, max_lines=3)
    logger.info("first")
    assert handler.entered.wait(10)

    for number in range(8):
        logger.info("line %d", number)
    handler.gate.set()
    while not listener.queue.empty():
        pass
    logger.info("last")
    listener.stop()

    assert ["first", "line 0", "line 1", "line 2", "last (5 lines dropped before)"] == handler.lines

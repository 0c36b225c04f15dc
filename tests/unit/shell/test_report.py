"""A report on a signal: from any moment of the main thread, and never in its way."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from kong_token_exchange.shell.report import report_on_signal
from kong_token_exchange.wiring import Shells
from tests.support.fakes import PATIENCE_S


@pytest.fixture(autouse=True)
def _handler_restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def test_a_signal_is_answered_in_another_thread_though_the_main_thread_holds_the_lock() -> None:
    lock, reported = threading.Lock(), threading.Semaphore(0)
    threads = []

    def report() -> None:
        with lock:
            threads.append(threading.current_thread().name)
        reported.release()

    report_on_signal(report)
    with lock:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert [] == threads
    assert reported.acquire(timeout=PATIENCE_S)
    assert ["report"] == threads


def test_a_report_that_fails_does_not_end_the_answers(caplog: pytest.LogCaptureFixture) -> None:
    reported = threading.Semaphore(0)
    errors = [ValueError("mark")]

    def report() -> None:
        reported.release()
        if errors:
            raise errors.pop()

    with caplog.at_level(logging.INFO):
        report_on_signal(report)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert reported.acquire(timeout=PATIENCE_S)
    assert ["no report: ValueError"] == caplog.messages


def test_signals_without_end_never_block_the_main_thread() -> None:
    release, entered = threading.Event(), threading.Event()

    def report() -> None:
        entered.set()
        assert release.wait(PATIENCE_S)

    report_on_signal(report)
    handler = signal.getsignal(signal.SIGUSR1)
    assert callable(handler)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert entered.wait(PATIENCE_S)
    # More than a pipe holds, while the first is being reported.
    for _ in range(100_000):
        handler(signal.SIGUSR1, None)
    release.set()


def test_outside_of_the_main_thread_nothing_is_done() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    thread = threading.Thread(target=lambda: report_on_signal(lambda: None), daemon=True)
    thread.start()
    thread.join(PATIENCE_S)

    assert before is signal.getsignal(signal.SIGUSR1)


def test_the_report_is_one_line_of_counters_times_and_sizes(caplog: pytest.LogCaptureFixture) -> None:
    shells = Shells()
    shells.metrics.count("requests", outcome="refuse", reason="x")
    shells.metrics.count("requests", outcome="refuse", reason="x")
    shells.metrics.observe("exchange_seconds", 0.25, result="answered")
    shells.metrics.observe("exchange_seconds", 0.75, result="answered")
    with caplog.at_level(logging.INFO, logger="kong_token_exchange.metrics"):
        shells.report()

    (line,) = caplog.messages
    report = json.loads(line)
    assert "\n" not in line
    assert ("counters", os.getpid()) == (report["event"], report["pid"])
    assert {"requests,outcome=refuse,reason=x": 2} == report["counters"]
    assert {"count": 2, "mean_ms": 500.0, "max_ms": 750.0} == report["times"][
        "exchange_seconds,result=answered"
    ]
    assert {
        "exchanged_entries", "exchanged_bytes", "verified_entries", "verified_bytes", "refusals", "flights",
    } == set(report["cache"])  # fmt: skip

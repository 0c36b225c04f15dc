"""Work in the background: bounded, shared between endpoints, and never in anybody's way."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable
from unittest.mock import patch

import pytest

from kong_token_exchange.shell.refresher import BackgroundRefresher
from tests.support.fakes import PATIENCE_S
from tests.support.running import eventually


class Held:
    """Work that waits until it is let go."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.release = threading.Event()
        self.done = threading.Semaphore(0)
        self.threads: set[str] = set()

    def __call__(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.begun.release()
        assert self.release.wait(PATIENCE_S)
        self.done.release()

    def wait_begun(self, count: int) -> None:
        for _ in range(count):
            assert self.begun.acquire(timeout=PATIENCE_S)

    def wait_done(self, count: int) -> None:
        self.release.set()
        for _ in range(count):
            assert self.done.acquire(timeout=PATIENCE_S)


def test_res_04_work_is_done_in_a_thread_of_its_own() -> None:
    refresher, work = BackgroundRefresher(), Held()

    assert refresher.offer(work, group="a")
    work.wait_begun(1)
    work.wait_done(1)
    assert {"refresh"} == work.threads


def test_res_04_more_than_the_bound_finds_no_place() -> None:
    refresher, work = BackgroundRefresher(max_threads=1, max_waiting=2), Held()
    assert refresher.offer(work, group="a")
    work.wait_begun(1)

    assert [True, True, False, False] == [refresher.offer(work, group="a") for _ in range(4)]
    work.wait_done(3)
    assert not work.done.acquire(blocking=False)
    # There is place again.
    assert refresher.offer(work, group="a")
    work.wait_done(1)


def test_res_05_an_endpoint_that_hangs_holds_its_share_of_threads() -> None:
    refresher = BackgroundRefresher(max_threads=3, max_threads_per_group=2)
    hanging, other = Held(), Held()
    for _ in range(5):
        assert refresher.offer(hanging, group="hangs")
    hanging.wait_begun(2)
    for _ in range(3):
        assert refresher.offer(other, group="works")

    # Behind the others in the queue, and done while they wait.
    other.wait_done(3)
    assert not hanging.begun.acquire(blocking=False)
    hanging.wait_begun(0)
    hanging.wait_done(5)


def test_res_05_what_comes_at_once_does_not_share_the_one_idle_thread() -> None:
    refresher, first, hanging, other = BackgroundRefresher(), Held(), Held(), Held()
    assert refresher.offer(first, group="a")
    first.wait_begun(1)
    first.wait_done(1)
    assert eventually(lambda: not refresher._working)

    with refresher._changed:
        # The idle thread is woken by the first of these, and cannot take it before the second is there.
        assert refresher.offer(hanging, group="hangs")
        assert refresher.offer(other, group="works")

    hanging.wait_begun(1)
    other.wait_begun(1)
    other.wait_done(1)
    hanging.wait_done(1)


def test_what_must_wait_for_its_share_gets_no_thread() -> None:
    refresher, hanging = BackgroundRefresher(max_threads_per_group=2), Held()
    for _ in range(2):
        assert refresher.offer(hanging, group="hangs")
    hanging.wait_begun(2)

    for _ in range(5):
        assert refresher.offer(hanging, group="hangs")
    assert 2 == refresher._threads
    hanging.wait_done(7)


def test_threads_are_bounded_reused_and_end() -> None:
    refresher, work = BackgroundRefresher(max_threads=2, idle_s=0.05), Held()
    for _ in range(6):
        refresher.offer(work, group="a")
    work.wait_begun(2)
    assert 2 == refresher._threads
    work.wait_done(6)

    ended = threading.Event()
    for _ in range(200):
        if not refresher._threads:
            break
        ended.wait(0.05)
    assert 0 == refresher._threads
    # And are made again.
    assert refresher.offer(work, group="a")
    work.wait_done(1)


@pytest.mark.parametrize("bug", [ValueError("mark"), SystemExit(3), KeyboardInterrupt("mark")])
def test_a_bug_ends_no_thread_and_tells_its_class_alone(
    bug: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    refresher, work = BackgroundRefresher(max_threads=1), Held()

    def fail() -> None:
        raise bug

    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert refresher.offer(fail, group="a")
        assert refresher.offer(work, group="a")
        work.wait_done(1)
    assert [f"renewing failed: {type(bug).__name__}"] * 3 == caplog.messages
    assert not any(record.exc_info for record in caplog.records)


def test_a_machine_without_threads_is_no_fault() -> None:
    refresher, work = BackgroundRefresher(), Held()
    with patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
        assert not refresher.offer(work, group="a")
    assert 0 == len(refresher._waiting)

    assert refresher.offer(work, group="a")
    work.wait_begun(1)
    with patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
        # The thread that runs does it later.
        assert refresher.offer(work, group="a")
    work.wait_done(2)


def test_nothing_of_work_that_is_done_stays_in_memory() -> None:
    class Mark:
        pass

    def make(done: threading.Semaphore) -> tuple[Callable[[], None], weakref.ref[Mark]]:
        mark = Mark()

        def work(mark: Mark = mark) -> None:
            assert mark is not None
            done.release()

        return work, weakref.ref(mark)

    refresher, done = BackgroundRefresher(max_threads=1), threading.Semaphore(0)
    gc.disable()
    try:
        work, mark = make(done)
        assert refresher.offer(work, group="a")
        del work
        assert done.acquire(timeout=PATIENCE_S)
        waited = threading.Event()
        for _ in range(200):
            if mark() is None:
                break
            waited.wait(0.05)
        assert mark() is None
    finally:
        gc.enable()

"""
The pool's bookkeeping and the caller behind `kong`, with the test in the loop's place.
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Self

import pytest

from kong_token_exchange.errors import LocalProtocolError
from kong_token_exchange.pluginserver import wire
from kong_token_exchange.pluginserver.contract import MAX_CALLS_PER_EVENT, Fetch
from kong_token_exchange.pluginserver.faults import make_faults
from kong_token_exchange.pluginserver.instances import Instance as Started
from kong_token_exchange.pluginserver.offload import Access, Called, Ended, EventOverError, Idle, Pool, Post
from kong_token_exchange.pluginserver.pdk import METHODS, Kong
from tests.protocol.test_contract import calls_of, frames_of
from tests.support.plugins import AUTHORIZATION, Instance, make_log

WAIT_S = 10.0
FAULTS = make_faults()


class Loop:
    """Takes posts; ends what the pool says has ended."""

    def __init__(self, *, threads: int = 2, queue_limit: int = 2, idle_s: float = 60.0) -> None:
        self.posts: SimpleQueue[Post] = SimpleQueue()
        self.log, self.lines = make_log()
        self.pool = Pool(
            threads=threads,
            queue_limit=queue_limit,
            faults=FAULTS,
            log=self.log,
            post=self.posts.put,
            idle_s=idle_s,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        assert kind is not None or self.pool.stop(WAIT_S)

    def access(
        self, run: Callable[[Kong], None], *, prefetch: Any = (), replies: tuple[bytes, ...] = ()
    ) -> Access:
        return Access(Started("p", Instance(prefetch=prefetch, access=run)), replies, None, self.posts.put)

    def submit(self, run: Callable[[Kong], None], **parts: Any) -> Access:
        access = self.access(run, **parts)
        assert self.pool.submit(access)
        return access

    def next(self) -> Post:
        post = self.posts.get(timeout=WAIT_S)
        if isinstance(post, Ended):
            self.pool.ended(post.access)
        return post

    def ended(self) -> Ended:
        post = self.next()
        assert isinstance(post, Ended)
        return post


class Gate:
    """A plugin that waits until the test lets it go."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.leave = threading.Event()

    def __call__(self, kong: Kong) -> None:
        self.entered.release()
        assert self.leave.wait(WAIT_S)


def test_access_that_returns_ends_with_what_it_queued() -> None:
    def run(kong: Kong) -> None:
        kong.service.request.set_header("a", "b")
        kong.log.notice("x")

    with Loop() as loop:
        loop.submit(run)
        outcome = loop.ended().outcome

    assert [("kong.service.request.set_header", ("a", "b")), ("kong.log.notice", ["x"])] == calls_of(outcome)
    assert (2, None) == (outcome.replies, outcome.status)


def test_call_leaves_with_what_was_queued_before_it() -> None:
    got: list[str] = []

    def run(kong: Kong) -> None:
        kong.ctx.shared.set("k", "v")
        got.append(kong.request.get_path())
        kong.log.info("x")

    with Loop() as loop:
        access = loop.submit(run)
        called = loop.next()
        assert isinstance(called, Called)
        access.deliver(wire.encode_string("/a"))
        outcome = loop.ended().outcome

    names = frames_of(called.frames)[::2]
    assert [b"kong.ctx.shared.set", b"kong.request.get_path"] == names
    assert 1 == called.replies
    assert ["/a"] == got
    assert 1 == outcome.replies


def test_prefetched_facts_need_no_round_trip() -> None:
    got: list[Any] = []

    def run(kong: Kong) -> None:
        got.append(kong.request.get_header("Authorization"))
        got.append(kong.request.get_header("authorization"))
        got.append(kong.request.get_method())

    with Loop() as loop:
        prefetch = (AUTHORIZATION, Fetch("kong.request.get_method"))
        loop.submit(run, prefetch=prefetch, replies=(wire.encode_string("Bearer x"), b""))
        loop.ended()

    assert ["Bearer x", "Bearer x", ""] == got


def test_a_fact_is_asked_again_after_the_upstream_request_was_changed() -> None:
    got: list[str] = []

    def run(kong: Kong) -> None:
        kong.log.info("x")
        got.append(kong.request.get_header("authorization"))
        kong.service.request.set_header("authorization", "new")
        got.append(kong.request.get_header("authorization"))

    with Loop() as loop:
        access = loop.submit(run, prefetch=(AUTHORIZATION,), replies=(wire.encode_string("old"),))
        called = loop.next()
        assert isinstance(called, Called)
        access.deliver(wire.encode_string("new"))
        loop.ended()

    assert ["old", "new"] == got
    assert 2 == called.replies


def test_gw_09_exit_ends_the_event_and_nothing_after_it_runs() -> None:
    after: list[str] = []

    def run(kong: Kong) -> None:
        kong.response.set_header("x", "y")
        kong.response.exit(401, "{}", {"a": "b"})
        after.append("ran")

    with Loop() as loop:
        loop.submit(run)
        outcome = loop.ended().outcome

    assert [
        ("kong.response.set_header", ("x", "y")),
        ("kong.response.exit", wire.ExitArgs(401, b"{}", {"a": "b"})),
    ] == calls_of(outcome)
    assert (1, 401) == (outcome.replies, outcome.status)
    assert [] == after


@pytest.mark.parametrize("how", ["except Exception", "except BaseException", "raise another"])
def test_exit_stands_whatever_the_plugin_does_with_it(how: str) -> None:
    def run(kong: Kong) -> None:
        try:
            kong.response.exit(403)
        except Exception:  # noqa: BLE001 - what a careless plugin does
            raise AssertionError("an exit is no Exception") from None
        except BaseException:
            if how == "except Exception":
                raise
            if how == "raise another":
                raise ValueError from None
        for call in (lambda: kong.response.exit(200), lambda: kong.log.info("x"), kong.request.get_path):
            with pytest.raises(EventOverError):
                call()

    with Loop() as loop:
        loop.submit(run)

        assert 403 == loop.ended().outcome.status


@pytest.mark.parametrize(
    "error",
    [
        ValueError("MARK"),
        SystemExit("MARK"),
        KeyboardInterrupt("MARK"),
        RecursionError(),
        MemoryError(),
        GeneratorExit(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_gw_02_any_exception_is_the_constant_500_and_the_thread_goes_on(error: BaseException) -> None:
    def run(kong: Kong) -> None:
        kong.service.request.set_header("a", "b")
        raise error

    with Loop(threads=1) as loop:
        loop.submit(run)
        assert FAULTS.server_error is loop.ended().outcome
        loop.submit(lambda kong: None)
        assert not loop.ended().outcome.is_exit
        assert 1 == loop.pool.size

    assert f"access failed: {type(error).__name__}" in loop.lines
    assert "MARK" not in loop.lines


def test_calls_of_one_event_are_limited() -> None:
    def run(kong: Kong) -> None:
        for _ in range(MAX_CALLS_PER_EVENT + 1):
            kong.log.info("x")

    with Loop() as loop:
        loop.submit(run)

        assert FAULTS.server_error is loop.ended().outcome
    assert "LocalProtocolError" in loop.lines


def test_a_call_with_an_answer_cannot_be_queued() -> None:
    access = Loop().access(lambda kong: None)
    with pytest.raises(LocalProtocolError):
        access.queue(METHODS["kong.request.get_path"], b"")


def test_event_that_ended_keeps_nothing_of_the_request() -> None:
    token = wire.encode_string("MARKED-TOKEN")

    def run(kong: Kong) -> None:
        kong.service.request.set_header("a", kong.request.get_header("authorization"))

    with Loop() as loop:
        access = loop.submit(run, prefetch=(AUTHORIZATION,), replies=(token,))
        loop.ended()
        access.forget()

    held = [getattr(access, name) for name in Access.__slots__ if name != "instance"]
    assert "MARKED-TOKEN" not in repr(held)
    assert access.ended


def test_threads_are_made_when_needed_and_a_full_pool_refuses() -> None:
    gate = Gate()
    with Loop(threads=2, queue_limit=1) as loop:
        assert 0 == loop.pool.size
        for size in (1, 2):
            loop.submit(gate)
            assert gate.entered.acquire(timeout=WAIT_S)
            assert size == loop.pool.size
        loop.submit(gate)
        refused = loop.access(gate)
        assert not loop.pool.submit(refused)
        assert 3 == loop.pool.busy

        gate.leave.set()
        for _ in range(3):
            assert not loop.ended().outcome.is_exit
        assert (2, 0) == (loop.pool.size, loop.pool.busy)
        loop.submit(gate)
        loop.ended()
        assert 2 == loop.pool.size


def test_idle_threads_are_used_before_new_ones() -> None:
    with Loop(threads=8) as loop:
        for _ in range(20):
            loop.submit(lambda kong: None)
            loop.ended()

        assert 1 == loop.pool.size


def test_event_abandoned_while_it_waits_for_a_thread_never_runs() -> None:
    gate, ran = Gate(), []
    with Loop(threads=1, queue_limit=1) as loop:
        loop.submit(gate)
        assert gate.entered.acquire(timeout=WAIT_S)
        waiting = loop.submit(lambda kong: ran.append(1))
        waiting.abandon()
        loop.pool.overdue(waiting)
        assert 0 == loop.pool.lost
        gate.leave.set()
        loop.ended()
        loop.ended()

    assert [] == ran


def test_gw_12_thread_that_waits_for_kong_is_freed_when_its_event_is_over() -> None:
    ended: list[str] = []

    def run(kong: Kong) -> None:
        try:
            kong.request.get_path()
        except EventOverError:
            ended.append("over")
            raise

    with Loop() as loop:
        access = loop.submit(run)
        assert isinstance(loop.next(), Called)
        access.abandon()
        loop.ended()

    assert ["over"] == ended
    assert [] == loop.lines.lines


def test_late_calls_of_an_event_that_is_over_raise() -> None:
    gate, raised = Gate(), []

    def run(kong: Kong) -> None:
        gate(kong)
        for call in (lambda: kong.log.info("x"), kong.request.get_path, lambda: kong.response.exit(200)):
            try:
                call()
            except EventOverError:
                raised.append(1)

    with Loop() as loop:
        access = loop.submit(run)
        assert gate.entered.acquire(timeout=WAIT_S)
        access.abandon()
        gate.leave.set()
        loop.ended()

    assert [1, 1, 1] == raised


def test_gw_05_res_12_lost_threads_are_replaced_up_to_a_bound_and_taken_back() -> None:
    gate = Gate()
    with Loop(threads=2, queue_limit=2) as loop:
        pool = loop.pool
        for number in range(4):
            access = loop.submit(gate)
            assert gate.entered.acquire(timeout=WAIT_S)
            access.abandon()
            pool.overdue(access)
            pool.overdue(access)
            assert number + 1 == pool.lost
        # Twice the pool's size is out there: no more threads, and events are refused at once.
        assert not pool.submit(loop.access(gate))
        assert (0, 0, 4) == (pool.size, pool.busy, pool.lost_total)

        gate.leave.set()
        for _ in range(4):
            loop.ended()
        assert (2, 0, 0) == (pool.size, pool.busy, pool.lost)
        loop.submit(lambda kong: None)
        loop.ended()
        assert (2, 0) == (pool.size, pool.busy)


def test_gw_05_event_that_waited_behind_a_lost_thread_gets_the_new_one() -> None:
    gate = Gate()
    with Loop(threads=1, queue_limit=1) as loop:
        first = loop.submit(gate)
        assert gate.entered.acquire(timeout=WAIT_S)
        second = loop.submit(lambda kong: None)
        first.abandon()
        loop.pool.overdue(first)

        assert second is loop.ended().access
        gate.leave.set()
        assert first is loop.ended().access
        assert (1, 0, 0) == (loop.pool.size, loop.pool.busy, loop.pool.lost)


def test_idle_threads_are_let_go() -> None:
    with Loop(idle_s=0.01) as loop:
        loop.submit(lambda kong: None)
        loop.ended()
        thread = next(iter(loop.pool._threads))
        assert isinstance(loop.next(), Idle)
        loop.pool.idle()
        thread.join(WAIT_S)

        assert not thread.is_alive()
        assert 0 == loop.pool.size
        loop.submit(lambda kong: None)
        while not isinstance(loop.next(), Ended):
            pass


def test_busy_threads_are_not_let_go() -> None:
    gate = Gate()
    with Loop() as loop:
        loop.submit(gate)
        loop.pool.idle()
        assert 1 == loop.pool.size
        gate.leave.set()
        loop.ended()


def test_housekeeping_runs_in_the_pool_and_may_fail() -> None:
    done = threading.Event()

    def fail() -> None:
        raise SystemExit

    with Loop() as loop:
        loop.pool.run(fail)
        loop.pool.run(done.set)
        assert done.wait(WAIT_S)
        assert 1 == loop.pool.size

    assert "housekeeping failed: SystemExit" in loop.lines


def test_no_thread_to_be_had_is_a_full_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    loop = Loop()
    monkeypatch.setattr(threading.Thread, "start", no_thread)

    assert not loop.pool.submit(loop.access(lambda kong: None))
    assert "no new thread: RuntimeError" in loop.lines


class Faltering:
    """A post that fails as often as it is told, before or after it was taken, as without memory."""

    def __init__(self, loop: Loop, kind: type[Post], *, times: int, after: bool = False) -> None:
        self._put, self._kind, self._after = loop.posts.put, kind, after
        self.left = times

    def __call__(self, item: Post) -> None:
        fails = isinstance(item, self._kind) and self.left > 0
        if not fails or self._after:
            self._put(item)
        if fails:
            self.left -= 1
            raise MemoryError("MARKED")


def test_thread_whose_idle_word_cannot_be_posted_goes_on() -> None:
    with Loop(threads=1, idle_s=0.01) as loop:
        loop.pool._post = Faltering(loop, Idle, times=2)
        loop.submit(lambda kong: None)
        loop.ended()
        assert isinstance(loop.next(), Idle)
        # An idle thread that nobody lets go is still there.
        loop.submit(lambda kong: None)
        while not isinstance(loop.next(), Ended):
            pass
        assert (1, 1) == (loop.pool.size, len(loop.pool._threads))

    assert "a thread of the pool failed: MemoryError" in loop.lines
    assert "MARKED" not in loop.lines


@pytest.mark.parametrize("after", [False, True], ids=["before-it-was-taken", "after"])
def test_end_of_an_event_that_cannot_be_posted_is_posted_again(after: bool) -> None:
    with Loop(threads=1) as loop:
        loop.pool._post = Faltering(loop, Ended, times=3, after=after)
        access = loop.submit(lambda kong: kong.log.info("x"))
        ends = [loop.posts.get(timeout=WAIT_S) for _ in range(4 if after else 1)]
        loop.pool.ended(access)
        assert {access} == {end.access for end in ends if isinstance(end, Ended)}
        loop.submit(lambda kong: None)
        loop.ended()
        assert (1, 0) == (loop.pool.size, loop.pool.busy)

    assert "the end of an event failed: MemoryError" in loop.lines


def test_what_fails_around_access_ends_the_event_with_500() -> None:
    with Loop(threads=1) as loop:
        access = loop.access(lambda kong: None, prefetch=(AUTHORIZATION,))
        access.prefetched = None  # type: ignore[assignment]
        assert loop.pool.submit(access)
        assert FAULTS.server_error is loop.ended().outcome

    assert "access failed: TypeError" in loop.lines


def test_thread_that_cannot_even_begin_an_event_ends_it_with_500(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Pool, access: Access) -> Any:
        raise SystemExit

    with Loop(threads=1) as loop:
        with monkeypatch.context() as patch:
            patch.setattr(Pool, "_outcome", fail)
            loop.submit(lambda kong: None)
            assert FAULTS.server_error is loop.ended().outcome
        loop.submit(lambda kong: None)
        assert not loop.ended().outcome.is_exit
        assert 1 == loop.pool.size


def test_thread_that_is_gone_is_counted_out_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with Loop(threads=1, queue_limit=4) as loop:
        with monkeypatch.context() as patch:
            patch.setattr(Pool, "_work", lambda self: None)
            waiting = loop.submit(lambda kong: None)
            (thread,) = loop.pool._threads
            thread.join(WAIT_S)
        assert (1, 1) == (loop.pool.size, loop.pool.busy)
        loop.pool.recount()

        assert waiting is loop.ended().access
        assert (1, 0) == (loop.pool.size, loop.pool.busy)
        loop.pool.recount()
        assert 1 == loop.pool.size

    assert ["a thread of the pool is gone"] == loop.lines.lines


def test_idle_thread_that_is_gone_is_counted_out_and_none_is_made_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Loop(threads=2) as loop:
        loop.submit(lambda kong: None)
        loop.ended()
        # As if the only thread had died of something that Python cannot catch.
        (thread,) = loop.pool._threads
        loop.pool._jobs.put(None)
        thread.join(WAIT_S)
        assert 1 == loop.pool.size
        loop.pool.recount()
        assert (0, 0) == (loop.pool.size, len(loop.pool._threads))
        loop.submit(lambda kong: None)
        loop.ended()
        assert 1 == loop.pool.size


def test_threads_that_leave_lose_no_count() -> None:
    with Loop(threads=2, idle_s=0.01) as loop:
        loop.submit(lambda kong: None)
        loop.ended()
        (thread,) = loop.pool._threads
        assert isinstance(loop.next(), Idle)
        loop.pool.idle()
        loop.pool.recount()
        thread.join(WAIT_S)
        loop.pool.recount()
        assert 0 == loop.pool.size

    assert [] == loop.lines.lines


@pytest.mark.parametrize(("threads", "queue_limit"), [(0, 1), (1, -1)])
def test_pool_without_threads_is_refused(threads: int, queue_limit: int) -> None:
    with pytest.raises(ValueError):
        Loop(threads=threads, queue_limit=queue_limit)

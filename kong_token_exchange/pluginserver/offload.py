"""
Where events go that cannot be answered from memory: a bounded pool of threads.

The loop keeps every socket and every count; a thread only runs `access`, posts what
it wants sent, and waits for an answer. So no lock is held between the two, and an
event whose thread hangs can be ended without it.

    thread  --post-->  loop      Called(frames), Ended(outcome), Idle
    loop    --inbox--> thread    the answer to a call, or None: the event is over

A thread that stays in `access` after its event ended is *lost*: another takes its
place, at most as many again as the pool is large, and when it returns after all it
is used again or let go.

What fails beside `access`, a post without memory for it for example, is tried again:
a thread that ended there would leave its event without an end. One that is gone all
the same is found by `recount`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import NoReturn

from kong_token_exchange.errors import LocalProtocolError
from kong_token_exchange.pluginserver.contract import MAX_CALLS_PER_EVENT, Outcome
from kong_token_exchange.pluginserver.faults import FaultLog, Faults
from kong_token_exchange.pluginserver.instances import Instance
from kong_token_exchange.pluginserver.pdk import METHODS, Kong, Method
from kong_token_exchange.pluginserver.wire import EMPTY_FRAME

# Pool size divided by the time of one exchange is how many a second can be done:
# 64 threads and 50 ms are 1,280.
DEFAULT_THREADS = 64

# Events that wait for a thread, per thread. More than the pool can begin within the
# deadline is better refused at once.
DEFAULT_QUEUE_FACTOR = 4

# A thread that had nothing to do for so long goes.
IDLE_S = 30.0

# Before what failed beside `access` is tried again: memory comes back when others let go of theirs.
RETRY_S = 0.01

_EXIT = METHODS["kong.response.exit"]
_GET_HEADER = "kong.request.get_header"


class EventOverError(BaseException):
    """
    Raised inside `access` when its event is over: exited, timed out, or the client left.

    Not an Exception, so that a plugin's `except Exception` does not swallow it.
    """


@dataclass(frozen=True, slots=True)
class Called:
    """A thread made calls; the last is waited for, *replies* empty answers come before it."""

    access: Access
    frames: bytes
    replies: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A thread is through with an event; *outcome* is how it should end."""

    access: Access
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Idle:
    """A thread had nothing to do for a while."""


Post = Called | Ended | Idle


class Access:
    """One event in the pool: the `Caller` behind the plugin's `kong`, and the loop's handle on it."""

    __slots__ = (
        "_calls",
        "_frames",
        "_inbox",
        "_known",
        "_post",
        "_replies",
        "again",
        "ended",
        "exit_outcome",
        "expires_at",
        "failed",
        "instance",
        "lost",
        "over",
        "owner",
        "prefetched",
        "received_at",
        "started",
    )

    def __init__(
        self,
        instance: Instance,
        prefetched: tuple[bytes, ...],
        owner: object,
        post: Callable[[Post], None],
        *,
        received_at: float | None = None,
    ) -> None:
        self.instance = instance
        self.prefetched = prefetched
        # When the event could not be answered from memory: waiting for a thread counts, too.
        self.received_at = time.monotonic() if received_at is None else received_at
        # What the loop wants back with the posts; the pool does not look at it.
        self.owner = owner
        # Written by the loop, read by the thread.
        self.over = False
        # Written by the thread, read by the loop.
        self.started = False
        self.failed = False
        self.again: Callable[[], Outcome | None] | None = None
        # The loop's own notes.
        self.expires_at = 0.0
        self.ended = False
        self.lost = False
        self.exit_outcome: Outcome | None = None
        self._post = post
        self._inbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._known: dict[tuple[str, bytes], bytes] = {}
        self._frames = bytearray()
        self._replies = 0
        self._calls = 0

    # --- the loop's side --------------------------------------------------------------

    def deliver(self, reply: bytes) -> None:
        """Hand Kong's answer to the thread that waits for it."""
        self._inbox.put(reply)

    def abandon(self) -> None:
        """End the event without the thread: its next call raises, a waiting one at once."""
        self.over = True
        self._inbox.put(None)

    def forget(self) -> None:
        """Let go of what the request said; the loop keeps the event a while for its timers."""
        self.ended = True
        self.owner = None
        self.again = None
        self.prefetched = ()
        self._known = {}
        self._frames = bytearray()

    # --- the thread's side ------------------------------------------------------------

    def prepare(self) -> None:
        """Lay the prefetched answers ready."""
        for (name, argument), reply in zip(self.instance.fetches, self.prefetched, strict=True):
            self._known[name, _memory_key(name, argument)] = reply

    def call(self, method: Method, argument: bytes) -> bytes:
        """
        Send a call, after those held back, and wait for Kong's answer.

        Raises:
            EventOverError: the event is over.
            LocalProtocolError: more calls than one event may make.
        """
        self._check_open()
        known = self._known.get((method.name, _memory_key(method.name, argument)))
        if known is not None:
            return known
        self._count()
        frames = bytes(self._frames) + method.call(argument)
        replies, self._replies = self._replies, 0
        self._frames.clear()
        self._post(Called(self, frames, replies))
        reply = self._inbox.get()
        if reply is None:
            raise EventOverError
        return reply

    def queue(self, method: Method, argument: bytes) -> None:
        """
        Hold a call back until one that needs an answer, or the end.

        Raises:
            EventOverError: the event is over.
            LocalProtocolError: more calls than one event may make, or a call with an answer.
        """
        self._check_open()
        if not method.reply_is_empty:
            raise LocalProtocolError(reason="call_not_pipelined", facts={"method": method.name})
        self._count()
        self._frames += method.call(argument)
        self._replies += 1
        if method.name.startswith("kong.service.request."):
            # Kong's getters see what its setters changed: ask it again from here on.
            self._known.clear()

    def exit(self, status: int, argument: bytes) -> NoReturn:
        """End the event; raises so that nothing after it runs (GW-09)."""
        self._check_open()
        self.exit_outcome = Outcome(bytes(self._frames) + _EXIT.call(argument), self._replies, status)
        raise EventOverError

    def share(self, again: Callable[[], Outcome | None]) -> None:
        """Offer what answers the events that wait for this one."""
        self.again = again

    def success(self) -> Outcome:
        """Return the outcome of an `access` that came to its end."""
        return Outcome(bytes(self._frames) + EMPTY_FRAME, self._replies)

    def _check_open(self) -> None:
        if self.over or self.exit_outcome is not None:
            raise EventOverError

    def _count(self) -> None:
        self._calls += 1
        if self._calls > MAX_CALLS_PER_EVENT:
            raise LocalProtocolError(reason="calls_over_limit")


def _memory_key(name: str, argument: bytes) -> bytes:
    # Header names are case-insensitive, to Kong too.
    return argument.lower() if name == _GET_HEADER else argument


class Pool:
    """
    Threads for `access`, made when needed; all counting happens on the loop.

    Args:
        threads: How many events run at the same time.
        queue_limit: How many more may wait.
        post: Called from the threads; hands a post to the loop and wakes it.
    """

    def __init__(
        self,
        *,
        threads: int,
        queue_limit: int,
        faults: Faults,
        log: FaultLog,
        post: Callable[[Post], None],
        idle_s: float = IDLE_S,
    ) -> None:
        if threads < 1 or queue_limit < 0:
            raise ValueError("a pool has at least one thread")
        self._limit = threads
        self._queue_limit = queue_limit
        self._faults = faults
        self._log = log
        self._post = post
        self._idle_s = idle_s
        self._jobs: SimpleQueue[Access | Callable[[], None] | None] = SimpleQueue()
        self._threads: set[threading.Thread] = set()
        # Threads at work or waiting for it, without the lost ones.
        self.size = 0
        # Events given to the pool that have not ended, without the lost ones.
        self.busy = 0
        self.lost = 0
        self.lost_total = 0

    def submit(self, access: Access) -> bool:
        """Take an event, or return False when the pool and its queue are full."""
        if self.busy >= self.size:
            self._spawn()
        if self.size == 0 or self.busy >= self.size + self._queue_limit:
            return False
        self.busy += 1
        self._jobs.put(access)
        return True

    def run(self, job: Callable[[], None]) -> None:
        """Run a short piece of housekeeping beside the events."""
        if self.size == 0:
            self._spawn()
        self._jobs.put(job)

    def ended(self, access: Access) -> None:
        """Note that a thread is through with *access*."""
        if not access.lost:
            self.busy -= 1
            return
        self.lost -= 1
        if self.size < self._limit:
            self.size += 1
        else:
            self._jobs.put(None)

    def overdue(self, access: Access) -> None:
        """Note that *access* still runs although its event ended, and replace its thread."""
        if access.ended or access.lost or not access.started:
            return
        access.lost = True
        self.lost += 1
        self.lost_total += 1
        self.busy -= 1
        self.size -= 1
        if self.busy > self.size:
            self._spawn()

    def idle(self) -> None:
        """Let one thread go that has nothing to do."""
        if self.size > self.busy:
            self.size -= 1
            self._jobs.put(None)

    def recount(self) -> None:
        """Take threads that are gone out of `size`, so that others are made in their place."""
        for thread in list(self._threads):
            if not thread.is_alive():
                self._threads.discard(thread)
        gone = min(self.size, self.size + self.lost - len(self._threads))
        if gone <= 0:
            return
        self._log.note("a thread of the pool is gone")
        self.size -= gone
        if self.busy > self.size:
            self._spawn()

    def stop(self, timeout_s: float) -> bool:
        """Let all threads go; return whether they went within *timeout_s*."""
        threads = list(self._threads)
        for _ in threads:
            self._jobs.put(None)
        for thread in threads:
            thread.join(max(0.0, timeout_s / len(threads)))
        return not any(thread.is_alive() for thread in threads)

    def _spawn(self) -> None:
        if self.size >= self._limit or self.size + self.lost >= 2 * self._limit:
            return
        # Daemons, so that one that hangs in a plugin does not keep the process alive.
        thread = threading.Thread(target=self._work, name="plugin-access", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            self._log.raised("no new thread", error)
            return
        self._threads.add(thread)
        self.size += 1

    # --- in the threads ---------------------------------------------------------------

    def _work(self) -> None:
        try:
            while True:
                try:
                    if not self._work_once():
                        return
                except BaseException as error:  # noqa: BLE001 - no memory for a moment must not cost a thread
                    self._log.raised("a thread of the pool failed", error)
                    time.sleep(RETRY_S)
        finally:
            self._threads.discard(threading.current_thread())

    def _work_once(self) -> bool:
        """Wait for one job and do it; return whether the thread goes on."""
        try:
            job = self._jobs.get(timeout=self._idle_s)
        except Empty:
            self._post(Idle())
            return True
        if job is None:
            return False
        if isinstance(job, Access):
            self._run_access(job)
        else:
            self._try("housekeeping", job)
        # The job goes with this frame: a token must not stay alive in an idle thread.
        return True

    def _run_access(self, access: Access) -> None:
        outcome = self._faults.server_error
        try:
            outcome = self._outcome(access)
        except BaseException as error:  # noqa: BLE001 - the event must end, whatever it takes
            self._log.raised("access failed", error)
        # The loop takes the end of an event once, so a post that failed half-way may be repeated.
        while not self._try("the end of an event", lambda: self._post(Ended(access, outcome))):
            time.sleep(RETRY_S)

    def _outcome(self, access: Access) -> Outcome:
        access.started = True
        outcome = self._faults.server_error
        try:
            if not access.over:
                access.prepare()
                access.instance.access(Kong(access, received_at=access.received_at, share=access.share))
                outcome = access.success()
        except EventOverError:
            pass
        except BaseException as error:  # noqa: BLE001 - SystemExit and its like must end the event too
            access.failed = True
            self._log.raised("access failed", error)
        # An exit stands, even if the plugin swallowed what `exit` raised.
        return access.exit_outcome or outcome

    def _try(self, what: str, job: Callable[[], None]) -> bool:
        try:
            job()
        except BaseException as error:  # noqa: BLE001 - a plugin's close() must not cost a thread
            self._log.raised(f"{what} failed", error)
            return False
        return True

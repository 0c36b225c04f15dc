"""
Several processes behind one socket path.

The supervisor accepts connections and passes each to the worker that holds the
fewest. It runs no plugin code and reads no byte of a conversation: sessions, pools,
threads and caches come into being in the workers, after the fork, since a TLS
session from before it can give one worker the answer meant for another.

    supervisor  --a connection-->             worker   (SCM_RIGHTS, one socket pair per worker)
    worker      --taken in all, open now-->   supervisor

A worker that dies takes its own connections with it and is replaced; the instances
stand in the journal. One whose loop no longer turns - stopped, in a call that does not
return, in an endless `warm` - sends no report; it is given no connection, then killed.
The path is taken once a worker is ready, so a server that cannot start leaves the one
that runs alone. A worker whose supervisor is gone drains and ends.

Source: docs/plugin-server.md; docs/adr/0002-own-plugin-server.md.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import resource
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from kong_token_exchange.pluginserver.connection import Host
from kong_token_exchange.pluginserver.contract import PluginType
from kong_token_exchange.pluginserver.faults import FaultLog, Faults
from kong_token_exchange.pluginserver.journal import Journal, JournalInstances
from kong_token_exchange.pluginserver.keeper import keeper_pid
from kong_token_exchange.pluginserver.loop import DEFAULT_DEADLINE_S, DRAIN_S, Loop, Peer
from kong_token_exchange.pluginserver.offload import DEFAULT_THREADS
from kong_token_exchange.pluginserver.parent import Handover, Parent
from kong_token_exchange.pluginserver.server import (
    DEFAULT_SOCKET_MODE,
    SocketPath,
    make_loop,
    raise_descriptor_limit,
    serve,
    stopped_by_signals,
)

# More would only share the machine's cores among more caches; a typing error is refused.
MAX_WORKERS = 64

# A worker that had been ready is replaced at once, then after pauses that double up to
# this: an event that kills its worker is sent again by Kong without delay.
MAX_RESTART_DELAY_S = 1.0
_FIRST_RESTART_DELAY_S = 0.05

# One that dies before it is ready has a reason that stays: a file, a library.
MAX_START_DELAY_S = 30.0
_FIRST_START_DELAY_S = 0.2

# With no worker ready and each place having failed so often in a row, the supervisor ends,
# so that Kong is refused at once and does not wait for its read timeout.
START_ATTEMPTS = 5

# A worker that lived so long begins with the shortest pause again.
STABLE_S = 10.0

# The loop drains for DRAIN_S, then gives its threads a second.
DRAIN_LIMIT_S = DRAIN_S + 3.0

# A worker's loop reports every second (`loop.HOUSE_S`), and whenever it takes a connection. One
# that is silent, or leaves one untaken, for so long gets no more.
SUSPECT_S = 2.5
UNTAKEN_S = 0.5

# After so much silence it is told to write where it stands, and then killed: well before Kong
# (60 s) or any deadline gives up on its events, well after any pause of a healthy process.
STUCK_S = 5.0
_LAST_WORDS_S = 0.5

# The same for one that is not ready yet.
START_LIMIT_S = 60.0

# How often it looks after its children and its parent when nothing happens.
_CHECK_S = 0.5
_SOON_S = 0.02

_ACCEPTS_PER_WAKE = 64
_REPORT = struct.Struct("<QQ")  # connections taken in all, open now

# Descriptors of a worker that are not Kong's connections: to issuers, files, libraries.
_SPARE_DESCRIPTORS = 512

# Writes the places where a worker's threads are to its standard error: files, lines, no values.
_TELL_SIGNAL = signal.SIGUSR2

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

logger = logging.getLogger(__name__)


def serve_workers(
    make_plugin: Callable[[], PluginType],
    *,
    workers: int,
    socket_path: str | os.PathLike[str],
    socket_mode: int = DEFAULT_SOCKET_MODE,
    socket_group: str | None = None,
    exit_with_parent: bool = False,
    threads: int = DEFAULT_THREADS,
    queue_limit: int | None = None,
    deadline_s: float = DEFAULT_DEADLINE_S,
    faults: Faults | None = None,
    ready: Callable[[], None] | None = None,
) -> int:
    """
    Serve a plugin at *socket_path* with *workers* processes until SIGTERM or SIGINT.

    One worker is this process itself, as `serve` does it.

    Args:
        make_plugin: Makes the plugin with its sessions and threads; called in every worker.
        workers: How many.
        socket_path: Where Kong connects; replaced if it is there.
        socket_mode: Permission bits of the socket.
        socket_group: Name or number of the socket's group.
        exit_with_parent: Whether to stop when the parent process is gone, and, at a reload of the
            gateway, a successor has the path; for what `keeper.keep` was called in.
        threads: Threads for `access`, of each worker.
        queue_limit: Events that may wait for one, in each worker.
        deadline_s: How long an `access` may take.
        faults: The constant answers to faults.
        ready: Called once connections are accepted.

    Returns:
        The exit status of the process: 0, or 1 when no worker can start.

    Raises:
        OSError, ValueError: the path cannot be bound, a number makes no sense.
    """
    if not 1 <= workers <= MAX_WORKERS:
        raise ValueError(f"workers must be between 1 and {MAX_WORKERS}")
    options: dict[str, Any] = {
        "threads": threads,
        "queue_limit": queue_limit,
        "deadline_s": deadline_s,
        "faults": faults,
    }
    parent = Parent(keeper_pid())
    if workers == 1:
        plugin = make_plugin()
        if exit_with_parent and parent.is_gone():
            return 0
        return serve(
            plugin,
            socket_path=socket_path,
            socket_mode=socket_mode,
            socket_group=socket_group,
            exit_with_parent=exit_with_parent,
            ready=ready,
            **options,
        )
    raise_descriptor_limit()
    supervisor = Supervisor(
        partial(run_worker, make_plugin, **options),
        partial(SocketPath, socket_path, socket_mode, socket_group),
        workers=workers,
        parent=parent if exit_with_parent else None,
        ready=ready,
    )
    with stopped_by_signals(supervisor), supervisor.passing_on(signal.SIGUSR1):
        return supervisor.run()


# --- the worker -----------------------------------------------------------------------


class WorkerLoop(Loop):
    """A loop whose connections come from a supervisor; it stops when the supervisor is gone."""

    def __init__(self, host: Host, make_pool: Any, *, control: socket.socket, **options: Any) -> None:
        super().__init__(host, make_pool, **options)
        self._control = control
        self._taken = 0
        control.setblocking(False)
        self.watch(control, self._on_control)

    def run(self) -> None:
        """Serve until told to stop."""
        self._report()
        super().run()

    def _on_control(self) -> None:
        for _ in range(_ACCEPTS_PER_WAKE):
            try:
                data, fds, _, _ = socket.recv_fds(self._control, 1, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                break
            except OSError:
                data, fds = b"", []
            if not data:
                self.unwatch(self._control)
                self.request_stop()
                return
            # Without its descriptor this process had none left; the supervisor heeds that limit.
            self._taken += 1
            for fd in fds:
                self.adopt(socket.socket(fileno=fd))
        self._report()

    def _drop(self, peer: Peer) -> None:
        super()._drop(peer)
        self._report()

    def _keep_house(self, now: float) -> None:
        super()._keep_house(now)
        self._report()

    def _report(self) -> None:
        # Totals, so a report that finds the pipe full is made good by the next one.
        with contextlib.suppress(OSError):
            self._control.send(_REPORT.pack(self._taken, len(self._peers)))


def run_worker(
    make_plugin: Callable[[], PluginType], control: socket.socket, journal: Journal, **options: Any
) -> None:
    """
    Serve the connections that arrive over *control* until SIGTERM or its end.

    Args:
        make_plugin: Makes the plugin.
        control: This worker's end of the pair; what is accepted arrives here.
        journal: Made before the fork.
        options: See `make_loop`.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):
        # Refused where standard error is no file.
        faulthandler.register(_TELL_SIGNAL)
    loop = make_loop(
        make_plugin(),
        make_registry=partial(_make_registry, journal),
        loop_class=partial(WorkerLoop, control=control),
        **options,
    )
    with stopped_by_signals(loop):
        loop.run()


def _make_registry(journal: Journal, plugin: PluginType, **options: Any) -> JournalInstances:
    return JournalInstances(plugin, journal, **options)


# --- the supervisor -------------------------------------------------------------------


class Worker:
    """A worker as its supervisor sees it."""

    __slots__ = (
        "control",
        "gone",
        "is_ready",
        "open",
        "pid",
        "sent",
        "silent_s",
        "started_at",
        "taken",
        "told",
        "untaken_s",
    )

    def __init__(self, pid: int, control: socket.socket, started_at: float) -> None:
        self.pid = pid
        self.control = control
        self.started_at = started_at
        self.is_ready = False
        # Its end of the pair is closed: it dies, or is dead already.
        self.gone = False
        self.sent = 0
        self.taken = 0
        self.open = 0
        # Time that its supervisor has seen pass without a report, and with a connection untaken.
        self.silent_s = 0.0
        self.untaken_s = 0.0
        # It has been told to write where it stands.
        self.told = False

    @property
    def answers(self) -> bool:
        """Tell whether its loop turns, as far as is known."""
        return self.silent_s < SUSPECT_S and self.untaken_s < UNTAKEN_S

    def passed(self, seconds: float) -> None:
        """Count time in which nothing was heard of it."""
        self.silent_s += seconds
        if self.sent > self.taken:
            self.untaken_s += seconds

    @property
    def load(self) -> int:
        """Return its connections, those under way to it included."""
        return self.open + self.sent - self.taken

    def read_reports(self) -> None:
        """Take in what it says of itself."""
        while True:
            try:
                report = self.control.recv(_REPORT.size)
            except BlockingIOError:
                return
            except OSError:
                report = b""
            if len(report) != _REPORT.size:
                self.gone = True
                return
            self.is_ready = True
            self.taken, self.open = _REPORT.unpack(report)
            self.silent_s = 0.0
            self.untaken_s = 0.0

    def pass_on(self, connection: socket.socket) -> bool:
        """Send it a connection; tell whether it went."""
        try:
            socket.send_fds(self.control, [b"c"], [connection.fileno()])
        except OSError:
            # Full, or dead: another one, or later.
            return False
        self.sent += 1
        return True


@dataclass(slots=True)
class Slot:
    """A place for a worker, with the history of those that were in it."""

    worker: Worker | None = None
    start_at: float = 0.0
    crashes: int = 0
    failed_starts: int = 0

    def fell_vacant(self, worker: Worker, now: float) -> None:
        """Note that *worker* is dead, and when the next may start."""
        self.worker = None
        if not worker.is_ready:
            self.failed_starts += 1
            delay = _FIRST_START_DELAY_S * 2 ** (self.failed_starts - 1)
            self.start_at = now + min(delay, MAX_START_DELAY_S)
            return
        self.failed_starts = 0
        self.crashes = 0 if now - worker.started_at >= STABLE_S else self.crashes + 1
        delay = _FIRST_RESTART_DELAY_S * 2 ** (self.crashes - 1) if self.crashes > 1 else 0.0
        self.start_at = now + min(delay, MAX_RESTART_DELAY_S)


class Supervisor:
    """
    Keep workers running and hand them connections.

    Args:
        work: What a worker does, given its control socket and the journal.
        make_listener: Takes the path; called once a worker is ready.
        workers: How many.
        parent: Stop when it is gone and a successor is there; None to outlive it.
        ready: Called once connections are accepted.
        drain_limit_s: How long workers may take to end.
        max_connections: Of each worker; by default what its descriptors allow.
    """

    def __init__(
        self,
        work: Callable[[socket.socket, Journal], None],
        make_listener: Callable[[], SocketPath],
        *,
        workers: int,
        parent: Parent | None = None,
        ready: Callable[[], None] | None = None,
        drain_limit_s: float = DRAIN_LIMIT_S,
        max_connections: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work = work
        self._make_listener = make_listener
        self._handover = Handover(parent, self._is_current) if parent is not None else None
        self._ready = ready
        self._drain_limit_s = drain_limit_s
        self._max_connections = max_connections or _connections_of_a_worker()
        self._clock = clock
        self._slots = [Slot() for _ in range(workers)]
        self._looked_at = clock()
        self._journal = Journal()
        self._epoll = select.epoll()
        self._listener: SocketPath | None = None
        self._accepting = False
        self._waiting: socket.socket | None = None
        self._stop_asked = False
        self._log = FaultLog(logger)
        self._wake_receive, self._wake_send = socket.socketpair()
        self._wake_receive.setblocking(False)
        self._wake_send.setblocking(False)
        self._epoll.register(self._wake_receive, select.EPOLLIN)

    # --- from a signal handler --------------------------------------------------------

    def request_stop(self) -> None:
        """Ask for an orderly end."""
        self._stop_asked = True
        with contextlib.suppress(OSError):
            self._wake_send.send(b"\0")

    def wake_fd(self) -> int:
        """Return the descriptor for `signal.set_wakeup_fd`."""
        return self._wake_send.fileno()

    @contextlib.contextmanager
    def passing_on(self, number: int) -> Iterator[None]:
        """Hand signal *number* on to every worker; outside of the main thread do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(number, self._pass_on)
        try:
            yield
        finally:
            signal.signal(number, before)

    def _pass_on(self, number: int, _frame: object) -> None:
        for worker in self._workers():
            with contextlib.suppress(OSError):
                os.kill(worker.pid, number)

    # --- the loop ---------------------------------------------------------------------

    def run(self) -> int:
        """Run until told to stop; return the exit status."""
        try:
            while not self._is_over():
                if self._has_given_up():
                    logger.error("no worker can start: giving up")
                    return 1
                self._step()
            return 0
        finally:
            self._drain()
            self._close()

    def _is_over(self) -> bool:
        return self._stop_asked or (self._handover is not None and self._handover.is_over())

    def _is_current(self) -> bool:
        return self._listener is not None and self._listener.is_current()

    def _has_given_up(self) -> bool:
        return all(slot.worker is None and slot.failed_starts >= START_ATTEMPTS for slot in self._slots)

    def _step(self) -> None:
        self._fill_slots()
        if self._listener is None and any(worker.is_ready for worker in self._workers()):
            self._listen()
        self._set_accepting(self._waiting is None and self._choose() is not None)
        events = self._epoll.poll(self._timeout())
        self._count_silence()
        for fd, _ in events:
            if self._listener is not None and fd == self._listener.socket.fileno():
                self._accept()
            elif fd == self._wake_receive.fileno():
                self._drain_wake()
            else:
                self._read_reports(fd)
        self._end_stuck()
        self._reap()
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._hand_over(waiting)

    def _timeout(self) -> float:
        if self._waiting is not None or any(worker.gone for worker in self._workers()):
            return _SOON_S
        starts = [slot.start_at for slot in self._slots if slot.worker is None]
        return max(0.0, min([_CHECK_S, *(at - self._clock() for at in starts)]))

    def _workers(self) -> Sequence[Worker]:
        return [slot.worker for slot in self._slots if slot.worker is not None]

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_receive.recv(4096)

    def _listen(self) -> None:
        self._listener = self._make_listener()
        self._listener.socket.setblocking(False)
        logger.info("%d workers listen on %s", len(self._slots), self._listener.path)
        if self._ready is not None:
            self._ready()

    # --- connections ------------------------------------------------------------------

    def _set_accepting(self, wanted: bool) -> None:  # noqa: FBT001 - a switch
        if self._listener is None or wanted == self._accepting:
            return
        # With no worker to take them, connections wait in the backlog.
        self._accepting = wanted
        if wanted:
            self._epoll.register(self._listener.socket, select.EPOLLIN)
        else:
            self._epoll.unregister(self._listener.socket)

    def _accept(self) -> None:
        assert self._listener is not None  # it was registered
        for _ in range(_ACCEPTS_PER_WAKE):
            if self._waiting is not None or self._choose() is None:
                return
            try:
                connection, _ = self._listener.socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                # Out of descriptors or memory: the backlog waits, and so do we.
                self._log.raised("accept failed", error)
                time.sleep(_SOON_S)
                return
            self._hand_over(connection)

    def _hand_over(self, connection: socket.socket) -> None:
        for worker in sorted(self._takers(), key=_by_load):
            if worker.pass_on(connection):
                connection.close()
                return
        # A close would say "unknown instance" to Kong, which repeats the event without bound.
        self._waiting = connection

    def _takers(self) -> Iterator[Worker]:
        for worker in self._workers():
            if worker.is_ready and worker.answers and not worker.gone and worker.load < self._max_connections:
                yield worker

    def _choose(self) -> Worker | None:
        return min(self._takers(), key=_by_load, default=None)

    def _read_reports(self, fd: int) -> None:
        for worker in self._workers():
            if worker.control.fileno() == fd:
                worker.read_reports()
                if worker.gone:
                    self._unwatch(worker)

    def _unwatch(self, worker: Worker) -> None:
        # Not left to `close`: a worker being forked holds the same end for a moment.
        with contextlib.suppress(OSError):
            self._epoll.unregister(worker.control)

    # --- workers ----------------------------------------------------------------------

    def _fill_slots(self) -> None:
        now = self._clock()
        for slot in self._slots:
            if slot.worker is None and slot.start_at <= now:
                self._start(slot)

    def _start(self, slot: Slot) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        supervisor_pid = os.getpid()
        # Blocked, so that a signal for the new worker does not run the supervisor's handler.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._become_worker(ours, theirs, supervisor_pid)  # pragma: no cover - see keeper.keep
        except OSError as error:
            ours.close()
            self._log.raised("no new worker", error)
            slot.start_at = self._clock() + MAX_RESTART_DELAY_S
            return
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
            theirs.close()
        slot.worker = Worker(pid, ours, self._clock())
        self._epoll.register(ours, select.EPOLLIN)

    def _become_worker(self, ours: socket.socket, theirs: socket.socket, supervisor_pid: int) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in _STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            # A worker that does not know it yet is not to die of it, and has nobody to hand it on to.
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
            # The other workers' pairs, too: an end held open here would hide the supervisor's death.
            for sock in self._inherited(ours):
                sock.close()
            self._epoll.close()
            parent = Parent(supervisor_pid)
            parent.signal_on_death()
            if not parent.is_gone():
                self._work(theirs, self._journal)
            status = 0
        except (OSError, ValueError) as error:
            # A file that is missing, a number that makes no sense: what an operator can mend.
            logger.error("a worker could not run: %s", error)  # noqa: TRY400 - a line, no traceback
        except BaseException as error:  # noqa: BLE001 - the supervisor's stack lies below
            self._log.raised("a worker failed", error)
        finally:
            # Nothing of the supervisor's may run in its child: no handler, no removal of the path.
            os._exit(status)

    def _inherited(self, ours: socket.socket) -> Iterator[socket.socket]:
        yield from (ours, self._wake_receive, self._wake_send)
        yield from (worker.control for worker in self._workers())
        if self._listener is not None:
            yield self._listener.socket
        if self._waiting is not None:
            yield self._waiting

    def _reap(self) -> None:
        for slot in self._slots:
            worker = slot.worker
            if worker is not None and (status := _exit_status(worker.pid)) is not None:
                worker.read_reports()
                self._unwatch(worker)
                worker.control.close()
                slot.fell_vacant(worker, self._clock())
                logger.warning("worker %d ended with status %d", worker.pid, status)

    def _count_silence(self) -> None:
        now = self._clock()
        # A pause of this process - it was stopped, the machine slept - is nobody's silence.
        seconds = min(now - self._looked_at, 2 * _CHECK_S)
        self._looked_at = now
        for worker in self._workers():
            worker.passed(seconds)

    def _end_stuck(self) -> None:
        for worker in self._workers():
            over_s = worker.silent_s - (STUCK_S if worker.is_ready else START_LIMIT_S)
            if over_s >= _LAST_WORDS_S:
                os.kill(worker.pid, signal.SIGKILL)
            elif over_s >= 0 and not worker.told:
                worker.told = True
                logger.error("worker %d does not answer: ending it", worker.pid)
                os.kill(worker.pid, _TELL_SIGNAL)

    # --- the end ----------------------------------------------------------------------

    def _drain(self) -> None:
        if self._listener is not None:
            self._listener.socket.close()
        left = {worker.pid for worker in self._workers()}
        for pid in left:
            os.kill(pid, signal.SIGTERM)
        end = self._clock() + self._drain_limit_s
        while left and self._clock() < end:
            left = {pid for pid in left if _exit_status(pid) is None}
            if left:
                time.sleep(_SOON_S)
        for pid in left:
            logger.warning("worker %d did not end in time", pid)
            os.kill(pid, signal.SIGKILL)
            _exit_status(pid, wait=True)

    def _close(self) -> None:
        if self._listener is not None:
            self._listener.remove()
            logger.info("stopped listening on %s", self._listener.path)
        for worker in self._workers():
            worker.control.close()
        if self._waiting is not None:
            self._waiting.close()
        self._epoll.close()
        self._wake_receive.close()
        self._wake_send.close()
        self._journal.close()


def _by_load(worker: Worker) -> tuple[int, int]:
    # Among equals the one that was given the fewest, so that short connections go round.
    return worker.load, worker.sent


def _exit_status(pid: int, *, wait: bool = False) -> int | None:
    try:
        reaped, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
    except ChildProcessError:
        return -1
    return os.waitstatus_to_exitcode(status) if reaped else None


def _connections_of_a_worker() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(limit - _SPARE_DESCRIPTORS, limit // 2)

"""
The loop that owns all sockets of one process.

One thread, edge-triggered epoll, one `recv` and one `send` per step of an event. A round takes up
to eight steps, then sends their answers: each one wakes Kong, which so finds several at once.
Events answered from memory never leave it; the others go to the pool and come
back as posts over a socket pair, or are parked while another one with the same
facts is there. No timer costs anything on the warm path: what waits for the end of
file after an exit waits equally long and stands in a `deque`, and the deadlines of
cold events, which differ, stand in a heap.

What arrives is looked at where it lies (MSG_PEEK) and taken out of the socket later. So should
this process be killed, the kernel tells Kong of a reset, for which it answers 500. At an end of
file it would start the instance again at once, perhaps over a pooled socket that has died as
well: then its Lua raises and keeps its claim on the instance, and for 10 s nobody is served.
Where this server closes a connection on purpose, it takes everything first: an end of file.

It takes a listening socket, or connections that another process accepted
(`adopt`), or both.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from kong_token_exchange.pluginserver.connection import (
    Abandon,
    Close,
    Connection,
    Deliver,
    Host,
    Linger,
    RunAccess,
    State,
)
from kong_token_exchange.pluginserver.contract import Facts, Outcome, Patience
from kong_token_exchange.pluginserver.faults import FaultLog
from kong_token_exchange.pluginserver.offload import Access, Called, Ended, Idle, Pool, Post
from kong_token_exchange.pluginserver.parking import MAX_PARKED, Group, Parking

# What one recv takes: a call with a large token is 4 KB, the socket buffer 208 KB.
RECV_BYTES = 64 * 1024

# What Kong may have under way, the kernel's own default, and the size of a page. Once Kong has filled it,
# the kernel tells it of room when something goes and no more than a quarter is left.
ROOM_BYTES = 208 * 1024
PAGE_BYTES = 4096

# How much is left in a socket that was looked at: some five events. It takes up to 1.6 times as much of
# Kong's room, so less than that quarter: a frame is two pieces, each 768 bytes and what is in it, padded.
# Of a piece from which one byte is kept all counts, 37 KB at the most.
LEFT_BYTES = 30 * 1024
_FRAME_BYTES = 2 * 768
_PIECE_BYTES = 24 * 1024

# Kong gives up on a plugin after lua_socket_read_timeout, 60 s by default; a plugin's own
# deadline (5 s) comes first, and this one catches a plugin that forgot its own.
DEFAULT_DEADLINE_S = 10.0
KONG_READ_TIMEOUT_S = 60.0

# End of file follows an exit within a millisecond; a gateway that is stopped sends none.
LINGER_S = 1.0

# How long running events may take to end once the server was told to stop.
DRAIN_S = 5.0

# Unsent bytes of one connection: the largest event's frames, doubled. A peer that
# does not read is no gateway.
MAX_UNSENT_BYTES = 8 * 1024 * 1024

_ACCEPTS_PER_WAKE = 64

# Steps of a round, whose answers are sent together: the first one waits for some 50 us of others.
ROUND_EVENTS = 8

# Rounds that follow each other while there is that much to do, before anything else gets its turn.
_ROUNDS = 16

# Parked events that land in one round, by number and by time, and deadlines that pass in it: what is
# warm goes on in between.
SLICE_EVENTS = 64
SLICE_S = 0.001

# Failed rounds in a row after which the process gives up; a round that works starts anew.
_MAX_FAILURES = 100

# Instances whose grace is over are closed, and a pause of accepting ends, this often.
HOUSE_S = 1.0

_READ, _WRITE = select.EPOLLIN, select.EPOLLOUT
_GONE = select.EPOLLHUP | select.EPOLLRDHUP | select.EPOLLERR
_PEER = _READ | select.EPOLLRDHUP | select.EPOLLET

# Python has no name for it; `<asm-generic/socket.h>`.
_SO_PEEK_OFF = 42

logger = logging.getLogger(__name__)


def _look_from(sock: socket.socket, offset: int) -> None:
    # MSG_PEEK begins there, and each time where the last one ended.
    sock.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, offset)


@cache
def can_look() -> bool:
    """Tell whether the kernel lets us look at a stream piece by piece: Linux 4.3 and later do."""
    if os.sysconf("SC_PAGE_SIZE") > PAGE_BYTES:
        return False
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        try:
            _look_from(ours, 0)
            seen = []
            for pieces in ((b"a", b"b"), (b"c",)):
                for piece in pieces:
                    theirs.send(piece)
                seen.append(ours.recv(9, socket.MSG_PEEK))
            with contextlib.suppress(BlockingIOError):
                seen.append(ours.recv(9, socket.MSG_PEEK))
            theirs.close()
            seen += [ours.recv(9, socket.MSG_PEEK), ours.recv(2), ours.recv(9)]
        except OSError:
            return False
    return seen == [b"ab", b"c", b"", b"ab", b"c"]


class Peer:
    """One socket with its conversation."""

    __slots__ = (
        "access",
        "actions",
        "connection",
        "ended",
        "fd",
        "kept",
        "look",
        "receive",
        "recv",
        "recv_into",
        "send",
        "socket",
        "unsent",
        "untaken",
    )

    def __init__(self, sock: socket.socket, connection: Connection) -> None:
        self.socket = sock
        self.fd = sock.fileno()
        self.connection = connection
        self.recv = sock.recv
        self.recv_into = sock.recv_into
        self.send = sock.send
        self.receive = connection.receive
        self.actions = connection.actions
        self.unsent = bytearray()
        # Bytes that the connection has, and the socket still, too.
        self.untaken = 0
        self.look = 0
        # Kong's socket has the room that this one has, since both have the kernel's default.
        if can_look() and sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= ROOM_BYTES:
            _look_from(sock, 0)
            self.look = socket.MSG_PEEK
        # What the piece of the first of them takes up beside it.
        self.kept = 0
        # Kong has left.
        self.ended = False
        self.access: Access | None = None


@dataclass(frozen=True, slots=True)
class Stats:
    """How the server stands."""

    connections: int
    threads: int
    busy: int
    lost_threads: int
    lost_threads_total: int
    faults: int
    refused_full: int
    timed_out: int
    parked: int
    shared: int


class Loop:
    """
    Serve connections until told to stop.

    Args:
        host: The plugin and its instances.
        make_pool: Makes the pool, given where its threads post; called once.
        deadline_s: How long an event may be in the pool, counted from its arrival.
        max_parked: How many events may wait for another one's `access`.
    """

    def __init__(
        self,
        host: Host,
        make_pool: Callable[[Callable[[Post], None]], Pool],
        *,
        deadline_s: float = DEFAULT_DEADLINE_S,
        linger_s: float = LINGER_S,
        drain_s: float = DRAIN_S,
        house_s: float = HOUSE_S,
        max_parked: int = MAX_PARKED,
        log: FaultLog | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < deadline_s < KONG_READ_TIMEOUT_S:
            raise ValueError(f"deadline_s must be below Kong's read timeout, {KONG_READ_TIMEOUT_S:g} s")
        self._pool = make_pool(self.post)
        self._host = host
        self._deadline_s = deadline_s
        self._linger_s = linger_s
        self._drain_s = drain_s
        self._log = log or host.log
        self._clock = clock
        self._epoll = select.epoll()
        self._peers: dict[int, Peer] = {}
        # Where bytes go that the connection has already.
        self._waste = bytearray(RECV_BYTES)
        self._listener: socket.socket | None = None
        self._accept_paused = False
        self._posts: deque[Post | Callable[[], None]] = deque()
        self._wake_receive, self._wake_send = socket.socketpair()
        self._wake_receive.setblocking(False)
        self._wake_send.setblocking(False)
        # What else is read from: the wake-up, the listener, a supervisor's control socket.
        self._watched: dict[int, Callable[[], None]] = {}
        self.watch(self._wake_receive, self._on_wake)
        self._parking = Parking(max_parked)
        self._deadlines: list[tuple[float, int, Access]] = []
        self._order = itertools.count()
        self._lingering: deque[tuple[float, Peer]] = deque()
        self._house_s = house_s
        self._now = clock()
        self._next_house = self._now + house_s
        self._stop_at: float | None = None
        self._stop_asked = False
        # Answers of this round that are not sent yet, and how much was looked at for them.
        self._due: deque[tuple[Peer, bytes, int]] = deque()
        self._refused_full = 0
        self._timed_out = 0
        self._shared = 0
        # A round broke off, and has had the only word of what lies in some sockets.
        self._missed = False
        can_look()

    # --- from anywhere ----------------------------------------------------------------

    def post(self, item: Post | Callable[[], None]) -> None:
        """Hand something to the loop from any thread."""
        self._posts.append(item)
        self.wake()

    def wake(self) -> None:
        """Make the loop look at its posts; safe in any thread and in a signal handler."""
        # Full: it is awake already. Closed: a lost thread posts after the end.
        with contextlib.suppress(OSError):
            self._wake_send.send(b"\0")

    def wake_fd(self) -> int:
        """Return the descriptor for `signal.set_wakeup_fd`."""
        return self._wake_send.fileno()

    def request_stop(self) -> None:
        """Ask for an orderly end: accept no more, let running events end, return from `run`."""
        self._stop_asked = True
        self.wake()

    def stats(self) -> Stats:
        """Return how the server stands; exact on the loop's thread, close to it elsewhere."""
        pool = self._pool
        return Stats(
            connections=len(self._peers),
            threads=pool.size,
            busy=pool.busy,
            lost_threads=pool.lost,
            lost_threads_total=pool.lost_total,
            faults=self._log.total,
            refused_full=self._refused_full,
            timed_out=self._timed_out,
            parked=self._parking.parked,
            shared=self._shared,
        )

    # --- sockets in -------------------------------------------------------------------

    def listen(self, listener: socket.socket) -> None:
        """Accept connections from *listener*, which is listening already; before `run`."""
        listener.setblocking(False)
        self._listener = listener
        self.watch(listener, self._accept)

    def watch(self, sock: socket.socket, readable: Callable[[], None]) -> None:
        """Call *readable* on the loop's thread whenever *sock* can be read."""
        self._watched[sock.fileno()] = readable
        self._epoll.register(sock, _READ)

    def unwatch(self, sock: socket.socket) -> None:
        """Undo `watch`."""
        if self._watched.pop(sock.fileno(), None) is not None:
            self._epoll.unregister(sock)

    def adopt(self, sock: socket.socket) -> None:
        """Serve a connection that was accepted elsewhere; on the loop's thread, or as a post."""
        sock.setblocking(False)
        peer = Peer(sock, Connection(self._host))
        try:
            self._epoll.register(peer.fd, _PEER)
        except BaseException:
            sock.close()
            raise
        self._peers[peer.fd] = peer

    def _accept(self) -> None:
        listener = self._listener
        assert listener is not None  # watched only while there is one
        for _ in range(_ACCEPTS_PER_WAKE):
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                # Out of descriptors or memory: the backlog waits, and so do we, since
                # epoll would report it again at once.
                self._log.raised("accept failed", error)
                self.unwatch(listener)
                self._accept_paused = True
                return
            self.adopt(sock)

    # --- the loop ---------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `stop`; closes every socket it was given, the listener included."""
        failures = 0
        try:
            while not self._finished():
                try:
                    if self._missed:
                        self._send_due()
                        self._look_at_all()
                        self._missed = False
                    self._step()
                    failures = 0
                except Exception as error:
                    # Whoever started the process starts it anew; until then Kong answers 500.
                    failures += 1
                    self._missed = True
                    self._log.raised("the loop failed", error)
                    if failures >= _MAX_FAILURES:
                        raise
        finally:
            self.close()

    def _step(self) -> None:
        timeout = self._timeout()
        for _ in range(_ROUNDS):
            if self._round(timeout) < ROUND_EVENTS:
                break
            timeout = 0.0
        if self._posts:
            self._take_posts()
        self._now = now = self._clock()
        if self._deadlines or self._lingering or self._stop_asked:
            self._check_timers(now)
        if now >= self._next_house:
            self._keep_house(now)

    def _round(self, timeout: float) -> int:
        peers = self._peers
        ready = self._epoll.poll(timeout, ROUND_EVENTS)
        for fd, event in ready:
            peer = peers.get(fd)
            if peer is None:
                # Without either it was closed earlier in this round.
                if fd in self._watched:
                    self._watched[fd]()
            elif event == _READ:
                self._read(peer)
            else:
                self._look_into(peer, event)
        if self._due:
            self._send_due()
        return len(ready)

    def _look_into(self, peer: Peer, event: int) -> None:
        if event & _WRITE:
            self._flush(peer)
        self._read(peer)
        if event & _GONE:
            # Behind what could still be read comes the end.
            self._look_again(peer)

    def _read(self, peer: Peer) -> None:
        try:
            data = peer.recv(RECV_BYTES, peer.look)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # ECONNRESET and its like say what end of file says.
        try:
            if data:
                peer.untaken += len(data)
                self._due.append((peer, peer.receive(data), len(data)))
            else:
                peer.ended = True
                peer.connection.gone()
                self._act(peer)
        except BaseException as error:  # noqa: BLE001 - one connection's fault stays its own
            self._on_fault(peer, error)
        if len(data) == RECV_BYTES:
            self._look_again(peer)

    def _send_due(self) -> None:
        """Send the answers of this round, do what else they ask for, and see that Kong has room."""
        due = self._due
        while due:
            peer, out, seen = due.popleft()
            try:
                if out:
                    self._write(peer, out)
                if peer.actions:
                    self._act(peer)
                if peer.untaken + peer.kept + peer.connection.frames * _FRAME_BYTES > LEFT_BYTES:
                    self._make_room(peer, seen)
            except BaseException as error:  # noqa: BLE001 - one connection's fault stays its own
                self._on_fault(peer, error)

    def _make_room(self, peer: Peer, seen: int) -> None:
        """
        Take out of the socket what the connection has already, but for one byte: that makes a kill a reset.

        It is there, so this never waits. *seen* is how much the last look saw.
        """
        if peer.connection.state is State.DEAD:
            return
        # The first look since the last time may have gone on in the piece where that one ended.
        before = peer.kept if peer.untaken == seen + 1 else 0
        peer.kept = min(before + seen + _FRAME_BYTES, _PIECE_BYTES)
        left, peer.untaken, peer.connection.frames = peer.untaken - 1, 1, 0
        while left > 0 and peer.look:
            left -= peer.recv_into(self._waste, min(left, RECV_BYTES)) or left

    def _look_again(self, peer: Peer) -> None:
        """Have the next round see *peer* again, since no edge tells of what is there already."""
        if self._peers.get(peer.fd) is peer:
            self._epoll.modify(peer.fd, _PEER | _WRITE if peer.unsent else _PEER)

    def _look_at_all(self) -> None:
        for peer in list(self._peers.values()):
            try:
                if peer.look:
                    # A look that failed half-way may have moved it.
                    _look_from(peer.socket, peer.untaken)
                self._look_again(peer)
            except OSError as error:
                self._on_fault(peer, error)

    def _write(self, peer: Peer, data: bytes) -> None:
        if peer.unsent:
            peer.unsent += data
            if len(peer.unsent) > MAX_UNSENT_BYTES:
                peer.connection.gone()
            return
        try:
            sent = peer.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            peer.ended = True
            peer.connection.gone()
            return
        if sent < len(data):
            peer.unsent += data[sent:]
            self._epoll.modify(peer.fd, _PEER | _WRITE)

    def _flush(self, peer: Peer) -> None:
        try:
            sent = peer.send(peer.unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            peer.ended = True
            peer.connection.gone()
            self._act(peer)
            return
        del peer.unsent[:sent]
        self._look_again(peer)

    def _on_wake(self) -> None:
        # More than a buffer of them would be reported again.
        with contextlib.suppress(BlockingIOError):
            self._wake_receive.recv(4096)

    def _on_fault(self, peer: Peer, error: BaseException) -> None:
        self._log.raised("a connection failed", error)
        try:
            out = peer.connection.fail()
            if out:
                self._write(peer, out)
            self._act(peer)
        except BaseException as second:  # noqa: BLE001 - nothing is left but to let go of it
            self._log.raised("a connection failed twice", second)
            peer.ended = True
            self._drop(peer)
        if peer.connection.state is State.DEAD:
            # What was to close it may have been what failed.
            self._drop(peer)

    # --- what connections ask for -----------------------------------------------------

    def _act(self, peer: Peer) -> None:
        actions = peer.connection.actions
        while actions:
            action = actions.pop(0)
            match action:
                case RunAccess():
                    self._offload(peer, action)
                case Deliver(reply):
                    if peer.access is not None:
                        peer.access.deliver(reply)
                case Abandon():
                    access, peer.access = peer.access, None
                    if access is not None:
                        self._abandon(access)
                case Linger():
                    self._lingering.append((self._clock() + self._linger_s, peer))
                case Close():  # pragma: no branch - the last kind there is
                    self._drop(peer)

    def _offload(self, peer: Peer, action: RunAccess) -> None:
        instance, facts = action.instance, action.facts
        access = Access(instance, action.replies, peer, self.post, received_at=self._clock())
        patience = instance.coalesce(facts) if instance.coalesce is not None else None
        self._run_or_park(peer, access, facts, patience)

    def _run_or_park(self, peer: Peer, access: Access, facts: Facts, patience: Patience | None) -> None:
        group = self._parking.find(access) if patience is not None else None
        if group is not None and patience is not None:
            if self._parking.park(access, group):
                peer.access = access
                peer.connection.park()
                self._watch(access, min(patience.within_s, self._deadline_s))
                return
        elif self._pool.submit(access):
            peer.access = access
            self._watch(access, self._deadline_s)
            if patience is not None:
                self._parking.lead(access, facts, patience)
            return
        self._refused_full += 1
        self._log.note("the pool is full: answering 503", level=logging.WARNING)
        peer.access = None
        # It may have a deadline, from when it was parked.
        access.forget()
        self._end(peer, self._host.faults.overloaded)

    def _watch(self, access: Access, seconds: float) -> None:
        """Let *access* expire so long after its arrival; a second call may only make it later."""
        first = not access.expires_at
        access.expires_at = access.received_at + seconds
        if first:
            heapq.heappush(self._deadlines, (access.expires_at, next(self._order), access))

    def _abandon(self, access: Access) -> None:
        if self._parking.leave(access):
            access.forget()
        else:
            access.abandon()

    def _end(self, peer: Peer, outcome: Outcome) -> None:
        out = peer.connection.overrule(outcome)
        self._write(peer, out)

    def _drop(self, peer: Peer) -> None:
        if self._peers.get(peer.fd) is peer:
            del self._peers[peer.fd]
            self._epoll.unregister(peer.fd)
            if not peer.ended:
                self._end_the_stream(peer)
            peer.socket.close()

    def _end_the_stream(self, peer: Peer) -> None:
        """Make the close that follows an end of file for Kong, whatever lies in the socket."""
        with contextlib.suppress(OSError):
            peer.socket.shutdown(socket.SHUT_RDWR)
            while peer.recv_into(self._waste):
                pass

    # --- what threads post ------------------------------------------------------------

    def _take_posts(self) -> None:
        posts = self._posts
        while posts:
            item = posts.popleft()
            match item:
                case Called() | Ended():
                    self._on_access(item)
                case Idle():
                    self._pool.idle()
                case _:
                    item()

    def _on_access(self, item: Called | Ended) -> None:
        access = item.access
        peer, over = access.owner, access.over
        if isinstance(item, Ended):
            if access.ended:
                return  # told twice: the first post had only half failed
            self._pool.ended(access)
            self._parking.end(access, self._fail_too if access.failed else access.again)
            access.forget()
        else:
            # What it asks Kong for may differ from one event to the next.
            self._parking.end(access, alone=True)
        if over:
            return
        assert isinstance(peer, Peer)  # `_offload` put it there
        try:
            if isinstance(item, Called):
                out = peer.connection.call(item.frames, item.replies)
            else:
                peer.access = None
                out = peer.connection.finish(item.outcome)
            self._write(peer, out)
            self._act(peer)
        except BaseException as error:  # noqa: BLE001 - one connection's fault stays its own
            self._on_fault(peer, error)

    # --- events that waited for another one's access ----------------------------------

    def _fail_too(self) -> Outcome:
        return self._host.faults.server_error

    def _land(self) -> None:
        """Let some of those land whose owner is through."""
        end = self._clock() + SLICE_S
        for _ in range(SLICE_EVENTS):
            found = self._parking.next()
            if found is None:
                return
            self._settle(*found)
            if self._clock() >= end:
                return

    def _settle(self, group: Group, access: Access) -> None:
        peer = access.owner
        assert isinstance(peer, Peer)  # `_offload` put it there
        try:
            out = peer.connection.settle(group.facts, group.again)
            if out is None:
                peer.connection.unpark()
                self._run_or_park(peer, access, group.facts, None if group.alone else group.patience)
            else:
                self._shared += 1
                peer.access = None
                access.forget()
                self._write(peer, out)
            self._act(peer)
        except BaseException as error:  # noqa: BLE001 - one connection's fault stays its own
            self._on_fault(peer, error)

    def _give_up(self, access: Access, group: Group) -> None:
        """End a parked event that has waited for too long."""
        peer = access.owner
        assert isinstance(peer, Peer)  # `_offload` put it there
        self._parking.leave(access)
        peer.access = None
        access.forget()
        self._timed_out += 1
        try:
            self._write(peer, peer.connection.finish(group.patience.overdue(group.facts)))
            self._act(peer)
        except BaseException as error:  # noqa: BLE001 - one connection's fault stays its own
            self._on_fault(peer, error)

    # --- time -------------------------------------------------------------------------

    def _timeout(self) -> float:
        soonest = self._next_house
        if self._deadlines:
            # A parked event has a deadline, so this is asked only while there are some.
            if self._parking.is_landing:
                return 0.0
            soonest = min(soonest, self._deadlines[0][0])
        if self._lingering and self._lingering[0][0] < soonest:
            soonest = self._lingering[0][0]
        if self._stop_at is not None and self._stop_at < soonest:
            soonest = self._stop_at
        return max(0.0, soonest - self._now)

    def _check_timers(self, now: float) -> None:
        deadlines, lingering = self._deadlines, self._lingering
        if self._parking.is_landing:
            self._land()
        slice_end = now + SLICE_S
        while deadlines and (deadlines[0][2].ended or deadlines[0][0] <= now):
            self._expire(heapq.heappop(deadlines)[2], now)
            if self._clock() >= slice_end:
                break
        while lingering and (lingering[0][0] <= now or lingering[0][1].connection.state is State.DEAD):
            peer = lingering.popleft()[1]
            if peer.unsent and peer.connection.state is not State.DEAD:
                # Half an exit and then end of file is a lost instance to Kong: wait on.
                lingering.append((now + self._linger_s, peer))
                continue
            peer.connection.close()
            self._act(peer)
        if self._stop_asked:
            self._begin_stop(now)

    def _expire(self, access: Access, now: float) -> None:
        if access.ended:
            return
        if access.expires_at > now:
            # It was parked until now, and is in the pool since.
            heapq.heappush(self._deadlines, (access.expires_at, next(self._order), access))
            return
        group = self._parking.group_of(access)
        if group is not None and group.owner is not access:
            self._give_up(access, group)
            return
        # Nobody waits longer for a thread that hangs.
        self._parking.end(access)
        if not access.over:
            peer = access.owner
            assert isinstance(peer, Peer)  # `_offload` put it there
            self._timed_out += 1
            self._log.note("an event passed its deadline: answering 504", level=logging.WARNING)
            self._end(peer, self._host.faults.timed_out)
            self._act(peer)
        self._pool.overdue(access)

    def _keep_house(self, now: float) -> None:
        self._next_house = now + self._house_s
        if self._accept_paused and self._listener is not None:
            self._accept_paused = False
            self.watch(self._listener, self._accept)
        self._pool.recount()
        for instance in self._host.expire():
            self._pool.run(instance.close)

    # --- the end ----------------------------------------------------------------------

    def _begin_stop(self, now: float) -> None:
        if self._stop_at is None:
            self._stop_at = now + self._drain_s
            self._close_listener()
        for peer in list(self._peers.values()):
            if peer.connection.is_quiet():
                # What arrived meanwhile is still served.
                self._read(peer)
                self._send_due()
            if peer.connection.is_quiet() and not peer.unsent:
                peer.connection.close()
                self._act(peer)

    def _finished(self) -> bool:
        if self._stop_at is None:
            return False
        return not self._peers or self._clock() >= self._stop_at

    def _close_listener(self) -> None:
        if self._listener is not None:
            self.unwatch(self._listener)
            self._listener.close()
            self._listener = None

    def close(self) -> None:
        """Close every socket at once; `run` does so at its end."""
        if self._epoll.closed:
            return
        self._send_due()
        self._close_listener()
        for peer in list(self._peers.values()):
            # Who gives up does as one who is killed.
            peer.ended = peer.ended or (self._stop_at is None and not peer.connection.is_quiet())
            peer.connection.close()
            self._act(peer)
        self._pool.stop(timeout_s=1.0)
        self._epoll.close()
        self._wake_receive.close()
        self._wake_send.close()

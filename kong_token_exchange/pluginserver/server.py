"""
One plugin on one socket path, in one process.

The path is taken by binding to a temporary name and renaming, since a reload of
Kong starts the new process while the old one still serves: the old one keeps its
open connections and, when it ends, removes the path only if it is still its own.

Source: docs/plugin-socket.md; docs/adr/0002-own-plugin-server.md.
"""

from __future__ import annotations

import contextlib
import grp
import logging
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

from kong_token_exchange.pluginserver.connection import Host, Limits
from kong_token_exchange.pluginserver.contract import Outcome, PluginType
from kong_token_exchange.pluginserver.faults import FaultLog, Faults, make_faults
from kong_token_exchange.pluginserver.instances import InstanceRegistry, LocalInstances
from kong_token_exchange.pluginserver.keeper import keeper_pid
from kong_token_exchange.pluginserver.loop import DEFAULT_DEADLINE_S, Loop
from kong_token_exchange.pluginserver.offload import DEFAULT_QUEUE_FACTOR, DEFAULT_THREADS, Pool, Post
from kong_token_exchange.pluginserver.parent import Handover, Parent

# The owner alone: Kong starts the server as the user its workers run as. A sidecar under
# another user needs a group and 0660, in a directory of its own.
DEFAULT_SOCKET_MODE = 0o600

# Kong opens a connection per event in flight, up to its pool of 256 per worker and beyond.
_BACKLOG = 4096

# sun_path of Linux holds 108 bytes with the closing NUL.
_MAX_PATH_BYTES = 107

logger = logging.getLogger(__name__)


class MakeRegistry(Protocol):
    """Makes the registry of a process."""

    def __call__(self, plugin: PluginType, *, failure: Outcome, log: FaultLog) -> InstanceRegistry:
        """Make it."""


class Stoppable(Protocol):
    """What a signal can ask to end in good order."""

    def request_stop(self) -> None:
        """Ask for an orderly end; safe in a signal handler and in any thread."""

    def wake_fd(self) -> int:
        """Return the descriptor for `signal.set_wakeup_fd`."""


class SocketPath:
    """A listening unix socket at a path that another process may take over."""

    def __init__(
        self, path: str | os.PathLike[str], mode: int = DEFAULT_SOCKET_MODE, group: str | None = None
    ) -> None:
        """
        Bind, listen, and put the socket at *path*, replacing what is there.

        Args:
            path: Where; in a directory of its own if others share the machine.
            mode: Permission bits.
            group: Name or number of the group it belongs to; this process's by default.

        Raises:
            OSError: the path cannot be bound, or the group not given.
            ValueError: the path is too long for a unix socket, or the group unknown.
        """
        group_id = -1 if group is None else _group_id(group)
        self.path = Path(path)
        temporary = Path(f"{self.path}.{os.getpid()}")
        if len(os.fsencode(temporary)) > _MAX_PATH_BYTES:
            raise ValueError(f"the socket path is longer than {_MAX_PATH_BYTES - 8} bytes: {self.path}")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            temporary.unlink(missing_ok=True)
            self.socket.bind(os.fspath(temporary))
            # Nobody can connect before `listen`, so the mode is right from the first connection.
            if group_id != -1:
                os.chown(temporary, -1, group_id)
            temporary.chmod(mode)
            self.socket.listen(_BACKLOG)
            status = temporary.lstat()
            self._identity = (status.st_dev, status.st_ino)
            # While this is open the inode number goes to nobody else: draining begins with the
            # listener's end, long before `remove`, and a newer server may take the path meanwhile.
            self._pin = os.open(temporary, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            temporary.rename(self.path)
        except BaseException:
            self.socket.close()
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def is_current(self) -> bool:
        """Tell whether the path still leads here: nobody has taken it over or removed it."""
        try:
            status = self.path.lstat()
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._identity

    def remove(self) -> None:
        """Remove the path if it is still this socket's."""
        with contextlib.suppress(OSError):
            if self.is_current():
                self.path.unlink()
        with contextlib.suppress(OSError):
            os.close(self._pin)


def _group_id(group: str) -> int:
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ValueError(f"no such group: {group}") from None


def make_loop(
    plugin: PluginType,
    *,
    threads: int = DEFAULT_THREADS,
    queue_limit: int | None = None,
    deadline_s: float = DEFAULT_DEADLINE_S,
    faults: Faults | None = None,
    limits: Limits | None = None,
    log: FaultLog | None = None,
    make_registry: MakeRegistry | None = None,
    loop_class: Callable[..., Loop] = Loop,
) -> Loop:
    """
    Put a loop together for *plugin*; give it sockets with `listen` or `adopt`.

    Args:
        plugin: What to serve.
        threads: How many events run `access` at the same time.
        queue_limit: How many more may wait for a thread; four per thread by default.
        deadline_s: After so long an `access` is answered with 504; below Kong's read
            timeout, 60 s.
        faults: The constant answers to faults, see `make_faults`.
        limits: How much of Kong's bytes is held.
        log: Where faults are noted.
        make_registry: Makes the registry of instances; one of this process alone by default.
        loop_class: Takes the place of `Loop`.
    """
    chosen_faults = faults or make_faults()
    chosen_log = log or FaultLog(logger)
    waiting = threads * DEFAULT_QUEUE_FACTOR if queue_limit is None else queue_limit
    registry = (make_registry or LocalInstances)(plugin, failure=chosen_faults.server_error, log=chosen_log)
    host = Host(plugin, registry, faults=chosen_faults, log=chosen_log, limits=limits)

    def make_pool(post: Callable[[Post], None]) -> Pool:
        return Pool(threads=threads, queue_limit=waiting, faults=chosen_faults, log=chosen_log, post=post)

    return loop_class(host, make_pool, deadline_s=deadline_s)


def serve(
    plugin: PluginType,
    *,
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
    Serve *plugin* at *socket_path* until SIGTERM or SIGINT.

    Args:
        plugin: What to serve.
        socket_path: Where Kong connects; replaced if it is there.
        socket_mode: Permission bits of the socket.
        socket_group: Name or number of the socket's group; this process's by default.
        exit_with_parent: Whether to stop when the parent process is gone, and, at a reload of the
            gateway, a successor has the path; for what `keeper.keep` was called in.
        threads: See `make_loop`.
        queue_limit: See `make_loop`.
        deadline_s: See `make_loop`.
        faults: See `make_loop`.
        ready: Called once connections are accepted.

    Returns:
        The exit status of the process, 0.

    Raises:
        OSError, ValueError: the path cannot be bound, a number makes no sense.
    """
    parent = Parent(keeper_pid())
    raise_descriptor_limit()
    # First, since numbers that make no sense must not cost a running server its path.
    loop = make_loop(plugin, threads=threads, queue_limit=queue_limit, deadline_s=deadline_s, faults=faults)
    try:
        listener = SocketPath(socket_path, socket_mode, socket_group)
        try:
            loop.listen(listener.socket)
            logger.info("plugin %s listens on %s", plugin.name, socket_path)
            handover = Handover(parent, listener.is_current) if exit_with_parent else None
            with stopped_by_signals(loop), handover.watched(loop) if handover else nullcontext():
                if ready is not None:
                    ready()
                loop.run()
        finally:
            listener.remove()
            logger.info("plugin %s stopped listening on %s", plugin.name, socket_path)
    finally:
        loop.close()
    return 0


@contextlib.contextmanager
def stopped_by_signals(loop: Stoppable) -> Iterator[None]:
    """End *loop* in good order on SIGTERM and SIGINT; in another thread than the main one do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: loop.request_stop()) for number in signals]
    wakeup_before = signal.set_wakeup_fd(loop.wake_fd(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def raise_descriptor_limit() -> None:
    """Allow this process and its children as many descriptors as it may have."""
    # Every connection is one: 256 per gateway worker and more under load.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

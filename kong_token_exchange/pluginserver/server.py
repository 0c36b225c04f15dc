"""
One plugin on one socket path, in one process.

The path is taken by binding to a temporary name and renaming, since a reload of
Kong starts the new process while the old one still serves: the old one keeps its
open connections and, when it ends, removes the path only if it is still its own.

Source: docs/plugin-socket.md; docs/adr/0002-own-plugin-server.md.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from kong_token_exchange.pluginserver.connection import Host, Limits
from kong_token_exchange.pluginserver.contract import PluginType
from kong_token_exchange.pluginserver.faults import FaultLog, Faults, make_faults
from kong_token_exchange.pluginserver.instances import LocalInstances
from kong_token_exchange.pluginserver.loop import DEFAULT_DEADLINE_S, Loop
from kong_token_exchange.pluginserver.offload import DEFAULT_QUEUE_FACTOR, DEFAULT_THREADS, Pool, Post

# The owner alone: Kong starts the server as the user its workers run as. A sidecar under
# another user needs a group and 0660, in a directory of its own.
DEFAULT_SOCKET_MODE = 0o600

# Kong opens a connection per event in flight, up to its pool of 256 per worker and beyond.
_BACKLOG = 4096

# sun_path of Linux holds 108 bytes with the closing NUL.
_MAX_PATH_BYTES = 107

logger = logging.getLogger(__name__)


class SocketPath:
    """A listening unix socket at a path that another process may take over."""

    def __init__(self, path: str | os.PathLike[str], mode: int = DEFAULT_SOCKET_MODE) -> None:
        """
        Bind, listen, and put the socket at *path*, replacing what is there.

        Raises:
            OSError: the path cannot be bound.
            ValueError: the path is too long for a unix socket.
        """
        self.path = Path(path)
        temporary = Path(f"{self.path}.{os.getpid()}")
        if len(os.fsencode(temporary)) > _MAX_PATH_BYTES:
            raise ValueError(f"the socket path is longer than {_MAX_PATH_BYTES - 8} bytes: {self.path}")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            temporary.unlink(missing_ok=True)
            self.socket.bind(os.fspath(temporary))
            # Nobody can connect before `listen`, so the mode is right from the first connection.
            temporary.chmod(mode)
            self.socket.listen(_BACKLOG)
            status = temporary.lstat()
            self._identity = (status.st_dev, status.st_ino)
            temporary.rename(self.path)
        except BaseException:
            self.socket.close()
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def remove(self) -> None:
        """Remove the path if it is still this socket's."""
        with contextlib.suppress(OSError):
            status = self.path.lstat()
            if (status.st_dev, status.st_ino) == self._identity:
                self.path.unlink()


def make_loop(
    plugin: PluginType,
    *,
    threads: int = DEFAULT_THREADS,
    queue_limit: int | None = None,
    deadline_s: float = DEFAULT_DEADLINE_S,
    faults: Faults | None = None,
    limits: Limits | None = None,
    log: FaultLog | None = None,
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
    """
    chosen_faults = faults or make_faults()
    chosen_log = log or FaultLog(logger)
    waiting = threads * DEFAULT_QUEUE_FACTOR if queue_limit is None else queue_limit
    registry = LocalInstances(plugin, failure=chosen_faults.server_error, log=chosen_log)
    host = Host(plugin, registry, faults=chosen_faults, log=chosen_log, limits=limits)

    def make_pool(post: Callable[[Post], None]) -> Pool:
        return Pool(threads=threads, queue_limit=waiting, faults=chosen_faults, log=chosen_log, post=post)

    return Loop(host, make_pool, deadline_s=deadline_s)


def serve(
    plugin: PluginType,
    *,
    socket_path: str | os.PathLike[str],
    socket_mode: int = DEFAULT_SOCKET_MODE,
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
    _raise_descriptor_limit()
    # First, since numbers that make no sense must not cost a running server its path.
    loop = make_loop(plugin, threads=threads, queue_limit=queue_limit, deadline_s=deadline_s, faults=faults)
    try:
        listener = SocketPath(socket_path, socket_mode)
        try:
            loop.listen(listener.socket)
            logger.info("plugin %s listens on %s", plugin.name, socket_path)
            with _stopped_by_signals(loop):
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
def _stopped_by_signals(loop: Loop) -> Iterator[None]:
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


def _raise_descriptor_limit() -> None:
    # Every connection is one: 256 per gateway worker and more under load.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

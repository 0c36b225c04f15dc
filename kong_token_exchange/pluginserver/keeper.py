"""
A small process between a gateway and the plugin server it starts.

Kong ends what it started with the worker that started it: SIGTERM, and SIGKILL as soon as
that worker's Lua VM is closed, some 25 ms later. No event can end in that time, and at a
reload the next server may not listen yet. So the process that Kong knows is this one, and
the server is its child, which outlives it for as long as `parent.Handover` says.

It is a Python without site packages that waits: no thread, no socket, some 8 MB.

    gateway  --start_cmd, SIGTERM, SIGKILL-->  keeper  --SIGTERM, SIGINT, SIGUSR1-->  server
    gateway  <--exit status--                  keeper  <--exit status--               server

Source: Kong 3.9.1, kong/runloop/plugin_servers/process.lua; lua-nginx-module 0.10.26,
ngx_http_lua_pipe.c; docs/plugin-socket.md, section Reload.
"""

# Runs as a program, too, and then without this package on its path: the standard library alone.

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

# How often the parent's id is compared; the server goes on meanwhile.
CHECK_S = 1.0

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A gateway's log tells the keeper's id: what is sent there is meant for the server.
_SIGNALS = (*_STOP_SIGNALS, signal.SIGUSR1, signal.SIGCHLD)

# The title of an nginx worker that another one has replaced (ngx_process_cycle.c). At a reload
# it sends SIGTERM when its successor runs already; one that is stopped has no such title.
_REPLACED = b"worker process is shutting down"


# Of this process, if it has one.
_keepers: list[int] = []


def keeper_pid() -> int | None:
    """
    Return the id of this process's keeper; None without one.

    It may be dead already, and another process the parent: that is for the caller to notice.
    """
    return _keepers[-1] if _keepers else None


def keep() -> None:
    """
    Go on in a child process; what was this process waits for it and never returns.

    To be called before anything else: what is there is there twice afterwards.

    Raises:
        OSError: no process can be made.
    """
    parent, own = os.getppid(), os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # From here on until it is waited for: a signal in between is not lost.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    child = os.fork()
    if child:
        _become_keeper(child, parent)
    # Coverage begins anew in a forked child, and this call began before: so too for workers.
    _keepers.append(own)  # pragma: no cover
    signal.pthread_sigmask(signal.SIG_SETMASK, before)  # pragma: no cover


def _become_keeper(child: int, parent: int) -> None:
    status = 1
    try:
        if sys.executable and Path(__file__).is_file():
            # A program of its own: `ps` tells it from the server, and its memory is its own.
            arguments = [sys.executable, "-I", "-S", __file__, str(child), str(parent)]
            os.execv(sys.executable, arguments)  # noqa: S606 - no shell is the point
        status = watch(child, parent)
    finally:
        os._exit(status)


def watch(child: int, parent: int) -> int:
    """
    Wait for the end of *child*, or of *parent*.

    Returns:
        The exit status: the child's, 128 and more for a signal; 0 when the parent is gone,
        which the child notices by the end of this process.
    """
    while True:
        told = signal.sigtimedwait(_SIGNALS, CHECK_S)
        if (status := _exit_status(child)) is not None:
            return status
        if os.getppid() != parent:
            return 0
        if told is not None and _is_passed_on(told.si_signo, parent):
            os.kill(child, told.si_signo)


def _is_passed_on(number: int, parent: int) -> bool:
    if number in _STOP_SIGNALS:
        return not _is_replaced(parent)
    return number != signal.SIGCHLD


def _exit_status(child: int) -> int | None:
    reaped, status = os.waitpid(child, os.WNOHANG)
    if not reaped:
        return None
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _is_replaced(parent: int) -> bool:
    try:
        return _REPLACED in Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return False


if __name__ == "__main__":  # pragma: no cover - run isolated (`-I -S`), where nothing looks on
    sys.exit(watch(int(sys.argv[1]), int(sys.argv[2])))

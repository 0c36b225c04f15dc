"""
Probes for a plugin server that runs beside Kong: is it alive, is it ready.

Ready means that an instance could be started now: a worker took the connection and
its loop told the plugin's name and description. No instance is started for the
question. Alive means that somebody listens.

Source: docs/plugin-server.md.
"""

from __future__ import annotations

import os
import socket
import time

from kong_token_exchange.errors import RemoteProtocolError
from kong_token_exchange.pluginserver import wire

DEFAULT_TIMEOUT_S = 2.0

# A plugin's schema is some 100 KB; what is longer is no plugin server's answer.
MAX_ANSWER_BYTES = 4 * 1024 * 1024

_RECV_BYTES = 64 * 1024

# Fields of RpcReturn.
_SEQUENCE, _PLUGIN_NAMES, _PLUGIN_INFO = 1, 31, 32


def is_alive(socket_path: str | os.PathLike[str], timeout_s: float = DEFAULT_TIMEOUT_S) -> bool:
    """Tell whether somebody listens at *socket_path*."""
    try:
        _connect(socket_path, timeout_s).close()
    except OSError:
        return False
    return True


def is_ready(socket_path: str | os.PathLike[str], timeout_s: float = DEFAULT_TIMEOUT_S) -> bool:
    """
    Tell whether an instance could be started at *socket_path* now.

    Args:
        socket_path: The plugin server's socket.
        timeout_s: For all of it.
    """
    end = time.monotonic() + timeout_s
    try:
        with _connect(socket_path, timeout_s) as sock:
            names = _ask(sock, wire.GetPluginNames(1), _PLUGIN_NAMES, end)
            name = wire.decode_text(names.get(1, b""))
            info = _ask(sock, wire.GetPluginInfo(2, name), _PLUGIN_INFO, end)
            return bool(name) and wire.decode_text(info.get(1, b"")) == name
    except (OSError, RemoteProtocolError):
        return False


def _connect(socket_path: str | os.PathLike[str], timeout_s: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(os.fspath(socket_path))
    except BaseException:
        sock.close()
        raise
    return sock


def _ask(sock: socket.socket, call: wire.RpcCall, member: int, end: float) -> dict[int, int | bytes]:
    sock.sendall(wire.frame(wire.encode_call(call)))
    reader = wire.FrameReader(MAX_ANSWER_BYTES)
    while (answer := reader.next_frame()) is None:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)
        data = sock.recv(_RECV_BYTES)
        if not data:
            raise ConnectionResetError
        reader.feed(data)
    members = dict(wire.read_fields(answer))
    body = members.get(member)
    if members.get(_SEQUENCE) != call.sequence or not isinstance(body, bytes):
        raise ConnectionError("not what a plugin server answers")
    return dict(wire.read_fields(body))

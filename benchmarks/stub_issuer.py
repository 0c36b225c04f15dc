"""
An issuer that costs next to nothing: constant answers over kept connections, plain and TLS.

It says how long each answer to `/token` was in its hands, so that its own time can be told from
its caller's.
"""

from __future__ import annotations

import json
import multiprocessing
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self

TOKEN_PATH, SLOW_PATH, KEYS_PATH = "/token", "/slow", "/keys"

_RECV_BYTES = 64 * 1024


@dataclass(frozen=True)
class StubSettings:
    """What the stub answers: the bodies, the time `/slow` takes in seconds, and its certificate."""

    token_answer: bytes
    keys: bytes
    certificate: Path
    delay_s: float


@dataclass
class _Served:
    """Own times of `/token` and `/slow`, seconds."""

    seconds: list[float] = field(default_factory=list)


class StubIssuer:
    """The stub in a process of its own, from entering to leaving."""

    def __init__(self, settings: StubSettings) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(settings, theirs), daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        self.plain_port, self.tls_port = self._pipe.recv()
        self.pid = self._process.pid
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join(10)
        self._pipe.close()

    def own_times(self) -> list[float]:
        """Return the seconds of each answer to a token request since the last call."""
        self._pipe.send(None)
        times: list[float] = self._pipe.recv()
        return times


def _serve(settings: StubSettings, pipe: Connection) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(settings.certificate)
    served = _Served()
    ports = []
    for tls in (None, context):
        listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        ports.append(listener.getsockname()[1])
        threading.Thread(target=_accept, args=(listener, tls, settings, served), daemon=True).start()
    pipe.send(tuple(ports))
    while True:
        pipe.recv()
        pipe.send(served.seconds)
        served.seconds = []


def _accept(
    listener: socket.socket, tls: ssl.SSLContext | None, settings: StubSettings, served: _Served
) -> None:
    while True:
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_talk, args=(sock, tls, settings, served), daemon=True).start()


def _talk(sock: socket.socket, tls: ssl.SSLContext | None, settings: StubSettings, served: _Served) -> None:
    answers = {
        TOKEN_PATH: _message(settings.token_answer),
        SLOW_PATH: _message(settings.token_answer),
        KEYS_PATH: _message(settings.keys),
    }
    if tls is not None:
        sock = tls.wrap_socket(sock, server_side=True)
    with sock:
        while True:
            path = _read_request(sock)
            if path is None:
                return
            began = time.perf_counter()
            if path == SLOW_PATH:
                time.sleep(settings.delay_s)
            if path != KEYS_PATH:
                # Before it is sent: who has the answer must find its time, too.
                served.seconds.append(time.perf_counter() - began)
            sock.sendall(answers[path])


def _read_request(sock: socket.socket) -> str | None:
    """Read one request with `Content-Length` or without a body; return its path."""
    data = bytearray()
    while b"\r\n\r\n" not in data:
        received = sock.recv(_RECV_BYTES)
        if not received:
            return None
        data += received
    head, _, body = bytes(data).partition(b"\r\n\r\n")
    lines = head.decode("ascii").split("\r\n")
    lengths = [int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length:")]
    missing = (lengths[0] if lengths else 0) - len(body)
    while missing > 0:
        missing -= len(sock.recv(_RECV_BYTES))
    return lines[0].split(" ")[1]


def _message(body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode("ascii") + body


def token_answer(token: str, *, expires_in: int) -> bytes:
    """Return the answer of RFC 8693 section 2.2.1 with *token* in it."""
    return json.dumps(
        {
            "access_token": token,
            "expires_in": expires_in,
            "issued_token_type": "urn:ietf:params:oauth:token-type:access_token",
            "token_type": "Bearer",
        }
    ).encode()

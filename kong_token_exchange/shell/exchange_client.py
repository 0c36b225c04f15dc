"""
Exchanges over `http.client`: one request at a time, within one absolute deadline, at little cost.

Nothing is followed, kept or taken from the environment. Connections are pooled here; one is used
again only where its last answer ended as it announced, it is neither old nor idle for long, and
nothing lies unread on it. A request is sent a second time only where the first copy cannot have been
acted on: see `Call.may_repeat`.

Source: docs/adr/0006-http-client.md; docs/threats.md EXC-27, FAULT-21; docs/performance.md.
"""

from __future__ import annotations

import contextlib
import http.client
import select
import ssl
import threading
import time
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from kong_token_exchange import __version__
from kong_token_exchange.errors import NonConformingResponseError
from kong_token_exchange.protocol.http_message import HttpRequest, HttpResponse
from kong_token_exchange.shell.connections import Call, DeadlineSender, Resolve, Reuse, connect

# Idle connections kept for each token endpoint: one for each thread that may exchange; one too few
# means a TLS handshake for each request above it.
_POOL_SIZE = 64

_CHUNK = 16 * 1024

_FIXED_HEADERS = {"Accept-Encoding": "identity", "User-Agent": f"kong-token-exchange/{__version__}"}


class ExchangeSender(DeadlineSender):
    """Implements `ports.HttpSender` over `http.client`; arguments as `DeadlineSender`."""

    trouble = (http.client.HTTPException, OSError, ValueError)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._pools: dict[_Origin, _Pool] = {}

    def _send(self, request: HttpRequest, max_body: int, call: Call) -> HttpResponse:
        origin, target = _split(request.url)
        call.remaining()
        pool = self._pools.get(origin) or self._pools.setdefault(origin, _Pool())
        connection = pool.take() or self._open(origin)
        try:
            headers = {**request.headers, **_FIXED_HEADERS}
            connection.request(request.method, target, body=request.body or None, headers=headers)
            connection.flush()
            response = connection.getresponse()
            # Closed by itself: where the answer ends with its connection, that has let go of it already.
            with contextlib.closing(response):
                body = _read_body(response, max_body)
        except BaseException:
            # Half a request or answer is left on the connection: it must not serve another one.
            connection.close()
            raise
        if connection.sock is not None:
            pool.put(connection)
        return HttpResponse(status=response.status, headers=_fold(response.getheaders()), body=body)

    def _open(self, origin: _Origin) -> _Connection:
        scheme, host, port = origin
        connection = _Connection(host, port, self._context if scheme == "https" else None, self._resolve)
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """Close the pooled connections."""
        for pool in self._pools.values():
            pool.close()


_Origin = tuple[str, str, int]


# Endpoints come from configuration and discovery: a few for each issuer.
@lru_cache(256)
def _split(url: str) -> tuple[_Origin, str]:
    """Return origin and request target."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("no http URL")
    secure = parts.scheme == "https"
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return (parts.scheme, parts.hostname, parts.port or (443 if secure else 80)), target


def _read_body(response: http.client.HTTPResponse, max_body: int) -> bytes:
    if response.status < 200:
        # An early hint, which http.client takes for the answer. The answer itself still comes and
        # would be read as that of the next request, with somebody else's token in it.
        raise NonConformingResponseError(reason="response_status", facts={"http_status": response.status})
    if (response.headers.get("content-encoding") or "identity").lower() != "identity":
        raise NonConformingResponseError(reason="response_encoded")
    if len(set(response.headers.get_all("content-length", ()))) > 1:
        raise http.client.HTTPException("two lengths")
    announced = response.length
    if (announced or 0) > max_body:
        raise NonConformingResponseError(reason="response_too_long")
    body = bytearray()
    while chunk := response.read(_CHUNK):
        body += chunk
        if len(body) > max_body:
            raise NonConformingResponseError(reason="response_too_long")
    if announced is not None and len(body) < announced:
        raise http.client.IncompleteRead(b"")
    if not body and announced is None and not response.chunked:
        # No length and no body: http.client takes a head that was cut off for a whole one.
        raise http.client.HTTPException("cut off in the head")
    return bytes(body)


def _fold(headers: list[tuple[str, str]]) -> dict[str, str]:
    """Return headers by lower-case name; several of one name are one list (RFC 9110 section 5.2)."""
    folded: dict[str, str] = {}
    for name, value in headers:
        key = name.lower()
        folded[key] = f"{folded[key]}, {value}" if key in folded else value
    return folded


class _Connection(Reuse, http.client.HTTPConnection):
    """One connection whose every step keeps to the deadline of the request on it."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext | None, resolve: Resolve) -> None:
        super().__init__(host, port)
        # What http.client leaves out of `Host`.
        self.default_port = 443 if context is not None else 80
        self._context = context
        self._resolve = resolve
        self._unsent = bytearray()

    def connect(self) -> None:
        """
        Connect and, where it is https, shake hands.

        Raises:
            OSError: see `connections.connect`; `ssl.SSLError` is one.
        """
        self.connected_at = time.monotonic()
        self.sock: Any = connect(self.host, self.port, resolve=self._resolve)
        if self._context is not None:
            self.sock = self._context.wrap_socket(self.sock, server_hostname=self.host)

    def send(self, data: Any) -> None:
        """Hold what http.client writes, head and body apart, so that it leaves as one."""
        self._unsent += data

    def flush(self) -> None:
        """Send what is held: in one system call and one TLS record."""
        data, self._unsent = bytes(self._unsent), bytearray()
        self.sock.sendall(data)

    def is_quiet(self) -> bool:
        """Tell whether the connection may serve another request: in time, open, with nothing unread."""
        if not self.still_good():
            return False
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        # End of file can be read, too.
        return not poll.poll(0)


class _Pool:
    """Idle connections of one origin; the one used last goes out first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Connection] = []

    def take(self) -> _Connection | None:
        """Return a connection that is good for another request, or None."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if connection.is_quiet():
                return connection
            connection.close()

    def put(self, connection: _Connection) -> None:
        """Keep a connection whose answer was read to its end."""
        connection.idle_since = time.monotonic()
        with self._lock:
            if len(self._idle) < _POOL_SIZE:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Close what is idle."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

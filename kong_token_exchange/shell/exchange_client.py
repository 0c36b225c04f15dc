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
from kong_token_exchange.errors import IssuerUnavailableError, NonConformingResponseError
from kong_token_exchange.protocol.http_message import HttpRequest, HttpResponse
from kong_token_exchange.shell import connections
from kong_token_exchange.shell.connections import Call, Resolve, Reuse, calls, connect, failure, tls_context

# Idle connections kept for each token endpoint: one for each thread that may exchange; one too few
# means a TLS handshake for each request above it.
_POOL_SIZE = 64

_CHUNK = 16 * 1024

# What http.client raises when the network or the peer is at fault.
_TROUBLE = (http.client.HTTPException, OSError, ValueError)

_FIXED_HEADERS = {"Accept-Encoding": "identity", "User-Agent": f"kong-token-exchange/{__version__}"}


class ExchangeSender:
    """
    Implements `ports.HttpSender` for one set of TLS settings.

    Connections are never shared between two senders, so none is used under other settings
    than those it was made with.

    Args:
        ca_file: PEM file that replaces the system's trusted certificates.
        verify: False accepts any certificate (`ssl_verify: false`).
        read_timeout_s: Longest silence within an answer, seconds; the deadline is shorter or wins.
        resolve: `host:port` to (address, port), as curl's `--resolve`, for trying and testing.

    Raises:
        OSError: *ca_file* cannot be read, or holds no certificate.
    """

    def __init__(
        self,
        *,
        ca_file: str | None = None,
        verify: bool = True,
        read_timeout_s: float = 10.0,
        resolve: Resolve | None = None,
    ) -> None:
        self._context = tls_context(ca_file, verify=verify)
        self._read_timeout_s = read_timeout_s
        self._resolve = dict(resolve or {})
        self._pools: dict[_Origin, _Pool] = {}

    def send(self, request: HttpRequest, *, deadline: float, max_body: int) -> HttpResponse:
        """
        Send and read the whole answer.

        Args:
            request: What to send.
            deadline: Monotonic instant by which everything ends.
            max_body: Longest answer that is read, in bytes.

        Raises:
            IssuerUnavailableError: no connection, TLS refused, or a broken answer.
            DeadlineError: *deadline* passed.
            NonConformingResponseError: the answer is too long or encoded, or none at all.
        """
        try:
            origin, target, host = _split(request.url)
        except ValueError:
            raise IssuerUnavailableError(reason="connection_broken", facts={"cause": "ValueError"}) from None
        for may_repeat in (True, False):
            call = calls.current = Call(deadline, self._read_timeout_s)
            try:
                return self._send(request, origin, target, max_body)
            except _TROUBLE as exc:
                timed_out = time.monotonic() >= deadline - connections.TIMER_SLACK_S
                if may_repeat and not timed_out and call.may_repeat(request.method):
                    continue
                error = failure(exc, host=host, timed_out=timed_out)
            break
        # Raised out here: the cause prints URL and headers, and would hang on the error as its context.
        raise error

    def _send(self, request: HttpRequest, origin: _Origin, target: str, max_body: int) -> HttpResponse:
        calls.current.remaining()
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
def _split(url: str) -> tuple[_Origin, str, str]:
    """Return origin, request target, and the host to name in a log: without user and password."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("no http URL")
    secure = parts.scheme == "https"
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    named = parts.netloc.rpartition("@")[2]
    return (parts.scheme, parts.hostname, parts.port or (443 if secure else 80)), target, named


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

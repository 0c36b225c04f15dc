"""
HTTP over `requests`, one request at a time, within one absolute deadline.

The transport adapter is used without a Session: no redirect is followed, no cookie kept,
no `.netrc`, proxy or CA bundle of the environment is read, because nobody is there to do it.
Every blocking step (name, connect, TLS, send, each read) is bounded by what is left of the
caller's deadline, so a peer that sends one byte a second is cut off in time.

A connection is reused only where its last answer ended as it announced. A request is sent a
second time only where the first copy cannot have been acted on: see `_Call.may_repeat`.

Source: docs/adr/0006-http-client.md; docs/threats.md KEY-05, KEY-06, EXC-27, RES-14.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from kong_token_exchange import __version__
from kong_token_exchange.errors import (
    DeadlineError,
    Fact,
    IssuerUnavailableError,
    NonConformingResponseError,
    TokenExchangeError,
)
from kong_token_exchange.protocol.http_message import HttpRequest, HttpResponse

# An address that has not accepted a connection within this time is down, whatever the deadline leaves.
CONNECT_TIMEOUT_S = 1.0
# Addresses of each family that are tried, one after the other: one and a spare.
_MAX_ADDRESSES = 2
# A name server that has not answered within this time is down; resolvers ask again after 5 s.
NAME_TIMEOUT_S = 2.0

# Servers close idle connections after 5 to 75 s. The longer ours lie, the likelier one is closed
# just as a request goes out, which then must fail.
MAX_IDLE_S = 30.0
# A connection holds on to the address its name had; providers move with a TTL of about a minute.
MAX_AGE_S = 60.0

# Hosts that connections are kept for: issuers of one gateway, with room.
_MAX_HOSTS = 64
# Idle connections kept per host: one for each thread that may exchange; one too few means a TLS
# handshake for each request above it.
_POOL_SIZE = 64

_CHUNK = 16 * 1024

# Timers end a little early on some systems; such a timeout is still the deadline's.
_TIMER_SLACK_S = 0.01

Resolve = Mapping[str, tuple[str, int]]

# What the libraries below raise when the network or the peer is at fault.
_TROUBLE = (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError)


@dataclass(slots=True)
class _Call:
    """What is known of the request that this thread is sending."""

    deadline: float
    silence_s: float
    fresh: bool = False
    cut_off: bool = False
    received: int = 0

    def remaining(self) -> float:
        """Return the seconds left; raise `TimeoutError` when there are none."""
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("deadline")
        return remaining

    def may_repeat(self, method: str) -> bool:
        """
        Tell whether the request may be sent again, on a new connection.

        Only a connection that had lain idle is replaced: the peer closed it, which is nobody's
        fault. What was cut off while it was sent is no whole request and cannot have been acted
        on. What was sent whole may have been, so only a GET is repeated then.
        """
        return not self.fresh and not self.received and (self.cut_off or method == "GET")


class _Calls(threading.local):
    current: _Call


_calls = _Calls()


class RequestsSender:
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
        self._adapter = _Adapter(_ssl_context(ca_file, verify=verify), dict(resolve or {}))
        self._read_timeout_s = read_timeout_s

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
        for may_repeat in (True, False):
            call = _calls.current = _Call(deadline, self._read_timeout_s)
            try:
                return self._send(request, max_body, call)
            except _TROUBLE as exc:
                timed_out = time.monotonic() >= deadline - _TIMER_SLACK_S
                if may_repeat and not timed_out and call.may_repeat(request.method):
                    continue
                failure = _failure(exc, request, timed_out=timed_out)
            break
        # Raised out here: the cause prints URL and headers, and would hang on the error as its context.
        raise failure

    def _send(self, request: HttpRequest, max_body: int, call: _Call) -> HttpResponse:
        prepared = requests.Request(
            request.method,
            request.url,
            headers={
                **request.headers,
                "Accept-Encoding": "identity",
                "User-Agent": f"kong-token-exchange/{__version__}",
            },
            data=request.body or None,
        ).prepare()
        remaining = call.remaining()
        timeout = (min(CONNECT_TIMEOUT_S, remaining), min(self._read_timeout_s, remaining))
        response = self._adapter.send(prepared, stream=True, timeout=timeout, verify=False, proxies=None)
        try:
            body = _read_body(response.raw, max_body)
        except BaseException:
            # Half an answer is left on the connection: it must not serve another request.
            response.raw.close()
            raise
        response.raw.release_conn()
        headers = {name.lower(): value for name, value in response.headers.items()}
        return HttpResponse(status=response.status_code, headers=headers, body=body)

    def close(self) -> None:
        """Close the pooled connections."""
        self._adapter.close()


def _read_body(raw: urllib3.HTTPResponse, max_body: int) -> bytes:
    if raw.status < 200:
        # An early hint, which http.client takes for the answer. The answer itself still comes and
        # would be read as that of the next request, with somebody else's token in it.
        raise NonConformingResponseError(reason="response_status", facts={"http_status": raw.status})
    if raw.headers.get("content-encoding", "identity").lower() != "identity":
        raise NonConformingResponseError(reason="response_encoded")
    body = bytearray()
    if (raw.length_remaining or 0) > max_body:
        raise NonConformingResponseError(reason="response_too_long")
    while chunk := raw.read1(_CHUNK, decode_content=False):
        body += chunk
        if len(body) > max_body:
            raise NonConformingResponseError(reason="response_too_long")
    if not body and raw.length_remaining is None and not raw.chunked:
        # No length and no body: http.client takes a head that was cut off for a whole one.
        raise urllib3.exceptions.ProtocolError("cut off in the head")
    return bytes(body)


# --- what went wrong ------------------------------------------------------------------


def _failure(exc: BaseException, request: HttpRequest, *, timed_out: bool) -> TokenExchangeError:
    """Return the error that says what an operator needs; only the cause's class leaves here."""
    facts: dict[str, Fact] = {"host": _host(request.url)}
    if timed_out:
        return DeadlineError(reason="deadline", facts=facts)
    causes = _causes(exc)
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            # OpenSSL's own words: "certificate has expired", "self-signed certificate", ...
            facts["tls"] = cause.verify_message[:120]
    names = {type(cause).__name__ for cause in causes}
    reason = next((reason for reason, known in _REASONS if known & names), "connection_broken")
    return IssuerUnavailableError(reason=reason, facts={**facts, "cause": type(exc).__name__})


def _host(url: str) -> str:
    try:
        # Without user and password, should there be any.
        return urllib3.util.parse_url(url).netloc or ""
    except ValueError:
        return ""


_REASONS = (
    ("tls_refused", {"SSLError", "SSLCertVerificationError"}),
    ("name_not_resolved", {"NameResolutionError"}),
    ("connect_failed", {"ConnectTimeoutError", "NewConnectionError"}),
    ("answer_timeout", {"ReadTimeoutError"}),
)


def _causes(exc: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    stack: list[object] = [exc]
    while stack and len(found) < 16:
        item = stack.pop()
        if isinstance(item, BaseException) and item not in found:
            found.append(item)
            stack += [item.__cause__, item.__context__, getattr(item, "reason", None), *item.args]
    return found


# --- TLS ------------------------------------------------------------------------------


def _ssl_context(ca_file: str | None, *, verify: bool) -> ssl.SSLContext:
    # Not ssl.create_default_context, which writes session keys to a file that the environment names.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_file is not None:
        context.load_verify_locations(cafile=ca_file)
    else:
        context.load_default_certs()
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.sslsocket_class = _DeadlineSslSocket
    return context


# --- connections that keep to the deadline --------------------------------------------


class _DeadlineSocket(socket.socket):
    """A socket each of whose calls is bounded by what is left of the deadline."""

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        _arm(self)
        return _note_received(super().recv_into(*args, **kwargs))

    def sendall(self, *args: Any, **kwargs: Any) -> None:
        _arm(self)
        try:
            super().sendall(*args, **kwargs)
        except OSError:
            _calls.current.cut_off = True
            raise


class _DeadlineSslSocket(ssl.SSLSocket):
    """The same for TLS, where `sendall` is a loop over `send`."""

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        _arm(self)
        return _note_received(super().recv_into(*args, **kwargs))

    def send(self, *args: Any, **kwargs: Any) -> int:
        _arm(self)
        return super().send(*args, **kwargs)

    def sendall(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().sendall(*args, **kwargs)
        except OSError:
            _calls.current.cut_off = True
            raise

    def do_handshake(self, block: bool = False) -> None:  # noqa: FBT001, FBT002 - SSLSocket's
        _arm(self)
        super().do_handshake(block)


def _arm(sock: socket.socket) -> None:
    # Called before each blocking call: per-call timeouts alone would let a drip go on for ever.
    call = _calls.current
    sock.settimeout(min(call.remaining(), call.silence_s))


def _note_received(count: int) -> int:
    _calls.current.received += count
    return count


class _Reuse:
    """Whether a connection that lay idle is good for another request."""

    sock: Any
    connected_at = 0.0
    idle_since = 0.0

    def still_good(self) -> bool:
        now = time.monotonic()
        if now - self.idle_since > MAX_IDLE_S or now - self.connected_at > MAX_AGE_S:
            return False
        # Bytes that nobody asked for would be read as the next answer; those that TLS has already
        # taken in are not seen by a look at the socket.
        return not (isinstance(self.sock, ssl.SSLSocket) and self.sock.pending())


class _HttpConnection(_Reuse, HTTPConnection):
    resolve: ClassVar[Resolve]

    def _new_conn(self) -> socket.socket:
        self.connected_at = time.monotonic()
        return _connect(self, self.resolve)

    @property
    def is_connected(self) -> bool:
        """Tell whether the connection may be used again."""
        return super().is_connected and self.still_good()


class _HttpsConnection(_Reuse, HTTPSConnection):
    resolve: ClassVar[Resolve]

    def _new_conn(self) -> socket.socket:
        self.connected_at = time.monotonic()
        return _connect(self, self.resolve)

    @property
    def is_connected(self) -> bool:
        """Tell whether the connection may be used again."""
        return super().is_connected and self.still_good()


def _connect(connection: HTTPConnection, resolve: Resolve) -> socket.socket:
    """Connect to the first address that accepts, each within its own time and all within the deadline."""
    call = _calls.current
    call.fresh = True
    host, port = resolve.get(f"{connection.host}:{connection.port}", (connection.host, connection.port or 0))
    try:
        addresses = _names.addresses(host, port, timeout_s=min(NAME_TIMEOUT_S, call.remaining()))
    except socket.gaierror as exc:
        raise urllib3.exceptions.NameResolutionError(host, connection, exc) from exc
    last: OSError = OSError("no address")
    for family, kind, protocol, _, address in _choose(addresses):
        try:
            sock = _DeadlineSocket(family, kind, protocol)
        except OSError as exc:
            last = exc
            continue
        try:
            sock.settimeout(min(CONNECT_TIMEOUT_S, call.remaining()))
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as exc:
            sock.close()
            last = exc
            continue
        return sock
    if isinstance(last, TimeoutError):
        raise urllib3.exceptions.ConnectTimeoutError(connection, "connect timeout") from last
    raise urllib3.exceptions.NewConnectionError(connection, "connect failed") from last


_AddressInfo = tuple[Any, Any, int, str, Any]


def _choose(addresses: list[_AddressInfo]) -> list[_AddressInfo]:
    """Take a few addresses of each family in turn: many that are dead must not hide the other family."""
    families = [
        [info for info in addresses if info[0] == family][:_MAX_ADDRESSES]
        for family in dict.fromkeys(info[0] for info in addresses)
    ]
    return [info for turn in zip_longest(*families) for info in turn if info is not None]


class _Names:
    """
    Looks names up within a time, which the system's resolver cannot promise.

    The look-up runs in a thread of its own; whoever asks for the same name meanwhile waits for
    the same one, so a dead name server costs one thread for each name.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[tuple[str, int], Future[list[_AddressInfo]]] = {}

    def addresses(self, host: str, port: int, *, timeout_s: float) -> list[_AddressInfo]:
        """
        Return the addresses of *host*.

        Raises:
            socket.gaierror: there are none, or none came in time.
        """
        try:
            return socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)
        except socket.gaierror:
            pass
        try:
            return self._flight(host, port).result(timeout_s)
        except FutureTimeoutError:
            raise socket.gaierror(socket.EAI_AGAIN, "no answer in time") from None
        except socket.gaierror as exc:
            # A new one for each who waits: a shared error would collect their tracebacks.
            raise socket.gaierror(*exc.args) from None

    def _flight(self, host: str, port: int) -> Future[list[_AddressInfo]]:
        key = (host, port)
        with self._lock:
            flight = self._flights.get(key)
            if flight is not None:
                return flight
            flight = self._flights[key] = Future()
        try:
            threading.Thread(target=self._look_up, args=(key, flight), name="names", daemon=True).start()
        except RuntimeError:
            self._land(key)
            flight.set_exception(socket.gaierror(socket.EAI_AGAIN, "no thread"))
        return flight

    def _look_up(self, key: tuple[str, int], flight: Future[list[_AddressInfo]]) -> None:
        try:
            found = socket.getaddrinfo(*key, 0, socket.SOCK_STREAM)
        except socket.gaierror as exc:
            self._land(key)
            flight.set_exception(socket.gaierror(*exc.args))
        except (OSError, ValueError) as exc:
            # A label that is too long for IDNA raises UnicodeError.
            self._land(key)
            flight.set_exception(socket.gaierror(socket.EAI_NONAME, type(exc).__name__))
        else:
            self._land(key)
            flight.set_result(found)

    def _land(self, key: tuple[str, int]) -> None:
        with self._lock:
            self._flights.pop(key, None)


_names = _Names()


# --- pools ----------------------------------------------------------------------------


class _HttpPool(HTTPConnectionPool):
    def _put_conn(self, conn: Any) -> None:
        if conn is not None:
            conn.idle_since = time.monotonic()
        super()._put_conn(conn)


class _HttpsPool(HTTPSConnectionPool):
    def _put_conn(self, conn: Any) -> None:
        if conn is not None:
            conn.idle_since = time.monotonic()
        super()._put_conn(conn)

    def _validate_conn(self, conn: Any) -> None:
        """Connect early, without urllib3's warning: `ssl_verify: false` is warned of once, at start."""
        if conn.is_closed:
            conn.connect()


class _Adapter(HTTPAdapter):
    """An adapter with our TLS context and connections, and nothing of the environment."""

    def __init__(self, context: ssl.SSLContext, resolve: Resolve) -> None:
        self._context = context
        self._resolve = resolve
        super().__init__(
            pool_connections=_MAX_HOSTS, pool_maxsize=_POOL_SIZE, max_retries=0, pool_block=False
        )

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._context, **kwargs)
        http = type("HttpConnection", (_HttpConnection,), {"resolve": self._resolve})
        https = type("HttpsConnection", (_HttpsConnection,), {"resolve": self._resolve})
        self.poolmanager.pool_classes_by_scheme = {
            "http": type("HttpPool", (_HttpPool,), {"ConnectionCls": http}),
            "https": type("HttpsPool", (_HttpsPool,), {"ConnectionCls": https}),
        }

    def build_connection_pool_key_attributes(self, request: Any, verify: Any, cert: Any = None) -> Any:
        """Leave TLS to the context: requests would otherwise turn verification off for `verify=False`."""
        host, _ = super().build_connection_pool_key_attributes(request, verify, cert)
        return host, {}

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Leave TLS to the context: requests would add its own certificate bundle."""

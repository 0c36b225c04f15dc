"""
Connections that keep to one absolute deadline, for every client of ours.

A client notes the deadline of the request that its thread is sending in `calls.current`; each
blocking step of the connection (name, connect, TLS, send, each read) is then bounded by what is
left of it, so a peer that sends one byte a second is cut off in time.

Source: docs/adr/0006-http-client.md; docs/threats.md KEY-05, FAULT-03 to FAULT-14.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar
from urllib.parse import urlsplit

from kong_token_exchange.errors import DeadlineError, Fact, IssuerUnavailableError, TokenExchangeError
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

# Timers end a little early on some systems; such a timeout is still the deadline's.
TIMER_SLACK_S = 0.01

Resolve = Mapping[str, tuple[str, int]]


class NameNotResolvedError(OSError):
    """A host name has no address, or none came in time."""


class ConnectFailedError(OSError):
    """No address of a host accepted a connection."""


@dataclass(slots=True)
class Call:
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
    current: Call


calls = _Calls()


_NOBODY = (NameNotResolvedError, ConnectFailedError)


# --- what went wrong ------------------------------------------------------------------


def failure(exc: BaseException, *, host: str, timed_out: bool) -> TokenExchangeError:
    """Return the error that says what an operator needs; only the cause's class leaves here."""
    facts: dict[str, Fact] = {"host": host}
    if timed_out:
        return DeadlineError(reason="deadline", facts=facts)
    causes = _causes(exc)
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            # OpenSSL's own words: "certificate has expired", "self-signed certificate", ...
            facts["tls"] = cause.verify_message[:120]
    kinds = tuple(type(cause) for cause in causes)
    # What the system said tells more than our own or a library's name for it.
    told = next((cause.__cause__ for cause in causes if isinstance(cause, _NOBODY) and cause.__cause__), exc)
    facts["cause"] = type(told).__name__
    if any(issubclass(kind, ssl.SSLError) or kind.__name__ == "SSLError" for kind in kinds):
        return IssuerUnavailableError(reason="tls_refused", facts=facts)
    if NameNotResolvedError in kinds:
        return IssuerUnavailableError(reason="name_not_resolved", facts=facts)
    if ConnectFailedError in kinds:
        return IssuerUnavailableError(reason="connect_failed", facts=facts)
    if any(issubclass(kind, TimeoutError) for kind in kinds):
        return IssuerUnavailableError(reason="answer_timeout", facts=facts)
    return IssuerUnavailableError(reason="connection_broken", facts=facts)


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


def trust_context(ca_file: str | None, *, verify: bool) -> ssl.SSLContext:
    """
    Make a client's TLS settings: 1.2 at least, and nothing of the environment.

    Args:
        ca_file: PEM file that replaces the system's trusted certificates.
        verify: False accepts any certificate.

    Raises:
        OSError: *ca_file* cannot be read, or holds no certificate.
    """
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
    return context


# --- sockets ----------------------------------------------------------------------------


class DeadlineSocket(socket.socket):
    """A socket each of whose calls is bounded by what is left of the deadline."""

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        """Receive, in time."""
        _arm(self)
        return _note_received(super().recv_into(*args, **kwargs))

    def sendall(self, *args: Any, **kwargs: Any) -> None:
        """Send all, in time; note where only a part went out."""
        _arm(self)
        try:
            super().sendall(*args, **kwargs)
        except OSError:
            calls.current.cut_off = True
            raise


class DeadlineSslSocket(ssl.SSLSocket):
    """The same for TLS, where `sendall` is a loop over `send`."""

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        """Receive, in time."""
        _arm(self)
        return _note_received(super().recv_into(*args, **kwargs))

    def send(self, *args: Any, **kwargs: Any) -> int:
        """Send, in time."""
        _arm(self)
        return super().send(*args, **kwargs)

    def sendall(self, *args: Any, **kwargs: Any) -> None:
        """Send all, in time; note where only a part went out."""
        try:
            super().sendall(*args, **kwargs)
        except OSError:
            calls.current.cut_off = True
            raise

    def do_handshake(self, block: bool = False) -> None:  # noqa: FBT001, FBT002 - SSLSocket's
        """Shake hands, in time."""
        _arm(self)
        super().do_handshake(block)


def _arm(sock: socket.socket) -> None:
    # Called before each blocking call: per-call timeouts alone would let a drip go on for ever.
    call = calls.current
    sock.settimeout(min(call.remaining(), call.silence_s))


def _note_received(count: int) -> int:
    calls.current.received += count
    return count


class Reuse:
    """Whether a connection that lay idle is good for another request."""

    sock: Any
    connected_at = 0.0
    idle_since = 0.0

    def still_good(self) -> bool:
        """Tell whether neither age nor what lies unread speaks against another request."""
        now = time.monotonic()
        if now - self.idle_since > MAX_IDLE_S or now - self.connected_at > MAX_AGE_S:
            return False
        # Bytes that nobody asked for would be read as the next answer; those that TLS has already
        # taken in are not seen by a look at the socket.
        return not (isinstance(self.sock, ssl.SSLSocket) and self.sock.pending())


# --- connecting -------------------------------------------------------------------------


def connect(host: str, port: int, *, resolve: Resolve) -> socket.socket:
    """
    Connect to the first address that accepts, each within its own time and all within the deadline.

    Args:
        host: Name or address.
        port: Its port.
        resolve: `host:port` to (address, port), as curl's `--resolve`.

    Raises:
        NameNotResolvedError, ConnectFailedError: nobody to talk to.
        TimeoutError: the deadline passed.
    """
    call = calls.current
    call.fresh = True
    host, port = resolve.get(f"{host}:{port}", (host, port))
    try:
        addresses = _names.addresses(host, port, timeout_s=min(NAME_TIMEOUT_S, call.remaining()))
    except socket.gaierror as exc:
        raise NameNotResolvedError(exc.errno, "name not resolved") from exc
    last: OSError = OSError("no address")
    for family, kind, protocol, _, address in _choose(addresses):
        try:
            sock = DeadlineSocket(family, kind, protocol)
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
    raise ConnectFailedError(last.errno, "connect failed") from last


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
        except (RuntimeError, MemoryError):
            self._land(key)
            flight.set_exception(socket.gaierror(socket.EAI_AGAIN, "no thread"))
        return flight

    def _look_up(self, key: tuple[str, int], flight: Future[list[_AddressInfo]]) -> None:
        try:
            found = socket.getaddrinfo(*key, 0, socket.SOCK_STREAM)
        except socket.gaierror as exc:
            self._land(key)
            flight.set_exception(socket.gaierror(*exc.args))
        except BaseException as exc:  # noqa: BLE001 - a look-up that never lands is waited for until a restart
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


# --- senders --------------------------------------------------------------------------


class DeadlineSender(ABC):
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

    # What the library below raises when the network or the peer is at fault.
    trouble: ClassVar[tuple[type[BaseException], ...]]

    def __init__(
        self,
        *,
        ca_file: str | None = None,
        verify: bool = True,
        read_timeout_s: float = 10.0,
        resolve: Resolve | None = None,
    ) -> None:
        self._context = trust_context(ca_file, verify=verify)
        self._context.sslsocket_class = DeadlineSslSocket
        self._read_timeout_s = read_timeout_s
        self._resolve = dict(resolve or {})

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
            call = calls.current = Call(deadline, self._read_timeout_s)
            try:
                return self._send(request, max_body, call)
            except self.trouble as exc:
                timed_out = time.monotonic() >= deadline - TIMER_SLACK_S
                if may_repeat and not timed_out and call.may_repeat(request.method):
                    continue
                error = failure(exc, host=_host(request.url), timed_out=timed_out)
            break
        # Raised out here: the cause prints URL and headers, and would hang on the error as its context.
        raise error

    @abstractmethod
    def _send(self, request: HttpRequest, max_body: int, call: Call) -> HttpResponse:
        """Send once and read the whole answer; raise `trouble`, or an error of ours."""

    @abstractmethod
    def close(self) -> None:
        """Close the pooled connections."""


def _host(url: str) -> str:
    """Return the host to name in a log: without user and password."""
    try:
        return urlsplit(url).netloc.rpartition("@")[2]
    except ValueError:
        return ""

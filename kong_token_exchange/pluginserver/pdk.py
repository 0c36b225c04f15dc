"""
Kong's plugin development kit as a table, and as the object a plugin is given.

`METHODS` says for each method which message goes out, which comes back, and
whether Kong's answer is always empty. Only such calls may be pipelined: they are
held back and leave together with the next call that needs an answer, or with
the end of the event, in one send.

The tree `kong.request.get_header(...)` has the method names of kong-pdk, so one
plugin class runs on both. Three differences, all where ProtoBuf:1 leaves no
choice or kong-pdk's behaviour is a trap: an absent text is "" (an absent and an
empty header are the same frame), an absent record is None, and
`kong.response.exit` never returns.

No I/O here: a `Caller` carries the bytes.

Source: docs/plugin-socket.md; Kong `kong/include/kong/pluginsocket.proto`, service Kong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from kong_token_exchange.pluginserver import wire
from kong_token_exchange.pluginserver.wire import JsonValue, Record

# kong.request.get_headers and get_query refuse less than 1 (Kong then answers 500);
# 100 is the default of the Lua functions.
DEFAULT_MAX_HEADERS = 100


@dataclass(frozen=True, slots=True)
class Codec:
    """How one kind of message is written and read."""

    name: str
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


def _encode_empty(_: object = None) -> bytes:
    return b""


def _decode_empty(_: bytes) -> None:
    return None


def _encode_pair(pair: tuple[str, JsonValue]) -> bytes:
    return wire.encode_kv(*pair)


def _encode_exit_args(args: tuple[int, bytes, Mapping[str, str] | None]) -> bytes:
    return wire.encode_exit(*args)


def _record(name: str, record: Record) -> Codec:
    def encode(members: Mapping[str, JsonValue] | None) -> bytes:
        return record.encode(members) if members else b""

    def decode(payload: bytes) -> dict[str, JsonValue] | None:
        return record.decode(payload) if payload else None

    return Codec(name, encode, decode)


EMPTY = Codec("Empty", _encode_empty, _decode_empty)
STRING = Codec("String", wire.encode_string, wire.decode_string)
BYTE_STRING = Codec("ByteString", wire.encode_byte_string, wire.decode_byte_string)
INT = Codec("Int", wire.encode_int, wire.decode_int)
BOOL = Codec("Bool", wire.encode_bool, wire.decode_bool)
NUMBER = Codec("Number", wire.encode_number, wire.decode_number)
KV = Codec("KV", _encode_pair, wire.decode_kv)
VALUE = Codec("Value", wire.encode_value, wire.decode_value)
STRUCT = Codec("Struct", wire.encode_struct, wire.decode_struct)
LIST = Codec("ListValue", wire.encode_list, wire.decode_list)
EXIT = Codec("ExitArgs", _encode_exit_args, wire.decode_exit)
RAW_BODY = Codec("RawBodyResult", wire.encode_raw_body, wire.decode_raw_body)
CONSUMER_SPEC = _record("ConsumerSpec", wire.CONSUMER_SPEC)
CONSUMER = _record("Consumer", wire.CONSUMER)
CREDENTIAL = _record("AuthenticatedCredential", wire.CREDENTIAL)
AUTHENTICATE = _record("AuthenticateArgs", wire.AUTHENTICATE)
ROUTE = _record("Route", wire.ROUTE)
SERVICE = _record("Service", wire.SERVICE)


@dataclass(frozen=True, slots=True)
class Method:
    """One method of the PDK; *head* is its name as a frame, ready to send."""

    name: str
    argument: Codec
    result: Codec
    head: bytes

    @property
    def reply_is_empty(self) -> bool:
        """Tell whether Kong's answer is always the empty frame, so that the call may be pipelined."""
        return self.result is EMPTY and self.name != EXIT_METHOD

    def call(self, argument: bytes) -> bytes:
        """Return the two frames of a call with an encoded *argument*."""
        return self.head + wire.frame(argument)


EXIT_METHOD = "kong.response.exit"

_ROWS: tuple[tuple[str, Codec, Codec], ...] = (
    ("kong.client.authenticate", AUTHENTICATE, EMPTY),
    ("kong.client.get_consumer", EMPTY, CONSUMER),
    ("kong.client.get_credential", EMPTY, CREDENTIAL),
    ("kong.client.get_forwarded_ip", EMPTY, STRING),
    ("kong.client.get_forwarded_port", EMPTY, INT),
    ("kong.client.get_ip", EMPTY, STRING),
    ("kong.client.get_port", EMPTY, INT),
    ("kong.client.load_consumer", CONSUMER_SPEC, CONSUMER),
    ("kong.ctx.shared.get", STRING, VALUE),
    ("kong.ctx.shared.set", KV, EMPTY),
    ("kong.log.alert", LIST, EMPTY),
    ("kong.log.crit", LIST, EMPTY),
    ("kong.log.debug", LIST, EMPTY),
    ("kong.log.err", LIST, EMPTY),
    ("kong.log.info", LIST, EMPTY),
    ("kong.log.notice", LIST, EMPTY),
    ("kong.log.set_serialize_value", KV, EMPTY),
    ("kong.log.warn", LIST, EMPTY),
    ("kong.nginx.get_var", STRING, STRING),
    ("kong.node.get_id", EMPTY, STRING),
    ("kong.request.get_forwarded_host", EMPTY, STRING),
    ("kong.request.get_forwarded_port", EMPTY, INT),
    ("kong.request.get_forwarded_scheme", EMPTY, STRING),
    ("kong.request.get_header", STRING, STRING),
    ("kong.request.get_headers", INT, STRUCT),
    ("kong.request.get_host", EMPTY, STRING),
    ("kong.request.get_http_version", EMPTY, NUMBER),
    ("kong.request.get_method", EMPTY, STRING),
    ("kong.request.get_path", EMPTY, STRING),
    ("kong.request.get_path_with_query", EMPTY, STRING),
    ("kong.request.get_port", EMPTY, INT),
    ("kong.request.get_query", INT, STRUCT),
    ("kong.request.get_query_arg", STRING, STRING),
    ("kong.request.get_raw_body", EMPTY, RAW_BODY),
    ("kong.request.get_raw_query", EMPTY, STRING),
    ("kong.request.get_scheme", EMPTY, STRING),
    ("kong.response.add_header", KV, EMPTY),
    ("kong.response.clear_header", STRING, EMPTY),
    ("kong.response.exit", EXIT, EMPTY),
    ("kong.response.set_header", KV, EMPTY),
    ("kong.response.set_headers", STRUCT, EMPTY),
    ("kong.response.set_status", INT, EMPTY),
    ("kong.router.get_route", EMPTY, ROUTE),
    ("kong.router.get_service", EMPTY, SERVICE),
    ("kong.service.request.add_header", KV, EMPTY),
    ("kong.service.request.clear_header", STRING, EMPTY),
    ("kong.service.request.set_header", KV, EMPTY),
    ("kong.service.request.set_headers", STRUCT, EMPTY),
    ("kong.service.request.set_method", STRING, EMPTY),
    ("kong.service.request.set_path", STRING, EMPTY),
    ("kong.service.request.set_raw_body", BYTE_STRING, EMPTY),
    ("kong.service.request.set_raw_query", STRING, EMPTY),
)

METHODS: Mapping[str, Method] = {
    name: Method(name, argument, result, wire.frame(name.encode())) for name, argument, result in _ROWS
}


class Caller(Protocol):
    """Carries calls to Kong for one event."""

    def call(self, method: Method, argument: bytes) -> bytes:
        """Send a call and wait for Kong's answer."""

    def queue(self, method: Method, argument: bytes) -> None:
        """Send a call whose answer is empty, now or together with what follows."""

    def exit(self, status: int, argument: bytes) -> NoReturn:
        """End the event with kong.response.exit; never returns."""


def header_text(value: str) -> str:
    """
    Return *value* if a header may hold it.

    Kong percent-encodes CR and LF and drops a value of another type without a
    word (GW-10), so a mistake would travel on as a corrupt header.

    Raises:
        TypeError: not a str.
        ValueError: holds CR, LF or NUL.
    """
    if not isinstance(value, str):
        raise TypeError("a header is text")
    if "\r" in value or "\n" in value or "\0" in value:
        raise ValueError("a header holds no CR, LF or NUL")
    return value


def encode_header(name: str, value: str) -> bytes:
    """Encode the argument of set_header; raises as `header_text` does."""
    return wire.encode_kv(header_text(name), header_text(value))


def encode_headers(headers: Mapping[str, str]) -> bytes:
    """Encode the argument of set_headers; raises as `header_text` does."""
    return wire.encode_struct({header_text(name): header_text(value) for name, value in headers.items()})


class _Namespace:
    """A node of the tree; every leaf is one row of METHODS."""

    __slots__ = ("_caller",)

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def _get(self, name: str, argument: bytes = b"") -> Any:
        method = METHODS[name]
        return method.result.decode(self._caller.call(method, argument))

    def _text(self, name: str, argument: str = "") -> str:
        result: str = self._get(name, wire.encode_string(argument))
        return result

    def _int(self, name: str) -> int:
        result: int = self._get(name)
        return result

    def _table(self, name: str, argument: bytes = b"") -> dict[str, JsonValue]:
        result: dict[str, JsonValue] = self._get(name, argument)
        return result

    def _row(self, name: str, argument: bytes = b"") -> dict[str, JsonValue] | None:
        result: dict[str, JsonValue] | None = self._get(name, argument)
        return result

    def _put(self, name: str, argument: bytes) -> None:
        self._caller.queue(METHODS[name], argument)


class Request(_Namespace):
    """kong.request: what the client sent."""

    __slots__ = ()

    def get_header(self, name: str) -> str:
        """Return the first header of that name; "" when absent or empty."""
        return self._text("kong.request.get_header", name)

    def get_headers(self, max_headers: int = DEFAULT_MAX_HEADERS) -> dict[str, JsonValue]:
        """Return at most *max_headers* headers; a repeated one is a list."""
        return self._table("kong.request.get_headers", wire.encode_int(max(1, max_headers)))

    def get_query(self, max_args: int = DEFAULT_MAX_HEADERS) -> dict[str, JsonValue]:
        """Return at most *max_args* arguments; one without a value is True, a repeated one a list."""
        return self._table("kong.request.get_query", wire.encode_int(max(1, max_args)))

    def get_query_arg(self, name: str) -> str:
        """
        Return a query argument; "" when absent or empty.

        Kong answers the request with 500 when the argument is repeated or has no
        "=": its answer is then no text. `get_raw_query` has no such trap.
        """
        return self._text("kong.request.get_query_arg", name)

    def get_raw_query(self) -> str:
        """Return the query without "?", as the client sent it."""
        return self._text("kong.request.get_raw_query")

    def get_raw_body(self) -> bytes | None:
        """Return the body; None when Kong spooled it to a file (client_body_buffer_size)."""
        result: bytes | None = self._get("kong.request.get_raw_body")
        return result

    def get_method(self) -> str:
        """Return the method."""
        return self._text("kong.request.get_method")

    def get_path(self) -> str:
        """Return the path, normalised, without the query."""
        return self._text("kong.request.get_path")

    def get_path_with_query(self) -> str:
        """Return path and query."""
        return self._text("kong.request.get_path_with_query")

    def get_scheme(self) -> str:
        """Return the scheme of the connection."""
        return self._text("kong.request.get_scheme")

    def get_host(self) -> str:
        """Return the Host the client asked for."""
        return self._text("kong.request.get_host")

    def get_port(self) -> int:
        """Return the port the request came to."""
        return self._int("kong.request.get_port")

    def get_http_version(self) -> float:
        """Return the version of HTTP, such as 1.1."""
        result: float = self._get("kong.request.get_http_version")
        return result

    def get_forwarded_scheme(self) -> str:
        """Return the scheme, X-Forwarded-Proto from a trusted address considered."""
        return self._text("kong.request.get_forwarded_scheme")

    def get_forwarded_host(self) -> str:
        """Return the host, X-Forwarded-Host from a trusted address considered."""
        return self._text("kong.request.get_forwarded_host")

    def get_forwarded_port(self) -> int:
        """Return the port, X-Forwarded-Port from a trusted address considered."""
        return self._int("kong.request.get_forwarded_port")


class Client(_Namespace):
    """kong.client: who is asking."""

    __slots__ = ()

    def get_ip(self) -> str:
        """Return the address of the peer."""
        return self._text("kong.client.get_ip")

    def get_forwarded_ip(self) -> str:
        """Return the client's address, forwarding headers from trusted addresses considered."""
        return self._text("kong.client.get_forwarded_ip")

    def get_port(self) -> int:
        """Return the port of the peer."""
        return self._int("kong.client.get_port")

    def get_forwarded_port(self) -> int:
        """Return the client's port, forwarding headers from trusted addresses considered."""
        return self._int("kong.client.get_forwarded_port")

    def get_consumer(self) -> dict[str, JsonValue] | None:
        """Return the authenticated consumer."""
        return self._row("kong.client.get_consumer")

    def get_credential(self) -> dict[str, JsonValue] | None:
        """Return the authenticated credential."""
        return self._row("kong.client.get_credential")

    def load_consumer(
        self,
        consumer_id: str,
        search_by_username: bool = False,  # noqa: FBT001, FBT002 - kong-pdk's signature
    ) -> dict[str, JsonValue] | None:
        """Return a consumer by id or username; None when there is none."""
        spec: dict[str, JsonValue] = {"id": consumer_id, "by_username": search_by_username}
        return self._row("kong.client.load_consumer", wire.CONSUMER_SPEC.encode(spec))

    def authenticate(
        self, consumer: Mapping[str, JsonValue] | None, credential: Mapping[str, JsonValue] | None
    ) -> None:
        """Tell later plugins who was authenticated; Kong sets X-Consumer-* and X-Credential-*."""
        self._put("kong.client.authenticate", encode_authenticate(consumer, credential))


def encode_authenticate(
    consumer: Mapping[str, JsonValue] | None, credential: Mapping[str, JsonValue] | None
) -> bytes:
    """Encode the argument of kong.client.authenticate."""
    return wire.AUTHENTICATE.encode({"consumer": consumer, "credential": credential})


class Shared(_Namespace):
    """kong.ctx.shared: a table for the plugins of one request."""

    __slots__ = ()

    def get(self, key: str) -> JsonValue:
        """Return what an earlier plugin stored."""
        result: JsonValue = self._get("kong.ctx.shared.get", wire.encode_string(key))
        return result

    def set(self, key: str, value: JsonValue) -> None:
        """Store a value for later plugins; Kong reads a false as nil."""
        self._put("kong.ctx.shared.set", wire.encode_kv(key, value))


class Ctx:
    """kong.ctx."""

    __slots__ = ("shared",)

    def __init__(self, caller: Caller) -> None:
        self.shared = Shared(caller)


class Log(_Namespace):
    """kong.log: Kong's error log, and its structured one."""

    __slots__ = ()

    def _line(self, level: str, parts: Sequence[JsonValue]) -> None:
        self._put(level, wire.encode_list(parts))

    def alert(self, *parts: JsonValue) -> None:
        """Log at level alert."""
        self._line("kong.log.alert", parts)

    def crit(self, *parts: JsonValue) -> None:
        """Log at level crit."""
        self._line("kong.log.crit", parts)

    def err(self, *parts: JsonValue) -> None:
        """Log at level err."""
        self._line("kong.log.err", parts)

    def warn(self, *parts: JsonValue) -> None:
        """Log at level warn."""
        self._line("kong.log.warn", parts)

    def notice(self, *parts: JsonValue) -> None:
        """Log at level notice."""
        self._line("kong.log.notice", parts)

    def info(self, *parts: JsonValue) -> None:
        """Log at level info."""
        self._line("kong.log.info", parts)

    def debug(self, *parts: JsonValue) -> None:
        """Log at level debug."""
        self._line("kong.log.debug", parts)

    def set_serialize_value(self, key: str, value: JsonValue) -> None:
        """Add a member to the object that Kong's logging plugins write."""
        self._put("kong.log.set_serialize_value", wire.encode_kv(key, value))


class Nginx(_Namespace):
    """kong.nginx."""

    __slots__ = ()

    def get_var(self, name: str) -> str:
        """Return an nginx variable; `kong_request_id` is Kong's id of the request."""
        return self._text("kong.nginx.get_var", name)


class Node(_Namespace):
    """kong.node."""

    __slots__ = ()

    def get_id(self) -> str:
        """Return the node's id."""
        return self._text("kong.node.get_id")


class Response(_Namespace):
    """kong.response: what the client gets."""

    __slots__ = ()

    def set_header(self, name: str, value: str) -> None:
        """Set a header of the answer."""
        self._put("kong.response.set_header", encode_header(name, value))

    def add_header(self, name: str, value: str) -> None:
        """Add a header to the answer."""
        self._put("kong.response.add_header", encode_header(name, value))

    def set_headers(self, headers: Mapping[str, str]) -> None:
        """Set several headers of the answer."""
        self._put("kong.response.set_headers", encode_headers(headers))

    def clear_header(self, name: str) -> None:
        """Remove a header from the answer."""
        self._put("kong.response.clear_header", wire.encode_string(header_text(name)))

    def set_status(self, status: int) -> None:
        """Set the status of the answer."""
        self._put("kong.response.set_status", wire.encode_int(status))

    def exit(
        self, status: int, body: bytes | str | None = None, headers: Mapping[str, str] | None = None
    ) -> NoReturn:
        """End the event here: Kong answers the client, nothing goes upstream. Never returns."""
        self._caller.exit(status, encode_exit(status, body, headers))


def encode_exit(status: int, body: bytes | str | None, headers: Mapping[str, str] | None) -> bytes:
    """Encode the argument of kong.response.exit; raises as `header_text` does."""
    checked = {header_text(name): header_text(value) for name, value in (headers or {}).items()}
    content = body.encode("utf-8", "surrogateescape") if isinstance(body, str) else body or b""
    return wire.encode_exit(status, content, checked)


class Router(_Namespace):
    """kong.router: what matched."""

    __slots__ = ()

    def get_route(self) -> dict[str, JsonValue] | None:
        """Return the route."""
        return self._row("kong.router.get_route")

    def get_service(self) -> dict[str, JsonValue] | None:
        """Return the service."""
        return self._row("kong.router.get_service")


class ServiceRequest(_Namespace):
    """kong.service.request: what the upstream gets."""

    __slots__ = ()

    def set_header(self, name: str, value: str) -> None:
        """Set a header of the upstream request."""
        self._put("kong.service.request.set_header", encode_header(name, value))

    def add_header(self, name: str, value: str) -> None:
        """Add a header to the upstream request."""
        self._put("kong.service.request.add_header", encode_header(name, value))

    def set_headers(self, headers: Mapping[str, str]) -> None:
        """Set several headers of the upstream request."""
        self._put("kong.service.request.set_headers", encode_headers(headers))

    def clear_header(self, name: str) -> None:
        """Remove a header from the upstream request."""
        self._put("kong.service.request.clear_header", wire.encode_string(header_text(name)))

    def set_method(self, method: str) -> None:
        """Set the method of the upstream request."""
        self._put("kong.service.request.set_method", wire.encode_string(method))

    def set_path(self, path: str) -> None:
        """Set the path of the upstream request."""
        self._put("kong.service.request.set_path", wire.encode_string(path))

    def set_raw_query(self, query: str) -> None:
        """Set the query of the upstream request, without "?"."""
        self._put("kong.service.request.set_raw_query", wire.encode_string(query))

    def set_raw_body(self, body: bytes) -> None:
        """Set the body of the upstream request."""
        self._put("kong.service.request.set_raw_body", wire.encode_byte_string(body))


class Service:
    """kong.service."""

    __slots__ = ("request",)

    def __init__(self, caller: Caller) -> None:
        self.request = ServiceRequest(caller)


class Kong:
    """
    The root of the tree, made for one event and useless after it.

    Args:
        caller: Carries the calls.
        received_at: Monotonic instant at which the event arrived, seconds; None where nobody says.
        share: Takes what answers other events with the same facts (`contract.Coalescing`); None where
            no event waits for another.
    """

    __slots__ = (
        "client",
        "ctx",
        "log",
        "nginx",
        "node",
        "received_at",
        "request",
        "response",
        "router",
        "service",
        "share",
    )

    def __init__(
        self,
        caller: Caller,
        *,
        received_at: float | None = None,
        share: Callable[[Callable[[], Any]], None] | None = None,
    ) -> None:
        self.received_at = received_at
        self.share = share
        self.client = Client(caller)
        self.ctx = Ctx(caller)
        self.log = Log(caller)
        self.nginx = Nginx(caller)
        self.node = Node(caller)
        self.request = Request(caller)
        self.response = Response(caller)
        self.router = Router(caller)
        self.service = Service(caller)

"""
Kong's plugin development kit for one request: what a plugin server can ask and change.

`call(context, method, arguments)` answers one PDK call of the ProtoBuf:1
conversation. Each method does to the request what Kong's does, oddities
included: `set_header` with a record removes the header, a list gives an
`Authorization` header its last item, control characters are percent-encoded,
`false` arrives as nothing, a query argument without a value cannot be encoded.

Three things end an event early, as exceptions: `ResponseExit` (the plugin has
answered), `LuaError` (Kong's own function raised: 500) and `UnknownMethodError`.

Source: Kong 3.9.1 `kong/pdk/*.lua`, `rpc/pb_rpc.lua`; lua-nginx-module's header
functions (behaviour).
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_to_bytes

from kong_token_exchange.errors import RemoteProtocolError
from kong_token_exchange.pluginserver import wire
from kong_token_exchange.sandbox import http1, routing
from kong_token_exchange.sandbox.declarative import Consumer, GatewayConfig, Route, Service

# ngx.req.get_headers() and ngx.req.get_uri_args() without an argument stop here.
_DEFAULT_MAX = 100
_MAX_MAX = 1000

# client_body_buffer_size: a longer body is handed over as a file.
BODY_BUFFER_BYTES = 8 * 1024

# lua-protobuf decodes an enum by name, so a null that was sent on purpose is this text in Kong.
_NULL = "NULL_VALUE"

_DOUBLE = struct.Struct("<d")

_ESCAPED_IN_NAME = re.compile(r"[\x00-\x20\"(),/:;<=>?@\[\\\]{}\x7f-\U0010ffff]")
_ESCAPED_IN_VALUE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

# Request headers of which nginx keeps one value: a list ends up as its last item.
_SINGLE = frozenset(
    {
        "host", "connection", "if-modified-since", "if-unmodified-since", "if-match", "if-none-match",
        "user-agent", "referer", "content-length", "content-type", "range", "if-range",
        "transfer-encoding", "expect", "upgrade", "accept-encoding", "via", "authorization", "keep-alive",
        "x-real-ip",
    }
)  # fmt: skip

_METHODS = frozenset(
    {
        "GET", "HEAD", "PUT", "POST", "DELETE", "OPTIONS", "MKCOL", "COPY", "MOVE", "PROPFIND", "PROPPATCH",
        "LOCK", "UNLOCK", "PATCH", "TRACE",
    }
)  # fmt: skip


class LuaError(Exception):
    """Kong's function raised: the request ends with 500 and the conversation is abandoned."""


class UnknownMethodError(Exception):
    """The plugin asked for a method that Kong does not have: logged, 500."""

    def __init__(self, method: str) -> None:
        super().__init__(f'method "{method}" not found')


class ResponseExit(Exception):  # noqa: N818 - an outcome, not an error
    """The plugin has answered the request itself."""

    def __init__(self, status: int, body: bytes, headers: list[tuple[str, str]]) -> None:
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers


# --- headers --------------------------------------------------------------------------


def escape_header_name(name: str) -> str:
    """Percent-encode what may not stand in a header name."""
    return _ESCAPED_IN_NAME.sub(_percent, name)


def escape_header_value(value: str) -> str:
    """Percent-encode control characters, CR and LF among them."""
    return _ESCAPED_IN_VALUE.sub(_percent, value)


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in http1.encode(match[0]))


class HeaderList:
    """Headers in their order, changed as nginx changes request headers."""

    def __init__(self, pairs: Iterable[tuple[str, str]] = ()) -> None:
        self.pairs: list[tuple[str, str]] = list(pairs)

    def by_name(self, most: int | None = None) -> dict[str, list[str]]:
        """Return values by lower-case name, of the first *most* headers."""
        result: dict[str, list[str]] = {}
        for name, value in self.pairs[:most]:
            result.setdefault(name.lower(), []).append(value)
        return result

    def get(self, name: str) -> str | None:
        """
        Return what kong.request.get_header gives.

        nginx's variable `$http_x` sees `_` and `-` as the same; only when the value
        could be a list of several does Kong look again, among the first 100 headers.
        """
        wanted = name.lower().replace("-", "_")
        values = [value for key, value in self.pairs if key.lower().replace("-", "_") == wanted]
        if not values:
            return None
        joined = ("; " if wanted == "cookie" else ", ").join(values)
        if ", " not in joined:
            return joined
        listed = self.by_name(_DEFAULT_MAX)
        found = listed.get(name.lower()) or listed.get(name.lower().replace("_", "-"))
        return found[0] if found else None

    def set(self, name: str, values: list[str]) -> None:
        """Replace the header in its place, or add it; no values remove it."""
        name = escape_header_name(name)
        values = [escape_header_value(value) for value in values]
        if name.lower() in _SINGLE:
            values = values[-1:]
        place = next((at for at, (key, _) in enumerate(self.pairs) if key.lower() == name.lower()), None)
        kept_name = name if place is None else self.pairs[place][0]
        self.remove(name)
        if not values:
            return
        self.pairs.insert(len(self.pairs) if place is None else place, (kept_name, values[0]))
        self.pairs.extend((name, value) for value in values[1:])

    def remove(self, name: str) -> None:
        """Remove every header of that name."""
        self.pairs = [pair for pair in self.pairs if pair[0].lower() != name.lower()]


# --- the request ----------------------------------------------------------------------


@dataclass
class RequestContext:
    """One request on its way through the gateway: what came in, and what plugins made of it."""

    head: http1.RequestHead
    config: GatewayConfig
    route: Route
    client: tuple[str, int]
    server_port: int
    request_id: str
    node_id: str
    upstream_path: str
    read_body: Callable[[], Awaitable[bytes]]
    spool_body: Callable[[bytes], str]
    write_log: Callable[[str, str], None]
    request_variable: str = ""
    method: str = ""
    query: str = ""
    upstream_host: str | None = None
    target_address: tuple[str, int] | None = None
    body: bytes | None = None
    consumer: bytes | None = None
    credential: bytes | None = None
    headers: HeaderList = field(init=False)
    response_headers: list[tuple[str, str]] = field(default_factory=list)
    shared: dict[str, Any] = field(default_factory=dict)
    serialized: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take the changeable parts from the head."""
        self.headers = HeaderList(self.head.headers)
        self.method = self.method or self.head.method
        self.query = self.query or self.head.target.partition("?")[2]
        if self.route.preserve_host:
            self.upstream_host = http1.first(self.head.headers, "host")

    @property
    def service(self) -> Service | None:
        """Return the route's service."""
        return self.route.service

    @property
    def host(self) -> str:
        """Return the host that was asked, lower case, without a port; the server's name when none was."""
        host = http1.first(self.head.headers, "host") or "kong"
        name, separator, port = host.rpartition(":")
        return (name if separator and port.isdigit() else host).removesuffix(".").lower()

    def set_response_header(self, name: str, values: list[str]) -> None:
        """Replace a header of the answer; no values remove it."""
        # ngx.header.some_name means Some-Name.
        name = escape_header_name(name.replace("_", "-"))
        if name.lower() == "transfer-encoding":
            self.write_log("warn", "manually setting Transfer-Encoding. Ignored.")
            return
        self.response_headers = [pair for pair in self.response_headers if pair[0].lower() != name.lower()]
        self.response_headers += [(name, escape_header_value(value)) for value in values]


# --- Lua's view of values -------------------------------------------------------------


def lua_value(payload: bytes) -> Any:
    """Decode a `google.protobuf.Value` to what Kong's Lua makes of it; None is nil."""
    result: Any = None
    for number, value in wire.read_fields(payload):
        if number == 1:
            result = _NULL
        elif number == 2 and isinstance(value, bytes):
            result = _DOUBLE.unpack(value)[0]
        elif number == 3 and isinstance(value, bytes):
            result = wire.decode_text(value)
        elif number == 4:
            result = True if value else None
        elif number == 5 and isinstance(value, bytes):
            result = lua_struct(value)
        elif number == 6 and isinstance(value, bytes):
            result = lua_list(value)
    return result


def lua_list(payload: bytes) -> list[Any]:
    """Decode a `ListValue`; it ends where Lua's `ipairs` would."""
    result = []
    for number, item in wire.read_fields(payload):
        if number == 1 and isinstance(item, bytes):
            value = lua_value(item)
            if value is None:
                break
            result.append(value)
    return result


def lua_struct(payload: bytes) -> dict[str, Any]:
    """Decode a `Struct`; members that are nil are not there."""
    result = {}
    for number, entry in wire.read_fields(payload):
        if number == 1 and isinstance(entry, bytes):
            members = dict(wire.read_fields(entry))
            name, value = members.get(1, b""), members.get(2, b"")
            if isinstance(value, bytes) and (decoded := lua_value(value)) is not None:
                result[wire.decode_text(name)] = decoded
    return result


def _lua_kv(payload: bytes) -> tuple[str, Any]:
    members = dict(wire.read_fields(payload))
    value = members.get(2, b"")
    return wire.decode_text(members.get(1, b"")), lua_value(value) if isinstance(value, bytes) else None


def tostring(value: Any) -> str:
    """Return what Lua's tostring gives for a string, a number or a boolean."""
    if value is True:
        return "true"
    if isinstance(value, float):
        return f"{value:.14g}" if math.isfinite(value) else str(value)
    return str(value)


def header_values(name: str, value: Any) -> list[str]:
    """
    Return the values that a set_header with *value* gives the header; none to remove it.

    Raises:
        LuaError: a type that Kong's check refuses.
    """
    if isinstance(value, dict):
        return []  # a table without an array part: nginx is given no value at all
    if isinstance(value, list):
        if not all(isinstance(item, str) for item in value):
            raise LuaError(f'invalid header value in array "{name}": expected string')
        return [item or " " for item in value]
    if value is None:
        raise LuaError(f'invalid header value for "{name}": got nil')
    text = tostring(value)
    return [text or " "]


def _wrap_value(value: Any) -> bytes:
    """Encode a Lua value as `google.protobuf.Value`; nil goes out as enum number 1, as Kong sends it."""
    if value is None:
        return b"\x08\x01"
    if isinstance(value, list) and not value:
        value = {}  # an empty table has no first item
    return wire.encode_value(value)


# --- encoding of the larger messages --------------------------------------------------


def _bytes_field(number: int, value: bytes) -> bytes:
    return wire.encode_varint(number << 3 | 2) + wire.encode_varint(len(value)) + value


def _text_field(number: int, value: str | None) -> bytes:
    return _bytes_field(number, wire.encode_text(value)) if value else b""


def _int_field(number: int, value: int) -> bytes:
    return wire.encode_varint(number << 3) + wire.encode_varint(value) if value else b""


def _bool_field(number: int, *, value: bool) -> bytes:
    # Unlike numbers, booleans are sent even when false.
    return wire.encode_varint(number << 3) + (b"\x01" if value else b"\x00")


def encode_route(route: Route) -> bytes:
    """Encode `Route`."""
    texts = ((5, route.protocols), (6, route.methods), (7, route.hosts), (8, route.paths), (17, route.tags))
    return b"".join(
        (
            _text_field(1, route.id),
            _int_field(2, route.created_at),
            _int_field(3, route.created_at),
            _text_field(4, route.name),
            *(_text_field(number, text) for number, items in texts for text in items),
            _int_field(10, route.https_redirect_status_code),
            _int_field(11, route.regex_priority),
            _bool_field(12, value=route.strip_path),
            _bool_field(13, value=route.preserve_host),
            _bytes_field(18, _text_field(1, route.service.id)) if route.service else b"",
        )
    )


def encode_service(service: Service) -> bytes:
    """Encode `Service`."""
    return b"".join(
        (
            _text_field(1, service.id),
            _int_field(2, service.created_at),
            _int_field(3, service.created_at),
            _text_field(4, service.name),
            _int_field(5, service.retries),
            _text_field(6, service.protocol),
            _text_field(7, service.host),
            _int_field(8, service.port),
            _text_field(9, service.path),
            _int_field(10, service.connect_timeout),
            _int_field(11, service.write_timeout),
            _int_field(12, service.read_timeout),
            *(_text_field(13, tag) for tag in service.tags),
        )
    )


def encode_consumer(consumer: Consumer) -> bytes:
    """Encode `Consumer`."""
    return b"".join(
        (
            _text_field(1, consumer.id),
            _int_field(2, consumer.created_at),
            _text_field(3, consumer.username),
            _text_field(4, consumer.custom_id),
            *(_text_field(5, tag) for tag in consumer.tags),
        )
    )


# --- the methods ----------------------------------------------------------------------

Method = Callable[[RequestContext, bytes], bytes | Awaitable[bytes]]


async def call(context: RequestContext, method: str, arguments: bytes) -> bytes:
    """
    Answer one PDK call.

    Returns:
        The encoded result, empty when there is none.

    Raises:
        UnknownMethodError, LuaError, ResponseExit: the event ends here.
    """
    function = METHODS.get(method)
    if function is None:
        raise UnknownMethodError(method)
    try:
        result = function(context, arguments)
        return result if isinstance(result, bytes) else await result
    except (RemoteProtocolError, struct.error, ValueError) as error:
        raise LuaError(f"{method}: {error}") from None


def _text(value: str | None) -> bytes:
    return wire.encode_string(value or "")


def _get_header(context: RequestContext, arguments: bytes) -> bytes:
    return _text(context.headers.get(wire.decode_string(arguments)))


def _maximum(arguments: bytes, what: str) -> int:
    most = wire.decode_int(arguments)
    if not 1 <= most <= _MAX_MAX:
        raise LuaError(f"{what} must be >= 1 and <= {_MAX_MAX}")
    return most


def _get_headers(context: RequestContext, arguments: bytes) -> bytes:
    headers = context.headers.by_name(_maximum(arguments, "max_headers"))
    return wire.encode_struct(
        {name: values[0] if len(values) == 1 else values for name, values in headers.items()}
    )


def parse_query(query: str, most: int = _DEFAULT_MAX) -> dict[str, Any]:
    """Return the arguments as ngx.req.get_uri_args does: True without a value, a list when repeated."""
    result: dict[str, Any] = {}
    for item in [item for item in query.split("&") if item][:most]:
        name, separator, text = item.partition("=")
        value: Any = _unquote(text) if separator else True
        name = _unquote(name)
        if name in result:
            earlier = result[name]
            result[name] = [*earlier, value] if isinstance(earlier, list) else [earlier, value]
        elif name:
            result[name] = value
    return result


def _unquote(text: str) -> str:
    return http1.decode(unquote_to_bytes(http1.encode(text.replace("+", " "))))


def _get_query_arg(context: RequestContext, arguments: bytes) -> bytes:
    value = parse_query(context.query).get(wire.decode_string(arguments))
    if isinstance(value, list):
        value = value[0]
    if value is True:
        raise LuaError("string expected for field 'v', got boolean")
    return _text(value)


def _get_query(context: RequestContext, arguments: bytes) -> bytes:
    return wire.encode_struct(parse_query(context.query, _maximum(arguments, "max_args")))


async def _get_raw_body(context: RequestContext, _arguments: bytes) -> bytes:
    if context.body is None:
        context.body = await context.read_body()
    if len(context.body) <= BODY_BUFFER_BYTES:
        return _bytes_field(1, context.body)
    return _text_field(2, context.spool_body(context.body))


def _get_var(context: RequestContext, arguments: bytes) -> bytes:
    name = wire.decode_string(arguments)
    if name.startswith("http_"):
        wanted = name[len("http_") :]
        found = [value for key, value in context.headers.pairs if key.lower().replace("-", "_") == wanted]
        return _text(("; " if wanted == "cookie" else ", ").join(found))
    target = context.head.target
    values = {
        "request_id": context.request_variable,
        "kong_request_id": context.request_id,
        "remote_addr": context.client[0],
        "realip_remote_addr": context.client[0],
        "remote_port": str(context.client[1]),
        "server_port": str(context.server_port),
        "scheme": "http",
        "host": context.host,
        "request_method": context.method,
        "request_uri": target,
        "uri": routing.normalize(target.partition("?")[0]),
        "args": context.query,
        "query_string": context.query,
        "is_args": "?" if context.query else "",
        "server_protocol": f"HTTP/1.{context.head.minor_version}",
        "content_type": http1.first(context.head.headers, "content-type") or "",
        "content_length": http1.first(context.head.headers, "content-length") or "",
        "request": f"{context.head.method} {target} HTTP/1.{context.head.minor_version}",
        "upstream_uri": context.upstream_path,
        "server_name": "kong",
    }
    if name.startswith("arg_"):
        # As it was sent: nginx decodes nothing here.
        pairs = [item.partition("=") for item in context.query.split("&")]
        return _text(next((value for key, _, value in pairs if key.lower() == name[len("arg_") :]), ""))
    return _text(values.get(name))


def _get_path(context: RequestContext, _arguments: bytes) -> bytes:
    return _text(routing.normalize(context.head.target.partition("?")[0]))


def _set_header(context: RequestContext, arguments: bytes) -> bytes:
    name, value = _lua_kv(arguments)
    values = header_values(name, value)
    if name.lower() == "host" and values:
        context.upstream_host = values[-1]
    context.headers.set(name, values)
    return b""


def _add_header(context: RequestContext, arguments: bytes) -> bytes:
    name, value = _lua_kv(arguments)
    context.headers.set(name, context.headers.by_name().get(name.lower(), []) + header_values(name, value))
    return b""


def _set_headers(context: RequestContext, arguments: bytes) -> bytes:
    checked = [(name, header_values(name, value)) for name, value in lua_struct(arguments).items()]
    for name, values in checked:
        if name.lower() == "host" and values:
            context.upstream_host = values[-1]
        context.headers.set(name, values)
    return b""


def _clear_header(context: RequestContext, arguments: bytes) -> bytes:
    context.headers.remove(wire.decode_string(arguments))
    return b""


def _set_raw_query(context: RequestContext, arguments: bytes) -> bytes:
    context.query = wire.decode_string(arguments)
    return b""


def _set_scheme(_context: RequestContext, arguments: bytes) -> bytes:
    scheme = wire.decode_string(arguments)
    if scheme != "http":
        raise LuaError(f"invalid scheme: {scheme}; the sandbox proxies to http only")
    return b""


def _set_status(_context: RequestContext, arguments: bytes) -> bytes:
    # The upstream's or the exit's status replaces it, so there is nothing to remember.
    if not 100 <= wire.decode_int(arguments) <= 599:
        raise LuaError("code must be a number between 100 and 599")
    return b""


def _set_path(context: RequestContext, arguments: bytes) -> bytes:
    path = wire.decode_string(arguments)
    if not path.startswith("/"):
        raise LuaError("path must start with /")
    context.upstream_path = routing.escape(path)
    return b""


def _set_method(context: RequestContext, arguments: bytes) -> bytes:
    method = wire.decode_string(arguments)
    if method not in _METHODS:
        raise LuaError(f"invalid method: {method}")
    context.method = method
    return b""


def _set_raw_body(context: RequestContext, arguments: bytes) -> bytes:
    context.body = wire.encode_text(wire.decode_string(arguments))
    return b""


def _set_target(context: RequestContext, arguments: bytes) -> bytes:
    members = dict(wire.read_fields(arguments))
    port = members.get(2, 0)
    context.target_address = (wire.decode_text(members.get(1, b"")), port if isinstance(port, int) else 0)
    return b""


def _set_response_header(context: RequestContext, arguments: bytes) -> bytes:
    name, value = _lua_kv(arguments)
    context.set_response_header(name, header_values(name, value))
    return b""


def _add_response_header(context: RequestContext, arguments: bytes) -> bytes:
    name, value = _lua_kv(arguments)
    earlier = [text for key, text in context.response_headers if key.lower() == name.lower()]
    context.set_response_header(name, earlier + header_values(name, value))
    return b""


def _set_response_headers(context: RequestContext, arguments: bytes) -> bytes:
    for name, values in [(name, header_values(name, value)) for name, value in lua_struct(arguments).items()]:
        context.set_response_header(name, values)
    return b""


def _clear_response_header(context: RequestContext, arguments: bytes) -> bytes:
    context.set_response_header(wire.decode_string(arguments), [])
    return b""


def _exit(context: RequestContext, arguments: bytes) -> bytes:
    members = dict(wire.read_fields(arguments))
    raw_status, body, raw_headers = members.get(1, 0), members.get(2, b""), members.get(3, b"")
    if not isinstance(raw_status, int) or not 100 <= raw_status <= 599:
        raise LuaError("code must be a number between 100 and 599")
    headers = lua_struct(raw_headers) if isinstance(raw_headers, bytes) else {}
    for name, values in [(name, header_values(name, value)) for name, value in headers.items()]:
        context.set_response_header(name, values)
    raise ResponseExit(raw_status, body if isinstance(body, bytes) else b"", list(context.response_headers))


def _get_service(context: RequestContext, _arguments: bytes) -> bytes:
    return encode_service(context.service) if context.service else b""


def _load_consumer(context: RequestContext, arguments: bytes) -> bytes:
    members = dict(wire.read_fields(arguments))
    wanted, by_username = wire.decode_text(members.get(1, b"")), bool(members.get(2, 0))
    if not by_username and not re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", wanted):
        raise LuaError("cannot load a consumer with an id that is not a uuid")
    for consumer in context.config.consumers:
        if consumer.id == wanted or (by_username and consumer.username == wanted):
            return encode_consumer(consumer)
    return b""


def _authenticate(context: RequestContext, arguments: bytes) -> bytes:
    members = dict(wire.read_fields(arguments))
    consumer, credential = members.get(1), members.get(2)
    if consumer is None and credential is None:
        raise LuaError("either credential or consumer must be provided")
    context.consumer = consumer if isinstance(consumer, bytes) else None
    context.credential = credential if isinstance(credential, bytes) else None
    return b""


def _get_shared(context: RequestContext, arguments: bytes) -> bytes:
    return _wrap_value(context.shared.get(wire.decode_string(arguments)))


def _set_shared(context: RequestContext, arguments: bytes) -> bytes:
    name, value = _lua_kv(arguments)
    context.shared[name] = value
    return b""


def _set_serialize_value(context: RequestContext, arguments: bytes) -> bytes:
    name, value = _lua_kv(arguments)
    context.serialized[name] = value
    return b""


def _serialize(context: RequestContext, _arguments: bytes) -> bytes:
    request = {"method": context.method, "uri": context.head.target, "id": context.request_id}
    return _text(json.dumps({"request": request, "client_ip": context.client[0], **context.serialized}))


def _log(level: str) -> Method:
    def write(context: RequestContext, arguments: bytes) -> bytes:
        context.write_log(level, "".join(tostring(item) for item in lua_list(arguments)))
        return b""

    return write


def _constant(get: Callable[[RequestContext], bytes]) -> Method:
    """Make a method that takes no arguments."""
    return lambda context, _arguments: get(context)


METHODS: Mapping[str, Method] = {
    "kong.request.get_header": _get_header,
    "kong.request.get_headers": _get_headers,
    "kong.request.get_query": _get_query,
    "kong.request.get_query_arg": _get_query_arg,
    "kong.request.get_raw_body": _get_raw_body,
    "kong.request.get_path": _get_path,
    "kong.request.get_method": _constant(lambda c: _text(c.method)),
    "kong.request.get_path_with_query": _constant(lambda c: _text(c.head.target)),
    "kong.request.get_raw_query": _constant(lambda c: _text(c.query)),
    "kong.request.get_scheme": _constant(lambda _: _text("http")),
    "kong.request.get_host": _constant(lambda c: _text(c.host)),
    "kong.request.get_port": _constant(lambda c: wire.encode_int(c.server_port)),
    "kong.request.get_forwarded_scheme": _constant(lambda _: _text("http")),
    "kong.request.get_forwarded_host": _constant(lambda c: _text(c.host)),
    "kong.request.get_forwarded_port": _constant(lambda c: wire.encode_int(c.server_port)),
    "kong.request.get_http_version": _constant(
        lambda c: b"\x09" + _DOUBLE.pack(1 + c.head.minor_version / 10)
    ),
    # Captures of a regular expression are not kept; a prefix has none.
    "kong.request.get_uri_captures": _constant(lambda _: b""),
    "kong.client.get_ip": _constant(lambda c: _text(c.client[0])),
    "kong.client.get_forwarded_ip": _constant(lambda c: _text(c.client[0])),
    "kong.client.get_port": _constant(lambda c: wire.encode_int(c.client[1])),
    "kong.client.get_forwarded_port": _constant(lambda c: wire.encode_int(c.client[1])),
    "kong.client.get_protocol": _constant(lambda _: _text("http")),
    "kong.client.get_consumer": _constant(lambda c: c.consumer or b""),
    "kong.client.get_credential": _constant(lambda c: c.credential or b""),
    "kong.client.load_consumer": _load_consumer,
    "kong.client.authenticate": _authenticate,
    "kong.ip.is_trusted": _constant(lambda _: _bool_field(1, value=False)),
    "kong.router.get_route": _constant(lambda c: encode_route(c.route)),
    "kong.router.get_service": _get_service,
    "kong.nginx.get_var": _get_var,
    "kong.nginx.get_subsystem": _constant(lambda _: _text("http")),
    "kong.ctx.shared.get": _get_shared,
    "kong.ctx.shared.set": _set_shared,
    "kong.node.get_id": _constant(lambda c: _text(c.node_id)),
    "kong.log.alert": _log("alert"),
    "kong.log.crit": _log("crit"),
    "kong.log.err": _log("err"),
    "kong.log.warn": _log("warn"),
    "kong.log.notice": _log("notice"),
    "kong.log.info": _log("info"),
    "kong.log.debug": _log("debug"),
    "kong.log.serialize": _serialize,
    "kong.log.set_serialize_value": _set_serialize_value,
    "kong.service.request.set_header": _set_header,
    "kong.service.request.add_header": _add_header,
    "kong.service.request.set_headers": _set_headers,
    "kong.service.request.clear_header": _clear_header,
    "kong.service.request.set_raw_query": _set_raw_query,
    "kong.service.request.set_path": _set_path,
    "kong.service.request.set_scheme": _set_scheme,
    "kong.service.request.set_method": _set_method,
    "kong.service.request.set_raw_body": _set_raw_body,
    "kong.service.set_target": _set_target,
    "kong.response.set_status": _set_status,
    "kong.response.set_header": _set_response_header,
    "kong.response.add_header": _add_response_header,
    "kong.response.set_headers": _set_response_headers,
    "kong.response.clear_header": _clear_response_header,
    "kong.response.exit": _exit,
}

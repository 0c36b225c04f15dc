"""
The bytes between Kong and a plugin server: frames and messages of ProtoBuf:1.

A frame is a 4-byte little-endian length and that many bytes. The messages are
the few of Kong's `pluginsocket.proto` that travel during an event, read by tag
because Kong changes the order of fields from one start to the next.
No I/O here, and both directions of each message, since the sandbox gateway
speaks Kong's side with the same functions.

Text is decoded as UTF-8 with `surrogateescape`: header bytes come through raw,
and a decoder that raised would let a client break the conversation.

Source: Kong `kong/include/kong/pluginsocket.proto`; docs/plugin-socket.md.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kong_token_exchange.errors import RemoteProtocolError

JsonValue = None | bool | int | float | str | Sequence["JsonValue"] | Mapping[str, "JsonValue"]

# Kong sends nothing larger than a plugin configuration or one request body that
# fits its buffer (client_body_buffer_size, 8 KB by default); 4 MiB leaves room
# for configurations with many inlined keys and bounds what a peer can make us hold.
MAX_FRAME_BYTES = 4 * 1024 * 1024

# google.protobuf.Value nests; JSON of Kong's own never comes near this.
MAX_VALUE_DEPTH = 64

_LENGTH = struct.Struct("<I")
_DOUBLE = struct.Struct("<d")

_VARINT, _FIXED64, _LEN, _FIXED32 = 0, 1, 2, 5

# Field 1, length-delimited: `v` of String.
_STRING_TAG = 1 << 3 | _LEN

EMPTY_FRAME = _LENGTH.pack(0)

# Field numbers of RpcCall and RpcReturn in pluginsocket.proto.
_SEQUENCE = 1
_GET_PLUGIN_NAMES, _GET_PLUGIN_INFO, _START_INSTANCE = 31, 32, 33
_GET_INSTANCE_STATUS, _CLOSE_INSTANCE, _HANDLE_EVENT = 34, 35, 36
_PLUGIN_NAMES, _PLUGIN_INFO, _INSTANCE_STATUS = 31, 32, 33


# --- frames ---------------------------------------------------------------------------


def frame(payload: bytes) -> bytes:
    """Return *payload* with its length in front."""
    return _LENGTH.pack(len(payload)) + payload


class FrameReader:
    """
    Cut a byte stream into frames.

    Feed it whatever arrived, then take frames until there are none. A declared
    length above the limit raises at once, before anything is buffered for it.
    """

    __slots__ = ("_buffer", "_max_bytes", "_start")

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._buffer = bytearray()
        self._start = 0
        self._max_bytes = max_bytes

    def feed(self, data: bytes) -> None:
        """Add bytes that arrived."""
        self._buffer += data

    def next_frame(self) -> bytes | None:
        """
        Take the next whole frame, or None when more bytes are needed.

        Raises:
            RemoteProtocolError: the declared length is above the limit.
        """
        buffer, start = self._buffer, self._start
        if len(buffer) - start < 4:
            self._compact()
            return None
        (length,) = _LENGTH.unpack_from(buffer, start)
        if length > self._max_bytes:
            raise RemoteProtocolError(reason="frame_too_long", facts={"length": length})
        end = start + 4 + length
        if len(buffer) < end:
            self._compact()
            return None
        payload = bytes(buffer[start + 4 : end])
        self._start = end
        if end == len(buffer):
            buffer.clear()
            self._start = 0
        return payload

    def pending_bytes(self) -> int:
        """Return how many bytes are held that no frame has taken yet."""
        return len(self._buffer) - self._start

    def _compact(self) -> None:
        if self._start:
            del self._buffer[: self._start]
            self._start = 0


# --- protobuf primitives --------------------------------------------------------------


def encode_varint(value: int) -> bytes:
    """Encode an int64 (negative values take ten bytes, as protobuf does)."""
    if value < 0:
        value += 1 << 64
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    size = len(data)
    while True:
        if position >= size or shift > 63:
            raise RemoteProtocolError(reason="varint_malformed")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position
        shift += 7


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def read_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """
    Yield (field number, value) for each field of a message.

    Args:
        data: One encoded message.

    Returns:
        Varints as unsigned int, everything else as the bytes of its payload
        (8 or 4 bytes for fixed64 and fixed32).

    Raises:
        RemoteProtocolError: truncated or of a wire type protobuf 3 does not use.
    """
    position, size = 0, len(data)
    while position < size:
        key, position = _read_varint(data, position)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise RemoteProtocolError(reason="field_number_zero")
        value: int | bytes
        if kind == _VARINT:
            value, position = _read_varint(data, position)
        else:
            if kind == _LEN:
                length, position = _read_varint(data, position)
            elif kind == _FIXED64:
                length = 8
            elif kind == _FIXED32:
                length = 4
            else:
                raise RemoteProtocolError(reason="wire_type_unknown", facts={"wire_type": kind})
            if size - position < length:
                raise RemoteProtocolError(reason="message_truncated")
            value = data[position : position + length]
            position += length
        yield number, value


def _tag(number: int, kind: int) -> bytes:
    return encode_varint(number << 3 | kind)


def _len_field(number: int, payload: bytes) -> bytes:
    return _tag(number, _LEN) + encode_varint(len(payload)) + payload


def _int_field(number: int, value: int) -> bytes:
    return _tag(number, _VARINT) + encode_varint(value) if value else b""


def _text_field(number: int, value: str) -> bytes:
    return _len_field(number, encode_text(value)) if value else b""


def encode_text(value: str) -> bytes:
    """Encode text as it came: bytes that were not UTF-8 go out unchanged."""
    return value.encode("utf-8", "surrogateescape")


def decode_text(value: int | bytes) -> str:
    """Decode text, keeping bytes that are not UTF-8 as lone surrogates."""
    return _bytes(value).decode("utf-8", "surrogateescape")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise RemoteProtocolError(reason="wire_type_mismatch")
    return value


def _int(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise RemoteProtocolError(reason="wire_type_mismatch")
    return _signed(value)


def _double(value: int | bytes) -> float:
    raw = _bytes(value)
    if len(raw) != _DOUBLE.size:
        raise RemoteProtocolError(reason="wire_type_mismatch")
    result: float = _DOUBLE.unpack(raw)[0]
    return result


# --- commands of Kong and our answers -------------------------------------------------


@dataclass(frozen=True, slots=True)
class GetPluginNames:
    """Kong asks which plugins this server has."""

    sequence: int = 0


@dataclass(frozen=True, slots=True)
class GetPluginInfo:
    """Kong asks for one plugin's description."""

    sequence: int = 0
    name: str = ""


@dataclass(frozen=True, slots=True)
class StartInstance:
    """Kong hands over one plugin configuration, as JSON bytes."""

    sequence: int = 0
    name: str = ""
    config: bytes = b""


@dataclass(frozen=True, slots=True)
class GetInstanceStatus:
    """Kong asks whether an instance lives."""

    sequence: int = 0
    instance_id: int = 0


@dataclass(frozen=True, slots=True)
class CloseInstance:
    """Kong lets go of one start of an instance."""

    sequence: int = 0
    instance_id: int = 0


@dataclass(frozen=True, slots=True)
class HandleEvent:
    """Kong runs one phase of one request on an instance."""

    sequence: int = 0
    instance_id: int = 0
    event_name: str = ""


RpcCall = GetPluginNames | GetPluginInfo | StartInstance | GetInstanceStatus | CloseInstance | HandleEvent


def decode_call(payload: bytes) -> RpcCall:
    """
    Decode one RpcCall.

    Raises:
        RemoteProtocolError: not a message, or a command we do not know.
    """
    sequence, command, body = 0, 0, b""
    for number, value in read_fields(payload):
        if number == _SEQUENCE:
            sequence = _int(value)
        elif _GET_PLUGIN_NAMES <= number <= _HANDLE_EVENT:
            command, body = number, _bytes(value)
    if not command:
        raise RemoteProtocolError(reason="command_unknown")
    return _decode_command(sequence, command, body)


def _decode_command(sequence: int, command: int, body: bytes) -> RpcCall:
    members = dict(read_fields(body))
    match command:
        case 31:
            return GetPluginNames(sequence)
        case 32:
            return GetPluginInfo(sequence, decode_text(members.get(1, b"")))
        case 33:
            return StartInstance(sequence, decode_text(members.get(1, b"")), _bytes(members.get(2, b"")))
        case 34:
            return GetInstanceStatus(sequence, _int(members.get(1, 0)))
        case 35:
            return CloseInstance(sequence, _int(members.get(1, 0)))
        case _:
            return HandleEvent(sequence, _int(members.get(1, 0)), decode_text(members.get(2, b"")))


def encode_call(call: RpcCall) -> bytes:
    """Encode one RpcCall: Kong's side, used by the sandbox gateway and by tests."""
    match call:
        case GetPluginNames():
            number, body = _GET_PLUGIN_NAMES, b""
        case GetPluginInfo(name=name):
            number, body = _GET_PLUGIN_INFO, _text_field(1, name)
        case StartInstance(name=name, config=config):
            number, body = _START_INSTANCE, _text_field(1, name) + (_len_field(2, config) if config else b"")
        case GetInstanceStatus(instance_id=instance_id):
            number, body = _GET_INSTANCE_STATUS, _int_field(1, instance_id)
        case CloseInstance(instance_id=instance_id):
            number, body = _CLOSE_INSTANCE, _int_field(1, instance_id)
        case HandleEvent(instance_id=instance_id, event_name=event_name):  # pragma: no branch - the last kind
            number, body = _HANDLE_EVENT, _int_field(1, instance_id) + _text_field(2, event_name)
    return _int_field(_SEQUENCE, call.sequence) + _len_field(number, body)


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """What a started (or living) instance says of itself."""

    name: str
    instance_id: int
    started_at: int = 0


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """What GetPluginInfo asks for; *schema* is JSON text."""

    name: str
    phases: Sequence[str]
    version: str
    priority: int
    schema: str


@dataclass(frozen=True, slots=True)
class RpcReturn:
    """The end of a command; of an event it holds the sequence alone."""

    sequence: int = 0
    instance_status: InstanceStatus | None = None


def encode_return(sequence: int, instance_status: InstanceStatus | None = None) -> bytes:
    """Encode one RpcReturn. The configuration is never sent back: it holds secrets (GW-13)."""
    head = _int_field(_SEQUENCE, sequence)
    if instance_status is None:
        return head
    body = (
        _text_field(1, instance_status.name)
        + _int_field(2, instance_status.instance_id)
        + _int_field(4, instance_status.started_at)
    )
    return head + _len_field(_INSTANCE_STATUS, body)


def encode_plugin_names(sequence: int, names: Sequence[str]) -> bytes:
    """Encode the RpcReturn that answers GetPluginNames."""
    body = b"".join(_len_field(1, encode_text(name)) for name in names)
    return _int_field(_SEQUENCE, sequence) + _len_field(_PLUGIN_NAMES, body)


def encode_plugin_info(sequence: int, info: PluginInfo) -> bytes:
    """Encode the RpcReturn that answers GetPluginInfo."""
    body = (
        _text_field(1, info.name)
        + b"".join(_len_field(4, encode_text(phase)) for phase in info.phases)
        + _text_field(5, info.version)
        + _int_field(6, info.priority)
        + _text_field(7, info.schema)
    )
    return _int_field(_SEQUENCE, sequence) + _len_field(_PLUGIN_INFO, body)


def decode_return(payload: bytes) -> RpcReturn:
    """
    Decode one RpcReturn: Kong's side.

    Raises:
        RemoteProtocolError: not a message.
    """
    sequence, status = 0, None
    for number, value in read_fields(payload):
        if number == _SEQUENCE:
            sequence = _int(value)
        elif number == _INSTANCE_STATUS:
            members = dict(read_fields(_bytes(value)))
            status = InstanceStatus(
                decode_text(members.get(1, b"")), _int(members.get(2, 0)), _int(members.get(4, 0))
            )
    return RpcReturn(sequence, status)


# --- argument and result messages of PDK calls ----------------------------------------


def encode_string(value: str) -> bytes:
    """Encode `String`: the argument of most getters, the answer of most too."""
    return _text_field(1, value)


def decode_string(payload: bytes) -> str:
    """Decode `String` or `ByteString`; an empty frame (absent) reads as ""."""
    size = len(payload)
    # One field shorter than 16 KiB is what a header value looks like: no loop for it.
    if size > 2 and payload[0] == _STRING_TAG:
        length = payload[1]
        if length < 0x80:
            if size == length + 2:
                return payload[2:].decode("utf-8", "surrogateescape")
        elif payload[2] < 0x80 and size == (length & 0x7F | payload[2] << 7) + 3:
            return payload[3:].decode("utf-8", "surrogateescape")
    result = ""
    for number, value in read_fields(payload):
        if number == 1:
            result = decode_text(value)
    return result


def encode_int(value: int) -> bytes:
    """Encode `Int`."""
    return _int_field(1, value)


def decode_int(payload: bytes) -> int:
    """Decode `Int` or `Bool`; an empty frame reads as 0."""
    result = 0
    for number, value in read_fields(payload):
        if number == 1:
            result = _int(value)
    return result


def encode_bool(value: bool) -> bytes:  # noqa: FBT001 - the message is one boolean
    """Encode `Bool`."""
    return _int_field(1, int(value))


def decode_bool(payload: bytes) -> bool:
    """Decode `Bool`; an empty frame reads as False."""
    return bool(decode_int(payload))


def encode_number(value: float) -> bytes:
    """Encode `Number`."""
    return b"\x09" + _DOUBLE.pack(value) if value else b""


def decode_number(payload: bytes) -> float:
    """Decode `Number`; an empty frame reads as 0."""
    result = 0.0
    for number, value in read_fields(payload):
        if number == 1:
            result = _double(value)
    return result


def encode_byte_string(value: bytes) -> bytes:
    """Encode `ByteString`."""
    return _len_field(1, value) if value else b""


def decode_byte_string(payload: bytes) -> bytes:
    """Decode `ByteString` without reading it as text."""
    result = b""
    for number, value in read_fields(payload):
        if number == 1:
            result = _bytes(value)
    return result


def encode_value(value: JsonValue) -> bytes:
    """
    Encode `google.protobuf.Value`.

    Raises:
        ValueError: a type JSON does not have, or a number that is not finite.
    """
    if value is None:
        return b"\x08\x00"
    if isinstance(value, bool):
        return b"\x20\x01" if value else b"\x20\x00"
    if isinstance(value, int | float):
        number = float(value)
        if not math.isfinite(number):
            raise ValueError("a Value holds finite numbers only")
        return b"\x11" + _DOUBLE.pack(number)
    if isinstance(value, str):
        return _len_field(3, encode_text(value))
    if isinstance(value, Mapping):
        return _len_field(5, encode_struct(value))
    if isinstance(value, list | tuple):
        return _len_field(6, encode_list(value))
    raise ValueError(f"a Value cannot hold {type(value).__name__}")


def decode_value(payload: bytes, *, depth: int = MAX_VALUE_DEPTH) -> JsonValue:
    """
    Decode `google.protobuf.Value`; an empty message reads as None.

    Raises:
        RemoteProtocolError: malformed, or nested deeper than *depth*.
    """
    if depth <= 0:
        raise RemoteProtocolError(reason="value_too_deep")
    result: JsonValue = None
    for number, value in read_fields(payload):
        match number:
            case 1:
                result = None
            case 2:
                result = _double(value)
            case 3:
                result = decode_text(value)
            case 4:
                result = bool(_int(value))
            case 5:
                result = decode_struct(_bytes(value), depth=depth - 1)
            case 6:
                result = decode_list(_bytes(value), depth=depth - 1)
    return result


def encode_list(items: Sequence[JsonValue]) -> bytes:
    """Encode `google.protobuf.ListValue`: the arguments of kong.log."""
    return b"".join(_len_field(1, encode_value(item)) for item in items)


def decode_list(payload: bytes, *, depth: int = MAX_VALUE_DEPTH) -> list[JsonValue]:
    """
    Decode `google.protobuf.ListValue`.

    Raises:
        RemoteProtocolError: malformed, or nested deeper than *depth*.
    """
    items = [_bytes(item) for number, item in read_fields(payload) if number == 1]
    return [decode_value(item, depth=depth) for item in items]


def encode_struct(members: Mapping[str, JsonValue]) -> bytes:
    """Encode `google.protobuf.Struct`: a map from text to Value."""
    return b"".join(
        _len_field(1, _len_field(1, encode_text(name)) + _len_field(2, encode_value(value)))
        for name, value in members.items()
    )


def decode_struct(payload: bytes, *, depth: int = MAX_VALUE_DEPTH) -> dict[str, JsonValue]:
    """
    Decode `google.protobuf.Struct`.

    Raises:
        RemoteProtocolError: malformed, or nested deeper than *depth*.
    """
    result: dict[str, JsonValue] = {}
    for number, entry in read_fields(payload):
        if number == 1:
            pair = dict(read_fields(_bytes(entry)))
            result[decode_text(pair.get(1, b""))] = decode_value(_bytes(pair.get(2, b"")), depth=depth)
    return result


def encode_kv(key: str, value: JsonValue) -> bytes:
    """Encode `KV`: the argument of set_header, ctx.shared.set and their like."""
    return _text_field(1, key) + _len_field(2, encode_value(value))


def decode_kv(payload: bytes) -> tuple[str, JsonValue]:
    """Decode `KV`."""
    members = dict(read_fields(payload))
    return decode_text(members.get(1, b"")), decode_value(_bytes(members.get(2, b"")))


def encode_exit(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
    """Encode `ExitArgs`, the argument of kong.response.exit."""
    encoded = _int_field(1, status) + (_len_field(2, body) if body else b"")
    return encoded + _len_field(3, encode_struct(headers)) if headers else encoded


@dataclass(frozen=True, slots=True)
class ExitArgs:
    """A decoded `ExitArgs`: Kong's side."""

    status: int
    body: bytes
    headers: dict[str, JsonValue]


def decode_exit(payload: bytes) -> ExitArgs:
    """Decode `ExitArgs`."""
    members = dict(read_fields(payload))
    headers = decode_struct(_bytes(members[3])) if 3 in members else {}
    return ExitArgs(_int(members.get(1, 0)), _bytes(members.get(2, b"")), headers)


# --- records: messages that the PDK shows as tables -----------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """
    A message seen as a mapping of names, as the PDK's tables are.

    Args:
        fields: Field number to (member name, kind); a kind is "text", "int",
            "bool", "texts" (repeated string) or another Record.
    """

    fields: Mapping[int, tuple[str, str | Record]]

    def encode(self, members: Mapping[str, JsonValue]) -> bytes:
        """
        Encode the members this message has; others and None are left out.

        Raises:
            ValueError: a member is of another type than its field.
        """
        return b"".join(
            _encode_member(number, name, kind, members[name])
            for number, (name, kind) in self.fields.items()
            if members.get(name) is not None
        )

    def decode(self, payload: bytes) -> dict[str, JsonValue]:
        """
        Decode to the members present; a field that is absent has no member.

        Raises:
            RemoteProtocolError: malformed.
        """
        members: dict[str, JsonValue] = {}
        texts: dict[str, list[JsonValue]] = {}
        for number, value in read_fields(payload):
            if number not in self.fields:
                continue
            name, kind = self.fields[number]
            if isinstance(kind, Record):
                members[name] = kind.decode(_bytes(value))
            elif kind == "texts":
                members[name] = texts.setdefault(name, [])
                texts[name].append(decode_text(value))
            elif kind == "text":
                members[name] = decode_text(value)
            else:
                members[name] = bool(_int(value)) if kind == "bool" else _int(value)
        return members


def _encode_member(number: int, name: str, kind: str | Record, value: JsonValue) -> bytes:
    if isinstance(kind, Record) and isinstance(value, Mapping):
        return _len_field(number, kind.encode(value))
    if kind == "texts" and isinstance(value, list | tuple):
        return b"".join(_len_field(number, encode_text(str(item))) for item in value)
    if kind == "text" and isinstance(value, str):
        return _text_field(number, value)
    # True is an int: each of the two kinds takes its own only.
    if kind == ("bool" if isinstance(value, bool) else "int") and isinstance(value, int):
        return _int_field(number, int(value))
    raise ValueError(f"member {name} cannot be {type(value).__name__}")


CONSUMER_SPEC = Record({1: ("id", "text"), 2: ("by_username", "bool")})
CONSUMER = Record(
    {
        1: ("id", "text"),
        2: ("created_at", "int"),
        3: ("username", "text"),
        4: ("custom_id", "text"),
        5: ("tags", "texts"),
    }
)
CREDENTIAL = Record({1: ("id", "text"), 2: ("consumer_id", "text")})
AUTHENTICATE = Record({1: ("consumer", CONSUMER), 2: ("credential", CREDENTIAL)})
ROUTE = Record(
    {
        1: ("id", "text"),
        2: ("created_at", "int"),
        3: ("updated_at", "int"),
        4: ("name", "text"),
        5: ("protocols", "texts"),
        6: ("methods", "texts"),
        7: ("hosts", "texts"),
        8: ("paths", "texts"),
        9: ("headers", "texts"),
        10: ("https_redirect_status_code", "int"),
        11: ("regex_priority", "int"),
        12: ("strip_path", "bool"),
        13: ("preserve_host", "bool"),
        14: ("snis", "texts"),
        15: ("sources", "texts"),
        16: ("destinations", "texts"),
        17: ("tags", "texts"),
        18: ("service", Record({1: ("id", "text")})),
    }
)
SERVICE = Record(
    {
        1: ("id", "text"),
        2: ("created_at", "int"),
        3: ("updated_at", "int"),
        4: ("name", "text"),
        5: ("retries", "int"),
        6: ("protocol", "text"),
        7: ("host", "text"),
        8: ("port", "int"),
        9: ("path", "text"),
        10: ("connect_timeout", "int"),
        11: ("write_timeout", "int"),
        12: ("read_timeout", "int"),
        13: ("tags", "texts"),
        14: ("client_certificate", Record({1: ("id", "text")})),
    }
)


def encode_raw_body(content: bytes | None, *, filepath: str = "") -> bytes:
    """Encode `RawBodyResult`: a body in memory, or where Kong spooled it when *content* is None."""
    # A member of a oneof is sent even when it is empty.
    return _len_field(2, encode_text(filepath)) if content is None else _len_field(1, content)


def decode_raw_body(payload: bytes) -> bytes | None:
    """Decode `RawBodyResult`; None where Kong names a file or an error instead of the bytes."""
    content: bytes | None = None
    for number, value in read_fields(payload):
        content = _bytes(value) if number == 1 else None
    return content


def decode_config(config: bytes) -> dict[str, JsonValue]:
    """
    Read the JSON configuration that StartInstance carries.

    Raises:
        RemoteProtocolError: not a JSON object.
    """
    try:
        value = json.loads(config)
    except (ValueError, RecursionError):
        raise RemoteProtocolError(reason="config_not_json") from None
    if not isinstance(value, dict):
        raise RemoteProtocolError(reason="config_not_json")
    return value

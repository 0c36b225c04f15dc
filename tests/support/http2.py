"""
Just enough HTTP/2 to send what no client library would: names in upper case, with line breaks, with NUL.

One request on stream 1 over plain TCP with prior knowledge; every field is a literal without
indexing and without Huffman coding, so that the bytes are those that were asked for.

Source: RFC 9113 sections 3.3, 4.1, 6.2; RFC 7541 sections 6.1, 6.2.2.
"""

from __future__ import annotations

import enum
import socket
import struct
from collections.abc import Iterable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PATIENCE_S = 10.0

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _GOAWAY = 0x0, 0x1, 0x3, 0x4, 0x7
_END_STREAM_AND_HEADERS = 0x5
# Entries of the static table that name a whole status.
_INDEXED = {8: 200, 9: 204, 10: 206, 11: 304, 12: 400, 13: 404, 14: 500}


class H2C(enum.Enum):
    """What came instead of a status."""

    RESET = "the stream was reset"
    CLOSED = "the connection was closed"
    REFUSED = "no HTTP/2 is spoken here"


def header_block(path: str, fields: Iterable[tuple[str, str]], *, method: str = "GET") -> bytes:
    """Return the field block of a request to *path* with exactly these fields after the pseudo ones."""
    pseudo = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "gateway")]
    return b"".join(_literal(name.encode(), value.encode()) for name, value in [*pseudo, *fields])


def exchange_http2(url: str, block: bytes) -> int | H2C:
    """Send one request of these fields; return its status, or what came instead."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), PATIENCE_S) as sock:
        sock.settimeout(PATIENCE_S)
        request = _frame(_HEADERS, _END_STREAM_AND_HEADERS, 1, block)
        try:
            sock.sendall(PREFACE + _frame(_SETTINGS, 0, 0, b"") + request)
            return _read_answer(sock)
        except (ConnectionResetError, BrokenPipeError):
            return H2C.CLOSED


def _read_answer(sock: socket.socket) -> int | H2C:
    received = b""
    while True:
        piece = sock.recv(65536)
        if not piece:
            return H2C.CLOSED
        received += piece
        if received.startswith(b"HTTP/1"):
            return H2C.REFUSED
        while len(received) >= 9 and len(received) >= 9 + int.from_bytes(received[:3], "big"):
            size = int.from_bytes(received[:3], "big")
            kind, payload, received = received[3], received[9 : 9 + size], received[9 + size :]
            if kind == _HEADERS:
                return _status(payload)
            if kind == _RST_STREAM:
                return H2C.RESET
            if kind == _GOAWAY:
                return H2C.CLOSED


def _status(block: bytes) -> int:
    """Return the status, which comes first in a field block."""
    while block[0] & 0xE0 == 0x20:
        # A change of the table's size comes before the fields; nginx's fits one octet.
        block = block[1:]
    if block[0] & 0x80:
        return _INDEXED[block[0] & 0x7F]
    size = block[1] & 0x7F
    if block[1] & 0x80:
        raise ValueError("a status in Huffman coding is not read here")
    return int(block[2 : 2 + size])


def _literal(name: bytes, value: bytes) -> bytes:
    return b"\0" + _text(name) + _text(value)


def _text(text: bytes) -> bytes:
    """Return a string literal; its length is an integer with a prefix of 7 bits (RFC 7541 section 5.1)."""
    if len(text) < 127:
        return bytes([len(text)]) + text
    rest, octets = len(text) - 127, [127]
    while rest >= 128:
        octets.append(rest % 128 + 128)
        rest //= 128
    return bytes([*octets, rest]) + text


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload

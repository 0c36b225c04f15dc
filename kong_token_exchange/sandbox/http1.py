"""
HTTP/1.1 messages as nginx reads and writes them; no I/O here.

The sandbox gateway must refuse and admit the same requests as the nginx inside
Kong, because what the plugin has to cope with follows from that: a tab after a
token reaches the plugin, a second `Authorization` header never does. A general
HTTP library is stricter in places and more lenient in others, so this module
follows nginx's rules line by line.

Header text is decoded as UTF-8 with `surrogateescape`, like the plugin socket
(`pluginserver.wire`): bytes that are not UTF-8 come through unchanged.

Source: RFC 9112; nginx 1.25 `ngx_http_parse.c`, `ngx_http_request.c` (behaviour).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from http import HTTPStatus

Headers = tuple[tuple[str, str], ...]

# nginx's large_client_header_buffers, 4 of 8 KB and one line with its CRLF in one of them, and its
# client_header_buffer_size.
MAX_LINE_BYTES = 8 * 1024
MAX_HEAD_BYTES = 4 * MAX_LINE_BYTES + 1024

# A response head of an upstream; nginx's proxy_buffer_size is 4 or 8 KB, but a
# sandbox that truncates somebody's headers would only puzzle them.
MAX_RESPONSE_HEAD_BYTES = 64 * 1024

# A chunk-size line with extensions, and the trailers after the last chunk.
_MAX_CHUNK_LINE_BYTES = 256
_MAX_TRAILER_BYTES = 8 * 1024

_METHOD = re.compile(rb"[A-Z_-]+\Z")
_VERSION = re.compile(rb"HTTP/(\d)\.(\d{1,2})\Z")
_ABSOLUTE = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)")
_HEADER_NAME = re.compile(rb"[A-Za-z0-9_-]+\Z")
_BAD_IN_NAME = re.compile(rb"[\x00-\x20\x7f]")
_BAD_IN_TARGET = re.compile(rb"[\x00-\x20\x7f]")
_DIGITS = re.compile(r"[0-9]{1,18}\Z")
_HEX = re.compile(rb"[0-9A-Fa-f]{1,15}\Z")

# nginx answers 400 when one of these comes twice (ngx_http_process_unique_header_line).
_UNIQUE = frozenset(
    {
        "host",
        "if-modified-since",
        "if-unmodified-since",
        "if-match",
        "if-none-match",
        "content-length",
        "content-range",
        "if-range",
        "transfer-encoding",
        "expect",
        "authorization",
    }
)


class BadMessageError(Exception):
    """
    A message that is refused before anybody looks at its meaning.

    Args:
        status: What a server answers; nginx's own codes (494) are mapped already.
        detail: The text of Kong's error body where the status alone does not tell it.
    """

    def __init__(self, status: int, detail: str = "") -> None:
        super().__init__(detail or HTTPStatus(status).phrase)
        self.status, self.detail = status, detail


@dataclass(frozen=True, slots=True)
class RequestHead:
    """The request line and the headers, with what they say about the body."""

    method: str
    target: str
    minor_version: int
    headers: Headers
    content_length: int | None
    chunked: bool
    keep_alive: bool

    @property
    def has_body(self) -> bool:
        """Tell whether body bytes follow."""
        return self.chunked or bool(self.content_length)

    @property
    def expects_continue(self) -> bool:
        """Tell whether the client waits for `100 Continue` before it sends the body."""
        return self.minor_version >= 1 and (first(self.headers, "expect") or "").lower() == "100-continue"


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """The status line and the headers of a response, with what they say about the body."""

    status: int
    reason: str
    minor_version: int
    headers: Headers
    content_length: int | None
    chunked: bool
    keep_alive: bool


def decode(raw: bytes) -> str:
    """Decode header text so that `encode` gives the same bytes again."""
    return raw.decode("utf-8", "surrogateescape")


def encode(text: str) -> bytes:
    """Encode header text that `decode` made; text of our own is UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def first(headers: Iterable[tuple[str, str]], name: str) -> str | None:
    """Return the first value of *name* (lower case), or None."""
    return next((value for key, value in headers if key.lower() == name), None)


def every(headers: Iterable[tuple[str, str]], name: str) -> list[str]:
    """Return every value of *name* (lower case), in order."""
    return [value for key, value in headers if key.lower() == name]


# --- heads ----------------------------------------------------------------------------


def find_head_end(buffer: bytearray) -> int:
    """
    Return the offset just behind the empty line that ends a head, or -1.

    A lone LF ends a line too, as in nginx.
    """
    ends = [at + len(mark) for mark in (b"\n\r\n", b"\n\n") if (at := buffer.find(mark)) >= 0]
    return min(ends) if ends else -1


def check_head_size(head: bytes | bytearray) -> None:
    """
    Refuse what does not fit nginx's header buffers; *head* may be incomplete.

    Raises:
        BadMessageError: 414 for the request line, 400 for a header line or for all of them together.
    """
    for number, line in enumerate(bytes(head).split(b"\n")):
        if len(line) >= MAX_LINE_BYTES:  # the LF is not in *line*
            raise BadMessageError(
                400 if number else 414, "Request header or cookie too large" if number else ""
            )
    if len(head) > MAX_HEAD_BYTES:
        raise BadMessageError(400, "Request header or cookie too large")


def parse_request_head(head: bytes) -> RequestHead:
    """
    Read a request head as nginx would.

    Args:
        head: Everything up to and including the empty line.

    Raises:
        BadMessageError: 400 malformed, 405 TRACE or CONNECT, 501 a transfer coding, 505 an HTTP version.
    """
    lines = _lines(head)
    method, target, minor_version, authority = _parse_request_line(lines[0])
    headers = _parse_header_lines(lines[1:])
    if authority is not None:
        headers = (("Host", authority), *(pair for pair in headers if pair[0].lower() != "host"))
    _check_unique(headers)
    if method in ("TRACE", "CONNECT"):
        raise BadMessageError(405)
    _check_host(headers, minor_version)
    content_length, chunked = _request_framing(headers, minor_version)
    return RequestHead(
        method, target, minor_version, headers, content_length, chunked, _keeps_alive(headers, minor_version)
    )


def parse_response_head(head: bytes, *, request_method: str) -> ResponseHead:
    """
    Read a response head.

    Raises:
        BadMessageError: 502, for anything that is not HTTP/1.x.
    """
    lines = _lines(head)
    parts = lines[0].split(b" ", 2)
    version = _VERSION.match(parts[0])
    if version is None or version[1] != b"1" or len(parts) < 2 or not re.fullmatch(rb"[1-9]\d\d", parts[1]):
        raise BadMessageError(502)
    try:
        headers = _parse_header_lines(lines[1:])
    except BadMessageError:
        raise BadMessageError(502) from None
    status, minor_version = int(parts[1]), int(version[2])
    reason = decode(parts[2]) if len(parts) > 2 else ""
    content_length, chunked = _response_framing(status, headers, request_method)
    keep_alive = _keeps_alive(headers, minor_version) and (chunked or content_length is not None)
    return ResponseHead(status, reason, minor_version, headers, content_length, chunked, keep_alive)


def _lines(head: bytes) -> list[bytes]:
    lines = head.split(b"\n")
    return [line[:-1] if line.endswith(b"\r") else line for line in lines]


def _parse_request_line(line: bytes) -> tuple[str, str, int, str | None]:
    method, _, rest = line.partition(b" ")
    target, _, version = rest.strip(b" ").rpartition(b" ")
    target = target.strip(b" ")
    match = _VERSION.match(version)
    if not _METHOD.match(method) or match is None or _BAD_IN_TARGET.search(target):
        raise BadMessageError(400)
    if match[1] != b"1":
        raise BadMessageError(505)
    authority = None
    if not target.startswith(b"/"):
        absolute = _ABSOLUTE.match(target)
        if absolute is None or not absolute[1]:
            raise BadMessageError(400)
        authority, target = decode(absolute[1]), target[absolute.end() :] or b"/"
        if not target.startswith(b"/"):
            target = b"/" + target
    return decode(method), decode(target), int(match[2]), authority


def _parse_header_lines(lines: Sequence[bytes]) -> Headers:
    headers = []
    for line in lines:
        if not line:
            break
        # A CR inside a line, a folded line and a blank before the colon end in 400.
        name, _, value = line.partition(b":")
        if not name or b"\x00" in line or b"\r" in line or _BAD_IN_NAME.search(name):
            raise BadMessageError(400)
        if not _HEADER_NAME.match(name):
            continue  # ignore_invalid_headers is on: such a line is dropped, not refused
        # Blanks only: a tab before or after the value belongs to it.
        headers.append((decode(name), decode(value.strip(b" "))))
    return tuple(headers)


def _check_unique(headers: Headers) -> None:
    seen = set()
    for name, _ in headers:
        lowered = name.lower()
        if lowered in _UNIQUE:
            if lowered in seen:
                raise BadMessageError(400)
            seen.add(lowered)


def _check_host(headers: Headers, minor_version: int) -> None:
    host = first(headers, "host")
    if host is None:
        if minor_version >= 1:
            raise BadMessageError(400)
    elif not host or "/" in host or host.startswith(":"):
        raise BadMessageError(400)


def _request_framing(headers: Headers, minor_version: int) -> tuple[int | None, bool]:
    length, coding = first(headers, "content-length"), first(headers, "transfer-encoding")
    if length is not None and not _DIGITS.match(length):
        raise BadMessageError(400)
    if coding is None:
        return (None if length is None else int(length)), False
    if minor_version < 1:
        raise BadMessageError(400)
    if coding.lower() != "chunked":
        raise BadMessageError(501)
    if length is not None:
        raise BadMessageError(400)  # two framings at once: request smuggling
    return None, True


def _response_framing(status: int, headers: Headers, request_method: str) -> tuple[int | None, bool]:
    if request_method == "HEAD" or status in (204, 304) or 100 <= status < 200:
        return 0, False
    if (coding := first(headers, "transfer-encoding")) is not None:
        if coding.lower() != "chunked":
            raise BadMessageError(502)
        return None, True
    lengths = set(every(headers, "content-length"))
    if not lengths:
        return None, False
    length = lengths.pop()
    if lengths or not _DIGITS.match(length):
        raise BadMessageError(502)
    return int(length), False


def _keeps_alive(headers: Headers, minor_version: int) -> bool:
    tokens = {token.strip().lower() for value in every(headers, "connection") for token in value.split(",")}
    if "close" in tokens:
        return False
    return minor_version >= 1 or "keep-alive" in tokens


# --- bodies ---------------------------------------------------------------------------


class BodyDecoder:
    """
    Take a message body out of a byte stream.

    Hand over the stream's buffer as often as bytes arrive: `decode` removes what
    belongs to the body and returns its payload; what follows the message stays.
    With neither a length nor chunks the body lasts until the end of the stream
    (`until_eof`), which the caller must notice itself.
    """

    def __init__(self, *, content_length: int | None, chunked: bool, until_eof: bool = False) -> None:
        self._chunked = chunked
        self.until_eof = until_eof and content_length is None and not chunked
        self._remaining = content_length or 0
        self._state = "size" if chunked else "data"
        self._trailer_bytes = 0
        self.finished = not chunked and not self.until_eof and not self._remaining

    def decode(self, buffer: bytearray) -> bytes:
        """
        Remove body bytes from *buffer* and return their payload, which may be empty.

        Raises:
            BadMessageError: 400, chunks that are not well-formed.
        """
        if self.until_eof:
            payload = bytes(buffer)
            buffer.clear()
            return payload
        if not self._chunked:
            return self._take_data(buffer)
        parts = []
        while buffer and not self.finished and (part := self._step(buffer)) is not None:
            parts.append(part)
        return b"".join(parts)

    def _take_data(self, buffer: bytearray) -> bytes:
        payload = bytes(buffer[: self._remaining])
        del buffer[: len(payload)]
        self._remaining -= len(payload)
        if not self._remaining and not self._chunked:
            self.finished = True
        return payload

    def _step(self, buffer: bytearray) -> bytes | None:
        if self._state == "data":
            payload = self._take_data(buffer)
            if not self._remaining:
                self._state = "after-data"
            return payload
        line = self._take_line(buffer)
        if line is None:
            return None
        if self._state == "size":
            self._start_chunk(line)
        elif self._state == "after-data":
            if line:
                raise BadMessageError(400)
            self._state = "size"
        elif not line:
            self.finished = True
        else:
            self._trailer_bytes += len(line)
            if self._trailer_bytes > _MAX_TRAILER_BYTES:
                raise BadMessageError(400)
        return b""

    def _start_chunk(self, line: bytes) -> None:
        size = line.partition(b";")[0].strip(b" \t")
        if not _HEX.match(size):
            raise BadMessageError(400)
        self._remaining = int(size, 16)
        self._state = "data" if self._remaining else "trailers"

    def _take_line(self, buffer: bytearray) -> bytes | None:
        limit = _MAX_TRAILER_BYTES if self._state == "trailers" else _MAX_CHUNK_LINE_BYTES
        end = buffer.find(b"\n", 0, limit + 1)
        if end < 0:
            if len(buffer) > limit:
                raise BadMessageError(400)
            return None
        line = bytes(buffer[:end]).removesuffix(b"\r")
        del buffer[: end + 1]
        return line


# --- writing --------------------------------------------------------------------------

LAST_CHUNK = b"0\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def render_request_head(method: str, target: str, headers: Iterable[tuple[str, str]]) -> bytes:
    """Return a request head, HTTP/1.1."""
    return _render(f"{method} {target} HTTP/1.1", headers)


def render_response_head(status: int, headers: Iterable[tuple[str, str]], reason: str = "") -> bytes:
    """Return a response head, HTTP/1.1, with the usual reason phrase when none is given."""
    return _render(f"HTTP/1.1 {status} {reason or _reason(status)}", headers)


def render_chunk(payload: bytes) -> bytes:
    """Return *payload* as one chunk; an empty payload gives nothing, since that would end the body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""


def _render(start_line: str, headers: Iterable[tuple[str, str]]) -> bytes:
    lines = [start_line, *(f"{name}: {value}" for name, value in headers), "", ""]
    return encode("\r\n".join(lines))


def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"

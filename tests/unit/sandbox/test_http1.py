import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kong_token_exchange.sandbox import http1

HOST = b"Host: api.example\r\n"


def parse(*lines: bytes, start: bytes = b"GET /a HTTP/1.1") -> http1.RequestHead:
    return http1.parse_request_head(b"\r\n".join((start, b"Host: api.example", *lines, b"", b"")))


def refused(head: bytes) -> int:
    with pytest.raises(http1.BadMessageError) as caught:
        http1.parse_request_head(head)
    return caught.value.status


@pytest.mark.parametrize(
    ("line", "value"),
    [
        (b"Authorization: Bearer abc", "Bearer abc"),
        (b"Authorization:Bearer abc", "Bearer abc"),
        (b"Authorization:    Bearer abc   ", "Bearer abc"),
        (b"Authorization: Bearer abc\t", "Bearer abc\t"),
        (b"Authorization: \tBearer abc", "\tBearer abc"),
        (b"Authorization: Bearer \x01\x0b\x7f", "Bearer \x01\x0b\x7f"),
        (b"Authorization:", ""),
        (b"Authorization", ""),
    ],
    ids=["plain", "no-blank", "blanks", "trailing-tab", "leading-tab", "controls", "empty", "no-colon"],
)
def test_header_value_reaches_the_plugin_as_nginx_hands_it_over(line, value):
    assert http1.first(parse(line).headers, "authorization") == value


def test_header_bytes_that_are_not_utf8_survive_unchanged():
    value = http1.first(parse(b"Authorization: Bearer evil\xff\xc3\xa4").headers, "authorization")

    assert http1.encode(value) == b"Bearer evil\xff\xc3\xa4"


@pytest.mark.parametrize(
    "line",
    [
        b"Authorization : Bearer abc",
        b" folded",
        b"\tfolded",
        b"Authorization: Bearer a\x00b",
        b"Authorization: Bearer a\rb",
        b": no name",
        b"na me: x",
        b"na\x7fme: x",
    ],
    ids=[
        "blank-before-colon",
        "fold-blank",
        "fold-tab",
        "nul",
        "bare-cr",
        "no-name",
        "blank-in-name",
        "del-in-name",
    ],
)
def test_header_line_that_nginx_refuses_is_400(line):
    assert refused(b"GET / HTTP/1.1\r\n" + HOST + b"X: 1\r\n" + line + b"\r\n\r\n") == 400


@pytest.mark.parametrize(
    "line", [b"X.Forwarded: 1", b"X(y): 1", "Ü: 1".encode()], ids=["dot", "paren", "not-ascii"]
)
def test_header_with_an_odd_name_is_dropped_and_the_request_goes_on(line):
    assert [name for name, _ in parse(line, b"x_y: 1").headers] == ["Host", "x_y"]


@pytest.mark.parametrize(
    "name",
    ["Authorization", "authorization", "Host", "Content-Length", "Transfer-Encoding", "Expect", "If-Match"],
)
def test_second_header_of_a_kind_that_nginx_wants_once_is_400(name):
    twice = f"{name}: 1\r\n".encode() * 2
    host = b"" if name == "Host" else HOST

    assert refused(b"GET / HTTP/1.1\r\n" + host + twice + b"\r\n") == 400


def test_other_headers_may_repeat():
    assert http1.every(parse(b"X-A: 1", b"x-a: 2").headers, "x-a") == ["1", "2"]


@pytest.mark.parametrize(
    ("start", "status"),
    [
        (b"GET /a", 400),
        (b"GET /a b HTTP/1.1", 400),
        (b"get /a HTTP/1.1", 400),
        (b"GET a HTTP/1.1", 400),
        (b"GET /a\x01 HTTP/1.1", 400),
        (b"GET /a HTTP/2.0", 505),
        (b"GET /a HTTP/x", 400),
        (b"TRACE /a HTTP/1.1", 405),
        (b"CONNECT a:1 HTTP/1.1", 400),
        (b"CONNECT /a HTTP/1.1", 405),
        (b"OPTIONS * HTTP/1.1", 400),
    ],
    ids=lambda value: value.decode("latin-1") if isinstance(value, bytes) else str(value),
)
def test_request_line_is_refused(start, status):
    assert refused(start + b"\r\n" + HOST + b"\r\n") == status


def test_absolute_target_gives_path_and_host():
    head = parse(start=b"GET http://other.example:8/x?y=1 HTTP/1.1")

    assert (head.target, http1.every(head.headers, "host")) == ("/x?y=1", ["other.example:8"])


def test_fragment_stays_where_kong_leaves_it():
    assert parse(start=b"GET /x#y HTTP/1.1").target == "/x#y"


@pytest.mark.parametrize("host", [b"", b"/", b":80"], ids=["empty", "slash", "port-only"])
def test_bad_host_is_400(host):
    assert refused(b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n") == 400


def test_missing_host_is_400_in_http_1_1_and_allowed_before():
    assert refused(b"GET / HTTP/1.1\r\n\r\n") == 400
    assert http1.parse_request_head(b"GET / HTTP/1.0\r\n\r\n").minor_version == 0


@pytest.mark.parametrize(
    ("lines", "framing"),
    [
        ((), (None, False, False)),
        ((b"Content-Length: 0",), (0, False, False)),
        ((b"Content-Length: 5",), (5, False, True)),
        ((b"Transfer-Encoding: Chunked",), (None, True, True)),
    ],
    ids=["none", "zero", "length", "chunked"],
)
def test_framing_of_the_body(lines, framing):
    head = parse(*lines, start=b"POST / HTTP/1.1")

    assert (head.content_length, head.chunked, head.has_body) == framing


@pytest.mark.parametrize(
    ("lines", "start", "status"),
    [
        (b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"POST / HTTP/1.1", 400),
        (b"Transfer-Encoding: gzip, chunked\r\n", b"POST / HTTP/1.1", 501),
        (b"Transfer-Encoding: chunked\r\n", b"POST / HTTP/1.0", 400),
        (b"Content-Length: -1\r\n", b"POST / HTTP/1.1", 400),
        (b"Content-Length: +5\r\n", b"POST / HTTP/1.1", 400),
        (b"Content-Length: 5, 5\r\n", b"POST / HTTP/1.1", 400),
        (b"Content-Length: \xd9\xa5\r\n", b"POST / HTTP/1.1", 400),
    ],
    ids=["both", "other-coding", "http-1.0", "negative", "plus", "list", "arabic-digit"],
)
def test_framing_that_could_smuggle_a_request_is_refused(lines, start, status):
    assert refused(start + b"\r\n" + HOST + lines + b"\r\n") == status


@pytest.mark.parametrize(
    ("start", "lines", "keep_alive"),
    [
        (b"GET / HTTP/1.1", (), True),
        (b"GET / HTTP/1.1", (b"Connection: close",), False),
        (b"GET / HTTP/1.1", (b"Connection: x, Close",), False),
        (b"GET / HTTP/1.0", (), False),
        (b"GET / HTTP/1.0", (b"Connection: Keep-Alive",), True),
    ],
    ids=["1.1", "close", "close-in-list", "1.0", "1.0-keep-alive"],
)
def test_keep_alive(start, lines, keep_alive):
    assert parse(*lines, start=start).keep_alive is keep_alive


@pytest.mark.parametrize("extra", [-1, 0, 1], ids=["below", "at", "above"])
def test_header_line_above_8_kb_is_400_and_below_is_not(extra):
    line = b"X: " + b"a" * (http1.MAX_LINE_BYTES - len(b"X: \r\n") + extra)
    head = b"GET / HTTP/1.1\r\n" + HOST + line + b"\r\n\r\n"
    if extra <= 0:
        http1.check_head_size(head)
        return
    with pytest.raises(http1.BadMessageError) as caught:
        http1.check_head_size(head)

    assert (caught.value.status, caught.value.detail) == (400, "Request header or cookie too large")


def test_request_line_above_8_kb_is_414_before_it_is_complete():
    with pytest.raises(http1.BadMessageError) as caught:
        http1.check_head_size(b"GET /" + b"a" * http1.MAX_LINE_BYTES)

    assert caught.value.status == 414


def test_many_headers_together_are_400():
    with pytest.raises(http1.BadMessageError) as caught:
        http1.check_head_size(b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 8000)

    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("buffer", "end"),
    [(b"GET / HTTP/1.1\r\nA: b\r\n\r\nrest", 24), (b"GET /\n\nrest\r\n\r\n", 7), (b"GET /\r\nA: b\r\n", -1)],
    ids=["crlf", "lf", "incomplete"],
)
def test_end_of_the_head(buffer, end):
    assert http1.find_head_end(bytearray(buffer)) == end


# --- responses ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "method", "framing"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "GET", (5, False, True)),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "HEAD", (0, False, True)),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", "GET", (0, False, True)),
        (b"HTTP/1.1 204\r\n\r\n", "GET", (0, False, True)),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "GET", (None, True, True)),
        (b"HTTP/1.1 200 OK\r\n\r\n", "GET", (None, False, False)),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n", "GET", (5, False, False)),
    ],
    ids=["length", "head", "304", "204", "chunked", "until-eof", "http-1.0"],
)
def test_framing_of_a_response(raw, method, framing):
    head = http1.parse_response_head(raw, request_method=method)

    assert (head.content_length, head.chunked, head.keep_alive) == framing


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 99 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n folded\r\n\r\n",
    ],
    ids=["nonsense", "version", "status", "two-lengths", "coding", "folded"],
)
def test_response_that_is_not_http_is_502(raw):
    with pytest.raises(http1.BadMessageError) as caught:
        http1.parse_response_head(raw, request_method="GET")

    assert caught.value.status == 502


# --- bodies ---------------------------------------------------------------------------

CHUNKED = b"5;ext=1\r\nhello\r\n1 \r\n \r\n6\nworld!\n0\r\nTrailer: x\r\n\r\n"


def decode_in_pieces(decoder: http1.BodyDecoder, data: bytes, size: int) -> tuple[bytes, bytes]:
    buffer, out = bytearray(), b""
    for at in range(0, len(data), size):
        buffer += data[at : at + size]
        out += decoder.decode(buffer)
    return out, bytes(buffer)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_chunked_body_is_decoded_however_it_arrives_and_leaves_the_next_request(size):
    decoder = http1.BodyDecoder(content_length=None, chunked=True)

    assert decode_in_pieces(decoder, CHUNKED + b"GET /next", size) == (b"hello world!", b"GET /next")
    assert decoder.finished


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_body_with_a_length_leaves_the_next_request(size):
    decoder = http1.BodyDecoder(content_length=5, chunked=False)

    assert decode_in_pieces(decoder, b"helloGET /next", size) == (b"hello", b"GET /next")
    assert decoder.finished


def test_body_until_the_end_takes_everything():
    decoder = http1.BodyDecoder(content_length=None, chunked=False, until_eof=True)

    assert decode_in_pieces(decoder, b"a" * 10, 3) == (b"a" * 10, b"")
    assert not decoder.finished


def test_message_without_body_is_finished_at_once():
    assert http1.BodyDecoder(content_length=None, chunked=False).finished
    assert http1.BodyDecoder(content_length=0, chunked=False, until_eof=True).finished


@pytest.mark.parametrize(
    "data",
    [b"x\r\n", b"-1\r\n", b"\r\n", b"0x5\r\n", b"5\r\nhelloX\r\n", b"1" * 16 + b"\r\n", b"5" + b";" * 300],
    ids=["not-hex", "negative", "empty", "prefix", "no-end-of-chunk", "huge", "long-line"],
)
def test_malformed_chunks_are_400(data):
    with pytest.raises(http1.BadMessageError) as caught:
        http1.BodyDecoder(content_length=None, chunked=True).decode(bytearray(data))

    assert caught.value.status == 400


def test_endless_trailers_are_400():
    decoder = http1.BodyDecoder(content_length=None, chunked=True)
    with pytest.raises(http1.BadMessageError):
        decoder.decode(bytearray(b"0\r\n" + b"a: b\r\n" * 5000))


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.integers(1, 50))
def test_what_render_chunk_writes_the_decoder_reads(parts, size):
    data = b"".join(map(http1.render_chunk, parts)) + http1.LAST_CHUNK
    decoder = http1.BodyDecoder(content_length=None, chunked=True)

    assert decode_in_pieces(decoder, data, size) == (b"".join(parts), b"")
    assert decoder.finished


@given(st.binary(max_size=300))
def test_no_bytes_make_the_head_parser_fail_otherwise_than_by_refusing(data):
    # What is not a BadMessageError fails the test.
    with contextlib.suppress(http1.BadMessageError):
        http1.parse_request_head(b"GET / HTTP/1.1\r\nHost: a\r\n" + data + b"\r\n\r\n")


def test_an_empty_chunk_is_not_written_because_it_would_end_the_body():
    assert http1.render_chunk(b"") == b""


def test_heads_are_written_and_read_again():
    raw = http1.render_request_head("GET", "/a?b", [("Host", "h"), ("X", http1.decode(b"\xff"))])

    assert raw == b"GET /a?b HTTP/1.1\r\nHost: h\r\nX: \xff\r\n\r\n"
    assert http1.render_response_head(299, []) == b"HTTP/1.1 299 Unknown\r\n\r\n"

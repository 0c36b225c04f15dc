import asyncio
import contextlib
import json
import struct
from typing import Any

import pytest

from kong_token_exchange.pluginserver import wire
from kong_token_exchange.sandbox import http1, pdk
from kong_token_exchange.sandbox.declarative import Consumer, GatewayConfig, Route, Service

# More headers than Kong lists by default.
MANY = tuple(f"X-{number}: 1" for number in range(120))

ALICE = Consumer(id="b32379d9-3d28-5683-a79c-72139be6e34f", username="alice", tags=("t",))


def context(
    *lines: str, target: str = "/a/x", body: bytes = b"", log: list[tuple[str, str]] | None = None
) -> pdk.RequestContext:
    head = "\r\n".join((f"GET {target} HTTP/1.1", "Host: API.example:8000", *lines, "", ""))

    async def read_body() -> bytes:
        return body

    return pdk.RequestContext(
        head=http1.parse_request_head(http1.encode(head)),
        config=GatewayConfig(consumers=(ALICE,)),
        route=Route(id="route-id", name="r", service=Service(id="service-id", name="s", host="h")),
        client=("127.0.0.9", 5000),
        server_port=8000,
        request_id="f" * 32,
        request_variable="e" * 32,
        node_id="node",
        upstream_path="/x",
        read_body=read_body,
        spool_body=lambda data: f"/spool/{len(data)}",
        write_log=lambda level, text: log.append((level, text)) if log is not None else None,
    )


def call(on: pdk.RequestContext, method: str, arguments: bytes = b"") -> bytes:
    return asyncio.run(pdk.call(on, method, arguments))


def text(on: pdk.RequestContext, method: str, argument: str | None = None) -> str:
    return wire.decode_string(call(on, method, wire.encode_string(argument) if argument else b""))


def set_header(
    on: pdk.RequestContext, name: str, value: Any, method: str = "kong.service.request.set_header"
) -> None:
    assert call(on, method, wire.encode_kv(name, value)) == b""


# --- reading --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "argument", "expected"),
    [
        ("kong.request.get_path", None, "/a/x y"),
        ("kong.request.get_method", None, "GET"),
        ("kong.request.get_raw_query", None, "q=1&q=2&e=&p=a%20b+c"),
        ("kong.request.get_path_with_query", None, "/a/./x%20y?q=1&q=2&e=&p=a%20b+c"),
        ("kong.request.get_query_arg", "q", "1"),
        ("kong.request.get_query_arg", "p", "a b c"),
        ("kong.request.get_query_arg", "e", ""),
        ("kong.request.get_query_arg", "none", ""),
        ("kong.request.get_scheme", None, "http"),
        ("kong.request.get_forwarded_scheme", None, "http"),
        ("kong.request.get_host", None, "api.example"),
        ("kong.request.get_forwarded_host", None, "api.example"),
        ("kong.client.get_ip", None, "127.0.0.9"),
        ("kong.client.get_forwarded_ip", None, "127.0.0.9"),
        ("kong.node.get_id", None, "node"),
        ("kong.nginx.get_var", "kong_request_id", "f" * 32),
        ("kong.nginx.get_var", "request_id", "e" * 32),
        ("kong.nginx.get_var", "http_cookie", "a=1; b=2"),
        ("kong.nginx.get_var", "http_x_two", "1, 2"),
        ("kong.nginx.get_var", "remote_addr", "127.0.0.9"),
        ("kong.nginx.get_var", "nonsense", ""),
    ],
)
def test_facts_of_the_request(method, argument, expected):
    request = context(
        "Cookie: a=1",
        "Cookie: b=2",
        "X-Two: 1",
        "X-Two: 2",
        "X-Forwarded-For: 10.0.0.1",
        "X-Forwarded-Host: evil.example",
        "X-Forwarded-Proto: https",
        target="/a/./x%20y?q=1&q=2&e=&p=a%20b+c",
    )
    assert text(request, method, argument) == expected


@pytest.mark.parametrize(
    ("lines", "name", "expected"),
    [
        ((), "authorization", ""),
        (("Authorization:",), "authorization", ""),
        (("AUTHORIZATION: Bearer a",), "authorization", "Bearer a"),
        (("Authorization: Bearer a, b",), "authorization", "Bearer a, b"),
        (("X-A: 1", "X-A: 2"), "x-a", "1"),
        (("X_A: 1",), "x-a", "1"),
        (("X-A: 1",), "X_A", "1"),
        (("Authorization: Bearer \udcff",), "authorization", "Bearer \udcff"),
        ((*MANY, "Authorization: Bearer a"), "authorization", "Bearer a"),
        ((*MANY, "Authorization: Bearer a, b"), "authorization", ""),
    ],
    ids=[
        "missing",
        "empty",
        "case",
        "comma",
        "repeated",
        "underscore",
        "dash",
        "not-utf8",
        "hidden",
        "hidden-comma",
    ],
)
def test_get_header_reads_as_kong_does(lines, name, expected):
    assert text(context(*lines), "kong.request.get_header", name) == expected


def test_missing_header_is_an_empty_frame():
    assert call(context(), "kong.request.get_header", wire.encode_string("authorization")) == b""


def test_get_headers_gives_lower_case_names_and_lists():
    payload = call(context("X-A: 1", "x-a: 2", "X-B: 3"), "kong.request.get_headers", wire.encode_int(100))

    assert wire.decode_struct(payload) == {"host": "API.example:8000", "x-a": ["1", "2"], "x-b": "3"}


def test_get_headers_stops_after_as_many_as_asked_for():
    payload = call(context("X-A: 1", "X-B: 3"), "kong.request.get_headers", wire.encode_int(2))

    assert set(wire.decode_struct(payload)) == {"host", "x-a"}


@pytest.mark.parametrize("method", ["kong.request.get_headers", "kong.request.get_query"])
@pytest.mark.parametrize("most", [0, 1001])
def test_maximum_outside_kongs_bounds_is_a_lua_error(method, most):
    with pytest.raises(pdk.LuaError):
        call(context(), method, wire.encode_int(most))


def test_query_argument_without_a_value_cannot_be_encoded():
    with pytest.raises(pdk.LuaError):
        call(
            context(target="/?access_token"), "kong.request.get_query_arg", wire.encode_string("access_token")
        )


def test_get_query_gives_true_and_lists():
    payload = call(context(target="/?a&b=1&b=2&=x"), "kong.request.get_query", wire.encode_int(100))

    assert wire.decode_struct(payload) == {"a": True, "b": ["1", "2"]}


def test_body_that_fits_the_buffer_comes_as_content_and_a_longer_one_as_a_file():
    size = pdk.BODY_BUFFER_BYTES

    assert dict(wire.read_fields(call(context(), "kong.request.get_raw_body"))) == {1: b""}
    assert dict(wire.read_fields(call(context(body=b"b" * size), "kong.request.get_raw_body"))) == {
        1: b"b" * size
    }
    longer = call(context(body=b"b" * (size + 1)), "kong.request.get_raw_body")
    assert dict(wire.read_fields(longer)) == {2: f"/spool/{size + 1}".encode()}


def test_ports_and_http_version_are_numbers():
    request = context()

    assert wire.decode_int(call(request, "kong.client.get_port")) == 5000
    assert wire.decode_int(call(request, "kong.request.get_port")) == 8000
    assert struct.unpack("<d", call(request, "kong.request.get_http_version")[1:]) == (1.1,)


def test_route_and_service_name_themselves_and_each_other():
    request = context()
    route = list(wire.read_fields(call(request, "kong.router.get_route")))
    service = dict(wire.read_fields(call(request, "kong.router.get_service")))

    assert (1, b"route-id") in route
    assert (18, wire.encode_string("service-id")) in route
    assert [value for number, value in route if number == 5] == [b"http", b"https"]
    assert (service[1], service[7], service[8]) == (b"service-id", b"h", 80)


# --- changing the request -------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Bearer NEW", ["Bearer NEW"]),
        ("", [" "]),
        (401, ["401"]),
        (1.5, ["1.5"]),
        (1e15, ["1e+15"]),
        (True, ["true"]),
        (None, ["NULL_VALUE"]),
        (["a", "b"], ["b"]),
        ([], []),
        ({"a": "b"}, []),
        ("a\r\nX: y", ["a%0D%0AX: y"]),
        ("tab\tstays\x00\x7f", ["tab\tstays%00%7F"]),
        ("Bearer \udcff", ["Bearer \udcff"]),
    ],
    ids=[
        "text", "empty", "integer", "float", "large", "true", "null", "list", "empty-list", "record", "crlf",
        "controls", "not-utf8",
    ],
)  # fmt: skip
def test_set_header_does_with_each_type_what_kong_does(value, expected):
    request = context("Authorization: Bearer OLD")
    set_header(request, "authorization", value)

    assert http1.every(request.headers.pairs, "authorization") == expected


@pytest.mark.parametrize(
    "arguments",
    [
        wire.encode_kv("x", False),
        wire.encode_string("x"),
        wire.encode_kv("x", ["a", 1]),
        wire.encode_kv("x", [None]),
    ],
    ids=["false", "no-value", "number-in-list", "null-in-list"],
)
def test_set_header_with_nothing_in_it_is_a_lua_error_or_removes(arguments):
    request = context("X: 1")
    if arguments == wire.encode_kv("x", [None]):
        call(request, "kong.service.request.set_header", arguments)
        assert http1.every(request.headers.pairs, "x") == ["NULL_VALUE"]
        return
    with pytest.raises(pdk.LuaError):
        call(request, "kong.service.request.set_header", arguments)


def test_set_header_replaces_in_place_whatever_the_case_and_adds_behind():
    request = context("X-First: 1", "AUTHORIZATION: Bearer OLD", "X-Last: 1")
    set_header(request, "authorization", "Bearer NEW")
    set_header(request, "x-new", "n")

    assert request.headers.pairs[1:] == [
        ("X-First", "1"),
        ("AUTHORIZATION", "Bearer NEW"),
        ("X-Last", "1"),
        ("x-new", "n"),
    ]


def test_list_of_values_repeats_an_ordinary_header():
    request = context("X-A: 0", "X-A: 00")
    set_header(request, "x-a", ["1", "2"])

    assert http1.every(request.headers.pairs, "x-a") == ["1", "2"]


def test_add_header_keeps_earlier_values():
    request = context("X-A: 0")
    set_header(request, "x-a", "1", "kong.service.request.add_header")

    assert http1.every(request.headers.pairs, "x-a") == ["0", "1"]


def test_set_headers_sets_all_or_raises_before_any():
    request = context()
    call(request, "kong.service.request.set_headers", wire.encode_struct({"x-a": "1", "x-b": ["2", "3"]}))
    assert (http1.every(request.headers.pairs, "x-a"), http1.every(request.headers.pairs, "x-b")) == (
        ["1"],
        ["2", "3"],
    )

    with pytest.raises(pdk.LuaError):
        call(request, "kong.service.request.set_headers", wire.encode_struct({"x-c": "1", "x-d": [1]}))
    assert http1.every(request.headers.pairs, "x-c") == []


def test_header_name_is_escaped():
    request = context()
    set_header(request, "x y:(ü)", "1")

    assert request.headers.pairs[-1] == ("x%20y%3A%28%C3%BC%29", "1")


def test_clear_header_removes_every_one_of_the_name_and_no_other():
    request = context("X-A: 1", "x-a: 2", "X_A: 3")
    call(request, "kong.service.request.clear_header", wire.encode_string("X-A"))

    assert [name for name, _ in request.headers.pairs] == ["Host", "X_A"]


def test_what_a_plugin_set_is_read_back():
    request = context("Authorization: Bearer OLD")
    set_header(request, "authorization", "Bearer NEW")

    assert text(request, "kong.request.get_header", "authorization") == "Bearer NEW"


def test_method_path_query_body_and_target_can_be_changed():
    request = context()
    for method, value in (
        ("set_method", "PUT"),
        ("set_path", "/new path"),
        ("set_raw_query", "a=1"),
        ("set_raw_body", "body"),
    ):
        call(request, f"kong.service.request.{method}", wire.encode_string(value))
    call(request, "kong.service.set_target", wire.encode_string("other") + b"\x10\x50")

    assert (request.method, request.upstream_path, request.query, request.body) == (
        "PUT",
        "/new%20path",
        "a=1",
        b"body",
    )
    assert request.target_address == ("other", 80)


@pytest.mark.parametrize(("method", "value"), [("set_method", "BREW"), ("set_path", "relative")])
def test_values_that_kong_refuses_are_lua_errors(method, value):
    with pytest.raises(pdk.LuaError):
        call(context(), f"kong.service.request.{method}", wire.encode_string(value))


def test_host_header_set_by_a_plugin_is_the_upstreams_host():
    request = context()
    set_header(request, "Host", "inner.example")

    assert request.upstream_host == "inner.example"


# --- answering ------------------------------------------------------------------------


def exit_with(on: pdk.RequestContext, arguments: bytes) -> pdk.ResponseExit:
    with pytest.raises(pdk.ResponseExit) as caught:
        call(on, "kong.response.exit", arguments)
    return caught.value


def test_exit_ends_the_event_with_status_body_and_headers():
    request = context()
    set_header(request, "x-earlier", "1", "kong.response.set_header")
    done = exit_with(
        request, wire.encode_exit(401, b"no", {"WWW-Authenticate": 'Bearer realm="k"', "X": "a\r\nb"})
    )

    assert (done.status, done.body) == (401, b"no")
    assert done.headers == [("x-earlier", "1"), ("WWW-Authenticate", 'Bearer realm="k"'), ("X", "a%0D%0Ab")]


@pytest.mark.parametrize("status", [0, 99, 600, -1])
def test_exit_with_a_status_that_is_none_is_a_lua_error(status):
    with pytest.raises(pdk.LuaError):
        call(context(), "kong.response.exit", wire.encode_exit(status))


def test_response_headers_are_set_added_and_cleared():
    log: list[tuple[str, str]] = []
    request = context(log=log)
    set_header(request, "x_a", "1", "kong.response.set_header")
    set_header(request, "X-A", "2", "kong.response.add_header")
    set_header(request, "x-b", "1", "kong.response.set_header")
    set_header(request, "Transfer-Encoding", "chunked", "kong.response.set_header")
    call(request, "kong.response.set_headers", wire.encode_struct({"x-c": ["1", "2"]}))
    call(request, "kong.response.clear_header", wire.encode_string("X-B"))

    assert request.response_headers == [("X-A", "1"), ("X-A", "2"), ("x-c", "1"), ("x-c", "2")]
    assert log[0][0] == "warn"


# --- contexts, consumers, log ---------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        ("1", b"\x1a\x011"),
        (1.5, wire.encode_value(1.5)),
        (True, b"\x20\x01"),
        (False, b"\x08\x01"),
        ({"a": ["b", {"c": True}]}, wire.encode_value({"a": ["b", {"c": True}]})),
        ([], wire.encode_value({})),
    ],
    ids=["text", "number", "true", "false-is-nil", "nested", "empty-list-is-a-record"],
)
def test_shared_context_gives_back_what_lua_keeps(value, encoded):
    request = context()
    call(request, "kong.ctx.shared.set", wire.encode_kv("k", value))

    assert call(request, "kong.ctx.shared.get", wire.encode_string("k")) == encoded


def test_shared_context_without_the_key_is_null_as_kong_encodes_it():
    assert call(context(), "kong.ctx.shared.get", wire.encode_string("k")) == b"\x08\x01"


@pytest.mark.parametrize(
    ("wanted", "by_username", "found"),
    [("alice", True, True), (ALICE.id, False, True), (ALICE.id, True, True), ("bob", True, False)],
)
def test_consumer_is_loaded_by_id_or_name(wanted, by_username, found):
    arguments = wire.encode_string(wanted) + (b"\x10\x01" if by_username else b"")
    members = dict(wire.read_fields(call(context(), "kong.client.load_consumer", arguments)))

    assert members.get(3) == (b"alice" if found else None)


def test_consumer_id_that_is_no_uuid_is_a_lua_error():
    with pytest.raises(pdk.LuaError):
        call(context(), "kong.client.load_consumer", wire.encode_string("alice"))


def test_authenticated_consumer_and_credential_are_given_back():
    request = context()
    consumer, credential = wire.encode_string("c1"), wire.encode_string("k1")
    assert call(request, "kong.client.get_consumer") == call(request, "kong.client.get_credential") == b""
    call(request, "kong.client.authenticate", pdk._bytes_field(1, consumer) + pdk._bytes_field(2, credential))

    assert call(request, "kong.client.get_consumer") == consumer
    assert call(request, "kong.client.get_credential") == credential


def test_authenticate_with_neither_is_a_lua_error():
    with pytest.raises(pdk.LuaError):
        call(context(), "kong.client.authenticate")


def test_log_lines_carry_their_level_and_all_their_parts():
    log: list[tuple[str, str]] = []
    request = context(log=log)
    items = b"".join(pdk._bytes_field(1, wire.encode_value(item)) for item in ("a", 1, True))
    call(request, "kong.log.notice", items)

    assert log == [("notice", "a1true")]


def test_serialize_values_show_in_the_log_record():
    request = context()
    call(request, "kong.log.set_serialize_value", wire.encode_kv("token_exchange", {"a": "b"}))

    assert json.loads(text(request, "kong.log.serialize"))["token_exchange"] == {"a": "b"}


# --- errors ---------------------------------------------------------------------------


def test_unknown_method_is_told_apart():
    with pytest.raises(pdk.UnknownMethodError, match=r'method "kong\.vault\.get" not found'):
        call(context(), "kong.vault.get")


@pytest.mark.parametrize("method", sorted(pdk.METHODS))
def test_malformed_arguments_never_raise_anything_but_kongs_outcomes(method):
    for arguments in (
        b"\xff",
        b"\x0a\xff",
        b"\x08",
        b"\x12\x03\x11\x01\x02",
        b"\x09" + bytes(8),
        b"\x0a\x02\x12\x00",
    ):
        with contextlib.suppress(pdk.LuaError, pdk.ResponseExit):
            call(context(), method, arguments)


def test_every_method_seen_working_on_kong_is_there():
    seen = """
        kong.request.get_header kong.request.get_headers kong.request.get_path kong.request.get_method
        kong.request.get_raw_query kong.request.get_query_arg kong.request.get_raw_body
        kong.request.get_scheme
        kong.request.get_forwarded_scheme kong.request.get_forwarded_host kong.client.get_ip
        kong.client.get_forwarded_ip kong.client.get_consumer kong.client.get_credential
        kong.client.load_consumer kong.client.authenticate kong.router.get_route kong.router.get_service
        kong.nginx.get_var kong.ctx.shared.get kong.ctx.shared.set kong.node.get_id kong.log.alert
        kong.log.crit kong.log.err kong.log.warn kong.log.notice kong.log.info kong.log.debug
        kong.log.set_serialize_value kong.service.request.set_header kong.service.request.set_headers
        kong.service.request.clear_header kong.service.request.set_raw_query kong.response.set_header
        kong.response.exit
    """
    assert set(seen.split()) <= set(pdk.METHODS)

"""
The PDK object: each leaf sends the right call and reads the right answer.
"""

from typing import Any, NoReturn

import pytest

from kong_token_exchange.pluginserver import wire
from kong_token_exchange.pluginserver.pdk import METHODS, Kong, Method


class ExitedError(Exception):
    pass


class Recorder:
    """Answers every call with what the test laid ready."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.reply = b""

    def call(self, method: Method, argument: bytes) -> bytes:
        self.calls.append((method.name, method.argument.decode(argument)))
        return self.reply

    def queue(self, method: Method, argument: bytes) -> None:
        assert method.reply_is_empty
        self.calls.append((method.name, method.argument.decode(argument)))

    def exit(self, status: int, argument: bytes) -> NoReturn:
        self.calls.append(("kong.response.exit", wire.decode_exit(argument)))
        raise ExitedError


STRUCT = {"accept": "*/*", "cookie": ["a", "b"]}
ROUTE = {"id": "r", "name": "n", "paths": ["/a"], "service": {"id": "s"}}

# (leaf, arguments, argument on the wire, answer)
GETTERS: list[tuple[str, tuple[Any, ...], Any, Any]] = [
    ("kong.request.get_header", ("Authorization",), "Authorization", "Bearer x"),
    ("kong.request.get_headers", (), 100, STRUCT),
    ("kong.request.get_headers", (7,), 7, STRUCT),
    ("kong.request.get_headers", (0,), 1, STRUCT),
    ("kong.request.get_query", (), 100, {"a": True}),
    ("kong.request.get_query_arg", ("a",), "a", "b"),
    ("kong.request.get_raw_query", (), None, "a=b"),
    ("kong.request.get_raw_body", (), None, b"\x00\xff"),
    ("kong.request.get_method", (), None, "GET"),
    ("kong.request.get_path", (), None, "/a"),
    ("kong.request.get_path_with_query", (), None, "/a?b"),
    ("kong.request.get_scheme", (), None, "https"),
    ("kong.request.get_host", (), None, "example.com"),
    ("kong.request.get_port", (), None, 8443),
    ("kong.request.get_http_version", (), None, 1.1),
    ("kong.request.get_forwarded_scheme", (), None, "https"),
    ("kong.request.get_forwarded_host", (), None, "example.com"),
    ("kong.request.get_forwarded_port", (), None, 443),
    ("kong.client.get_ip", (), None, "127.0.0.1"),
    ("kong.client.get_forwarded_ip", (), None, "::1"),
    ("kong.client.get_port", (), None, 1),
    ("kong.client.get_forwarded_port", (), None, 2),
    ("kong.client.get_consumer", (), None, {"id": "c", "tags": ["t"]}),
    ("kong.client.get_credential", (), None, {"id": "c", "consumer_id": "d"}),
    (
        "kong.client.load_consumer",
        ("alice", True),
        {"id": "alice", "by_username": True},
        {"username": "alice"},
    ),
    ("kong.client.load_consumer", ("1",), {"id": "1"}, {"username": "alice"}),
    ("kong.router.get_route", (), None, ROUTE),
    ("kong.router.get_service", (), None, {"id": "s", "host": "h", "port": 80}),
    ("kong.nginx.get_var", ("kong_request_id",), "kong_request_id", "e0c4"),
    ("kong.node.get_id", (), None, "87cf"),
    ("kong.ctx.shared.get", ("k",), "k", {"a": [1, None]}),
]

# (leaf, arguments, argument on the wire)
SETTERS: list[tuple[str, tuple[Any, ...], Any]] = [
    ("kong.service.request.set_header", ("a", "b"), ("a", "b")),
    ("kong.service.request.add_header", ("a", "b"), ("a", "b")),
    ("kong.service.request.set_headers", ({"a": "b"},), {"a": "b"}),
    ("kong.service.request.clear_header", ("a",), "a"),
    ("kong.service.request.set_method", ("GET",), "GET"),
    ("kong.service.request.set_path", ("/a",), "/a"),
    ("kong.service.request.set_raw_query", ("a=1",), "a=1"),
    ("kong.service.request.set_raw_body", (b"\xff",), b"\xff"),
    ("kong.response.set_header", ("a", "b"), ("a", "b")),
    ("kong.response.add_header", ("a", "b"), ("a", "b")),
    ("kong.response.set_headers", ({"a": "b"},), {"a": "b"}),
    ("kong.response.clear_header", ("a",), "a"),
    ("kong.response.set_status", (418,), 418),
    ("kong.ctx.shared.set", ("k", [1.0]), ("k", [1.0])),
    (
        "kong.client.authenticate",
        ({"id": "c"}, {"id": "d"}),
        {"consumer": {"id": "c"}, "credential": {"id": "d"}},
    ),
    ("kong.client.authenticate", (None, {"id": "d"}), {"credential": {"id": "d"}}),
    ("kong.client.authenticate", (None, None), None),
    ("kong.log.set_serialize_value", ("k", "v"), ("k", "v")),
    *[
        (f"kong.log.{level}", ("a", 1.0, None), ["a", 1.0, None])
        for level in ("alert", "crit", "err", "warn", "notice", "info", "debug")
    ],
]


def leaf(kong: Kong, name: str) -> Any:
    target: Any = kong
    for part in name.split(".")[1:]:
        target = getattr(target, part)
    return target


@pytest.mark.parametrize(("name", "arguments", "sent", "answer"), GETTERS)
def test_getter_sends_its_call_and_reads_the_answer(
    name: str, arguments: tuple[Any, ...], sent: Any, answer: Any
) -> None:
    caller = Recorder()
    caller.reply = METHODS[name].result.encode(answer)

    assert answer == leaf(Kong(caller), name)(*arguments)
    assert [(name, sent)] == caller.calls


@pytest.mark.parametrize(("name", "arguments", "sent"), SETTERS)
def test_setter_queues_its_call(name: str, arguments: tuple[Any, ...], sent: Any) -> None:
    caller = Recorder()

    assert leaf(Kong(caller), name)(*arguments) is None
    assert [(name, sent)] == caller.calls


def test_every_method_of_the_table_is_a_leaf_of_the_tree() -> None:
    covered = {row[0] for row in GETTERS} | {row[0] for row in SETTERS} | {"kong.response.exit"}

    assert set(METHODS) == covered


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kong.client.get_consumer", None),
        ("kong.router.get_route", None),
        ("kong.ctx.shared.get", None),
        ("kong.request.get_header", ""),
        ("kong.request.get_headers", {}),
        ("kong.request.get_raw_body", None),
    ],
)
def test_empty_answer_reads_as_absent(name: str, expected: Any) -> None:
    arguments = next(row for row in GETTERS if row[0] == name)[1]

    assert expected == leaf(Kong(Recorder()), name)(*arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((401,), wire.ExitArgs(401, b"", {})),
        ((401, "é"), wire.ExitArgs(401, "é".encode(), {})),
        ((401, b"\xff", {"a": "b"}), wire.ExitArgs(401, b"\xff", {"a": "b"})),
    ],
)
def test_exit_sends_its_arguments_and_does_not_return(arguments: tuple[Any, ...], expected: Any) -> None:
    caller = Recorder()
    with pytest.raises(ExitedError):
        Kong(caller).response.exit(*arguments)

    assert [("kong.response.exit", expected)] == caller.calls


BAD_HEADERS: list[tuple[Any, Any, type[Exception]]] = [
    ("a", "b\r\nc: d", ValueError),
    ("a", "b\n", ValueError),
    ("a", "b\0", ValueError),
    ("a\r", "b", ValueError),
    ("a", 5, TypeError),
    ("a", None, TypeError),
    ("a", ["b"], TypeError),
    ("a", b"b", TypeError),
]


@pytest.mark.parametrize(("name", "value", "error"), BAD_HEADERS)
def test_gw_10_what_cannot_be_a_header_is_refused_before_it_leaves(
    name: Any, value: Any, error: type[Exception]
) -> None:
    caller = Recorder()
    kong = Kong(caller)
    attempts = [
        lambda: kong.service.request.set_header(name, value),
        lambda: kong.service.request.add_header(name, value),
        lambda: kong.service.request.set_headers({name: value}),
        lambda: kong.response.set_header(name, value),
        lambda: kong.response.add_header(name, value),
        lambda: kong.response.set_headers({name: value}),
        lambda: kong.response.exit(200, b"", {name: value}),
    ]
    for attempt in attempts:
        with pytest.raises(error):
            attempt()

    assert [] == caller.calls


def test_every_message_of_the_table_is_written_and_read_alike() -> None:
    samples: dict[str, Any] = {"Empty": None, "KV": ("k", "v"), "ListValue": ["a"], "Struct": {"a": "b"}}
    for method in METHODS.values():
        for codec in (method.argument, method.result):
            if codec.name in samples:
                assert samples[codec.name] == codec.decode(codec.encode(samples[codec.name]))
    exit_codec = METHODS["kong.response.exit"].argument
    assert wire.ExitArgs(401, b"x", {"a": "b"}) == exit_codec.decode(
        exit_codec.encode((401, b"x", {"a": "b"}))
    )


def test_only_calls_with_empty_answers_may_be_pipelined() -> None:
    empty = {name for name, method in METHODS.items() if method.reply_is_empty}

    assert {row[0] for row in SETTERS} == empty
    assert "kong.response.exit" not in empty


def test_call_is_two_frames_name_and_argument() -> None:
    method = METHODS["kong.request.get_header"]

    assert wire.frame(b"kong.request.get_header") + wire.frame(b"\x0a\x01a") == method.call(b"\x0a\x01a")

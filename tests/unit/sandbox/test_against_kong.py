"""
The sandbox gateway and a real Kong, side by side: same configuration, same plugin, same bytes.

Each case is one raw request; its `X-Do` header tells the scripted plugin which PDK calls to make.
Compared are the answer, what the upstream received, and Kong's reply to each call. Runs where a
`kong` of version 3.9 is on PATH, and is skipped elsewhere: the recorded frames remain.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from kong_token_exchange.pluginserver import wire
from kong_token_exchange.sandbox import http1
from kong_token_exchange.sandbox.gateway import SandboxGateway
from kong_token_exchange.sandbox.proxying import SERVER_NAME
from tests.unit.sandbox.scripted import DESCRIPTION, TIMEOUT_S, Answer, Event, HttpClient, ScriptedPlugin, get

KONG = shutil.which("kong")
READ_TIMEOUT_S = 2

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(KONG is None, reason="no kong on PATH"),
]

ALICE = {"username": "alice", "id": "b32379d9-3d28-5683-a79c-72139be6e34f"}


# --- the parties ----------------------------------------------------------------------


@dataclass
class Upstream:
    """Answers everything and keeps each request as it came: line, headers, body."""

    listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))
    requests: list[tuple[bytes, list[tuple[bytes, bytes]], bytes]] = field(default_factory=list)
    sockets: list[socket.socket] = field(default_factory=list)

    def run(self) -> None:
        while True:
            try:
                accepted, _ = self.listener.accept()
            except OSError:
                return
            self.sockets.append(accepted)
            threading.Thread(target=self._serve, args=(accepted,), daemon=True).start()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for accepted in self.sockets:
            accepted.close()

    def _serve(self, accepted: socket.socket) -> None:
        side = HttpClient.__new__(HttpClient)
        side.socket, side.buffer = accepted, bytearray()
        with contextlib.suppress(OSError):
            while True:
                while (end := http1.find_head_end(side.buffer)) < 0:
                    if not side.fill():
                        return
                line, *rest = bytes(side.buffer[: end - 4]).split(b"\r\n")
                del side.buffer[:end]
                headers = [tuple(item.split(b": ", 1)) for item in rest]
                named = {name.lower(): value for name, value in headers}
                length = int(named[b"content-length"]) if b"content-length" in named else None
                decoder = http1.BodyDecoder(content_length=length, chunked=b"transfer-encoding" in named)
                body = b"".join(iter(lambda: side.part(decoder), b""))  # noqa: B023
                self.requests.append((line, headers, body))
                accepted.sendall(
                    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Upstream: 1\r\nServer: up\r\n\r\nok"
                )


def declarative_for(port: int) -> dict[str, Any]:
    plugin = {"name": "token-exchange", "config": {"mark": "one"}}
    route = {"name": "r", "paths": ["/a"], "strip_path": False, "plugins": [plugin]}
    service = {"name": "echo", "url": f"http://127.0.0.1:{port}", "routes": [route]}
    return {"_format_version": "3.0", "services": [service], "consumers": [ALICE]}


class Side:
    """One of the two gateways with a plugin of its own."""

    def __init__(self, directory: Path, upstream: Upstream) -> None:
        self.upstream = upstream
        self.directory = directory
        self.replies: list[tuple[str, bytes]] = []
        self.plugin = ScriptedPlugin(directory / "plugin.socket", self.follow)
        self.url = ""

    def follow(self, event: Event) -> None:
        """Make the calls that the request asks for."""
        wanted = wire.decode_string(event.ask("kong.request.get_header", wire.encode_string("x-do")))
        for method, arguments in json.loads(wanted or "[]"):
            self.replies.append((method, event.ask(method, bytes.fromhex(arguments))))

    def play(self, raw: bytes, method: str) -> "Outcome":
        self.upstream.requests.clear()
        self.replies.clear()
        with HttpClient(self.url) as client:
            client.send(raw)
            answer = client.answer(method)
        return Outcome(answer, list(self.upstream.requests), list(self.replies), self.url.rpartition(":")[2])

    def reload(self, config: dict[str, Any]) -> None:
        raise NotImplementedError


class SandboxSide(Side):
    def start(self, config: dict[str, Any]) -> None:
        self.gateway = SandboxGateway(
            config,
            plugin_command=None,
            description=DESCRIPTION,
            socket_path=self.plugin.path,
            read_timeout_s=READ_TIMEOUT_S,
        )
        self.gateway.start(wait=False)
        self.url = self.gateway.url

    def reload(self, config: dict[str, Any]) -> None:
        self.gateway.reload(config)

    def stop(self) -> None:
        self.gateway.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class KongSide(Side):
    def start(self, config: dict[str, Any]) -> None:
        (self.directory / "kong.yml").write_text(yaml.safe_dump(config))
        (self.directory / "plugin.json").write_text(json.dumps(DESCRIPTION))
        proxy, admin = free_port(), free_port()
        self.url, self.admin = f"http://127.0.0.1:{proxy}", f"http://127.0.0.1:{admin}"
        settings = {
            "database": "off",
            "declarative_config": self.directory / "kong.yml",
            "prefix": self.directory / "prefix",
            "nginx_main_worker_processes": 1,
            "proxy_listen": f"127.0.0.1:{proxy}",
            "admin_listen": f"127.0.0.1:{admin}",
            "admin_gui_listen": "off",
            "status_listen": "off",
            "anonymous_reports": "off",
            "plugins": "bundled,token-exchange",
            "pluginserver_names": "token-exchange",
            "pluginserver_token_exchange_socket": self.plugin.path,
            "pluginserver_token_exchange_query_cmd": f"cat {self.directory}/plugin.json",
            "nginx_http_lua_socket_read_timeout": f"{READ_TIMEOUT_S}s",
        }
        if os.geteuid() == 0:
            settings["nginx_user"] = "root root"
        conf = self.directory / "kong.conf"
        conf.write_text("".join(f"{name} = {value}\n" for name, value in settings.items()))
        self._kong("start", "-c", str(conf))
        deadline = time.monotonic() + 60
        while not self._routes():
            assert time.monotonic() < deadline, "Kong does not come up"
            time.sleep(0.05)

    def reload(self, config: dict[str, Any]) -> None:
        body = json.dumps({"config": yaml.safe_dump(config)}).encode()
        with HttpClient(self.admin) as client:
            client.send(
                b"POST /config HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            answer = client.answer()
        assert answer.status == 201, answer.body

    def stop(self) -> None:
        self._kong("stop", "-p", str(self.directory / "prefix"))

    def _routes(self) -> bool:
        with contextlib.suppress(OSError, AssertionError, http1.BadMessageError):
            return get(self.url, "/no-such-route").status == 404
        return False

    def _kong(self, *arguments: str) -> None:
        done = subprocess.run(
            [str(KONG), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=self.directory,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@dataclass
class Outcome:
    answer: Answer
    requests: list[tuple[bytes, list[tuple[bytes, bytes]], bytes]]
    replies: list[tuple[str, bytes]]
    port: str

    def comparable(self) -> dict[str, Any]:
        """Everything but clocks, random ids, ports, names, and the order of maps."""
        left_out = {"date", "x-kong-upstream-latency", "x-kong-proxy-latency", "x-kong-response-latency"}
        headers = [
            (name.lower(), self._plain(http1.encode(value))) for name, value in self.answer.head.headers
        ]
        return {
            "status": self.answer.status,
            "headers": sorted(pair for pair in headers if pair[0] not in left_out),
            "body": self._plain(self.answer.body),
            "requests": [
                (line, [(name, self._plain(value)) for name, value in headers], body)
                for line, headers, body in self.requests
            ],
            "replies": [(method, self._reply(method, payload)) for method, payload in self.replies],
        }

    def _plain(self, value: bytes) -> bytes:
        value = re.sub(rb"\b[0-9a-f]{32}\b", b"<id>", value)
        value = re.sub(rb"\b%s\b" % self.port.encode(), b"<port>", value)
        return value.replace(SERVER_NAME.encode(), b"kong/3.9.1")

    def _reply(self, method: str, payload: bytes) -> Any:
        if method in ("kong.request.get_headers", "kong.request.get_query"):
            return wire.decode_struct(payload)
        if method.endswith("_port"):
            return str(wire.decode_int(payload)).replace(self.port, "<port>")
        if method == "kong.client.load_consumer":
            return sorted(item for item in wire.read_fields(payload) if item[0] != 2)
        return self._plain(payload)


@pytest.fixture(scope="module")
def sides(tmp_path_factory) -> Iterator[tuple[SandboxSide, KongSide]]:
    upstream = Upstream()
    threading.Thread(target=upstream.run, daemon=True).start()
    config = declarative_for(upstream.listener.getsockname()[1])
    with contextlib.ExitStack() as stack:
        stack.callback(upstream.close)
        started = []
        for kind in (SandboxSide, KongSide):
            side = kind(tmp_path_factory.mktemp("k"), upstream)
            stack.enter_context(side.plugin)
            side.start(config)
            stack.callback(side.stop)
            started.append(side)
        yield started[0], started[1]


# --- the cases ------------------------------------------------------------------------


def do(*calls: tuple[str, bytes]) -> str:
    return "X-Do: " + json.dumps([[method, arguments.hex()] for method, arguments in calls])


def request(*headers: str, start: str = "GET /a/x HTTP/1.1", body: bytes = b"") -> bytes:
    return http1.encode("\r\n".join((start, "Host: api.example:99", *headers, "", ""))) + body


CASES: dict[str, tuple[bytes, str]] = {}


def case(name: str, raw: bytes, method: str = "GET") -> None:
    assert name not in CASES
    CASES[name] = (raw, method)


TARGETS = {
    "plain": "/a/x",
    "empty-query": "/a?",
    "two-question-marks": "/a/b?x=1?y",
    "dots": "/a/./b//c/../d?x",
    "escapes": "/a/%41%2f%2e%20x%c3%bc",
    "raw-utf8-and-quote": '/a/ü"',
    "escaped-route": "/%61/x",
    "absolute": "http://other.example:77/a/x",
    "fragment": "/a/x#f",
    "too-long": "/a/" + "x" * 8200,
    "line-of-8192": "/a/" + "x" * (8192 - len("GET /a/ HTTP/1.1\r\n")),
    "line-of-8193": "/a/" + "x" * (8193 - len("GET /a/ HTTP/1.1\r\n")),
    "no-route": "/zzz",
}
for name, target in TARGETS.items():
    case(f"target {name}", request(start=f"GET {target} HTTP/1.1"))

HEADS = {
    "lower-method": b"get /a HTTP/1.1\r\nHost: h\r\n\r\n",
    "trace": b"TRACE /a HTTP/1.1\r\nHost: h\r\n\r\n",
    "connect": b"CONNECT a:1 HTTP/1.1\r\nHost: h\r\n\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n",
    "http-2": b"GET /a HTTP/2.0\r\nHost: h\r\n\r\n",
    "http-1.0": b"GET /a HTTP/1.0\r\n\r\n",
    "http-1.0-kept": b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    "no-host": b"GET /a HTTP/1.1\r\n\r\n",
    "two-hosts": b"GET /a HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    "bad-host": b"GET /a HTTP/1.1\r\nHost: a/b\r\n\r\n",
    "port-as-host": b"GET /a HTTP/1.1\r\nHost: :80\r\n\r\n",
    "host-with-dot": b"GET /a HTTP/1.1\r\nHost: API.Example.\r\n\r\n",
    "bare-lf": b"GET /a HTTP/1.1\nHost: h\nX: 1\n\n",
}
for name, raw in HEADS.items():
    case(f"head {name}", raw)

HEADERS: dict[str, tuple[str, ...]] = {
    "authorization-twice": ("Authorization: a", "Authorization: a"),
    "if-match-twice": ("If-Match: a", "If-Match: a"),
    "range-twice": ("Range: a", "Range: a"),
    "proxy-authorization-twice": ("Proxy-Authorization: a", "Proxy-Authorization: a"),
    "expect-twice": ("Expect: a", "Expect: b"),
    "other-twice": ("X-A: 1", "X-A: 2"),
    "content-type-twice": ("Content-Type: a", "Content-Type: b"),
    "cookie-twice": ("Cookie: a=1", "Cookie: b=2"),
    "folded": ("X: 1", " fold"),
    "blank-before-colon": ("X : 1",),
    "nul": ("X: a\0b",),
    "bare-cr": ("X: a\rb",),
    "no-colon": ("Nocolon",),
    "no-name": (": x",),
    "dot-in-name": ("X.A: 1",),
    "underscore": ("X_A: 1",),
    "name-not-ascii": ("Ü: 1",),
    "controls": ("X: \x01\x0b\x7f",),
    "trailing-tab": ("X: a\t",),
    "leading-tab": ("X:\ta",),
    "blanks": ("X:   a   ",),
    "not-utf8": ("X: \udcff",),
    "coding-gzip": ("Transfer-Encoding: gzip",),
    "length-and-chunked": ("Content-Length: 3", "Transfer-Encoding: chunked"),
    "length-negative": ("Content-Length: -1",),
    "length-plus": ("Content-Length: +1",),
    "length-list": ("Content-Length: 1, 1",),
    "length-twice": ("Content-Length: 1", "Content-Length: 1"),
    "connection-authorization": ("Connection: Authorization", "Authorization: x"),
    "connection-list": ("Connection: X-A , keep-alive,, Y", "X-A: 1", "Y: 2"),
    "connection-second": ("Connection: close", "Connection: X-A", "X-A: 1"),
    "connection-first": ("Connection: X-A", "Connection: X-B", "X-A: 1", "X-B: 1"),
    "connection-close": ("Connection: CLOSE",),
    "connection-underscore": ("Connection: X-A", "X_A: 1"),
    "connection-te": ("Connection: TE", "TE: trailers"),
    "te": ("TE: gzip, trailers",),
    "te-gzip": ("TE: gzip",),
    "upgrade-h2c": ("Upgrade: h2c", "Connection: Upgrade"),
    "proxy": ("Proxy: x", "Proxy-Connection: keep-alive"),
    "keep-alive": ("Keep-Alive: 5",),
    "forwarded": ("X-Forwarded-For: 1.1.1.1", "X-Forwarded-Proto: https", "X-Forwarded-Host: evil"),
    "forwarded-more": (
        "X-Forwarded-Port: 1",
        "X-Forwarded-Path: /p",
        "X-Forwarded-Prefix: /q",
        "X-Real-IP: 6.6.6.6",
    ),
    "forwarded-twice": ("X-Forwarded-For: 1.1.1.1", "X-Forwarded-For: 2.2.2.2"),
    "request-id": ("X-Kong-Request-Id: mine",),
    "via": ("Via: 1.0 a",),
    "line-of-8192": ("X: " + "a" * (8192 - len("X: \r\n")),),
    "line-of-8193": ("X: " + "a" * (8193 - len("X: \r\n")),),
    "27-kb": tuple(f"X-{number}: " + "a" * 100 for number in range(250)),
    "38-kb": tuple(f"X-{number}: " + "a" * 100 for number in range(350)),
}
for name, lines in HEADERS.items():
    case(f"header {name}", request(*lines))

POST = "POST /a HTTP/1.1"
case("body length", request("Content-Length: 4", start=POST, body=b"body"))
case("body empty", request("Content-Length: 0", start=POST))
case("answer to HEAD", request(start="HEAD /a HTTP/1.1"), "HEAD")
case("answer 404 to HEAD", request(start="HEAD /zzz HTTP/1.1"), "HEAD")
for accept in (
    "text/html",
    "text/plain",
    "application/json;q=0.1, text/html",
    "image/png",
    "*/*",
    "application/xml",
):
    case(f"answer 404 as {accept}", request(f"Accept: {accept}", start="GET /zzz HTTP/1.1"))
    case(f"answer 500 as {accept}", request(f"Accept: {accept}", do(("kong.vault.get", b""))))

VALUES: dict[str, Any] = {
    "text": "Bearer N",
    "empty": "",
    "integer": 401,
    "float": 1.5,
    "large": 1e15,
    "true": True,
    "false": False,
    "null": None,
    "list": ["a", "b"],
    "empty-list": [],
    "record": {"a": "b"},
    "crlf": "a\r\nX: y",
    "controls": "t\t\x00\x01\x7f",
    "not-utf8": "Bearer \udcff",
    "number-in-list": ["a", 1],
    "null-in-list": [None],
    "mixed-list": ["a", None, "b"],
}
SET = "kong.service.request.set_header"
for name, value in VALUES.items():
    given = wire.encode_kv("authorization", value)
    case(f"set authorization {name}", request("Authorization: OLD", do((SET, given))))
    given = wire.encode_kv("x-a", value)
    case(f"set other {name}", request("X-A: OLD", "x-a: OLD2", "X-B: 1", do((SET, given))))
    case(f"response header {name}", request(do(("kong.response.set_header", wire.encode_kv("x_r", value)))))
    stored = ("kong.ctx.shared.set", wire.encode_kv("k", value))
    case(f"shared {name}", request(do(stored, ("kong.ctx.shared.get", wire.encode_string("k")))))
    encoded = wire.encode_struct({"X-H": value})
    exit_args = wire.encode_exit(401, b"x") + b"\x1a" + wire.encode_varint(len(encoded)) + encoded
    case(f"exit header {name}", request(do(("kong.response.exit", exit_args))))

text, kv, struct = wire.encode_string, wire.encode_kv, wire.encode_struct
CLEAR = "kong.service.request.clear_header"
CHANGES: dict[str, tuple[tuple[str, ...], list[tuple[str, bytes]]]] = {
    "no-value": (("X-A: 1",), [(SET, text("x-a"))]),
    "underscore": (("X-A: 1", "X_A: 2"), [(SET, kv("x_a", "n"))]),
    "new": ((), [(SET, kv("X-New", "n"))]),
    "odd-name": ((), [(SET, kv("x y:(ü)", "n"))]),
    "host": ((), [(SET, kv("Host", "inner.example"))]),
    "connection": (("X-A: 1",), [(SET, kv("Connection", "X-A"))]),
    "clear": (("X-A: 1", "x-a: 2", "X_A: 3"), [(CLEAR, text("X-A"))]),
    "clear-authorization": (("Authorization: x",), [(CLEAR, text("authorization"))]),
    "clear-and-set": (
        ("Authorization: x",),
        [(CLEAR, text("authorization")), (SET, kv("authorization", "n"))],
    ),
    "clear-connection": (("Connection: X-A", "X-A: 1"), [(CLEAR, text("connection"))]),
    "add": (("X-A: 1",), [("kong.service.request.add_header", kv("x-a", "2"))]),
    "several": (("X-A: 1",), [("kong.service.request.set_headers", struct({"x-a": "2", "x-b": ["3", "4"]}))]),
    "several-bad": (("X-A: 1",), [("kong.service.request.set_headers", struct({"x-a": "2", "x-b": [3]}))]),
    "path": ((), [("kong.service.request.set_path", text("/n ew"))]),
    "path-bad": ((), [("kong.service.request.set_path", text("new"))]),
    "method": ((), [("kong.service.request.set_method", text("PUT"))]),
    "method-bad": ((), [("kong.service.request.set_method", text("BREW"))]),
    "body-of-get": ((), [("kong.service.request.set_raw_body", text("replaced"))]),
    "scheme-bad": ((), [("kong.service.request.set_scheme", text("ftp"))]),
    "target-nowhere": ((), [("kong.service.set_target", text("127.0.0.1") + b"\x10\x01")]),
    "status": ((), [("kong.response.set_status", wire.encode_int(299))]),
    "response-headers": (
        (),
        [
            ("kong.response.set_header", kv("x-upstream", "9")),
            ("kong.response.add_header", kv("x-m", "1")),
            ("kong.response.add_header", kv("x-m", "2")),
            ("kong.response.set_header", kv("Content-Type", "t")),
        ],
    ),
    "response-clear": (
        (),
        [("kong.response.set_header", kv("x-q", "9")), ("kong.response.clear_header", text("X_Q"))],
    ),
    "response-then-error": (
        (),
        [("kong.response.set_header", kv("X-E", "1")), ("kong.service.request.set_path", text("x"))],
    ),
    "unknown": ((), [("kong.vault.get", b"")]),
    "response-read": ((), [("kong.response.get_header", text("x"))]),
    "consumer": ((), [("kong.client.load_consumer", text("alice") + b"\x10\x01")]),
    "consumer-none": ((), [("kong.client.load_consumer", text("bob") + b"\x10\x01")]),
    "consumer-bad": ((), [("kong.client.load_consumer", text("alice"))]),
    "authenticate-none": ((), [("kong.client.authenticate", b"")]),
    "authenticate": (
        (),
        [
            ("kong.client.authenticate", b"\x0a\x03\x0a\x01c\x12\x03\x0a\x01k"),
            ("kong.client.get_credential", b""),
            ("kong.client.get_consumer", b""),
        ],
    ),
    "trusted": ((), [("kong.ip.is_trusted", text("127.0.0.1"))]),
    "subsystem": ((), [("kong.nginx.get_subsystem", b"")]),
    "log": ((), [("kong.log.err", b"\x0a\x03\x1a\x01x")]),
}
for name, (lines, calls) in CHANGES.items():
    case(f"change {name}", request(*lines, do(*calls)))
for name, query in (("set", "a=1"), ("emptied", "")):
    calls = [("kong.service.request.set_raw_query", text(query))]
    case(f"query {name}", request(do(*calls), start="GET /a?b=1 HTTP/1.1"))
case(
    "body replaced",
    request(
        "Content-Length: 4", do(("kong.service.request.set_raw_body", text("new"))), start=POST, body=b"body"
    ),
)
READ_BODY = do(("kong.request.get_raw_body", b""))
case("body read", request("Content-Length: 4", READ_BODY, start=POST, body=b"body"))
case(
    "body read chunked",
    request("Transfer-Encoding: chunked", READ_BODY, start=POST, body=b"4\r\nbody\r\n0\r\n\r\n"),
)

MIXED = (
    "Authorization: Bearer a, b",
    "X-A: 1",
    "X-A: 2",
    "X_B: u",
    "X-C: p, q",
    "X-C: r",
    "Cookie: a=1",
    "Cookie: b=2",
)
for name in ("authorization", "x-a", "X_A", "x_b", "x-b", "x-c", "cookie", "host", "user-agent", ""):
    case(
        f"get header {name or 'without a name'}", request(*MIXED, do(("kong.request.get_header", text(name))))
    )
MANY = tuple(f"X-{number}: 1" for number in range(110))
case(
    "get hidden",
    request(*MANY, "Authorization: Bearer a, b", do(("kong.request.get_header", text("authorization")))),
)
VARIABLES = """
    http_cookie http_x_a http_host host remote_addr request_uri uri args is_args scheme request_method
    server_protocol request nonsense arg_x arg_none query_string content_type content_length
    http_authorization realip_remote_addr upstream_uri server_name request_id kong_request_id server_port
"""
for name in VARIABLES.split():
    wanted = do(("kong.nginx.get_var", text(name)))
    case(f"variable {name}", request(*MIXED, "Content-Type: t", wanted, start="GET /a/./x?x=%201 HTTP/1.1"))
for name in [
    "get_path",
    "get_path_with_query",
    "get_raw_query",
    "get_method",
    "get_scheme",
    "get_host",
    "get_port",
    "get_forwarded_scheme",
    "get_forwarded_host",
    "get_forwarded_port",
    "get_http_version",
    "get_uri_captures",
]:
    wanted = do((f"kong.request.{name}", b""))
    case(name, request("X-Forwarded-Host: evil", wanted, start="GET /a/./%41%20b?x=1&y HTTP/1.1"))
for name in ("get_ip", "get_forwarded_ip", "get_protocol", "get_consumer", "get_credential"):
    case(f"client {name}", request(do((f"kong.client.{name}", b""))))
QUERY = "GET /a?x=1&x=2&y&e=&p=a%20b+c&d=%ff&%20=s&&=v HTTP/1.1"
for name in ("x", "y", "z", "e", "p", "d", " "):
    case(f"query argument {name}", request(do(("kong.request.get_query_arg", text(name))), start=QUERY))
for most in (0, 1, 2, 100, 1000, 1001):
    case(f"query of {most}", request(do(("kong.request.get_query", wire.encode_int(most))), start=QUERY))
    case(
        f"headers of {most}",
        request("X-A: 1", "X-A: 2", do(("kong.request.get_headers", wire.encode_int(most)))),
    )

EXIT = "kong.response.exit"
for status in (0, 99, 200, 204, 304, 401, 599, 600):
    case(f"exit {status}", request(do((EXIT, wire.encode_exit(status, b"body")))))
case("exit without body", request(do((EXIT, wire.encode_exit(401)))))
case("exit to HEAD", request(do((EXIT, wire.encode_exit(401, b"body"))), start="HEAD /a HTTP/1.1"), "HEAD")
case(
    "exit to POST",
    request("Content-Length: 4", do((EXIT, wire.encode_exit(401, b"x"))), start=POST, body=b"body"),
)
case(
    "exit after set",
    request(
        do(("kong.response.set_header", kv("X-E", "1")), (EXIT, wire.encode_exit(403, b"x", {"x-e": "2"})))
    ),
)
case(
    "exit headers",
    request(
        do(
            (
                EXIT,
                wire.encode_exit(
                    401, b"x", {"Transfer-Encoding": "chunked", "Server": "me", "content-type": "t"}
                ),
            )
        )
    ),
)


@pytest.mark.parametrize("name", CASES)
def test_sandbox_and_kong_do_the_same(sides, name):
    sandbox, kong = (side.play(*CASES[name]).comparable() for side in sides)

    assert sandbox == kong


# --- where they differ on purpose -----------------------------------------------------


DIFFERENCES = {
    "HTTP/0.9": b"GET /a\r\n\r\n",
    "websocket": request("Upgrade: websocket", "Connection: Upgrade"),
    "chunked body": request("Transfer-Encoding: chunked", start=POST, body=b"4\r\nbody\r\n0\r\n\r\n"),
    "malformed argument": request(do(("kong.request.get_header", b"\xff\xff"))),
    "rare variable": request(do(("kong.nginx.get_var", text("request_length")))),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_documented_difference_is_still_one(sides, name):
    found = []
    for side in sides:
        try:
            found.append(side.play(DIFFERENCES[name], "GET").comparable())
        except (AssertionError, http1.BadMessageError):
            found.append({"status": "no HTTP/1 answer"})

    assert found[0] != found[1]


# --- conversations of several requests ------------------------------------------------


def conversation(side: Side, run: Callable[[Side], list[int]]) -> tuple[list[int], list[Any]]:
    """Run requests and return their statuses and what the plugin saw: connection, command, instance."""
    with side.plugin.changed:
        side.plugin.calls.clear()
    statuses = run(side)
    first = side.plugin.calls[0][0] if side.plugin.calls else 0
    ids: dict[int, int] = {}
    seen = []
    for connection, call in side.plugin.calls:
        number = getattr(call, "instance_id", None)
        known = None if number is None else ids.setdefault(number, len(ids))
        seen.append((connection - first, type(call).__name__, known))
    # How many events came before a change took effect is a matter of timing.
    return statuses, [item for at, item in enumerate(seen) if at == 0 or item != seen[at - 1]]


def change_and_go_on(side: Side) -> list[int]:
    statuses = {get(side.url).status}
    config = declarative_for(side.upstream.listener.getsockname()[1])
    config["services"][0]["tags"] = [str(time.monotonic())]  # Kong ignores a configuration it has already
    side.reload(config)
    deadline = time.monotonic() + TIMEOUT_S
    # Kong's worker takes the new configuration a moment after the Admin API has answered.
    while not side.plugin.of(wire.StartInstance):
        assert time.monotonic() < deadline
        statuses.add(get(side.url).status)
    return [*statuses, get(side.url).status]


def refuse_and_go_on(side: Side) -> list[int]:
    refusal = do((EXIT, wire.encode_exit(401)))
    return [get(side.url, "/a", *lines).status for lines in ((), (refusal,), (), (refusal,), ())]


def fail_and_go_on(side: Side) -> list[int]:
    return [get(side.url, "/a", *lines).status for lines in ((), (do(("kong.nope", b"")),), ())]


def close_once(side: Side) -> list[int]:
    """The plugin closes the connection of one event, as for an unknown instance."""
    closed = []

    def access(event: Event) -> None:
        if not closed:
            closed.append(event)
            event.side.close()
            event.ended = True

    side.plugin.access = access
    try:
        return [get(side.url).status, get(side.url).status]
    finally:
        side.plugin.access = side.follow


def be_too_slow_once(side: Side) -> list[int]:
    release = threading.Event()
    side.plugin.access = lambda event: release.wait(TIMEOUT_S) and None
    try:
        slow = get(side.url).status
    finally:
        release.set()
        side.plugin.access = side.follow
    return [slow, get(side.url).status]


def say_too_much_once(side: Side) -> list[int]:
    """The plugin sends a frame after the end of the event: Kong drops the connection."""

    def access(event: Event) -> None:
        event.end()
        event.side.write(b"unasked")

    side.plugin.access = access
    left = len(side.plugin.left)
    try:
        first = get(side.url).status
        side.plugin.wait_for(lambda: len(side.plugin.left) > left)
    finally:
        side.plugin.access = side.follow
    return [first, get(side.url).status]


@pytest.mark.parametrize(
    "run",
    [
        refuse_and_go_on,
        fail_and_go_on,
        close_once,
        be_too_slow_once,
        say_too_much_once,
        # Last: Kong may take up a reload once more a moment later, in the midst of what follows.
        change_and_go_on,
    ],
    ids=lambda run: run.__name__,
)
def test_sandbox_and_kong_hold_the_same_conversation(sides, run):
    for side in sides:
        assert get(side.url).status == 200  # both have an instance and an idle connection
    sandbox, kong = (conversation(side, run) for side in sides)

    assert sandbox == kong

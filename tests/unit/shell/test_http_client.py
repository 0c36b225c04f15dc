"""Both HTTP clients over real sockets: every way a server can be wrong, slow or hostile."""

import gzip
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kong_token_exchange import __version__
from kong_token_exchange.errors import (
    DeadlineError,
    IssuerUnavailableError,
    NonConformingResponseError,
    TokenExchangeError,
)
from kong_token_exchange.protocol.http_message import HttpRequest, HttpResponse
from kong_token_exchange.shell import connections, exchange_client, http_client
from kong_token_exchange.shell.exchange_client import ExchangeSender
from kong_token_exchange.shell.http_client import RequestsSender
from tests.support.fakes import PATIENCE_S, run_in_threads
from tests.unit.shell.peers import (
    Authority,
    Peer,
    Script,
    Server,
    black_hole,
    closed_port,
    dripping,
    in_turn,
    message,
    sending,
    serve,
)

MAX_BODY = 64 * 1024

# Long enough for a busy machine to get going, short enough to wait for.
SHORT_S = 0.3


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


AnySender = RequestsSender | ExchangeSender


@pytest.fixture(params=[RequestsSender, ExchangeSender])
def kind(request: pytest.FixtureRequest) -> type[AnySender]:
    made: type[AnySender] = request.param
    return made


@pytest.fixture
def sender(kind: type[AnySender], authority: Authority) -> Iterator[AnySender]:
    # With one certificate to load it is made faster than with the system's hundreds.
    made = kind(ca_file=str(authority.file))
    yield made
    made.close()


def post(url: str, body: bytes = b"a=b", **headers: str) -> HttpRequest:
    return HttpRequest(method="POST", url=url, headers=headers, body=body)


def get(url: str, **headers: str) -> HttpRequest:
    return HttpRequest(method="GET", url=url, headers=headers)


def ask(
    sender: AnySender, request: HttpRequest, *, within: float = PATIENCE_S, max_body: int = MAX_BODY
) -> HttpResponse:
    return sender.send(request, deadline=time.monotonic() + within, max_body=max_body)


def failure(
    sender: AnySender, request: HttpRequest, *, within: float = PATIENCE_S, max_body: int = MAX_BODY
) -> TokenExchangeError:
    began = time.monotonic()
    with pytest.raises(TokenExchangeError) as caught:
        ask(sender, request, within=within, max_body=max_body)
    assert time.monotonic() - began < within + PATIENCE_S
    # No body, header or address hangs on the error.
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return caught.value


# --- messages -------------------------------------------------------------------------


def test_a_request_goes_out_as_it_is_and_its_answer_comes_back(sender: AnySender) -> None:
    with Server(serve(b'{"a":1}', 201, "X-Some-Thing: Value")) as server:
        response = ask(sender, post(server.url + "/token?x=y", b"a=b&c=d", Accept="application/json"))

    request = server.requests[0]
    assert ("POST /token?x=y HTTP/1.1", b"a=b&c=d") == (request.start_line, request.body)
    assert [
        ("accept", "application/json"),
        ("accept-encoding", "identity"),
        ("content-length", "7"),
        ("host", f"127.0.0.1:{server.port}"),
        ("user-agent", f"kong-token-exchange/{__version__}"),
    ] == sorted((name.lower(), value) for name, value in request.headers)
    assert (201, b'{"a":1}', "Value") == (response.status, response.body, response.headers["x-some-thing"])


def test_a_chunked_answer_is_put_together(sender: AnySender) -> None:
    def script(peer: Peer) -> None:
        while peer.read_request():
            peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            peer.send(b"3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\nT: u\r\n\r\n")

    with Server(script) as server:
        assert [b"abcdefg"] * 2 == [ask(sender, get(server.url)).body for _ in range(2)]
        assert 1 == server.connections


def test_an_answer_may_end_with_its_connection(sender: AnySender) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{}")

    with Server(script) as server:
        assert b"{}" == ask(sender, get(server.url)).body


def test_headers_of_one_name_are_one_list(sender: AnySender) -> None:
    with Server(serve(b"{}", 200, "X-A: b", "x-a: c")) as server:
        assert "b, c" == ask(sender, get(server.url)).headers["x-a"]


# --- nothing is followed, nothing is kept ---------------------------------------------


@pytest.mark.parametrize(
    "status", [300, 301, 302, 303, 305, 307, 308], ids=lambda status: f"EXC-27-KEY-05-{status}"
)
@pytest.mark.parametrize("make", [get, post], ids=["get", "post"])
def test_no_redirect_is_followed(sender: AnySender, make: Callable[[str], HttpRequest], status: int) -> None:
    with (
        Server(serve()) as evil,
        Server(serve(b"", status, f"Location: {evil.url}/", "Refresh: 0")) as server,
    ):
        response = ask(sender, make(server.url))

    assert (status, 1, 0) == (response.status, len(server.requests), evil.connections)


def test_no_cookie_is_kept(sender: AnySender) -> None:
    with Server(serve(b"{}", 200, "Set-Cookie: session=mark; Path=/")) as server:
        for _ in range(2):
            ask(sender, get(server.url))

    assert [None, None] == [request.header("cookie") for request in server.requests]


@pytest.fixture
def hostile_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, authority: Authority
) -> Iterator[Server]:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login mark password mark\ndefault login mark password mark\n")
    netrc.chmod(0o600)
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text(netrc.read_text())
    (home / ".netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "session-keys"))
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(name, str(authority.file))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server(serve(b"proxy")) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        yield proxy
        assert 0 == proxy.connections
    assert not (tmp_path / "session-keys").exists()


def test_key_18_proxies_and_netrc_of_the_environment_are_not_used(
    kind: type[AnySender], hostile_environment: Server
) -> None:
    sender = kind()
    with Server(serve()) as server:
        ask(sender, post(server.url))
        ask(sender, post(server.url, Authorization="Basic ours"))
    sender.close()

    assert [None, "Basic ours"] == [request.header("authorization") for request in server.requests]


def test_key_18_certificates_of_the_environment_are_not_used(
    kind: type[AnySender], hostile_environment: Server, authority: Authority
) -> None:
    sender = kind()
    with Server(serve(), tls=authority.context("127.0.0.1")) as server:
        error = failure(sender, get(server.url))
    sender.close()

    assert ("tls_refused", []) == (error.reason, server.requests)


def test_key_18_session_keys_are_not_written(
    kind: type[AnySender], hostile_environment: Server, authority: Authority
) -> None:
    sender = kind(ca_file=str(authority.file))
    with Server(serve(), tls=authority.context("127.0.0.1")) as server:
        assert 200 == ask(sender, get(server.url)).status
    sender.close()


# --- size and encoding ----------------------------------------------------------------


def chunked(peer: Peer, size: int) -> None:
    peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(size // 1000):
        peer.send(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
    peer.send(b"0\r\n\r\n")


def until_close(peer: Peer, size: int) -> None:
    peer.send(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * size)
    peer.sock.shutdown(socket.SHUT_WR)
    peer.sock.close()


FRAMINGS: dict[str, Callable[[Peer, int], None]] = {
    "length": lambda peer, size: peer.send(message(b"x" * size)),
    "chunked": chunked,
    "until-close": until_close,
}


@pytest.mark.parametrize("send", FRAMINGS.values(), ids=FRAMINGS.keys())
def test_a_body_up_to_the_limit_is_read(sender: AnySender, send: Callable[[Peer, int], None]) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        send(peer, 50_000)

    with Server(script) as server:
        assert b"x" * 50_000 == ask(sender, get(server.url), max_body=50_000).body


@pytest.mark.parametrize("send", FRAMINGS.values(), ids=[f"KEY-06-FAULT-18-{name}" for name in FRAMINGS])
def test_a_longer_body_is_refused(sender: AnySender, send: Callable[[Peer, int], None]) -> None:
    def script(peer: Peer) -> None:
        while peer.read_request():
            send(peer, 50_000)

    with Server(script) as server:
        errors = [failure(sender, get(server.url), max_body=49_999) for _ in range(2)]

    assert [(502, "response_too_long")] * 2 == [(error.status, error.reason) for error in errors]
    assert 2 == server.connections, "what is left of a long answer must not be the start of the next"


def test_key_06_a_body_without_end_is_cut_at_the_limit(sender: AnySender) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        while not peer.server.stopping.is_set():
            peer.send(b"x" * 10_000)

    with Server(script) as server:
        assert "response_too_long" == failure(sender, get(server.url)).reason


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "deflate", "br", "zstd", "identity, gzip", "GZIP"])
def test_key_06_an_encoded_answer_is_refused(sender: AnySender, encoding: str) -> None:
    bomb = gzip.compress(b"x" * 10_000_000)
    with Server(serve(bomb, 200, f"Content-Encoding: {encoding}")) as server:
        error = failure(sender, get(server.url))

    assert (502, "response_encoded") == (error.status, error.reason)


def test_identity_is_no_encoding(sender: AnySender) -> None:
    with Server(serve(b"{}", 200, "Content-Encoding: Identity")) as server:
        assert b"{}" == ask(sender, get(server.url)).body


# --- time -----------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"

CHUNKED_HEAD = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"

DRIPS: dict[str, Script] = {
    "status-line": dripping(b"HTTP/1.1 200 " + b"O" * 10_000),
    "headers": in_turn(sending(HEAD), dripping(b"X-A: b\r\n" * 10_000)),
    "body": in_turn(sending(HEAD + b"Content-Length: 9999\r\n\r\n"), dripping(b"x" * 9999)),
    "chunk-size": in_turn(sending(CHUNKED_HEAD), dripping(b"0" * 10_000)),
    "trailers": in_turn(sending(CHUNKED_HEAD + b"0\r\n"), dripping(b"X-A: b\r\n" * 10_000)),
    "continue": dripping(b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000),
    "nothing": Peer.wait_until_left,
}


@pytest.mark.parametrize("drip", DRIPS.values(), ids=[f"FAULT-06-RES-14-{name}" for name in DRIPS])
def test_res_14_an_answer_that_comes_byte_by_byte_is_cut_at_the_deadline(
    sender: AnySender, drip: Script
) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        drip(peer)

    with Server(script) as server:
        error = failure(sender, post(server.url), within=SHORT_S)

    assert (DeadlineError, 504) == (type(error), error.status)
    assert {"host": f"127.0.0.1:{server.port}"} == error.facts


def test_fault_06_over_tls(sender: AnySender, authority: Authority) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        DRIPS["body"](peer)

    with Server(script, tls=authority.context("127.0.0.1")) as server:
        error = failure(sender, post(server.url), within=SHORT_S)

    assert "deadline" == error.reason


def test_fault_12_a_tls_handshake_that_never_ends_is_cut_at_the_deadline(sender: AnySender) -> None:
    with Server(Peer.wait_until_left) as server:
        error = failure(sender, get(f"https://127.0.0.1:{server.port}/"), within=SHORT_S)

    assert "deadline" == error.reason


def test_fault_05_a_silence_shorter_than_the_deadline_is_an_outage(kind: type[AnySender]) -> None:
    sender = kind(read_timeout_s=SHORT_S)
    with Server(Peer.wait_until_left) as server:
        error = failure(sender, post(server.url))
    sender.close()

    assert (503, "answer_timeout") == (error.status, error.reason)


def test_a_deadline_that_has_passed_sends_nothing(sender: AnySender) -> None:
    with Server(serve()) as server:
        error = failure(sender, get(server.url), within=-1)

        assert ("deadline", 0) == (error.reason, server.connections)


def test_fault_04_a_slow_answer_inside_the_deadline_is_taken(sender: AnySender) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        for part in (message(b'{"a":1}')[:30], message(b'{"a":1}')[30:]):
            peer.server.stopping.wait(0.05)
            peer.send(part)

    with Server(script) as server:
        assert b'{"a":1}' == ask(sender, get(server.url)).body


# --- connecting -----------------------------------------------------------------------


def test_fault_01_nobody_listens(sender: AnySender) -> None:
    port = closed_port()
    error = failure(sender, get(f"http://127.0.0.1:{port}/"))

    assert (IssuerUnavailableError, "connect_failed") == (type(error), error.reason)
    assert {"host": f"127.0.0.1:{port}", "cause": "ConnectionRefusedError"} == error.facts


def test_fault_03_a_black_hole_is_an_outage_after_the_connect_time(
    sender: AnySender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "CONNECT_TIMEOUT_S", SHORT_S)
    with black_hole() as port:
        error = failure(sender, get(f"http://127.0.0.1:{port}/"))

    assert (503, "connect_failed") == (error.status, error.reason)


def test_fault_03_a_black_hole_is_cut_at_the_deadline(sender: AnySender) -> None:
    with black_hole() as port:
        error = failure(sender, get(f"http://127.0.0.1:{port}/"), within=SHORT_S)

    assert (504, "deadline") == (error.status, error.reason)


def numeric(address: str, port: int) -> list[tuple[Any, Any, int, str, Any]]:
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]


class Names:
    """Takes the place of the system's resolver."""

    def __init__(self, answer: Callable[[str, int], list[Any]]) -> None:
        self.answer = answer
        self.asked: list[str] = []

    def __call__(self, host: str, port: int, *args: Any) -> list[Any]:
        if socket.AI_NUMERICHOST in args[3:]:
            if host.replace(".", "").isdigit():
                return numeric(host, port)
            raise socket.gaierror(socket.EAI_NONAME, "not a number")
        self.asked.append(host)
        return self.answer(host, port)


def test_fault_13_a_name_that_does_not_exist(sender: AnySender, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(host: str, port: int) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", Names(answer))
    error = failure(sender, get("http://idp.test/"))

    assert (503, "name_not_resolved") == (error.status, error.reason)


def test_fault_13_a_name_that_cannot_be_one(sender: AnySender) -> None:
    error = failure(sender, get(f"http://{'a' * 300}.test/"))

    assert 503 == error.status


def test_fault_13_a_silent_name_server_costs_its_time_and_one_thread(
    sender: AnySender, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = threading.Event()

    def answer(host: str, port: int) -> list[Any]:
        assert silent.wait(PATIENCE_S)
        return numeric("127.0.0.1", port)

    names = Names(answer)
    monkeypatch.setattr(socket, "getaddrinfo", names)
    monkeypatch.setattr(connections, "NAME_TIMEOUT_S", 0.1)
    with Server(serve()) as server:
        request = get(f"http://idp.test:{server.port}/")
        try:
            errors = run_in_threads(lambda: ask(sender, request), 5)
            late = failure(sender, request, within=0.05)
        finally:
            silent.set()
        monkeypatch.setattr(connections, "NAME_TIMEOUT_S", PATIENCE_S)

        assert ["name_not_resolved"] * 5 == [getattr(error, "reason", error) for error in errors]
        assert "deadline" == late.reason
        assert 1 == len(names.asked)
        # The name server answers again: no restart is needed.
        assert 200 == ask(sender, request).status


def test_fault_13_no_thread_for_a_look_up_is_an_outage(
    sender: AnySender, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(socket, "getaddrinfo", Names(numeric))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        error = failure(sender, get("http://idp.test/"))
    with Server(serve()) as server:
        monkeypatch.setattr(socket, "getaddrinfo", Names(lambda _, port: numeric("127.0.0.1", port)))

        assert "name_not_resolved" == error.reason
        assert 200 == ask(sender, get(f"http://idp.test:{server.port}/")).status


def test_fault_116_no_memory_for_a_look_up_is_an_outage_that_passes(
    sender: AnySender, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory_left = False

    def answer(_: str, port: int) -> list[Any]:
        if not memory_left:
            raise MemoryError
        return numeric("127.0.0.1", port)

    monkeypatch.setattr(socket, "getaddrinfo", Names(answer))
    with Server(serve()) as server:
        request = get(f"http://idp.test:{server.port}/")
        error = failure(sender, request)
        memory_left = True

        assert "name_not_resolved" == error.reason
        # Whoever asks for a name that nobody looks up any more would wait for ever.
        assert 200 == ask(sender, request).status


def test_the_next_address_of_a_name_is_tried(sender: AnySender, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = closed_port()

    def answer(_: str, port: int) -> list[Any]:
        return [*numeric("127.0.0.1", dead), *numeric("127.0.0.1", port)]

    monkeypatch.setattr(socket, "getaddrinfo", Names(answer))
    with Server(serve()) as server:
        assert 200 == ask(sender, get(f"http://idp.test:{server.port}/")).status


def test_many_dead_addresses_of_one_family_do_not_hide_the_other(
    sender: AnySender, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = closed_port()

    def answer(_: str, port: int) -> list[Any]:
        six = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", dead, 0, 0))]
        return [*six * 8, *numeric("127.0.0.1", port)]

    monkeypatch.setattr(socket, "getaddrinfo", Names(answer))
    with Server(serve()) as server:
        assert 200 == ask(sender, get(f"http://idp.test:{server.port}/")).status


def test_a_name_without_an_address_that_answers_is_an_outage(
    sender: AnySender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", Names(lambda _host, _port: []))

    assert "connect_failed" == failure(sender, get("http://idp.test/")).reason


@pytest.mark.parametrize("url", ["http://[::1/", "http://a b/", "gopher://idp.test/", "http://"])
def test_an_address_that_is_none_is_an_outage(sender: AnySender, url: str) -> None:
    assert 503 == failure(sender, get(url)).status


def test_fault_14_a_connection_gets_too_old_for_the_address_its_name_had(
    sender: AnySender, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server(serve(b"old")) as old, Server(serve(b"new")) as new:
        port = old.port
        monkeypatch.setattr(socket, "getaddrinfo", Names(lambda _host, _port: numeric("127.0.0.1", port)))
        before = ask(sender, get("http://idp.test:1/")).body
        port = new.port
        still = ask(sender, get("http://idp.test:1/")).body
        monkeypatch.setattr(connections, "MAX_AGE_S", 0.0)
        after = ask(sender, get("http://idp.test:1/")).body

    assert (b"old", b"old", b"new") == (before, still, after)


def test_a_name_is_reached_where_the_map_says(kind: type[AnySender], authority: Authority) -> None:
    names: list[str | None] = []
    context = authority.context("idp.test")
    context.sni_callback = lambda _sock, name, _context: names.append(name)
    with Server(serve(), tls=context) as server:
        sender = kind(ca_file=str(authority.file), resolve={"idp.test:8443": ("127.0.0.1", server.port)})
        response = ask(sender, get("https://idp.test:8443/a"))
        elsewhere = failure(sender, get("https://idp.test:8444/"), within=5)
        sender.close()

    assert (200, ["idp.test"]) == (response.status, names)
    assert "idp.test:8443" == server.requests[0].header("host")
    assert elsewhere.reason in {"name_not_resolved", "deadline"}


def test_fault_115_no_descriptor_is_an_outage(sender: AnySender, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(24, "Too many open files")

    with Server(serve()) as server:
        with monkeypatch.context() as patch:
            patch.setattr(connections, "DeadlineSocket", refuse)
            error = failure(sender, get(server.url))

        assert (503, "connect_failed") == (error.status, error.reason)
        assert 200 == ask(sender, get(server.url)).status


# --- broken answers -------------------------------------------------------------------

BROKEN: dict[str, Script] = {
    "FAULT-15-closed-at-once": Peer.close,
    "FAULT-15-reset-at-once": Peer.reset,
    "FAULT-15-reset-in-head": in_turn(sending(b"HTTP/1.1 20"), Peer.reset),
    "FAULT-15-closed-in-head": in_turn(sending(HEAD), Peer.close),
    "FAULT-15-reset-in-body": in_turn(sending(message(b'{"access_token":"x"}')[:-10]), Peer.reset),
    "FAULT-15-closed-in-body": in_turn(
        sending(HEAD + b'Content-Length: 99\r\n\r\n{"access_token":"x"}'), Peer.close
    ),
    "FAULT-15-closed-in-chunks": in_turn(sending(CHUNKED_HEAD + b"2\r\n{}\r\n"), Peer.close),
    "FAULT-15-closed-in-chunk": in_turn(sending(CHUNKED_HEAD + b"9\r\n{}"), Peer.close),
    "chunk-size-is-no-number": sending(CHUNKED_HEAD + b"zz\r\n{}\r\n0\r\n\r\n"),
    "chunk-line-without-end": sending(CHUNKED_HEAD + b"0" * 70_000),
    "two-lengths": sending(HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}}"),
    "not-http": sending(b"220 smtp.test ESMTP\r\n"),
    "garbage": sending(bytes(range(256)) * 10),
    "status-is-no-number": sending(b"HTTP/1.1 two OK\r\n\r\n"),
    "status-line-without-end": sending(b"HTTP/1.1 200 " + b"O" * 70_000),
    "header-without-end": sending(HEAD + b"X-A: " + b"a" * 70_000),
    "too-many-headers": sending(HEAD + b"X-A: b\r\n" * 200 + b"\r\n"),
}


@pytest.mark.parametrize("send", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("make", [get, post], ids=["get", "post"])
def test_a_broken_answer_is_an_outage_and_nothing_of_it_is_used(
    sender: AnySender, make: Callable[[str], HttpRequest], send: Script
) -> None:
    def script(peer: Peer) -> None:
        if peer.number > 1:
            peer.answer(b"good")
        elif peer.read_request():
            send(peer)
            peer.wait_until_left()

    with Server(script) as server:
        error = failure(sender, make(server.url))

        assert (503, "connection_broken") == (error.status, error.reason)
        assert 1 == len(server.requests), "a first request on a new connection is never repeated"
        assert b"good" == ask(sender, get(server.url)).body
        assert 2 == server.connections


def test_an_early_hint_is_no_answer_and_does_not_shift_those_that_follow(sender: AnySender) -> None:
    released = threading.Event()

    def script(peer: Peer) -> None:
        while request := peer.read_request():
            if request.body == b"first":
                peer.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
                # The answer itself comes once the next request is on its way.
                assert released.wait(PATIENCE_S)
            released.set()
            peer.send(message(request.body))

    with Server(script) as server:
        first = failure(sender, post(server.url, b"first"))
        second = ask(sender, post(server.url, b"second"))

    assert (502, "response_status", {"http_status": 103}) == (first.status, first.reason, first.facts)
    assert b"second" == second.body


# --- connections are reused, and only good ones ---------------------------------------


def test_a_connection_is_kept_and_used_again(sender: AnySender) -> None:
    with Server(serve()) as server:
        for make in (get, post, post, get):
            ask(sender, make(server.url))

        assert (4, 1) == (len(server.requests), server.connections)


def test_a_connection_is_kept_and_used_again_over_tls(kind: type[AnySender], authority: Authority) -> None:
    sender = kind(ca_file=str(authority.file))
    with Server(serve(), tls=authority.context("127.0.0.1")) as server:
        for make in (get, post, post, get):
            ask(sender, make(server.url))

        assert (4, 1) == (len(server.requests), server.connections)
    sender.close()


@pytest.mark.parametrize("tls", [False, True], ids=["FAULT-21-plain", "FAULT-21-tls"])
@pytest.mark.parametrize("close", [Peer.close, Peer.reset], ids=["close", "reset"])
def test_res_03_an_idle_connection_that_the_peer_closed_is_replaced_silently(
    kind: type[AnySender], authority: Authority, tls: bool, close: Script
) -> None:
    answered, closed = threading.Event(), threading.Event()

    def script(peer: Peer) -> None:
        peer.answer(b"%d" % peer.number)
        if peer.number == 1:
            assert answered.wait(PATIENCE_S)
            close(peer)
            closed.set()
        else:
            peer.wait_until_left()

    sender = kind(ca_file=str(authority.file))
    with Server(script, tls=authority.context("127.0.0.1") if tls else None) as server:
        first = ask(sender, post(server.url)).body
        answered.set()
        assert closed.wait(PATIENCE_S)
        second = ask(sender, post(server.url)).body

        assert (b"1", b"2") == (first, second)
        assert (2, 2) == (len(server.requests), server.connections)
    sender.close()


def leave_second_request_unanswered(peer: Peer) -> None:
    """Answer the first connection once and read a second request; answer later connections."""
    if peer.number == 1:
        peer.answer(b"first")
        peer.read_request()
        peer.sock.close()
    else:
        serve(b"later")(peer)


def test_fault_21_a_post_that_may_have_been_received_is_not_sent_again(sender: AnySender) -> None:
    with Server(leave_second_request_unanswered) as server:
        ask(sender, post(server.url))
        error = failure(sender, post(server.url))

        assert (503, "connection_broken") == (error.status, error.reason)
        assert (2, 1) == (len(server.requests), server.connections)


def test_fault_21_a_get_is_sent_again_once(sender: AnySender) -> None:
    with Server(leave_second_request_unanswered) as server:
        ask(sender, get(server.url))

        assert b"later" == ask(sender, get(server.url)).body
        assert (3, 2) == (len(server.requests), server.connections)


def test_fault_21_a_get_is_not_sent_a_third_time(sender: AnySender) -> None:
    def script(peer: Peer) -> None:
        if peer.number == 1:
            peer.answer()
        peer.read_request()
        peer.sock.close()

    with Server(script) as server:
        ask(sender, get(server.url))
        error = failure(sender, get(server.url))

        assert ("connection_broken", 3, 2) == (error.reason, len(server.requests), server.connections)


def test_fault_21_a_get_whose_answer_began_is_not_sent_again(sender: AnySender) -> None:
    def script(peer: Peer) -> None:
        peer.answer()
        peer.read_request()
        peer.send(b"HTTP/1.1 200")
        peer.sock.close()

    with Server(script) as server:
        ask(sender, get(server.url))
        failure(sender, get(server.url))

        assert (2, 1) == (len(server.requests), server.connections)


@pytest.mark.parametrize("make", [get, post], ids=["get", "post"])
def test_fault_21_what_was_cut_off_while_it_was_sent_is_sent_again(
    sender: AnySender, monkeypatch: pytest.MonkeyPatch, make: Callable[[str], HttpRequest]
) -> None:
    answered, closed = threading.Event(), threading.Event()

    def script(peer: Peer) -> None:
        if peer.number == 1:
            peer.answer(b"first")
            assert answered.wait(PATIENCE_S)
            peer.reset()
            closed.set()
        else:
            serve(b"later")(peer)

    with Server(script) as server:
        ask(sender, make(server.url))
        answered.set()
        assert closed.wait(PATIENCE_S)
        # The look at the connection comes a moment too early to see the reset.
        monkeypatch.setattr(http_client._HttpConnection, "is_connected", True)
        monkeypatch.setattr(exchange_client._Connection, "is_quiet", lambda _: True)

        assert b"later" == ask(sender, make(server.url)).body
        assert (2, 2) == (len(server.requests), server.connections)


def test_bytes_that_nobody_asked_for_are_not_the_next_answer(sender: AnySender) -> None:
    asked, sent = threading.Event(), threading.Event()

    def script(peer: Peer) -> None:
        peer.answer(b"good")
        if peer.number == 1:
            assert asked.wait(PATIENCE_S)
            peer.send(message(b"stale"))
            sent.set()
        peer.wait_until_left()

    with Server(script) as server:
        ask(sender, post(server.url))
        asked.set()
        assert sent.wait(PATIENCE_S)

        assert b"good" == ask(sender, post(server.url)).body


def test_two_answers_in_one_tls_record_are_not_two_answers(
    kind: type[AnySender], authority: Authority
) -> None:
    def script(peer: Peer) -> None:
        if peer.number == 1:
            peer.read_request()
            # One record: the client's buffer ends with the first answer, TLS holds the second.
            first = message(b"x" * (8192 - len(message(b"", 200)) - 3))
            peer.send(first + b" " * (8192 - len(first)) + message(b"stale"))
            peer.wait_until_left()
        else:
            serve(b"good")(peer)

    sender = kind(ca_file=str(authority.file))
    with Server(script, tls=authority.context("127.0.0.1")) as server:
        ask(sender, post(server.url))

        assert b"good" == ask(sender, post(server.url)).body
    sender.close()


def test_a_connection_that_lay_idle_too_long_is_not_used(
    sender: AnySender, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server(serve()) as server:
        ask(sender, post(server.url))
        monkeypatch.setattr(connections, "MAX_IDLE_S", 0.0)
        ask(sender, post(server.url))

        assert 2 == server.connections


def test_connection_close_is_obeyed(sender: AnySender) -> None:
    with Server(serve(b"{}", 200, "Connection: close")) as server:
        for _ in range(2):
            ask(sender, post(server.url))

        assert 2 == server.connections


def test_many_threads_get_their_own_answers(sender: AnySender) -> None:
    def script(peer: Peer) -> None:
        while request := peer.read_request():
            peer.send(message(request.body))

    numbers = iter(range(10_000))
    lock = threading.Lock()

    def work() -> bool:
        for _ in range(20):
            with lock:
                mine = b"%d" % next(numbers)
            if ask(sender, post(server.url, mine)).body != mine:
                return False
        return True

    with Server(script) as server:
        assert [True] * 8 == run_in_threads(work, 8)
        assert 160 == len(server.requests)
        assert server.connections <= 8 + 4


# --- TLS ------------------------------------------------------------------------------


def test_a_certificate_of_the_configured_authority_is_trusted(
    kind: type[AnySender], authority: Authority
) -> None:
    sender = kind(ca_file=str(authority.file))
    with Server(serve(), tls=authority.context("127.0.0.1")) as server:
        assert 200 == ask(sender, get(server.url)).status
    sender.close()


def test_the_systems_certificates_are_trusted_where_no_file_is_configured(
    kind: type[AnySender], authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where OpenSSL looks for them; nothing of requests or certifi.
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    system = kind()
    replaced = kind(ca_file=str(Authority(tmp_path, name="Other CA").file))
    with Server(serve(), tls=authority.context("127.0.0.1")) as server:
        assert 200 == ask(system, get(server.url)).status
        assert "tls_refused" == failure(replaced, get(server.url)).reason
    system.close()
    replaced.close()


def expired(authority: Authority, _folder: Path) -> ssl.SSLContext:
    return authority.context("127.0.0.1", days=(-10, -1))


def future(authority: Authority, _folder: Path) -> ssl.SSLContext:
    return authority.context("127.0.0.1", days=(1, 10))


def wrong_host(authority: Authority, _folder: Path) -> ssl.SSLContext:
    return authority.context("idp.test", "127.0.0.2")


def unknown_authority(_authority: Authority, folder: Path) -> ssl.SSLContext:
    return Authority(folder, name="Other CA").context("127.0.0.1")


BAD_CERTIFICATES = {
    "FAULT-11-expired": (expired, "certificate has expired"),
    "FAULT-11-not-yet-valid": (future, "certificate is not yet valid"),
    "FAULT-11-wrong-host": (wrong_host, "IP address mismatch"),
    "FAULT-11-unknown-authority": (unknown_authority, "unable to get local issuer certificate"),
}


@pytest.mark.parametrize(("make", "words"), BAD_CERTIFICATES.values(), ids=BAD_CERTIFICATES.keys())
def test_a_bad_certificate_is_an_outage_and_nothing_is_sent(
    kind: type[AnySender],
    authority: Authority,
    tmp_path: Path,
    make: Callable[[Authority, Path], ssl.SSLContext],
    words: str,
) -> None:
    sender = kind(ca_file=str(authority.file))
    with Server(serve(), tls=make(authority, tmp_path)) as server:
        error = failure(sender, post(server.url))
    sender.close()

    assert (503, "tls_refused", []) == (error.status, error.reason, server.requests)
    assert words in str(error.facts["tls"])


@pytest.mark.parametrize("make", [pair[0] for pair in BAD_CERTIFICATES.values()], ids=BAD_CERTIFICATES.keys())
def test_key_08_certificates_are_accepted_unseen_only_where_that_is_asked_for(
    kind: type[AnySender],
    authority: Authority,
    tmp_path: Path,
    make: Callable[[Authority, Path], ssl.SSLContext],
) -> None:
    sender = kind(verify=False)
    with Server(serve(), tls=make(authority, tmp_path)) as server, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 200 == ask(sender, get(server.url)).status
    sender.close()


def test_exc_30_no_connection_is_shared_between_settings(
    kind: type[AnySender], authority: Authority, tmp_path: Path
) -> None:
    careless, careful = kind(verify=False), kind(ca_file=str(authority.file))
    with Server(serve(), tls=unknown_authority(authority, tmp_path)) as server:
        assert 200 == ask(careless, get(server.url)).status
        assert "tls_refused" == failure(careful, get(server.url)).reason
        assert 200 == ask(careless, get(server.url)).status
        assert 2 == len(server.requests)
    careless.close()
    careful.close()


def test_a_name_in_the_map_is_still_verified(kind: type[AnySender], authority: Authority) -> None:
    with Server(serve(), tls=authority.context("127.0.0.1")) as server:
        sender = kind(ca_file=str(authority.file), resolve={"idp.test:443": ("127.0.0.1", server.port)})
        error = failure(sender, get("https://idp.test/"))
        sender.close()

    assert ("tls_refused", []) == (error.reason, server.requests)


def test_fault_12_plain_http_on_the_port(sender: AnySender) -> None:
    with Server(sending(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as server:
        error = failure(sender, get(f"https://127.0.0.1:{server.port}/"))

    assert error.reason in {"tls_refused", "connection_broken"}
    assert 503 == error.status


def test_fault_12_a_reset_in_the_handshake(sender: AnySender) -> None:
    def script(peer: Peer) -> None:
        peer.sock.recv(1)
        peer.reset()

    with Server(script) as server:
        error = failure(sender, get(f"https://127.0.0.1:{server.port}/"))

        assert (503, 1) == (error.status, server.connections)


def test_fault_11_an_old_protocol_is_refused(kind: type[AnySender], authority: Authority) -> None:
    context = authority.context("127.0.0.1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    sender = kind(ca_file=str(authority.file))
    with Server(serve(), tls=context) as server:
        error = failure(sender, get(server.url))
    sender.close()

    assert (503, []) == (error.status, server.requests)


def test_a_certificate_file_that_cannot_be_read_is_told_at_once(
    kind: type[AnySender], tmp_path: Path
) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    for path in (tmp_path / "absent.pem", empty):
        with pytest.raises(OSError):
            kind(ca_file=str(path))


# --- what is told ---------------------------------------------------------------------


def test_out_12_errors_hold_nothing_of_the_request(
    sender: AnySender, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(1)
    errors: list[TokenExchangeError] = []
    headers = {"Authorization": "Basic mark-header"}
    with Server(in_turn(Peer.read_request, sending(b"mark-answer\r\n"))) as broken:
        errors.append(failure(sender, post(broken.url + "/?mark-query", b"mark-body", **headers)))
    with Server(serve(), tls=authority.context("127.0.0.2")) as tls:
        errors.append(failure(sender, post(tls.url + "/?mark-query", b"mark-body", **headers)))
    errors.extend(
        (
            failure(sender, post(f"http://127.0.0.1:{closed_port()}/?mark-query", b"mark-body", **headers)),
            failure(sender, post("http://127.0.0.1:1/", b"x", Authorization="mark\r\nmark: mark")),
        )
    )

    for error in errors:
        assert "mark" not in f"{error!r} {error.args} {error.facts} {error.__dict__}"
        assert error.__context__ is None
    # urllib3 writes request lines at debug level, and the command keeps it above that.
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("kong")]
    assert "mark" not in " ".join(ours)


def test_a_refused_answer_is_not_the_networks_fault(sender: AnySender) -> None:
    with Server(serve(b"x" * 100)) as server:
        assert NonConformingResponseError is type(failure(sender, get(server.url), max_body=10))


def test_descriptors_are_given_back(kind: type[AnySender]) -> None:
    def open_descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc to count descriptors in")
    sender = kind()
    with Server(in_turn(Peer.read_request, Peer.reset)) as server:
        for _ in range(3):
            failure(sender, get(server.url))
        before = open_descriptors()
        for _ in range(20):
            failure(sender, get(server.url))
        assert open_descriptors() <= before + 3
    sender.close()

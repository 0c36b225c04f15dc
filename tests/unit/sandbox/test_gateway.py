"""The gateway as a proxy: what nginx and Kong do around the plugin."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from kong_token_exchange.pluginserver import wire
from kong_token_exchange.sandbox import http1
from kong_token_exchange.sandbox.proxying import SERVER_NAME
from tests.unit.sandbox.scripted import TIMEOUT_S, HttpClient, declarative, get


def swap_token(event) -> None:
    event.ask("kong.service.request.set_header", wire.encode_kv("authorization", "Bearer NEW"))


def values(headers: list[tuple[str, str]], name: str) -> list[str]:
    return http1.every(headers, name)


@contextlib.contextmanager
def raw_upstream(serve: Callable[[HttpClient], None]) -> Iterator[tuple[str, int]]:
    """An upstream that does exactly what *serve* says on each of its connections."""
    errors: list[BaseException] = []
    threads: list[threading.Thread] = []
    sockets: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run(accepted: socket.socket) -> None:
            side = HttpClient.__new__(HttpClient)
            side.socket, side.buffer = accepted, bytearray()
            accepted.settimeout(TIMEOUT_S)
            with accepted:
                try:
                    serve(side)
                except ConnectionError:
                    pass
                except BaseException as error:  # noqa: BLE001 - shown below
                    errors.append(error)

        def accept() -> None:
            while True:
                try:
                    accepted, _ = listener.accept()
                except OSError:
                    return
                sockets.append(accepted)
                threads.append(threading.Thread(target=run, args=(accepted,), daemon=True))
                threads[-1].start()

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        try:
            yield listener.getsockname()
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join(TIMEOUT_S)
            for accepted in sockets:
                # Idle connections of the gateway's would keep their threads waiting.
                with contextlib.suppress(OSError):
                    accepted.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(TIMEOUT_S)
    if errors:
        raise errors[0]


def read_head(side: HttpClient) -> http1.RequestHead | None:
    while (end := http1.find_head_end(side.buffer)) < 0:
        if not side.fill():
            return None
    head = http1.parse_request_head(bytes(side.buffer[:end]))
    del side.buffer[:end]
    return head


# --- headers on their way -------------------------------------------------------------


def test_upstream_gets_the_headers_that_kong_adds(bench):
    gateway = bench()
    answer = get(
        gateway.url, "/a/b?c", "X-Forwarded-For: 10.1.1.1", "X-Forwarded-Proto: https", "Via: 1.0 before"
    )
    headers = dict(bench.received())

    assert headers["X-Forwarded-For"] == "10.1.1.1, 127.0.0.1"
    assert headers["X-Forwarded-Proto"] == "http"
    assert headers["X-Forwarded-Host"] == "api.example"
    assert headers["X-Forwarded-Port"] == gateway.url.rpartition(":")[2]
    assert headers["X-Forwarded-Path"] == "/a/b"
    assert headers["X-Real-IP"] == "127.0.0.1"
    assert headers["Via"] == f"1.0 before, 1.1 {SERVER_NAME}"
    assert headers["Host"] == "127.0.0.1:1"
    assert headers["X-Kong-Request-Id"] == answer["x-kong-request-id"]
    assert "X-Forwarded-Prefix" not in headers


def test_answer_gets_the_headers_that_kong_adds(bench):
    answer = get(bench().url)

    assert answer["via"] == f"1.1 {SERVER_NAME}"
    assert answer["server"] == SERVER_NAME
    assert answer["x-kong-upstream-latency"].isdigit()
    assert answer["x-kong-proxy-latency"].isdigit()
    assert len(answer["x-kong-request-id"]) == 32


def test_stripped_prefix_is_told_and_the_host_is_kept_where_the_route_says_so(bench):
    config = declarative()
    config["services"][0]["routes"][0].update(strip_path=True, preserve_host=True)
    get(bench(config=config).url, "/a/b")
    headers = dict(bench.received())

    assert (headers["X-Forwarded-Prefix"], headers["Host"]) == ("/a", "api.example")
    assert bench.upstream.log.last().target == "/b"


@pytest.mark.parametrize("target", ["/a", "/a?", "/a?b=1", "/a?b=1?", "/a/./b//c"])
def test_query_and_its_question_mark_are_kept(bench, target):
    get(bench().url, target)

    assert bench.upstream.log.last().target == target.replace("/a/./b//c", "/a/b/c")


def test_query_that_a_plugin_sets_replaces_the_clients(bench):
    def access(event):
        event.ask("kong.service.request.set_raw_query", wire.encode_string("c=2"))

    get(bench(access).url, "/a?b=1")

    assert bench.upstream.log.last().target == "/a?c=2"


def test_client_cannot_choose_what_the_gateway_says_of_it(bench):
    get(bench().url, "/a", "X-Real-IP: 6.6.6.6", "X-Kong-Request-Id: mine", "X-Forwarded-Prefix: /evil")

    headers = bench.received()
    assert values(headers, "x-real-ip") == ["127.0.0.1"]
    assert values(headers, "x-kong-request-id") != ["mine"]
    assert values(headers, "x-forwarded-prefix") == []


@pytest.mark.parametrize(
    ("connection", "left"),
    [
        ("keep-alive", ["Bearer NEW"]),
        ("authorization", []),
        ("X, Authorization , y", []),
        ("x-authorization", ["Bearer NEW"]),
        ("Upgrade", ["Bearer NEW"]),
    ],
)
def test_header_named_in_connection_is_removed_after_the_plugin_set_it(bench, connection, left):
    gateway = bench(swap_token)
    get(gateway.url, "/a", "Authorization: Bearer OLD", f"Connection: {connection}")

    assert values(bench.received(), "authorization") == left


def test_plugin_cannot_undo_the_connection_header_that_the_client_sent(bench):
    def access(event):
        event.ask("kong.service.request.clear_header", wire.encode_string("connection"))
        swap_token(event)

    get(bench(access).url, "/a", "Connection: authorization")

    assert values(bench.received(), "authorization") == []


def test_headers_of_one_connection_are_not_passed_on(bench):
    get(
        bench().url,
        "/a",
        "Keep-Alive: 5",
        "Proxy: x",
        "Proxy-Connection: y",
        "TE: gzip",
        "Upgrade: h2c",
        "X-Stays: 1",
    )

    names = {name.lower() for name, _ in bench.received()}
    assert not names & {"keep-alive", "proxy", "proxy-connection", "te", "upgrade"}
    assert "x-stays" in names


def test_te_trailers_is_passed_on(bench):
    get(bench().url, "/a", "TE: gzip, trailers")

    assert values(bench.received(), "te") == ["trailers"]


def test_header_bytes_that_are_not_utf8_reach_plugin_and_upstream_unchanged(bench):
    seen = []

    def access(event):
        seen.append(event.ask("kong.request.get_header", wire.encode_string("x-raw")))

    get(bench(access).url, "/a", "X-Raw: \udcff\udcfe")

    assert seen == [b"\x0a\x02\xff\xfe"]
    assert values(bench.received(), "x-raw") == ["\udcff\udcfe"]


def test_response_headers_of_one_connection_are_removed_and_a_plugins_added(bench):
    def serve(side):
        read_head(side)
        side.send(
            b"HTTP/1.1 200 Fine\r\nContent-Length: 2\r\nConnection: X-Hop, keep-alive\r\nX-Hop: 1\r\n"
            b"Keep-Alive: timeout=5\r\nX-Stays: 1\r\nServer: theirs\r\nVia: 1.1 inner\r\n\r\nok"
        )

    def access(event):
        event.ask("kong.response.set_header", wire.encode_kv("x-plugin", "p"))

    with raw_upstream(serve) as address:
        answer = get(bench(access, resolve={"127.0.0.1:1": address}).url)

    assert (answer.head.reason, answer.body, answer["x-stays"], answer["x-plugin"]) == (
        "Fine",
        b"ok",
        "1",
        "p",
    )
    assert (answer["x-hop"], answer["keep-alive"], answer["server"]) == (None, None, "theirs")
    assert answer["via"] == f"1.1 inner, 1.1 {SERVER_NAME}"


# --- what never gets as far as a plugin -----------------------------------------------


@pytest.mark.parametrize(
    ("lines", "status", "message"),
    [
        (("Authorization: Bearer a", "Authorization: Bearer a"), 400, b"Bad request"),
        ((f"Authorization: Bearer {'x' * 8192}",), 400, b"Request header or cookie too large"),
        (("Authorization : Bearer a",), 400, b"Bad request"),
        (("X: 1", "\tfolded"), 400, b"Bad request"),
        (("Transfer-Encoding: gzip",), 501, b"501 Not Implemented"),
    ],
    ids=["two-authorizations", "long-line", "blank-before-colon", "folded", "coding"],
)
def test_request_that_nginx_refuses_never_reaches_the_plugin(bench, lines, status, message):
    gateway = bench()
    with HttpClient(gateway.url) as client:
        answer = client.get("/a", *lines)
        assert client.closed()

    assert answer.status == status
    assert message in answer.body
    assert len(answer["x-kong-request-id"]) == 32
    assert bench.plugin.calls == []
    assert bench.upstream.hits == 0


def test_token_of_just_under_8_kb_is_let_in(bench):
    token = "x" * (8192 - len("Authorization: Bearer \r\n"))

    assert get(bench().url, "/a", f"Authorization: Bearer {token}").status == 200


def test_no_route_is_404_and_the_connection_stays(bench):
    with HttpClient(bench().url) as client:
        answer = client.get("/other")
        assert (answer.status, json.loads(answer.body)["message"]) == (
            404,
            "no Route matched with those values",
        )
        assert client.get("/a").status == 200


def test_route_without_a_service_is_503_after_the_plugin(bench):
    config = declarative()
    (route,) = config["services"].pop()["routes"]
    config["routes"] = [route]
    gateway = bench(config=config)
    answer = get(gateway.url)

    assert (answer.status, json.loads(answer.body)["message"]) == (503, "no Service found with those values")
    assert len(bench.plugin.of(wire.HandleEvent)) == 1


def test_error_has_the_format_that_the_client_accepts(bench):
    answer = get(bench().url, "/other", "Accept: text/html")

    assert answer["content-type"] == "text/html; charset=utf-8"
    assert b"<p>no Route matched with those values.</p>" in answer.body


def test_route_for_https_only_is_426(bench):
    config = declarative()
    config["services"][0]["routes"][0]["protocols"] = ["https"]
    gateway = bench(config=config)

    assert get(gateway.url).status == 426
    assert bench.plugin.calls == []


def test_route_without_the_plugin_is_proxied_without_asking_it(bench):
    config = declarative()
    config["services"][0]["routes"][0]["plugins"] = []

    assert get(bench(config=config).url).status == 200
    assert bench.plugin.calls == []


# --- connections and bodies -----------------------------------------------------------


def test_connection_is_kept_open_over_answers_of_both_kinds(bench):
    def access(event):
        if event.ask("kong.request.get_header", wire.encode_string("x-refuse")):
            event.exit(401, b"no")

    with HttpClient(bench(access).url) as client:
        found = [client.get("/a", *lines).status for lines in ((), ("X-Refuse: 1",), (), ("X-Refuse: 1",))]
        assert client.get("/a", "Connection: close")["connection"] == "close"
        assert client.closed()

    assert found == [200, 401, 200, 401]


def test_pipelined_requests_are_answered_in_order_each_with_its_own_plugin_run(bench):
    def access(event):
        if not event.ask("kong.request.get_header", wire.encode_string("authorization")):
            event.exit(401)

    with HttpClient(bench(access).url) as client:
        with_token = b"GET /a?1 HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer a\r\n\r\n"
        post = b"POST /a?2 HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer a\r\nContent-Length: 4\r\n\r\nbody"
        client.send(with_token + post + b"GET /a?3 HTTP/1.1\r\nHost: h\r\n\r\n" + with_token)
        answers = [client.answer() for _ in range(4)]

    assert [answer.status for answer in answers] == [200, 200, 401, 200]
    assert [json.loads(answers[n].body)["query"] for n in (0, 1, 3)] == ["1", "2", "1"]
    assert json.loads(answers[1].body)["body_length"] == 4


@pytest.mark.parametrize("chunked", [False, True], ids=["content-length", "chunked"])
def test_request_body_is_streamed(bench, chunked):
    """The upstream has read the first half before the client sends the second."""
    half_read, total = threading.Event(), []

    def serve(side):
        head = read_head(side)
        decoder = http1.BodyDecoder(content_length=head.content_length, chunked=head.chunked)
        assert head.chunked is chunked
        body = side.part(decoder)
        half_read.set()
        while part := side.part(decoder):
            body += part
        total.append(body)
        side.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with raw_upstream(serve) as address, HttpClient(bench(resolve={"127.0.0.1:1": address}).url) as client:
        framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 10"
        client.send(b"POST /a HTTP/1.1\r\nHost: h\r\n" + framing + b"\r\n\r\n")
        client.send(http1.render_chunk(b"first") if chunked else b"first")
        assert half_read.wait(TIMEOUT_S)
        client.send(http1.render_chunk(b"other") + http1.LAST_CHUNK if chunked else b"other")
        assert client.answer().status == 200

    assert total == [b"firstother"]


@pytest.mark.parametrize("framing", ["chunked", "content-length", "until-eof"])
def test_response_body_is_streamed(bench, framing):
    """The client has read the first half before the upstream sends the second."""
    half_read = threading.Event()
    heads = {"chunked": b"Transfer-Encoding: chunked\r\n", "content-length": b"Content-Length: 10\r\n"}

    def serve(side):
        if read_head(side) is None:
            return
        side.send(b"HTTP/1.1 200 OK\r\n" + heads.get(framing, b"") + b"\r\n")
        chunk = http1.render_chunk if framing == "chunked" else bytes
        side.send(chunk(b"first"))
        assert half_read.wait(TIMEOUT_S)
        side.send(chunk(b"other") + (http1.LAST_CHUNK if framing == "chunked" else b""))

    with raw_upstream(serve) as address, HttpClient(bench(resolve={"127.0.0.1:1": address}).url) as client:
        client.send(b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n")
        head = client.head()
        decoder = http1.BodyDecoder(content_length=head.content_length, chunked=head.chunked)
        body = client.part(decoder)
        half_read.set()
        while part := client.part(decoder):
            body += part

    assert body == b"firstother"
    assert head.chunked is (framing != "content-length")


def test_large_bodies_go_through_both_ways_and_the_connection_stays(bench):
    size = 3 * 1024 * 1024

    def serve(side):
        while (head := read_head(side)) is not None:
            decoder = http1.BodyDecoder(content_length=head.content_length, chunked=head.chunked)
            received = 0
            while part := side.part(decoder):
                received += len(part)
            side.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % received + b"y" * received)

    with raw_upstream(serve) as address, HttpClient(bench(resolve={"127.0.0.1:1": address}).url) as client:
        for _ in range(2):
            with ThreadPoolExecutor(1) as sender:
                head = f"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: {size}\r\n\r\n".encode()
                sending = sender.submit(client.send, head + b"x" * size)
                assert len(client.answer().body) == size
                sending.result(TIMEOUT_S)


def test_head_and_204_and_304_have_no_body(bench):
    def serve(side):
        while (head := read_head(side)) is not None:
            status = head.target.rpartition("/")[2]
            length = b"" if status == "204" else b"Content-Length: 5\r\n"
            side.send(b"HTTP/1.1 " + status.encode() + b" X\r\n" + length + b"\r\n")

    with raw_upstream(serve) as address, HttpClient(bench(resolve={"127.0.0.1:1": address}).url) as client:
        for method, status in (("HEAD", 200), ("GET", 204), ("GET", 304), ("HEAD", 404)):
            client.send(f"{method} /a/{status} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            answer = client.answer(method)
            assert (answer.status, answer.body) == (status, b"")
            assert answer["content-length"] == (None if status == 204 else "5")


def test_continue_is_asked_for_only_after_the_plugin_has_decided(bench):
    def access(event):
        if event.ask("kong.request.get_header", wire.encode_string("x-refuse")):
            event.exit(413)

    post = b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nExpect: 100-continue\r\n"
    gateway = bench(access)
    with HttpClient(gateway.url) as client:
        client.send(post + b"\r\n")
        assert client.head().status == 100
        client.send(b"body")
        assert json.loads(client.answer().body)["body_length"] == 4
        assert values(bench.received(), "expect") == []
    with HttpClient(gateway.url) as client:
        client.send(post + b"X-Refuse: 1\r\n\r\n")
        assert client.answer().status == 413
        assert client.closed()


def test_body_method_path_and_host_that_a_plugin_sets_go_upstream(bench):
    def access(event):
        event.ask("kong.service.request.set_raw_body", wire.encode_string("replaced"))
        event.ask("kong.service.request.set_method", wire.encode_string("PUT"))
        event.ask("kong.service.request.set_path", wire.encode_string("/other"))
        event.ask("kong.service.request.set_header", wire.encode_kv("host", "inner.example"))

    with HttpClient(bench(access).url) as client:
        client.send(b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nbody")
        shown = json.loads(client.answer().body)

    assert (shown["method"], shown["path"], shown["body_length"]) == ("PUT", "/other", 8)
    assert ["Host", "inner.example"] in shown["headers"]


def test_body_that_a_plugin_has_read_still_goes_upstream(bench):
    seen = []

    def access(event):
        seen.append(dict(wire.read_fields(event.ask("kong.request.get_raw_body")))[1])

    with HttpClient(bench(access).url) as client:
        client.send(
            b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n"
        )
        echoed = json.loads(client.answer().body)
        assert client.get().status == 200

    assert seen == [b"body", b""]
    assert echoed["body_length"] == 4
    assert ["Content-Length", "4"] in echoed["headers"]


def test_long_body_is_handed_to_the_plugin_as_a_file_that_is_gone_afterwards(bench):
    found = []

    def access(event):
        path = dict(wire.read_fields(event.ask("kong.request.get_raw_body")))[2].decode()
        with open(path, "rb") as file:  # noqa: PTH123
            found.append((path, file.read()))

    body = b"z" * 20_000
    with HttpClient(bench(access).url) as client:
        client.send(b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 20000\r\n\r\n" + body)
        assert client.answer().status == 200
        client.get("/none")  # the earlier request is over for certain

    (path, content) = found[0]
    assert content == body
    with pytest.raises(FileNotFoundError):
        open(path)  # noqa: PTH123, SIM115


def test_unread_body_after_a_refusal_is_never_taken_for_a_request(bench):
    smuggled = b"GET /a?smuggled HTTP/1.1\r\nHost: h\r\n\r\n"
    gateway = bench(lambda event: event.exit(401))
    with HttpClient(gateway.url) as client:
        client.send(b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 4000\r\n\r\n" + smuggled)
        assert client.answer().status == 401
        assert client.closed()

    assert len(bench.plugin.of(wire.HandleEvent)) == 1


def test_malformed_chunks_are_400_and_the_upstream_connection_is_not_used_again(bench):
    gateway = bench()
    with HttpClient(gateway.url) as client:
        client.send(b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
        assert client.answer().status == 400
        assert client.closed()

    assert bench.upstream.hits == 0
    assert get(gateway.url).status == 200


def test_client_that_leaves_in_the_middle_of_its_body_takes_nobody_along(bench):
    gateway = bench()
    with HttpClient(gateway.url) as client:
        client.send(b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\nhalf")
    assert get(gateway.url).status == 200
    assert bench.upstream.hits == 1


def test_answer_that_comes_before_the_body_is_sent_reaches_the_client(bench):
    def serve(side):
        read_head(side)
        side.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        side.fill()

    with raw_upstream(serve) as address, HttpClient(bench(resolve={"127.0.0.1:1": address}).url) as client:
        client.send(b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\nstart")
        answer = client.answer()
        assert (answer.status, answer.body) == (413, b"no")
        assert client.closed()


# --- upstreams that fail --------------------------------------------------------------


def test_upstream_that_is_not_there_is_502(bench):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    answer = get(bench(resolve={"127.0.0.1:1": address}).url)

    assert answer.status == 502
    assert answer.body.startswith(b"An invalid response was received from the upstream server\n")


@pytest.mark.parametrize(
    "said", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-"], ids=["eof", "junk", "cut"]
)
def test_upstream_that_does_not_speak_http_is_502(bench, said):
    def serve(side):
        read_head(side)
        side.send(said)

    with raw_upstream(serve) as address:
        assert get(bench(resolve={"127.0.0.1:1": address}).url).status == 502


def test_upstream_that_is_silent_is_504(bench):
    release = threading.Event()

    def serve(side):
        read_head(side)
        release.wait(TIMEOUT_S)

    with raw_upstream(serve) as address:
        answer = get(bench(config=declarative(read_timeout=100), resolve={"127.0.0.1:1": address}).url)
        release.set()

    assert answer.status == 504


def test_answer_that_breaks_off_breaks_the_clients_connection(bench):
    def serve(side):
        read_head(side)
        side.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")

    with raw_upstream(serve) as address, HttpClient(bench(resolve={"127.0.0.1:1": address}).url) as client:
        client.send(b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n")
        assert client.answer().body == b"half"
        assert client.closed()


def test_upstream_connections_are_used_again_and_a_stale_one_is_replaced(bench):
    connections = []

    def serve(side):
        connections.append(side)
        while read_head(side) is not None:
            side.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            if len(connections) == 1 and len(served) == 1:
                return
            served.append(1)

    served: list[int] = []
    with raw_upstream(serve) as address:
        gateway = bench(resolve={"127.0.0.1:1": address})
        with HttpClient(gateway.url) as client:
            assert [client.get().status for _ in range(4)] == [200] * 4
        gateway.stop()

    assert len(connections) == 2


def test_upstream_that_closes_a_used_connection_instead_of_answering_is_asked_once_more(bench):
    connections = []

    def serve(side):
        connections.append(side)
        while read_head(side) is not None:
            if len(connections) == 1 and len(answered) == 1:
                return
            side.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            answered.append(1)

    answered: list[int] = []
    with raw_upstream(serve) as address:
        gateway = bench(resolve={"127.0.0.1:1": address})
        assert [get(gateway.url).status for _ in range(3)] == [200] * 3
        gateway.stop()

    assert len(connections) == 2
    assert len(bench.plugin.of(wire.HandleEvent)) == 3


def test_request_with_a_body_is_never_sent_twice(bench):
    received = []

    def serve(side):
        while (head := read_head(side)) is not None:
            received.append(head.target)
            if head.method == "POST":
                return
            side.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with raw_upstream(serve) as address, HttpClient(bench(resolve={"127.0.0.1:1": address}).url) as client:
        assert client.get("/a").status == 200
        client.send(b"POST /a/once HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nbody")
        assert client.answer().status == 502

    assert received == ["/a", "/a/once"]


def test_upstream_connection_with_half_a_request_on_it_is_not_used_again(bench):
    connections = []

    def serve(side):
        connections.append(side)
        while read_head(side) is not None:
            side.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with raw_upstream(serve) as address:
        gateway = bench(resolve={"127.0.0.1:1": address})
        with HttpClient(gateway.url) as client:
            client.send(b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\nhalf")
            assert client.answer().status == 200
        assert get(gateway.url).status == 200
        gateway.stop()

    assert len(connections) == 2


# --- load -----------------------------------------------------------------------------


def test_many_clients_at_once_each_get_their_own_answer(bench):
    def access(event):
        name = wire.decode_string(event.ask("kong.request.get_header", wire.encode_string("x-name")))
        event.ask("kong.service.request.set_header", wire.encode_kv("authorization", f"Bearer {name}"))

    gateway = bench(access)

    def run(number: int) -> list[str]:
        found = []
        with HttpClient(gateway.url) as client:
            for turn in range(20):
                headers = json.loads(client.get("/a", f"X-Name: {number}-{turn}").body)["headers"]
                found += [value for name, value in headers if name.lower() == "authorization"]
        return found

    with ThreadPoolExecutor(10) as threads:
        for number, found in enumerate(threads.map(run, range(10))):
            assert found == [f"Bearer {number}-{turn}" for turn in range(20)]


def test_reload_under_load_gives_no_request_half_a_configuration(bench):
    gateway = bench()
    stop = threading.Event()

    def run() -> set[int]:
        seen = set()
        with HttpClient(gateway.url) as client:
            while not stop.is_set():
                seen.add(client.get().status)
        return seen

    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(run) for _ in range(4)]
        try:
            for turn in range(20):
                # More starts than this there may be: a request that began before a reload brings the
                # earlier configuration once more, as in Kong.
                bench.plugin.wait_for(lambda least=turn: len(bench.plugin.of(wire.StartInstance)) > least)
                gateway.reload(declarative())
        finally:
            stop.set()
        assert set().union(*(item.result(TIMEOUT_S) for item in running)) == {200}

    started, closed = bench.plugin.of(wire.StartInstance), bench.plugin.of(wire.CloseInstance)
    # Every instance but the one in use was closed, each once.
    assert len(started) >= 20
    assert len({call.instance_id for call in closed}) == len(closed) == len(started) - 1

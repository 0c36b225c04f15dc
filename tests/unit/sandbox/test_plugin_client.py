"""What the gateway does on the plugin's socket, beyond what was recorded of Kong."""

import signal
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kong_token_exchange.pluginserver import wire
from kong_token_exchange.sandbox import plugin_client
from kong_token_exchange.sandbox.gateway import SandboxGateway
from tests.support.running import eventually
from tests.unit.sandbox.scripted import DESCRIPTION, TIMEOUT_S, HttpClient, ScriptedPlugin, declarative, get


def statuses(url: str, count: int) -> list[int]:
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda _: get(url).status, range(count)))


def logged(gateway: SandboxGateway, text: str) -> bool:
    return any(text in line for line in list(gateway.log_lines))


# --- connections ----------------------------------------------------------------------


def test_one_connection_serves_one_request_after_the_other(bench):
    gateway = bench()
    assert [get(gateway.url).status for _ in range(5)] == [200] * 5

    assert {number for number, _ in bench.plugin.calls} == {1}
    assert len(bench.plugin.of(wire.HandleEvent)) == 5


def test_parallel_events_have_a_connection_each_and_the_pool_is_last_in_first_out(bench):
    together = threading.Barrier(3)

    def access(event):
        together.wait(TIMEOUT_S)

    gateway = bench()
    get(gateway.url)
    bench.plugin.access = access
    assert statuses(gateway.url, 3) == [200] * 3
    assert gateway._core.client.pool.opened == 3

    bench.plugin.access = lambda event: None
    before = len(bench.plugin.calls)
    for _ in range(3):
        get(gateway.url)
    # First in, first out would go round all three.
    assert len({number for number, _ in bench.plugin.calls[before:]}) == 1
    assert gateway._core.client.pool.idle == 3


def test_connections_above_the_pools_size_are_closed_after_use(bench):
    together = threading.Barrier(3)
    gateway = bench(lambda event: None)
    get(gateway.url)
    gateway._core.client.pool._size = 2
    bench.plugin.access = lambda event: together.wait(TIMEOUT_S) and None
    assert statuses(gateway.url, 3) == [200] * 3

    bench.plugin.wait_for(lambda: len(bench.plugin.left) == 1)
    assert gateway._core.client.pool.idle == 2


def test_connection_with_something_unread_is_not_used_again(bench):
    def access(event):
        event.end()
        event.side.write(b"unasked")

    gateway = bench(access)
    assert get(gateway.url).status == 200
    bench.plugin.wait_for(lambda: bench.plugin.left == [1])
    bench.plugin.access = lambda event: None

    assert get(gateway.url).status == 200
    assert gateway._core.client.pool.opened == 2


def test_a_pooled_connection_is_closed_by_whatever_arrives_on_it(bench):
    sides = []

    def access(event):
        sides.append(event.side)
        event.end()

    gateway = bench(access)
    assert get(gateway.url).status == 200
    pool = gateway._core.client.pool
    assert eventually(lambda: pool.idle == 1)

    sides[0].write(b"unasked")

    bench.plugin.wait_for(lambda: bench.plugin.left == [1])
    assert get(gateway.url).status == 200
    assert pool.opened == 2


def test_connection_that_idled_too_long_is_not_used_again(bench, monkeypatch):
    gateway = bench()
    get(gateway.url)
    monkeypatch.setattr(plugin_client, "_IDLE_S", -1.0)

    assert get(gateway.url).status == 200
    assert gateway._core.client.pool.opened == 2


# --- ends of events -------------------------------------------------------------------


def test_exit_is_answered_while_the_connection_is_given_up(bench):
    gateway = bench(lambda event: event.exit(403, b"no", {"X-Reason": "policy"}))
    answer = get(gateway.url)

    assert (answer.status, answer.body, answer["x-reason"]) == (403, b"no", "policy")
    bench.plugin.wait_for(lambda: bench.plugin.left == [1])
    assert bench.upstream.hits == 0


def test_what_a_plugin_sends_after_exit_is_not_read(bench):
    def access(event):
        event.side.write(
            b"kong.response.exit",
            wire.encode_exit(401),
            b"kong.service.request.set_header",
            wire.encode_kv("authorization", "Bearer LATE"),
            b"",
            wire.encode_return(event.call.sequence),
        )
        event.ended = True

    gateway = bench(access)

    assert get(gateway.url).status == 401
    assert bench.upstream.hits == 0


def test_pipelined_calls_take_effect_and_their_late_replies_do_no_harm(bench):
    def access(event):
        pairs = [(b"kong.service.request.set_header", wire.encode_kv(f"x-{n}", str(n))) for n in range(3)]
        event.side.write(
            *(part for pair in pairs for part in pair), b"", wire.encode_return(event.call.sequence)
        )
        event.ended = True
        assert [event.side.read() for _ in range(3)] == [b""] * 3

    gateway = bench(access)
    for _ in range(3):
        assert get(gateway.url).status == 200
        assert [value for name, value in bench.received() if name.startswith("x-") and len(name) == 3] == [
            "0",
            "1",
            "2",
        ]
    assert gateway._core.client.pool.opened == 1


def test_frames_in_single_bytes_are_understood(bench):
    def access(event):
        for byte in wire.frame(b"kong.request.get_header") + wire.frame(wire.encode_string("authorization")):
            event.side._socket.sendall(bytes([byte]))
        assert wire.decode_string(event.side.read()) == "Bearer a"

    assert get(bench(access).url, "/a", "Authorization: Bearer a").status == 200


@pytest.mark.parametrize(
    "say",
    [
        lambda event: event.ask("kong.nope.nope"),
        lambda event: event.ask("kong.request.get_headers", b""),
        lambda event: event.ask("kong.service.request.set_header", wire.encode_kv("x", False)),
        lambda event: event.ask("kong.request.get_header", b"\xff\xff"),
        lambda event: (
            event.side.write(b"", wire.encode_return(event.call.sequence + 1))
            or setattr(event, "ended", True)
        ),
        lambda event: event.side.write(b"", b"\xff") or setattr(event, "ended", True),
        lambda event: event.side.write(b"k" * 100, b"") or event.side.read(),
    ],
    ids=[
        "unknown-method",
        "bad-maximum",
        "false",
        "not-protobuf",
        "wrong-sequence",
        "no-return",
        "long-method",
    ],
)
def test_everything_the_plugin_gets_wrong_is_500_and_nothing_goes_upstream(bench, say):
    gateway = bench(say)
    answer = get(gateway.url)

    assert answer.status == 500
    assert b'"message":"An unexpected error occurred"' in answer.body
    assert answer["x-kong-request-id"].encode() in answer.body
    assert bench.upstream.hits == 0
    assert logged(gateway, "[err]")


def test_slow_plugin_is_500_after_the_read_timeout_and_the_next_request_has_a_new_connection(bench):
    release = threading.Event()
    gateway = bench(lambda event: release.wait(TIMEOUT_S) and None, read_timeout_s=0.2)
    assert get(gateway.url).status == 500
    assert logged(gateway, "pluginserver error: timeout")
    release.set()
    bench.plugin.wait_for(lambda: 1 in bench.plugin.left)

    assert get(gateway.url).status == 200
    assert bench.upstream.hits == 1


def test_closed_connection_repeats_the_event_with_a_started_instance(bench):
    def access(event):
        if len(bench.plugin.of(wire.HandleEvent)) <= 3:
            event.side.close()
            event.ended = True

    gateway = bench(access)

    assert get(gateway.url).status == 200
    kinds = [type(call).__name__ for _, call in bench.plugin.calls]
    assert kinds == ["StartInstance", "HandleEvent"] * 4
    assert bench.upstream.hits == 1


def test_repeats_end_where_kong_would_go_on(bench):
    def access(event):
        event.side.close()
        event.ended = True

    gateway = bench(access)

    assert get(gateway.url).status == 500
    assert len(bench.plugin.of(wire.HandleEvent)) == plugin_client.MAX_REPEATS + 1
    assert bench.upstream.hits == 0


def test_repeated_event_does_not_undo_what_the_first_try_changed(bench):
    def access(event):
        event.ask("kong.service.request.set_header", wire.encode_kv("x-try", "1"))
        if len(bench.plugin.of(wire.HandleEvent)) == 1:
            event.side.close()
            event.ended = True

    get(bench(access).url)

    assert ("x-try", "1") in bench.received()


# --- instances ------------------------------------------------------------------------


def test_instance_is_started_by_the_first_request_and_never_before(bench):
    gateway = bench()
    assert bench.plugin.calls == []
    get(gateway.url)
    get(gateway.url)

    (start,) = bench.plugin.of(wire.StartInstance)
    assert start.name == "token-exchange"
    assert wire.decode_config(start.config)["mark"] == "one"


def test_every_attached_configuration_has_its_own_instance(bench):
    config = declarative()
    second = {**config["services"][0]["routes"][0], "name": "b", "paths": ["/b"]}
    second["plugins"] = [{"name": "token-exchange", "config": {"mark": "two"}}]
    config["services"][0]["routes"].append(second)
    gateway = bench(config=config)
    for target in ("/a", "/b", "/a", "/b"):
        get(gateway.url, target)

    started = [wire.decode_config(call.config)["mark"] for call in bench.plugin.of(wire.StartInstance)]
    used = [call.instance_id for call in bench.plugin.of(wire.HandleEvent)]
    assert started == ["one", "two"]
    assert used == [701, 702, 701, 702]


def test_after_a_reload_the_same_id_may_be_started_and_then_closed(bench):
    def start(side, call):
        side.write(wire.encode_return(call.sequence, wire.InstanceStatus(call.name, 77)))

    gateway = bench(start=start)
    get(gateway.url)
    gateway.reload(declarative())
    get(gateway.url)

    told = [(type(call).__name__, getattr(call, "instance_id", None)) for _, call in bench.plugin.calls]
    assert told == [
        ("StartInstance", None),
        ("HandleEvent", 77),
        ("StartInstance", None),
        ("CloseInstance", 77),
        ("HandleEvent", 77),
    ]


def test_parallel_first_requests_start_one_instance(bench):
    started = threading.Event()

    def start(side, call):
        started.wait(TIMEOUT_S)
        side.write(wire.encode_return(call.sequence, wire.InstanceStatus(call.name, 9)))

    gateway = bench(start=start)
    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(get, gateway.url) for _ in range(4)]
        bench.plugin.wait_for(lambda: len(bench.plugin.of(wire.StartInstance)) == 1)
        started.set()
        assert [answer.result(TIMEOUT_S).status for answer in answers] == [200] * 4

    assert len(bench.plugin.of(wire.StartInstance)) == 1


def test_start_that_is_closed_is_500_without_a_loop(bench):
    gateway = bench(start=lambda side, call: side.close())

    assert get(gateway.url).status == 500
    assert len(bench.plugin.of(wire.StartInstance)) == 1
    assert logged(gateway, "starting instance: closed")
    assert get(gateway.url).status == 500
    assert len(bench.plugin.of(wire.StartInstance)) == 2


def test_start_answered_without_a_status_leaves_the_claim_so_that_others_wait_and_fail(bench, monkeypatch):
    monkeypatch.setattr(plugin_client, "_CLAIM_STEP_S", 0.001)
    gateway = bench(start=lambda side, call: side.write(wire.encode_return(call.sequence)))
    assert get(gateway.url).status == 500
    assert get(gateway.url).status == 500

    assert logged(gateway, "Could not claim instance_id for token-exchange")
    assert len(bench.plugin.of(wire.StartInstance)) == 1


def test_invalid_reload_keeps_the_configuration_in_force(bench):
    gateway = bench()
    with pytest.raises(ValueError, match="unknown field"):
        gateway.reload({"_format_version": "3.0", "nonsense": []})

    assert get(gateway.url).status == 200


# --- the server gone and back ---------------------------------------------------------


def test_without_a_server_requests_are_500_and_recover_with_it(bench):
    gateway = bench()
    assert get(gateway.url).status == 200
    bench.plugin.stop()
    pool = gateway._core.client.pool
    deadline = time.monotonic() + TIMEOUT_S
    while any(connection.reusable for connection in list(pool._idle)) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert get(gateway.url).status == 500
    assert logged(gateway, "trying to connect: connection refused")
    bench.plugin.listen()

    assert get(gateway.url).status == 200
    assert bench.upstream.hits == 2


# A plugin server in a process of its own that says its pid and lets everything through.
SERVER = textwrap.dedent(
    """
    import os, sys
    sys.path.insert(0, {root!r})
    from pathlib import Path
    import threading
    from tests.unit.sandbox.scripted import ScriptedPlugin
    print("serving as", os.getpid(), flush=True)
    ScriptedPlugin(Path({path!r})).listen()
    threading.Event().wait(60)
    """
)


@pytest.fixture
def managed(bench, tmp_path, pytestconfig):
    """A gateway that starts its plugin server itself."""
    program = SERVER.format(root=str(pytestconfig.rootpath), path=str(bench.path))
    gateway = SandboxGateway(
        declarative(),
        plugin_command=[sys.executable, "-c", program],
        description=DESCRIPTION,
        socket_path=bench.path,
        resolve={"127.0.0.1:1": bench.upstream.address},
        log=tmp_path / "error.log",
    )
    with gateway:
        yield gateway


def test_gateway_starts_the_server_logs_its_output_and_ends_it(managed, bench, tmp_path):
    pid = managed.plugin_pid
    assert pid is not None
    assert get(managed.url).status == 200
    managed.stop()

    assert managed.plugin_pid is None
    assert f"[token-exchange:{pid}] serving as {pid}" in (tmp_path / "error.log").read_text()


def test_killed_server_is_started_again_and_not_twice_within_a_second(managed, bench):
    get(managed.url)
    first, started = managed.plugin_pid, time.monotonic()
    managed.kill_plugin_server(signal.SIGKILL)
    seen = {get(managed.url).status}
    deadline = started + TIMEOUT_S
    while managed.plugin_starts < 2:
        seen.add(get(managed.url).status)
        assert time.monotonic() < deadline
    managed.wait_until_ready()

    assert managed.plugin_pid not in (None, first)
    first_start, second_start = managed._process.started
    assert second_start - first_start >= 0.99
    assert get(managed.url).status == 200
    assert seen <= {200, 500}
    assert bench.upstream.hits >= 2


def test_command_that_cannot_run_is_told_with_the_log(tmp_path):
    gateway = SandboxGateway(
        declarative(),
        plugin_command=["/no/such/command"],
        description=DESCRIPTION,
        socket_path=tmp_path / "s",
    )
    gateway._thread.start()
    gateway._process.start()
    with pytest.raises(RuntimeError, match="cannot start /no/such/command"):
        gateway.wait_until_ready(0.3)
    gateway.stop()


def test_query_command_that_fails_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="the query command failed"):
        SandboxGateway(
            declarative(),
            plugin_command=None,
            query_command=[sys.executable, "-c", "raise SystemExit('broken')"],
            socket_path=tmp_path / "s",
        )


def test_description_comes_from_the_query_command(tmp_path, bench):
    with ScriptedPlugin(bench.path):
        command = [sys.executable, "-c", f"import json; print(json.dumps({DESCRIPTION!r}))"]
        gateway = SandboxGateway(
            declarative(),
            plugin_command=None,
            query_command=command,
            socket_path=bench.path,
            resolve={"127.0.0.1:1": bench.upstream.address},
        )
        with gateway, HttpClient(gateway.url) as client:
            assert client.get().status == 200


def test_socket_path_that_no_socket_can_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match="107 bytes"):
        SandboxGateway(
            declarative(), plugin_command=None, description=DESCRIPTION, socket_path=tmp_path / ("x" * 120)
        )

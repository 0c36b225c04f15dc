"""
The server over a real socket: every way an event can end, and what must hold after it.
"""

import contextlib
import errno
import itertools
import os
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from kong_token_exchange.pluginserver import loop, wire
from kong_token_exchange.pluginserver.connection import Connection, Deliver, Limits, State
from kong_token_exchange.pluginserver.contract import Calls, Facts, Fetch, Outcome, exit_with, proceed
from kong_token_exchange.pluginserver.offload import EventOverError, Idle, Pool, Post
from kong_token_exchange.pluginserver.pdk import Kong
from tests.support.fake_kong import Done, FakeKong, KongSide, Step
from tests.support.plugins import AUTHORIZATION, Instance, Plugin
from tests.support.running import WAIT_S, Running, eventually

REPLACED = proceed(Calls().set_header("authorization", "Bearer NEW"))
REFUSED = exit_with(401, b"{}", {"WWW-Authenticate": "Bearer"})
NEW = ("kong.service.request.set_header", ("authorization", "Bearer NEW"))
HEADER = "kong.request.get_header"


class Scripted:
    """A plugin whose answers hang on the Authorization header."""

    def __init__(self) -> None:
        self.access: dict[str, Callable[[Kong], None]] = {}
        self.closed = threading.Event()

    def warm(self, facts: Facts) -> Outcome | None:
        match facts[0]:
            case "Bearer good":
                return REPLACED
            case "Bearer refused":
                return REFUSED
            case "Bearer broken":
                raise ValueError("MARKED-TOKEN")
        return None

    def run(self, kong: Kong) -> None:
        self.access[kong.request.get_header("authorization")](kong)

    def plugin(self) -> Plugin:
        return Plugin(warm=self.warm, access=self.run, close=self.closed.set)


@pytest.fixture
def script() -> Scripted:
    return Scripted()


@pytest.fixture
def server(script: Scripted, tmp_path: Path) -> Iterator[Running]:
    with Running(script.plugin(), tmp_path) as running:
        yield running


def ask(server: Running, instance_id: int, authorization: str, *steps: Step) -> Done:
    return server.kong.event(instance_id, Step(HEADER, "authorization", authorization), *steps)


def assert_serves(server: Running, instance_id: int) -> None:
    done = ask(server, instance_id, "Bearer good")

    assert ("success", [NEW]) == (done.ended, done.calls[1:])


def status_of(done: Done) -> int:
    assert "exit" == done.ended
    assert done.exit is not None
    return done.exit.status


# --- the common cases -----------------------------------------------------------------


def test_many_events_use_one_connection(server: Running) -> None:
    instance_id = server.kong.start({})
    for _ in range(50):
        assert_serves(server, instance_id)

    assert 1 == len(server.kong.pool)
    assert 1 == server.loop.stats().connections


def test_refusal_ends_the_event_and_kong_leaves(server: Running) -> None:
    instance_id = server.kong.start({})
    for _ in range(5):
        assert 401 == status_of(ask(server, instance_id, "Bearer refused"))
        assert_serves(server, instance_id)
    server.kong.__exit__()

    eventually(lambda: server.loop.stats().connections == 0)


def test_gw_07_cold_event_runs_in_the_pool_and_the_loop_goes_on(script: Scripted, server: Running) -> None:
    gate, entered = threading.Event(), threading.Event()

    def run(kong: Kong) -> None:
        entered.set()
        assert gate.wait(WAIT_S)
        kong.service.request.set_header("authorization", "Bearer NEW")

    script.access["Bearer cold"] = run
    instance_id = server.kong.start({})
    other = FakeKong(server.path)
    results: list[Done] = []
    thread = threading.Thread(
        target=lambda: results.append(other.event(instance_id, Step(HEADER, "authorization", "Bearer cold")))
    )
    thread.start()
    assert entered.wait(WAIT_S)
    for _ in range(20):
        assert_serves(server, instance_id)
    gate.set()
    thread.join(WAIT_S)
    other.__exit__()

    assert ("success", [NEW]) == (results[0].ended, results[0].calls[1:])


def test_calls_of_the_pool_are_answered_and_pipelined_answers_skipped(
    script: Scripted, server: Running
) -> None:
    got: list[Any] = []

    def run(kong: Kong) -> None:
        kong.ctx.shared.set("k", "v")
        got.append(kong.request.get_path())
        kong.log.notice("x")
        got.append(kong.client.get_consumer())
        kong.service.request.clear_header("x")

    script.access["Bearer cold"] = run
    instance_id = server.kong.start({})
    for _ in range(3):
        done = ask(
            server,
            instance_id,
            "Bearer cold",
            Step("kong.request.get_path", reply="/a"),
            Step("kong.client.get_consumer", reply={"id": "1"}),
        )
        assert "success" == done.ended
        assert_serves(server, instance_id)

    assert ["/a", {"id": "1"}] * 3 == got
    assert 1 == len(server.kong.pool)


def test_unknown_instance_is_closed_cleanly_and_started_again(server: Running) -> None:
    instance_id = server.kong.start({})
    stale = instance_id ^ 0x55

    assert "closed" == ask(server, stale, "Bearer good").ended
    assert instance_id == server.kong.start({}, seq=9)
    assert_serves(server, instance_id)


def test_start_then_close_of_the_same_id_keeps_serving(server: Running) -> None:
    old = server.kong.start({}, seq=2)
    new = server.kong.start({}, seq=3)
    server.kong.close(old)

    assert old == new
    assert_serves(server, new)


def test_closed_instance_is_let_go_of_after_its_grace(script: Scripted, tmp_path: Path) -> None:
    with Running(script.plugin(), tmp_path, grace_s=0.0) as server:
        instance_id = server.kong.start({})
        server.kong.close(instance_id)

        assert script.closed.wait(WAIT_S)
        eventually(lambda: ask(server, instance_id, "Bearer good").ended == "closed")


# --- faults ---------------------------------------------------------------------------


def test_exception_in_warm_is_500_and_the_next_request_is_normal(server: Running) -> None:
    instance_id = server.kong.start({})
    for _ in range(3):
        assert 500 == status_of(ask(server, instance_id, "Bearer broken"))
        assert_serves(server, instance_id)

    assert "MARKED-TOKEN" not in server.lines
    assert 1 == len([line for line in server.lines.lines if "warm failed" in line])


def recurse(kong: Kong) -> None:
    recurse(kong)


def raiser(error: BaseException) -> Callable[[Kong], None]:
    def run(kong: Kong) -> None:
        kong.service.request.set_header("authorization", "Bearer NEW")
        raise error

    return run


@pytest.mark.parametrize(
    "run",
    [
        raiser(ValueError("x")),
        raiser(SystemExit(0)),
        raiser(KeyboardInterrupt()),
        raiser(MemoryError()),
        raiser(GeneratorExit()),
        recurse,
    ],
    ids=["ValueError", "SystemExit", "KeyboardInterrupt", "MemoryError", "GeneratorExit", "RecursionError"],
)
def test_gw_02_whatever_access_raises_is_500_and_nothing_of_it_goes_upstream(
    script: Scripted, server: Running, run: Callable[[Kong], None]
) -> None:
    script.access["Bearer cold"] = run
    instance_id = server.kong.start({})
    for _ in range(3):
        done = ask(server, instance_id, "Bearer cold")
        assert 500 == status_of(done)
        assert [] == done["kong.service.request.set_header"]
        assert_serves(server, instance_id)


STEPS: list[Callable[[Kong], Any]] = [
    lambda kong: kong.request.get_path(),
    lambda kong: kong.log.notice("x"),
    lambda kong: kong.client.get_forwarded_ip(),
    lambda kong: kong.service.request.set_header("authorization", "Bearer NEW"),
    lambda kong: kong.router.get_route(),
]


@pytest.mark.parametrize("before", range(len(STEPS) + 1))
def test_exception_between_any_two_calls_is_500(script: Scripted, server: Running, before: int) -> None:
    def run(kong: Kong) -> None:
        for number, step in enumerate(STEPS):
            if number == before:
                raise ValueError
            step(kong)
        if before == len(STEPS):
            raise ValueError

    script.access["Bearer cold"] = run
    instance_id = server.kong.start({})
    for _ in range(2):
        assert 500 == status_of(server.kong.event(instance_id, headers={"authorization": "Bearer cold"}))
        assert_serves(server, instance_id)


def test_gw_03_access_past_its_deadline_is_504_and_its_late_calls_raise(
    script: Scripted, tmp_path: Path
) -> None:
    leave, raised = threading.Event(), threading.Event()

    def run(kong: Kong) -> None:
        assert leave.wait(WAIT_S)
        try:
            kong.service.request.set_header("authorization", "Bearer NEW")
        except EventOverError:
            raised.set()
            raise

    script.access["Bearer hang"] = run
    script.access["Bearer cold"] = lambda kong: None
    with Running(script.plugin(), tmp_path, threads=1, queue_limit=2, deadline_s=0.5) as server:
        instance_id = server.kong.start({})
        began = time.monotonic()
        assert 504 == status_of(ask(server, instance_id, "Bearer hang"))
        assert 0.5 <= time.monotonic() - began < WAIT_S

        eventually(lambda: server.loop.stats().lost_threads == 1)
        assert "success" == ask(server, instance_id, "Bearer cold").ended
        assert_serves(server, instance_id)
        leave.set()
        assert raised.wait(WAIT_S)
        eventually(lambda: server.loop.stats().lost_threads == 0)
        stats = server.loop.stats()

    assert (1, 1, 1, 0) == (stats.timed_out, stats.lost_threads_total, stats.threads, stats.busy)
    assert ["an event passed its deadline: answering 504"] == server.lines.lines


def test_gw_03_access_that_waits_for_kong_past_its_deadline_is_504(script: Scripted, tmp_path: Path) -> None:
    over = threading.Event()

    def run(kong: Kong) -> None:
        try:
            kong.request.get_path()
        except EventOverError:
            over.set()
            raise

    script.access["Bearer hang"] = run
    with Running(script.plugin(), tmp_path, deadline_s=0.1) as server:
        kong = server.kong
        sock, side = kong.take(), KongSide([Step(HEADER, reply="Bearer hang")], sequence=2)
        instance_id = kong.start({})
        sock.sendall(side.begin(instance_id))
        sock.sendall(side.receive(sock.recv(65536)))
        # get_path arrives, and Kong does not answer it.
        assert b"get_path" in sock.recv(65536)
        assert over.wait(WAIT_S)
        side = KongSide()
        assert 504 == status_of(kong.converse(sock, side))


def test_gw_08_res_13_full_pool_is_503_at_once_while_warm_answers_go_on(
    script: Scripted, tmp_path: Path
) -> None:
    gate = threading.Event()
    script.access["Bearer cold"] = lambda kong: [None][not gate.wait(WAIT_S)]
    with Running(script.plugin(), tmp_path, threads=2, queue_limit=1) as server:
        instance_id = server.kong.start({})
        done: list[Done] = []
        threads = []
        for number in range(3):
            kong = FakeKong(server.path)
            threads.append(threading.Thread(target=lambda kong=kong: done.append(cold(kong, instance_id))))
            threads[-1].start()
            eventually(lambda number=number: server.loop.stats().busy == number + 1)
        for _ in range(5):
            refused = ask(server, instance_id, "Bearer cold")
            assert 503 == status_of(refused)
            assert refused.exit is not None
            assert "1" == refused.exit.headers["Retry-After"]
            assert_serves(server, instance_id)
        gate.set()
        for thread in threads:
            thread.join(WAIT_S)

        assert ["success"] * 3 == [one.ended for one in done]
        assert 5 == server.loop.stats().refused_full


def cold(kong: FakeKong, instance_id: int) -> Done:
    with kong:
        return kong.event(instance_id, Step(HEADER, reply="Bearer cold"))


@pytest.mark.parametrize("reset", [False, True], ids=["end-of-file", "reset"])
def test_client_gone_frees_the_thread_that_waits_for_kong(
    script: Scripted, server: Running, reset: bool
) -> None:
    over = threading.Event()

    def run(kong: Kong) -> None:
        try:
            kong.request.get_path()
        except EventOverError:
            over.set()
            raise

    script.access["Bearer cold"] = run
    instance_id = server.kong.start({})
    sock, side = server.kong.connect(), KongSide([Step(HEADER, reply="Bearer cold")])
    sock.sendall(side.begin(instance_id))
    sock.sendall(side.receive(sock.recv(65536)))
    if reset:
        eventually(lambda: sock.recv(65536, socket.MSG_PEEK))  # closed unread: the other side gets ECONNRESET
    else:
        assert b"get_path" in sock.recv(65536)
    sock.close()

    assert over.wait(WAIT_S)
    eventually(lambda: server.loop.stats().busy == 0)
    assert_serves(server, instance_id)


def test_client_gone_while_the_thread_works_makes_its_next_call_raise(
    script: Scripted, server: Running
) -> None:
    entered, leave, over = threading.Event(), threading.Event(), threading.Event()

    def run(kong: Kong) -> None:
        entered.set()
        assert leave.wait(WAIT_S)
        try:
            kong.response.exit(200)
        except EventOverError:
            over.set()
            raise

    script.access["Bearer cold"] = run
    instance_id = server.kong.start({})
    sock, side = server.kong.connect(), KongSide([Step(HEADER, reply="Bearer cold")])
    sock.sendall(side.begin(instance_id))
    sock.sendall(side.receive(sock.recv(65536)))
    assert entered.wait(WAIT_S)
    before = server.loop.stats().connections
    sock.close()
    eventually(lambda: server.loop.stats().connections == before - 1)
    leave.set()

    assert over.wait(WAIT_S)
    eventually(lambda: server.loop.stats().busy == 0)
    assert_serves(server, instance_id)


def test_client_gone_before_the_facts_came_is_forgotten(server: Running) -> None:
    instance_id = server.kong.start({})
    for _ in range(20):
        sock = server.kong.connect()
        sock.sendall(KongSide().begin(instance_id))
        assert sock.recv(4)
        sock.close()
    server.kong.__exit__()

    eventually(lambda: server.loop.stats().connections == 0)
    assert_serves(server, instance_id)


def test_kong_that_leaves_with_answers_unsent_is_forgotten(server: Running) -> None:
    instance_id = server.kong.start({})
    sock = server.kong.connect()
    side = KongSide([Step(HEADER, reply="Bearer good")])
    sock.sendall(side.begin(instance_id))
    sock.sendall(side.receive(sock.recv(65536)))
    eventually(lambda: sock.recv(65536, socket.MSG_PEEK))
    sock.close()

    eventually(lambda: server.loop.stats().connections == 1)
    assert_serves(server, instance_id)


def test_gw_04_bytes_that_are_not_utf8_never_break_the_conversation(
    script: Scripted, server: Running
) -> None:
    seen: list[str] = []
    chance = random.Random(90)

    def run(kong: Kong) -> None:
        seen.append(kong.request.get_path())
        kong.service.request.set_header("x-seen", seen[-1])

    instance_id = server.kong.start({})
    for _ in range(200):
        raw = bytes(chance.randrange(128, 256) for _ in range(chance.randrange(1, 300)))
        text = raw.decode("utf-8", "surrogateescape")
        script.access[text] = run
        done = ask(server, instance_id, text, Step("kong.request.get_path", reply=text))
        assert ("success", ("x-seen", text)) == (done.ended, done["kong.service.request.set_header"][0])

    assert 1 == server.loop.stats().threads
    assert 1 == len(server.kong.pool)


@pytest.mark.parametrize(
    "reply", [b"\x0a\x05abc", b"\x08\x01", b"\xff\xff", b"\x0b"], ids=["cut", "number", "varint", "group"]
)
@pytest.mark.parametrize("where", ["prefetch", "pool"])
def test_undecodable_answer_is_500(script: Scripted, server: Running, reply: bytes, where: str) -> None:
    script.access["Bearer cold"] = lambda kong: [None][bool(kong.request.get_path() and False)]
    instance_id = server.kong.start({})
    steps = [Step(HEADER, raw=reply)]
    if where == "pool":
        steps = [Step(HEADER, reply="Bearer cold"), Step("kong.request.get_path", raw=reply)]

    assert 500 == status_of(server.kong.event(instance_id, *steps))
    assert_serves(server, instance_id)


@pytest.mark.parametrize("where", ["prefetch", "pool"])
def test_over_long_answer_is_read_away_and_400(script: Scripted, tmp_path: Path, where: str) -> None:
    script.access["Bearer cold"] = lambda kong: [None][bool(kong.request.get_path() and False)]
    with Running(script.plugin(), tmp_path, limits=Limits(reply_bytes=100_000)) as server:
        instance_id = server.kong.start({})
        steps = [Step(HEADER, reply="x" * 3_000_000)]
        if where == "pool":
            steps = [Step(HEADER, reply="Bearer cold"), Step("kong.request.get_path", reply="x" * 3_000_000)]

        assert 400 == status_of(server.kong.event(instance_id, *steps))
        assert_serves(server, instance_id)


def test_junk_instead_of_a_command_is_answered_and_then_closed(server: Running) -> None:
    sock = server.kong.connect()
    server.kong.send(sock, b"GET / HTTP/1.1\r\n\r\n")
    side = KongSide()
    # Nobody closes here: the server does, after its wait for end of file.
    assert 500 == status_of(read_exit(sock, side))
    assert b"" == sock.recv(1)
    sock.close()


def read_exit(sock: socket.socket, side: KongSide) -> Done:
    while not side.over:
        side.receive(sock.recv(65536))
    return side.done


def test_exit_whose_end_of_file_does_not_come_is_closed_after_the_wait(server: Running) -> None:
    instance_id = server.kong.start({})
    sock = server.kong.connect()
    side = KongSide([Step(HEADER, reply="Bearer refused")])
    sock.sendall(side.begin(instance_id))
    sock.sendall(side.receive(sock.recv(65536)))
    assert 401 == status_of(read_exit(sock, side))

    assert b"" == sock.recv(1)
    sock.close()
    eventually(lambda: server.loop.stats().connections == 1)


def test_end_of_an_event_that_is_told_twice_counts_once(script: Scripted, server: Running) -> None:
    def twice(item: Post) -> None:
        server.loop.post(item)
        server.loop.post(item)

    server.loop._pool._post = twice
    script.access["Bearer cold"] = lambda kong: kong.log.info("x")
    instance_id = server.kong.start({})
    for _ in range(3):
        assert "success" == ask(server, instance_id, "Bearer cold").ended
        assert_serves(server, instance_id)
    eventually(lambda: not server.loop._posts)
    stats = server.loop.stats()

    assert (0, 1, 0) == (stats.busy, stats.threads, stats.faults)


def test_pool_thread_that_is_gone_is_noticed_and_the_event_that_waited_runs(
    script: Scripted, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.access["Bearer cold"] = lambda kong: None
    instance_id = server.kong.start({})
    working = Pool._work
    starts = iter([lambda pool: None])
    monkeypatch.setattr(Pool, "_work", lambda pool: next(starts, working)(pool))  # noqa: PLW0108 - another one each time

    assert "success" == ask(server, instance_id, "Bearer cold").ended
    assert "a thread of the pool is gone" in server.lines


# --- bytes in pieces, large answers, many connections ---------------------------------


def test_kong_may_write_byte_by_byte(server: Running) -> None:
    instance_id = server.kong.start({})
    sock, side = server.kong.connect(), KongSide([Step(HEADER, reply="Bearer good")])
    for byte in side.begin(instance_id):
        sock.sendall(bytes([byte]))
    for byte in side.receive(sock.recv(65536)):
        sock.sendall(bytes([byte]))

    assert "success" == server.kong.converse(sock, side).ended


BIG = "x" * 700_000


@pytest.mark.parametrize("kind", ["success", "exit"])
def test_answer_larger_than_the_socket_buffer_arrives_whole(tmp_path: Path, kind: str) -> None:
    calls = [Calls().set_header("x-big", BIG) for _ in range(3)]
    outcome = proceed(*calls) if kind == "success" else exit_with(403, BIG.encode(), {}, *calls)
    with Running(Plugin(prefetch=(), warm=lambda facts: outcome), tmp_path) as server:
        instance_id = server.kong.start({})
        sock, side = server.kong.connect(), KongSide()
        sock.sendall(side.begin(instance_id))
        # Longer than the wait for end of file: half an exit must not be cut off.
        time.sleep(0.3)
        done = server.kong.converse(sock, side)

        assert kind == done.ended
        assert [("x-big", BIG)] * 3 == done["kong.service.request.set_header"]
        assert "success" if kind == "success" else BIG.encode() == (done.exit and done.exit.body)
        server.kong.event(instance_id)


def test_peer_that_never_reads_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kong_token_exchange.pluginserver.loop.MAX_UNSENT_BYTES", 1_000_000)
    with Running(Plugin(), tmp_path) as server:
        sock = server.kong.connect()
        sock.setblocking(False)
        ask_names = wire.frame(wire.encode_call(wire.GetPluginInfo(1, "p"))) * 1000

        def push() -> bool:
            try:
                sock.send(ask_names)
            except BlockingIOError:
                return False
            except OSError:
                return True
            return False

        eventually(push)
        sock.close()


def test_two_hundred_connections_are_served_at_once(server: Running) -> None:
    instance_id = server.kong.start({})
    socks = [server.kong.connect() for _ in range(200)]
    sides = [KongSide([Step(HEADER, reply="Bearer good")], sequence=number) for number in range(2, 202)]
    for sock, side in zip(socks, sides, strict=True):
        sock.sendall(side.begin(instance_id))
    for sock, side in zip(socks, sides, strict=True):
        assert "success" == server.kong.converse(sock, side).ended

    assert 201 == server.loop.stats().connections
    server.kong.__exit__()
    eventually(lambda: server.loop.stats().connections == 0)


def test_gw_19_different_instances_never_mix(tmp_path: Path) -> None:
    def start(config: Any) -> Instance:
        answer = proceed(Calls().set_header("x-audience", config["audience"]))
        return Instance(warm=lambda facts: answer)

    with Running(Plugin(start), tmp_path) as server:
        ids = {audience: server.kong.start({"audience": audience}) for audience in "abcdef"}
        chance = random.Random(3)
        for _ in range(200):
            audience = chance.choice("abcdef")
            done = server.kong.event(ids[audience])
            assert [("x-audience", audience)] == done["kong.service.request.set_header"]


class Stepped:
    """A loop that the test drives round by round, with one connection of which it holds the other end."""

    def __init__(self, plugin: Plugin) -> None:
        self.server = Running(plugin, None)
        self.loop = self.server.loop
        self.ours, self.theirs = socket.socketpair()
        self.loop.adopt(self.theirs)
        self.instance_id = self.loop._host.registry.start("test-plugin", b"{}").instance_id

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ours.close()
        self.loop.close()

    def fill(self) -> int:
        """Leave no room in the server's socket buffer."""
        filled = 0
        while True:
            try:
                filled += self.theirs.send(b"x" * 65536)
            except BlockingIOError:
                return filled


def test_kong_gone_between_its_call_and_our_answer_is_forgotten() -> None:
    with Stepped(Plugin(prefetch=(), warm=lambda facts: REPLACED)) as stepped:
        stepped.ours.sendall(KongSide().begin(stepped.instance_id))
        stepped.ours.close()
        stepped.loop._step()

        assert 0 == stepped.loop.stats().connections


def test_answer_waits_for_room_in_the_socket_buffer() -> None:
    with Stepped(Plugin(prefetch=(), warm=lambda facts: REPLACED)) as stepped:
        stepped.ours.sendall(KongSide().begin(stepped.instance_id))
        filled = stepped.fill()
        stepped.loop._step()
        while filled:
            filled -= len(stepped.ours.recv(min(filled, 65536)))
        stepped.loop._step()
        done = FakeKong("").converse(stepped.ours, KongSide())

        assert ("success", [NEW]) == (done.ended, done.calls)


def test_kong_gone_while_an_answer_waits_for_room_is_forgotten() -> None:
    with Stepped(Plugin(prefetch=(), warm=lambda facts: REPLACED)) as stepped:
        stepped.ours.sendall(KongSide().begin(stepped.instance_id))
        stepped.fill()
        stepped.loop._step()
        stepped.ours.close()
        stepped.loop._step()

        assert 0 == stepped.loop.stats().connections


def test_kong_gone_with_half_an_exit_holds_up_nobody(script: Scripted, tmp_path: Path) -> None:
    long = exit_with(401, b"x" * 400_000)
    plugin = Plugin(warm=lambda facts: REPLACED if facts[0] == "Bearer good" else long)
    with Running(plugin, tmp_path) as server:
        instance_id = server.kong.start({})
        with server.kong.connect() as sock:
            side = KongSide([Step(HEADER, "authorization", "Bearer long")])
            sock.sendall(side.begin(instance_id))
            sock.sendall(side.receive(sock.recv(65536)))
            eventually(lambda: any(peer.unsent for peer in list(server.loop._peers.values())))

        assert_serves(server, instance_id)


def test_kong_gone_after_a_long_answer_is_no_fault() -> None:
    with Stepped(Plugin(warm=lambda facts: REPLACED)) as stepped:
        side = KongSide([Step(HEADER, reply="x" * 60_000)])
        stepped.ours.sendall(side.begin(stepped.instance_id))
        stepped.loop._step()
        stepped.ours.sendall(side.receive(stepped.ours.recv(65536)))
        stepped.ours.close()
        stepped.loop._step()

        assert 0 == stepped.loop.stats().connections
        assert 0 == stepped.loop.stats().faults


def test_bytes_behind_an_answer_that_waits_for_room_keep_their_order() -> None:
    with Stepped(Plugin(prefetch=(), warm=lambda facts: proceed())) as stepped:
        filled = stepped.fill()
        for sequence in (2, 3, 4):
            stepped.ours.sendall(KongSide(sequence=sequence).begin(stepped.instance_id))
            stepped.loop._step()
        while filled:
            filled -= len(stepped.ours.recv(min(filled, 65536)))
        stepped.loop._step()
        for sequence in (2, 3, 4):
            side = KongSide(sequence=sequence)
            expected = wire.EMPTY_FRAME + wire.frame(wire.encode_return(sequence))
            side.receive(stepped.ours.recv(len(expected)))
            assert "success" == side.done.ended


# --- the loop itself ------------------------------------------------------------------


def test_connections_can_be_handed_over_instead_of_accepted(script: Scripted) -> None:
    with Running(script.plugin(), None) as server:
        ours, theirs = socket.socketpair()
        ours.settimeout(WAIT_S)
        server.loop.post(lambda: server.loop.adopt(theirs))
        server.kong.give_back(ours)
        instance_id = server.kong.start({})
        assert_serves(server, instance_id)


def test_fault_in_the_connection_itself_is_500(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    instance_id = server.kong.start({})

    def fail(self: Connection) -> bytes:
        raise RuntimeError("MARKED")

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "_decide", fail)
        assert 500 == status_of(ask(server, instance_id, "Bearer good"))
    assert_serves(server, instance_id)
    assert "a connection failed: RuntimeError" in server.lines
    assert "MARKED" not in server.lines


def test_fault_while_a_fault_is_answered_costs_that_connection_alone(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance_id = server.kong.start({})

    def fail(self: Connection) -> bytes:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "_decide", fail)
        patch.setattr(Connection, "fail", fail)
        assert "reset" == ask(server, instance_id, "Bearer good").ended
    assert_serves(server, instance_id)


class Exhausted(socket.socket):
    """A listener that has no descriptor to give, some times."""

    failures = 3

    def accept(self) -> Any:
        if Exhausted.failures:
            Exhausted.failures -= 1
            raise OSError(errno.EMFILE, "too many open files")
        return super().accept()


def test_res_11_accepting_pauses_when_descriptors_run_out_and_goes_on(
    script: Scripted, tmp_path: Path
) -> None:
    server = Running(script.plugin(), None)
    path = str(tmp_path / "s")
    listener = Exhausted(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()
    server.loop.listen(listener)
    server.kong.path = path
    with server:
        assert_serves(server, server.kong.start({}))

    assert 0 == Exhausted.failures
    assert "accept failed: OSError" in server.lines


def test_wake_after_the_end_does_nothing(server: Running) -> None:
    server.stop()

    server.loop.post(lambda: None)


def test_wakes_without_end_do_not_block(script: Scripted) -> None:
    server = Running(script.plugin(), None)
    for _ in range(100_000):
        server.loop.wake()
    with server:
        pass


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, 60.0, 61.0])
def test_deadline_that_kong_would_not_wait_for_is_refused(tmp_path: Path, deadline_s: float) -> None:
    with pytest.raises(ValueError, match="read timeout"):
        Running(Plugin(), None, deadline_s=deadline_s)


def test_round_that_fails_is_told_and_the_next_one_works(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance_id = server.kong.start({})

    def fail() -> None:
        raise RuntimeError("MARKED")

    for _ in range(150):
        server.loop.post(fail)
        assert_serves(server, instance_id)

    assert "the loop failed: RuntimeError" in server.lines
    assert "MARKED" not in server.lines


def test_loop_that_fails_without_end_gives_up(script: Scripted) -> None:
    server = Running(script.plugin(), None)

    def fail() -> None:
        server.loop.post(fail)
        raise RuntimeError

    server.loop.post(fail)
    with pytest.raises(RuntimeError):
        server.loop.run()


def test_another_socket_can_be_watched_and_let_go(server: Running) -> None:
    ours, theirs = socket.socketpair()
    got: list[bytes] = []
    server.loop.post(lambda: server.loop.watch(theirs, lambda: got.append(theirs.recv(10))))
    ours.send(b"hello")
    eventually(lambda: got)
    done = threading.Event()
    server.loop.post(lambda: (server.loop.unwatch(theirs), server.loop.unwatch(theirs), done.set())[2])
    assert done.wait(WAIT_S)
    ours.send(b"again")
    assert_serves(server, server.kong.start({}))
    ours.close()
    theirs.close()

    assert [b"hello"] == got


def test_peer_that_was_closed_earlier_in_the_round_is_passed_over() -> None:
    with Stepped(Plugin(prefetch=(), warm=lambda facts: REPLACED)) as stepped:
        first, seen = socket.socketpair()
        peer = stepped.loop._peers[stepped.theirs.fileno()]

        def drop() -> None:
            seen.recv(10)
            stepped.loop._drop(peer)
            stepped.loop._drop(peer)

        stepped.loop.watch(seen, drop)
        first.send(b"x")
        stepped.ours.sendall(KongSide().begin(stepped.instance_id))
        stepped.loop._step()

        assert 0 == stepped.loop.stats().connections
        stepped.loop.unwatch(seen)
        first.close()
        seen.close()


def test_room_that_was_promised_and_is_gone_is_waited_for_again() -> None:
    with Stepped(Plugin(prefetch=(), warm=lambda facts: REPLACED)) as stepped:
        peer = stepped.loop._peers[stepped.theirs.fileno()]
        send = peer.send

        def full(data: object) -> int:
            raise BlockingIOError

        peer.send = full  # type: ignore[assignment]
        stepped.ours.sendall(KongSide().begin(stepped.instance_id))
        for _ in range(3):
            stepped.loop._step()
        assert peer.unsent
        peer.send = send
        stepped.loop._step()

        assert "success" == FakeKong("").converse(stepped.ours, KongSide()).ended
        assert not peer.unsent


# --- what is left in the socket -------------------------------------------------------


def test_kernel_can_be_asked_for_a_look() -> None:
    assert loop.can_look.__wrapped__()


@pytest.mark.parametrize("fault", [OSError(errno.ENOPROTOOPT, "not here"), None], ids=["refused", "ignored"])
def test_kernel_that_cannot_is_found_out(fault: OSError | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_from(sock: socket.socket, offset: int) -> None:
        if fault is not None:
            raise fault

    monkeypatch.setattr(loop, "_look_from", look_from)

    assert not loop.can_look.__wrapped__()


def test_larger_pages_would_fill_kongs_room_with_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 16384}.__getitem__)

    assert not loop.can_look.__wrapped__()


def test_without_a_look_all_is_read_at_once(
    script: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "can_look", lambda: False)
    script.access["Bearer cold"] = lambda kong: kong.log.notice(kong.request.get_path())
    with Running(script.plugin(), tmp_path) as server:
        instance_id = server.kong.start({"long": "x" * 200_000})
        for _ in range(50):
            assert_serves(server, instance_id)
        assert 401 == status_of(ask(server, instance_id, "Bearer refused"))
        done = ask(server, instance_id, "Bearer cold", Step("kong.request.get_path", reply="/" * 100_000))
        assert "success" == done.ended


@pytest.mark.parametrize(("room", "look"), [(8 * 1024, 0), (loop.ROOM_BYTES, socket.MSG_PEEK)])
def test_socket_with_less_room_than_usual_is_read_at_once(room: int, look: int) -> None:
    with Stepped(Plugin()) as stepped:
        # The kernel doubles what it is told.
        stepped.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room // 2)

        assert look == loop.Peer(stepped.theirs, Connection(stepped.loop._host)).look


@pytest.mark.parametrize("size", [0, 1, 100, 3_000, 15_000, 16_384, 65_535, 65_536, 65_537, 300_000])
def test_kong_never_waits_for_room_whatever_the_size_of_its_answers(
    script: Scripted, server: Running, size: int
) -> None:
    script.access["Bearer cold"] = lambda kong: kong.service.request.set_path(kong.request.get_path())
    instance_id = server.kong.start({"long": "x" * size})
    for _ in range(40):
        path = Step("kong.request.get_path", reply="/" * size)
        done = ask(server, instance_id, "Bearer cold", path)
        assert "success" == done.ended
        assert ("kong.service.request.set_path", "/" * size) == done.calls[-1]
        assert_serves(server, instance_id)
    assert 1 == len(server.kong.pool)


@pytest.mark.parametrize("count", [1, 20, 300])
def test_kong_never_waits_for_room_however_many_its_answers(tmp_path: Path, count: int) -> None:
    calls = Calls()
    for number in range(count):
        calls.set_header(f"x-{number}", "v")
    warm = proceed(calls)
    wanted = [Fetch("kong.request.get_header", f"x-{number}") for number in range(count)]
    with Running(Plugin(prefetch=wanted, warm=lambda facts: warm), tmp_path) as server:
        instance_id = server.kong.start({})
        for _ in range(60):
            done = server.kong.event(instance_id)
            assert ("success", 2 * count) == (done.ended, len(done.calls))
        assert 1 == len(server.kong.pool)


class Writer:
    """Writes as nginx does: piece by piece, and once there was no room, only when it is told of some."""

    def __init__(self, sock: socket.socket, frames: Iterable[bytes]) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.pieces: list[memoryview] = []
        self.waits = False
        for frame in frames:
            self.add(frame)

    def add(self, frame: bytes) -> None:
        self.pieces += [memoryview(piece) for piece in (frame[:4], frame[4:]) if piece]

    def write(self, most: int = 1_000_000) -> bool:
        """Write what there is room for; return whether that was all."""
        for _ in range(most):
            if not self.pieces or (self.waits and not select.select([], [self.sock], [], 0)[1]):
                break
            try:
                sent = self.sock.send(self.pieces[0])
            except BlockingIOError:
                self.waits = True
                break
            self.waits = False
            self.pieces[0] = self.pieces[0][sent:]
            if not self.pieces[0]:
                del self.pieces[0]
        return not self.pieces


@pytest.mark.parametrize(
    "sizes",
    [
        (50_600, 1_000_000),
        (25_300, 25_300, 1_000_000),
        (50_600, 190_000),
        (1_000_000,) * 3,
        (1_729,) * 80,
        (705,) * 200,
        (1,) * 900,
    ],
    ids=lambda sizes: f"{len(sizes)}x{sizes[0]}",
)
def test_kong_that_has_filled_its_socket_is_told_of_room(sizes: tuple[int, ...]) -> None:
    wanted = [Fetch("kong.request.get_header", f"x-{number}") for number in range(len(sizes))]
    seen: list[int] = []

    def warm(facts: Facts) -> Outcome:
        seen.extend(map(len, facts))
        return proceed()

    with Stepped(Plugin(prefetch=wanted, warm=warm)) as stepped:
        stepped.ours.sendall(KongSide().begin(stepped.instance_id))
        stepped.loop._step()
        read_all(stepped.ours)
        writer = Writer(stepped.ours, [wire.frame(wire.encode_string("h" * size)) for size in sizes])
        for _ in range(200):
            done = writer.write()
            for _ in range(3):
                stepped.loop.wake()
                stepped.loop._step()

        assert done
        assert list(sizes) == seen


# Around what the kernel pads a piece to, by which little takes much room, and parts of a large one.
SIZES = (0, 1, 100, 190, 702, 1_726, 3_774, 7_870, 16_384, 32_768, 36_541, 65_532, 73_086, 190_000, 300_000)


@pytest.mark.parametrize("seed", range(30))
def test_kong_has_room_and_something_is_left_whatever_it_writes_and_when(seed: int) -> None:
    chance = random.Random(seed)
    wanted = [
        Fetch("kong.request.get_header", f"x-{number}") for number in range(chance.choice((1, 2, 3, 11, 40)))
    ]
    sizes: list[int] = []

    def warm(facts: Facts) -> Outcome:
        assert sizes == [len(fact) for fact in facts]
        sizes.clear()
        return proceed()

    with Stepped(Plugin(prefetch=wanted, warm=warm)) as stepped:
        peer = stepped.loop._peers[stepped.theirs.fileno()]
        writer = Writer(stepped.ours, ())

        def meanwhile(call: Callable[..., Any]) -> Callable[..., Any]:
            def called(*args: Any) -> Any:
                writer.write(chance.choice((0, 0, 0, 1, 30, 1000)))
                return call(*args)

            return called

        peer.receive, peer.recv_into = meanwhile(peer.receive), meanwhile(peer.recv_into)  # type: ignore[assignment]
        for sequence in range(2, 60):
            writer.add(KongSide(sequence=sequence).begin(stepped.instance_id))
            several = chance.choice(((1_726,), (73_086, 16_384), chance.choices(SIZES, k=2)))
            sizes += [size for _, size in zip(wanted, itertools.cycle(several), strict=False)]
            for size in sizes:
                writer.add(wire.frame(wire.encode_string("h" * size)))
            for _ in range(300):
                writer.write(chance.choice((1, 30, 1000, 1000)))
                stepped.loop.wake()
                stepped.loop._step()
                if not sizes:
                    break

            assert not sizes
            assert State.IDLE is peer.connection.state
            assert select.select([], [stepped.ours], [], 0)[1]
            assert 0 < peer.untaken <= loop.LEFT_BYTES
            read_all(stepped.ours)
            stepped.ours.setblocking(False)


def read_all(sock: socket.socket) -> bytes:
    sock.setblocking(False)
    data = b""
    with contextlib.suppress(BlockingIOError):
        while piece := sock.recv(1 << 20):
            data += piece
    sock.setblocking(True)
    return data


@pytest.mark.parametrize("count", [10, 100, 140, 150, 170, 250, 900])
def test_many_setters_and_a_long_answer_leave_room(script: Scripted, server: Running, count: int) -> None:
    def run(kong: Kong) -> None:
        for _ in range(count):
            kong.log.notice("x")
        assert 300_000 == len(kong.request.get_path())

    script.access["Bearer cold"] = run
    instance_id = server.kong.start({})
    for _ in range(5):
        done = ask(server, instance_id, "Bearer cold", Step("kong.request.get_path", reply="/" * 300_000))
        assert "success" == done.ended


def test_what_is_left_is_some_events_and_is_gone_when_we_close() -> None:
    with Stepped(Plugin(prefetch=(), warm=lambda facts: REPLACED)) as stepped:
        peer = stepped.loop._peers[stepped.theirs.fileno()]
        most = 0
        for _ in range(100):
            side = KongSide()
            stepped.ours.sendall(side.begin(stepped.instance_id))
            stepped.loop._step()
            stepped.ours.sendall(side.receive(stepped.ours.recv(65536)))
            stepped.loop._step()
            assert "success" == side.done.ended
            most = max(most, peer.untaken + peer.kept + peer.connection.frames * loop._FRAME_BYTES)
        assert 0 < peer.untaken < most <= loop.LEFT_BYTES
        stepped.loop._drop(peer)

        assert b"" == stepped.ours.recv(10)


@pytest.mark.parametrize("look", [True, False])
def test_round_that_breaks_off_loses_nothing_of_what_it_was_told(
    look: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "can_look", lambda: look)
    with Stepped(Plugin(prefetch=(), warm=lambda facts: REPLACED)) as stepped:
        peer = stepped.loop._peers[stepped.theirs.fileno()]
        recv, failures = peer.recv, [MemoryError(), MemoryError()]

        def failing(*args: Any) -> bytes:
            if failures:
                raise failures.pop()
            return recv(*args)

        peer.recv = failing  # type: ignore[assignment]
        stepped.ours.sendall(KongSide().begin(stepped.instance_id))
        thread = threading.Thread(target=stepped.loop.run)
        thread.start()
        done = FakeKong("").converse(stepped.ours, KongSide())
        stepped.loop.request_stop()
        thread.join(WAIT_S)

        assert "success" == done.ended
        assert not failures


class Round:
    """What happens in a round of connections that all have an event: `look` and `send`, in order."""

    def __init__(self, stepped: Stepped, count: int) -> None:
        self.happened: list[str] = []
        self.ours = [stepped.ours]
        for _ in range(count - 1):
            ours, theirs = socket.socketpair()
            stepped.loop.adopt(theirs)
            self.ours.append(ours)
        self.peers = list(stepped.loop._peers.values())
        for peer in self.peers:
            peer.receive = self._noting("look", peer.receive)
            peer.send = self._noting("send", peer.send)  # type: ignore[assignment]
        for ours in self.ours:
            ours.settimeout(WAIT_S)
            ours.sendall(KongSide().begin(stepped.instance_id))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for ours in self.ours:
            ours.close()

    def _noting(self, what: str, call: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        def noting(data: bytes) -> Any:
            self.happened.append(what)
            return call(data)

        return noting

    def answered(self) -> int:
        return sum(bool(select.select([ours], [], [], 0)[0]) for ours in self.ours)


def test_answers_of_some_events_go_out_together_and_none_waits_for_more() -> None:
    some = loop.ROUND_EVENTS
    with (
        Stepped(Plugin(prefetch=(), warm=lambda facts: REPLACED)) as stepped,
        Round(stepped, 2 * some + 1) as events,
    ):
        stepped.loop._step()

        several = ["look"] * some + ["send"] * some
        assert [*several, *several, "look", "send"] == events.happened
        assert 2 * some + 1 == events.answered()


def test_others_get_their_turn_however_much_there_is_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_ROUNDS", 2)
    with (
        Stepped(Plugin(prefetch=(), warm=lambda facts: REPLACED)) as stepped,
        Round(stepped, 3 * loop.ROUND_EVENTS) as events,
    ):
        stepped.loop.post(lambda: events.happened.append("post"))
        stepped.loop._step()

        assert "post" == events.happened[-1]
        assert events.answered() in {2 * loop.ROUND_EVENTS - 1, 2 * loop.ROUND_EVENTS}


@pytest.mark.parametrize("failures", [1, 2])
def test_loop_that_gives_up_has_sent_what_it_had(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_MAX_FAILURES", failures)
    with (
        Stepped(Plugin(prefetch=(), warm=lambda facts: proceed())) as stepped,
        Round(stepped, 3) as events,
    ):
        look, calls = stepped.loop._read, itertools.count()

        def failing(peer: Any) -> None:
            if next(calls) >= 2:
                raise MemoryError
            look(peer)

        stepped.loop._read = failing  # type: ignore[method-assign]
        with pytest.raises(MemoryError):
            stepped.loop.run()
        sides = [KongSide(), KongSide()]
        for ours, side in zip(events.ours, sides, strict=False):
            side.receive(ours.recv(65536))

        assert ["success", "success"] == [side.done.ended for side in sides]


def test_answers_are_sent_though_the_round_breaks_off() -> None:
    with (
        Stepped(Plugin(prefetch=(), warm=lambda facts: proceed())) as stepped,
        Round(stepped, 3) as events,
    ):
        look, calls = stepped.loop._read, itertools.count()

        def failing(peer: Any) -> None:
            if next(calls) == 2:
                raise MemoryError
            look(peer)

        stepped.loop._read = failing  # type: ignore[method-assign]
        thread = threading.Thread(target=stepped.loop.run)
        thread.start()
        eventually(lambda: 3 == events.answered())
        stepped.loop.request_stop()
        thread.join(WAIT_S)

        assert ["look", "look", "send", "send", "look", "send"] == events.happened


def test_fault_while_one_answer_is_sent_leaves_the_others_alone() -> None:
    with (
        Stepped(Plugin(prefetch=(), warm=lambda facts: REPLACED)) as stepped,
        Round(stepped, 3) as events,
    ):
        send, failures = events.peers[1].send, [MemoryError()]

        def failing(data: bytes) -> int:
            if failures:
                raise failures.pop()
            return send(data)

        events.peers[1].send = failing  # type: ignore[assignment]
        stepped.loop._step()
        ends = [FakeKong("").converse(ours, KongSide()).ended for ours in events.ours]

        assert ["success", "exit", "success"] == ends


class Faulty:
    """An epoll of which some calls fail."""

    def __init__(self, epoll: Any, **failures: list[BaseException]) -> None:
        self._epoll, self._failures = epoll, failures

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            if self._failures.get(name):
                raise self._failures[name].pop()
            return getattr(self._epoll, name)(*args)

        return getattr(self._epoll, name) if name == "closed" else call


def test_connection_that_cannot_be_watched_is_let_go_and_the_others_go_on(
    server: Running, script: Scripted
) -> None:
    instance_id = server.kong.start({})
    server.loop._epoll = Faulty(server.loop._epoll, register=[OSError(errno.ENOSPC, "")])  # type: ignore[assignment]
    with server.kong.connect() as sock:
        assert b"" == sock.recv(10)

    assert_serves(server, instance_id)
    eventually(lambda: server.loop.stats().connections == 1)


@pytest.mark.parametrize("fault", [MemoryError(), OSError(errno.ENOMEM, "")], ids=["memory", "epoll"])
def test_fault_on_the_way_back_from_a_fault_is_not_the_end(
    server: Running, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    instance_id = server.kong.start({})
    (peer,) = server.loop._peers.values()
    recv, failures = peer.recv, [MemoryError()]

    def failing(*args: Any) -> bytes:
        if failures:
            server.loop._epoll = Faulty(server.loop._epoll, modify=[fault])  # type: ignore[assignment]
            raise failures.pop()
        return recv(*args)

    peer.recv = failing  # type: ignore[assignment]
    done = ask(server, instance_id, "Bearer good")

    assert ("exit" if isinstance(fault, OSError) else "success") == done.ended
    assert_serves(server, instance_id)


def test_look_that_fails_after_it_has_seen_something_sees_it_again() -> None:
    seen: list[str] = []

    def warm(facts: Facts) -> Outcome:
        seen.append(facts[0])
        return REPLACED

    with Stepped(Plugin(warm=warm)) as stepped:
        peer = stepped.loop._peers[stepped.theirs.fileno()]
        recv, failures = peer.recv, [MemoryError()]

        def failing(size: int, flags: int) -> bytes:
            if failures:
                recv(4, flags)
                raise failures.pop()
            return recv(size, flags)

        thread = threading.Thread(target=stepped.loop.run)
        thread.start()
        side = KongSide([Step(HEADER, reply="Bearer whole")])
        stepped.ours.sendall(side.begin(stepped.instance_id))
        answer = side.receive(stepped.ours.recv(65536))
        peer.recv = failing  # type: ignore[assignment]
        stepped.ours.sendall(answer)
        done = FakeKong("").converse(stepped.ours, side)
        stepped.loop.request_stop()
        thread.join(WAIT_S)

        assert ("success", ["Bearer whole"], []) == (done.ended, seen, failures)


def test_connection_whose_close_got_lost_is_closed_all_the_same() -> None:
    with Stepped(Plugin(prefetch=(), warm=lambda facts: REPLACED)) as stepped:
        peer = stepped.loop._peers[stepped.theirs.fileno()]
        peer.connection.gone()
        peer.connection.actions.clear()
        stepped.loop._on_fault(peer, MemoryError())

        assert 0 == stepped.loop.stats().connections


def test_event_that_comes_between_the_last_look_and_the_close_sees_an_end_of_file() -> None:
    with Stepped(Plugin(prefetch=(), warm=lambda facts: REPLACED)) as stepped:
        peer = stepped.loop._peers[stepped.theirs.fileno()]
        stepped.ours.sendall(KongSide().begin(stepped.instance_id))
        stepped.loop._drop(peer)

        # Kong repeats it, at whoever has the path by then.
        assert b"" == stepped.ours.recv(10)


def test_loop_that_gives_up_resets_what_is_in_mid_event() -> None:
    with Stepped(Plugin()) as stepped:
        stepped.ours.sendall(KongSide().begin(stepped.instance_id))
        stepped.loop._step()
        assert stepped.ours.recv(65536)
        stepped.loop.close()

        with pytest.raises(ConnectionResetError):
            stepped.ours.recv(10)


def test_what_comes_for_an_event_that_is_over_is_dropped() -> None:
    with Stepped(Plugin(prefetch=(), warm=lambda facts: REFUSED)) as stepped:
        peer = stepped.loop._peers[stepped.theirs.fileno()]
        stepped.ours.sendall(KongSide().begin(stepped.instance_id))
        stepped.loop._step()
        peer.connection.actions.append(Deliver(b"late"))
        stepped.loop._act(peer)
        # A fault after the exit: nothing follows an exit.
        stepped.loop._on_fault(peer, RuntimeError())
        side = KongSide()
        side.receive(stepped.ours.recv(65536))

        assert 401 == status_of(side.done)
        stepped.ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            stepped.ours.recv(1)


def test_a_signal_wakes_the_loop_through_its_descriptor(server: Running) -> None:
    woken = threading.Event()
    server.loop._posts.append(woken.set)
    os.write(server.loop.wake_fd(), b"\0")

    assert woken.wait(WAIT_S)


def test_idle_threads_are_let_go(script: Scripted, server: Running) -> None:
    script.access["Bearer cold"] = lambda kong: None
    instance_id = server.kong.start({})
    assert "success" == ask(server, instance_id, "Bearer cold").ended
    assert 1 == server.loop.stats().threads
    server.loop.post(Idle())

    eventually(lambda: server.loop.stats().threads == 0)
    assert "success" == ask(server, instance_id, "Bearer cold").ended


def test_thread_that_goes_on_after_its_client_left_is_replaced_and_nobody_timed_out(
    script: Scripted, tmp_path: Path
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def run(kong: Kong) -> None:
        entered.set()
        assert leave.wait(WAIT_S)

    script.access["Bearer hang"] = run
    with Running(script.plugin(), tmp_path, threads=1, deadline_s=0.2) as server:
        instance_id = server.kong.start({})
        sock, side = server.kong.connect(), KongSide([Step(HEADER, reply="Bearer hang")])
        sock.sendall(side.begin(instance_id))
        sock.sendall(side.receive(sock.recv(65536)))
        assert entered.wait(WAIT_S)
        sock.close()

        eventually(lambda: server.loop.stats().lost_threads == 1)
        assert 0 == server.loop.stats().timed_out
        leave.set()
        eventually(lambda: server.loop.stats().lost_threads == 0)


# --- stopping -------------------------------------------------------------------------


def test_stop_lets_running_events_end_and_refuses_new_connections(script: Scripted, server: Running) -> None:
    entered, leave = threading.Event(), threading.Event()

    def run(kong: Kong) -> None:
        entered.set()
        assert leave.wait(WAIT_S)
        kong.service.request.set_header("authorization", "Bearer NEW")

    script.access["Bearer cold"] = run
    instance_id = server.kong.start({})
    idle = server.kong.connect()
    results: list[Done] = []
    thread = threading.Thread(target=lambda: results.append(ask(server, instance_id, "Bearer cold")))
    thread.start()
    assert entered.wait(WAIT_S)
    server.loop.request_stop()

    assert b"" == idle.recv(1)
    idle.close()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as late, pytest.raises(ConnectionRefusedError):
        late.connect(server.path)
    assert server.thread.is_alive()
    leave.set()
    thread.join(WAIT_S)
    server.thread.join(WAIT_S)

    assert ("success", [NEW]) == (results[0].ended, results[0].calls[1:])
    assert not server.thread.is_alive()


def test_stop_does_not_wait_for_ever(script: Scripted, tmp_path: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    def run(kong: Kong) -> None:
        entered.set()
        assert leave.wait(WAIT_S)

    script.access["Bearer hang"] = run
    with Running(script.plugin(), tmp_path, drain_s=0.05) as server:
        instance_id = server.kong.start({})
        results: list[Done] = []
        thread = threading.Thread(target=lambda: results.append(ask(server, instance_id, "Bearer hang")))
        thread.start()
        assert entered.wait(WAIT_S)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < WAIT_S / 2
        thread.join(WAIT_S)
        leave.set()

    assert "closed" == results[0].ended


def test_event_that_came_just_before_the_stop_is_served(script: Scripted) -> None:
    server = Running(script.plugin(), None)
    ours, theirs = socket.socketpair()
    ours.settimeout(WAIT_S)
    server.loop.adopt(theirs)
    instance_id = server.loop._host.registry.start("test-plugin", b"{}").instance_id
    side = KongSide([Step(HEADER, reply="Bearer good")])
    ours.sendall(side.begin(instance_id))
    server.loop.request_stop()
    server.thread.start()
    done = FakeKong("").converse(ours, side)
    server.thread.join(WAIT_S)
    ours.close()

    assert "success" == done.ended


def test_event_that_is_answered_at_once_just_before_the_stop_is_served() -> None:
    with Stepped(Plugin(prefetch=(), warm=lambda facts: proceed())) as stepped:
        stepped.loop._begin_stop(0.0)
        assert 0 == stepped.loop.stats().connections
        ours, theirs = socket.socketpair()
        stepped.loop.adopt(theirs)
        side = KongSide()
        ours.sendall(side.begin(stepped.instance_id))
        stepped.loop._begin_stop(0.0)
        with ours:
            side.receive(ours.recv(65536))

        assert 0 == stepped.loop.stats().connections
        assert "success" == side.done.ended


# --- over time ------------------------------------------------------------------------


def test_gw_12_nothing_is_left_behind_after_many_events_of_every_kind(
    script: Scripted, server: Running
) -> None:
    def fail(kong: Kong) -> None:
        raise ValueError

    script.access["Bearer cold"] = lambda kong: kong.log.info("x")
    script.access["Bearer fail"] = fail
    instance_id = server.kong.start({})
    chance = random.Random(5)
    kinds = {"good": "success", "refused": "exit", "broken": "exit", "cold": "success", "fail": "exit"}
    for _ in range(600):
        kind = chance.choice([*kinds, "gone"])
        if kind == "gone":
            sock = server.kong.connect()
            sock.sendall(KongSide().begin(instance_id)[: chance.randrange(1, 20)])
            sock.close()
        else:
            assert kinds[kind] == ask(server, instance_id, f"Bearer {kind}").ended
    server.kong.__exit__()
    eventually(lambda: server.loop.stats().connections == 0)
    stats = server.loop.stats()

    assert (0, 0) == (stats.busy, stats.lost_threads)
    assert stats.threads <= 2
    eventually(lambda: not server.loop._lingering)
    assert not [item for item in server.loop._deadlines if not item[1].ended]


def test_prefetch_of_several_facts_over_the_socket(tmp_path: Path) -> None:
    seen: list[Any] = []

    def warm(facts: Facts) -> Outcome:
        seen.append(list(facts))
        return proceed()

    prefetch = (
        AUTHORIZATION,
        Fetch("kong.nginx.get_var", "http_connection"),
        Fetch("kong.request.get_raw_query"),
    )
    with Running(Plugin(prefetch=prefetch, warm=warm), tmp_path) as server:
        instance_id = server.kong.start({})
        done = server.kong.event(
            instance_id,
            Step(HEADER, "authorization", "Bearer x"),
            Step("kong.nginx.get_var", "http_connection", "close"),
            Step("kong.request.get_raw_query", reply="a=1"),
        )

    assert "success" == done.ended
    assert [["Bearer x", "close", "a=1"]] == seen


def test_frame_announced_and_never_sent_holds_nothing(server: Running) -> None:
    sock = server.kong.connect()
    sock.sendall(struct.pack("<I", 4_000_000) + b"x")
    assert_serves(server, server.kong.start({}))
    sock.close()
    eventually(lambda: server.loop.stats().connections == 1)

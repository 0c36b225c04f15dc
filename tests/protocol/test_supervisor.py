"""
Several workers behind one path, as real processes.
"""

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kong_token_exchange.pluginserver import supervisor as supervisor_module
from kong_token_exchange.pluginserver.parent import Parent
from kong_token_exchange.pluginserver.ready import is_ready
from kong_token_exchange.pluginserver.server import SocketPath, make_loop
from kong_token_exchange.pluginserver.supervisor import (
    MAX_RESTART_DELAY_S,
    MAX_START_DELAY_S,
    MAX_WORKERS,
    STABLE_S,
    START_ATTEMPTS,
    STUCK_S,
    UNTAKEN_S,
    Slot,
    Supervisor,
    Worker,
    WorkerLoop,
    run_worker,
    serve_workers,
)
from tests.support.fake_kong import Done, FakeKong, KongSide, Step
from tests.support.plugins import Plugin
from tests.support.running import WAIT_S, eventually

# Python 3.12 and later warn of any fork beside threads, and other tests have some.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, logging, os, signal, sys, time
from pathlib import Path
from kong_token_exchange.pluginserver.contract import Calls, Fetch, proceed
from kong_token_exchange.pluginserver.supervisor import serve_workers

options = json.loads(sys.argv[1])
folder, failures = Path(options.pop("folder")), options.pop("failures", 0)
logging.basicConfig(stream=sys.stderr, level="INFO")

class Instance:
    prefetch = (Fetch("kong.request.get_header", "authorization"),)

    def __init__(self, audience):
        self.audience = audience
        self.ready = proceed(Calls().set_header("x-process", str(os.getpid())).set_header("x-aud", audience))

    def warm(self, facts):
        if facts[0] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        while facts[0] == "spin":
            pass
        return self.ready if facts[0] == "warm" else None

    def access(self, kong):
        print("entered", flush=True)
        time.sleep(float(kong.request.get_path()))
        kong.service.request.set_header("x-process", str(os.getpid()))

    def close(self):
        pass

class Plugin:
    name, version, priority, phases, schema = "test-plugin", "1", 1, ("access",), {}

    def start(self, config):
        return Instance(config["audience"])

def make_plugin():
    with (folder / "made").open("a") as made:
        made.write(f"{os.getpid()} {time.monotonic()}\\n")
    if len((folder / "made").read_text().splitlines()) <= failures:
        raise OSError("no such thing")
    return Plugin()

sys.exit(serve_workers(make_plugin, threads=2, ready=lambda: print("ready", flush=True), **options))
"""

# Started by a process that can be killed, and telling its id first.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]])
print(child.pid, flush=True)
time.sleep(60)
"""


class Server:
    """A supervisor in a process of its own."""

    def __init__(
        self, folder: Path, *, workers: int = 2, under_a_parent: bool = False, **options: Any
    ) -> None:
        self.folder = folder
        self.path = folder / "s"
        values = {"folder": str(folder), "socket_path": str(self.path), "workers": workers, **options}
        arguments = [PROGRAM, json.dumps(values)]
        if under_a_parent:
            arguments = [PARENT, *arguments]
        self.errors = (folder / "stderr").open("a+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", *arguments],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            cwd=ROOT,
            text=True,
        )
        self.pid = int(self.line()) if under_a_parent else self.process.pid
        self.kongs: list[FakeKong] = []

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def kong(self) -> FakeKong:
        self.kongs.append(FakeKong(str(self.path)))
        return self.kongs[-1]

    def started(self) -> list[tuple[int, float]]:
        lines = (self.folder / "made").read_text().splitlines()
        return [(int(line.split()[0]), float(line.split()[1])) for line in lines]

    def log(self) -> str:
        return (self.folder / "stderr").read_text()

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)

    def close(self) -> None:
        for kong in self.kongs:
            kong.__exit__()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(WAIT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.errors.close()


Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    servers: list[Server] = []

    def make(folder: str = "", *, ready: bool = True, **options: Any) -> Server:
        (tmp_path / folder).mkdir(exist_ok=True)
        servers.append(Server(tmp_path / folder, **options))
        if ready:
            assert "ready\n" == servers[-1].line(), servers[-1].log()
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def ask(kong: FakeKong, instance_id: int) -> tuple[int, str]:
    """Run a warm event; return the worker's process id and the audience of the instance."""
    done = kong.event(instance_id, headers={"authorization": "warm"})
    assert "success" == done.ended
    headers = dict(done["kong.service.request.set_header"])
    return int(headers["x-process"]), headers["x-aud"]


def spread(server: Server, workers: int) -> dict[int, FakeKong]:
    """Connect until each worker holds a connection; return one for each process id."""
    found: dict[int, FakeKong] = {}

    def connect() -> bool:
        kong = server.kong()
        found.setdefault(ask(kong, kong.start({"audience": "spread"}))[0], kong)
        return len(found) == workers

    eventually(connect)
    return found


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    # One whose new parent does not reap it is dead all the same.
    return stat.rpartition(")")[2].split()[0] != "Z"


# --- instances and connections --------------------------------------------------------


def test_every_worker_resolves_every_id_to_its_own_configuration(start: Start) -> None:
    kongs = spread(start(workers=3), 3)
    audiences = [f"audience-{number}" for number in range(6)]
    ids = {}
    for audience, kong in zip(audiences, [*kongs.values()] * 2, strict=True):
        ids[audience] = kong.start({"audience": audience})

    assert 6 == len(set(ids.values()))
    for pid, kong in kongs.items():
        for audience, instance_id in ids.items():
            assert (pid, audience) == ask(kong, instance_id)
            assert instance_id == kong.start({"audience": audience}, seq=2)


def test_connection_goes_to_the_worker_that_holds_the_fewest(start: Start) -> None:
    server = start(workers=3)
    spread(server, 3)
    instance_id = server.kongs[0].start({"audience": "a"})
    while len(server.kongs) < 30 or len(server.kongs) % 3:
        ask(server.kong(), instance_id)
    by_pid: dict[int, list[FakeKong]] = {}
    for kong in server.kongs:
        by_pid.setdefault(ask(kong, instance_id)[0], []).append(kong)
    assert [len(server.kongs) // 3] * 3 == [len(kongs) for kongs in by_pid.values()]

    freed, kongs = by_pid.popitem()
    for kong in kongs:
        kong.__exit__()

    def new_ones_go_there() -> bool:
        fresh = [FakeKong(str(server.path)) for _ in range(8)]
        pids = Counter(ask(kong, instance_id)[0] for kong in fresh)
        for kong in fresh:
            kong.__exit__()
        return pids == {freed: 8}

    eventually(new_ones_go_there)


def test_plugin_is_made_after_the_fork_once_for_each_worker(start: Start) -> None:
    server = start(workers=2)
    kongs = spread(server, 2)

    assert sorted(kongs) == sorted(pid for pid, _ in server.started())
    assert server.pid not in kongs


def test_connection_that_no_worker_can_take_waits_and_is_not_closed(tmp_path: Path) -> None:
    ready = threading.Event()
    supervisor = Supervisor(
        partial(run_worker, Plugin, threads=1),
        lambda: SocketPath(tmp_path / "s"),
        workers=2,
        max_connections=1,
        ready=ready.set,
    )
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    assert ready.wait(WAIT_S)
    with FakeKong(str(tmp_path / "s")) as first, FakeKong(str(tmp_path / "s")) as second:
        instance_id = first.start({})
        assert instance_id == second.start({})
        third = second.connect()
        third.sendall(KongSide().begin(instance_id))
        assert [] == select.select([third], [], [], 0.2)[0]
        first.__exit__()
        assert third.recv(65536)
        third.close()
    supervisor.request_stop()
    thread.join(WAIT_S)

    assert not thread.is_alive()
    assert [] == list(tmp_path.iterdir())


# --- death ----------------------------------------------------------------------------


# The gateway of the tests does not close a socket that breaks while it writes.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_killed_worker_is_replaced_while_the_others_serve_and_ids_live_on(start: Start) -> None:
    server = start(workers=2)
    kongs = spread(server, 2)
    (victim, hit), (survivor, other) = kongs.items()
    instance_id = hit.start({"audience": "of the dead"})

    killed_at = time.monotonic()
    assert "reset" == hit.event(instance_id, headers={"authorization": "die"}).ended
    for _ in range(20):
        assert (survivor, "of the dead") == ask(other, instance_id)
    eventually(lambda: len(server.started()) == 3)
    replacement, started_at = server.started()[-1]

    # 2 s on a machine of its own; it is replaced without any pause.
    assert WAIT_S > started_at - killed_at
    assert replacement not in (victim, survivor)

    def reach() -> bool:
        try:
            return ask(server.kong(), instance_id) == (replacement, "of the dead")
        except (OSError, AssertionError):
            return False

    eventually(reach)
    assert not is_running(victim)


# The gateway of the tests does not close a socket that breaks while it writes.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ids_outlive_all_the_workers_that_knew_them(start: Start) -> None:
    server = start(workers=2)
    kong = server.kong()
    ids = {name: kong.start({"audience": name}) for name in ("a", "b")}

    def answer(instance_id: int) -> Done | None:
        # One that went to a dying worker is closed, and Kong repeats it.
        try:
            done = server.kong().event(instance_id, headers={"authorization": "warm"})
        except OSError:
            return None
        return done if done.ended == "success" else None

    for _ in range(4):
        with contextlib.suppress(OSError):
            server.kong().event(ids["a"], headers={"authorization": "die"})
        for name, instance_id in ids.items():
            done = eventually(partial(answer, instance_id))
            assert name == dict(done["kong.service.request.set_header"])["x-aud"]
    assert 3 <= len(server.started())
    assert server.process.poll() is None


# The gateway of the tests does not close a socket that breaks while it writes.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_gw_16_no_event_sees_the_other_configuration_while_workers_are_killed_under_load(
    start: Start,
) -> None:
    server = start(workers=2)
    stop = threading.Event()
    seen: Counter[str] = Counter()

    def load(audience: str) -> None:
        kong = FakeKong(str(server.path))
        while not stop.is_set():
            try:
                instance_id = kong.start({"audience": audience})
                for _ in range(20):
                    done = kong.event(instance_id, headers={"authorization": "warm"})
                    headers = dict(done["kong.service.request.set_header"])
                    seen[done.ended if headers.get("x-aud", audience) == audience else "wrong"] += 1
            except (OSError, AssertionError):
                seen["refused"] += 1
        kong.__exit__()

    threads = [threading.Thread(target=load, args=(audience,)) for audience in ("a", "b", "a", "b")]
    for thread in threads:
        thread.start()

    def await_successes() -> None:
        wanted = seen["success"] + 50
        eventually(lambda: seen["success"] > wanted)

    def await_workers(number: int) -> None:
        eventually(lambda: len(server.started()) == number)

    try:
        for number in range(8):
            await_successes()
            os.kill(next(pid for pid, _ in server.started() if is_running(pid)), signal.SIGKILL)
            await_workers(3 + number)
        await_successes()
    finally:
        stop.set()
        for thread in threads:
            thread.join(WAIT_S)

    assert 0 == seen["wrong"]
    assert 10 == len(server.started())
    assert 0 == server.end()


def test_stopped_worker_gets_no_connection_and_is_replaced(start: Start) -> None:
    server = start(workers=2)
    kongs = spread(server, 2)
    (victim, hit), (survivor, _) = kongs.items()
    instance_id = hit.start({"audience": "a"})
    waiting = hit.take()
    waiting.sendall(KongSide().begin(instance_id))
    os.kill(victim, signal.SIGSTOP)
    stopped_at = time.monotonic()
    # Half of these go there. It does not take them, and is given no others.
    lost = [server.kong().connect() for _ in range(4)]
    time.sleep(UNTAKEN_S + 0.1)
    while len(server.started()) == 2 and time.monotonic() < stopped_at + 2 * WAIT_S:
        assert (survivor, "a") == ask(server.kong(), instance_id)
        time.sleep(0.05)

    # 5.5 s on a machine of its own; its last report may have been up to a second before.
    assert STUCK_S <= time.monotonic() - stopped_at + 1.0 < 2 * WAIT_S
    # What was under way there ends, which makes Kong ask another or answer 500.
    waiting.settimeout(WAIT_S)
    with contextlib.suppress(ConnectionResetError):
        while waiting.recv(65536):
            pass
    for sock in (waiting, *lost):
        sock.close()
    assert not is_running(victim)
    assert f"worker {victim} does not answer" in server.log()


def test_worker_whose_warm_never_ends_is_replaced_and_tells_where_it_was(start: Start) -> None:
    server = start(workers=2)
    kongs = spread(server, 2)
    (victim, hit), (survivor, other) = kongs.items()
    instance_id = hit.start({"audience": "a"})
    began = time.monotonic()
    assert "reset" == hit.event(instance_id, headers={"authorization": "spin"}).ended

    # Its last report may have been up to a second before.
    assert STUCK_S <= time.monotonic() - began + 1.0
    assert (survivor, "a") == ask(other, instance_id)
    assert eventually(lambda: len(server.started()) == 3)
    assert not is_running(victim)
    assert "in warm" in server.log()


def test_pause_of_the_supervisor_is_no_silence_of_its_workers(start: Start) -> None:
    server = start(workers=2)
    kongs = spread(server, 2)
    os.kill(server.pid, signal.SIGSTOP)
    time.sleep(STUCK_S + 1.0)
    for pid in kongs:
        os.kill(pid, signal.SIGSTOP)
    os.kill(server.pid, signal.SIGCONT)
    time.sleep(1.0)
    for pid in kongs:
        os.kill(pid, signal.SIGCONT)

    instance_id = server.kongs[0].start({"audience": "a"})
    assert set(kongs) == {ask(kong, instance_id)[0] for kong in kongs.values()}
    assert 2 == len(server.started())


def test_worker_that_does_not_become_ready_is_killed_in_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kong_token_exchange.pluginserver.supervisor.START_LIMIT_S", 0.1)
    made = tmp_path / "made"

    def hang(control: socket.socket, journal: object) -> None:
        with made.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(60)

    supervisor = Supervisor(hang, lambda: SocketPath(tmp_path / "s"), workers=1)
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    eventually(lambda: made.exists() and len(made.read_text().splitlines()) > 1)
    supervisor.request_stop()
    thread.join(WAIT_S)

    assert not thread.is_alive()
    assert not any(map(is_running, map(int, made.read_text().splitlines())))


def test_workers_end_when_the_supervisor_is_killed(start: Start) -> None:
    server = start(workers=3)
    pids = list(spread(server, 3))
    assert -signal.SIGKILL == server.end(signal.SIGKILL)

    eventually(lambda: not any(map(is_running, pids)))


def test_worker_that_cannot_start_is_tried_again_after_growing_pauses(start: Start) -> None:
    server = start(workers=2, failures=4)
    assert {"a"} == {ask(server.kong(), server.kong().start({"audience": "a"}))[1] for _ in range(3)}
    eventually(lambda: len(server.started()) == 6)
    times = [at for _, at in server.started()]

    # Two places: two first tries, two after 0.2 s, two after 0.4 s more.
    assert 0.2 <= min(times[2:4]) - min(times[:2])
    assert 0.6 <= min(times[4:]) - min(times[:2])
    assert 4 == server.log().count("a worker could not run: no such thing")


def test_server_that_cannot_start_gives_up_and_leaves_the_running_one_its_path(start: Start) -> None:
    running = start(workers=2)
    spread(running, 2)
    (running.folder / "made").unlink()
    second = start(workers=2, failures=1000, ready=False)

    assert 1 == second.process.wait(3 * WAIT_S)
    assert "" == second.line()
    # One place may get ahead of the other.
    assert 2 * START_ATTEMPTS <= len(second.started()) <= 2 * START_ATTEMPTS + 2
    kong = running.kong()
    assert "a" == ask(kong, kong.start({"audience": "a"}))[1]


# --- generations and the end ----------------------------------------------------------


def test_two_generations_live_side_by_side(start: Start) -> None:
    old = start(workers=2)
    old_kongs = spread(old, 2)
    new = start(workers=2)
    new_kongs = spread(new, 2)
    assert not set(old_kongs) & set(new_kongs)
    instance_id = next(iter(old_kongs.values())).start({"audience": "a"})
    assert {(pid, "a") for pid in old_kongs} == {ask(kong, instance_id) for kong in old_kongs.values()}

    assert 0 == old.end()
    assert new.path.exists()
    assert is_ready(new.path, WAIT_S)
    kong = new.kong()
    assert instance_id == kong.start({"audience": "a"})
    assert ask(kong, instance_id)[0] in new_kongs
    assert 0 == new.end()
    assert not new.path.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_running_events_end_and_leaves_nothing(start: Start, number: int) -> None:
    server = start(workers=2)
    kongs = spread(server, 2)
    kong = next(iter(kongs.values()))
    instance_id = kong.start({"audience": "a"})
    sock, side = kong.take(), KongSide([Step("kong.request.get_header", reply="cold")])
    sock.sendall(side.begin(instance_id))
    sock.sendall(side.receive(sock.recv(65536)))
    side._steps = [Step("kong.request.get_path", reply="0.3")]
    sock.sendall(side.receive(sock.recv(65536)))
    assert "entered\n" == server.line()
    server.process.send_signal(number)
    done = kong.converse(sock, side)

    assert "success" == done.ended
    assert 0 == server.process.wait(WAIT_S)
    assert not any(map(is_running, kongs))
    assert not server.path.exists()


def test_worker_that_hangs_at_the_end_is_killed_in_bounded_time(tmp_path: Path) -> None:
    def hang(control: socket.socket, journal: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        control.send(bytes(16))
        while True:
            time.sleep(60)

    supervisor = Supervisor(
        hang,
        lambda: SocketPath(tmp_path / "s"),
        workers=2,
        ready=lambda: supervisor.request_stop(),  # noqa: PLW0108 - it has no name before
        drain_limit_s=0.1,
    )

    assert 0 == supervisor.run()
    assert [] == list(tmp_path.iterdir())


# --- the parent -----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_server_ends_with_its_parent_when_told_to(start: Start, workers: int) -> None:
    server = start(workers=workers, ready=False, under_a_parent=True, exit_with_parent=True)
    assert "ready\n" == server.line()
    server.end(signal.SIGKILL)

    eventually(lambda: not is_running(server.pid))
    assert not any(is_running(pid) for pid, _ in server.started())
    assert not server.path.exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_server_outlives_its_parent_unless_told_otherwise(start: Start, workers: int) -> None:
    server = start(workers=workers, ready=False, under_a_parent=True)
    assert "ready\n" == server.line()
    server.end(signal.SIGKILL)

    time.sleep(1.2)  # longer than it takes to look for the parent
    try:
        assert is_running(server.pid)
        assert is_ready(server.path, WAIT_S)
    finally:
        os.kill(server.pid, signal.SIGTERM)
    eventually(lambda: not is_running(server.pid))


# --- numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, -1, MAX_WORKERS + 1])
def test_numbers_of_workers_that_make_no_sense_are_refused(tmp_path: Path, workers: int) -> None:
    with pytest.raises(ValueError, match="workers must be"):
        serve_workers(Plugin, workers=workers, socket_path=tmp_path / "s")
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize("workers", [1, 2])
def test_path_that_cannot_be_bound_is_refused_and_leaves_no_worker(tmp_path: Path, workers: int) -> None:
    made = tmp_path / "made"

    def make_plugin() -> Plugin:
        with made.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return Plugin()

    with pytest.raises(OSError):
        serve_workers(make_plugin, workers=workers, socket_path=tmp_path / "none" / "s", threads=1)
    pids = {int(line) for line in made.read_text().splitlines()} - {os.getpid()}
    assert bool(pids) == (workers > 1)
    assert not any(map(is_running, pids))


def test_socket_has_its_mode_and_group(start: Start) -> None:
    group = os.getgid()
    status = start(workers=2, socket_mode=0o660, socket_group=str(group)).path.lstat()

    assert (0o660, group) == (status.st_mode & 0o777, status.st_gid)


def test_group_is_given_before_anybody_can_connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("os.chown", lambda path, *ids: given.append((Path(path).exists(), *ids)))
    monkeypatch.setattr("grp.getgrnam", lambda name: type("Group", (), {"gr_gid": {"kong": 4242}[name]}))
    SocketPath(tmp_path / "s", 0o660, "kong").socket.close()

    assert [(True, -1, 4242)] == given
    with pytest.raises(ValueError, match="no such group: stranger"):
        SocketPath(tmp_path / "t", 0o660, "stranger")
    assert [tmp_path / "s"] == list(tmp_path.iterdir())


# --- pauses ---------------------------------------------------------------------------


def dead(*, ready: bool, started_at: float = 0.0) -> Worker:
    worker = Worker(1, socket.socket(), started_at)
    worker.control.close()
    worker.is_ready = ready
    return worker


def test_worker_that_had_been_ready_is_replaced_at_once_then_after_pauses_of_at_most_a_second() -> None:
    slot, pauses = Slot(), []
    for _ in range(8):
        slot.fell_vacant(dead(ready=True), 1.0)
        pauses.append(slot.start_at - 1.0)

    assert 0.0 == pauses[0]
    assert sorted(pauses) == pauses
    assert pytest.approx(MAX_RESTART_DELAY_S) == pauses[-1]
    slot.fell_vacant(dead(ready=True, started_at=100.0), 100.0 + STABLE_S)
    assert 100.0 + STABLE_S == slot.start_at


def test_worker_that_never_was_ready_is_tried_after_pauses_that_grow_further() -> None:
    slot, pauses = Slot(), []
    for _ in range(12):
        slot.fell_vacant(dead(ready=False), 0.0)
        pauses.append(slot.start_at)

    assert [0.2, 0.4, 0.8] == pauses[:3]
    assert MAX_START_DELAY_S == pauses[-1]
    slot.fell_vacant(dead(ready=True), 0.0)
    assert (0, 0.0) == (slot.failed_starts, slot.start_at)


def test_load_counts_connections_under_way_and_reports_that_were_missed() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    worker = Worker(1, ours, 0.0)
    with socket.socket() as connection:
        assert [True] * 3 == [worker.pass_on(connection) for _ in range(3)]
    assert (3, False) == (worker.load, worker.is_ready)
    theirs.send((2).to_bytes(8, sys.byteorder) + (1).to_bytes(8, sys.byteorder))
    worker.read_reports()
    assert (2, True, False) == (worker.load, worker.is_ready, worker.gone)
    theirs.close()
    worker.read_reports()
    assert worker.gone
    with socket.socket() as connection:
        assert not worker.pass_on(connection)
    ours.close()


# --- one step at a time ---------------------------------------------------------------


class Steps:
    """A supervisor that is not running, with one worker that the test plays."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kong_token_exchange.pluginserver.supervisor._exit_status", lambda pid, **_: None)
        monkeypatch.setattr("os.kill", lambda *arguments: self.killed.append(arguments))
        self.killed: list[tuple[int, ...]] = []
        self.supervisor = Supervisor(
            lambda control, journal: None, lambda: SocketPath(folder / "s"), workers=1, drain_limit_s=-1.0
        )
        ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.theirs.setblocking(False)
        ours.setblocking(False)
        self.worker = Worker(4321, ours, 0.0)
        self.worker.is_ready = True
        self.supervisor._slots[0].worker = self.worker

    def close(self) -> None:
        self.supervisor._drain()
        self.supervisor._close()
        self.theirs.close()


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    made = Steps(tmp_path, monkeypatch)
    yield made
    made.close()


def test_connection_that_a_worker_has_no_room_for_waits_with_the_supervisor(steps: Steps) -> None:
    supervisor, worker = steps.supervisor, steps.worker
    with contextlib.suppress(BlockingIOError):
        while worker.control.send(b"x"):
            pass
    connection, peer = socket.socketpair()
    supervisor._hand_over(connection)
    assert connection in list(supervisor._inherited(worker.control))
    supervisor._step()
    # Still there, and looked at again soon; meanwhile nothing is accepted.
    assert 0.1 > supervisor._timeout()
    supervisor._accept()
    assert -1 != connection.fileno()

    with contextlib.suppress(BlockingIOError):
        while steps.theirs.recv(16):
            pass
    supervisor._step()

    assert -1 == connection.fileno()
    data, fds, _, _ = socket.recv_fds(steps.theirs, 1, 1)
    assert (b"c", 1) == (data, len(fds))
    os.close(fds[0])
    peer.close()


def test_connection_that_still_waits_at_the_end_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(tmp_path, monkeypatch)
    connection, peer = socket.socketpair()
    steps.worker.gone = True
    steps.supervisor._hand_over(connection)
    steps.close()

    assert -1 == connection.fileno()
    peer.close()


@pytest.mark.parametrize(
    ("error", "told"), [(BlockingIOError(), 0), (ConnectionAbortedError(), 0), (OSError("EMFILE"), 1)]
)
def test_accept_that_fails_is_tried_again_later(
    steps: Steps, error: OSError, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def accept() -> tuple[socket.socket, str]:
        calls.append(1)
        raise error

    steps.supervisor._listen()
    listener = steps.supervisor._listener
    assert listener is not None
    listener.socket.close()
    listener.socket = type("Listener", (), {"accept": staticmethod(accept), "close": lambda self: None})()
    steps.supervisor._accept()

    assert [1] == calls
    assert told == sum("accept failed" in record.getMessage() for record in caplog.records)


def test_crowd_is_taken_in_part_by_part(steps: Steps) -> None:
    supervisor = steps.supervisor
    supervisor._listen()
    assert supervisor._listener is not None
    clients = [socket.socket(socket.AF_UNIX) for _ in range(70)]
    for client in clients:
        client.connect(str(supervisor._listener.path))
    supervisor._accept()
    assert 64 == steps.worker.sent
    supervisor._accept()
    assert 70 == steps.worker.sent
    for client in clients:
        client.close()


def test_machine_that_makes_no_process_is_asked_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fork() -> int:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr("os.fork", fork)
    supervisor = Supervisor(
        lambda control, journal: None, lambda: SocketPath(tmp_path / "s"), workers=1, clock=lambda: 5.0
    )
    supervisor._fill_slots()

    assert (None, 5.0 + MAX_RESTART_DELAY_S) == (supervisor._slots[0].worker, supervisor._slots[0].start_at)
    assert "no new worker" in caplog.text
    supervisor._close()


@pytest.mark.parametrize("fault", ["raises", "parent gone"])
def test_worker_that_ends_before_it_serves_is_a_failed_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("kong_token_exchange.pluginserver.supervisor._FIRST_START_DELAY_S", 0.001)
    if fault == "parent gone":
        monkeypatch.setattr(Parent, "is_gone", lambda self: True)

    def work(control: socket.socket, journal: object) -> None:
        raise RuntimeError

    assert 1 == Supervisor(work, lambda: SocketPath(tmp_path / "s"), workers=1).run()
    assert [] == list(tmp_path.iterdir())


def test_nothing_is_served_when_the_parent_has_gone_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Parent, "is_gone", lambda self: True)

    assert 0 == serve_workers(Plugin, workers=1, socket_path=tmp_path / "s", exit_with_parent=True)
    assert [] == list(tmp_path.iterdir())


def test_worker_that_somebody_else_waited_for_is_dead_all_the_same() -> None:
    assert -1 == supervisor_module._exit_status(os.getppid())


def test_signals_are_handed_on_by_the_main_thread_alone(steps: Steps) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    seen: list[Any] = []

    def enter() -> None:
        with steps.supervisor.passing_on(signal.SIGUSR1):
            seen.append(signal.getsignal(signal.SIGUSR1))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(WAIT_S)
    assert [before] == seen
    with steps.supervisor.passing_on(signal.SIGUSR1):
        signal.raise_signal(signal.SIGUSR1)
    assert before is signal.getsignal(signal.SIGUSR1)
    assert [(steps.worker.pid, signal.SIGUSR1)] == steps.killed


@pytest.mark.parametrize("end", ["closed", "reset"])
def test_worker_takes_a_crowd_and_ends_with_its_supervisor(end: str) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pairs = [socket.socketpair() for _ in range(70)]
    for connection, _ in pairs:
        socket.send_fds(ours, [b"c"], [connection.fileno()])
        connection.close()
    loop = make_loop(Plugin(), threads=1, loop_class=partial(WorkerLoop, control=theirs))
    thread = threading.Thread(target=loop.run)
    thread.start()
    supervisor_side = Worker(1, ours, 0.0)
    ours.setblocking(False)

    def taken() -> bool:
        supervisor_side.read_reports()
        return (supervisor_side.taken, supervisor_side.open) == (70, 70)

    eventually(taken)
    if end == "reset":
        # A report that nobody has read when the other end closes.
        pairs[0][1].close()
        eventually(lambda: select.select([ours], [], [], 0)[0])
    ours.close()
    thread.join(WAIT_S)

    assert not thread.is_alive()
    for _, peer in pairs:
        peer.close()
    theirs.close()


# --- the page for plugin authors ------------------------------------------------------


def test_example_of_the_documentation_runs_as_it_stands(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "plugin-server.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    program = tmp_path / "doorman.py"
    program.write_text("\n".join(blocks[:2]))
    path = tmp_path / "s"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    described = subprocess.check_output([sys.executable, program, "describe"], env=environment)
    assert "doorman" == json.loads(described)["Plugins"][0]["Name"]

    with subprocess.Popen([sys.executable, program, path], env=environment) as process:
        try:
            eventually(lambda: is_ready(path))
            with FakeKong(str(path), plugin="doorman") as kong:
                instance_id = kong.start({"guests": {"k1": "Ada"}})
                known = kong.event(instance_id, headers={"x-key": "k1"})
                stranger = kong.event(instance_id, headers={"x-key": "k2"})
        finally:
            process.terminate()
    assert [("x-guest", "Ada")] == known["kong.service.request.set_header"]
    assert "success" == known.ended
    assert stranger.exit is not None
    assert (403, b'{"error":"stranger"}') == (stranger.exit.status, stranger.exit.body)
    assert 0 == process.returncode
    # The third one runs in test_parking.py.
    assert 3 == len(blocks)
    assert 20 >= sum(1 for line in blocks[0].splitlines() if line.strip())

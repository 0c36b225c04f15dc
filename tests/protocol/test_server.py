"""
The socket's path, the process around the loop, and signals.
"""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kong_token_exchange.pluginserver.faults import make_faults
from kong_token_exchange.pluginserver.loop import Loop
from kong_token_exchange.pluginserver.server import SocketPath, make_loop, serve
from tests.support.fake_kong import FakeKong, KongSide, Step
from tests.support.plugins import Plugin
from tests.support.running import WAIT_S, eventually

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
from kong_token_exchange.pluginserver.contract import Calls, Fetch, proceed
from kong_token_exchange.pluginserver.loop import Loop
from kong_token_exchange.pluginserver.server import serve

class Instance:
    prefetch = (Fetch("kong.request.get_header", "authorization"),)

    def warm(self, facts):
        return proceed(Calls().set_header("x-process", sys.argv[2])) if facts[0] == "warm" else None

    def access(self, kong):
        import os, signal, time
        if kong.request.get_header("authorization") == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        print("entered", flush=True)
        time.sleep(float(kong.request.get_path()))
        kong.service.request.set_header("x-process", sys.argv[2])

    def close(self):
        pass

class Plugin:
    name, version, priority, phases, schema = "test-plugin", "1", 1, ("access",), {}

    def start(self, config):
        return Instance()

sys.exit(serve(Plugin(), socket_path=sys.argv[1], threads=2, ready=lambda: print("ready", flush=True)))
"""


class Process:
    def __init__(self, path: Path, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(path), name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        assert "ready\n" == self.line()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(WAIT_S)
        self.close()
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(WAIT_S)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "token-exchange.socket"


@pytest.fixture
def process(path: Path) -> Iterator[Process]:
    started = Process(path, "first")
    yield started
    started.close()


# --- the path -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_socket_has_its_mode_and_accepts_at_once(path: Path, mode: int) -> None:
    listener = SocketPath(path, mode)
    status = path.lstat()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(path))
    listener.socket.close()

    assert stat.S_ISSOCK(status.st_mode)
    assert mode == stat.S_IMODE(status.st_mode)
    assert [path] == list(path.parent.iterdir())
    listener.remove()
    assert [] == list(path.parent.iterdir())


def test_gw_13_socket_is_for_its_owner_alone_unless_said_otherwise(path: Path) -> None:
    listener = SocketPath(path)
    listener.socket.close()

    assert 0o600 == stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize("kind", ["socket", "file", "dangling link"])
def test_what_is_at_the_path_is_replaced(path: Path, kind: str) -> None:
    old = None
    match kind:
        case "socket":
            old = SocketPath(path)
        case "file":
            path.write_text("x")
        case _:
            path.symlink_to("nowhere")
    new = SocketPath(path)
    if old is not None:
        old.remove()
        old.socket.close()

    assert stat.S_ISSOCK(path.lstat().st_mode)
    assert new.is_current()
    assert old is None or not old.is_current()
    new.remove()
    assert not new.is_current()
    new.remove()
    new.socket.close()
    assert not path.exists()


def test_rest_of_a_killed_process_of_the_same_id_is_no_hindrance(path: Path) -> None:
    Path(f"{path}.{os.getpid()}").write_text("x")
    listener = SocketPath(path)
    listener.socket.close()

    assert [path] == list(path.parent.iterdir())


def test_path_that_is_too_long_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="longer than"):
        SocketPath(tmp_path / ("x" * 100))


def test_path_in_no_directory_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        SocketPath(tmp_path / "none" / "s")


# --- the process ----------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_process_with_status_zero_and_removes_the_path(
    path: Path, process: Process, number: int
) -> None:
    with FakeKong(str(path)) as kong:
        assert "success" == kong.event(kong.start({}), headers={"authorization": "warm"}).ended

        assert 0 == process.end(number)
    assert not path.exists()


def test_signal_lets_the_running_event_end(path: Path, process: Process) -> None:
    kong = FakeKong(str(path))
    instance_id = kong.start({})
    sock, side = kong.take(), KongSide([Step("kong.request.get_header", reply="cold")])
    sock.sendall(side.begin(instance_id))
    sock.sendall(side.receive(sock.recv(65536)))
    side._steps = [Step("kong.request.get_path", reply="0.3")]
    sock.sendall(side.receive(sock.recv(65536)))
    assert "entered\n" == process.line()
    process.process.send_signal(signal.SIGTERM)
    done = kong.converse(sock, side)
    kong.__exit__()

    assert "success" == done.ended
    assert [("x-process", "first")] == done["kong.service.request.set_header"]
    assert 0 == process.wait()


def test_two_generations_live_side_by_side(path: Path, process: Process) -> None:
    old_kong = FakeKong(str(path))
    instance_id = old_kong.start({})
    second = Process(path, "second")
    new_kong = FakeKong(str(path))
    assert instance_id == new_kong.start({})
    for kong, name in ((old_kong, "first"), (new_kong, "second"), (old_kong, "first")):
        done = kong.event(instance_id, headers={"authorization": "warm"})
        assert [("x-process", name)] == done["kong.service.request.set_header"]

    assert 0 == process.end()
    assert path.exists()
    done = old_kong.event(instance_id, headers={"authorization": "warm"})
    assert [("x-process", "second")] == done["kong.service.request.set_header"]
    for kong in (old_kong, new_kong):
        kong.__exit__()
    assert 0 == second.end()
    assert not path.exists()


def test_fault_81_a_kill_resets_the_connections_whose_events_wait(path: Path, process: Process) -> None:
    # Kong starts an instance anew after an end of file, and only then; over a pooled connection that
    # has died as well, that start would leave a claim which holds up everybody for 10 s.
    with FakeKong(str(path)) as kong:
        instance_id = kong.start({})
        waiting = []
        for number in range(2):
            sock = kong.connect()
            # A connection that has served before is no different.
            for _ in range(10 * number):
                kong.pool.append(sock)
                assert "success" == kong.event(instance_id, headers={"authorization": "warm"}).ended
                assert sock is kong.pool.pop()
            steps = [Step("kong.request.get_header", reply="cold"), Step("kong.request.get_path", reply="60")]
            side = KongSide(steps, sequence=kong.next_sequence())
            sock.sendall(side.begin(instance_id))
            while len(side.done.calls) < 2:
                sock.sendall(side.receive(sock.recv(65536)))
            assert "entered\n" == process.line()
            waiting.append(sock)
        assert -signal.SIGKILL == process.end(signal.SIGKILL)

        for sock in waiting:
            with sock, pytest.raises(ConnectionResetError):
                sock.recv(65536)


def test_killed_process_is_replaced_under_the_same_ids(path: Path, process: Process) -> None:
    with FakeKong(str(path)) as kong:
        instance_id = kong.start({})
        assert "reset" == kong.event(instance_id, headers={"authorization": "kill"}).ended
        assert -signal.SIGKILL == process.wait()
        with pytest.raises(ConnectionRefusedError):
            kong.connect()
        second = Process(path, "second")
        # The id from before the kill is unknown here, and right after the next start.
        assert "closed" == kong.event(instance_id, headers={"authorization": "warm"}).ended
        assert instance_id == kong.start({})
        assert "success" == kong.event(instance_id, headers={"authorization": "warm"}).ended
    assert 0 == second.end()


def test_process_that_was_stopped_for_a_while_goes_on(path: Path, process: Process) -> None:
    with FakeKong(str(path)) as kong:
        instance_id = kong.start({})
        process.process.send_signal(signal.SIGSTOP)
        for _ in range(30):
            sock = kong.connect()
            sock.sendall(KongSide().begin(instance_id))
            sock.close()
        process.process.send_signal(signal.SIGCONT)
        for _ in range(5):
            assert "success" == kong.event(instance_id, headers={"authorization": "warm"}).ended


def test_serve_leaves_signal_handlers_as_they_were(path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    assert 0 == serve(Plugin(), socket_path=path, ready=lambda: signal.raise_signal(signal.SIGTERM))
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert -1 == signal.set_wakeup_fd(-1)
    assert not path.exists()


def test_serve_outside_the_main_thread_takes_no_signals(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loops: list[Loop] = []

    def capture(*args: Any, **options: Any) -> Loop:
        loops.append(make_loop(*args, **options))
        return loops[-1]

    monkeypatch.setattr("kong_token_exchange.pluginserver.server.make_loop", capture)
    before = signal.getsignal(signal.SIGTERM)
    ready = threading.Event()
    options = {"socket_path": path, "ready": ready.set}
    thread = threading.Thread(target=serve, args=(Plugin(),), kwargs=options)
    thread.start()
    assert ready.wait(WAIT_S)
    with FakeKong(str(path)) as kong:
        assert "success" == kong.event(kong.start({})).ended
    assert before == signal.getsignal(signal.SIGTERM)
    loops[0].request_stop()
    thread.join(WAIT_S)

    assert not thread.is_alive()
    assert not path.exists()


def test_serve_ends_when_its_handover_is_over(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kong_token_exchange.pluginserver.parent.Handover.is_over", lambda self: True)

    assert 0 == serve(Plugin(), socket_path=path, exit_with_parent=True)
    assert not path.exists()


def test_ready_that_fails_leaves_no_socket(path: Path) -> None:
    def fail() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        serve(Plugin(), socket_path=path, ready=fail)

    assert not path.exists()


def test_numbers_that_make_no_sense_do_not_cost_a_running_server_its_path(path: Path) -> None:
    running = SocketPath(path)
    for bad in ({"threads": 0}, {"deadline_s": 60.0}, {"queue_limit": -1}):
        with pytest.raises(ValueError):
            serve(Plugin(), socket_path=path, **bad)  # type: ignore[arg-type]

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(path))
    running.remove()
    running.socket.close()


@pytest.mark.parametrize("refused", [False, True])
def test_descriptor_limit_is_raised_where_that_is_allowed(
    path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    asked: list[tuple[int, int]] = []

    def setrlimit(kind: int, limits: tuple[int, int]) -> None:
        asked.append(limits)
        if refused:
            raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr("resource.getrlimit", lambda kind: (1024, 65536))
    monkeypatch.setattr("resource.setrlimit", setrlimit)

    assert 0 == serve(Plugin(), socket_path=path, ready=lambda: signal.raise_signal(signal.SIGTERM))
    assert [(65536, 65536)] == asked


def test_chosen_fault_answers_are_used(path: Path) -> None:
    def fail(facts: object) -> None:
        raise ValueError

    loop = make_loop(Plugin(prefetch=(), warm=fail), faults=make_faults(b"chosen"), threads=1)
    listener = SocketPath(path)
    loop.listen(listener.socket)
    thread = threading.Thread(target=loop.run)
    thread.start()
    with FakeKong(str(path)) as kong:
        done = kong.event(kong.start({}))
    loop.request_stop()
    thread.join(WAIT_S)
    listener.remove()

    assert done.exit is not None
    assert (500, b"chosen") == (done.exit.status, done.exit.body)


def test_stats_tell_how_the_server_stands(path: Path) -> None:
    loop = make_loop(Plugin())
    listener = SocketPath(path)
    loop.listen(listener.socket)
    thread = threading.Thread(target=loop.run)
    thread.start()
    with FakeKong(str(path)) as kong:
        kong.start({})
        assert 1 == loop.stats().connections
    eventually(lambda: loop.stats().connections == 0)
    loop.request_stop()
    thread.join(WAIT_S)
    listener.remove()


def test_an_old_server_never_takes_a_later_ones_socket_for_its_own(tmp_path: Path) -> None:
    path = tmp_path / "s.socket"
    old = SocketPath(path)
    middle = SocketPath(path)
    # Draining closes the listener long before the path is looked at; the inode number is free then.
    old.socket.close()
    later = [SocketPath(path) for _ in range(20)]

    assert all(server._identity != old._identity for server in later)
    old.remove()

    assert path.exists()
    for server in (middle, *later):
        server.socket.close()
        server.remove()
    assert not path.exists()

"""
The process between a gateway and its plugin server.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kong_token_exchange.pluginserver import keeper
from tests.support.running import WAIT_S, eventually

ROOT = Path(__file__).parents[2]

# Tells its own and its keeper's id, and how it is asked to end.
SERVER = """
import os, signal, sys, time
from kong_token_exchange.pluginserver import keeper

if sys.argv[1] == "frozen":
    sys.executable = ""
keeper.keep()
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, _: (print("asked", number, flush=True), os._exit(7)))
print("started", os.getpid(), os.getppid(), flush=True)
end = time.monotonic() + 60
while time.monotonic() < end:
    time.sleep(0.05)
    if sys.argv[1] == "orphan" and os.getppid() != int(open(sys.argv[2]).read() or os.getppid()):
        print("orphaned", flush=True)
        break
"""


class Kept:
    """A server with its keeper, whom the test knows by its id."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, *(arguments or ("",))],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        word, pid, parent = self.line().split()
        assert "started" == word
        self.pid, self.keeper_pid = int(pid), int(parent)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.process.kill()
        self.process.communicate(timeout=WAIT_S)


@pytest.fixture
def start() -> Iterator[Callable[..., Kept]]:
    started: list[Kept] = []

    def make(*arguments: str) -> Kept:
        started.append(Kept(*arguments))
        return started[-1]

    yield make
    for kept in started:
        kept.close()


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


@pytest.mark.parametrize("kind", ["", "frozen"])
def test_gateway_knows_the_keeper_and_the_server_is_its_child(start: Callable[..., Kept], kind: str) -> None:
    kept = start(kind)

    assert kept.process.pid == kept.keeper_pid
    assert kept.pid != kept.keeper_pid
    # A program of its own, where the file can be run.
    assert kind == "frozen" or eventually(lambda: "keeper.py" in command_line(kept.keeper_pid))


@pytest.mark.parametrize("kind", ["", "frozen"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_is_passed_on_and_the_status_comes_back(
    start: Callable[..., Kept], kind: str, number: int
) -> None:
    kept = start(kind)
    kept.process.send_signal(number)

    assert f"asked {number}\n" == kept.line()
    assert 7 == kept.process.wait(WAIT_S)


def test_killed_server_ends_the_keeper_as_a_shell_tells_it(start: Callable[..., Kept]) -> None:
    kept = start()
    os.kill(kept.pid, signal.SIGKILL)

    assert 128 + signal.SIGKILL == kept.process.wait(WAIT_S)


def test_killed_keeper_leaves_the_server_alone(start: Callable[..., Kept], tmp_path: Path) -> None:
    (tmp_path / "keeper").touch()
    kept = start("orphan", str(tmp_path / "keeper"))
    (tmp_path / "keeper").write_text(str(kept.keeper_pid))
    kept.process.kill()
    kept.process.wait(WAIT_S)

    assert "orphaned\n" == kept.line()


# A server that is slow to start, and whose keeper dies meanwhile.
ORPHAN = """
import os, signal, sys, time
from kong_token_exchange.pluginserver import keeper
from kong_token_exchange.pluginserver.supervisor import serve_workers
from tests.support.plugins import Plugin

keeper.keep()
assert os.getppid() == keeper.keeper_pid()
os.kill(keeper.keeper_pid(), signal.SIGKILL)
while os.getppid() == keeper.keeper_pid():
    time.sleep(0.01)
status = serve_workers(Plugin, workers=int(sys.argv[2]), socket_path=sys.argv[1], exit_with_parent=True)
print("ended", status, os.path.exists(sys.argv[1]))
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_keeper_that_dies_before_the_server_serves_is_missed_all_the_same(
    tmp_path: Path, workers: str
) -> None:
    command = [sys.executable, "-c", ORPHAN, str(tmp_path / "s"), workers]
    # Its output ends with the last of its processes.
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, timeout=30, check=False)

    assert -signal.SIGKILL == done.returncode
    assert "ended 0 False\n" == done.stdout


def test_process_without_a_keeper_says_so() -> None:
    assert keeper.keeper_pid() is None


class EndOfProcessError(BaseException):
    """In place of what ends or replaces a process."""


@pytest.mark.parametrize("runs", [True, False])
def test_parent_becomes_the_keeper_and_never_returns(monkeypatch: pytest.MonkeyPatch, runs: bool) -> None:
    ends: list[object] = []

    def end(*arguments: object) -> None:
        ends.append(arguments)
        raise EndOfProcessError

    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    monkeypatch.setattr("signal.pthread_sigmask", lambda how, signals: set())
    monkeypatch.setattr("os.fork", lambda: 4321)
    monkeypatch.setattr("os.getppid", lambda: 77)
    monkeypatch.setattr("os.execv", end)
    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr(keeper, "watch", lambda child, parent: child - parent)
    if not runs:
        monkeypatch.setattr("sys.executable", "")

    with pytest.raises(EndOfProcessError):
        keeper.keep()

    if runs:
        executable, arguments = sys.executable, [sys.executable, "-I", "-S", keeper.__file__, "4321", "77"]
        assert [(executable, arguments), (1,)] == ends
    else:
        assert [(4321 - 77,)] == ends


# --- the keeper's rules ---------------------------------------------------------------


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait(WAIT_S)
    assert process.stdin is not None
    process.stdin.close()


class Told:
    def __init__(self, number: int) -> None:
        self.si_signo = number


def test_keeper_ends_when_its_parent_is_gone(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.sigtimedwait", lambda signals, timeout: None)

    assert 0 == keeper.watch(child.pid, os.getppid() + 1)
    assert child.poll() is None


@pytest.mark.parametrize(
    ("title", "passed_on"),
    [
        (b"nginx: worker process is shutting down", False),
        (b"nginx: worker process", True),
        (None, True),
    ],
)
def test_reload_does_not_reach_the_server_as_a_signal(
    child: subprocess.Popen[bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    title: bytes | None,
    passed_on: bool,
) -> None:
    rounds = iter([Told(signal.SIGTERM), Told(signal.SIGCHLD), Told(signal.SIGUSR1), None])
    killed: list[tuple[int, int]] = []
    parents = iter([4242, 4242, 4242, 1])
    file = tmp_path / "cmdline"
    if title is not None:
        file.write_bytes(title)
    monkeypatch.setattr("signal.sigtimedwait", lambda signals, timeout: next(rounds))
    monkeypatch.setattr("os.getppid", lambda: next(parents))
    monkeypatch.setattr("os.kill", lambda *arguments: killed.append(arguments))
    monkeypatch.setattr(keeper, "Path", lambda path: file if path == "/proc/4242/cmdline" else None)

    assert 0 == keeper.watch(child.pid, 4242)
    monkeypatch.undo()
    expected = [signal.SIGTERM, signal.SIGUSR1] if passed_on else [signal.SIGUSR1]
    assert [(child.pid, number) for number in expected] == killed


def test_keeper_is_small_and_has_one_thread(start: Callable[..., Kept]) -> None:
    kept = start()
    eventually(lambda: "keeper.py" in command_line(kept.keeper_pid))
    status = eventually(lambda: Path(f"/proc/{kept.keeper_pid}/status").read_text())
    fields = dict(line.split(":", 1) for line in status.splitlines())

    assert "1" == fields["Threads"].strip()
    assert 20_000 > int(fields["VmRSS"].split()[0])

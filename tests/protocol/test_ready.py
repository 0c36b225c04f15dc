"""
The probes: alive means that somebody listens, ready that an instance could be started.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kong_token_exchange.pluginserver import ready as ready_module
from kong_token_exchange.pluginserver import wire
from kong_token_exchange.pluginserver.ready import MAX_ANSWER_BYTES, is_alive, is_ready
from kong_token_exchange.pluginserver.server import SocketPath
from tests.support.plugins import Plugin
from tests.support.running import WAIT_S, Running

Answer = Callable[[int], bytes]
INFO = wire.PluginInfo("test-plugin", ("access",), "1", 1, "{}")


def names(sequence: int) -> bytes:
    return wire.frame(wire.encode_plugin_names(sequence, ["test-plugin"]))


def info(sequence: int) -> bytes:
    return wire.frame(wire.encode_plugin_info(sequence, INFO))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
def scripted(path: Path) -> Iterator[Callable[[Answer, Answer], None]]:
    """A server that gives two answers, whatever it is asked, and closes."""
    listener = SocketPath(path)
    threads: list[threading.Thread] = []

    def serve(answers: tuple[Answer, Answer]) -> None:
        connection, _ = listener.socket.accept()
        with connection:
            for number, answer in enumerate(answers, 1):
                if not connection.recv(65536):
                    return
                try:
                    connection.sendall(answer(number))
                except OSError:
                    return

    def start(*answers: Answer) -> None:
        threads.append(threading.Thread(target=serve, args=(answers,)))
        threads[0].start()

    yield start
    for thread in threads:
        thread.join(WAIT_S)
    listener.socket.close()


def test_running_server_is_ready_and_no_instance_is_started_for_the_question(path: Path) -> None:
    plugin = Plugin()
    with Running(plugin, path.parent) as server:
        assert is_alive(server.path, WAIT_S)
        assert is_ready(server.path, WAIT_S)
        assert is_ready(Path(server.path), WAIT_S)
    assert [] == plugin.started
    assert not is_alive(server.path, WAIT_S)
    assert not is_ready(server.path, WAIT_S)


def test_large_schema_arrives_in_pieces_and_is_ready(path: Path) -> None:
    plugin = Plugin()
    plugin.schema = {"name": "test-plugin", "fields": ["x" * 1_000_000]}
    with Running(plugin, path.parent) as server:
        assert is_ready(server.path, WAIT_S)


@pytest.mark.parametrize("kind", ["nothing", "file", "socket nobody listens on", "path too long"])
def test_path_without_a_server_is_neither(path: Path, kind: str) -> None:
    match kind:
        case "file":
            path.write_text("")
        case "socket nobody listens on":
            SocketPath(path).socket.close()
        case "path too long":
            path = path.parent / ("x" * 200)

    assert not is_alive(path)
    assert not is_ready(path)


def test_server_that_accepts_nothing_is_alive_and_not_ready_within_the_time(path: Path) -> None:
    listener = SocketPath(path)
    begun = time.monotonic()

    assert is_alive(path)
    assert not is_ready(path, 0.05)
    assert WAIT_S > time.monotonic() - begun
    listener.socket.close()


def half(sequence: int) -> bytes:
    return names(sequence)[:6]


def test_answer_that_ends_in_the_middle_is_not_ready(path: Path, scripted: Callable[..., None]) -> None:
    scripted(half)

    assert not is_ready(path, WAIT_S)


def test_answer_that_drips_is_not_waited_for_beyond_the_time(
    path: Path, scripted: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The begin, the first piece, and then it is too late for a second one.
    times = iter([0.0, 0.0, 100.0])
    monkeypatch.setattr(ready_module, "time", SimpleNamespace(monotonic=lambda: next(times)))
    scripted(half)

    assert not is_ready(path, WAIT_S)
    assert [] == list(times)


def test_scripted_answers_of_a_plugin_server_are_ready(path: Path, scripted: Callable[..., None]) -> None:
    scripted(names, info)

    assert is_ready(path, WAIT_S)


@pytest.mark.parametrize(
    "answers",
    [
        (lambda sequence: b"", info),
        (lambda sequence: names(sequence + 1), info),
        (lambda sequence: wire.frame(wire.encode_return(sequence)), info),
        (lambda sequence: wire.frame(wire.encode_plugin_names(sequence, [])), info),
        (lambda sequence: names(sequence)[:-1], info),
        (lambda sequence: wire.frame(b"\xff\xff"), info),
        (lambda sequence: (MAX_ANSWER_BYTES + 1).to_bytes(4, "little"), info),
        (names, names),
        (names, lambda sequence: wire.frame(wire.encode_return(sequence))),
        (
            names,
            lambda sequence: wire.frame(
                wire.encode_plugin_info(sequence, wire.PluginInfo("other", (), "1", 1, "{}"))
            ),
        ),
    ],
    ids=[
        "silence",
        "sequence",
        "no-names",
        "empty-names",
        "cut-short",
        "no-message",
        "too-long",
        "names-twice",
        "no-info",
        "other-plugin",
    ],
)
def test_answers_that_are_no_plugin_servers_are_not_ready(
    path: Path, scripted: Callable[..., None], answers: tuple[Answer, Answer]
) -> None:
    scripted(*answers)

    assert not is_ready(path, 0.3)


def test_bytes_that_trickle_in_do_not_prolong_the_time(path: Path) -> None:
    listener = SocketPath(path)

    def serve() -> None:
        connection, _ = listener.socket.accept()
        with connection, contextlib.suppress(OSError):  # the probe leaves
            for byte in names(1) + info(2):
                time.sleep(0.02)
                connection.sendall(bytes([byte]))

    thread = threading.Thread(target=serve)
    thread.start()

    # All of the right answer comes, each byte well within the time.
    assert not is_ready(path, 0.2)
    thread.join(WAIT_S)
    listener.socket.close()

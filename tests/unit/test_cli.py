"""The command line, as a person types it."""

from __future__ import annotations

import atexit
import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kong_token_exchange import wiring
from kong_token_exchange.cli import main
from kong_token_exchange.pluginserver import supervisor
from kong_token_exchange.shell import log_queue, report
from tests.support.gateways import wait_until

ROOT = Path(__file__).resolve().parents[2]


def test_describe_prints_protobuf_and_the_whole_token_exchange_block(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert 0 == main(["describe"])

    described = json.loads(capsys.readouterr().out)
    (plugin,) = described["Plugins"]
    assert "ProtoBuf:1" == described["Protocol"]
    assert ("token-exchange", ["access"], 1050) == (plugin["Name"], plugin["Phases"], plugin["Priority"])


def test_describe_writes_a_file_for_cat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["describe"])
    printed = capsys.readouterr().out

    assert 0 == main(["describe", "--output", str(tmp_path / "plugin.json")])

    assert printed == (tmp_path / "plugin.json").read_text(encoding="utf-8")


def test_schema_check_tells_files_that_are_out_of_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("schema.json", "docs/configuration.md"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    assert 0 == main(["schema", "--check"])

    (tmp_path / "schema.json").write_text("{}", encoding="utf-8")
    assert 1 == main(["schema", "--check"])
    assert "schema.json" in capsys.readouterr().out

    assert 0 == main(["schema", "--write"])
    assert (ROOT / "schema.json").read_text(encoding="utf-8") == Path("schema.json").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("rule", ["keycloak:8080", "keycloak:8080=nowhere", "=127.0.0.1:1", "a:1=:2"])
def test_serve_refuses_a_malformed_resolve_rule(rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--socket", "/nowhere", "--resolve", rule])

    assert 2 == caught.value.code
    assert "HOST:PORT=ADDRESS:PORT" in capsys.readouterr().err


def test_serve_says_why_a_socket_cannot_be_bound(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "kong_token_exchange",
            "serve",
            "--socket",
            str(tmp_path / "absent" / "s.socket"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert 1 == done.returncode
    assert "Traceback" not in done.stderr
    assert "absent" in done.stderr


def test_ready_tells_by_its_exit_status(tmp_path: Path) -> None:
    assert 1 == main(["ready", "--socket", str(tmp_path / "absent.socket"), "--timeout", "0.2"])


def test_two_workers_serve_are_ready_and_end_at_sigterm(tmp_path: Path) -> None:
    path = str(tmp_path / "s.socket")
    command = [sys.executable, "-m", "kong_token_exchange", "serve", "--workers", "2", "--socket", path]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert wait_until(lambda: main(["ready", "--socket", path]) == 0, timeout_s=60)
            assert 0 == main(["ready", "--alive", "--socket", path])
        finally:
            process.terminate()
        assert 0 == process.wait(60)
    assert not Path(path).exists()


def test_describe_lua_prints_the_schema_and_writes_a_folder_for_a_control_plane(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert 0 == main(["describe", "--format", "lua"])
    printed = capsys.readouterr().out
    assert '["name"] = "token-exchange"' in printed

    folder = tmp_path / "kong" / "plugins" / "token-exchange"
    assert 0 == main(["describe", "--format", "lua", "--output", str(folder)])

    assert {"schema.lua", "handler.lua"} == {file.name for file in folder.iterdir()}
    assert printed == (folder / "schema.lua").read_text(encoding="utf-8")
    assert "kong.response.exit(500" in (folder / "handler.lua").read_text(encoding="utf-8")


@pytest.mark.parametrize("option", ["--cache-size", "--cache-entries"])
@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_serve_refuses_a_cache_without_room(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--socket", "/nowhere", option, value])

    assert 2 == caught.value.code
    assert option in capsys.readouterr().err


def test_cache_17_the_bounds_of_the_cache_are_those_that_serve_was_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[Any] = []

    def serve_workers(make_plugin: Any, **_: Any) -> int:
        monkeypatch.setattr(wiring.Shells, "make_plugin", lambda shells, **_: made.append(shells))
        make_plugin()
        return 0

    monkeypatch.setattr(supervisor, "serve_workers", serve_workers)
    monkeypatch.setattr(report, "report_on_signal", lambda _: None)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    monkeypatch.setattr(log_queue, "queue_log_lines", lambda _: SimpleNamespace(stop=None))
    monkeypatch.setattr(atexit, "register", lambda stop: stop)
    socket = str(tmp_path / "s")
    assert 0 == main(["serve", "--socket", socket])
    assert 0 == main(["serve", "--socket", socket, "--cache-size", "3", "--cache-entries", "7"])

    parts = [(part._max_entries, part.maxsize) for shells in made for part in _parts(shells.cache)]
    assert [(10_000, 64 * 2**20)] * 2 + [(7, 3 * 2**19)] * 2 == parts


def _parts(cache: Any) -> tuple[Any, Any]:
    return cache._verified, cache._exchanged


@pytest.mark.parametrize("bounds", [{"cache_entries": 0}, {"cache_bytes": 0}])
def test_a_cache_without_room_is_a_mistake(bounds: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="room"):
        wiring.Shells(**bounds)

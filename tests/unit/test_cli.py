"""The command line, as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kong_token_exchange.cli import main
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

"""The client secret in a file: read when it changes, and never lost half way through a rotation."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from kong_token_exchange.errors import GatewayError
from kong_token_exchange.secret import Secret
from kong_token_exchange.shell.secret_file import LOOK_EVERY_S, MAX_BYTES, OVERLAP_S, SecretFile
from tests.support.fakes import FakeClock, run_in_threads


class Rotated:
    """A secret file, its reader, and a clock."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "secret"
        self.clock = FakeClock()
        self.reader = SecretFile(str(self.path), self.clock)

    def write(self, content: bytes | str) -> None:
        """Rename a new file over the old one."""
        new = self.path.with_suffix(".new")
        new.write_bytes(content.encode() if isinstance(content, str) else content)
        new.rename(self.path)

    def current(self) -> str:
        return self.reader.current().reveal()

    def later(self) -> str:
        self.clock.advance(LOOK_EVERY_S)
        return self.current()

    def other_than(self, refused: str) -> str | None:
        other = self.reader.other_than(Secret(refused))
        return other.reveal() if other else None


@pytest.fixture
def it(tmp_path: Path) -> Rotated:
    return Rotated(tmp_path)


@pytest.mark.parametrize(
    ("content", "secret"),
    [
        ("s3cret", "s3cret"),
        ("s3cret\n", "s3cret"),
        ("s3cret\r\n", "s3cret"),
        (" s3 cret ", " s3 cret "),
        ("schlüssel\n", "schlüssel"),
        ("x" * MAX_BYTES, "x" * MAX_BYTES),
    ],
)
def test_one_line_break_at_the_end_is_not_the_secrets(it: Rotated, content: str, secret: str) -> None:
    it.write(content[:MAX_BYTES])

    assert secret == it.current()


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "FileNotFoundError"),
        (b"", "empty"),
        (b"\n", "empty"),
        (b"\r\n", "empty"),
        (b"one\ntwo\n", "control_character"),
        (b"one\n\n", "control_character"),
        (b"one\x00", "control_character"),
        (b"\xff\xfe", "UnicodeDecodeError"),
        (b"x" * (MAX_BYTES + 1), "too_long"),
    ],
)
def test_res_19_without_a_usable_secret_it_is_closed(it: Rotated, content: bytes | None, cause: str) -> None:
    if content is not None:
        it.write(content)

    with pytest.raises(GatewayError) as caught:
        it.current()

    assert (500, "client_secret_unreadable") == (caught.value.status, caught.value.reason)
    assert {"cause": cause} == caught.value.facts


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_holds_nobody_up(it: Rotated, make: object) -> None:
    make(it.path)  # type: ignore[operator]

    with pytest.raises(GatewayError) as caught:
        it.current()

    assert caught.value.facts["cause"] in ("not_a_file", "IsADirectoryError")


def test_a_file_that_may_not_be_read_is_as_none(it: Rotated, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    it.write("s3cret")
    monkeypatch.setattr(os, "open", refuse)

    with pytest.raises(GatewayError) as caught:
        it.current()

    assert {"cause": "PermissionError"} == caught.value.facts


def test_fault_96_a_changed_file_is_read_within_a_second(it: Rotated) -> None:
    it.write("old")
    assert "old" == it.current()

    it.write("new")

    it.clock.advance(LOOK_EVERY_S - 0.01)
    assert "old" == it.current()
    it.clock.advance(0.01)
    assert "new" == it.current()


def test_a_file_rewritten_in_place_is_read_too(it: Rotated) -> None:
    it.write("old")
    assert "old" == it.current()

    it.path.write_text("longer than before", encoding="utf-8")

    assert "longer than before" == it.later()


def test_a_symbolic_link_that_is_swapped_is_read_too(it: Rotated, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    it.path.symlink_to(tmp_path / "one")
    assert "one" == it.current()

    swapped = tmp_path / "swapped"
    swapped.symlink_to(tmp_path / "two")
    swapped.rename(it.path)

    assert "two" == it.later()


def test_an_unchanged_file_is_not_read_again(it: Rotated, monkeypatch: pytest.MonkeyPatch) -> None:
    it.write("s3cret")
    it.current()
    read: list[bytes] = []
    monkeypatch.setattr("kong_token_exchange.shell.secret_file._parse", read.append)

    for _ in range(5):
        it.later()

    assert [] == read


def test_the_file_is_looked_at_once_a_second_at_most(it: Rotated, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    really = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(path) or really(path, *rest))

    def ask() -> None:
        with pytest.raises(GatewayError):
            it.current()

    run_in_threads(ask, 8)
    it.clock.advance(LOOK_EVERY_S)
    run_in_threads(ask, 8)

    assert 2 == len(opened)


@pytest.mark.parametrize("content", [None, b"", b"one\ntwo", b"x" * (MAX_BYTES + 1)])
def test_half_way_through_a_rotation_the_last_good_secret_stays(
    it: Rotated, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    it.write("old")
    it.current()

    if content is None:
        it.path.unlink()
    else:
        it.write(content)

    assert ["old"] * 3 == [it.later() for _ in range(3)]
    assert [logging.WARNING] == [record.levelno for record in caplog.records]
    assert "what was read before stays in use" in caplog.text
    it.write("new")
    assert "new" == it.later()


def test_after_a_refusal_the_file_is_read_at_once(it: Rotated) -> None:
    it.write("old")
    it.current()
    it.write("new")

    assert "new" == it.other_than("old")
    assert "new" == it.current()


def test_a_file_ahead_of_the_issuer_gives_the_secret_from_before(it: Rotated) -> None:
    it.write("old")
    it.current()
    it.write("new")
    assert "new" == it.later()

    it.clock.advance(OVERLAP_S - 0.01)
    assert "old" == it.other_than("new")
    it.clock.advance(0.01)
    assert it.other_than("new") is None


def test_a_wrong_secret_has_no_other(it: Rotated) -> None:
    it.write("wrong")

    assert "wrong" == it.current()
    assert it.other_than("wrong") is None


def test_i6_no_warning_quotes_the_content(it: Rotated, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    it.write("canary-1")
    it.current()
    for content in (b"canary-2\nmore", b"canary-3\xff"):
        it.write(content)
        it.clock.advance(60)
        it.current()

    assert 2 == len(caplog.records)
    assert "canary" not in caplog.text

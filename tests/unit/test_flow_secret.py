"""A client secret that is rotated while exchanges are made: issuer and file need not change at once."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from kong_token_exchange.config import load_config
from kong_token_exchange.flow import Flow
from kong_token_exchange.protocol.http_message import HttpRequest, HttpResponse
from kong_token_exchange.shell.secret_file import LOOK_EVERY_S, SecretFile
from tests.support.fakes import token_response
from tests.unit.test_flow import Bench, config_with, partner, result_token


class Issuer:
    """Accepts the client with the secrets of now, and keeps what it was offered."""

    def __init__(self, *accepted: str, status: int = 401, error: str | None = "invalid_client") -> None:
        self.accepted = set(accepted)
        self.offered: list[str] = []
        self.status = status
        self.error = error

    def __call__(self, request: HttpRequest) -> HttpResponse:
        _, _, credentials = request.headers["Authorization"].partition(" ")
        _, _, secret = base64.b64decode(credentials).decode().partition(":")
        self.offered.append(secret)
        if secret in self.accepted:
            return token_response(result_token())
        body = b'{"error":"%s"}' % self.error.encode() if self.error else b""
        return HttpResponse(status=self.status, headers={"content-type": "application/json"}, body=body)


class Rotating(Bench):
    """A flow over a real secret file."""

    def __init__(self, folder: Path, issuer: Issuer, **options: Any) -> None:
        self.path = folder / "secret"
        raw = config_with({"client_secret": None, "client_secret_file": str(self.path)})
        super().__init__(raw, issuer, **options)  # type: ignore[arg-type]
        self.number = 0
        self.flow = Flow(
            self.config,
            sender=self.sender,
            keys=self.keys,
            cache=self.cache,
            clock=self.clock,
            audit=self.audit,
            metrics=self.metrics,
            proofs=self.proofs,
            secrets=SecretFile(str(self.path), self.clock),
        )

    def write(self, secret: str) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(secret + "\n", encoding="utf-8")
        new.rename(self.path)

    def exchange(self) -> str:
        """Exchange a token that is in no cache yet."""
        self.number += 1
        return self.token(partner.mint(jti=f"token-{self.number}"))


@pytest.mark.parametrize(
    ("status", "error"), [(401, "invalid_client"), (401, "unauthorized_client"), (401, None)]
)
def test_fault_96_the_issuer_changes_first(tmp_path: Path, status: int, error: str | None) -> None:
    issuer = Issuer("old", status=status, error=error)
    it = Rotating(tmp_path, issuer)
    it.write("old")
    it.exchange()

    issuer.accepted = {"new"}
    it.write("new")  # within the second in which the file is not looked at
    it.exchange()
    it.exchange()

    assert ["old", "old", "new", "new"] == issuer.offered


def test_fault_96_the_file_changes_first(tmp_path: Path) -> None:
    issuer = Issuer("old")
    it = Rotating(tmp_path, issuer)
    it.write("old")
    it.exchange()

    it.write("new")
    it.clock.advance(LOOK_EVERY_S)
    it.exchange()
    issuer.accepted = {"new"}
    it.exchange()

    assert ["old", "new", "old", "new"] == issuer.offered
    assert [] == [event.reason for event in it.audit.events if event.outcome == "refuse"]


def test_res_19_until_the_file_changes_it_is_500_and_never_401(tmp_path: Path) -> None:
    issuer = Issuer("new")
    it = Rotating(tmp_path, issuer)
    it.write("old")

    refusal = it.refusal(partner.mint())
    assert (500, "client_refused") == (refusal.status, refusal.reason)
    assert ["old"] == issuer.offered

    it.write("new")
    assert it.exchange()


def test_both_secrets_refused_is_two_requests_and_no_more(tmp_path: Path) -> None:
    issuer = Issuer("old")
    it = Rotating(tmp_path, issuer)
    it.write("old")
    it.exchange()
    issuer.accepted = {"third"}
    it.write("new")

    assert "client_refused" == it.refusal(partner.mint(jti="other")).reason
    assert ["old", "old", "new"] == issuer.offered


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, "unsupported_grant_type"), (400, "invalid_request"), (404, None), (500, "server_error")],
)
def test_another_refusal_is_not_tried_again(tmp_path: Path, status: int, error: str | None) -> None:
    issuer = Issuer("old")
    it = Rotating(tmp_path, issuer)
    it.write("old")
    it.exchange()
    it.write("new")
    issuer.accepted, issuer.status, issuer.error = set(), status, error

    it.refusal(partner.mint(jti="other"))

    assert ["old", "old"] == issuer.offered


def test_without_a_file_a_refused_secret_is_offered_once() -> None:
    issuer = Issuer("other")
    it = Bench(answer=issuer)  # type: ignore[arg-type]

    assert "client_refused" == it.refusal(partner.mint()).reason
    assert ["s3cret"] == issuer.offered


def test_cached_tokens_stay_and_no_secret_is_read_for_them(tmp_path: Path) -> None:
    issuer = Issuer("old")
    it = Rotating(tmp_path, issuer)
    it.write("old")
    token = partner.mint()
    first = it.token(token)

    it.path.unlink()
    it.clock.advance(LOOK_EVERY_S)

    assert first == it.token(token, within=None)
    assert ["old"] == issuer.offered


def test_the_secrets_value_is_in_no_identity(tmp_path: Path) -> None:
    raw = config_with({"client_secret": None, "client_secret_file": str(tmp_path / "secret")})
    identities = set()
    for secret in ("one", "two"):
        (tmp_path / "secret").write_text(secret, encoding="utf-8")
        identities.add(load_config(raw).identity)

    assert 1 == len(identities)

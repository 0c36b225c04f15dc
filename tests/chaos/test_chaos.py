"""
The short form of the suite for CI: a handful of rows on the sandbox gateway.

`python -m tests.chaos` runs all of them, on a real Kong too where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import report
from tests.chaos.idp import SECRET
from tests.chaos.rows import ROWS
from tests.chaos.run import Result, Row
from tests.chaos.runner import Runner
from tests.chaos.stage import Stage
from tests.chaos.traffic import Books

# By mode, since each change of it restarts the plugin server.
CI_ROWS = sorted((row for row in ROWS if row.ci), key=lambda row: row.mode, reverse=True)


# Beside those of the research: two routes, dense traffic, and one worker of several.
OWN_ROWS = ("FAULT-80r", "FAULT-81d", "FAULT-82w", "FAULT-86w")


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    made = Runner("sandbox", long=False, tell=lambda _: None)
    yield made
    made.close()


@pytest.mark.integration
@pytest.mark.parametrize("row", CI_ROWS, ids=[row.id for row in CI_ROWS])
def test_row(runner: Runner, row: Row) -> None:
    result = runner.run_row(row)

    assert "fail" != result.verdict, "; ".join(result.remarks)


def test_every_row_of_the_research_is_there_once() -> None:
    wanted = [*range(1, 24), *range(30, 44), *range(50, 55), *range(60, 71), *range(80, 99), *range(110, 123)]

    assert sorted([*(f"FAULT-{number:02}" for number in wanted), *OWN_ROWS]) == sorted(row.id for row in ROWS)
    assert [] == [row.id for row in ROWS if (row.action is None) != bool(row.reason)]


class TestTheJudge:
    """The suite must be able to fail: each invariant is broken once on purpose."""

    @pytest.fixture
    def stage(self) -> Iterator[Stage]:
        # Nothing is started: the judge alone is asked.
        made = Stage("sandbox")
        yield made
        made.__exit__()

    def test_i1_a_bad_request_upstream_is_told(self, stage: Stage) -> None:
        sent = stage.wallet.make("forged", "/orders")

        assert ["I1"] == self.told(stage, sent.id, self.exchanged_for(stage, sent.jti, sent.subject))

    def test_i2_the_callers_own_token_upstream_is_told(self, stage: Stage) -> None:
        sent = stage.wallet.make("fresh", "/orders")

        assert "I2" in self.told(stage, sent.id, (sent.authorization or "").removeprefix("Bearer "))

    def test_i3_a_token_issued_for_another_is_told(self, stage: Stage) -> None:
        sent = stage.wallet.make("fresh", "/orders")

        assert ["I3"] == self.told(stage, sent.id, self.exchanged_for(stage, "another", sent.subject))

    def test_i3_a_token_of_the_other_route_is_told(self, stage: Stage) -> None:
        sent = stage.wallet.make("fresh", "/orders")
        token = self.exchanged_for(stage, sent.jti, sent.subject, scope="reports")

        assert ["I3"] == self.told(stage, sent.id, token)

    def test_a_right_one_is_not(self, stage: Stage) -> None:
        sent = stage.wallet.make("fresh", "/orders")

        assert [] == self.told(stage, sent.id, self.exchanged_for(stage, sent.jti, sent.subject))

    @staticmethod
    def exchanged_for(stage: Stage, jti: str | None, subject: str | None, scope: str = "orders") -> str:
        from kong_token_exchange.sandbox.upstream import read_claims
        from tests.chaos.idp import Issued

        issuer = stage.idp.issuers["internal"]
        token = issuer.mint(client="client-2", user="user-1", scopes=[scope], sub=subject)
        issued = (read_claims(token) or {})["jti"]
        stage.idp.issued[issued] = Issued("internal", str(jti), str(subject), honest=True)
        return token

    @staticmethod
    def told(stage: Stage, request_id: str, token: str) -> list[str]:
        from kong_token_exchange.sandbox.serving import Request
        from tests.chaos.traffic import ID_HEADER

        headers = ((ID_HEADER, request_id), ("authorization", f"Bearer {token}"))
        stage.upstream._judge(Request("GET", "/orders", headers, b""))
        return sorted({complaint.partition(":")[0] for complaint in stage.books.take_complaints()})


@pytest.mark.parametrize("text", [f"secret {SECRET}", "Bearer eyJhbGciOiJSUzI1NiJ9.e30", "MARKclaimX9zK4"])
def test_i6_marks_are_found(text: str) -> None:
    books = Books()
    books.look_for_marks("the log", text)

    assert 1 == len(books.take_complaints())


def test_the_report_replaces_what_is_between_its_marks_alone(tmp_path: Path) -> None:
    path = tmp_path / "resilience.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    result = Result(row=ROWS[0], gateway="sandbox", verdict="pass", seen="fresh 200x3", remarks=["a|b"])
    result.made = {"kills": 2}

    report.write(path, [result, result], command="make chaos", seconds=1.0, rate=60.0, deadline_ms=2000)

    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "fresh 200 x 3" in text
    assert "4 kills" in text
    assert r"a\|b" in text

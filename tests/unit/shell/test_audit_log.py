"""Audit lines: complete, bounded, and no kind pushes out another."""

import json
import logging

import pytest

from kong_token_exchange.errors import Fact
from kong_token_exchange.ports import AuditEvent
from kong_token_exchange.shell.audit_log import (
    MAX_EXCHANGES_PER_SECOND,
    TIME_CLASSES_S,
    AuditLog,
    CountingMetrics,
)
from tests.support.fakes import FakeClock, run_in_threads
from tests.support.minting import NOW

REFUSAL = AuditEvent(outcome="refuse", reason="jwt_signature", status=401)
FAULT = AuditEvent(outcome="refuse", reason="result_jwt_signature", status=502)
EXCHANGE = AuditEvent(outcome="exchange", reason="same_issuer", status=200)
FORWARD = AuditEvent(outcome="forward", reason="same_issuer", status=200)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> "Lines":
    caplog.set_level(logging.DEBUG)
    return Lines(caplog)


class Lines:
    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def __call__(self) -> list[dict[str, object]]:
        return [json.loads(record.getMessage()) for record in self._caplog.records]

    def count(self, outcome: str, status: int) -> int:
        return sum((outcome, status) == (line["outcome"], line["status"]) for line in self())

    def levels(self) -> list[str]:
        return [record.levelname for record in self._caplog.records]


def test_an_event_is_one_json_line(lines: Lines) -> None:
    facts: dict[str, Fact] = {"iss": "https://idp.test", "client": None, "http_status": 400, "ok": True}
    AuditLog(FakeClock()).record(AuditEvent(outcome="refuse", reason="x", status=401, facts=facts))

    assert [
        {
            "event": "token_exchange",
            "time": NOW,
            "outcome": "refuse",
            "reason": "x",
            "status": 401,
            "iss": "https://idp.test",
            "http_status": 400,
            "ok": True,
        }
    ] == lines()


def test_facts_cannot_stand_in_for_the_event(lines: Lines) -> None:
    facts: dict[str, Fact] = {
        "event": "a",
        "time": 1,
        "outcome": "exchange",
        "reason": "b",
        "status": 200,
        "left_out": "c",
    }
    AuditLog(FakeClock()).record(AuditEvent(outcome="refuse", reason="x", status=401, facts=facts))

    line = lines()[0]
    assert ("token_exchange", NOW, "refuse", "x", 401) == tuple(
        line[name] for name in ("event", "time", "outcome", "reason", "status")
    )


def test_res_17_a_line_is_bounded_in_length_and_holds_no_line_break(
    lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    facts = {"kid": "x" * 100_000, "iss": 'a\r\n{"event":"token_exchange"}\u2028\x00\ud800'}
    AuditLog(FakeClock()).record(AuditEvent(outcome="refuse", reason="x", status=401, facts=facts))

    text = caplog.records[0].getMessage()
    assert len(text) < 1000
    assert text.isascii()
    assert text.isprintable()
    assert "x" * 256 == lines()[0]["kid"]


def test_faults_are_warnings(lines: Lines) -> None:
    log = AuditLog(FakeClock())
    for event in (REFUSAL, FAULT, EXCHANGE, FORWARD):
        log.record(event)

    assert ["INFO", "WARNING", "INFO", "INFO"] == lines.levels()


def test_res_17_a_flood_is_cut_and_counted(lines: Lines) -> None:
    clock = FakeClock()
    log = AuditLog(clock, max_per_second=5)

    for _ in range(100):
        log.record(REFUSAL)
    clock.advance(1)
    log.record(REFUSAL)
    log.record(REFUSAL)

    assert 7 == len(lines())
    assert [None] * 5 + [95, None] == [line.get("left_out") for line in lines()]


def test_a_flood_of_one_kind_does_not_hide_another(lines: Lines) -> None:
    log = AuditLog(FakeClock(), max_per_second=5)
    for _ in range(1000):
        log.record(REFUSAL)
        log.record(FORWARD)

    log.record(FAULT)
    for _ in range(20):
        log.record(EXCHANGE)

    assert (5, 5, 1, 20) == (
        lines.count("refuse", 401),
        lines.count("forward", 200),
        lines.count("refuse", 502),
        lines.count("exchange", 200),
    )


def test_exchanges_are_bounded_far_above(lines: Lines) -> None:
    log = AuditLog(FakeClock())
    for _ in range(MAX_EXCHANGES_PER_SECOND + 10):
        log.record(EXCHANGE)

    assert MAX_EXCHANGES_PER_SECOND == lines.count("exchange", 200)


def test_a_clock_that_steps_back_does_not_stop_the_log(lines: Lines) -> None:
    clock = FakeClock()
    log = AuditLog(clock, max_per_second=1)
    for step in (0, -600, -600, 1200):
        clock.step_wall(step)
        log.record(REFUSAL)

    assert 4 == len(lines())


def test_threads_do_not_spend_a_line_twice(lines: Lines) -> None:
    log = AuditLog(FakeClock(), max_per_second=30)

    def work() -> None:
        for _ in range(50):
            log.record(REFUSAL)

    run_in_threads(work, 8)

    assert 30 == len(lines())


def test_res_18_metrics_count_by_name_and_labels() -> None:
    metrics = CountingMetrics()

    def work() -> None:
        for _ in range(200):
            metrics.count("requests", outcome="refuse")

    run_in_threads(work, 4)
    metrics.count("requests", outcome="exchange", cache="hit")

    assert {"requests,outcome=refuse": 800, "requests,outcome=exchange,cache=hit": 1} == metrics.snapshot()


def test_a_snapshot_stays_as_it_was() -> None:
    metrics = CountingMetrics()
    before = metrics.snapshot()
    metrics.count("requests")

    assert {} == before


# --- times ----------------------------------------------------------------------------


def test_times_are_counted_summed_and_put_into_classes() -> None:
    metrics = CountingMetrics()
    for seconds in (0.0, 0.005, 0.0051, 10.0, 11.0):
        metrics.observe("exchange_seconds", seconds, result="answered")
    metrics.observe("exchange_seconds", 1.0, result="failed")

    times = metrics.times()["exchange_seconds,result=answered"]
    assert (5, 11.0) == (times.count, times.longest)
    assert times.total == pytest.approx(21.0101)
    # Each class holds those below, its own bound included; what is beyond the last is in none.
    assert [2, *[3] * (len(TIME_CLASSES_S) - 2), 4] == times.classes
    assert 1 == metrics.times()["exchange_seconds,result=failed"].count


def test_times_that_were_told_do_not_change_any_more() -> None:
    metrics = CountingMetrics()
    metrics.observe("exchange_seconds", 1.0)
    told = metrics.times()["exchange_seconds"]
    metrics.observe("exchange_seconds", 1.0)

    assert (1, 1.0) == (told.count, told.total)
    assert 1 == told.classes[-1]

"""
What is said about a fault: enough for an operator, nothing of the request.
"""

import json
import logging
from typing import NoReturn

import pytest

from kong_token_exchange.pluginserver import wire
from kong_token_exchange.pluginserver.contract import Outcome
from kong_token_exchange.pluginserver.faults import FaultLog, make_faults
from tests.protocol.test_contract import calls_of
from tests.support.plugins import make_log

MARK = "MARKED-TOKEN-0815"


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def fail_with_marks(token: str) -> NoReturn:
    local = {"authorization": token}
    raise ValueError(f"cannot read {local}")


def caught(token: str = MARK) -> ValueError:
    try:
        fail_with_marks(token)
    except ValueError as error:
        return error


def exit_args(outcome: Outcome) -> wire.ExitArgs:
    ((name, args),) = calls_of(outcome)
    assert "kong.response.exit" == name
    return args  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("member", "status", "error"),
    [
        ("server_error", 500, "server_error"),
        ("too_large", 400, "invalid_request"),
        ("overloaded", 503, "temporarily_unavailable"),
        ("timed_out", 504, "temporarily_unavailable"),
    ],
)
def test_fault_answers_are_json_with_their_status(member: str, status: int, error: str) -> None:
    args = exit_args(getattr(make_faults(), member))

    assert (status, error) == (args.status, json.loads(args.body)["error"])
    assert ("application/json", "no-store") == (args.headers["Content-Type"], args.headers["Cache-Control"])
    assert ("1" if status == 503 else None) == args.headers.get("Retry-After")


def test_fault_bodies_can_be_chosen() -> None:
    faults = make_faults(b"a", too_large_body=b"b", overloaded_body=b"c", timed_out_body=b"d")
    outcomes = (faults.server_error, faults.too_large, faults.overloaded, faults.timed_out)

    assert [b"a", b"b", b"c", b"d"] == [exit_args(outcome).body for outcome in outcomes]


def test_gw_14_exception_is_told_by_class_and_place_without_its_text() -> None:
    log, lines = make_log()
    log.raised("access failed", caught())

    assert 1 == len(lines.lines)
    assert "access failed: ValueError at test_faults.py:" in lines
    assert "fail_with_marks" in lines
    assert MARK not in lines


def test_causes_are_told_the_same_way() -> None:
    log, lines = make_log()
    try:
        try:
            fail_with_marks(MARK)
        except ValueError as error:
            raise KeyError(MARK) from error
    except KeyError as error:
        log.raised("access failed", error)

    assert "KeyError at" in lines
    assert "caused by ValueError at" in lines
    assert MARK not in lines


def test_suppressed_context_is_left_out() -> None:
    log, lines = make_log()
    try:
        try:
            fail_with_marks(MARK)
        except ValueError:
            raise KeyError(MARK) from None
    except KeyError as error:
        log.raised("access failed", error)

    assert "caused by" not in lines


def test_a_deep_recursion_is_one_short_line() -> None:
    def recurse() -> None:
        recurse()

    log, lines = make_log()
    with pytest.raises(RecursionError) as raised:
        recurse()
    log.raised("access failed", raised.value)

    assert "RecursionError at" in lines
    assert len(lines.lines[0]) < 1000
    assert "\n" not in lines.lines[0]


def test_res_17_the_same_place_is_logged_once_a_minute_with_the_count_of_the_rest() -> None:
    clock = FakeClock()
    log, lines = make_log(clock=clock, interval_s=60.0)
    for _ in range(10):
        log.note("pool full")
    clock.now += 59.9
    log.note("pool full")
    assert ["pool full"] == lines.lines

    clock.now += 0.2
    log.note("pool full")
    log.note("something else")

    assert ["pool full", "pool full (10 more since)", "something else"] == lines.lines
    assert 13 == log.total


def test_places_without_end_are_bounded() -> None:
    log, lines = make_log()
    for number in range(2500):
        log.note(f"place {number}")

    assert 2500 == len(lines.lines)
    assert len(log._places) <= 1000


def test_a_log_that_fails_does_not_cost_the_answer() -> None:
    class Broken(logging.Logger):
        def log(self, *args: object, **kwargs: object) -> None:
            raise MemoryError

    log = FaultLog(Broken("broken"))
    log.raised("access failed", caught())

    assert log.total >= 1

"""
Many requests with one new token at once: the plugin on its server, over a real socket.

The issuer's answer is held back until all of them wait, so that nothing here depends on speed.
"""

from __future__ import annotations

import resource
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from kong_token_exchange.errors import DeadlineError, IssuerUnavailableError
from kong_token_exchange.plugin import TokenExchangePlugin
from tests.support.fake_kong import Done, KongSide
from tests.support.fakes import Answer, FakeClock, error_response, token_response
from tests.support.running import Running, eventually
from tests.unit.test_flow import TARGET, Bench, config_with, result_token, target

CROWD = 1000

# Time enough to send them all on a machine that has other things to do; the most that loads.
PATIENT = {"deadline": 9_000}


@pytest.fixture(autouse=True, scope="module")
def descriptors() -> Iterator[None]:
    """Both ends of every connection are ours."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * CROWD + 200
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"{wanted} descriptors are needed, {hard} may be had")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Clock(FakeClock):
    """The wall clock stands where tokens are minted; the server's deadlines run."""

    def monotonic(self) -> float:
        return time.monotonic()


class Stage:
    """The plugin with a stub issuer on its server, and the requests that are under way."""

    def __init__(
        self,
        folder: Path,
        answer: Answer | list[Answer] | None = None,
        raw: dict[str, Any] | None = None,
    ) -> None:
        self.raw = raw or config_with(**PATIENT)
        self.bench = Bench(self.raw, answer, clock=Clock())
        plugin: Any = TokenExchangePlugin(lambda _: self.bench.flow, self.bench.clock)
        self.server = Running(plugin, folder, threads=4, queue_limit=4)
        self.sides: list[tuple[socket.socket, KongSide]] = []

    def __enter__(self) -> Self:
        self.server.__enter__()
        self.instance_id = self.server.kong.start(self.raw)
        return self

    def __exit__(self, *_: object) -> None:
        for sock, _ in self.sides:
            sock.close()
        self.server.__exit__()

    def ask(self, token: str, count: int = 1, **headers: str) -> None:
        """Send requests up to where they wait, each on a connection of its own."""
        kong = self.server.kong
        for _ in range(count):
            sock = kong.connect()
            side = KongSide(headers={"authorization": f"Bearer {token}", **headers}, sequence=2)
            sock.sendall(side.begin(self.instance_id))
            sock.sendall(side.receive(sock.recv(65536)))
            self.sides.append((sock, side))

    def crowd(self, token: str, count: int = CROWD) -> None:
        """Let *count* requests wait for one exchange."""
        self.ask(token, count)
        eventually(lambda: self.server.loop.stats().parked == count - 1)
        assert 1 == self.server.loop.stats().busy

    def ends(self) -> list[Done]:
        """Wait for the end of all of them."""
        done = [self.server.kong.converse(sock, side) for sock, side in self.sides]
        self.sides.clear()
        return done


def statuses(ends: list[Done]) -> Counter[int]:
    return Counter(200 if done.ended == "success" else done.exit.status if done.exit else 0 for done in ends)


def upstream(ends: list[Done]) -> set[str]:
    """Return what the upstream would see as credential."""
    return {
        value
        for done in ends
        for name, value in done["kong.service.request.set_header"]
        if name.lower() == "authorization"
    }


def minted(**claims: Any) -> str:
    return target.mint(aud=["gateway", "other"], **claims)


UNCACHED = {"cache": {"enabled": False}}
HIT = "requests,outcome=exchange,reason=same_issuer,cache=hit"
DOWN = IssuerUnavailableError(reason="issuer_status", facts={"status": 503})


@pytest.mark.parametrize("cache", [{}, UNCACHED], ids=["cached", "not-cached"])
def test_fault_113_a_thousand_requests_with_one_new_token_are_one_exchange(
    tmp_path: Path, cache: dict[str, Any]
) -> None:
    with Stage(tmp_path, raw=config_with(**PATIENT, **cache)) as stage:
        with stage.bench.sender.held():
            stage.crowd(minted())
        ends = stage.ends()
        stats = stage.server.loop.stats()

    assert Counter({200: CROWD}) == statuses(ends)
    assert 1 == stage.bench.exchanges
    assert 1 == len(upstream(ends))
    assert CROWD - 1 == stage.bench.metrics.counts[HIT]
    # The exchange is what is audited.
    assert 1 == len(stage.bench.audit.events)
    assert (1, 0, CROWD - 1) == (stats.threads, stats.parked, stats.shared)


@pytest.mark.parametrize(
    ("answer", "status", "reason"),
    [
        (DOWN, 503, "issuer_status"),
        (error_response("invalid_client", status=401), 500, "client_refused"),
        (token_response("no.token"), 502, None),
    ],
    ids=["FAULT-114-issuer-fails", "client-refused", "unusable-result"],
)
def test_what_refuses_one_of_a_thousand_refuses_them_all_and_is_tried_once(
    tmp_path: Path, answer: Answer, status: int, reason: str | None
) -> None:
    token = minted()
    with Stage(tmp_path, answer) as stage:
        with stage.bench.sender.held():
            stage.crowd(token)
        ends = stage.ends()

    assert Counter({status: CROWD}) == statuses(ends)
    assert 1 == stage.bench.exchanges
    assert set() == upstream(ends)
    events = stage.bench.audit.events
    assert CROWD == len(events)
    assert {("refuse", status)} == {(event.outcome, event.status) for event in events}
    # Each names the same subject and the same reason; the operator is told once.
    assert 1 == len({(event.reason, event.facts["iss"], event.facts["subject"]) for event in events})
    assert reason in (None, events[0].reason)
    counted = stage.bench.metrics.counts[f"requests,outcome=refuse,reason={events[0].reason}"]
    assert CROWD == counted
    assert 1 == sum(len(done["kong.log.err"]) for done in ends)


def test_exception_in_the_exchange_is_500_for_all_and_is_tried_once(tmp_path: Path) -> None:
    with Stage(tmp_path, ValueError("MARKED")) as stage:
        with stage.bench.sender.held():
            stage.crowd(minted(), 20)
        ends = stage.ends()

    assert Counter({500: 20}) == statuses(ends)
    assert 1 == stage.bench.exchanges
    assert "MARKED" not in stage.server.lines


def test_a_deadline_is_that_of_the_one_who_had_it(tmp_path: Path) -> None:
    late = DeadlineError(reason="deadline_reading")
    with Stage(tmp_path, [late, token_response(result_token())]) as stage:
        with stage.bench.sender.held():
            stage.crowd(minted(), 20)
        ends = stage.ends()

    # The first of them is too late; another one asks, and the rest wait for that.
    assert Counter({200: 19, 504: 1}) == statuses(ends)
    assert 504 == statuses(ends[:1]).popitem()[0]
    assert 2 == stage.bench.exchanges


def test_who_waits_for_too_long_is_refused_and_recorded_like_anybody_else(tmp_path: Path) -> None:
    with Stage(tmp_path, raw=config_with(deadline=300)) as stage:
        with stage.bench.sender.held():
            stage.crowd(minted(), 3)
            owner = stage.sides.pop(0)
            ends = stage.ends()
        stats = stage.server.loop.stats()
        owner[0].close()

    assert Counter({504: 2}) == statuses(ends)
    events = stage.bench.audit.events[:2]
    assert {("deadline_waiting", 504)} == {(event.reason, event.status) for event in events}
    assert {TARGET} == {event.facts["iss"] for event in events}
    assert 2 == stats.timed_out


def test_another_token_does_not_wait_for_the_crowd(tmp_path: Path) -> None:
    first, second = minted(), minted(sub="somebody-else")
    answers = [token_response(result_token()), token_response(result_token(sub="somebody-else"))]
    with Stage(tmp_path, answers) as stage:
        with stage.bench.sender.held():
            stage.crowd(first, 100)
            eventually(lambda: stage.bench.exchanges == 1)
            stage.ask(second)
            eventually(lambda: stage.bench.exchanges == 2)
        ends = stage.ends()

    assert Counter({200: 101}) == statuses(ends)
    assert 2 == len(upstream(ends))
    assert not upstream(ends[:100]) & upstream(ends[100:])


def test_gw_08_warm_requests_are_answered_while_crowds_wait_with_every_thread_taken(tmp_path: Path) -> None:
    known = minted(jti="known")
    with Stage(tmp_path) as stage:
        stage.ask(known)
        stage.ends()
        with stage.bench.sender.held():
            for number in range(4):
                stage.ask(minted(jti=str(number)), 25)
            eventually(lambda: stage.server.loop.stats().parked == 4 * 24)
            waiting, stage.sides = stage.sides, []
            stage.ask(known, 10)
            assert Counter({200: 10}) == statuses(stage.ends())
            stage.sides = waiting
        assert Counter({200: 100}) == statuses(stage.ends())

    assert 5 == stage.bench.exchanges

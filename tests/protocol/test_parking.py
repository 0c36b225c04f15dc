"""
Events that wait for another one's access: who gets what, and that nobody gets what is another's.

The loop is driven round by round, with a pool without threads: the test says how each access ends.
"""

import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kong_token_exchange.pluginserver import wire
from kong_token_exchange.pluginserver.connection import Connection, Host, State
from kong_token_exchange.pluginserver.contract import Calls, Facts, Outcome, Patience, exit_with, proceed
from kong_token_exchange.pluginserver.faults import make_faults
from kong_token_exchange.pluginserver.instances import LocalInstances
from kong_token_exchange.pluginserver.loop import SLICE_EVENTS, Loop
from kong_token_exchange.pluginserver.offload import Access, Called, Ended, Pool
from kong_token_exchange.pluginserver.parking import MAX_PARKED
from tests.support.fake_kong import Done, KongSide, Step
from tests.support.plugins import AUTHORIZATION, Plugin, make_log
from tests.support.running import Running, eventually

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 10.0
PATIENCE_S = 4.0
OVERDUE = exit_with(504, b"overdue")


def answer(*words: object) -> Outcome:
    """Let the request go on with a header that says for whom the answer was made."""
    return proceed(Calls().set_header("x-for", " ".join(map(str, words))))


class Patient:
    """An instance whose events wait for each other, with a memory that the test fills."""

    prefetch = (AUTHORIZATION,)

    def __init__(self, name: str) -> None:
        self.name = name
        self.memory: dict[str, Outcome | BaseException] = {}
        self.asked: list[str] = []
        self.within_s: float | None = PATIENCE_S
        self.fault: BaseException | None = None
        self.closed = False

    def warm(self, facts: Facts) -> Outcome | None:
        self.asked.append(facts[0])
        found = self.memory.get(facts[0])
        if isinstance(found, BaseException):
            raise found
        return found

    def coalesce(self, facts: Facts) -> Patience | None:
        if self.fault is not None:
            raise self.fault
        return None if self.within_s is None else Patience(self.within_s, self.overdue)

    def overdue(self, facts: Facts) -> Outcome:
        return exit_with(504, f"{self.name} {facts[0]} overdue".encode())

    def access(self, kong: Any) -> None:
        raise AssertionError("the test ends what is in the pool")

    def close(self) -> None:
        self.closed = True


class HandPool(Pool):
    """A pool without threads: `running` is what was given to it, and the test ends it."""

    def __init__(self, *, threads: int, **parts: Any) -> None:
        super().__init__(threads=threads, queue_limit=0, **parts)
        self.running: list[Access] = []
        self.began = 0

    def submit(self, access: Access) -> bool:
        if self.busy >= self._limit:
            return False
        self.size = max(self.size, self.busy + 1)
        self.busy += 1
        self.began += 1
        access.started = True
        self.running.append(access)
        return True

    def recount(self) -> None: ...

    def run(self, job: Callable[[], None]) -> None:
        job()


class Event:
    """One request: Kong's side of it, and our end of its connection."""

    def __init__(self, desk: "Desk", instance: Patient, instance_id: int, token: str) -> None:
        self.instance, self.token = instance, token
        self.ours, theirs = socket.socketpair()
        self.ours.settimeout(DEADLINE_S)
        self.side = KongSide([Step("kong.request.get_header", "authorization", token)])
        desk.loop.adopt(theirs)
        self.peer = desk.loop._peers[theirs.fileno()]
        self.ours.sendall(self.side.begin(instance_id))
        desk.step()
        self.ours.sendall(self.side.receive(self.ours.recv(65536)))
        desk.step()

    def poll(self) -> Done | None:
        """Take what has arrived; return how the event went, once it is over."""
        self.ours.setblocking(False)
        try:
            while not self.side.over and (data := self.ours.recv(65536)):
                self.side.receive(data)
        except (BlockingIOError, ConnectionResetError):
            pass
        return self.side.done if self.side.over else None

    @property
    def ended(self) -> Any:
        """Return for whom the answer was made, the status of an exit with its body, or None."""
        done = self.poll()
        if done is None:
            return None
        if done.exit is not None:
            return done.exit.status, done.exit.body.decode()
        return done["kong.service.request.set_header"][0][1]

    @property
    def state(self) -> State:
        return self.peer.connection.state

    def leave(self) -> None:
        self.ours.close()


class Desk:
    """A loop, two instances, and a clock that stands still until it is moved."""

    def __init__(self, *, threads: int = 8, max_parked: int = MAX_PARKED, drain_s: float = 5.0) -> None:
        self.time = 1000.0
        self.instances: list[Patient] = []
        self.plugin = Plugin(self.make)
        self.faults = make_faults()
        self.log, self.lines = make_log()
        self.registry = LocalInstances(
            self.plugin,
            failure=self.faults.server_error,
            log=self.log,
            grace_s=0.0,
            clock=lambda: self.time,
        )
        host = Host(self.plugin, self.registry, faults=self.faults, log=self.log)
        self.loop = Loop(
            host,
            lambda post: HandPool(threads=threads, faults=self.faults, log=self.log, post=post),
            deadline_s=DEADLINE_S,
            drain_s=drain_s,
            max_parked=max_parked,
            clock=lambda: self.time,
        )
        self.pool: Any = self.loop._pool
        self.ids: dict[str, int] = {}
        self.events: list[Event] = []
        for name in "ab":
            self.start(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for event in self.events:
            event.ours.close()
        self.loop.close()

    def make(self, config: Mapping[str, Any]) -> Any:
        self.instances.append(Patient(config["name"]))
        return self.instances[-1]

    def start(self, name: str) -> Patient:
        started = self.registry.start("test-plugin", f'{{"name": "{name}"}}'.encode())
        self.ids[name] = started.instance_id
        return self.instance(name)

    def instance(self, name: str) -> Patient:
        return [instance for instance in self.instances if instance.name == name][-1]

    def ask(self, name: str, token: str) -> Event:
        event = Event(self, self.instance(name), self.ids[name], token)
        self.events.append(event)
        return event

    def crowd(self, count: int, name: str = "a", token: str = "t") -> tuple[Access, list[Event]]:
        """Ask *count* times at once; return the one access, and the events, the owner first."""
        before = self.pool.began
        events = [self.ask(name, token) for _ in range(count)]
        assert before + 1 == self.pool.began
        return self.pool.running[-1], events

    def step(self) -> None:
        self.loop.wake()
        self.loop._step()

    def steps(self) -> None:
        """Go on until all that land have landed."""
        self.step()
        while self.loop._parking.is_landing:
            self.step()

    def advance(self, seconds: float) -> None:
        self.time += seconds
        self.steps()

    def end(
        self,
        access: Access,
        outcome: Outcome | None = None,
        *,
        again: Callable[[], Outcome | None] | None = None,
        failed: bool = False,
    ) -> None:
        """Let the access come to its end, as a thread would."""
        self.pool.running.remove(access)
        access.again, access.failed = again, failed
        self.loop.post(Ended(access, self.faults.server_error if failed else outcome or answer("own")))
        self.steps()

    @property
    def parked(self) -> int:
        return self.loop.stats().parked


@pytest.fixture
def desk() -> Iterator[Desk]:
    with Desk() as desk:
        yield desk


# --- one access for all ---------------------------------------------------------------


def test_one_event_of_a_crowd_holds_a_thread_and_the_others_are_parked(desk: Desk) -> None:
    access, (owner, *others) = desk.crowd(50)

    assert State.OFF_LOOP == owner.state
    assert {State.PARKED} == {event.state for event in others}
    assert (49, 1) == (desk.parked, desk.loop.stats().busy)
    assert [access] == desk.pool.running


def test_what_is_in_memory_when_the_owner_ends_answers_all_who_waited(desk: Desk) -> None:
    access, (owner, *others) = desk.crowd(20)
    desk.instance("a").memory["t"] = answer("a", "t", "stored")
    desk.end(access, again=lambda: answer("never asked"))

    assert "own" == owner.ended
    assert ["a t stored"] * 19 == [event.ended for event in others]
    assert {State.IDLE} == {event.state for event in others}
    assert (0, 19, 1) == (desk.parked, desk.loop.stats().shared, desk.pool.began)


def test_what_memory_cannot_answer_is_answered_by_what_the_owner_offers_each_time_anew(desk: Desk) -> None:
    access, (owner, *others) = desk.crowd(5)
    numbers = iter(range(10))
    desk.end(access, again=lambda: answer("a", "t", next(numbers)))

    # In the order of their arrival.
    assert ["own", "a t 0", "a t 1", "a t 2", "a t 3"] == [owner.ended, *(event.ended for event in others)]
    assert 1 == desk.pool.began


def test_exception_in_the_access_is_500_for_all_and_is_not_tried_again_for_each(desk: Desk) -> None:
    access, events = desk.crowd(5)
    desk.end(access, failed=True)

    assert {500} == {event.ended[0] for event in events}
    assert 1 == desk.pool.began


def test_connections_of_answered_events_are_used_again(desk: Desk) -> None:
    access, (_, other) = desk.crowd(2)
    desk.end(access, again=lambda: answer("a", "t", "shared"))
    assert "a t shared" == other.ended

    other.side = KongSide([Step("kong.request.get_header", "authorization", "u")], sequence=3)
    # The answer to the header that was set, then the next event.
    other.ours.sendall(wire.EMPTY_FRAME + other.side.begin(desk.ids["a"]))
    desk.instance("a").memory["u"] = answer("a", "u")
    desk.step()
    other.ours.setblocking(True)
    other.ours.sendall(other.side.receive(other.ours.recv(65536)))
    desk.step()

    assert "a u" == other.ended


def test_event_for_which_nothing_is_made_runs_and_those_behind_it_wait_for_it(desk: Desk) -> None:
    first, (_, *others) = desk.crowd(4)
    desk.end(first, again=lambda: None)

    assert [State.OFF_LOOP, State.PARKED, State.PARKED] == [event.state for event in others]
    assert 2 == desk.pool.began


def test_where_nothing_is_shared_the_last_one_runs_and_the_others_wait_for_it(desk: Desk) -> None:
    first, (owner, *others) = desk.crowd(4)
    desk.end(first)
    *parked, last = others

    assert "own" == owner.ended
    assert State.OFF_LOOP == last.state
    assert {State.PARKED} == {event.state for event in parked}
    second = desk.pool.running[-1]
    assert (2, first.received_at) == (desk.pool.began, second.received_at)
    desk.end(second, again=lambda: answer("a", "t", "shared"))
    assert ["own", "a t shared", "a t shared"] == [last.ended, *(event.ended for event in parked)]


def test_event_that_comes_while_others_land_asks_for_itself(desk: Desk) -> None:
    access, events = desk.crowd(SLICE_EVENTS + 10)
    desk.pool.running.remove(access)
    access.again = lambda: answer("a", "t", "shared")
    desk.loop.post(Ended(access, answer("own")))
    desk.step()
    assert desk.loop._parking.is_landing
    late = desk.ask("a", "t")

    assert State.OFF_LOOP == late.state
    assert 2 == desk.pool.began
    desk.steps()
    assert {"own", "a t shared"} == {event.ended for event in events}
    desk.end(desk.pool.running[-1])
    assert "own" == late.ended


def test_a_crowd_lands_in_slices_and_warm_events_go_on_in_between(desk: Desk) -> None:
    desk.instance("b").memory["w"] = answer("b", "w")
    access, events = desk.crowd(5 * SLICE_EVENTS + 1)
    desk.pool.running.remove(access)
    access.again = lambda: answer("a", "t", "shared")
    desk.loop.post(Ended(access, answer("own")))
    desk.step()
    landed = sum(event.ended is not None for event in events)
    warm = desk.ask("b", "w")

    assert SLICE_EVENTS + 1 == landed
    assert "b w" == warm.ended
    assert desk.loop._parking.is_landing
    desk.steps()
    assert all(event.ended for event in events)


def test_a_slice_ends_with_its_time(desk: Desk) -> None:
    access, events = desk.crowd(10)
    desk.pool.running.remove(access)

    def slow() -> Outcome:
        desk.time += 0.002
        return answer("a", "t", "shared")

    access.again = slow
    desk.loop.post(Ended(access, answer("own")))
    desk.step()

    assert 2 == sum(event.ended is not None for event in events)


# --- who does not wait ----------------------------------------------------------------


@pytest.mark.parametrize(("name", "token"), [("b", "t"), ("a", "u"), ("a", "T")])
def test_other_instance_or_other_facts_do_not_wait(desk: Desk, name: str, token: str) -> None:
    desk.crowd(2)
    other = desk.ask(name, token)

    assert State.OFF_LOOP == other.state
    assert (2, 1) == (desk.pool.began, desk.parked)


def test_instance_that_says_so_or_says_nothing_has_no_event_wait(desk: Desk) -> None:
    desk.instance("a").within_s = None
    for _ in range(3):
        assert State.OFF_LOOP == desk.ask("a", "t").state

    assert (3, 0) == (desk.pool.began, desk.parked)


def test_instance_that_was_closed_and_started_anew_is_another_one(desk: Desk) -> None:
    access, (_, waiting) = desk.crowd(2)
    former = desk.instance("a")
    desk.registry.close(desk.ids["a"])
    desk.time += 1.0
    desk.loop._keep_house(desk.time)
    assert former.closed
    assert desk.start("a") is not former
    anew = desk.ask("a", "t")

    assert State.OFF_LOOP == anew.state
    desk.end(access, again=lambda: answer("former"))
    assert ("former", None) == (waiting.ended, anew.ended)


def test_access_that_asks_kong_for_more_lets_the_others_run_by_themselves(desk: Desk) -> None:
    access, (_, *others) = desk.crowd(3)
    desk.loop.post(Called(access, b"", 0))
    desk.steps()

    assert {State.OFF_LOOP} == {event.state for event in others}
    assert (3, 0) == (desk.pool.began, desk.parked)
    # Nor does any of them share what it finds.
    for running in desk.pool.running[1:]:
        desk.end(running, again=lambda: answer("never"))
    assert ["own", "own"] == [event.ended for event in others]


def test_fault_in_what_the_plugin_says_is_500(desk: Desk) -> None:
    desk.instance("a").fault = SystemExit("MARKED")

    assert 500 == desk.ask("a", "t").ended[0]
    assert "MARKED" not in desk.lines


@pytest.mark.parametrize("where", ["warm", "again", "no-outcome"])
def test_fault_while_an_event_lands_is_500_for_it(desk: Desk, where: str) -> None:
    access, (owner, *others) = desk.crowd(3)
    if where == "warm":
        desk.instance("a").memory["t"] = ValueError("MARKED")

    def again() -> Any:
        if where == "again":
            raise SystemExit("MARKED")
        return "no outcome"

    desk.end(access, again=again)

    assert "own" == owner.ended
    assert [500, 500] == [event.ended[0] for event in others]
    assert "MARKED" not in desk.lines


def test_fault_of_ours_while_an_event_lands_is_500_for_it_alone(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    access, (_, broken, other) = desk.crowd(3)
    settle = Connection.settle

    def failing(connection: Connection, *arguments: Any) -> bytes | None:
        if connection is broken.peer.connection:
            raise RuntimeError("MARKED")
        return settle(connection, *arguments)

    monkeypatch.setattr(Connection, "settle", failing)
    desk.end(access, again=lambda: answer("a", "t", "shared"))

    assert (500, "a t shared") == (broken.ended[0], other.ended)
    assert "a connection failed: RuntimeError" in desk.lines
    assert "MARKED" not in desk.lines
    desk.advance(DEADLINE_S)
    assert (0, 0) == (desk.parked, desk.loop.stats().timed_out)


# --- bounds ---------------------------------------------------------------------------


def test_more_than_may_be_parked_are_refused_at_once() -> None:
    with Desk(max_parked=3) as desk:
        access, events = desk.crowd(6)

        assert [503, 503] == [event.ended[0] for event in events[4:]]
        assert (3, 2) == (desk.parked, desk.loop.stats().refused_full)
        desk.end(access, again=lambda: answer("a", "t", "shared"))
        assert ["own", *["a t shared"] * 3] == [event.ended for event in events[:4]]


def test_where_the_pool_is_full_those_who_must_run_are_refused() -> None:
    with Desk(threads=1) as desk:
        access, (_, *others) = desk.crowd(3)
        desk.pool.running.remove(access)
        desk.pool.busy += 1  # another event was quicker
        desk.loop.post(Ended(access, answer("own")))
        desk.steps()

        assert [503, 503] == [event.ended[0] for event in others]
        assert 0 == desk.parked
        desk.advance(DEADLINE_S)
        assert 0 == desk.loop.stats().timed_out


def test_parked_event_ends_with_its_own_deadline_counted_from_its_arrival(desk: Desk) -> None:
    _, (owner, early) = desk.crowd(2)
    desk.time += 1.0
    late = desk.ask("a", "t")
    desk.advance(PATIENCE_S - 1.0)

    assert (504, "a t overdue") == early.ended
    assert (None, None) == (owner.ended, late.ended)
    desk.advance(1.0)
    assert (504, "a t overdue") == late.ended
    assert (0, 2, 1) == (desk.parked, desk.loop.stats().timed_out, desk.pool.began)
    desk.advance(DEADLINE_S - PATIENCE_S - 1.0)
    assert 504 == owner.ended[0]


def test_many_deadlines_at_once_are_taken_in_slices(desk: Desk) -> None:
    def slow(facts: Facts) -> Outcome:
        desk.time += 0.002
        return OVERDUE

    desk.instance("a").overdue = slow  # type: ignore[method-assign]
    _, (_, *waiting) = desk.crowd(6)
    desk.time += PATIENCE_S
    for number in range(1, 6):
        desk.step()
        assert number == sum(event.ended is not None for event in waiting)
        assert number == 5 or desk.loop._timeout() == 0


def test_patience_ends_with_the_servers_deadline_at_the_latest(desk: Desk) -> None:
    desk.instance("a").within_s = 10 * DEADLINE_S
    _, (_, waiting) = desk.crowd(2)
    desk.advance(DEADLINE_S)

    assert waiting.ended[0] == 504


def test_fault_in_the_answer_to_a_deadline_is_500(desk: Desk) -> None:
    desk.instance("a").overdue = lambda facts: 1 // 0  # type: ignore[assignment, method-assign]
    _, (_, waiting) = desk.crowd(2)
    desk.advance(PATIENCE_S)

    assert 500 == waiting.ended[0]


def test_event_that_was_parked_first_has_the_time_of_any_other_in_the_pool(desk: Desk) -> None:
    first, (_, second) = desk.crowd(2)
    desk.advance(1.0)
    desk.end(first)
    assert State.OFF_LOOP == second.state
    desk.advance(PATIENCE_S)
    assert second.ended is None
    desk.advance(DEADLINE_S - PATIENCE_S - 1.0)

    assert 504 == second.ended[0]


def test_nobody_waits_for_an_access_that_hangs(desk: Desk) -> None:
    desk.instance("a").within_s = DEADLINE_S
    hanging, (owner,) = desk.crowd(1)
    desk.time += 1.0
    waiting = desk.ask("a", "t")
    desk.advance(DEADLINE_S - 1.0)

    assert 504 == owner.ended[0]
    assert State.OFF_LOOP == waiting.state
    assert (2, 1) == (desk.pool.began, desk.pool.lost)
    desk.end(hanging, again=lambda: answer("too late"))
    desk.end(desk.pool.running[-1])
    assert "own" == waiting.ended


# --- those who leave ------------------------------------------------------------------


def test_parked_event_whose_client_left_is_forgotten(desk: Desk) -> None:
    access, (_, gone, stays) = desk.crowd(3)
    gone.leave()
    desk.step()

    assert (1, 2) == (desk.parked, desk.loop.stats().connections)
    desk.end(access, again=lambda: answer("a", "t", "shared"))
    assert "a t shared" == stays.ended
    desk.advance(DEADLINE_S)
    assert not desk.loop._deadlines


def test_owner_whose_client_left_goes_on_for_the_others(desk: Desk) -> None:
    access, (owner, waiting) = desk.crowd(2)
    owner.leave()
    desk.step()
    assert access.over
    assert State.PARKED == waiting.state
    desk.end(access, again=lambda: answer("a", "t", "shared"))

    assert "a t shared" == waiting.ended


def test_bytes_nobody_asked_for_end_a_parked_event(desk: Desk) -> None:
    _, (_, waiting) = desk.crowd(2)
    waiting.ours.sendall(wire.frame(b"junk"))
    desk.step()

    assert 500 == waiting.ended[0]
    assert 0 == desk.parked


def test_stop_waits_for_parked_events(desk: Desk) -> None:
    access, (_, waiting) = desk.crowd(2)
    desk.loop.request_stop()
    desk.step()
    assert State.PARKED == waiting.state
    desk.end(access, again=lambda: answer("a", "t", "shared"))

    assert "a t shared" == waiting.ended


def test_stop_does_not_wait_for_parked_events_for_ever() -> None:
    with Desk(drain_s=1.0) as desk:
        _, (_, waiting) = desk.crowd(2)
        desk.loop.request_stop()
        desk.step()
        desk.advance(1.0)
        assert desk.loop._finished()
        desk.loop.close()

        assert b"" == waiting.ours.recv(10)
        assert 0 == desk.parked


def test_event_that_is_over_keeps_nothing_of_the_request(desk: Desk) -> None:
    access, (_, waiting) = desk.crowd(2, token="MARKED-TOKEN")
    (parked,) = (held for held in desk.loop._parking._group_of if held is not access)
    assert parked.prefetched is access.prefetched
    desk.end(access, again=lambda: answer("a"))

    assert "a" == waiting.ended
    assert () == parked.prefetched
    assert not desk.loop._parking._group_of
    assert not desk.loop._parking._open
    assert not desk.loop._parking._landing
    assert [] == waiting.peer.connection._replies


# --- the page for plugin authors ------------------------------------------------------


@pytest.mark.parametrize(("name", "ended"), [("Ada", [("x-guest", "Ada")]), (None, [])])
def test_example_of_the_documentation_asks_once_for_all(
    tmp_path: Path, name: str | None, ended: list[Any]
) -> None:
    page = (ROOT / "docs" / "plugin-server.md").read_text()
    found: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[2], found)
    asked, leave = [], threading.Event()

    class Directory:
        def find(self, key: str) -> str | None:
            asked.append(key)
            assert leave.wait(DEADLINE_S)
            return name

    with Running(Plugin(lambda config: found["Patient"](Directory())), tmp_path) as server:
        instance_id = server.kong.start({})
        waiting = []
        for _ in range(5):
            sock, side = server.kong.connect(), KongSide(headers={"x-key": "k"})
            sock.sendall(side.begin(instance_id))
            sock.sendall(side.receive(sock.recv(65536)))
            waiting.append((sock, side))
        eventually(lambda: server.loop.stats().parked == 4)
        leave.set()
        done = [server.kong.converse(sock, side) for sock, side in waiting]

    assert [ended] * 5 == [one["kong.service.request.set_header"] for one in done]
    assert ["success" if name else "exit"] * 5 == [one.ended for one in done]
    assert ["k"] == asked


# --- nobody gets what is another's ----------------------------------------------------

OPERATIONS = (
    *["ask"] * 6,
    *["offer", "offer-none", "keep", "fail", "store", "call"],
    *["leave", "wait", "forget", "start-anew", "step"],
)


class Model:
    """What may come of each event, whatever happens to the others."""

    def __init__(self, desk: Desk, chance: random.Random) -> None:
        self.desk, self.chance = desk, chance
        # An instance started anew is another one: answers say which.
        self.marks: dict[int, str] = {}

    def mark(self, instance: Patient) -> str:
        return self.marks.setdefault(id(instance), f"{instance.name}{len(self.marks)}")

    def run(self, operation: str) -> None:
        desk, chance = self.desk, self.chance
        match operation:
            case "ask":
                desk.ask(chance.choice("ab"), chance.choice(["t", "u", "v"]))
            case "leave" if desk.events:
                chance.choice(desk.events).leave()
                desk.events = [event for event in desk.events if event.ours.fileno() >= 0]
            case "wait":
                desk.time += chance.choice([0.1, 1.0, 3.0])
            case "forget":
                chance.choice(desk.instances).memory.clear()
            case "start-anew":
                name = chance.choice("ab")
                desk.registry.close(desk.ids[name])
                desk.time += 0.1
                desk.loop._keep_house(desk.time)
                desk.start(name)
            case "step":
                desk.step()
            case _ if desk.pool.running:
                self.end(chance.choice(desk.pool.running), operation)
        self.check()

    def end(self, access: Access, operation: str) -> None:
        """Let an access come to its end; all that it makes says for whom it was made."""
        desk = self.desk
        instance = access.instance.warm.__self__  # type: ignore[attr-defined]
        token = wire.decode_string(access.prefetched[0])
        whose = self.mark(instance), token
        if operation == "call":
            # Answered by nobody here: the event ends when its time is over.
            desk.loop.post(Called(access, b"", 0))
            desk.step()
            return
        if operation == "store":
            instance.memory[token] = answer(*whose, "stored")
        offers: dict[str, Any] = {"offer": lambda: answer(*whose, "shared"), "offer-none": lambda: None}
        desk.pool.running.remove(access)
        access.again, access.failed = offers.get(operation), operation == "fail"
        desk.loop.post(Ended(access, desk.faults.server_error if access.failed else answer(*whose, "own")))

    def check(self) -> None:
        for event in self.desk.events:
            ended = event.ended
            if isinstance(ended, str):
                assert [self.mark(event.instance), event.token] == ended.split()[:2]
            elif ended is not None and "overdue" in ended[1]:
                assert f"{event.instance.name} {event.token} overdue" == ended[1]
        parked = sum(event.state is State.PARKED for event in self.desk.events)
        # Those whose clients left are noticed in the next round.
        assert self.desk.parked >= parked


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(OPERATIONS), min_size=5, max_size=60), st.integers(0, 2**32))
def test_no_event_gets_what_was_made_for_other_facts_or_another_instance(
    operations: list[str], seed: int
) -> None:
    with Desk(threads=4) as desk:
        model = Model(desk, random.Random(seed))
        for operation in operations:
            model.run(operation)
        # Whatever is still open ends, by itself or with its time.
        for _ in range(4):
            for access in list(desk.pool.running):
                model.end(access, "keep")
            desk.advance(DEADLINE_S)
            model.check()

        assert all(event.ended is not None for event in desk.events)
        if "call" not in operations:
            # A thread that waits for Kong does not end; else nothing of ours goes wrong on the way.
            assert "a connection failed" not in desk.lines
        assert (0, 0) == (desk.parked, len(desk.loop._parking._group_of))
        assert not desk.loop._parking._open


def test_the_clock_of_this_machine_is_the_one_that_deadlines_are_counted_by() -> None:
    began = time.monotonic()
    access = Access(Any, (), None, lambda post: None)  # type: ignore[arg-type]

    assert began <= access.received_at <= time.monotonic()

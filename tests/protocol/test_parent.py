"""
When a server whose parent is gone ends, and when it waits for a successor.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from kong_token_exchange.pluginserver import parent as parent_module
from kong_token_exchange.pluginserver.parent import (
    HANDOVER_S,
    SETTLE_S,
    STARTER_GRACE_S,
    Ancestor,
    Handover,
    Parent,
)
from tests.support.running import WAIT_S, eventually


class Family:
    """Keeper, worker and master, who can die; and a path that can be taken over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stats = {30: self.stat(20), 20: self.stat(10), 10: self.stat(1)}
        self.parent_pid = 30
        self.now = 100.0
        self.current = True
        monkeypatch.setattr(parent_module, "_stat", lambda pid: self.stats.get(pid, []))
        monkeypatch.setattr("os.getppid", lambda: self.parent_pid)
        self.handover = Handover(Parent(), lambda: self.current, clock=lambda: self.now)

    @staticmethod
    def stat(parent: int, state: str = "S", started: str = "5") -> list[str]:
        return [state, str(parent), *["0"] * 17, started]

    def lose(self, *pids: int) -> None:
        for pid in pids:
            del self.stats[pid]
            if pid == self.parent_pid:
                self.parent_pid = 1

    def over_after(self, seconds: float) -> bool:
        self.now += seconds
        return self.handover.is_over()

    def ends_now(self) -> bool:
        """Whether it ends as soon as whoever is about to connect has done so."""
        return not self.over_after(0.0) and self.over_after(SETTLE_S)


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Family:
    return Family(monkeypatch)


def test_server_goes_on_while_its_parent_lives(family: Family) -> None:
    family.current = False

    assert not family.over_after(1000.0)


def test_at_a_reload_it_goes_on_until_a_successor_has_the_path(family: Family) -> None:
    family.lose(30, 20)
    assert not family.over_after(0.0)
    assert not family.over_after(HANDOVER_S - 0.1)
    family.current = False

    assert family.ends_now()


def test_it_ends_at_once_when_a_successor_was_there_before(family: Family) -> None:
    family.current = False
    family.lose(30)

    assert family.ends_now()


def test_successor_that_never_comes_is_waited_for_a_bounded_time(family: Family) -> None:
    family.lose(30, 20)
    assert not family.over_after(0.0)
    assert not family.over_after(HANDOVER_S)

    assert family.over_after(SETTLE_S)


def test_without_a_gateway_nobody_is_waited_for(family: Family) -> None:
    family.lose(30, 20, 10)

    assert family.ends_now()


def test_gateway_that_ends_meanwhile_ends_the_wait(family: Family) -> None:
    family.lose(30, 20)
    assert not family.over_after(1.0)
    family.lose(10)

    assert family.ends_now()


def test_worker_that_stays_starts_another_once_this_one_has_ended(family: Family) -> None:
    family.lose(30)
    assert not family.over_after(0.0)
    assert not family.over_after(STARTER_GRACE_S - 0.1)
    assert not family.over_after(0.1)

    assert family.over_after(SETTLE_S)


def test_worker_that_ends_a_moment_after_the_keeper_is_a_reload(family: Family) -> None:
    family.lose(30)
    assert not family.over_after(STARTER_GRACE_S / 2)
    family.lose(20)
    assert not family.over_after(STARTER_GRACE_S)
    assert not family.over_after(STARTER_GRACE_S)


@pytest.mark.parametrize(
    "stat", [Family.stat(1, state="Z"), Family.stat(1, started="6"), []], ids=["zombie", "another", "none"]
)
def test_master_that_is_dead_or_another_process_is_no_gateway(family: Family, stat: list[str]) -> None:
    family.lose(30, 20)
    family.stats[10] = stat

    assert family.ends_now()


def test_nothing_is_waited_for_where_processes_cannot_be_seen(family: Family) -> None:
    family.stats.clear()
    handover = Handover(Parent(), lambda: True, clock=lambda: family.now)
    family.parent_pid = 1

    assert not handover.is_over()
    family.now += SETTLE_S
    assert handover.is_over()


def test_changed_parent_is_noticed_by_a_thread(family: Family) -> None:
    stops: list[bool] = []

    class Process:
        def request_stop(self) -> None:
            stops.append(True)

    with family.handover.watched(Process(), check_s=0.001):
        assert [] == stops
        family.lose(30, 20, 10)

        def stopped() -> list[bool]:
            family.now += 1.0
            return stops

        eventually(stopped)
    assert [True] == stops


def test_thread_ends_with_a_process_that_ends_by_itself(family: Family) -> None:
    with family.handover.watched(None, check_s=0.001):  # type: ignore[arg-type] # nobody is asked to stop
        asked = len(threading.enumerate())
    assert asked - 1 == len(threading.enumerate())


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate(timeout=WAIT_S)


def test_ancestor_is_seen_alive_and_dead(sleeper: subprocess.Popen[bytes]) -> None:
    ancestor = Ancestor(sleeper.pid)
    assert ancestor.is_alive()
    assert (os.getpid(), True) == (ancestor.parent().pid, ancestor.parent().is_alive())
    sleeper.kill()
    # Nobody has waited for it yet: a zombie.
    eventually(lambda: not ancestor.is_alive())
    sleeper.wait(WAIT_S)

    assert not ancestor.is_alive()
    assert not ancestor.parent().is_alive()

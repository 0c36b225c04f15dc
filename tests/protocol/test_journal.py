"""
The journal of instances: several registries over one, in this process and in forked ones.
"""

import fcntl
import json
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kong_token_exchange.pluginserver import journal as journal_module
from kong_token_exchange.pluginserver import wire
from kong_token_exchange.pluginserver.connection import State
from kong_token_exchange.pluginserver.contract import exit_with
from kong_token_exchange.pluginserver.instances import fingerprint
from kong_token_exchange.pluginserver.journal import Journal, JournalInstances, JournalLockError
from tests.protocol.test_faults import FakeClock
from tests.support.fake_kong import KongSide
from tests.support.plugins import Bench, Instance, Plugin, make_log

# Python 3.12 and later warn of any fork beside threads, and other tests have some.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

GRACE_S = 60.0


def encode(audience: str, **members: Any) -> bytes:
    return json.dumps({"audience": audience, "__seq__": 1, **members}).encode()


class Registry:
    """One worker's view of a journal."""

    def __init__(
        self, journal: Journal, clock: FakeClock, plugin: Plugin | None = None, **options: Any
    ) -> None:
        self.plugin = plugin or Plugin()
        self.log, self.lines = make_log(clock=clock)
        options = {"clock": clock, "wall_clock": lambda: 1700.5, "grace_s": GRACE_S, **options}
        self.it = JournalInstances(
            self.plugin, journal, failure=exit_with(500, b"failed"), log=self.log, **options
        )

    def start(self, audience: str, **members: Any) -> int:
        return self.it.start("test-plugin", encode(audience, **members)).instance_id

    def audience(self, instance_id: int) -> Any:
        instance = self.it.find(instance_id)
        if instance is None:
            return None
        # The configuration it was started with stands behind the digest.
        return next(
            config["audience"]
            for config in self.plugin.started
            if fingerprint("test-plugin", json.dumps(config).encode()) == instance.digest
        )


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def journal() -> Iterator[Journal]:
    made = Journal()
    yield made
    made.close()


@pytest.fixture
def two(journal: Journal, clock: FakeClock) -> tuple[Registry, Registry]:
    return Registry(journal, clock), Registry(journal, clock)


def test_record_of_an_id_that_nobody_started_is_refused(
    two: tuple[Registry, Registry], journal: Journal
) -> None:
    two[0].start("a")
    journal.append(journal_module._encode(journal_module._Kind.AGAIN, 4242))

    with pytest.raises(OSError, match="did not start"):
        two[1].start("b")


# --- ids ------------------------------------------------------------------------------


def test_id_started_in_one_worker_is_found_in_the_other(two: tuple[Registry, Registry]) -> None:
    first, second = two
    ids = {audience: first.start(audience) for audience in ("a", "b", "c")}

    for audience, instance_id in ids.items():
        assert audience == second.audience(instance_id)
        assert instance_id == second.start(audience, __seq__=9)
    assert ["a", "b", "c"] == [config["audience"] for config in second.plugin.started]
    assert {1700} == {instance.started_at for instance in second.it._instances.values()}


def test_id_is_the_one_that_a_single_process_gives(two: tuple[Registry, Registry]) -> None:
    digest = fingerprint("test-plugin", encode("a"))

    assert int.from_bytes(digest[:4], "big") & 0x7FFF_FFFF == two[0].start("a")


def test_unknown_id_is_unknown_and_costs_no_lock(
    two: tuple[Registry, Registry], journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance_id = two[0].start("a")
    assert two[1].it.find(instance_id) is not None
    monkeypatch.setattr(journal, "locked", lambda: pytest.fail("locked"))

    assert two[1].it.find(instance_id ^ 1) is None
    assert two[1].it.find(instance_id) is not None


def test_collision_is_probed_to_the_same_numbers_in_every_worker(
    two: tuple[Registry, Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "candidate_ids", lambda digest: iter(range(7, 100)))
    first, second = two
    assert [7, 8, 9] == [first.start("a"), second.start("b"), first.start("c")]

    assert [9, 8, 7] == [second.start("c"), first.start("b"), second.start("a")]
    for registry in two:
        assert ["a", "b", "c"] == [registry.audience(number) for number in (7, 8, 9)]


@pytest.mark.parametrize(
    "config", [b"", b"[]", b"\xff\x00", b"{" * 50_000], ids=["none", "list", "bytes", "deep"]
)
def test_bytes_that_are_no_configuration_pass_through_the_journal(
    two: tuple[Registry, Registry], config: bytes
) -> None:
    instance = two[0].it.start("n\udcffme", config)
    found = two[1].it.find(instance.instance_id)

    assert found is not None
    assert ("n\udcffme", instance.digest) == (found.name, found.digest)


# --- counting -------------------------------------------------------------------------


def test_close_in_one_worker_leaves_what_the_other_started(
    two: tuple[Registry, Registry], clock: FakeClock
) -> None:
    first, second = two
    instance_id = first.start("a")
    assert instance_id == second.start("a")
    first.it.close(instance_id)
    clock.now += 10 * GRACE_S

    assert [] == first.it.expire()
    assert [] == second.it.expire()
    assert first.it.find(instance_id) is not None
    assert second.it.find(instance_id) is not None


def test_close_is_counted_whichever_worker_takes_it_and_ends_the_instance_in_both(
    two: tuple[Registry, Registry], clock: FakeClock
) -> None:
    first, second = two
    closed: list[str] = []
    first.plugin._start = lambda config: Instance(close=lambda: closed.append("first"))
    second.plugin._start = lambda config: Instance(close=lambda: closed.append("second"))
    instance_id = first.start("a")
    assert second.it.find(instance_id) is not None
    generations = [registry.it.generation() for registry in two]
    second.it.close(instance_id)
    clock.now += GRACE_S - 0.1
    assert [[], []] == [registry.it.expire() for registry in two]
    assert None not in [registry.it.find(instance_id) for registry in two]
    clock.now += 0.1
    for registry in two:
        for instance in registry.it.expire():
            instance.close()

    assert ["first", "second"] == closed
    assert [None, None] == [registry.it.find(instance_id) for registry in two]
    assert all(registry.it.generation() > before for registry, before in zip(two, generations, strict=True))


def test_start_then_close_of_an_unchanged_configuration_keeps_it(
    two: tuple[Registry, Registry], clock: FakeClock
) -> None:
    first, second = two
    instance_id = first.start("a", __seq__=1)
    assert instance_id == second.start("a", __seq__=2)
    first.it.close(instance_id)
    first.it.close(instance_id ^ 1)
    clock.now += 2 * GRACE_S
    assert [] == first.it.expire() + second.it.expire()

    assert "a" == second.audience(instance_id)


def test_close_too_many_is_no_debt(two: tuple[Registry, Registry], clock: FakeClock) -> None:
    first, second = two
    instance_id = first.start("a")
    for registry in (*two, *two):
        registry.it.close(instance_id)
    second.start("a")
    clock.now += 2 * GRACE_S

    assert [] == first.it.expire() + second.it.expire()


def test_start_in_the_grace_period_and_after_it_revives_the_id(
    two: tuple[Registry, Registry], clock: FakeClock
) -> None:
    first, second = two
    instance_id = first.start("a")
    first.it.close(instance_id)
    clock.now += GRACE_S / 2
    assert instance_id == second.start("a")
    clock.now += GRACE_S
    assert [] == first.it.expire()
    second.it.close(instance_id)
    clock.now += GRACE_S
    assert 1 == len(first.it.expire())
    assert first.it.find(instance_id) is None

    assert instance_id == second.start("a")
    assert "a" == first.audience(instance_id)


def test_worker_that_comes_later_sees_all_and_one_that_died_takes_no_count_with_it(
    journal: Journal, clock: FakeClock
) -> None:
    dead = Registry(journal, clock)
    instance_id = dead.start("a")
    closed_id = dead.start("b")
    dead.it.close(closed_id)
    clock.now += GRACE_S
    late = Registry(journal, clock)

    assert "a" == late.audience(instance_id)
    assert late.it.find(closed_id) is None
    late.it.close(instance_id)
    clock.now += GRACE_S
    assert 1 == len(late.it.expire())


# --- starts that fail -----------------------------------------------------------------


def test_instance_that_failed_is_tried_again_in_every_worker_at_the_next_start(
    journal: Journal, clock: FakeClock
) -> None:
    missing = True

    def start(config: Any) -> Instance:
        if missing:
            raise OSError("no such file")
        return Instance()

    first, second = (Registry(journal, clock, Plugin(start)) for _ in range(2))
    instance_id = first.start("a")
    assert all(registry.it.find(instance_id).failed for registry in (first, second))  # type: ignore[union-attr]
    missing = False
    assert instance_id == first.start("a")
    second.it.expire()

    for registry in (first, second):
        found = registry.it.find(instance_id)
        assert found is not None
        assert (False, 2) == (found.failed, len(registry.plugin.started))
        assert 1 <= registry.it.generation()


def test_configuration_is_written_down_only_when_it_did_not_kill_its_process(
    journal: Journal, clock: FakeClock
) -> None:
    lengths: list[int] = []

    def start(config: Any) -> Instance:
        lengths.append(journal.head()[1])
        return Instance()

    Registry(journal, clock, Plugin(start)).start("a")

    assert [0] == lengths
    assert 0 < journal.head()[1]


# --- bounds ---------------------------------------------------------------------------


def test_history_is_dropped_and_the_other_worker_follows(
    two: tuple[Registry, Registry], journal: Journal, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "MIN_REWRITE_BYTES", 2000)
    first, second = two
    gone = first.start("gone")
    first.it.close(gone)
    kept = [second.start("a"), second.start("b")]
    retired = first.start("retired")
    clock.now += GRACE_S
    first.it.close(retired)
    for _ in range(200):
        first.start("a")
        first.it.close(kept[0])
    epoch, length = journal.head()

    assert 2 < epoch
    assert 2200 > length
    assert ["a", "b", "retired"] == [second.audience(number) for number in (*kept, retired)]
    assert second.it.find(gone) is None
    assert 3 == len(second.it)
    clock.now += GRACE_S
    assert {retired} == {instance.instance_id for instance in second.it.expire()}
    for registry in two:
        registry.it.close(kept[0])
    clock.now += GRACE_S
    assert [kept[0]] == [instance.instance_id for instance in second.it.expire()]


@pytest.mark.parametrize("bound", [{"max_instances": 8}, {"max_bytes": 8 * 1300}], ids=["instances", "bytes"])
def test_beyond_the_bound_the_instance_started_longest_ago_goes_everywhere(
    journal: Journal, clock: FakeClock, bound: dict[str, Any]
) -> None:
    first, second = (Registry(journal, clock, **bound) for _ in range(2))
    padding = {"padding": "x" * 1150}
    ids = [first.start(str(number), **padding) for number in range(8)]
    held = [second.it.find(number) for number in ids]
    first.start("0", **padding)
    generation = second.it.generation()
    newest = first.start("new", **padding)

    assert [] == second.it.expire()
    # An eighth below the bound; "0" was started again and is not the oldest any more.
    assert [None, None] == [second.it.find(number) for number in ids[1:3]]
    assert ["0", "3", "7"] == [second.audience(number) for number in (ids[0], ids[3], ids[7])]
    assert "new" == second.audience(newest)
    assert 7 == len(second.it)
    assert generation < second.it.generation()
    clock.now += GRACE_S
    assert held[1:3] == second.it.expire()


def test_configuration_larger_than_the_bound_is_served_all_the_same(
    journal: Journal, clock: FakeClock
) -> None:
    first, second = (Registry(journal, clock, max_bytes=100) for _ in range(2))
    first.start("a")

    assert "b" == second.audience(first.start("b", padding="x" * 1000))
    assert 1 == len(second.it)


# --- several processes ----------------------------------------------------------------


def fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except Exception:  # noqa: BLE001 - the parent's test run lies below
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def test_processes_that_start_at_the_same_time_agree(
    journal: Journal, clock: FakeClock, tmp_path: Path
) -> None:
    audiences = [str(number) for number in range(40)]

    def work() -> None:
        registry = Registry(journal, clock)
        ids = {}
        for audience in audiences:
            ids[audience] = registry.start(audience)
            registry.start("shared")
            registry.it.close(registry.start("shared"))
        (tmp_path / str(os.getpid())).write_text(json.dumps(ids))

    pids = [fork(work) for _ in range(4)]
    assert [0] * 4 == [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    seen = [json.loads((tmp_path / str(pid)).read_text()) for pid in pids]
    after = Registry(journal, clock)
    after.it.expire()

    assert [seen[0]] * 4 == seen
    assert 41 == len(after.it)
    counts = {entry.starts for number, entry in after.it._entries.items() if number in seen[0].values()}
    assert {4} == counts
    assert 160 == after.it._entries[after.start("shared")].starts - 1


def test_process_killed_while_it_writes_leaves_a_whole_journal(journal: Journal, clock: FakeClock) -> None:
    first = Registry(journal, clock)
    instance_id = first.start("a")
    head = journal.head()

    def work() -> None:
        # Killed when the record stands in the file and the header does not say so yet.
        written = os.pwrite

        def pwrite(fd: int, data: bytes, offset: int) -> int:
            if fd == journal._header:
                os.kill(os.getpid(), signal.SIGKILL)
            return written(fd, data, offset)

        os.pwrite = pwrite  # type: ignore[assignment]
        Registry(journal, clock).start("b")

    _, status = os.waitpid(fork(work), 0)
    assert signal.SIGKILL == os.WTERMSIG(status)
    assert head == journal.head()
    second = Registry(journal, clock)
    other = second.start("c")

    assert ["a", "c"] == [first.audience(number) for number in (instance_id, other)]
    assert 2 == len(first.it)


@pytest.fixture
def locked_elsewhere(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    receive, send = os.pipe()

    def work() -> None:
        fcntl.lockf(journal._header, fcntl.LOCK_EX)
        os.write(send, b"x")
        signal.pause()

    pid = fork(work)
    os.read(receive, 1)
    monkeypatch.setattr(Journal.locked.__wrapped__, "__defaults__", (0.02,))  # type: ignore[attr-defined]
    yield
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(receive)
    os.close(send)


def test_holder_of_the_lock_that_was_stopped_stops_nobody_for_ever(
    journal: Journal, clock: FakeClock, locked_elsewhere: None
) -> None:
    registry = Registry(journal, clock)
    with pytest.raises(JournalLockError):
        registry.start("a")
    with pytest.raises(JournalLockError):
        registry.it.close(1)
    assert 0 == journal.head()[1]
    # As if another had written: there is something to read, and no lock to read it under.
    registry.it._position = 1
    assert [] == registry.it.expire()


def test_event_ends_with_500_while_the_journal_is_locked(
    journal: Journal, clock: FakeClock, locked_elsewhere: None
) -> None:
    registry = Registry(journal, clock)
    registry.it._position = 1
    bench = Bench(registry.plugin)
    bench.host.registry = registry.it
    connection, side = bench.connection(), KongSide()
    with pytest.raises(JournalLockError):
        connection.receive(side.begin(5))
    side.receive(connection.fail())

    assert State.DRAINING is connection.state
    assert side.done.exit is not None
    assert 500 == side.done.exit.status
    start = wire.frame(wire.encode_call(wire.StartInstance(1, "test-plugin", b"{}")))
    refused = bench.connection()
    assert b"" == refused.receive(start)
    assert State.DEAD is refused.state


def test_journal_shorter_than_it_says_is_no_journal(journal: Journal) -> None:
    with pytest.raises(OSError, match="shorter"):
        journal.read(0, 1)

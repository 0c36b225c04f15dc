"""The second level over a store in memory: what is accepted, what a fault costs, who exchanges."""

import threading
from collections.abc import Callable
from contextlib import contextmanager
from unittest.mock import patch

import pytest

from kong_token_exchange.core.sealing import MAX_SEALED_BYTES, derive_seal_key, entry_name, seal
from kong_token_exchange.errors import (
    DeadlineError,
    ExchangedTokenError,
    GatewayError,
    IssuerUnavailableError,
    RefusedTokenError,
    TokenExchangeError,
)
from kong_token_exchange.ports import ExchangedToken
from kong_token_exchange.secret import Secret
from kong_token_exchange.shell import redis_cache
from kong_token_exchange.shell.redis_cache import (
    FAILURES,
    MAX_WAIT_S,
    OPEN_FOR_S,
    READERS,
    RedisTokenCache,
)
from kong_token_exchange.shell.redis_store import StoreError
from tests.support.fakes import PATIENCE_S, FakeClock, FakeMetrics, run_in_threads
from tests.support.redis_server import eventually

OLD, NEW = Secret("an old secret of thirty-two bytes"), Secret("a new secret of thirty-two bytes.")
ENTRY, OTHER = b"e" * 32, b"o" * 32
PLAIN = b"what is shared"


class FakeStore:
    """Redis in memory; `broken` makes every call a fault, `hold` makes calls wait."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.lives: dict[str, int] = {}
        self.locks: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.broken: str | None = None
        self.refuses: set[str] = set()
        self.hold: threading.Event | None = None
        self.dropped = 0
        self.before_read: Callable[[], None] | None = None
        self._lock = threading.Lock()

    def _called(self, what: str) -> None:
        with self._lock:
            self.calls.append(what)
        if self.hold is not None:
            assert self.hold.wait(PATIENCE_S)
        if self.broken is not None or what in self.refuses:
            raise StoreError(self.broken or "read_only")  # type: ignore[arg-type]

    def read(self, name: str, *, limit: int) -> bytes | None:
        if self.before_read is not None:
            self.before_read()
        self._called("read")
        value = self.values.get(name)
        return None if value is None else value[: limit + 1]

    def write(self, name: str, value: bytes, *, life_ms: int) -> None:
        self._called("write")
        self.values[name], self.lives[name] = value, life_ms

    def delete(self, name: str) -> None:
        self._called("delete")
        self.values.pop(name, None)

    def lock(self, name: str, owner: bytes, *, life_ms: int) -> bool:
        self._called("lock")
        with self._lock:
            self.lives[name] = life_ms
            return self.locks.setdefault(name, owner) == owner

    def unlock(self, name: str, owner: bytes) -> None:
        self._called("unlock")
        with self._lock:
            if self.locks.get(name) == owner:
                del self.locks[name]

    def drop(self) -> None:
        self.dropped += 1

    @contextmanager
    def frozen(self):
        self.hold = threading.Event()
        try:
            yield
        finally:
            self.hold.set()
            self.hold = None


class Node:
    """One process over a store, whose exchanges are counted."""

    def __init__(
        self, store: FakeStore, *, keys: tuple[Secret, ...] = (OLD,), timeout_s: float = PATIENCE_S
    ) -> None:
        self.store = store
        self.clock = FakeClock()
        self.metrics = FakeMetrics()
        self.exchanges = 0
        self.proven: list[bytes] = []
        self.fails: BaseException | None = None
        self.unproven: TokenExchangeError | None = None
        self.pauses: list[float] = []
        self.on_pause: Callable[[], None] | None = None
        self.life_s: float | None = 100.0
        self.plain = PLAIN
        self.cache = RedisTokenCache(
            store,
            seal_keys=keys,
            clock=self.clock,
            metrics=self.metrics,
            timeout_s=timeout_s,
            pause=self.pause,
        )

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.clock.advance(seconds)
        if self.on_pause is not None:
            self.on_pause()

    def exchange(self) -> tuple[ExchangedToken, bytes]:
        self.exchanges += 1
        if self.fails is not None:
            raise self.fails
        return self.token("made"), self.plain

    def prove(self, shared: bytes) -> ExchangedToken:
        self.proven.append(shared)
        if self.unproven is not None:
            raise self.unproven
        return self.token("found")

    def token(self, text: str) -> ExchangedToken:
        ends = None if self.life_s is None else self.clock.now() + self.life_s
        return ExchangedToken(token=Secret(text), claims=None, reuse_until=ends, reuse_until_monotonic=0.0)

    def get(self, entry: bytes = ENTRY, *, within: float = 5.0) -> str:
        """Return whether a token was `made` or `found`."""
        token, own = self.cache.exchange_once(
            entry, exchange=self.exchange, prove=self.prove, deadline=self.clock.monotonic() + within
        )
        assert own == (token.token.reveal() == "made")
        return token.token.reveal()

    def counted(self, name: str) -> dict[str, int]:
        """Return a counter's values by label."""
        return {
            key.rpartition("=")[2]: count
            for key, count in self.metrics.counts.items()
            if key.startswith(name + ",")
        }

    def settled(self) -> bool:
        """Wait until what was left beside the requests has been written."""
        return eventually(lambda: sum(self.counted("shared_cache_writes").values()) >= self.exchanges)


def name_of(entry: bytes = ENTRY, key: Secret = OLD) -> str:
    return f"token-exchange:{{{entry_name(entry, key=derive_seal_key(key))}}}:1"


def lock_of(entry: bytes = ENTRY, key: Secret = OLD) -> str:
    return name_of(entry, key).removesuffix(":1") + ":lock"


def sealed(entry: bytes = ENTRY, key: Secret = OLD) -> bytes:
    return seal(PLAIN, entry=entry, key=derive_seal_key(key), nonce=b"n" * 12)


# --- sharing --------------------------------------------------------------------------


def test_cache_22_one_exchange_serves_every_node() -> None:
    store = FakeStore()
    one, two = Node(store), Node(store)

    assert "made" == one.get()
    assert one.settled()
    assert "found" == two.get()

    assert [PLAIN] == two.proven
    assert (1, 0) == (one.exchanges, two.exchanges)
    assert {} == store.locks
    assert {"stored": 1} == one.counted("shared_cache_writes")
    assert {"hit": 1} == two.counted("shared_cache_lookups")


def test_cache_13_an_entry_ends_with_what_it_holds() -> None:
    store = FakeStore()
    node = Node(store)

    node.get()

    assert node.settled()
    assert 100_000 == store.lives[name_of()]


@pytest.mark.parametrize("life_s", [None, 0.0, -1.0])
def test_cache_15_what_has_no_life_left_is_not_written(life_s: float | None) -> None:
    node = Node(FakeStore())
    node.life_s = life_s

    node.get()

    assert node.settled()
    assert {} == node.store.values
    assert {} == node.store.locks
    assert {"too_short": 1} == node.counted("shared_cache_writes")


def test_what_is_too_large_to_be_read_again_is_not_written() -> None:
    node = Node(FakeStore())
    node.plain = bytes(MAX_SEALED_BYTES)

    assert "made" == node.get()
    assert node.settled()
    assert {} == node.store.values
    assert {"too_large": 1} == node.counted("shared_cache_writes")


def test_cache_19_neither_token_nor_key_is_readable_in_redis() -> None:
    node = Node(FakeStore())

    node.get()

    assert node.settled()
    ((name, value),) = node.store.values.items()
    assert PLAIN not in value
    assert ENTRY.hex() not in name


def test_fault_a_failed_exchange_leaves_nothing_and_gives_the_lock_back() -> None:
    node = Node(FakeStore())
    node.fails = RefusedTokenError(reason="subject_token_refused")

    with pytest.raises(RefusedTokenError):
        node.get()

    assert eventually(lambda: "unlock" in node.store.calls)
    assert ({}, {}) == (node.store.values, node.store.locks)


def test_rotation_reads_under_every_key_and_writes_under_the_first() -> None:
    store = FakeStore()
    before, middle, after = (
        Node(store, keys=(OLD, NEW)),
        Node(store, keys=(NEW, OLD)),
        Node(store, keys=(NEW,)),
    )

    before.get()
    assert before.settled()
    assert "found" == middle.get()
    assert "made" == after.get()
    assert after.settled()

    assert {name_of(key=OLD), name_of(key=NEW)} == set(store.values)
    assert "found" == Node(store, keys=(OLD, NEW)).get()


def test_cache_24_what_is_forgotten_is_gone_under_every_key() -> None:
    store = FakeStore()
    old, new = Node(store, keys=(OLD,)), Node(store, keys=(NEW, OLD))
    old.get()
    assert old.settled()
    Node(store, keys=(NEW,)).get()
    assert eventually(lambda: 2 == len(store.values))

    new.cache.forget(ENTRY)

    assert eventually(lambda: {} == store.values)
    assert "made" == new.get()


def test_what_cannot_be_forgotten_is_a_fault_and_no_error() -> None:
    node = Node(FakeStore())
    node.store.broken = "connection"

    node.cache.forget(ENTRY)

    assert eventually(lambda: {"connection": 1} == node.counted("shared_cache_faults"))


# --- believing nothing ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "flaw"),
    [
        (b"random bytes that nobody sealed, long enough to be looked at", "version"),
        (b"\x01" + b"random bytes of the right version, long enough to look at", "unknown_key"),
        (sealed(OTHER), "forged"),
        (sealed()[:-1], "forged"),
        (sealed()[:20], "malformed"),
        (b"\0" + sealed()[1:], "version"),
        (sealed(key=NEW), "unknown_key"),
        (bytes(MAX_SEALED_BYTES + 1000), "too_large"),
        (b"\x80\x04\x95cos\nsystem\n(S'echo'\ntR." + bytes(40), "version"),
        (b'{"access_token":"another","token_type":"Bearer","expires_in":300}', "version"),
    ],
    ids=[
        "random", "random-of-our-version", "another-entrys", "truncated", "stub", "old-version",
        "sealed-with-an-unknown-key", "huge", "pickle", "json",
    ],
)  # fmt: skip
def test_fault_65_what_is_poisoned_is_a_miss(value: bytes, flaw: str) -> None:
    node = Node(FakeStore())
    node.store.values[name_of()] = value

    assert "made" == node.get()

    assert [] == node.proven
    assert {flaw: 1} == node.counted("shared_cache_refused")
    assert {"miss": 1} == node.counted("shared_cache_lookups")
    assert {} == node.counted("shared_cache_faults")
    # What was wrong is replaced.
    assert node.settled()
    assert "found" == Node(node.store).get()


@pytest.mark.parametrize(
    ("error", "flaw"),
    [
        (ExchangedTokenError(reason="subject_differs"), "unproven"),
        (IssuerUnavailableError(reason="keys_unavailable"), "unprovable"),
        (DeadlineError(reason="deadline"), "unprovable"),
    ],
)
def test_cache_19_what_the_caller_cannot_prove_is_a_miss(error: TokenExchangeError, flaw: str) -> None:
    node = Node(FakeStore())
    node.store.values[name_of()] = sealed()
    node.unproven = error

    assert "made" == node.get()
    assert {flaw: 1} == node.counted("shared_cache_refused")


@pytest.mark.parametrize("life_s", [None, 0.0, -10.0], ids=["endless", "now", "past"])
def test_fault_69_an_entry_that_has_ended_is_a_miss_whatever_redis_says(life_s: float | None) -> None:
    node = Node(FakeStore())
    node.store.values[name_of()] = sealed()
    node.life_s = life_s

    assert "made" == node.get()
    assert {"expired": 1} == node.counted("shared_cache_refused")


# --- faults ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["connection", "refused", "read_only", "memory", "loading", "cluster", "tls"]
)
def test_fault_66_a_fault_is_an_exchange_and_then_nobody_asks(kind: str) -> None:
    node = Node(FakeStore())
    node.store.broken = kind

    for number in range(FAILURES + 3):
        assert "made" == node.get(bytes([number]) * 32)

    assert FAILURES == node.store.calls.count("read")
    assert FAILURES == node.counted("shared_cache_faults")[kind]
    assert {"opened": 1} == node.counted("shared_cache_breaker")
    assert 1 == node.store.dropped
    assert {"unknown": FAILURES + 3} == node.counted("shared_cache_lookups")


def opened(node: Node) -> None:
    node.store.broken = "connection"
    for number in range(FAILURES):
        node.get(bytes([number]) * 32)
    node.store.calls.clear()


def test_redis_is_tried_again_beside_the_requests_and_taken_back() -> None:
    node = Node(FakeStore())
    opened(node)
    node.clock.advance(OPEN_FOR_S - 0.001)
    node.get()
    assert [] == node.store.calls

    node.clock.advance(0.001)
    node.store.broken = None
    assert "made" == node.get()

    assert eventually(lambda: node.counted("shared_cache_breaker") == {"opened": 1, "closed": 1})
    assert ["write"] == node.store.calls  # the probe alone
    assert "made" == node.get()
    assert eventually(lambda: name_of() in node.store.values)
    assert "found" == node.get()


def test_a_probe_that_fails_leaves_it_alone_for_as_long_again() -> None:
    node = Node(FakeStore())
    opened(node)
    node.clock.advance(OPEN_FOR_S)

    node.get()
    assert eventually(lambda: node.store.calls == ["write"] and not node.cache._breaker._probing)
    node.get()
    assert ["write"] == node.store.calls
    node.clock.advance(OPEN_FOR_S)
    node.get()
    assert eventually(lambda: node.store.calls == ["write", "write"])


def test_fault_62_a_frozen_redis_costs_a_look_up_its_timeout_until_the_breaker_opens() -> None:
    node = Node(FakeStore(), timeout_s=0.02)

    with node.store.frozen():
        for number in range(FAILURES + 20):
            assert "made" == node.get(bytes([number]) * 32)
        # Only those before the opening were begun at all.
        assert node.store.calls.count("read") <= FAILURES

    assert {"opened": 1} == node.counted("shared_cache_breaker")


def test_res_a_probe_of_a_frozen_redis_holds_nobody_up() -> None:
    node = Node(FakeStore(), timeout_s=PATIENCE_S)
    opened(node)
    node.store.broken = None
    node.clock.advance(OPEN_FOR_S)

    with node.store.frozen():
        # With the patience of the look-up these would take minutes.
        for number in range(5):
            assert "made" == node.get(bytes([number]) * 32)


def test_fault_62_a_look_up_that_drips_on_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_cache, "LONGEST_LOOK_S", 0.02)
    node = Node(FakeStore(), timeout_s=0.02)

    node.get(OTHER)
    assert node.settled()
    with node.store.frozen():
        assert "made" == node.get()
        assert eventually(lambda: 1 == node.store.dropped)

    assert {} == node.counted("shared_cache_breaker")


def test_who_comes_with_little_time_says_nothing_of_redis() -> None:
    node = Node(FakeStore(), timeout_s=1.0)

    with node.store.frozen():
        for number in range(FAILURES + 2):
            node.get(bytes([number]) * 32, within=0.01)

    assert {} == node.counted("shared_cache_breaker")


def test_who_comes_with_no_time_does_not_ask() -> None:
    node = Node(FakeStore())

    node.get(within=0.0)

    assert [] == node.store.calls


def test_a_lock_that_comes_too_late_is_given_back() -> None:
    node = Node(FakeStore(), timeout_s=0.02)

    with node.store.frozen():
        assert "made" == node.get()

    assert eventually(lambda: "unlock" in node.store.calls or "lock" not in node.store.calls)
    assert eventually(lambda: node.store.locks == {})


def test_more_look_ups_than_redis_can_take_are_exchanges() -> None:
    node = Node(FakeStore(), timeout_s=PATIENCE_S)
    node.cache._readers._backlog = 1

    with node.store.frozen():
        waiting = [
            threading.Thread(target=node.get, args=(bytes([number]) * 32,), daemon=True)
            for number in range(READERS + 1)
        ]
        for number, thread in enumerate(waiting):
            thread.start()
            busy = min(number + 1, READERS)
            assert eventually(lambda busy=busy: node.store.calls.count("read") >= busy)
        assert eventually(lambda: 1 == len(node.cache._readers._work))
        assert "made" == node.get(OTHER)
        assert {"busy": 1} == node.counted("shared_cache_faults")
    for thread in waiting:
        thread.join(PATIENCE_S)


def test_entries_that_cannot_be_written_fast_enough_are_dropped() -> None:
    node = Node(FakeStore())
    node.cache._writer._backlog = 1
    hold = threading.Event()
    begun = threading.Event()
    node.cache._writer.start(lambda: (begun.set(), hold.wait(PATIENCE_S)))
    assert begun.wait(PATIENCE_S)

    for number in range(10, 13):
        assert "made" == node.get(bytes([number]) * 32)

    assert 2 == node.counted("shared_cache_writes")["dropped"]
    hold.set()


def test_what_waits_to_be_written_when_the_breaker_opens_is_dropped() -> None:
    node = Node(FakeStore())
    hold, begun = threading.Event(), threading.Event()
    node.cache._writer.start(lambda: (begun.set(), hold.wait(PATIENCE_S)))
    assert begun.wait(PATIENCE_S)
    node.get()
    opened(node)

    hold.set()

    assert eventually(lambda: node.counted("shared_cache_writes") == {"dropped": 1})
    assert "write" not in node.store.calls


def test_a_store_that_refuses_to_write_is_a_fault_and_no_error() -> None:
    node = Node(FakeStore())
    node.store.refuses = {"write"}

    assert "made" == node.get()

    assert node.settled()
    assert {"failed": 1} == node.counted("shared_cache_writes")


def test_a_hit_between_faults_starts_the_count_anew() -> None:
    node = Node(FakeStore())
    node.get()
    assert node.settled()
    for _ in range(3 * FAILURES):
        node.store.broken = "connection"
        node.get()
        node.store.broken = None
        assert "found" == node.get()

    assert {} == node.counted("shared_cache_breaker")


# --- one exchange among nodes ---------------------------------------------------------


def test_a_node_that_finds_the_lock_waits_and_takes_the_others_result() -> None:
    store = FakeStore()
    store.locks[lock_of()] = b"another node"
    node = Node(store)

    def other_node_ends() -> None:
        if len(node.pauses) == 3:
            store.values[name_of()] = sealed()

    node.on_pause = other_node_ends

    assert "found" == node.get()
    assert 0 == node.exchanges
    assert 3 == len(node.pauses)
    assert {"ended": 1} == node.counted("shared_cache_waits")
    assert {lock_of(): b"another node"} == store.locks


@pytest.mark.parametrize(("within", "waited"), [(60.0, MAX_WAIT_S), (2.0, 1.0), (0.2, 0.1)])
def test_the_wait_is_bounded_by_the_deadline_and_by_itself(within: float, waited: float) -> None:
    store = FakeStore()
    store.locks[lock_of()] = b"a node that died"
    node = Node(store)

    assert "made" == node.get(within=within)
    assert waited == pytest.approx(sum(node.pauses))
    assert {"gave_up": 1} == node.counted("shared_cache_waits")


def test_a_lock_that_comes_free_without_a_result_is_taken_over() -> None:
    store = FakeStore()
    store.locks[lock_of()] = b"another node"
    node = Node(store)
    node.on_pause = store.locks.clear

    assert "made" == node.get()
    assert 1 == len(node.pauses)
    assert node.settled()
    assert {} == store.locks


def test_a_result_that_came_before_the_lock_is_taken() -> None:
    store = FakeStore()
    node = Node(store)

    def other_node_ends() -> None:
        # Between this node's first look and its lock.
        if store.calls == ["read", "lock"]:
            store.values[name_of()] = sealed()

    store.before_read = other_node_ends

    assert "found" == node.get()
    assert ["read", "lock", "read"] == store.calls[:3]
    assert eventually(lambda: store.locks == {})


def test_a_lock_ends_by_itself_after_the_deadline() -> None:
    node = Node(FakeStore())

    node.get(within=3.0)

    assert 4_000 == node.store.lives[lock_of()]


def test_a_fault_while_waiting_ends_the_wait() -> None:
    store = FakeStore()
    store.locks[lock_of()] = b"another node"
    node = Node(store)

    def dies() -> None:
        store.broken = "connection"

    node.on_pause = dies

    assert "made" == node.get()
    assert 1 == len(node.pauses)


def test_nodes_at_the_same_moment_make_one_exchange() -> None:
    store = FakeStore()
    nodes = [Node(store) for _ in range(8)]
    for node in nodes:
        node.pause = lambda seconds: threading.Event().wait(seconds)  # type: ignore[method-assign]
        node.cache._pause = node.pause
    turns = iter(nodes)
    lock = threading.Lock()

    def run() -> str:
        with lock:
            node = next(turns)
        return node.get(within=3600.0)

    results = run_in_threads(run, len(nodes))

    assert ["found"] * 7 + ["made"] == sorted(results)


# --- assertions that work once --------------------------------------------------------


def test_a_reused_assertion_finds_the_result_of_who_used_it() -> None:
    store = FakeStore()
    store.locks[lock_of()] = b"a slow node"
    node = Node(store)
    node.fails = IssuerUnavailableError(reason="assertion_reused")

    def other_node_ends() -> None:
        if node.exchanges:
            store.values[name_of()] = sealed()

    node.on_pause = other_node_ends

    assert "found" == node.get()
    assert 1 == node.exchanges


def test_a_reused_assertion_without_a_result_is_told() -> None:
    node = Node(FakeStore())
    node.fails = IssuerUnavailableError(reason="assertion_reused")

    with pytest.raises(IssuerUnavailableError) as caught:
        node.get()

    assert "assertion_reused" == caught.value.reason
    assert sum(node.pauses) <= MAX_WAIT_S + 0.001
    assert eventually(lambda: node.store.locks == {})


@pytest.mark.parametrize(
    "error",
    [
        IssuerUnavailableError(reason="unreachable"),
        GatewayError(reason="exchange_failed"),
        KeyboardInterrupt(),
    ],
    ids=["fault", "bug", "interrupt"],
)
def test_no_other_failure_waits(error: BaseException) -> None:
    node = Node(FakeStore())
    node.fails = error

    with pytest.raises(type(error)):
        node.get()

    assert [] == node.pauses


# --- nothing is told ------------------------------------------------------------------


def test_faults_are_logged_once_and_name_nothing(caplog: pytest.LogCaptureFixture) -> None:
    node = Node(FakeStore())
    opened(node)

    (record,) = caplog.records
    assert (
        "second-level cache: left alone after 3 faults in a row, the last one: connection"
        == record.getMessage()
    )


def mine() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("shared-cache")]


def test_threads_are_started_when_needed_and_no_more_than_so_many() -> None:
    before = set(mine())
    node = Node(FakeStore())
    assert before == set(mine())

    for number in range(3 * READERS):
        node.get(bytes([number]) * 32)

    assert node.settled()
    assert READERS + 1 == len(set(mine()) - before)


def test_threads_end_when_idle_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_cache, "IDLE_S", 0.01)
    before = set(mine())
    node = Node(FakeStore())

    for number in range(20):
        assert "made" == node.get(bytes([number]) * 32)
        assert eventually(lambda number=number: number + 1 == len(node.store.values))
        if number % 5 == 0:
            assert eventually(lambda: set() == set(mine()) - before)


def test_fault_116_a_machine_without_threads_costs_the_second_level_and_no_result() -> None:
    node = Node(FakeStore())
    no_thread = patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread"))

    with no_thread:
        # More than there may be threads, so that none is left to be made if they were counted.
        assert ["made"] * 2 * READERS == [node.get(bytes([number]) * 32) for number in range(2 * READERS)]
        node.cache.forget(ENTRY)
    # Nothing waits for a thread that will not come: it holds tokens.
    assert [0, 0] == [len(helpers._work) for helpers in (node.cache._readers, node.cache._writer)]
    assert [] == node.store.calls

    assert "made" == node.get()
    assert eventually(lambda: name_of() in node.store.values)
    assert "found" == node.get()

    with no_thread:
        # The threads that run serve on.
        assert "found" == node.get()


def test_fault_116_a_look_up_that_nothing_can_cut_off_later_is_cut_off_now() -> None:
    store = FakeStore()
    node = Node(store, timeout_s=0.02)
    no_timer = patch.object(threading.Timer, "start", side_effect=RuntimeError("can't start new thread"))
    with store.frozen(), no_timer:
        assert "made" == node.get()
        assert 1 == store.dropped

"""Redis as a small store, against a real server: bounds, ends, owners, TLS, ACL, Sentinel, Cluster."""

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis, RedisCluster
from redis.sentinel import SentinelConnectionPool

from kong_token_exchange.shell import redis_store
from kong_token_exchange.shell.connections import trust_context
from kong_token_exchange.shell.redis_cache import READERS
from kong_token_exchange.shell.redis_store import RedisStore, StoreError, make_client
from tests.chaos.certificates import Authority
from tests.support.fakes import PATIENCE_S, run_in_threads
from tests.support.redis_server import RedisServer, eventually, free_port, needs_redis, redis_policy

pytestmark = needs_redis

NAME = "redis.test"


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def store(redis: RedisServer) -> Iterator[RedisStore]:
    redis.client().flushall()
    made = RedisStore(redis.policy(), None)
    yield made
    made.drop()


def kind_of(store: RedisStore, name: str = "a") -> str:
    with pytest.raises(StoreError) as caught:
        store.write(name, b"1", life_ms=1000)
    store.drop()
    return caught.value.kind


def test_what_was_written_is_read_until_its_end(redis: RedisServer, store: RedisStore) -> None:
    store.write("a", b"value", life_ms=60_000)

    assert b"value" == store.read("a", limit=100)
    assert 0 < redis.client().pttl("a") <= 60_000
    assert store.read("b", limit=100) is None


def test_fault_68_a_huge_value_is_cut_where_it_is_kept(redis: RedisServer, store: RedisStore) -> None:
    redis.client().setrange("a", 100_000_000, b"x")
    before = redis.client().info("stats")["total_net_output_bytes"]

    assert 101 == len(store.read("a", limit=100) or b"")
    assert redis.client().info("stats")["total_net_output_bytes"] - before < 100_000


def test_what_is_no_text_is_a_value_of_nobody(redis: RedisServer, store: RedisStore) -> None:
    redis.client().rpush("a", "x")

    assert b"\0" == store.read("a", limit=100)


def test_what_was_deleted_is_gone(store: RedisStore) -> None:
    store.write("a", b"value", life_ms=60_000)

    store.delete("a")
    store.delete("never there")

    assert store.read("a", limit=100) is None


def test_a_lock_has_one_owner_and_an_end(redis: RedisServer, store: RedisStore) -> None:
    assert store.lock("l", b"one", life_ms=60_000)
    assert not store.lock("l", b"two", life_ms=60_000)
    assert 0 < redis.client().pttl("l") <= 60_000


def test_a_lock_is_given_back_by_its_owner_alone(store: RedisStore) -> None:
    store.lock("l", b"one", life_ms=60_000)

    store.unlock("l", b"two")
    assert not store.lock("l", b"two", life_ms=60_000)

    store.unlock("l", b"one")
    assert store.lock("l", b"two", life_ms=60_000)


def test_many_threads_share_it(store: RedisStore) -> None:
    store.write("a", b"value", life_ms=60_000)

    assert [b"value"] * 8 == run_in_threads(lambda: store.read("a", limit=100), 8)


def test_as_many_as_may_ask_have_connections_however_few_are_kept(redis: RedisServer) -> None:
    threads = READERS + 1
    assert redis_store.MOST_CONNECTIONS == threads
    store = RedisStore(redis.policy(pool_size=1), None)
    store.write("a", b"value", life_ms=60_000)
    redis.freeze()
    try:
        # All of a process's threads at the same moment: none of them may be told of a fault.
        thaw = threading.Thread(target=lambda: _thaw_when_all_wait(redis, store, threads), daemon=True)
        thaw.start()
        assert [b"value"] * threads == run_in_threads(lambda: store.read("a", limit=100), threads)
        thaw.join(PATIENCE_S)
    finally:
        redis.thaw()
        store.drop()


def _thaw_when_all_wait(redis: RedisServer, store: RedisStore, threads: int) -> None:
    pool = redis_store._pools(store._client)[0]
    eventually(lambda: len(pool._in_use_connections) == threads, within=2.0)
    redis.thaw()


def test_threads_that_come_at_once_make_one_client(
    redis: RedisServer, store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make(*arguments: Any) -> Any:
        made.append(make_client(*arguments))
        assert not eventually(lambda: len(made) > 1, within=0.2)
        return made[-1]

    monkeypatch.setattr(redis_store, "make_client", make)

    assert [None] * 4 == run_in_threads(lambda: store.read("a", limit=1), 4)
    assert 1 == len(made)


def test_a_server_that_is_gone_is_a_fault_and_may_come_back() -> None:
    with RedisServer() as server:
        store = RedisStore(server.policy(), None)
        store.write("a", b"value", life_ms=60_000)
        server.kill()
        assert "connection" == kind_of(store)
        server.start()
        assert store.read("a", limit=100) is None


def test_a_frozen_server_costs_the_timeout() -> None:
    with RedisServer() as server:
        store = RedisStore(server.policy(read_timeout_s=0.05), None)
        store.write("a", b"value", life_ms=60_000)
        server.freeze()
        try:
            began = time.monotonic()
            assert "timeout" == kind_of(store)
            assert time.monotonic() - began < 5
        finally:
            server.thaw()


def test_dropping_ends_what_waits() -> None:
    asked, errors = threading.Event(), []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = RedisStore(redis_policy(port=silent.getsockname()[1]), None)

        def wait() -> None:
            try:
                store.read("a", limit=100)
            except StoreError as error:
                errors.append(error.kind)

        def listen() -> None:
            connection, _ = silent.accept()
            with connection:
                while b"GETRANGE" not in connection.recv(4096):
                    pass
                asked.set()
                connection.recv(4096)

        threads = [threading.Thread(target=work, daemon=True) for work in (listen, wait)]
        for thread in threads:
            thread.start()
        assert asked.wait(PATIENCE_S)
        began = time.monotonic()
        store.drop()
        for thread in threads:
            thread.join(PATIENCE_S)

    assert 1 == len(errors)
    assert time.monotonic() - began < PATIENCE_S / 2


class TestAccess:
    def test_a_password_is_asked_for(self) -> None:
        with RedisServer(requirepass="right") as server:
            assert "refused" == kind_of(RedisStore(server.policy(), None))
            assert "refused" == kind_of(RedisStore(server.policy(password="wrong"), None))
            RedisStore(server.policy(password="right"), None).write("a", b"1", life_ms=1000)

    def test_the_documented_acl_is_enough_and_narrow(self) -> None:
        page = Path(__file__).parents[3] / "docs" / "operations.md"
        (line,) = [line for line in page.read_text().splitlines() if line.startswith("user token-exchange ")]
        with RedisServer(config=line.replace("SECRET", "right")) as server:
            store = RedisStore(server.policy(username="token-exchange", password="right"), None)
            store.write("token-exchange:{a}:1", b"1", life_ms=60_000)
            assert b"1" == store.read("token-exchange:{a}:1", limit=10)
            assert store.lock("token-exchange:{a}:lock", b"o", life_ms=60_000)
            store.unlock("token-exchange:{a}:lock", b"o")
            store.delete("token-exchange:{a}:1")
            assert store.lock("token-exchange:{a}:lock", b"p", life_ms=60_000)
            assert "refused" == kind_of(store, "somebody-else")

    def test_fault_66_a_replica_a_full_and_a_loading_server_are_faults(self) -> None:
        with RedisServer() as server:
            store = RedisStore(server.policy(), None)
            client = server.client()
            client.config_set("maxmemory", "1")
            assert "memory" == kind_of(store)
            client.config_set("maxmemory", "0")
            client.replicaof("127.0.0.1", str(free_port()))
            assert "read_only" == kind_of(store)
            client.replicaof("NO", "ONE")
            store.write("a", b"1", life_ms=1000)

    def test_the_number_of_the_database_is_kept(self, redis: RedisServer) -> None:
        redis.client().flushall()
        RedisStore(redis.policy(database=3), None).write("a", b"1", life_ms=60_000)

        assert (0, 1) == (redis.client(db=0).exists("a"), redis.client(db=3).exists("a"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.make("test authority")


@pytest.fixture(scope="module")
def tls_server(folder: Path, authority: Authority) -> Iterator[RedisServer]:
    authority.server_context(folder, "redis", NAME)
    with RedisServer(tls=folder / "redis.pem") as server:
        yield server


@pytest.fixture(scope="module")
def ca_file(folder: Path, authority: Authority) -> str:
    return str(authority.write(folder / "ca.pem"))


class TestTls:
    def test_the_configured_name_and_authority_are_proven(
        self, tls_server: RedisServer, ca_file: str
    ) -> None:
        context = trust_context(ca_file, verify=True)

        RedisStore(tls_server.policy(ssl=True, server_name=NAME), context).write("a", b"1", life_ms=1000)
        assert "tls" == kind_of(RedisStore(tls_server.policy(ssl=True), context))
        assert "tls" == kind_of(RedisStore(tls_server.policy(ssl=True, server_name="other.test"), context))

    def test_fault_67_a_strangers_certificate_is_a_fault(self, tls_server: RedisServer, folder: Path) -> None:
        other = Authority.make("somebody else").write(folder / "other.pem")

        store = RedisStore(
            tls_server.policy(ssl=True, server_name=NAME), trust_context(str(other), verify=True)
        )

        assert "tls" == kind_of(store)

    def test_verification_is_off_only_where_it_is_switched_off(self, tls_server: RedisServer) -> None:
        policy = tls_server.policy(ssl=True, ssl_verify=False)

        RedisStore(policy, trust_context(None, verify=False)).write("a", b"1", life_ms=1000)
        assert "tls" == kind_of(RedisStore(tls_server.policy(ssl=True), trust_context(None, verify=True)))

    def test_fault_67_never_plain_text(
        self, redis: RedisServer, tls_server: RedisServer, ca_file: str
    ) -> None:
        context = trust_context(ca_file, verify=True)

        assert kind_of(RedisStore(redis.policy(ssl=True, server_name=NAME), context)) in (
            "tls",
            "connection",
            "timeout",
        )
        assert kind_of(RedisStore(redis.policy(ssl=True), None)) == "tls"
        # TLS is spoken there alone, so plain text is answered by nobody.
        assert kind_of(RedisStore(tls_server.policy(read_timeout_s=1.0), None)) in ("connection", "timeout")

    def test_a_file_that_is_no_certificate_is_told(self, folder: Path) -> None:
        with pytest.raises(OSError):
            trust_context(str(folder / "absent.pem"), verify=True)


class TestSentinel:
    def test_the_master_is_asked_for(self, redis: RedisServer) -> None:
        monitor = f"sentinel monitor main 127.0.0.1 {redis.port} 1"
        with RedisServer(config=monitor) as sentinel:
            store = RedisStore(
                redis_policy(sentinel_master="main", sentinels=(("127.0.0.1", sentinel.port),)), None
            )
            redis.client().flushall()
            store.write("a", b"value", life_ms=60_000)
            assert b"value" == redis.client().get("a")
            store.drop()
            assert b"value" == store.read("a", limit=10)
            assert "connection" == kind_of(
                RedisStore(
                    redis_policy(sentinel_master="none", sentinels=(("127.0.0.1", sentinel.port),)), None
                )
            )

    def test_each_gets_its_own_credentials(self) -> None:
        client = make_client(
            redis_policy(
                sentinel_master="main",
                sentinels=(("s1", 1), ("s2", 2)),
                sentinel_username="watcher",
                sentinel_password="watched",
                username="user",
                password="secret",
                database=2,
            ),
            None,
        )
        assert isinstance(client, Redis)
        pool = client.connection_pool
        assert isinstance(pool, SentinelConnectionPool)
        assert ("user", "secret", 2) == tuple(
            pool.connection_kwargs[name] for name in ("username", "password", "db")
        )
        told = [
            tuple(
                one.connection_pool.connection_kwargs[name]
                for name in ("host", "port", "username", "password", "db")
            )
            for one in pool.sentinel_manager.sentinels
        ]
        assert [("s1", 1, "watcher", "watched", 0), ("s2", 2, "watcher", "watched", 0)] == told

    def test_tls_is_for_both(self) -> None:
        client = make_client(
            redis_policy(sentinel_master="main", sentinels=(("s1", 1),), ssl=True),
            trust_context(None, verify=True),
        )
        assert isinstance(client, Redis)
        pool = client.connection_pool
        classes = [
            pool.connection_class,
            *(one.connection_pool.connection_class for one in pool.sentinel_manager.sentinels),
        ]
        assert ["TlsConnection"] * 2 == [one.__name__ for one in classes]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisServer]:
    with RedisServer(cluster_enabled="yes", cluster_port=str(free_port())) as server:
        client = server.client()
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        assert eventually(lambda: b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO"))
        yield server


class TestCluster:
    def test_a_cluster_is_found_from_one_of_its_nodes(self, cluster: RedisServer) -> None:
        nodes = (("127.0.0.1", cluster.port),)
        store = RedisStore(redis_policy(cluster_nodes=nodes, cluster_max_redirections=3), None)

        store.write("{a}:1", b"value", life_ms=60_000)
        assert b"value" == store.read("{a}:1", limit=100)
        assert store.lock("{a}:lock", b"one", life_ms=60_000)
        store.unlock("{a}:lock", b"one")
        assert store.lock("{a}:lock", b"two", life_ms=60_000)
        assert isinstance(store._client, RedisCluster)
        assert 4 == store._client.RedisClusterRequestTTL
        store.drop()
        assert b"value" == store.read("{a}:1", limit=100)

    def test_a_cluster_that_is_away_is_a_fault(self) -> None:
        store = RedisStore(redis_policy(cluster_nodes=(("127.0.0.1", free_port()),)), None)

        assert kind_of(store) in ("cluster", "connection")

    def test_fault_66_a_cluster_asked_as_a_single_server_is_a_fault(self) -> None:
        with RedisServer(cluster_enabled="yes", cluster_port=str(free_port())) as server:
            assert "cluster" == kind_of(RedisStore(server.policy(), None))


def test_a_fault_tells_no_address_and_no_secret() -> None:
    store = RedisStore(redis_policy(port=free_port(), password="MARKpassword"), None)

    with pytest.raises(StoreError) as caught:
        store.read("a", limit=1)

    assert "connection" == str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_the_context_asks_for_tls_1_2_and_a_certificate() -> None:
    context = trust_context(None, verify=True)

    assert (ssl.CERT_REQUIRED, True) == (context.verify_mode, context.check_hostname)
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2

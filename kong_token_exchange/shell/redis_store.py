"""
Redis or Valkey as a small store: bounded reads, writes with an end, locks with an owner.

The client library knows single servers, Sentinel and Cluster; here is what is needed of them.
Nothing is tried twice: who asks has a shorter patience than any second try. Replies are as of
RESP2, so no handshake stands before the first command but authentication and the choice of the
database. TLS has a context of our own, so that trust is what is configured and nothing else.

Needs the extra `redis`.

Source: docs/adr/0010-second-level-cache.md; docs/security.md CACHE-19; https://redis.io/commands.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, cast

from redis import Redis, RedisCluster
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.connection import Connection, ConnectionPool
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool, SentinelManagedConnection

from kong_token_exchange.core.policy import RedisPolicy

FaultKind = Literal[
    "timeout", "refused", "loading", "read_only", "memory", "tls", "connection", "cluster", "other"
]

# The first that fits counts: several of these are subclasses of others.
_KINDS: tuple[tuple[tuple[type[Exception], ...], FaultKind], ...] = (
    ((RedisTimeoutError, TimeoutError), "timeout"),
    ((AuthenticationError, AuthorizationError, NoPermissionError), "refused"),
    ((BusyLoadingError,), "loading"),
    ((ReadOnlyError,), "read_only"),
    ((OutOfMemoryError,), "memory"),
    ((ssl.SSLError,), "tls"),
    ((RedisConnectionError, OSError), "connection"),
    ((ClusterError, RedisClusterException, MovedError), "cluster"),
)

# As many as a process has threads for it (`redis_cache`).
MOST_CONNECTIONS = 5

# Compare and delete in one step: a lock that has ended may be another one's by now.
_RELEASE = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end return 0"


class StoreError(Exception):
    """Redis did not do what it was asked; *kind* is one of a fixed set of words, without any detail."""

    def __init__(self, kind: FaultKind) -> None:
        super().__init__(kind)
        self.kind: FaultKind = kind


class _Client(Protocol):
    def getrange(self, key: str, start: int, end: int) -> Any: ...
    def set(self, name: str, value: bytes, *, px: int, nx: bool = ...) -> Any: ...
    def delete(self, *names: str) -> Any: ...
    def eval(self, script: str, numkeys: int, *keys_and_args: Any) -> Any: ...


class RedisStore:
    """
    One Redis, reached as configured; the client is made at the first use and after each `drop`.

    Args:
        policy: Which Redis, and how.
        context: TLS, where `policy.ssl` asks for it.
    """

    def __init__(self, policy: RedisPolicy, context: ssl.SSLContext | None) -> None:
        self._policy = policy
        self._context = context
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._client: _Client | None = None

    def read(self, name: str, *, limit: int) -> bytes | None:
        """
        Return a value, None if there is none; cut at *limit* + 1 bytes, so that one that is too long shows.

        Raises:
            StoreError: it could not be read.
        """
        with _translated():
            try:
                found = self._connected().getrange(name, 0, limit)
            except ResponseError as error:
                if str(error).startswith("WRONGTYPE"):
                    # A list or a hash under our name: somebody's value, and none of ours.
                    return b"\0"
                raise
        return cast("bytes", found) or None

    def write(self, name: str, value: bytes, *, life_ms: int) -> None:
        """
        Keep a value for *life_ms* milliseconds.

        Raises:
            StoreError: it may not be kept.
        """
        with _translated():
            self._connected().set(name, value, px=life_ms)

    def delete(self, name: str) -> None:
        """
        Drop a value.

        Raises:
            StoreError: it may still be there.
        """
        with _translated():
            self._connected().delete(name)

    def lock(self, name: str, owner: bytes, *, life_ms: int) -> bool:
        """
        Take a lock that ends by itself; False where another one has it.

        Raises:
            StoreError: nobody knows whether it was taken.
        """
        with _translated():
            return bool(self._connected().set(name, owner, px=life_ms, nx=True))

    def unlock(self, name: str, owner: bytes) -> None:
        """
        Give a lock back, if it is still *owner*'s.

        Raises:
            StoreError: it may stay until its end.
        """
        with _translated():
            self._connected().eval(_RELEASE, 1, name, owner)

    def drop(self) -> None:
        """Close every connection, those in use too, which ends whatever waits on them; never raises."""
        with self._lock:
            client, self._client = self._client, None
        for pool in _pools(client):
            with contextlib.suppress(Exception):
                pool.disconnect(inuse_connections=True)

    def _connected(self) -> _Client:
        client = self._client
        if client is not None:
            return client
        # A cluster's client asks for the nodes when it is made: one thread does, and `drop` waits for none.
        with self._making:
            client = self._client
            if client is None:
                client = make_client(self._policy, self._context)
                with self._lock:
                    self._client = client
        return client


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except Exception as error:  # noqa: BLE001 - a library's bug must not become a caller's error
        # Texts of the library name addresses and commands: none of it goes further.
        raise StoreError(_kind_of(error)) from None


def _kind_of(error: Exception) -> FaultKind:
    causes = (error.__cause__, error.__context__)
    if any(isinstance(cause, ssl.SSLError) and not isinstance(cause, TimeoutError) for cause in causes):
        return "tls"
    return next((kind for types, kind in _KINDS if isinstance(error, types)), "other")


# --- clients --------------------------------------------------------------------------


def make_client(policy: RedisPolicy, context: ssl.SSLContext | None) -> _Client:
    """
    Build the library's client for a single server, Sentinel or Cluster.

    Raises:
        RedisError, RedisClusterException, OSError: no node of a cluster answers.
    """
    options = _options(policy)
    if policy.cluster_nodes:
        return cast("_Client", _make_cluster(policy, context, options))
    options["db"] = policy.database
    if policy.sentinels:
        return cast("_Client", _make_sentinel(policy, context, options))
    connection = _connection_class(Connection, policy, context)
    pool = ConnectionPool(connection_class=connection, host=policy.host, port=policy.port, **options)
    return cast("_Client", Redis(connection_pool=pool))


def _options(policy: RedisPolicy) -> dict[str, Any]:
    return {
        "username": policy.username,
        "password": policy.password.reveal() if policy.password is not None else None,
        "socket_connect_timeout": policy.connect_timeout_s,
        "socket_timeout": policy.read_timeout_s,
        # The library refuses what goes beyond, where Kong's field only says how many are kept.
        "max_connections": max(policy.pool_size, MOST_CONNECTIONS),
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),
        "driver_info": None,
    }


def _make_cluster(
    policy: RedisPolicy, context: ssl.SSLContext | None, options: dict[str, Any]
) -> RedisCluster:
    (host, port), *others = policy.cluster_nodes
    del options["retry"]
    # Given an address as a URL, the client takes a class of connections, too.
    url = f"redis://[{host}]:{port}" if ":" in host else f"redis://{host}:{port}"
    cluster = RedisCluster(
        url=url,
        startup_nodes=[ClusterNode(*other) for other in others],  # type: ignore[no-untyped-call]
        retry=Retry(NoBackoff(), 0),
        connection_class=_connection_class(Connection, policy, context),
        **options,
    )
    # It counts the first try, too.
    cluster.RedisClusterRequestTTL = policy.cluster_max_redirections + 1
    return cluster


def _make_sentinel(policy: RedisPolicy, context: ssl.SSLContext | None, options: dict[str, Any]) -> Redis:
    to_sentinel = {
        **options,
        "db": 0,
        "username": policy.sentinel_username,
        "password": policy.sentinel_password.reveal() if policy.sentinel_password is not None else None,
    }
    plain = _connection_class(Connection, policy, context)
    sentinel = Sentinel([], sentinel_kwargs={})  # type: ignore[no-untyped-call]
    sentinel.sentinels = [
        Redis(connection_pool=ConnectionPool(connection_class=plain, host=host, port=port, **to_sentinel))
        for host, port in policy.sentinels
    ]
    managed = _connection_class(SentinelManagedConnection, policy, context)
    pool = SentinelConnectionPool(  # type: ignore[no-untyped-call]
        str(policy.sentinel_master), sentinel, is_master=True, connection_class=managed, **options
    )
    return Redis(connection_pool=pool)


def _connection_class(
    base: type[Connection], policy: RedisPolicy, context: ssl.SSLContext | None
) -> type[Connection]:
    """Return *base*, over TLS where it is asked for: never plain text instead."""
    if not policy.ssl:
        return base
    if context is None:
        raise ssl.SSLError("no TLS context")
    tls = context

    class TlsConnection(base):  # type: ignore[misc,valid-type]
        # As the library's own SSLConnection does, but with our context and the configured name.
        def _connect(self) -> ssl.SSLSocket:
            plain = super()._connect()
            try:
                return tls.wrap_socket(plain, server_hostname=policy.server_name or self.host)
            except BaseException:
                plain.close()
                raise

    return TlsConnection


def _pools(client: _Client | None) -> Sequence[ConnectionPool]:
    if isinstance(client, RedisCluster):
        nodes = [node.redis_connection for node in client.get_nodes()]  # type: ignore[no-untyped-call]
        return [node.connection_pool for node in nodes if node is not None]
    if isinstance(client, Redis):
        pool = client.connection_pool
        sentinels = pool.sentinel_manager.sentinels if isinstance(pool, SentinelConnectionPool) else []
        return [pool, *(sentinel.connection_pool for sentinel in sentinels)]
    return []

"""
FAULT-60 to FAULT-70: the second cache level in Redis.

Each row puts a real Redis of its own behind two routes and takes it away at its end. What an entry
in Redis does shows only to a plugin server that has nothing in memory, so rows about entries send
their tokens, do something to Redis, restart the plugin server, and send the same tokens again.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tests.chaos.process import peak_bytes, reset_peak
from tests.chaos.run import Row, Run
from tests.chaos.stage import SECURE_HOST
from tests.chaos.traffic import Sent
from tests.support.gateways import wait_until
from tests.support.redis_server import NO_REDIS, RedisServer, redis_binary

SECTION = "Redis (second level)"
ROUTES = ("orders", "reports")
SEAL_KEY = "MARKseal-5f2b8a1c9e3d4f60718293a4b5c6d7e8"
ENTRIES = "token-exchange:*:1"

# Redis is tried again every 2 s, and a busy machine may take its time.
BACK_S = 5.0

# With entries in Redis the timeout is none of the row's business.
PATIENT = dict.fromkeys(("connect_timeout", "send_timeout", "read_timeout"), 5000)


@contextlib.contextmanager
def second_level(run: Run, port: int, **settings: Any) -> Iterator[None]:
    """Have two routes share what they exchange; the configuration is put back at the end."""
    usual = run.stage.config()
    config = copy.deepcopy(usual)
    for route in config["services"][0]["routes"]:
        if route["name"] in ROUTES:
            plugin = route["plugins"][0]["config"]
            plugin |= {"cluster_cache_strategy": "redis", "cluster_cache_items": ["tokens"]}
            plugin["cluster_cache_redis"] = {"port": port, **settings}
            plugin["token_exchange"]["cache"] = {"seal_keys": [SEAL_KEY]}
    run.gateway.apply(config)
    try:
        yield
    finally:
        run.quiet()
        run.gateway.apply(usual)


def entries(redis: RedisServer) -> list[bytes]:
    return list(redis.client().keys(ENTRIES))


def exchanges(run: Run, since: float) -> int:
    return sum(at >= since for at, *what in list(run.idp.asks) if what == ["internal", "token"])


def expect_filling(run: Run, redis: RedisServer) -> None:
    """Require that entries come into Redis again, soon, by new tokens alone."""
    redis.client().flushall()
    began = time.monotonic()

    def filled() -> bool:
        run.send("fresh", "/orders")
        return bool(entries(redis))

    found = wait_until(filled, timeout_s=30)
    took = time.monotonic() - began
    run.recoveries.append((took, BACK_S))
    run.require(found, "Redis is not used again")
    run.require(took < BACK_S + 2 * run.slack_s + 1, f"Redis is used again after {took:.1f} s")


def fill(run: Run, redis: RedisServer, count: int) -> list[str]:
    """Have *count* tokens exchanged and shared."""
    tokens = [run.wallet.fresh("/orders") for _ in range(count)]
    before = len(entries(redis))
    send(run, tokens)
    stored = wait_until(lambda: len(entries(redis)) - before >= count, timeout_s=20)
    run.require(stored, f"only {len(entries(redis)) - before} of {count} entries in Redis")
    return tokens


def send(run: Run, tokens: Sequence[str]) -> list[Sent]:
    return [run.send("shared", "/orders", token) for token in tokens]


def send_after_restart(run: Run, tokens: Sequence[str], statuses: tuple[int, ...] = (200,)) -> int:
    """Send the tokens to a plugin server with an empty memory; return how many exchanges that made."""
    run.gateway.restart_server()
    wait_until(lambda: run.send("ready", "/second", run.wallet.fresh("/second")).status == 200, timeout_s=20)
    began = time.monotonic()
    sent = send(run, tokens)
    run.require(all(one.status in statuses for one in sent), "not all were answered 200")
    return exchanges(run, began)


# --- Redis itself ---------------------------------------------------------------------


def down_at_start(run: Run) -> None:
    with RedisServer() as redis:
        redis.kill()
        with second_level(run, redis.port):
            run.traffic()
            run.go(run.scaled(1.5, 10)).only("fresh", 200).only("cached", 200)
            run.quiet()
            redis.start()
            expect_filling(run, redis)


def killed_under_load(run: Run) -> None:
    with RedisServer() as redis, second_level(run, redis.port):
        run.traffic()
        # Connections and threads are made by the first of them.
        run.go(0.5)
        before = run.go(run.scaled(1.0, 10))
        run.require(bool(entries(redis)), "nothing was shared before")
        redis.kill()
        run.go(0.5).only("fresh", 200).only("cached", 200)
        after = run.go(run.scaled(1.5, 10)).only("fresh", 200).only("cached", 200)
        tell_rise(run, before, after)
        run.quiet()
        redis.start()
        expect_filling(run, redis)


def frozen(run: Run) -> None:
    with RedisServer() as redis, second_level(run, redis.port):
        run.traffic()
        # Connections and threads are made by the first of them.
        run.go(0.5)
        before = run.go(run.scaled(1.0, 10))
        run.require(bool(entries(redis)), "nothing was shared before")
        redis.freeze()
        first = run.go(0.5).only("fresh", 200).only("cached", 200)
        run.note(f"slowest while the breaker opens: {first.slowest('fresh') * 1000:.0f} ms")
        after = run.go(run.scaled(1.5, 10)).only("fresh", 200).only("cached", 200)
        tell_rise(run, before, after)
        run.quiet()
        redis.thaw()
        expect_filling(run, redis)


def tell_rise(run: Run, before: Any, after: Any) -> None:
    """Require that new tokens are no slower than with a Redis, once its breaker is open."""
    rise = (after.quantile(0.5, "fresh") - before.quantile(0.5, "fresh")) * 1000
    run.note(f"median of new tokens {rise:+.1f} ms against before")
    # A look-up that was waited for takes 50 ms.
    run.require(rise < 25 + 1000 * run.slack_s, f"median of new tokens rose by {rise:.0f} ms")


def restarted(run: Run) -> None:
    with RedisServer() as redis, second_level(run, redis.port):
        run.traffic()
        run.go(0.5)
        for _ in range(int(run.scaled(3, 10))):
            redis.kill()
            redis.start()
            run.go(0.4).only("fresh", 200).only("cached", 200)
        run.quiet()
        expect_filling(run, redis)


def flushed(run: Run) -> None:
    count = int(run.scaled(100, 1000))
    with RedisServer() as redis, second_level(run, redis.port, **PATIENT):
        tokens = fill(run, redis, count)
        made = send_after_restart(run, tokens)
        run.require(made == 0, f"{made} exchanges although {count} entries were shared")
        redis.client().flushall()
        made = send_after_restart(run, tokens)
        run.require(made <= count, f"{made} exchanges for {count} tokens")
        run.note(f"{count} tokens: 0 exchanges from Redis, {made} after FLUSHALL")


def failed_over(run: Run) -> None:
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(RedisServer())
        replica = stack.enter_context(RedisServer(config=f"replicaof 127.0.0.1 {master.port}"))
        sentinel = stack.enter_context(
            RedisServer(
                config=f"sentinel monitor main 127.0.0.1 {master.port} 1\n"
                "sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 5000"
            )
        )
        watched = wait_until(
            lambda: sentinel.client().execute_command("SENTINEL", "REPLICAS", "main") != [], timeout_s=25
        )
        run.require(watched, "the Sentinel does not know the replica")
        nodes = [{"host": "127.0.0.1", "port": sentinel.port}]
        settings = {"sentinel_master": "main", "sentinel_role": "master", "sentinel_nodes": nodes}
        with second_level(run, 1, **settings):
            run.traffic()
            run.go(1.0).only("fresh", 200)
            run.require(bool(entries(master)), "nothing was shared before")
            run.require(wait_until(lambda: bool(entries(replica)), timeout_s=10), "nothing was replicated")
            master.kill()
            run.go(run.scaled(1.5, 10)).only("fresh", 200).only("cached", 200)
            run.quiet()
            promoted = wait_until(
                lambda: replica.client().info("replication")["role"] == "master", timeout_s=30
            )
            run.require(promoted, "the replica was not promoted")
            expect_filling(run, replica)


# --- what Redis says ------------------------------------------------------------------

ERRORS = (
    b"-NOAUTH Authentication required.",
    b"-READONLY You can't write against a read only replica.",
    b"-OOM command not allowed when used memory > 'maxmemory'.",
    b"-LOADING Redis is loading the dataset in memory",
    b"-MOVED 3999 127.0.0.1:1",
)


class RefusingRedis:
    """Answers every command with one error."""

    def __init__(self, error: bytes) -> None:
        self._error = error + b"\r\n"
        self.asked = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while connection.recv(65536):
                self.asked += 1
                connection.sendall(self._error)

    def stop(self) -> None:
        self._server.close()


def refusing(run: Run) -> None:
    for error in ERRORS:
        server = RefusingRedis(error)
        try:
            with second_level(run, server.port):
                run.traffic()
                run.go(run.scaled(0.8, 10)).only("fresh", 200).only("cached", 200)
        finally:
            server.stop()
        name = error.split()[0].decode()
        run.require(server.asked > 0, f"{name}: never asked")
        # Three faults open the breaker of each process, and a probe comes every 2 s.
        run.note(f"{name}: asked {server.asked} times")


def wrong_certificate(run: Run) -> None:
    stranger = run.stage.stranger
    stranger.server_context(run.stage.folder, "redis", SECURE_HOST)
    with RedisServer(tls=run.stage.folder / "redis.pem") as redis:
        with second_level(run, redis.port, ssl=True, server_name=SECURE_HOST):
            run.traffic()
            run.go(run.scaled(1.5, 10)).only("fresh", 200).only("cached", 200)
        refused = redis.log().count("Error accepting a client connection")
        run.note(f"Redis saw {refused} handshakes broken off, and no command")


# --- what is in Redis -----------------------------------------------------------------

Poison = Callable[[Any, bytes, bytes], Any]

POISON: dict[str, Poison] = {
    "random bytes": lambda redis, name, _: redis.set(name, b"\x07" + b"random" * 40),
    "random bytes of our version": lambda redis, name, _: redis.set(name, b"\x01" + b"random" * 40),
    "another entry's value": lambda redis, name, other: redis.set(name, redis.get(other)),
    "truncated": lambda redis, name, _: redis.set(name, redis.get(name)[:-7]),
    "an old version": lambda redis, name, _: redis.setrange(name, 0, b"\x00"),
    "changed": lambda redis, name, _: redis.setrange(name, 60, b"xxxx"),
    "pickle": lambda redis, name, _: redis.set(name, b"\x80\x04\x95cos\nsystem\n(S'id'\ntR." + bytes(40)),
    "JSON": lambda redis, name, _: redis.set(name, b'{"access_token":"x","token_type":"Bearer"}' + bytes(40)),
    "a list": lambda redis, name, _: (redis.delete(name), redis.rpush(name, b"x")),
}


def poisoned(run: Run) -> None:
    with RedisServer() as redis, second_level(run, redis.port, **PATIENT):
        spare = fill(run, redis, 1)
        (other,) = entries(redis)
        tokens = fill(run, redis, len(POISON))
        names = [name for name in entries(redis) if name != other]
        client = redis.client()
        for name, poison in zip(names, POISON.values(), strict=True):
            poison(client, name, other)
        made = send_after_restart(run, tokens)
        run.require(made == len(tokens), f"{made} exchanges for {len(tokens)} poisoned entries")
        made = send_after_restart(run, spare)
        run.require(made == 0, "the good entry was not used")
        run.note(", ".join(POISON))


def huge(run: Run) -> None:
    count = 5
    with RedisServer() as redis, second_level(run, redis.port, **PATIENT):
        tokens = fill(run, redis, count)
        client = redis.client()
        for name in entries(redis):
            client.setrange(name, 50_000_000, b"x")
        run.gateway.restart_server()
        run.send("fresh", "/second")
        pids = run.gateway.pids()
        for pid in pids:
            reset_peak(pid)
        base = sum(map(peak_bytes, pids))
        sent_before = client.info("stats")["total_net_output_bytes"]
        began = time.monotonic()
        run.require(all(one.status == 200 for one in send(run, tokens)), "not all were answered 200")
        run.require(exchanges(run, began) == count, "a huge value was taken for an entry")
        grown = sum(map(peak_bytes, pids)) - base
        out = client.info("stats")["total_net_output_bytes"] - sent_before
        run.require(grown < 20 * 2**20, f"memory grew by {grown >> 20} MB")
        run.require(out < 100_000 * (count + 1), f"Redis sent {out >> 10} kB")
        run.note(f"Redis sent {out >> 10} kB for {count} values of 50 MB")


def ended(run: Run) -> None:
    """Exchanged tokens of 9 s, of which 5 are kept free, whose entries never end in Redis."""
    issuer = run.idp.issuers["internal"]
    usual = issuer.realm
    short = dataclasses.replace(usual.clients["client-2"], token_life_s=9)
    with RedisServer() as redis, second_level(run, redis.port, **PATIENT):
        issuer.realm = dataclasses.replace(usual, clients={**usual.clients, "client-2": short})
        try:
            tokens = fill(run, redis, 5)
        finally:
            issuer.realm = usual
        filled = time.monotonic()
        client = redis.client()
        for name in entries(redis):
            client.persist(name)
        wait_until(lambda: time.monotonic() > filled + 4.5, timeout_s=6)
        made = send_after_restart(run, tokens)
        run.require(made == len(tokens), f"{len(tokens) - made} ended entries were used")


# --- rows -----------------------------------------------------------------------------


def _row(number: str, fault: str, expected: str, action: Any, **options: Any) -> Row:
    present = redis_binary() is not None
    return Row(
        id=f"FAULT-{number}",
        section=SECTION,
        fault=fault,
        expected=expected,
        action=action if present else None,
        reason="" if present else NO_REDIS,
        upstream="exchanged and forwarded ones only",
        **options,
    )


ROWS = (
    _row("60", "down at start", "200 by exchange; in use within 5 s of its start", down_at_start),
    _row(
        "61",
        "killed under load",
        "200; at most its small timeout slower until its breaker opens",
        killed_under_load,
        both=True,
        ci=True,
    ),
    _row("62", "frozen", "as 61; in use again within 5 s", frozen),
    _row("63", "restarted under load", "no error visible", restarted),
    _row("64", "FLUSHALL with hot tokens", "200; at most one exchange a token", flushed),
    _row(
        "65",
        "poisoned: random bytes, another key's value, truncated, old version, pickle, JSON",
        "a miss; 200 by exchange",
        poisoned,
        ci=True,
    ),
    _row("66", "NOAUTH, READONLY, OOM, LOADING, MOVED", "as 61", refusing),
    _row("67", "wrong TLS certificate", "as down; never plain text", wrong_certificate),
    _row("68", "values of 50 MB", "bounded read, a miss", huge),
    _row("69", "TTL lost, entry ended", "the end inside the entry is judged: a miss", ended),
    _row("70", "master killed, Sentinel promotes the replica", "200; in use again within 5 s", failed_over),
)

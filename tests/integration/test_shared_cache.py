"""
The second level on a real Redis: nodes that share it, and everything that can happen to it.

A node is what one process of the plugin server holds; two tests have whole gateways.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kong_token_exchange.config import load_config
from kong_token_exchange.core.sealing import derive_seal_key, seal
from kong_token_exchange.errors import DeadlineError
from kong_token_exchange.flow import FlowResult
from kong_token_exchange.sandbox.demo import ISSUER_ADDRESS, UPSTREAM_ADDRESSES
from kong_token_exchange.sandbox.issuer import IssuerServer
from kong_token_exchange.sandbox.upstream import EchoUpstream, bearer_token
from kong_token_exchange.secret import Secret
from kong_token_exchange.shell.redis_cache import FAILURES, OPEN_FOR_S
from kong_token_exchange.wiring import Shells
from tests.integration.conftest import note_backend
from tests.support.fakes import PATIENCE_S, run_in_threads
from tests.support.gateways import SandboxBackend, load_declarative
from tests.support.redis_server import RedisServer, eventually, needs_redis, redis_version
from tests.support.stage import Stage

pytestmark = [pytest.mark.integration, needs_redis]

SEAL_KEY, OTHER_SEAL_KEY = "5f2b8a1c9e3d4f60718293a4b5c6d7e8", "00112233445566778899aabbccddeeff"
TOKEN_PATH = "/realms/internal/protocol/openid-connect/token"
ENTRIES, LOCKS = "token-exchange:*:1", "token-exchange:*:lock"

# A busy machine must not pass for a slow Redis where that is not what is tested.
PATIENT = {name: 1000 * int(PATIENCE_S) for name in ("connect_timeout", "send_timeout", "read_timeout")}


@pytest.fixture(scope="module")
def shared_redis(pytestconfig: pytest.Config) -> Iterator[RedisServer]:
    note_backend(pytestconfig, "redis", str(redis_version()))
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis(shared_redis: RedisServer) -> RedisServer:
    shared_redis.client().flushall()
    return shared_redis


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """One that a test may break."""
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def issuers() -> Iterator[IssuerServer]:
    with IssuerServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _well(issuers: IssuerServer) -> None:
    issuers.clear_faults()
    issuers.log.clear()


def plugin_config(server: RedisServer, *, route: str = "orders", **changes: Any) -> dict[str, Any]:
    """Return one plugin's configuration of `kong.yml` with a second level."""
    routes = [route for service in load_declarative()["services"] for route in service["routes"]]
    (config,) = [found["plugins"][0]["config"] for found in routes if found["name"] == route]
    config |= {
        "cluster_cache_strategy": "redis",
        "cluster_cache_items": ["tokens"],
        "cluster_cache_redis": {"port": server.port, **changes.pop("redis", PATIENT)},
    }
    config["token_exchange"]["cache"] = {"seal_keys": changes.pop("seal_keys", [SEAL_KEY])}
    config["token_exchange"] |= {"deadline": 1000 * int(PATIENCE_S)}
    return {**config, **changes}


class Node:
    """What one process holds: caches, connections, threads."""

    def __init__(self, issuers: IssuerServer, config: dict[str, Any]) -> None:
        self.shells = Shells(resolve={ISSUER_ADDRESS: issuers.address})
        self.config = load_config(config)
        self.flow = self.shells.make_flow(self.config)

    def run(self, token: str) -> FlowResult:
        return self.flow.run(token, deadline=self.shells.clock.monotonic() + PATIENCE_S)

    def get(self, token: str) -> str:
        exchanged = self.run(token).exchanged
        assert exchanged is not None
        return exchanged.token.reveal()

    def counted(self, name: str) -> dict[str, int]:
        found = self.shells.metrics.snapshot()
        return {
            key.rpartition("=")[2]: count
            for key, count in found.items()
            if key.startswith(f"shared_cache_{name},")
        }


@pytest.fixture
def make_node(issuers: IssuerServer, redis: RedisServer) -> Iterator[Callable[..., Node]]:
    made = []

    def make(on: RedisServer = redis, **changes: Any) -> Node:
        made.append(Node(issuers, plugin_config(on, **changes)))
        return made[-1]

    yield make
    for node in made:
        node.shells.close()


def subject(issuers: IssuerServer, **claims: Any) -> str:
    return issuers.issuers["internal"].mint(scopes=("orders", "add-client-2-as-audience"), **claims)


def exchanges(issuers: IssuerServer) -> int:
    return issuers.log.count(TOKEN_PATH)


def entries(redis: RedisServer) -> list[bytes]:
    return list(redis.client().keys(ENTRIES))


def filled(redis: RedisServer, node: Node, token: str) -> str:
    """Have a node make the exchange; return once it is in Redis and the lock is free."""
    before = len(entries(redis))
    made = node.get(token)
    assert eventually(lambda: len(entries(redis)) == before + 1 and not redis.client().keys(LOCKS))
    return made


# --- sharing --------------------------------------------------------------------------


def test_cache_22_one_exchange_serves_both_nodes(
    issuers: IssuerServer, redis: RedisServer, make_node: Callable[..., Node]
) -> None:
    token, one, two = subject(issuers), make_node(), make_node()

    made = filled(redis, one, token)
    found = two.run(token)

    assert found.exchanged is not None
    assert (made, "hit") == (found.exchanged.token.reveal(), found.cache)
    assert 1 == exchanges(issuers)
    assert {"hit": 1} == two.counted("lookups")


def test_two_nodes_at_the_same_moment_make_one_exchange(
    issuers: IssuerServer, make_node: Callable[..., Node]
) -> None:
    nodes = [make_node() for _ in range(3)]
    for node in nodes:
        node.get(subject(issuers))  # keys are there, threads have started
    issuers.log.clear()
    token, turns, start = subject(issuers), iter(nodes), threading.Barrier(len(nodes))

    def run() -> str:
        node = next(turns)
        start.wait(PATIENCE_S)
        return node.get(token)

    assert 1 == len(set(run_in_threads(run, len(nodes))))
    assert 1 == exchanges(issuers)


def test_an_assertion_that_works_once_serves_every_node(
    issuers: IssuerServer, make_node: Callable[..., Node]
) -> None:
    nodes = [make_node(route="inventory") for _ in range(3)]
    partner = issuers.issuers["partner"]
    token = partner.mint(client="partner-app", user=next(iter(partner.realm.users)))
    turns, start = iter(nodes), threading.Barrier(len(nodes))

    def run() -> str:
        node = next(turns)
        start.wait(PATIENCE_S)
        return node.get(token)

    assert 1 == len(set(run_in_threads(run, len(nodes))))
    assert 1 == exchanges(issuers)
    # And one that starts later.
    assert make_node(route="inventory").get(token)
    assert 1 == exchanges(issuers)


def test_a_lock_of_a_node_that_died_delays_and_does_no_more(
    issuers: IssuerServer, redis: RedisServer, make_node: Callable[..., Node]
) -> None:
    token, node = subject(issuers), make_node()
    filled(redis, node, token)
    (name,) = entries(redis)
    redis.client().flushall()
    redis.client().set(name[: -len(b":1")] + b":lock", b"a dead node", px=60_000)

    assert make_node().get(token)
    assert 2 == exchanges(issuers)


def test_cache_11_other_settings_share_nothing(
    issuers: IssuerServer, redis: RedisServer, make_node: Callable[..., Node]
) -> None:
    token = subject(issuers)
    filled(redis, make_node(), token)

    filled(redis, make_node(leeway=1), token)
    filled(redis, make_node(seal_keys=[OTHER_SEAL_KEY]), token)

    assert 3 == exchanges(issuers)
    assert 3 == len(entries(redis))


def test_seal_keys_are_rotated_node_by_node(
    issuers: IssuerServer, redis: RedisServer, make_node: Callable[..., Node]
) -> None:
    before = make_node()
    token, later = subject(issuers), subject(issuers)
    made = filled(redis, before, token)

    reading, writing = (
        make_node(seal_keys=[SEAL_KEY, OTHER_SEAL_KEY]),
        make_node(seal_keys=[OTHER_SEAL_KEY, SEAL_KEY]),
    )
    assert made == reading.get(token) == writing.get(token)
    made = filled(redis, writing, later)
    assert made == reading.get(later)
    assert made == make_node(seal_keys=[OTHER_SEAL_KEY]).get(later)
    assert 2 == exchanges(issuers)


def test_cache_19_a_dump_of_redis_holds_nothing_readable(
    issuers: IssuerServer, redis: RedisServer, make_node: Callable[..., Node]
) -> None:
    token, node = subject(issuers), make_node()
    made = filled(redis, node, token)
    client = redis.client()

    dump = b"".join(name + client.get(name) for name in entries(redis))

    for secret in (made, token, SEAL_KEY, "client-2-secret", "alex", issuers.issuers["internal"].issuer):
        assert secret.encode() not in dump
    for part in (*made.split("."), *token.split(".")):
        assert part.encode() not in dump


def test_cache_13_redis_drops_an_entry_when_it_ends(
    issuers: IssuerServer, redis: RedisServer, make_node: Callable[..., Node]
) -> None:
    token, node = subject(issuers), make_node()
    filled(redis, node, token)
    (name,) = entries(redis)
    exchanged = node.run(token).exchanged

    left = redis.client().pttl(name) / 1000
    assert exchanged is not None
    assert left == pytest.approx((exchanged.reuse_until or 0) - time.time(), abs=2.0)


# --- poisoned -------------------------------------------------------------------------


def swap(client: Any, name: bytes, other: bytes) -> None:
    client.set(name, client.get(other))


POISON: dict[str, tuple[Callable[[Any, bytes, bytes], Any], str]] = {
    "random": (lambda client, name, _: client.set(name, b"\x07" + b"random" * 40), "version"),
    "random-of-us": (lambda client, name, _: client.set(name, b"\x01" + b"random" * 40), "unknown_key"),
    "another-entrys": (swap, "forged"),
    "old-version": (lambda client, name, _: client.setrange(name, 0, b"\x00"), "version"),
    "truncated": (lambda client, name, _: client.set(name, client.get(name)[:-7]), "forged"),
    "stub": (lambda client, name, _: client.set(name, b"\x01"), "malformed"),
    "changed": (lambda client, name, _: client.setrange(name, 40, b"xx"), "forged"),
    "huge": (lambda client, name, _: client.setrange(name, 100_000_000, b"x"), "too_large"),
    "pickle": (lambda client, name, _: client.set(name, b"\x80\x04\x95cos\nsystem\n" + bytes(40)), "version"),
    "another-type": (lambda client, name, _: (client.delete(name), client.rpush(name, b"x")), "malformed"),
}  # fmt: skip


@pytest.mark.parametrize(("poison", "flaw"), POISON.values(), ids=[f"FAULT-65-{name}" for name in POISON])
def test_what_is_poisoned_is_exchanged_anew(
    issuers: IssuerServer,
    redis: RedisServer,
    make_node: Callable[..., Node],
    poison: Callable[[Any, bytes, bytes], Any],
    flaw: str,
) -> None:
    node, client = make_node(), redis.client()
    token, other = subject(issuers), subject(issuers)
    made = filled(redis, node, token)
    (name,) = entries(redis)
    filled(redis, node, other)
    (other_name,) = set(entries(redis)) - {name}
    poison(client, name, other_name)

    asking = make_node()
    got = asking.get(token)

    assert 3 == exchanges(issuers)
    assert got != made
    assert {flaw: 1} == asking.counted("refused")
    assert {} == asking.counted("faults")
    # What was wrong is replaced.
    assert eventually(lambda: sum(asking.counted("writes").values()) == 1)
    assert got == make_node().get(token)


def test_fault_69_an_entry_that_never_ends_in_redis_ends_here(
    issuers: IssuerServer, redis: RedisServer, make_node: Callable[..., Node]
) -> None:
    internal = issuers.issuers["internal"]
    usual = internal.realm
    short = dataclasses.replace(usual.clients["client-2"], token_life_s=7)
    internal.realm = dataclasses.replace(usual, clients={**usual.clients, "client-2": short})
    try:
        token, node = subject(issuers), make_node()
        made = filled(redis, node, token)
    finally:
        internal.realm = usual
    (name,) = entries(redis)
    assert redis.client().persist(name)
    # Of its 7 s, 5 are kept free.
    until = time.time() + 2.5
    assert eventually(lambda: time.time() > until)

    asking = make_node()

    assert asking.get(token) != made
    assert 2 == exchanges(issuers)
    assert {"expired": 1} == asking.counted("refused")


def test_a_holder_of_the_seal_key_cannot_offer_another_subjects_token(
    issuers: IssuerServer, redis: RedisServer, make_node: Callable[..., Node]
) -> None:
    """The worst writer: he knows the seal key and the entry, and has a good token of somebody else."""
    node = make_node()
    token = subject(issuers)
    filled(redis, node, token)
    (name,) = entries(redis)
    seen: list[bytes] = []
    shared: Any = node.flow._shared
    look = shared._place
    shared._place = lambda key: (seen.append(key), look(key))[1]
    node.shells.cache._exchanged.clear()
    node.get(token)
    internal = issuers.issuers["internal"]
    stranger = internal.mint(client="client-2", scopes=("orders",), sub="somebody-else")
    document = {
        "access_token": stranger,
        "token_type": "Bearer",
        "issued_token_type": "urn:ietf:params:oauth:token-type:access_token",
        "expires_in": 300,
        "sent_at": time.time(),
    }
    forged = seal(
        json.dumps(document).encode(), entry=seen[0], key=derive_seal_key(Secret(SEAL_KEY)), nonce=b"n" * 12
    )
    redis.client().set(name, forged)

    asking = make_node()

    assert asking.get(token) != stranger
    assert {"unproven": 1} == asking.counted("refused")


# --- broken ---------------------------------------------------------------------------


def test_fault_60_61_63_down_at_start_killed_and_back(
    issuers: IssuerServer, own_redis: RedisServer, make_node: Callable[..., Node]
) -> None:
    own_redis.kill()
    node = make_node(own_redis)
    for _ in range(FAILURES + 2):
        assert node.get(subject(issuers))
    assert {"opened": 1} == node.counted("breaker")
    assert {"unknown": FAILURES + 2} == node.counted("lookups")

    own_redis.start()
    began = time.monotonic()

    def is_back() -> bool:
        node.get(subject(issuers))
        return "closed" in node.counted("breaker")

    assert eventually(is_back)
    assert time.monotonic() - began < OPEN_FOR_S + 5
    token = subject(issuers)
    filled(own_redis, node, token)
    own_redis.kill()
    assert make_node(own_redis).get(token)


def test_fault_62_a_frozen_redis_costs_its_timeout_and_then_nothing(
    issuers: IssuerServer, own_redis: RedisServer, make_node: Callable[..., Node]
) -> None:
    # Long enough that each look-up shows in the time, if it were waited for.
    node = make_node(own_redis, redis=dict.fromkeys(PATIENT, 300))
    node.get(subject(issuers))
    own_redis.freeze()
    try:
        began = time.monotonic()
        for _ in range(FAILURES):
            node.get(subject(issuers))
        waiting = time.monotonic() - began
        faults = sum(node.counted("faults").values())
        began = time.monotonic()
        for _ in range(3 * FAILURES):
            node.get(subject(issuers))
        after = time.monotonic() - began
    finally:
        own_redis.thaw()

    assert {"opened": 1} == node.counted("breaker")
    assert faults >= FAILURES
    assert waiting >= 0.3
    assert after < waiting + PATIENCE_S / 2
    assert 3 * FAILURES <= node.counted("lookups")["unknown"]


def test_fault_64_a_flushed_redis_is_filled_again(
    issuers: IssuerServer, redis: RedisServer, make_node: Callable[..., Node]
) -> None:
    tokens, node = [subject(issuers) for _ in range(10)], make_node()
    for token in tokens:
        filled(redis, node, token)
    redis.client().flushall()

    asking = make_node()
    for token in tokens:
        assert asking.get(token)
    assert 20 == exchanges(issuers)
    assert eventually(lambda: 10 == len(entries(redis)))


def test_fault_66_a_wrong_password_is_a_fault(issuers: IssuerServer, make_node: Callable[..., Node]) -> None:
    with RedisServer(requirepass="right") as server:
        node = make_node(server, redis={**PATIENT, "password": "wrong"})
        assert node.get(subject(issuers))
        assert {"refused": 1} == node.counted("faults")
        good = make_node(server, redis={**PATIENT, "password": "right"})
        assert good.get(subject(issuers))
        assert {} == good.counted("faults")


def test_a_request_with_no_time_left_does_not_wait_for_redis(
    issuers: IssuerServer, own_redis: RedisServer, make_node: Callable[..., Node]
) -> None:
    node = make_node(own_redis)
    node.get(subject(issuers))
    own_redis.freeze()
    try:
        began = time.monotonic()
        with pytest.raises(DeadlineError):
            node.flow.run(subject(issuers), deadline=node.shells.clock.monotonic() + 0.2)
        assert time.monotonic() - began < PATIENCE_S / 2
    finally:
        own_redis.thaw()


# --- whole gateways -------------------------------------------------------------------


def test_two_gateways_share_one_exchange(
    stage: Stage, redis: RedisServer, pytestconfig: pytest.Config
) -> None:
    config = load_declarative()
    service = config["services"][0]
    route = service["routes"][0]
    route["plugins"][0]["config"] = plugin_config(redis)
    config["services"] = [{**service, "routes": [route]}]
    stage.start(config)
    note_backend(pytestconfig, "gateway", stage.gateway.name)
    with EchoUpstream() as upstream:
        second = SandboxBackend(
            config,
            upstreams=dict.fromkeys(UPSTREAM_ADDRESSES.values(), upstream.address),
            issuers={ISSUER_ADDRESS: stage.issuers.address},
        )
        try:
            token = stage.token()
            assert 200 == stage.get(token=token).status_code
            assert eventually(lambda: entries(redis))
            other = Stage(None, stage.issuers, upstream)
            other.gateway = second
            assert 200 == other.get(token=token).status_code
            sent = upstream.log.last()
            assert sent is not None
            assert stage.forwarded() == bearer_token(sent) != token
            assert 1 == stage.issuers.log.count(TOKEN_PATH)
            for text in (stage.gateway.logs(), second.logs()):
                assert SEAL_KEY not in text
                assert token not in text
        finally:
            second.stop()

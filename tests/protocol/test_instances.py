"""
Instance ids and the counting of starts.
"""

import json
from typing import Any

import pytest

from kong_token_exchange.pluginserver.contract import Fetch, exit_with
from kong_token_exchange.pluginserver.instances import GRACE_S, FailedPlugin, LocalInstances, fingerprint
from kong_token_exchange.pluginserver.pdk import Kong
from tests.protocol.test_faults import FakeClock
from tests.support.plugins import Instance, Plugin, make_log

CONFIG: dict[str, Any] = {
    "issuer": "https://a.example",
    "audience": ["b"],
    "__seq__": 2,
    "__plugin_id": "5811a284-57c7-5e6b-9286-9b00c747153d",
    "__key__": "plugins:test:1",
    "route_id": "4726a05a-d550-537e-9fc3-a07c7a1188c7",
}


def encode(**changes: Any) -> bytes:
    return json.dumps({**CONFIG, **changes}).encode()


class Registry:
    def __init__(self, plugin: Plugin | None = None, **options: Any) -> None:
        self.clock = FakeClock()
        self.log, self.lines = make_log(clock=self.clock)
        self.plugin = plugin or Plugin()
        self.failure = exit_with(500, b"failed")
        self.it = LocalInstances(
            self.plugin,
            failure=self.failure,
            log=self.log,
            clock=self.clock,
            wall_clock=lambda: 1700.5,
            **options,
        )

    def start(self, **changes: Any) -> int:
        return self.it.start("test-plugin", encode(**changes)).instance_id


def test_gw_16_id_is_31_bits_of_name_and_configuration_and_the_same_in_every_process() -> None:
    first, second = Registry(), Registry()
    second.start(issuer="https://b.example")

    instance_id = first.start()

    assert 0 < instance_id < 2**31
    assert instance_id == second.start()
    assert int.from_bytes(fingerprint("test-plugin", encode())[:4], "big") & 0x7FFF_FFFF == instance_id


def test_build_counter_and_member_order_do_not_change_the_id() -> None:
    registry = Registry()
    turned = json.dumps(dict(reversed(CONFIG.items())), indent=1).encode()

    assert registry.start() == registry.start(__seq__=77)
    assert registry.start() == registry.it.start("test-plugin", turned).instance_id
    assert 1 == len(registry.plugin.started)


@pytest.mark.parametrize(
    "changes",
    [
        {"issuer": "https://b.example"},
        {"audience": ["c"]},
        {"__plugin_id": "other"},
        {"__key__": "other"},
        {"route_id": "other"},
        {"__ws_id": "other"},
        {"leeway": 0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_else_differs_is_another_instance(changes: dict[str, Any]) -> None:
    registry = Registry()

    assert registry.start() != registry.start(**changes)
    assert 2 == len(registry.plugin.started)


def test_name_and_configuration_do_not_run_together() -> None:
    assert fingerprint("a", b'{"b":1}') != fingerprint("a{", b'"b":1}')


def test_gw_11_start_then_close_of_the_same_id_leaves_the_instance_alive() -> None:
    registry = Registry()
    old = registry.start(__seq__=2)
    new = registry.start(__seq__=3)
    registry.it.close(old)
    registry.clock.now += 10 * GRACE_S

    assert old == new
    assert [] == registry.it.expire()
    assert registry.it.find(new) is not None


def test_closed_instance_lives_through_its_grace_and_not_longer() -> None:
    registry = Registry()
    instance_id = registry.start()
    registry.it.close(instance_id)

    registry.clock.now += GRACE_S - 0.1
    assert [] == registry.it.expire()
    assert registry.it.find(instance_id) is not None

    registry.clock.now += 0.1
    assert [instance_id] == [instance.instance_id for instance in registry.it.expire()]
    assert registry.it.find(instance_id) is None
    assert [] == registry.it.expire()


def test_instance_started_again_within_its_grace_is_the_same_one() -> None:
    registry = Registry()
    instance_id = registry.start()
    before = registry.it.find(instance_id)
    registry.it.close(instance_id)
    registry.clock.now += 1
    registry.start()
    registry.clock.now += 10 * GRACE_S

    assert [] == registry.it.expire()
    assert before is registry.it.find(instance_id)
    assert 1 == len(registry.plugin.started)


def test_more_closes_than_starts_and_unknown_ids_do_nothing() -> None:
    registry = Registry()
    instance_id = registry.start()
    registry.it.close(instance_id)
    registry.it.close(instance_id)
    registry.it.close(12345)
    registry.start()
    registry.clock.now += 10 * GRACE_S

    assert [] == registry.it.expire()
    assert registry.it.find(instance_id) is not None


def test_colliding_ids_are_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = {b"a": b"\xff\xff\xff\xff" + b"a" * 28, b"b": b"\x7f\xff\xff\xff" + b"b" * 28}
    monkeypatch.setattr(
        "kong_token_exchange.pluginserver.instances.fingerprint", lambda name, config: digests[config]
    )
    registry = Registry()
    first, second = (registry.it.start("p", config).instance_id for config in (b"a", b"b"))

    assert 0x7FFF_FFFF == first
    # 0 is no id: it is what an absent field reads as.
    assert 1 == second
    assert second == registry.it.start("p", b"b").instance_id
    assert first == registry.it.start("p", b"a").instance_id


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, RecursionError, MemoryError])
def test_gw_11_plugin_that_does_not_start_answers_500_and_says_so_once_a_minute(
    error: type[BaseException],
) -> None:
    def refuse(config: Any) -> Any:
        raise error("MARKED-SECRET")

    registry = Registry(Plugin(refuse))
    instance = registry.it.start("test-plugin", encode())

    for _ in range(3):
        assert registry.failure is instance.warm([])
    assert instance.wanted == 0
    assert [error.__name__ in line for line in registry.lines.lines] == [True, True]
    registry.clock.now += 61
    instance.warm([])
    assert 3 == len(registry.lines.lines)
    assert "MARKED-SECRET" not in registry.lines


def test_configuration_that_is_no_json_fails_the_start_and_not_the_server() -> None:
    registry = Registry()
    first = registry.it.start("test-plugin", b"{")

    assert registry.failure is first.warm([])
    assert first.instance_id == registry.it.start("test-plugin", b"{").instance_id
    assert first.instance_id != registry.it.start("test-plugin", b"{{").instance_id


def test_instance_that_wants_what_cannot_be_prefetched_fails_its_start() -> None:
    registry = Registry(Plugin(prefetch=[Fetch("kong.nope.nope")]))

    assert registry.failure is registry.it.start("test-plugin", encode()).warm([])


def test_failed_instance_is_tried_again_at_its_next_start() -> None:
    answers: list[Any] = [ValueError(), Instance()]

    def start(config: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    registry = Registry(Plugin(start))
    instance_id = registry.start()
    generation = registry.it.generation()
    registry.it.close(instance_id)

    assert instance_id == registry.start()
    found = registry.it.find(instance_id)
    assert found is not None
    assert (False, 1) == (found.failed, found.starts)
    assert generation != registry.it.generation()


def test_failed_instance_keeps_its_starts_when_replaced() -> None:
    answers: list[Any] = [ValueError(), Instance()]

    def start(config: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    registry = Registry(Plugin(start))
    instance_id = registry.start()
    registry.start()
    registry.it.close(instance_id)
    registry.clock.now += 10 * GRACE_S

    assert [] == registry.it.expire()


def test_the_one_started_longest_ago_makes_room_and_is_closed_after_its_grace() -> None:
    registry = Registry(max_instances=2)
    first = registry.start(n=1)
    second = registry.start(n=2)
    registry.start(n=1)
    third = registry.start(n=3)

    assert registry.it.find(second) is None
    assert None not in (registry.it.find(first), registry.it.find(third))
    assert 2 == len(registry.it)
    assert [] == registry.it.expire()
    registry.clock.now += GRACE_S
    assert [second] == [instance.instance_id for instance in registry.it.expire()]


def test_instance_says_when_it_started() -> None:
    registry = Registry()
    instance = registry.it.find(registry.start())

    assert instance is not None
    assert 1700 == instance.started_at


def test_deeply_nested_configuration_does_not_end_the_server() -> None:
    deep = b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"
    registry = Registry()

    assert registry.it.start("test-plugin", deep).instance_id
    assert registry.it.start("test-plugin", b'{"a":' + b"[" * 200_000).instance_id


def test_plugin_that_did_not_start_never_comes_to_a_thread() -> None:
    log, _ = make_log()
    refused = exit_with(500)
    failed = FailedPlugin("why", refused, log)

    assert refused is failed.warm([])
    with pytest.raises(AssertionError):
        failed.access(Kong(Any))  # type: ignore[arg-type]
    failed.close()

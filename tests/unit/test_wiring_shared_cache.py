"""Which configurations get a second level, and which share one."""

import copy
import sys
from typing import Any

import pytest

from kong_token_exchange.config import load_config
from kong_token_exchange.errors import ConfigError
from kong_token_exchange.shell.redis_cache import RedisTokenCache
from kong_token_exchange.wiring import Shells
from tests.unit.test_config_shared_cache import CONFIG, OTHER_KEY


def config(**changes: Any) -> Any:
    raw = copy.deepcopy(CONFIG)
    keys = changes.pop("seal_keys", None)
    if keys is not None:
        raw["token_exchange"]["cache"]["seal_keys"] = keys
    raw.update(changes)
    return load_config(raw)


def shared(shells: Shells, **changes: Any) -> Any:
    return shells.make_flow(config(**changes))._shared


def test_without_a_strategy_there_is_none_and_its_library_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "redis" or ".redis_" in name]:
        monkeypatch.delitem(sys.modules, name)

    assert shared(Shells(), cluster_cache_strategy="off") is None
    assert "redis" not in sys.modules


def test_equal_settings_share_one_and_others_do_not() -> None:
    shells = Shells()
    one = shared(shells)

    assert isinstance(one, RedisTokenCache)
    assert one is shared(shells, client_id=["other"])
    assert one is not shared(shells, cluster_cache_redis={"port": 6380})
    assert one is not shared(shells, cluster_cache_redis={"password": "p"})
    assert one is not shared(shells, seal_keys=[OTHER_KEY])


def test_nothing_is_connected_or_started_before_the_first_use() -> None:
    # Nobody listens on port 1: an attempt would be a fault.
    made = shared(Shells(), cluster_cache_redis={"port": 1})

    assert made._store._client is None
    assert made._readers._missing > 0


def test_without_its_library_the_mistake_names_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kong_token_exchange.shell.redis_store", None)

    with pytest.raises(ConfigError) as caught:
        Shells().make_flow(config())

    assert "cluster_cache_strategy" == caught.value.path
    assert "kong-token-exchange[redis]" in caught.value.message


def test_a_ca_file_that_cannot_be_read_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        Shells().make_flow(config(cluster_cache_redis={"ssl": True}, ca_file="/nowhere/ca.pem"))

    assert "ca_file" == caught.value.path

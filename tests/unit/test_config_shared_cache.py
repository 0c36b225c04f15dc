"""The second level's part of the configuration."""

import copy
from typing import Any

import pytest

from kong_token_exchange.config import PluginConfig, load_config
from kong_token_exchange.errors import ConfigError
from kong_token_exchange.secret import Secret

KEY = "5f2b8a1c9e3d4f60718293a4b5c6d7e8"
OTHER_KEY = "00112233445566778899aabbccddeeff"
CLOUD = "cluster_cache_redis.cloud_authentication"
SENTINEL = {"sentinel_master": "main", "sentinel_role": "master", "sentinel_nodes": [{"host": "s1"}]}

CONFIG: dict[str, Any] = {
    "issuer": "https://idp.test",
    "client_id": ["gateway"],
    "client_secret": ["s3cret"],
    "cluster_cache_strategy": "redis",
    "cluster_cache_items": ["tokens"],
    "token_exchange": {
        "subject_token_issuers": [{"issuer": "https://partner.test"}],
        "cache": {"seal_keys": [KEY]},
    },
}


def load(
    top: dict[str, Any] | None = None, cache: dict[str, Any] | None = None, **redis: Any
) -> PluginConfig:
    raw = copy.deepcopy(CONFIG)
    raw.update(top or {})
    if cache is not None:
        raw["token_exchange"]["cache"] = cache
    if redis:
        raw["cluster_cache_redis"] = redis
    return load_config(raw, allow_references=True)


def mistake(*arguments: Any, **redis: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(*arguments, **redis)
    return caught.value


def test_defaults_are_a_redis_on_loopback_and_a_small_timeout() -> None:
    shared = load().shared_cache

    assert shared is not None
    assert (Secret(KEY),) == shared.seal_keys
    redis = shared.redis
    assert ("127.0.0.1", 6379, 0, None, None) == (
        redis.host, redis.port, redis.database, redis.username, redis.password,
    )  # fmt: skip
    assert (0.05, 0.05, 0.05) == (redis.connect_timeout_s, redis.read_timeout_s, redis.timeout_s)
    assert ((), (), False, True) == (redis.sentinels, redis.cluster_nodes, redis.ssl, redis.ssl_verify)


@pytest.mark.parametrize(
    "top",
    [{"cluster_cache_strategy": "off"}, {"cluster_cache_strategy": None}, {"cluster_cache_items": []}],
    ids=["off", "absent", "no-items"],
)
def test_cache_14_it_is_off_unless_asked_for(top: dict[str, Any]) -> None:
    assert load(top).shared_cache is None


def test_cache_14_a_cache_that_is_off_has_no_second_level() -> None:
    config = load(cache={"enabled": False, "seal_keys": [KEY]})

    assert config.shared_cache is None
    assert any(warning.startswith("cluster_cache_strategy") for warning in config.warnings)


def test_kong_fills_in_the_record_and_that_means_nothing() -> None:
    filled = {
        "host": "127.0.0.1",
        "port": 6379,
        "ssl": False,
        "cloud_authentication": {"aws_is_serverless": True},
    }

    assert load({"cluster_cache_redis": None}).shared_cache == load(**filled).shared_cache


def test_introspection_may_stand_beside_tokens() -> None:
    assert load({"cluster_cache_items": ["introspection", "tokens"]}).shared_cache is not None


@pytest.mark.parametrize(
    ("arguments", "redis", "path"),
    [
        (({"cluster_cache_items": None},), {}, "cluster_cache_items"),
        (({}, {}), {}, "token_exchange.cache.seal_keys"),
        (({}, {"seal_keys": []}), {}, "token_exchange.cache.seal_keys"),
        (({}, {"seal_keys": [KEY, KEY[:31]]}), {}, "token_exchange.cache.seal_keys[1]"),
        (({}, {"seal_keys": ["ab" * 32]}), {}, "token_exchange.cache.seal_keys[0]"),
        (({}, {"seal_keys": [KEY, KEY]}), {}, "token_exchange.cache.seal_keys[1]"),
        (({}, {"seal_keys": [KEY + str(n) for n in range(5)]}), {}, "token_exchange.cache.seal_keys"),
        ((), {"connect_timeout": 0}, "cluster_cache_redis.connect_timeout"),
        ((), {"read_timeout": 0}, "cluster_cache_redis.read_timeout"),
        ((), {"database": -1}, "cluster_cache_redis.database"),
        ((), {"database": 1, "cluster_nodes": [{"ip": "n1"}]}, "cluster_cache_redis.database"),
        ((), {"host": "a b"}, "cluster_cache_redis.host"),
        ((), {"cluster_nodes": [{"ip": "a/b"}]}, "cluster_cache_redis.cluster_nodes[0].ip"),
        ((), {"cluster_nodes": []}, "cluster_cache_redis.cluster_nodes"),
        ((), {"username": "u"}, "cluster_cache_redis.password"),
        ((), {"sentinel_master": "main"}, "cluster_cache_redis.sentinel_nodes"),
        ((), {"sentinel_nodes": [{"host": "s1"}]}, "cluster_cache_redis.sentinel_master"),
        ((), {**SENTINEL, "sentinel_role": "slave"}, "cluster_cache_redis.sentinel_role"),
        ((), {**SENTINEL, "cluster_nodes": [{"ip": "n1"}]}, "cluster_cache_redis.cluster_nodes"),
        ((), {"cloud_authentication": {"auth_provider": "aws"}}, f"{CLOUD}.auth_provider"),
        ((), {"connection_is_proxied": True}, "cluster_cache_redis.connection_is_proxied"),
        ((), {"keepalive_backlog": 10}, "cluster_cache_redis.keepalive_backlog"),
        ((), {"hosts": "x"}, "cluster_cache_redis.hosts"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_by_its_path(arguments: tuple[Any, ...], redis: dict[str, Any], path: str) -> None:
    assert path == mistake(*arguments, **redis).path


def test_a_mistake_tells_no_secret() -> None:
    assert KEY[:20] not in str(mistake({}, {"seal_keys": [KEY[:31]]}))


def test_mistakes_are_told_while_it_is_off() -> None:
    assert (
        "cluster_cache_redis.read_timeout" == mistake({"cluster_cache_strategy": "off"}, read_timeout=0).path
    )


def test_sentinels_and_cluster_nodes_are_addresses() -> None:
    sentinel = load(**SENTINEL, sentinel_password="p", sentinel_username="u").shared_cache
    cluster = load(cluster_nodes=[{"ip": "n1", "port": 7000}, {}], cluster_max_redirections=2).shared_cache

    assert sentinel is not None
    assert cluster is not None
    assert ("main", (("s1", 6379),)) == (sentinel.redis.sentinel_master, sentinel.redis.sentinels)
    assert Secret("p") == sentinel.redis.sentinel_password
    assert (("n1", 7000), ("127.0.0.1", 6379)) == cluster.redis.cluster_nodes
    assert 2 == cluster.redis.cluster_max_redirections


def test_the_largest_timeout_bounds_a_look_up() -> None:
    shared = load(connect_timeout=200, read_timeout=30, send_timeout=40).shared_cache

    assert shared is not None
    assert (0.2, 0.04, 0.2) == (
        shared.redis.connect_timeout_s, shared.redis.read_timeout_s, shared.redis.timeout_s,
    )  # fmt: skip


def test_references_stand_where_kong_allows_them() -> None:
    reference = "{vault://env/x}"

    shared = load({}, {"seal_keys": [reference]}, password=reference, host=reference, server_name=reference)

    assert shared.shared_cache is not None


def test_a_port_out_of_a_vault_is_a_number_as_text() -> None:
    told = load(port="6380").shared_cache
    reference = load(port="{vault://env/port}").shared_cache

    assert told is not None
    assert reference is not None
    assert (6380, 6379) == (told.redis.port, reference.redis.port)
    for wrong in ("", "six", "65536", "-1", "6380.0", "٦٣٨٠", "9" * 30):
        assert "cluster_cache_redis.port" == mistake(port=wrong).path
    assert "cluster_cache_redis.database" == mistake(database="1").path


def test_an_unencrypted_password_on_the_network_is_warned_of() -> None:
    assert any("cluster_cache_redis.ssl" in text for text in load(host="redis", password="p").warnings)
    assert not any("cluster_cache_redis.ssl" in text for text in load(password="p").warnings)
    assert not any("redis" in text for text in load(host="redis", password="p", ssl=True).warnings)
    assert any("ssl_verify" in text for text in load(ssl=True, ssl_verify=False).warnings)


def test_secrets_are_not_printed() -> None:
    config = load(password="MARKpassword")

    assert "MARK" not in repr(config)
    assert KEY not in repr(config)


def test_nodes_in_the_middle_of_a_rotation_share_their_entries() -> None:
    variants = [
        load({}, {"seal_keys": [KEY]}),
        load({}, {"seal_keys": [OTHER_KEY, KEY]}),
        load(host="another", database=3),
        load({"cluster_cache_strategy": "off"}),
    ]

    assert 1 == len({config.identity for config in variants})
    assert variants[0].identity != load({"client_id": ["other"]}).identity
    assert variants[0].identity != load({}, {"seal_keys": [KEY], "ttl": 60}).identity

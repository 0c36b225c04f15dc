import copy
import itertools
import json
import sys
from pathlib import Path

import pytest

from kong_token_exchange.sandbox import declarative
from kong_token_exchange.sandbox.declarative import DeclarativeError, GatewayConfig, PluginDescription
from kong_token_exchange.sandbox.plugin_client import query_description
from tests.unit.sandbox.scripted import DESCRIPTION

PLUGIN = {"name": "token-exchange"}


def load(document, *, count=None, environ=None) -> GatewayConfig:
    sequences = count or itertools.count(1)
    return declarative.load(
        document,
        PluginDescription.parse(DESCRIPTION),
        next_seq=lambda: next(sequences),
        environ=environ or {},
    )


def document(**members):
    return {"_format_version": "3.0", **members}


def with_plugins(*, route=(), service=(), everywhere=()):
    return document(
        services=[
            {
                "name": "s",
                "url": "http://h",
                "plugins": list(service),
                "routes": [{"name": "r", "paths": ["/r"], "plugins": list(route)}],
            }
        ],
        plugins=list(everywhere),
    )


def mark(text):
    return {**PLUGIN, "config": {"mark": text}}


@pytest.mark.parametrize(
    ("plugins", "winner"),
    [
        ({"route": [mark("route")], "service": [mark("service")], "everywhere": [mark("global")]}, "route"),
        ({"service": [mark("service")], "everywhere": [mark("global")]}, "service"),
        ({"everywhere": [mark("global")]}, "global"),
        ({}, None),
    ],
    ids=["route", "service", "global", "none"],
)
def test_one_configuration_wins_route_over_service_over_global(plugins, winner):
    config = load(with_plugins(**plugins))
    plugin = config.plugin_for(config.routes[0])

    assert (plugin.config["mark"] if plugin else None) == winner


def test_plugin_for_route_and_service_together_wins_over_the_route_alone():
    both = {**mark("both"), "route": "r", "service": "s"}
    config = load(with_plugins(route=[mark("route")], everywhere=[both]))

    plugin = config.plugin_for(config.routes[0])
    assert plugin is not None
    assert plugin.config["mark"] == "both"


def test_configuration_carries_where_it_is_attached_and_kongs_own_members():
    config = load(with_plugins(route=[PLUGIN], service=[PLUGIN], everywhere=[PLUGIN]))
    route = config.routes[0]
    on_route, on_service = config.plugins[route.id, None], config.plugins[None, route.service.id]

    assert on_route.config["route_id"] == route.id
    assert "service_id" not in on_route.config
    assert on_service.config["service_id"] == route.service.id
    assert not {"route_id", "service_id"} & set(config.plugins[None, None].config)
    assert on_route.config["__plugin_id"] == on_route.id
    assert on_route.config["__seq__"] == on_route.seq
    assert on_route.config["__key__"] == f"plugins:token-exchange:{route.id}::::{declarative.WORKSPACE_ID}"
    assert json.loads(on_route.to_json()) == on_route.config


def test_ids_stay_over_a_reload_and_sequences_do_not():
    count = itertools.count(1)
    first = load(with_plugins(route=[PLUGIN]), count=count)
    again = load(with_plugins(route=[mark("changed")]), count=count)

    (before,), (after,) = first.plugins.values(), again.plugins.values()
    assert before.id == after.id
    assert before.seq < after.seq
    assert first.routes[0].id == again.routes[0].id


def test_disabled_plugins_and_services_are_not_there():
    config = load(with_plugins(route=[{**PLUGIN, "enabled": False}]))
    off = with_plugins(route=[PLUGIN])
    off["services"][0]["enabled"] = False

    assert config.plugins == {}
    assert load(off).routes == ()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://orders:8080", ("orders", 8080, None)),
        ("http://orders", ("orders", 80, None)),
        ("http://orders:8080/api/", ("orders", 8080, "/api/")),
    ],
)
def test_url_is_short_for_host_port_and_path(url, expected):
    service = (
        load(document(services=[{"name": "s", "url": url, "routes": [{"paths": ["/"]}]}])).routes[0].service
    )

    assert (service.host, service.port, service.path) == expected


def test_service_can_be_written_out_and_named_by_a_top_level_route():
    config = load(
        document(
            services=[{"name": "s", "host": "h", "port": 81, "path": "/p", "read_timeout": 5}],
            routes=[{"name": "r", "hosts": ["a"], "service": {"name": "s"}, "strip_path": False}],
        )
    )
    route = config.routes[0]

    assert (route.service.host, route.service.port, route.service.read_timeout) == ("h", 81, 5)
    assert (route.hosts, route.strip_path, route.preserve_host) == (("a",), False, False)


def test_route_without_a_service_is_allowed():
    assert load(document(routes=[{"paths": ["/"]}])).routes[0].service is None


def test_vault_references_are_looked_up_in_the_environment_given():
    config = load(
        with_plugins(route=[{**PLUGIN, "config": {"secrets": ["{vault://env/a-b}"]}}]),
        environ={"A_B": "value"},
    )
    (plugin,) = config.plugins.values()

    assert plugin.config["secrets"] == ["value"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("_format_version"), '_format_version: expected "3.0"'),
        (lambda d: d.update(_format_version="1.1"), '_format_version: expected "3.0"'),
        (lambda d: d.update(upstreams=[]), "upstreams: unknown field"),
        (lambda d: d["services"][0].update(colour="red"), "services[0].colour: unknown field"),
        (lambda d: d["services"][0].update(url="nonsense"), "services[0].url: not a URL"),
        (
            lambda d: d["services"][0].update(url="https://h"),
            "services[0].protocol: the sandbox proxies to http only",
        ),
        (lambda d: d["services"][0].pop("url"), "services[0].host: required field missing"),
        (
            lambda d: d["services"][0]["routes"][0].update(path="/"),
            "services[0].routes[0].path: unknown field",
        ),
        (
            lambda d: d["services"][0]["routes"][0].update(paths=["r"]),
            "services[0].routes[0].paths: should start with: / (fixed path) or ~/ (regex path)",
        ),
        (
            lambda d: d["services"][0]["routes"][0].pop("paths"),
            "services[0].routes[0]: must set one of 'methods', 'hosts', 'headers', 'paths'",
        ),
        (
            lambda d: d["services"][0]["routes"][0]["plugins"][0].update(name="cors"),
            "services[0].routes[0].plugins[0].name: plugin 'cors' not enabled; the sandbox has one plugin",
        ),
        (
            lambda d: d["services"][0]["routes"][0]["plugins"][0].update(config={"typo": 1}),
            "services[0].routes[0].plugins[0].config.typo: unknown field",
        ),
        (lambda d: d.update(plugins=[{**PLUGIN, "route": "none"}]), "plugins: no route named 'none'"),
        (
            lambda d: d.update(routes=[{"paths": ["/"], "service": "none"}]),
            "routes[0].service: no service named 'none'",
        ),
        (lambda d: d.update(routes={"paths": ["/"]}), "routes: expected a list of records"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_kong_refuses_is_refused_with_its_path(change, message):
    wrong = copy.deepcopy(with_plugins(route=[PLUGIN]))
    change(wrong)
    with pytest.raises(DeclarativeError) as caught:
        load(wrong)

    assert str(caught.value) == message


@pytest.mark.parametrize(
    "described",
    [
        [{"Name": "token-exchange"}],
        {"Plugins": DESCRIPTION["Plugins"]},
        {"Protocol": "ProtoBuf:1", "Plugins": []},
    ],
    ids=["messagepack-list", "no-protocol", "no-plugin"],
)
def test_description_of_anything_but_protobuf_is_refused(described):
    with pytest.raises(DeclarativeError):
        PluginDescription.parse(described)


def test_the_example_at_the_top_level_loads_with_the_plugins_own_schema():
    raw = query_description([sys.executable, "-m", "kong_token_exchange", "describe"])
    path = Path(__file__).parents[3] / "kong.yml"
    counter = itertools.count(1)
    config = declarative.load(path, PluginDescription.parse(json.loads(raw)), next_seq=lambda: next(counter))

    routes = {route.name: config.plugin_for(route) for route in config.routes}
    assert set(routes) == {"orders", "reports", "inventory"}
    assert all(plugin is not None and plugin.config["token_exchange"]["flow"] for plugin in routes.values())
    assert routes["inventory"].config["token_exchange"]["grant_type"] == "jwt_bearer"

import pytest

from kong_token_exchange.sandbox.declarative import Route, Service
from kong_token_exchange.sandbox.routing import Router, normalize, upstream_path


def route(name: str, **members) -> Route:
    return Route(id=name, name=name, **members)


def chosen(routes, *, method="GET", host="api.example", target="/", port=8000, headers=None) -> str | None:
    match = Router(routes).match(method=method, host=host, port=port, target=target, headers=headers or {})
    return match.route.name if match else None


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("/orders", "orders"),
        ("/orders/1?x=/deep", "orders"),
        ("/ordersX", "orders"),
        ("/orders/deep/1", "deep"),
        ("/Orders", None),
        ("/order", None),
        ("/%6frders", "orders"),
        ("/x/../orders", "orders"),
        ("//orders", "orders"),
        ("/orders/..", None),
    ],
)
def test_longest_prefix_of_the_normalised_path_wins(target, name):
    assert (
        chosen([route("orders", paths=("/orders",)), route("deep", paths=("/orders/deep",))], target=target)
        == name
    )


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("api.example", "plain"),
        ("API.example:8000", "plain"),
        ("x.example", "suffix"),
        ("www.x", "prefix"),
        ("other", None),
        ("[::1]:80", None),
    ],
)
def test_hosts_match_exactly_or_by_wildcard(host, name):
    routes = [
        route("suffix", hosts=("*.example",)),
        route("plain", hosts=("api.example",)),
        route("prefix", hosts=("www.*",)),
    ]
    assert chosen(routes, host=host) == name


@pytest.mark.parametrize(("port", "name"), [(8000, "r"), (8001, None)])
def test_host_with_a_port_is_about_the_port_the_request_came_in_on(port, name):
    assert chosen([route("r", hosts=("api.example:8000",))], port=port) == name


def test_more_kinds_of_conditions_win_over_a_longer_path():
    routes = [route("long", paths=("/orders/deep",)), route("both", paths=("/",), hosts=("api.example",))]

    assert chosen(routes, target="/orders/deep") == "both"
    assert chosen(routes, target="/orders/deep", host="other") == "long"


def test_every_kind_of_condition_has_to_match():
    only = [route("r", paths=("/a",), methods=("POST",), headers={"x-v": ("2",)})]

    assert chosen(only, method="POST", target="/a", headers={"x-v": ["1", "2"]}) == "r"
    assert chosen(only, method="GET", target="/a", headers={"x-v": ["2"]}) is None
    assert chosen(only, method="POST", target="/b", headers={"x-v": ["2"]}) is None
    assert chosen(only, method="POST", target="/a", headers={"x-v": ["1"]}) is None
    assert chosen(only, method="POST", target="/a") is None


def test_header_by_regular_expression():
    assert chosen([route("r", headers={"x-v": ("~*^a+$",)})], headers={"x-v": ["AAA"]}) == "r"
    assert chosen([route("r", headers={"x-v": ("~*^a+$",)})], headers={"x-v": ["ab"]}) is None


def test_regular_expression_paths_go_before_prefixes_and_by_priority():
    routes = [
        route("prefix", paths=("/orders/1",)),
        route("regex", paths=("~/orders/\\d",), regex_priority=1),
        route("later", paths=("~/orders",), regex_priority=2),
    ]
    assert chosen(routes, target="/orders/1") == "later"
    assert chosen(routes[:2], target="/orders/1") == "regex"
    assert chosen(routes[:2], target="/x/orders/1") is None


def test_equal_routes_are_taken_in_the_order_of_the_file():
    assert (
        chosen([route("first", paths=("/a",)), route("second", paths=("/b", "/a"))], target="/a") == "first"
    )


@pytest.mark.parametrize(
    ("service_path", "strip", "prefix", "path", "expected"),
    [
        (None, True, "/orders", "/orders", "/"),
        (None, True, "/orders", "/orders/", "/"),
        (None, True, "/orders", "/orders/1", "/1"),
        (None, True, "/orders", "/orders1", "/1"),
        (None, True, "/orders", "/orders..", "/"),
        (None, True, "/orders", "/orders../x", "/x"),
        (None, True, "/", "/x", "/x"),
        (None, True, None, "/x/y", "/x/y"),
        (None, False, None, "/orders/1", "/orders/1"),
        (None, False, None, "/", "/"),
        ("/api", True, "/orders", "/orders", "/api"),
        ("/api", True, "/orders", "/orders/", "/api/"),
        ("/api", True, "/orders", "/orders/1", "/api/1"),
        ("/api", True, "/orders", "/orders1", "/api/1"),
        ("/api", False, None, "/orders/1", "/api/orders/1"),
        ("/api", False, None, "/", "/api"),
        ("/api/", True, "/orders", "/orders", "/api"),
        ("/api/", True, "/orders", "/orders/", "/api/"),
        ("/api/", True, "/orders", "/orders/1", "/api/1"),
        ("/api/", False, None, "/orders", "/api/orders"),
        (None, False, None, '/a b"ü', "/a%20b%22%C3%BC"),
    ],
)
def test_upstream_path(service_path, strip, prefix, path, expected):
    service = Service(id="s", name="s", host="h", path=service_path)

    assert upstream_path(route("r", service=service, strip_path=strip), prefix, path) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", "/"),
        ("/a/./b", "/a/b"),
        ("/a/../b", "/b"),
        ("/../../b", "/b"),
        ("/a/..", "/"),
        ("/a/b/..", "/a/"),
        ("/a//b/", "/a/b/"),
        ("/%41%2f%2e", "/A%2F."),
        ("/a/%2e%2e/b", "/b"),
        ("/%ff", "/\udcff"),
        ("/%zz", "/%zz"),
    ],
)
def test_path_is_normalised_as_kong_does(path, expected):
    assert normalize(path) == expected


def test_match_tells_the_prefix_it_strips():
    def prefix(**members):
        match = Router([route("r", **members)]).match(
            method="GET", host="h", port=1, target="/orders/1", headers={"host": ["h"]}
        )
        assert match is not None
        return match.prefix

    assert prefix(paths=("/orders",)) == "/orders"
    assert prefix(paths=("/orders",), strip_path=False) is None
    assert prefix(hosts=("h",)) is None

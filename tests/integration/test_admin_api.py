"""
The plugin as operators manage it: Kong's Admin API, with PostgreSQL and without a database.

Kong alone knows its Admin API, so nothing here runs on the sandbox.
"""

from __future__ import annotations

import copy
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import requests

import kong_token_exchange
from kong_token_exchange.pluginserver.parent import Ancestor
from kong_token_exchange.sandbox.demo import ISSUER_ADDRESS, UPSTREAM_ADDRESSES, serve_command
from kong_token_exchange.sandbox.issuer import IssuerServer
from kong_token_exchange.sandbox.upstream import EchoUpstream
from tests.support import gateways
from tests.support.admin_api import (
    AdminApi,
    PostgresCluster,
    PostgresUnavailableError,
    find_postgres,
    run_migrations,
    start_kong,
)
from tests.support.gateways import KongOnPath, kong_version, load_declarative, plugin_server_pids, wait_until
from tests.support.steady_load import JudgingUpstream, SteadyLoad

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(kong_version() is None, reason="no real Kong: no `kong` on PATH"),
]

PACKAGE_ROOT = Path(kong_token_exchange.__file__).parents[1]

SECRET = "client-2-secret"

# How often a change is looked for again after it was seen: enough to meet every pooled connection.
AFTERWARDS = 60


def plugin_config(**changes: Any) -> dict[str, Any]:
    """The plugin configuration of the first route of `kong.yml`, changed."""
    config = load_declarative()["services"][0]["routes"][0]["plugins"][0]["config"]
    return {**copy.deepcopy(config), **changes}


def for_audience(name: str, **changes: Any) -> dict[str, Any]:
    """A configuration whose upstream gets tokens for `NAME-api` alone."""
    config = plugin_config(audience_required=[f"{name}-api"], **changes)
    config["token_exchange"]["request"] = {"scopes": [name]}
    return config


class Stage:
    """A managed Kong, the sandbox's issuers, and an API behind it."""

    def __init__(self, kong: KongOnPath, issuers: IssuerServer, upstream: EchoUpstream) -> None:
        self.kong = kong
        self.issuers = issuers
        self.upstream = upstream
        self.admin = AdminApi(kong.admin_url)

    def add_service(self, name: str, *paths: str) -> None:
        """One service, with a route of the same name per path."""
        self.admin.call("POST", "/services", {"name": name, "url": self.upstream.url})
        for path in paths or (f"/{name}",):
            route = {"name": path.strip("/"), "paths": [path]}
            self.admin.call("POST", f"/services/{name}/routes", route)

    def add_plugin(self, config: Mapping[str, Any], scope: str = "") -> str:
        """Attach the plugin at `/routes/NAME`, `/services/NAME` or, without a scope, to everything."""
        body = {"name": "token-exchange", "config": config}
        plugin: str = self.admin.call("POST", f"{scope}/plugins", body)["id"]
        return plugin

    def token(self, *scopes: str) -> str:
        wanted = scopes or ("orders", "reports", "add-client-2-as-audience")
        return self.issuers.issuers["internal"].mint(scopes=wanted)

    def get(self, path: str, token: str | None = None) -> requests.Response:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return requests.get(self.kong.url + path, headers=headers, timeout=30)

    def audience(self, path: str, token: str) -> Any:
        """Whom the token that the API received is for; the status where none reached it."""
        answer = self.get(path, token)
        return answer.json()["claims"]["aud"] if answer.status_code == 200 else answer.status_code

    def await_audience(self, path: str, token: str, expected: Any) -> None:
        """Wait until the change is in force, then see it hold."""
        assert wait_until(lambda: self.audience(path, token) == expected), self.audience(path, token)
        assert {str(expected)} == {str(self.audience(path, token)) for _ in range(AFTERWARDS)}


@pytest.fixture(scope="module")
def issuers() -> Iterator[IssuerServer]:
    with IssuerServer() as server:
        yield server


@pytest.fixture(scope="module")
def upstream() -> Iterator[EchoUpstream]:
    with EchoUpstream() as server:
        yield server


@pytest.fixture(scope="module")
def cluster() -> Iterator[PostgresCluster]:
    try:
        find_postgres()
    except PostgresUnavailableError as exc:
        pytest.skip(f"no PostgreSQL: {exc}")
    with PostgresCluster() as started:
        run_migrations(started)
        yield started


def managed(
    issuers: IssuerServer, upstream: EchoUpstream, cluster: PostgresCluster | None
) -> Iterator[Stage]:
    with pytest.MonkeyPatch.context() as patch:
        # Kong reads the env vault from the environment it is started with.
        patch.setenv("KTE_TEST_SECRET", SECRET)
        patch.setenv("KTE_TEST_WRONG_SECRET", "stale")
        kong = start_kong(
            cluster=cluster,
            upstreams=dict.fromkeys(UPSTREAM_ADDRESSES.values(), upstream.address),
            issuers={ISSUER_ADDRESS: issuers.address},
        )
    stage = Stage(kong, issuers, upstream)
    yield stage
    stage.admin.close()
    kong.stop()


@pytest.fixture(scope="module")
def kong_on_postgres(
    issuers: IssuerServer, upstream: EchoUpstream, cluster: PostgresCluster
) -> Iterator[Stage]:
    yield from managed(issuers, upstream, cluster)


@pytest.fixture(scope="module")
def kong_without_database(issuers: IssuerServer, upstream: EchoUpstream) -> Iterator[Stage]:
    yield from managed(issuers, upstream, None)


@pytest.fixture
def stage(kong_on_postgres: Stage) -> Iterator[Stage]:
    yield kong_on_postgres
    kong_on_postgres.admin.remove_everything()


@pytest.fixture(params=["postgres", "db-less"])
def either(request: pytest.FixtureRequest) -> Stage:
    name = "kong_on_postgres" if request.param == "postgres" else "kong_without_database"
    made: Stage = request.getfixturevalue(name)
    return made


# --- what Kong's schema refuses -------------------------------------------------------


def test_the_schema_takes_the_example(either: Stage) -> None:
    assert (200, {"message": "schema validation successful"}) == either.admin.validate(plugin_config())


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"issuer": None}, ("issuer",), "required field missing"),
        ({"issuer": 5}, ("issuer",), "expected a string"),
        ({"client_id": None}, ("client_id",), "required field missing"),
        ({"client_id": "client-2"}, ("client_id",), "expected an array"),
        ({"leeway": "long"}, ("leeway",), "expected a number"),
        ({"auth_methods": ["magic"]}, ("auth_methods",), "expected one of: "),
        ({"issuers": "https://a.example"}, ("issuers",), "unknown field"),
        (
            {"token_exchange": {"subject_token_issuers": []}},
            ("token_exchange", "subject_token_issuers"),
            "length",
        ),
        ({"token_exchange": None}, ("token_exchange",), "required field missing"),
        (
            {
                "token_exchange": {
                    "grant_type": "password",
                    "subject_token_issuers": [{"issuer": "https://a.example"}],
                }
            },
            ("token_exchange", "grant_type"),
            "expected one of: jwt_bearer, token_exchange",
        ),
        (
            {
                "token_exchange": {
                    "result": {"validation": "maybe"},
                    "subject_token_issuers": [{"issuer": "https://a.example"}],
                }
            },
            ("token_exchange", "result", "validation"),
            "expected one of: full, claims, none",
        ),
        (
            {
                "token_exchange": {
                    "request": {"actor_token": {"source": "header"}},
                    "subject_token_issuers": [{"issuer": "https://a.example"}],
                }
            },
            ("token_exchange", "request", "actor_token", "header_name"),
            "required field missing",
        ),
        (
            {
                "token_exchange": {
                    "request": {"actor_token": {"source": "config", "header_name": "X-Actor"}},
                    "subject_token_issuers": [{"issuer": "https://a.example"}],
                }
            },
            ("token_exchange", "request", "actor_token", "static_token"),
            "required field missing",
        ),
    ],
)
def test_the_schema_names_the_mistake(
    either: Stage, changes: dict[str, Any], path: tuple[Any, ...], message: str
) -> None:
    status, told = either.admin.validate(plugin_config(**changes))

    assert 400 == status
    assert "schema violation" == told["name"]
    found = told["fields"]["config"]
    for step in path:
        found = found[step]
    assert message in str(found)


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"request": {}},
        {"request": {"actor_token": {}}},
        {"request": {"actor_token": {"source": "none"}}},
        {"request": {"actor_token": {"source": "header", "header_name": "X-Actor"}}},
        {"request": {"actor_token": {"source": "config", "static_token": "a.b.c"}}},
    ],
)
def test_an_actor_token_needs_what_its_source_needs(either: Stage, members: dict[str, Any]) -> None:
    exchange = {"subject_token_issuers": [{"issuer": "https://a.example"}], **members}

    status, told = either.admin.validate(plugin_config(token_exchange=exchange))

    assert 200 == status, told


def test_the_plugin_belongs_to_no_consumer(stage: Stage) -> None:
    stage.admin.call("POST", "/consumers", {"username": "alex"})

    told = stage.admin.call(
        "POST",
        "/consumers/alex/plugins",
        {"name": "token-exchange", "config": plugin_config()},
        expect=(400,),
    )

    assert {"consumer"} <= set(told["fields"])


# --- the life of a plugin, with a database --------------------------------------------


@pytest.mark.parametrize(
    "scope", ["/routes/orders", "/services/orders", ""], ids=["route", "service", "global"]
)
def test_it_works_wherever_it_is_attached(stage: Stage, scope: str) -> None:
    stage.add_service("orders")
    stage.add_plugin(for_audience("orders"), scope)
    token = stage.token()

    stage.await_audience("/orders", token, "orders-api")

    assert 401 == stage.get("/orders").status_code


def test_a_global_plugin_guards_every_route(stage: Stage) -> None:
    stage.add_service("orders", "/orders", "/anything")
    stage.add_plugin(for_audience("orders"))
    stage.await_audience("/anything", stage.token(), "orders-api")
    hits = stage.upstream.hits

    assert {401} == {stage.get(path).status_code for path in ("/orders", "/anything", "/anything/below")}
    assert hits == stage.upstream.hits


def test_the_narrowest_of_three_is_in_force(stage: Stage) -> None:
    stage.add_service("orders", "/orders", "/reports")
    stage.add_plugin(for_audience("inventory"))
    service = stage.add_plugin(for_audience("orders"), "/services/orders")
    route = stage.add_plugin(for_audience("reports"), "/routes/reports")
    token = stage.token("orders", "reports", "inventory", "add-client-2-as-audience")

    stage.await_audience("/reports", token, "reports-api")
    stage.await_audience("/orders", token, "orders-api")
    stage.admin.call("DELETE", f"/plugins/{route}")
    stage.await_audience("/reports", token, "orders-api")
    stage.admin.call("DELETE", f"/plugins/{service}")
    stage.await_audience("/reports", token, "inventory-api")


def test_two_routes_keep_their_own_configurations(stage: Stage) -> None:
    stage.add_service("orders", "/orders", "/reports")
    stage.add_plugin(for_audience("orders"), "/routes/orders")
    stage.add_plugin(for_audience("reports"), "/routes/reports")
    token = stage.token()
    stage.await_audience("/orders", token, "orders-api")
    stage.await_audience("/reports", token, "reports-api")

    seen = {
        (path, stage.audience(path, token)) for _ in range(AFTERWARDS) for path in ("/orders", "/reports")
    }

    assert {("/orders", "orders-api"), ("/reports", "reports-api")} == seen


def test_after_a_patch_no_token_for_the_old_audience_goes_on(stage: Stage) -> None:
    stage.add_service("orders")
    plugin = stage.add_plugin(for_audience("orders"), "/routes/orders")
    token = stage.token()
    stage.await_audience("/orders", token, "orders-api")

    stage.admin.call("PATCH", f"/plugins/{plugin}", {"config": for_audience("reports")})

    # The exchanged token for the old audience is still in the cache, under the old configuration.
    stage.await_audience("/orders", token, "reports-api")


def test_an_unrelated_change_costs_no_exchange(stage: Stage) -> None:
    stage.add_service("orders")
    stage.add_plugin(for_audience("orders"), "/routes/orders")
    token = stage.token()
    stage.await_audience("/orders", token, "orders-api")
    token_path = stage.issuers.token_path("internal")
    exchanges = stage.issuers.log.count(token_path)

    stage.add_service("elsewhere")
    stage.admin.call("POST", "/routes/elsewhere/plugins", {"name": "correlation-id"})
    assert wait_until(lambda: stage.get("/elsewhere").status_code == 200)
    stage.await_audience("/orders", token, "orders-api")

    assert exchanges == stage.issuers.log.count(token_path)


def test_disabled_and_deleted_it_no_longer_guards(stage: Stage) -> None:
    stage.add_service("orders")
    plugin = stage.add_plugin(for_audience("orders"), "/routes/orders")
    stage.await_audience("/orders", stage.token(), "orders-api")

    stage.admin.call("PATCH", f"/plugins/{plugin}", {"enabled": False})
    assert wait_until(lambda: stage.get("/orders").status_code == 200)
    stage.admin.call("PATCH", f"/plugins/{plugin}", {"enabled": True})
    assert wait_until(lambda: stage.get("/orders").status_code == 401)
    stage.admin.call("DELETE", f"/plugins/{plugin}")
    assert wait_until(lambda: stage.get("/orders").status_code == 200)


# --- without a database ---------------------------------------------------------------


def declarative(stage: Stage, *plugins: Mapping[str, Any]) -> dict[str, Any]:
    route = {"name": "orders", "paths": ["/orders"], "plugins": list(plugins)}
    return {
        "_format_version": "3.0",
        "services": [{"name": "orders", "url": stage.upstream.url, "routes": [route]}],
    }


def test_the_whole_life_by_loading_declarative_files(kong_without_database: Stage) -> None:
    stage = kong_without_database
    token = stage.token()

    def load(config: Mapping[str, Any] | None, **changes: Any) -> None:
        plugins = () if config is None else ({"name": "token-exchange", "config": config, **changes},)
        stage.admin.load(declarative(stage, *plugins))

    load(for_audience("orders"))
    stage.await_audience("/orders", token, "orders-api")
    load(for_audience("reports"))
    stage.await_audience("/orders", token, "reports-api")
    load(for_audience("reports"), enabled=False)
    assert wait_until(lambda: stage.get("/orders").status_code == 200)
    load(for_audience("orders"))
    stage.await_audience("/orders", token, "orders-api")
    load(None)
    assert wait_until(lambda: stage.get("/orders").status_code == 200)


def test_a_declarative_file_with_a_mistake_changes_nothing(kong_without_database: Stage) -> None:
    stage = kong_without_database
    token = stage.token()
    stage.admin.load(declarative(stage, {"name": "token-exchange", "config": for_audience("orders")}))
    stage.await_audience("/orders", token, "orders-api")

    broken = declarative(stage, {"name": "token-exchange", "config": for_audience("reports", leeway="long")})
    with pytest.raises(AssertionError, match=r"leeway.*expected a number"):
        stage.admin.load(broken)

    assert {"orders-api"} == {stage.audience("/orders", token) for _ in range(AFTERWARDS)}


# --- secrets and mistakes -------------------------------------------------------------


def test_a_secret_comes_from_the_env_vault(stage: Stage) -> None:
    stage.add_service("orders", "/orders", "/stale")
    reference = "{vault://env/kte-test-secret}"
    plugin = stage.add_plugin(for_audience("orders", client_secret=[reference]), "/routes/orders")
    stage.add_plugin(
        for_audience("orders", client_secret=["{vault://env/kte-test-wrong-secret}"]), "/routes/stale"
    )

    stage.await_audience("/orders", stage.token(), "orders-api")

    # The wrong one proves that it is the vault's value which is sent.
    assert wait_until(lambda: stage.get("/stale", stage.token()).status_code == 500)
    assert [reference] == stage.admin.call("GET", f"/plugins/{plugin}")["config"]["client_secret"]
    assert SECRET not in stage.kong.logs()


def test_an_invalid_configuration_answers_500_and_names_its_mistake(stage: Stage) -> None:
    stage.add_service("orders")
    # Kong's schema cannot tell this one: 201, and an instance that refuses everything.
    plugin = stage.add_plugin(
        for_audience("orders", issuer="ftp://keycloak:8080/realms/internal"), "/routes/orders"
    )
    hits = stage.upstream.hits

    assert wait_until(lambda: stage.get("/orders", stage.token()).status_code == 500)
    answers = [stage.get("/orders", token) for token in (None, "garbage", stage.token())]

    assert {500} == {answer.status_code for answer in answers}
    assert {"server_error"} == {answer.json()["error"] for answer in answers}
    assert hits == stage.upstream.hits
    assert wait_until(lambda: "config_invalid path=issuer" in stage.kong.logs())
    stage.admin.call("PATCH", f"/plugins/{plugin}", {"config": for_audience("orders")})
    stage.await_audience("/orders", stage.token(), "orders-api")


def test_secrets_and_mistakes_are_the_same_without_a_database(kong_without_database: Stage) -> None:
    stage = kong_without_database
    configs = {
        "vault": for_audience("orders", client_secret=["{vault://env/kte-test-secret}"]),
        "stale": for_audience("orders", client_secret=["{vault://env/kte-test-wrong-secret}"]),
        "mistake": for_audience("orders", issuer="ftp://keycloak:8080/realms/internal"),
    }
    routes = [
        {
            "name": name,
            "paths": [f"/{name}"],
            "plugins": [{"name": "token-exchange", "config": config}],
        }
        for name, config in configs.items()
    ]
    service = {"name": "orders", "url": stage.upstream.url, "routes": routes}
    stage.admin.load({"_format_version": "3.0", "services": [service]})
    stage.await_audience("/vault", stage.token(), "orders-api")
    hits = stage.upstream.hits

    for path in ("/stale", "/mistake"):
        assert wait_until(lambda: stage.get(path, stage.token()).status_code == 500)  # noqa: B023 - used at once
        assert "server_error" == stage.get(path, stage.token()).json()["error"]

    assert hits == stage.upstream.hits
    assert wait_until(lambda: "config_invalid path=issuer" in stage.kong.logs())
    assert SECRET not in stage.kong.logs()


# --- kong reload under load -----------------------------------------------------------

RELOADS = 100 if os.environ.get("LONG") else 5

# With what a request may fail while a gateway is reloaded; the upstream must never notice.
ALLOWED_ERRORS = {"500", "503"}

# Of the requests, those that may fail. A sidecar outlives every reload; a plugin server that Kong
# manages goes on until the next one listens.
MOST_ERRORS = {"managed": 0.001, "sidecar": 0.001}


def reload_config(upstream_url: str) -> dict[str, Any]:
    """Two routes whose upstreams get tokens for different APIs."""
    services = []
    for name in ("orders", "reports"):
        plugin = {"name": "token-exchange", "config": for_audience(name)}
        routes = [{"name": name, "paths": [f"/{name}"], "plugins": [plugin]}]
        services.append({"name": name, "url": f"{upstream_url}/seen-by-{name}", "routes": routes})
    return {"_format_version": "3.0", "services": services}


@pytest.mark.long
@pytest.mark.parametrize("mode", ["managed", "sidecar"])
def test_gw_11_reloads_under_load_let_no_wrong_token_through(
    issuers: IssuerServer, mode: str, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    scopes = ("orders", "reports", "add-client-2-as-audience")
    subjects = [issuers.issuers["internal"].mint(scopes=scopes, life_s=3600) for _ in range(4)]

    def judge(path: str, token: str | None, claims: Mapping[str, Any]) -> str | None:
        if token is None or token in subjects:
            return "no token" if token is None else "the caller's own token"
        expected = {"/seen-by-orders": "orders-api", "/seen-by-reports": "reports-api"}[path]
        return (
            None
            if (claims["azp"], claims["aud"]) == ("client-2", expected)
            else f"a token for {claims['aud']}"
        )

    # At level info Kong writes a line per request and per reload step: too much to keep.
    start = {"managed": KongOnPath, "sidecar": KongWithSidecar}[mode]
    with JudgingUpstream(judge) as upstream:
        config = reload_config(upstream.url)
        kong = start(
            config, upstreams={}, issuers={ISSUER_ADDRESS: issuers.address}, settings={"log_level": "notice"}
        )
        try:
            asked = [(f"/{name}", subject) for subject in subjects for name in ("orders", "reports")]
            with SteadyLoad(kong.url, asked, rate=200) as load:
                for number in range(RELOADS):
                    reload_once(kong, {**config, "_comment": f"reload {number}"})
            left = wait_until(lambda: len(plugin_server_pids(kong.socket_path)) == 1, timeout_s=90)
        finally:
            kong.stop()

    with capsys.disabled():
        print(f"\n{RELOADS} reloads, {mode}: {load.summary()}; upstream: {upstream.good} good")  # noqa: T201 - the measurement
    record_property("reloads", load.summary())
    assert {} == dict(upstream.complaints)
    assert left, "plugin servers of earlier generations are still there"
    assert set(load.outcomes) - {"200"} <= ALLOWED_ERRORS, kong.logs()[-3000:]
    assert load.sent - load.outcomes["200"] <= MOST_ERRORS[mode] * load.sent


def reload_once(kong: KongOnPath, config: dict[str, Any]) -> None:
    """Reload, and wait until the new worker has started; the old one still drains then."""
    started = kong.logs().count("declarative config loaded")
    before = set(plugin_server_pids(kong.socket_path))
    kong.reload(config)

    def handed_over() -> bool:
        if kong.logs().count("declarative config loaded") <= started:
            return False
        return isinstance(kong, KongWithSidecar) or bool(set(plugin_server_pids(kong.socket_path)) - before)

    assert wait_until(handed_over), kong.logs()[-3000:]


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_a_plugin_server_that_ends_first_waits_for_its_successor(
    issuers: IssuerServer,
    upstream: EchoUpstream,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    processes: int,
) -> None:
    """Kong ends the server with its worker, which may be before the next one has started."""
    starter = tmp_path / "start"

    def slow_start(*arguments: Any, **options: Any) -> list[str]:
        command = shlex.join([*serve_command(*arguments, **options), "--workers", str(processes)])
        starter.write_text(f"#!/bin/sh\nsleep 1\ncd {PACKAGE_ROOT}\nexec {command}\n", encoding="utf-8")
        starter.chmod(0o755)
        return [str(starter)]

    monkeypatch.setattr(gateways, "serve_command", slow_start)
    config = reload_config(upstream.url)
    kong = KongOnPath(config, upstreams={}, issuers={ISSUER_ADDRESS: issuers.address})
    scopes = ("orders", "reports", "add-client-2-as-audience")
    token = issuers.issuers["internal"].mint(scopes=scopes, life_s=3600)
    try:
        with SteadyLoad(kong.url, [("/orders", token), ("/reports", token)], rate=50, threads=4) as load:
            old = set(plugin_server_pids(kong.socket_path))
            workers = starters(old, kong)
            started = kong.logs().count("[pluginserver] started")
            kong.reload({**config, "_comment": "again"})
            assert wait_until(lambda: kong.logs().count("[pluginserver] started") > started)
            for pid in workers:
                os.kill(pid, signal.SIGTERM)
            assert wait_until(lambda: not workers & set(kong.worker_pids()))
            assert old & set(plugin_server_pids(kong.socket_path)), "it has not waited"
            assert wait_until(lambda: not old & set(plugin_server_pids(kong.socket_path)), timeout_s=60)
    finally:
        kong.stop()

    assert wait_until(lambda: not plugin_server_pids(kong.socket_path)), "left behind by `kong stop`"
    # One may be under way in the worker that ends; without waiting, all of two seconds fail.
    assert load.sent - load.outcomes["200"] <= 2, load.summary()


def starters(pids: set[int], kong: KongOnPath) -> set[int]:
    """The workers of Kong among the ancestors of these processes."""
    workers, found = set(kong.worker_pids()), set(pids)
    while not (found := found - {0}) <= workers:
        found = {pid if pid in workers else Ancestor(pid).parent().pid for pid in found}
    return found


class KongWithSidecar(KongOnPath):
    """A Kong that finds its plugin server running, as beside a sidecar container."""

    def __init__(
        self, config: Mapping[str, Any], *, upstreams: Any, issuers: Any, settings: Mapping[str, str]
    ) -> None:
        self._issuers = issuers
        # Without a start command Kong leaves the process to others.
        settings = {**settings, "pluginserver_token_exchange_start_cmd": ""}
        super().__init__(config, upstreams=upstreams, issuers=issuers, settings=settings)

    def _await_ready(self) -> None:
        self._log = (self.prefix / "sidecar.log").open("ab")
        command = serve_command(self.socket_path, self._issuers, log_level="warning")
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        super()._await_ready()

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log.close()
        super().stop()


# --- the file that is kept in version control -----------------------------------------


def test_the_example_is_a_file_that_deck_takes_as_well() -> None:
    """decK reads Kong's declarative format, but knows no Lua-side defaults and wants names to sync by."""
    file = load_declarative()

    assert "3.0" == file["_format_version"]
    assert {"_format_version", "services"} == set(file)
    names = [service["name"] for service in file["services"]]
    routes = [route for service in file["services"] for route in service["routes"]]
    names += [route["name"] for route in routes]
    assert len(names) == len({*names[: len(file["services"])]}) + len({*names[len(file["services"]) :]})
    for route in routes:
        assert {"name", "paths", "plugins"} == set(route)
        assert all({"name", "config"} == set(plugin) for plugin in route["plugins"])


def test_the_example_loads_through_the_admin_api(kong_without_database: Stage) -> None:
    stage = kong_without_database

    stage.admin.load(load_declarative())

    plugins = stage.admin.call("GET", "/plugins")["data"]
    assert ["token-exchange"] * 3 == [plugin["name"] for plugin in plugins]

"""docker/compose.yml and what it mounts: everything named is there, and nothing is open to the network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]

STEADY = {"plugin-server", "kong", "keycloak", "orders", "inventory", "redis"}
PROFILES = {
    "postgres": {"postgres", "kong-migrations", "kong-postgres"},
    "observability": {"enable-metrics", "prometheus", "grafana"},
}
ONCE = {"kong-migrations", "enable-metrics"}

services = pytest.mark.parametrize("name", sorted(SERVICES))


def load(name: str) -> Any:
    return yaml.safe_load((DOCKER / "observability" / name).read_text(encoding="utf-8"))


@pytest.mark.skipif(shutil.which("docker") is None, reason="no `docker` on PATH")
@pytest.mark.parametrize("profile", ["", *PROFILES, "*"])
def test_compose_itself_reads_the_file(profile: str) -> None:
    profiles = ["--profile", profile] if profile else []
    done = subprocess.run(
        ["docker", "compose", "-f", str(DOCKER / "compose.yml"), *profiles, "config", "--format", "json"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if "is not a docker command" in done.stderr or "unknown shorthand flag" in done.stderr:
        pytest.skip("docker without compose")

    assert 0 == done.returncode, done.stderr
    config = json.loads(done.stdout)
    expected = set.union(*PROFILES.values()) if profile == "*" else PROFILES.get(profile, set())
    assert ("kong-token-exchange", STEADY | expected) == (config["name"], set(config["services"]))


def test_each_service_is_in_its_profile() -> None:
    found: dict[str, set[str]] = {}
    for name, service in SERVICES.items():
        for profile in service.get("profiles", [""]):
            found.setdefault(profile, set()).add(name)

    assert {"": STEADY, **PROFILES} == found


@services
def test_ports_are_published_on_loopback_and_can_be_moved(name: str) -> None:
    for port in SERVICES[name].get("ports", ()):
        assert re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z_]+_PORT:-\d+\}:\d+", port), port


@services
def test_images_have_a_version_and_can_be_named(name: str) -> None:
    assert re.fullmatch(r"\$\{[A-Z_]+_IMAGE:-[a-z0-9./-]+:[a-z0-9.]+\}", SERVICES[name]["image"])


@services
def test_what_is_mounted_is_there_and_read_only(name: str) -> None:
    for volume in SERVICES[name].get("volumes", ()):
        source, target, *mode = volume.split(":")
        if source.startswith("."):
            assert (DOCKER / source).exists(), source
            assert ["ro"] == mode, target
        else:
            assert source in COMPOSE["volumes"]


@services
def test_starts_are_ordered_by_health(name: str) -> None:
    """Nobody waits for what is merely started, and only what ends may be waited for to end."""
    for needed, how in SERVICES[name].get("depends_on", {}).items():
        wanted = "service_completed_successfully" if needed in ONCE else "service_healthy"
        assert {"condition": wanted} == how
        profiles = set(SERVICES[needed].get("profiles", SERVICES[name].get("profiles", [])))
        assert profiles == set(SERVICES[name].get("profiles", []))


@services
def test_nothing_gains_privileges(name: str) -> None:
    # Images of others, whose start scripts change users.
    if name not in ("keycloak", "postgres"):
        assert "no-new-privileges:true" in SERVICES[name]["security_opt"]


# --- profile observability ------------------------------------------------------------


def test_prometheus_reads_kongs_status_port() -> None:
    (job,) = load("prometheus.yml")["scrape_configs"]
    ((host, port),) = [target.split(":") for target in job["static_configs"][0]["targets"]]

    assert ("kong", "/metrics") == (host, job["metrics_path"])
    assert f"0.0.0.0:{port}" == SERVICES["kong"]["environment"]["KONG_STATUS_LISTEN"]


def test_grafana_finds_its_source_and_its_dashboard() -> None:
    (source,) = load("datasources.yml")["datasources"]
    (provider,) = load("dashboards.yml")["providers"]
    grafana = SERVICES["grafana"]

    assert ("http://prometheus:9090", True) == (source["url"], source["isDefault"])
    mounted = {volume.split(":")[1] for volume in grafana["volumes"]}
    assert provider["options"]["path"] in mounted
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"].startswith(
        provider["options"]["path"]
    )
    dashboard = json.loads((DOCKER / "observability/dashboards/token-exchange.json").read_text("utf-8"))
    uids = {panel["datasource"]["uid"] for panel in dashboard["panels"]}
    assert {source["uid"]} == uids
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(places) == len(set(places))
    assert all(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])


def test_the_configuration_with_metrics_is_the_example_and_one_plugin_more() -> None:
    text = (DOCKER / "observability" / "enable_metrics.py").read_text(encoding="utf-8")
    added = re.search(r'METRICS = """(.*?)"""', text, re.DOTALL)
    assert added is not None
    example = (ROOT / "kong.yml").read_text(encoding="utf-8")

    both = yaml.safe_load(example + added[1])

    assert "prometheus" == both.pop("plugins")[0]["name"]
    assert yaml.safe_load(example) == both

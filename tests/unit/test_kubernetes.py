"""
The manifests: valid for the API server, restricted as they claim, and in step with the image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = [ROOT / "docker" / "k8s" / name for name in ("kong.yml", "plugins.yml")]
VALUES = ROOT / "docker" / "k8s" / "helm-values.yml"

# Native sidecars (init containers that go on) came with 1.29.
OLDEST = "1.29"

OURS = "configuration.konghq.com/v1"


def resources() -> list[Any]:
    return [one for path in MANIFESTS for one in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def documented() -> Iterator[Any]:
    page = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        yield from (one for one in yaml.safe_load_all(block) if isinstance(one, dict) and "apiVersion" in one)


BUILT_IN = [one for one in resources() if one["apiVersion"] != OURS]


@pytest.mark.parametrize("version", [OLDEST, "latest"])
@pytest.mark.parametrize(
    "resource", BUILT_IN, ids=[f"{one['kind']}-{one['metadata']['name']}" for one in BUILT_IN]
)
def test_the_api_server_would_take_it(resource: Any, version: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    wanted = kubernetes_validate.latest_version() if version == "latest" else version

    kubernetes_validate.validate(resource, wanted, strict=True)


def test_a_mistake_is_found() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    (deployment,) = (one for one in resources() if one["kind"] == "Deployment")
    deployment["spec"]["template"]["spec"]["initContainer"] = []

    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, OLDEST, strict=True)


def sidecars() -> list[tuple[str, Any, Any]]:
    """The sidecar and the pod's security context: of the manifest, and of the chart's values."""
    (deployment,) = (one for one in resources() if one["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    values = yaml.safe_load(VALUES.read_text(encoding="utf-8"))
    return [
        ("manifest", pod["initContainers"][0], pod["securityContext"]),
        ("values", values["deployment"]["initContainers"][0], values["securityContext"]),
    ]


@pytest.mark.parametrize(("name", "sidecar", "pod"), sidecars(), ids=["manifest", "values"])
def test_the_sidecar_is_what_the_image_was_made_for(name: str, sidecar: Any, pod: Any) -> None:
    dockerfile = (ROOT / "docker" / "plugin-server.Dockerfile").read_text(encoding="utf-8")
    user = re.search(r"^USER (\d+):(\d+)$", dockerfile, re.MULTILINE)
    assert user is not None

    context = sidecar["securityContext"]
    assert (int(user[1]), int(user[2])) == (context["runAsUser"], context["runAsGroup"])
    assert int(user[2]) == pod["fsGroup"]
    assert (True, False) == (context["readOnlyRootFilesystem"], context["allowPrivilegeEscalation"])
    assert ["ALL"] == context["capabilities"]["drop"]
    assert "Always" == sidecar["restartPolicy"]
    probe = sidecar["startupProbe"]["exec"]["command"]
    assert f'CMD ["{probe[0]}", "{probe[1]}"]' in dockerfile
    assert "/run/token-exchange" == sidecar["volumeMounts"][0]["mountPath"]


def test_compose_and_kubernetes_give_kong_the_same_settings() -> None:
    compose = yaml.safe_load((ROOT / "docker" / "compose.yml").read_text(encoding="utf-8"))
    (deployment,) = (one for one in resources() if one["kind"] == "Deployment")
    (kong,) = deployment["spec"]["template"]["spec"]["containers"]
    manifest = {variable["name"]: variable.get("value") for variable in kong["env"]}
    values = yaml.safe_load(VALUES.read_text(encoding="utf-8"))["env"]

    expected = {
        name: value
        for name, value in compose["x-kong-environment"].items()
        if "PLUGIN" in name or "READ_TIMEOUT" in name
    }
    assert expected == {name: manifest[name] for name in expected}
    assert expected == {name: values[name.removeprefix("KONG_").lower()] for name in expected}


@pytest.mark.parametrize(
    "resource", [one for one in (*resources(), *documented()) if one["apiVersion"] == OURS]
)
def test_a_plugin_resource_has_the_form_of_the_ingress_controller(resource: Any) -> None:
    assert resource["kind"] in ("KongPlugin", "KongClusterPlugin")
    assert ("namespace" in resource["metadata"]) == (resource["kind"] == "KongPlugin")
    assert "token-exchange" == resource["plugin"]
    assert {"apiVersion", "kind", "metadata", "plugin"} <= set(resource)
    assert set(resource) <= {
        "apiVersion",
        "kind",
        "metadata",
        "plugin",
        "config",
        "configPatches",
        "configFrom",
    }

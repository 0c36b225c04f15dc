"""
Kong, the plugin server and Keycloak as containers, where an engine runs and has the images.

Nothing is ever pulled: a test uses what is there under the official names, or under the names the
environment gives, and is skipped with the reason otherwise. Everything is published on loopback.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml

from kong_token_exchange.sandbox.compose import ComposeStage, await_status
from tests.support.gateways import ROOT, Resolve, free_port, with_addresses

KONG_IMAGE = os.environ.get("KONG_IMAGE", "kong:3.9")
KEYCLOAK_IMAGE = os.environ.get("KEYCLOAK_IMAGE", "quay.io/keycloak/keycloak:26.7")
PLUGIN_SERVER_IMAGE = os.environ.get("PLUGIN_SERVER_IMAGE", "kong-token-exchange/plugin-server:dev")
ALL_IN_ONE_IMAGE = os.environ.get("ALL_IN_ONE_IMAGE", "kong-token-exchange/kong:dev")
REDIS_IMAGE = os.environ.get("REDIS_IMAGE", "redis:7")

COMPOSE_FILE = ROOT / "docker" / "compose.yml"

# A Java process on a small, busy machine: minutes rather than seconds.
START_TIMEOUT_S = 600.0


class ContainersUnavailableError(Exception):
    """No engine, or an image is missing; the text says which."""


def docker(
    *arguments: str, check: bool = True, timeout_s: float = START_TIMEOUT_S, **environment: str
) -> str:
    """Run the `docker` command and return what it printed."""
    done = subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, check=False,
        timeout=timeout_s, cwd=ROOT, env={**os.environ, **environment},
    )  # fmt: skip
    if check and done.returncode != 0:
        raise RuntimeError(f"docker {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


@functools.cache
def engine_version() -> str | None:
    """The version of the engine that answers, or None."""
    if shutil.which("docker") is None:
        return None
    try:
        return docker("version", "--format", "{{.Server.Version}}", timeout_s=30).strip() or None
    except (RuntimeError, subprocess.TimeoutExpired):
        return None


def require_images(*images: str) -> None:
    """
    Demand an engine that has these images.

    Raises:
        ContainersUnavailableError: which of them is missing.
    """
    if engine_version() is None:
        raise ContainersUnavailableError("no container engine answers")
    for image in images:
        try:
            docker("image", "inspect", "--format", "{{.Id}}", image, timeout_s=30)
        except RuntimeError:
            raise ContainersUnavailableError(f"the engine has no image {image}") from None


class Compose:
    """The compose file under a project name and ports of its own; a context manager."""

    def __init__(self, *profiles: str) -> None:
        require_images(KONG_IMAGE, KEYCLOAK_IMAGE, PLUGIN_SERVER_IMAGE, REDIS_IMAGE)
        self._profiles = [part for profile in profiles for part in ("--profile", profile)]
        self.project = f"kte-{os.getpid()}-{free_port()}"
        names = ("KONG_PROXY", "KONG_ADMIN", "KEYCLOAK", "ORDERS_LOG", "INVENTORY_LOG")
        names += ("KONG_STATUS", "KONG_POSTGRES_PROXY", "KONG_POSTGRES_ADMIN", "PROMETHEUS", "GRAFANA")
        self.ports = {f"{name}_PORT": free_port() for name in names}
        self.url = f"http://127.0.0.1:{self.ports['KONG_PROXY_PORT']}"

    def __enter__(self) -> Self:
        try:
            self.compose("up", "--detach", "--no-build", "--wait", "--pull", "never")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.compose("down", "--volumes", "--timeout", "5", check=False)

    def compose(self, *arguments: str, check: bool = True) -> str:
        ports = {name: str(port) for name, port in self.ports.items()}
        command = ["compose", "-f", str(COMPOSE_FILE), "-p", self.project, *self._profiles, *arguments]
        return docker(*command, check=check, **ports)

    def stage(self) -> ComposeStage:
        return ComposeStage(lambda arguments: self.compose(*arguments))


# --- single containers ----------------------------------------------------------------


def _container(image: str) -> Any:
    """Return a container of testcontainers; its reaper is used where the engine has its image."""
    from testcontainers.core.config import testcontainers_config
    from testcontainers.core.container import DockerContainer

    try:
        require_images(testcontainers_config.ryuk_image)
    except ContainersUnavailableError:
        testcontainers_config.ryuk_disabled = True
    return DockerContainer(image)


class KeycloakContainer:
    """A Keycloak with the realms of `docker/keycloak`, in the shape of `sandbox.demo.KeycloakProvider`."""

    def __init__(self, realms: Path = ROOT / "docker" / "keycloak") -> None:
        require_images(KEYCLOAK_IMAGE)
        self.name = f"keycloak({KEYCLOAK_IMAGE}, container)"
        self._container = _container(KEYCLOAK_IMAGE)
        # In development mode Keycloak listens on loopback alone unless it is told otherwise.
        options = ["--db=dev-mem", "--http-host=0.0.0.0", "--hostname=http://keycloak:8080"]
        self._container.with_command(["start-dev", "--import-realm", *options])
        self._container.with_volume_mapping(str(realms), "/opt/keycloak/data/import", "ro")
        port = free_port()
        self._container.ports["8080/tcp"] = ("127.0.0.1", port)
        self.address = ("127.0.0.1", port)
        self._container.start()
        try:
            await_status(f"http://127.0.0.1:{port}/realms/partner", 200)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        self._container.stop()


class RedisContainer:
    """A Redis that keeps nothing on disk."""

    def __init__(self) -> None:
        require_images(REDIS_IMAGE)
        self.name = f"{REDIS_IMAGE}(container)"
        self.port = free_port()
        self._container = _container(REDIS_IMAGE)
        self._container.with_command(
            ["redis-server", "--save", "", "--appendonly", "no", "--protected-mode", "no"]
        )
        self._container.ports["6379/tcp"] = ("127.0.0.1", self.port)
        self._container.start()
        try:
            self._await_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        self._container.stop()

    def _await_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            # The engine accepts connections before Redis does, so an answer counts.
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5) as probe:
                probe.sendall(b"PING\r\n")
                if probe.recv(16).startswith(b"+PONG"):
                    return
            time.sleep(0.1)
        raise RuntimeError("the Redis container does not answer")


class KongContainers:
    """
    The stock Kong image and the plugin server's, in the shape of `gateways.KongOnPath`.

    Both are in the host's network, so that they reach the tests' issuers and upstreams on loopback,
    and see the socket's folder under the same path as the tests.
    """

    def __init__(
        self, config: Mapping[str, Any], *, upstreams: Resolve, issuers: Resolve, log_level: str = "info"
    ) -> None:
        require_images(KONG_IMAGE, PLUGIN_SERVER_IMAGE)
        self.name = f"{KONG_IMAGE}(container)"
        self.upstreams = upstreams
        self._last_logs = ""
        self.folder = Path(tempfile.mkdtemp(prefix="kte-", dir="/tmp"))
        # The sidecar's user must be able to make the socket here; the folder's name is not guessable.
        self.folder.chmod(0o777)
        self.socket_path = self.folder / "te.socket"
        self.config_path = self.folder / "kong.yml"
        self.write_config(config)
        proxy, admin = free_port(), free_port()
        self.url = f"http://127.0.0.1:{proxy}"
        self.http2_url: str | None = None
        self.admin_url = f"http://127.0.0.1:{admin}"
        self._sidecar = self._make_sidecar(issuers, log_level)
        self._kong = self._make_kong(proxy, admin, log_level)
        try:
            self._sidecar.start()
            self._await_healthy()
            self._kong.start()
            await_status(self.url + "/no-such-route", 404)
        except BaseException:
            self.stop()
            raise

    def _make_sidecar(self, issuers: Resolve, log_level: str) -> Any:
        resolve = [
            part for name, (host, port) in issuers.items() for part in ("--resolve", f"{name}={host}:{port}")
        ]
        sidecar = _container(PLUGIN_SERVER_IMAGE).with_command(["--log-level", log_level, *resolve])
        sidecar.with_env("SOCKET", str(self.socket_path))
        sidecar.with_volume_mapping(str(self.folder), str(self.folder), "rw")
        return sidecar.with_kwargs(
            network_mode="host", read_only=True, cap_drop=["ALL"], restart_policy={"Name": "always"}
        )

    def _make_kong(self, proxy: int, admin: int, log_level: str) -> Any:
        kong = _container(KONG_IMAGE)
        settings = {
            "DATABASE": "off",
            "DECLARATIVE_CONFIG": str(self.config_path),
            "PROXY_LISTEN": f"127.0.0.1:{proxy}",
            "ADMIN_LISTEN": f"127.0.0.1:{admin}",
            "ADMIN_GUI_LISTEN": "off",
            "STATUS_LISTEN": "off",
            "ANONYMOUS_REPORTS": "off",
            "NGINX_WORKER_PROCESSES": "1",
            "LOG_LEVEL": log_level,
            "PLUGINS": "bundled,token-exchange",
            "PLUGINSERVER_NAMES": "token-exchange",
            "PLUGINSERVER_TOKEN_EXCHANGE_SOCKET": str(self.socket_path),
            "PLUGINSERVER_TOKEN_EXCHANGE_QUERY_CMD": f"cat {self.folder}/plugin.json",
        }
        for name, value in settings.items():
            kong.with_env(f"KONG_{name}", value)
        kong.with_volume_mapping(str(self.folder), str(self.folder), "ro")
        return kong.with_kwargs(network_mode="host", group_add=["10001"])

    def write_config(self, config: Mapping[str, Any]) -> None:
        self.config_path.write_text(yaml.safe_dump(with_addresses(config, self.upstreams)), encoding="utf-8")
        self.config_path.chmod(0o644)

    def reload(self, config: Mapping[str, Any]) -> None:
        self.write_config(config)
        status, output = self._kong.get_wrapped_container().exec_run(["kong", "reload"])
        if status != 0:
            raise RuntimeError(f"kong reload failed:\n{output.decode(errors='replace')}")

    def logs(self) -> str:
        told = []
        for container in (self._sidecar, self._kong):
            wrapped = container.get_wrapped_container()
            if wrapped is not None:
                told.append(wrapped.logs().decode("utf-8", "replace"))
        return "".join(told) or self._last_logs

    def stop(self) -> None:
        self._last_logs = self.logs()
        for container in (self._kong, self._sidecar):
            if container.get_wrapped_container() is not None:
                container.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _await_healthy(self) -> None:
        """Wait until the image's own health check passes."""
        wrapped = self._sidecar.get_wrapped_container()
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            state = json.loads(docker("inspect", "--format", "{{json .State}}", wrapped.id, timeout_s=60))
            if state.get("Health", {}).get("Status") == "healthy":
                return
            time.sleep(0.2)
        raise RuntimeError(f"the plugin server's container is not healthy:\n{self.logs()[-3000:]}")

"""
Gateways of the integration tests: a real Kong where there is one, and the sandbox always.

Each takes the declarative configuration of `kong.yml`, with the compose network's names mapped
to loopback, and starts the real plugin server as its own process.
"""

from __future__ import annotations

import copy
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import requests
import yaml

from kong_token_exchange.sandbox.demo import serve_command
from kong_token_exchange.sandbox.gateway import SandboxGateway

ROOT = Path(__file__).resolve().parents[2]
Resolve = Mapping[str, tuple[str, int]]

START_TIMEOUT_S = 60.0


class Gateway(Protocol):
    """A running gateway."""

    name: str
    url: str

    def logs(self) -> str:
        """Everything gateway and plugin server have written."""

    def stop(self) -> None:
        """End it."""


def load_declarative(path: Path = ROOT / "kong.yml") -> dict[str, Any]:
    with path.open(encoding="utf-8") as file:
        return yaml.safe_load(file)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def with_addresses(config: Mapping[str, Any], resolve: Resolve) -> dict[str, Any]:
    """Put loopback addresses into the services' urls: Kong has no `--resolve`."""
    changed = copy.deepcopy(dict(config))
    for service in changed.get("services", []):
        for name, (host, port) in resolve.items():
            service["url"] = service["url"].replace(f"//{name}", f"//{host}:{port}")
    return changed


def kong_version() -> str | None:
    """The version of the `kong` on PATH, or None."""
    kong = shutil.which("kong")
    if kong is None:
        return None
    told = subprocess.run([kong, "version"], capture_output=True, text=True, timeout=60, check=False)
    return told.stdout.strip() or None


class KongOnPath:
    """A Kong started by the `kong` command, DB-less, with its own prefix and ports."""

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        upstreams: Resolve,
        issuers: Resolve,
        log_level: str = "info",
        settings: Mapping[str, str] | None = None,
        also_listen: str = "",
    ) -> None:
        self.name = f"kong-{kong_version()}(path)"
        self.prefix = Path(tempfile.mkdtemp(prefix="kte-", dir="/tmp"))
        self.upstreams = upstreams
        self._last_logs = ""
        proxy, http2, admin = free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{proxy}"
        self.http2_url: str | None = f"http://127.0.0.1:{http2}"
        self.admin_url = f"http://127.0.0.1:{admin}"
        self.socket_path = self.prefix / "te.socket"
        self.config_path = self.prefix / "kong.yml"
        self.write_config(config)
        self.conf = self.prefix / "kong.conf"
        python = f"{sys.executable} -m kong_token_exchange"
        values = {
            "database": "off",
            "declarative_config": str(self.config_path),
            "prefix": str(self.prefix / "kong"),
            "nginx_main_worker_processes": "1",
            "proxy_listen": f"127.0.0.1:{proxy}, 127.0.0.1:{http2} http2{also_listen}",
            "admin_listen": f"127.0.0.1:{admin}",
            "admin_gui_listen": "off",
            "status_listen": "off",
            "anonymous_reports": "off",
            "plugins": "bundled,token-exchange",
            "pluginserver_names": "token-exchange",
            "pluginserver_token_exchange_socket": str(self.socket_path),
            "pluginserver_token_exchange_query_cmd": f"{python} describe",
            "pluginserver_token_exchange_start_cmd": " ".join(
                serve_command(self.socket_path, issuers, log_level=log_level)
            ),
            "log_level": log_level,
            **(settings or {}),
        }
        if os.geteuid() == 0:
            values["nginx_user"] = "root root"
        self.conf.write_text("".join(f"{key} = {value}\n" for key, value in values.items()), encoding="utf-8")
        try:
            self._kong("start", "-c", str(self.conf))
            self._await_ready()
        except BaseException:
            self.stop()
            raise

    def write_config(self, config: Mapping[str, Any]) -> None:
        self.config_path.write_text(yaml.safe_dump(with_addresses(config, self.upstreams)), encoding="utf-8")

    def worker_pids(self) -> list[int]:
        """nginx's workers, those included that end after a reload."""
        master = int((self.prefix / "kong" / "pids" / "nginx.pid").read_text())
        return [int(pid) for pid in Path(f"/proc/{master}/task/{master}/children").read_text().split()]

    def reload(self, config: Mapping[str, Any]) -> None:
        self.write_config(config)
        self._kong("reload", "-c", str(self.conf))

    def logs(self) -> str:
        logs = sorted((self.prefix / "kong" / "logs").glob("*.log"))
        return "".join(log.read_text(encoding="utf-8", errors="replace") for log in logs) or self._last_logs

    def stop(self) -> None:
        self._kong("stop", "-p", str(self.prefix / "kong"), check=False)
        self._last_logs = self.logs()
        shutil.rmtree(self.prefix, ignore_errors=True)

    def _kong(self, *arguments: str, check: bool = True) -> None:
        done = subprocess.run(
            ["kong", *arguments],
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            check=False,
            cwd=self.prefix,
        )
        if check and done.returncode != 0:
            raise RuntimeError(
                f"kong {arguments[0]} failed:\n{done.stdout}{done.stderr}\n{self.logs()[-3000:]}"
            )

    def _await_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.socket_path.exists():
                try:
                    # 404 from the proxy port: the router is there.
                    requests.get(self.url + "/no-such-route", timeout=5)
                except requests.ConnectionError:
                    pass
                else:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"Kong is not ready:\n{self.logs()[-3000:]}")


class SandboxBackend:
    """The embedded gateway over the real plugin server process."""

    name = "sandbox"
    http2_url: str | None = None

    def __init__(
        self, config: Mapping[str, Any], *, upstreams: Resolve, issuers: Resolve, log_level: str = "info"
    ) -> None:
        self._last_logs = ""
        self.folder = Path(tempfile.mkdtemp(prefix="kte-", dir="/tmp"))
        self.socket_path = self.folder / "te.socket"
        self.log_path = self.folder / "gateway.log"
        self.gateway = SandboxGateway(
            config,
            plugin_command=serve_command(self.socket_path, issuers, log_level=log_level),
            query_command=[sys.executable, "-m", "kong_token_exchange", "describe"],
            socket_path=self.socket_path,
            resolve=upstreams,
            log=self.log_path,
        )
        self.gateway.start()
        self.url = self.gateway.url

    def reload(self, config: Mapping[str, Any]) -> None:
        self.gateway.reload(config)

    def logs(self) -> str:
        if self.log_path.exists():
            return self.log_path.read_text(encoding="utf-8", errors="replace")
        return self._last_logs

    def stop(self) -> None:
        self.gateway.stop()
        self._last_logs = self.logs()
        shutil.rmtree(self.folder, ignore_errors=True)


def plugin_server_pids(socket_path: Path) -> list[int]:
    """The processes that serve this socket, found by their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"serve" in command and str(socket_path).encode() in command:
                found.append(int(entry.name))
    return found


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 20.0) -> bool:
    """Poll until *condition* holds; False after the timeout."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False

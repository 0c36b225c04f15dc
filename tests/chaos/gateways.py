"""
The gateways under test, with everything a row does to them and to the plugin server's process.

Both start the plugin server through `launch.py`, so that a row can say how the next one starts.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import requests
import yaml

from kong_token_exchange.sandbox.declarative import DeclarativeError
from kong_token_exchange.sandbox.gateway import SandboxGateway
from tests.support.gateways import (
    ROOT,
    START_TIMEOUT_S,
    free_port,
    kong_version,
    plugin_server_pids,
    wait_until,
    with_addresses,
)

# Above the plugin server's own limit of 10 s for an event, as docs/operations.md asks for.
READ_TIMEOUT_S = 12.0

# What a signal is called where faults are counted.
FAULT_NAMES = {signal.SIGKILL: "kills", signal.SIGSTOP: "stops", signal.SIGTERM: "SIGTERMs"}

Resolve = Mapping[str, tuple[str, int]]


@functools.cache
def serve_has(option: str) -> bool:
    """Tell whether `serve` has an option."""
    told = subprocess.run(
        [sys.executable, "-m", "kong_token_exchange", "serve", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    return option in told.stdout


class RefusedConfigurationError(Exception):
    """The gateway refused a configuration."""


class ChaosGateway:
    """
    What is common: the control file, the plugin server's process, the log.

    Args:
        folder: A short path of its own; holds socket, control file, prefix.
        config: The declarative configuration.
        upstreams: host:port of the services to where they are.
        issuers: host:port of the issuers to where they are.
    """

    name: str
    url: str

    def __init__(
        self, folder: Path, config: Mapping[str, Any], *, upstreams: Resolve, issuers: Resolve
    ) -> None:
        self.folder = folder
        self.config = dict(config)
        self.upstreams = upstreams
        self.socket_path = folder / "te.socket"
        self.control_path = folder / "control.json"
        self.hooks_path = folder / "hooks.json"
        self._log_offsets: dict[Path, int] = {}
        # How many faults of which kind were made.
        self.made: Counter[str] = Counter()
        self._base_argv = ["serve", "--socket", str(self.socket_path), "--log-level", "info"]
        if serve_has("--exit-with-parent"):
            self._base_argv.append("--exit-with-parent")
        for name, (host, port) in issuers.items():
            self._base_argv += ["--resolve", f"{name}={host}:{port}"]
        self.mode: dict[str, Any] = {}
        self.write_hooks()
        self.set_mode()

    @property
    def start_command(self) -> list[str]:
        return [sys.executable, str(Path(__file__).with_name("launch.py")), str(self.control_path)]

    # --- how the plugin server is started ---------------------------------------------

    def set_mode(self, *, hooked: bool = False, extra: tuple[str, ...] = (), **control: Any) -> None:
        """Say how the next plugin server starts: as the product, or with traps, and under what."""
        module = "tests.chaos.hooked_server" if hooked else "kong_token_exchange"
        env = {"CHAOS_HOOKS": str(self.hooks_path), **control.pop("env", {})}
        argv = [sys.executable, "-m", module, *self._base_argv, *extra]
        self.mode = {"root": str(ROOT), "argv": argv, "env": env, **control}
        _replace(self.control_path, self.mode)

    def change_mode(self, **control: Any) -> None:
        self.mode.update(control)
        _replace(self.control_path, self.mode)

    def write_hooks(self, **hooks: Any) -> None:
        _replace(self.hooks_path, hooks)

    # --- the process ------------------------------------------------------------------

    def pids(self) -> list[int]:
        return plugin_server_pids(self.socket_path)

    def signal_server(self, number: int = signal.SIGKILL) -> list[int]:
        """Send a signal to every process of the plugin server; return who got it."""
        return self.signal(self.pids(), number)

    def signal(self, pids: Sequence[int], number: int) -> list[int]:
        """Send a signal to some processes, as one fault."""
        if pids and number in FAULT_NAMES:
            self.made[FAULT_NAMES[number]] += 1
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return list(pids)

    def restart_server(self) -> None:
        """Have the gateway start the plugin server anew, in the mode that is set."""
        before = set(self.signal_server(signal.SIGTERM))
        # A stopped one acts on nothing before it continues.
        self.signal_server(signal.SIGCONT)
        if not wait_until(lambda: not before & set(self.pids()), timeout_s=20):
            self.signal_server(signal.SIGKILL)
        if not wait_until(self.listening, timeout_s=START_TIMEOUT_S):
            raise RuntimeError(f"the plugin server does not come back:\n{self.log_tail()}")

    def listening(self) -> bool:
        import socket

        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            return probe.connect_ex(str(self.socket_path)) == 0

    # --- the log ----------------------------------------------------------------------

    def log_files(self) -> list[Path]:
        raise NotImplementedError

    def new_log(self) -> str:
        """Return what was logged since the last call."""
        found = []
        for path in self.log_files():
            offset = self._log_offsets.get(path, 0)
            with contextlib.suppress(OSError), path.open("rb") as file:
                file.seek(offset)
                data = file.read()
                self._log_offsets[path] = offset + len(data)
                found.append(data.decode("utf-8", "replace"))
        return "".join(found)

    def log_tail(self, count: int = 3000) -> str:
        texts = []
        for path in self.log_files():
            with contextlib.suppress(OSError):
                texts.append(path.read_text(encoding="utf-8", errors="replace")[-count:])
        return "\n".join(texts)

    # --- the gateway itself -----------------------------------------------------------

    def apply(self, config: Mapping[str, Any]) -> None:
        """Put a configuration in force the quick way; raises RefusedConfigurationError."""
        raise NotImplementedError

    def reload(self) -> None:
        """Reload the whole gateway with the configuration it has."""
        raise NotImplementedError

    def halt(self) -> None:
        """Stop the gateway; `resume` starts it again at the same address."""
        raise NotImplementedError

    def resume(self) -> None:
        raise NotImplementedError

    def worker_pids(self) -> list[int]:
        """Return the gateway's worker processes; none where it has no processes of its own."""
        return []

    def stop(self) -> None:
        raise NotImplementedError


def _replace(path: Path, document: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(document), encoding="utf-8")
    temporary.replace(path)


class ChaosSandbox(ChaosGateway):
    """The embedded gateway, which drives the real plugin server over the socket as Kong does."""

    name = "sandbox"

    def __init__(
        self, folder: Path, config: Mapping[str, Any], *, upstreams: Resolve, issuers: Resolve
    ) -> None:
        super().__init__(folder, config, upstreams=upstreams, issuers=issuers)
        self._port = free_port()
        self._gateway = self._make()
        self._gateway.start()
        self.url = self._gateway.url

    def _make(self) -> SandboxGateway:
        return SandboxGateway(
            self.config,
            plugin_command=self.start_command,
            query_command=[sys.executable, "-m", "kong_token_exchange", "describe"],
            socket_path=self.socket_path,
            resolve=self.upstreams,
            read_timeout_s=READ_TIMEOUT_S,
            log=self.folder / "gateway.log",
            port=self._port,
        )

    def log_files(self) -> list[Path]:
        return [self.folder / "gateway.log"]

    def apply(self, config: Mapping[str, Any]) -> None:
        try:
            self._gateway.reload(config)
        except DeclarativeError as error:
            raise RefusedConfigurationError(str(error)) from None
        self.config = dict(config)

    def reload(self) -> None:
        self.apply(self.config)

    def halt(self) -> None:
        self._gateway.stop()

    def resume(self) -> None:
        self._gateway = self._make()
        self._gateway.start()

    def stop(self) -> None:
        self._gateway.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


class ChaosKong(ChaosGateway):
    """A Kong started by the `kong` command, DB-less, one worker."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], *, upstreams: Resolve, issuers: Resolve
    ) -> None:
        super().__init__(folder, config, upstreams=upstreams, issuers=issuers)
        self.name = f"kong-{kong_version()}(path)"
        proxy, admin = free_port(), free_port()
        self.url = f"http://127.0.0.1:{proxy}"
        self.admin_url = f"http://127.0.0.1:{admin}"
        self.prefix = folder / "kong"
        self.conf = folder / "kong.conf"
        self._write_config()
        self._write_conf(proxy, admin)
        self.resume()

    def _write_config(self) -> None:
        text = yaml.safe_dump(with_addresses(self.config, self.upstreams))
        (self.folder / "kong.yml").write_text(text, encoding="utf-8")

    def _write_conf(self, proxy: int, admin: int) -> None:
        values = {
            "database": "off",
            "declarative_config": str(self.folder / "kong.yml"),
            "prefix": str(self.prefix),
            "nginx_main_worker_processes": "1",
            "proxy_listen": f"127.0.0.1:{proxy} backlog=4096",
            "admin_listen": f"127.0.0.1:{admin}",
            "admin_gui_listen": "off",
            "status_listen": "off",
            "anonymous_reports": "off",
            "plugins": "bundled,token-exchange",
            "pluginserver_names": "token-exchange",
            "pluginserver_token_exchange_socket": str(self.socket_path),
            "pluginserver_token_exchange_query_cmd": f"{sys.executable} -m kong_token_exchange describe",
            "pluginserver_token_exchange_start_cmd": " ".join(self.start_command),
            "nginx_http_lua_socket_read_timeout": f"{READ_TIMEOUT_S:g}s",
            "nginx_http_client_header_timeout": "3s",
            "log_level": "info",
        }
        if os.geteuid() == 0:
            values["nginx_user"] = "root root"
        self.conf.write_text("".join(f"{key} = {value}\n" for key, value in values.items()), encoding="utf-8")

    def _kong(self, *arguments: str, check: bool = True) -> None:
        done = subprocess.run(
            ["kong", *arguments],
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            check=False,
            cwd=ROOT,
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"kong {arguments[0]}:\n{done.stdout}{done.stderr}\n{self.log_tail()}")

    def log_files(self) -> list[Path]:
        return sorted((self.prefix / "logs").glob("*.log"))

    def apply(self, config: Mapping[str, Any]) -> None:
        text = yaml.safe_dump(with_addresses(config, self.upstreams))
        answer = requests.post(self.admin_url + "/config", json={"config": text}, timeout=30)
        if answer.status_code not in (200, 201):
            raise RefusedConfigurationError(f"{answer.status_code} {answer.text[:300]}")
        self.config = dict(config)
        self._write_config()

    def reload(self) -> None:
        before = set(self.worker_pids())
        self._kong("reload", "-c", str(self.conf))
        # The command returns when the signal is sent; the next one comes when it has been followed.
        wait_until(lambda: bool(set(self.worker_pids()) - before), timeout_s=30)

    def halt(self) -> None:
        self._kong("stop", "-p", str(self.prefix), check=False)

    def resume(self) -> None:
        self._kong("start", "-c", str(self.conf))
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(requests.ConnectionError):
                if (
                    requests.get(self.url + "/no-such-route", timeout=5).status_code == 404
                    and self.listening()
                ):
                    return
            time.sleep(0.05)
        raise RuntimeError(f"Kong is not ready:\n{self.log_tail()}")

    def worker_pids(self) -> list[int]:
        with contextlib.suppress(OSError, ValueError):
            master = int((self.prefix / "pids" / "nginx.pid").read_text())
            children = Path(f"/proc/{master}/task/{master}/children").read_text().split()
            return [int(pid) for pid in children if "worker" in _command_line(int(pid))]
        return []

    def stop(self) -> None:
        self.halt()
        wait_until(lambda: not self.pids(), timeout_s=15)
        self.signal_server(signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


def _command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    return ""

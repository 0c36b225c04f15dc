"""
The comparison under a real Kong: `kong` on PATH, wrk in front, a service in C behind.

One nginx worker has one CPU; wrk, the service and the plugin servers share the others. Every
contender is a plugin of its own on a route of its own, so one Kong serves them all, and which one
is measured is only a matter of the path.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

from benchmarks.arena import Arena, Run, Series, Server, alternate
from benchmarks.machine import Watch, cpu_seconds, prefer_session, process_tree, set_affinity
from benchmarks.native import Result
from benchmarks.plugins import HeaderSwapPlugin

CONNECTIONS = 32
_RUN_S = 2.0
_SINGLE_RUN_S = 0.8
_START_TIMEOUT_S = 60.0

# Names of the rows; those with a plugin server, and how it speaks.
_PROTOCOLS = {
    "kong_c_floor": "pb",
    "kong_pdk_threads": "mp",
    "kong_pdk_gevent": "mp",
    "kong_ours_1": "pb",
    "kong_ours_2": "pb",
}

# Reads the token file once and does in Lua what the plugins do. `untrusted_lua = on` lets it read.
_PRE_FUNCTION = """
local expected = {}
for line in io.lines("%s") do
  local incoming, outgoing = line:match("^%%w+\\t([^\\t]*)\\t([^\\t]*)$")
  expected[incoming] = outgoing
end
return function()
  kong.service.request.set_header("authorization", expected[kong.request.get_header("authorization")])
end
"""

# wrk runs this for every thread; there is one.
_WRK_SCRIPT = """
local requests, turn = {}, 0
init = function(arguments)
  for line in io.lines(arguments[1]) do
    local incoming = line:match("^%%w+\\t([^\\t]*)\\t")
    requests[#requests + 1] = wrk.format("GET", nil, {["Authorization"] = incoming, ["Host"] = "bench"})
  end
end
request = function()
  turn = turn % #requests + 1
  return requests[turn]
end
done = function(summary, latency, _)
  local errors = summary.errors
  io.write(string.format('RESULT {"requests": %d, "microseconds": %d, "p50": %d, "p99": %d, "errors": %d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
""".replace("%%", "%")


def missing() -> str | None:
    """Return why nothing can be measured under Kong; None when it can."""
    if shutil.which("kong") is None:
        return "no `kong` on PATH"
    if shutil.which("wrk") is None:
        return "no `wrk` on PATH (Debian: apt-get install wrk)"
    if len(os.sched_getaffinity(0)) < 2:
        return "Kong and the rest need a CPU each"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One row: the path it is asked at and the plugin server that answers, if any."""

    name: str
    server: Server | None

    @property
    def plugin(self) -> str:
        """The plugin's name in Kong."""
        return _plugin_name(self.name)


def _plugin_name(row: str) -> str:
    # Kong turns dashes into underscores where a setting holds the name.
    return row.replace("_", "-")


def measure(
    arena: Arena, *, rounds: int, progress: Callable[[str], None]
) -> tuple[dict[str, Series], dict[str, Series]]:
    """Measure every row at 32 connections and at one."""
    kong_cpu, other_cpus = arena.cpus[0], arena.cpus[1:]
    with ExitStack() as stack:
        routes = [Route(name="kong_none", server=None), Route(name="kong_lua", server=None)]
        for name, server in _start_servers(arena).items():
            stack.enter_context(server)
            server.pin(other_cpus)
            routes.append(Route(name=name, server=server))
        gateway = stack.enter_context(_Kong(arena, routes, cpu=kong_cpu, upstream_cpus=other_cpus))
        for route in routes:
            gateway.check(route)
        wrk = _Wrk(arena, gateway, other_cpus)

        def run(route: Route, connections: int, seconds: float) -> Run:
            return arena.quietest(lambda: wrk.run(route, connections=connections, seconds=seconds))

        series = alternate(
            {route.name: functools.partial(run, route, CONNECTIONS, _RUN_S) for route in routes},
            rounds=rounds,
            progress=lambda text: progress(f"Kong: {text}"),
        )
        single = alternate(
            {route.name: functools.partial(run, route, 1, _SINGLE_RUN_S) for route in routes},
            rounds=max(3, rounds - 2),
            progress=lambda text: progress(f"Kong, one connection: {text}"),
        )
    return series, single


def _start_servers(arena: Arena) -> dict[str, Server]:
    return {
        "kong_c_floor": arena.start_floor(),
        "kong_pdk_threads": arena.start("stock", "--name", _plugin_name("kong_pdk_threads")),
        "kong_pdk_gevent": arena.start("stock", "--name", _plugin_name("kong_pdk_gevent"), "--gevent"),
        "kong_ours_1": arena.start("ours"),
        "kong_ours_2": arena.start("ours", "--workers", "2"),
    }


class _Wrk:
    """Runs wrk against one route and reads what it says."""

    def __init__(self, arena: Arena, gateway: _Kong, cpus: Sequence[int]) -> None:
        self._tokens, self._gateway = arena.tokens, gateway
        self._script = arena.folder / "wrk.lua"
        self._script.write_text(_WRK_SCRIPT, encoding="ascii")
        self._prefix = ["taskset", "-c", ",".join(map(str, cpus))]

    def run(self, route: Route, *, connections: int, seconds: float) -> Run:
        """Measure once; CPU time is that of the gateway: Kong's worker and the plugin server together."""
        pids = [*self._gateway.workers, *(route.server.pids if route.server is not None else ())]
        self._wrk(route, connections, 0.2)
        watch, cpu = Watch([*pids, *self._gateway.upstream]), cpu_seconds(pids)
        said = self._wrk(route, connections, seconds)
        cpu = cpu_seconds(pids) - cpu
        if said["errors"]:
            raise RuntimeError(
                f"{said['errors']} requests of {route.name} failed:\n{self._gateway.log_tail()}"
            )
        requests, took = said["requests"], said["microseconds"] / 1e6
        result = Result(
            events=requests,
            seconds=took,
            events_per_s=requests / took,
            cpu_us_per_event=cpu / requests * 1e6,
            own_cpu_us_per_event=0.0,
            p50_us=said["p50"],
            p99_us=said["p99"],
            calls_per_event=0.0,
            exits=0,
            vanished=0,
            connects=0,
        )
        return Run(result=result, others=watch.others())

    def _wrk(self, route: Route, connections: int, seconds: float) -> dict[str, int]:
        # wrk takes whole seconds; `timeout` ends it earlier with SIGINT, which it takes for the end.
        command = [
            *self._prefix,
            "timeout",
            "-s",
            "INT",
            f"{seconds}",
            "wrk",
            "-t1",
            f"-c{connections}",
            "-d60s",
        ]
        command += ["-s", str(self._script), f"{self._gateway.url}/{route.name}", "--", str(self._tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
        found = re.search(r"^RESULT (.*)$", done.stdout, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"wrk failed: {done.stdout}{done.stderr}")
        said: dict[str, int] = json.loads(found[1])
        return said


class _Kong:
    """A Kong with one route for each row, and the service behind them."""

    def __init__(
        self, arena: Arena, routes: Sequence[Route], *, cpu: int, upstream_cpus: Sequence[int]
    ) -> None:
        self._arena, self._routes, self._cpu, self._upstream_cpus = arena, routes, cpu, upstream_cpus
        self._prefix = arena.folder / "kong"
        self.port, self._upstream_port = _free_port(), _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.workers: list[int] = []
        self.upstream: list[int] = []

    def __enter__(self) -> Self:
        arena = self._arena
        upstream = [arena.programs["upstream"], str(self._upstream_port), arena.tokens]
        self._upstream_process = subprocess.Popen([str(word) for word in upstream])
        self.upstream = [self._upstream_process.pid]
        set_affinity(self.upstream, self._upstream_cpus)
        try:
            conf = arena.folder / "kong.conf"
            conf.write_text("".join(f"{key} = {value}\n" for key, value in self._settings().items()))
            self._kong("start", "-c", str(conf))
            self._await_ready()
            master = int((self._prefix / "pids" / "nginx.pid").read_text())
            self.workers = [pid for pid in process_tree(master) if pid != master]
            set_affinity([master, *self.workers], [self._cpu])
            prefer_session(master)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._kong("stop", "-p", str(self._prefix), check=False)
        self._upstream_process.terminate()
        self._upstream_process.wait(15)

    def check(self, route: Route) -> None:
        """Send every token once: the service refuses a request whose header was not replaced."""
        incoming = self._arena.tokens.read_text().split("\t", 2)[1]
        request = urllib.request.Request(f"{self.url}/{route.name}", headers={"Authorization": incoming})
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                status = answer.status
        except urllib.error.HTTPError as error:
            status = error.code
        if status != 200:
            raise RuntimeError(f"{route.name} answers {status}:\n{self.log_tail()}")

    def log_tail(self) -> str:
        """Return the end of Kong's error log."""
        log = self._prefix / "logs" / "error.log"
        return log.read_text(errors="replace")[-3000:] if log.exists() else ""

    def _settings(self) -> Mapping[str, str]:
        folder = self._arena.folder
        declarative = folder / "kong.json"
        declarative.write_text(json.dumps(self._declarative()))
        plugins = [route for route in self._routes if route.server is not None]
        settings = {
            "database": "off",
            "declarative_config": str(declarative),
            "prefix": str(self._prefix),
            "nginx_main_worker_processes": "1",
            "proxy_listen": f"127.0.0.1:{self.port}",
            "proxy_access_log": "off",
            "admin_listen": "off",
            "admin_gui_listen": "off",
            "status_listen": "off",
            "anonymous_reports": "off",
            "log_level": "warn",
            "untrusted_lua": "on",
            "upstream_keepalive_max_requests": "1000000",
            "nginx_http_keepalive_requests": "1000000000",
            "plugins": ",".join(["bundled", *(route.plugin for route in plugins)]),
            "pluginserver_names": ",".join(route.plugin for route in plugins),
        }
        if os.geteuid() == 0:
            settings["nginx_user"] = "root root"
        for route in plugins:
            assert route.server is not None  # `plugins` holds those with one
            described = folder / f"{route.plugin}.json"
            described.write_text(json.dumps(_describe(route)))
            # No start_cmd: the servers run already, and Kong only asks what they are.
            key = f"pluginserver_{route.name}"
            settings[f"{key}_socket"] = str(route.server.socket_path)
            settings[f"{key}_query_cmd"] = f"cat {described}"
        return settings

    def _declarative(self) -> dict[str, Any]:
        pre_function = {"name": "pre-function", "config": {"access": [_PRE_FUNCTION % self._arena.tokens]}}
        routes = []
        for route in self._routes:
            plugins: list[dict[str, Any]] = [{"name": route.plugin}] if route.server is not None else []
            if route.name == "kong_lua":
                plugins = [pre_function]
            routes.append({"name": route.name, "paths": [f"/{route.name}"], "plugins": plugins})
        plain = [route for route in routes if route["name"] == "kong_none"]
        checked = [route for route in routes if route["name"] != "kong_none"]
        base = f"http://127.0.0.1:{self._upstream_port}"
        return {
            "_format_version": "3.0",
            "services": [
                {"name": "plain", "url": f"{base}/plain", "routes": plain},
                {"name": "checked", "url": f"{base}/checked", "routes": checked},
            ],
        }

    def _kong(self, *arguments: str, check: bool = True) -> None:
        done = subprocess.run(
            ["kong", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=_START_TIMEOUT_S,
            cwd=self._arena.folder,
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"kong {arguments[0]} failed:\n{done.stdout}{done.stderr}\n{self.log_tail()}")

    def _await_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"Kong is not ready:\n{self.log_tail()}")


def _describe(route: Route) -> Any:
    """Return what Kong's query command reads; a bare list means MsgPack:1."""
    plugin = HeaderSwapPlugin()
    described = [
        {
            "Name": route.plugin,
            "Phases": list(plugin.phases),
            "Version": plugin.version,
            "Priority": plugin.priority,
            "Schema": {**plugin.schema, "name": route.plugin},
        }
    ]
    if _PROTOCOLS[route.name] == "mp":
        return described
    return {"Protocol": "ProtoBuf:1", "Plugins": described}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

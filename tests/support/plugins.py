"""
Small plugins for the tests of the plugin server.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kong_token_exchange.pluginserver.connection import Connection, Host, Limits
from kong_token_exchange.pluginserver.contract import Facts, Fetch, Outcome, PluginInstance, proceed
from kong_token_exchange.pluginserver.faults import FaultLog, make_faults
from kong_token_exchange.pluginserver.instances import InstanceRegistry, LocalInstances
from kong_token_exchange.pluginserver.pdk import Kong

AUTHORIZATION = Fetch("kong.request.get_header", "authorization")
SCENARIO = Fetch("kong.request.get_header", "x-scenario")


class Instance:
    """An instance made of functions."""

    def __init__(
        self,
        *,
        prefetch: Sequence[Fetch] = (AUTHORIZATION,),
        warm: Callable[[Facts], Outcome | None] = lambda facts: proceed(),
        access: Callable[[Kong], None] = lambda kong: None,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.prefetch = prefetch
        self.warm = warm  # type: ignore[method-assign]
        self.access = access  # type: ignore[method-assign]
        self.close = close  # type: ignore[method-assign]

    def warm(self, facts: Facts) -> Outcome | None: ...

    def access(self, kong: Kong) -> None: ...

    def close(self) -> None: ...


class Plugin:
    """A plugin type that starts what it is told, and keeps the configurations it got."""

    name = "test-plugin"
    version = "1.2.3"
    priority = 1050
    phases: Sequence[str] = ("access",)
    schema: Mapping[str, Any] = {"name": "test-plugin", "fields": []}

    def __init__(
        self, start: Callable[[Mapping[str, Any]], PluginInstance] | None = None, **parts: Any
    ) -> None:
        self._start = start or (lambda config: Instance(**parts))
        self.started: list[dict[str, Any]] = []

    def start(self, config: Mapping[str, Any]) -> PluginInstance:
        self.started.append(dict(config))
        return self._start(config)


class Lines(logging.Handler):
    """A logger's lines, kept, with all that a formatter would print."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def __contains__(self, text: str) -> bool:
        return any(text in line for line in self.lines)


def make_log(**options: Any) -> tuple[FaultLog, Lines]:
    logger, lines = logging.Logger("test"), Lines()  # noqa: LOG001 - one of its own, in no tree
    logger.addHandler(lines)
    return FaultLog(logger, **options), lines


class Bench:
    """A host with a plugin, without any socket."""

    def __init__(
        self, plugin: Plugin, *, registry: InstanceRegistry | None = None, limits: Limits | None = None
    ) -> None:
        self.plugin = plugin
        self.faults = make_faults()
        self.log, self.lines = make_log()
        self.registry = registry or LocalInstances(plugin, failure=self.faults.server_error, log=self.log)
        self.host = Host(plugin, self.registry, faults=self.faults, log=self.log, limits=limits)

    def connection(self) -> Connection:
        return Connection(self.host)

    def start(self, config: bytes = b"{}") -> int:
        return self.registry.start(self.plugin.name, config).instance_id

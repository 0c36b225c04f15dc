"""
Read a `kong.yml` into services, routes, consumers and plugin configurations.

The file is Kong's declarative format 3.0. Entities get stable ids derived from
their names, so that a plugin keeps its id over a reload, as in Kong; the `__seq__`
of every plugin is new after each load, which is what makes Kong start instances again.

Source: Kong 3.9.1 `kong/db/schema/others/declarative_config.lua`,
`kong/runloop/plugins_iterator.lua` (behaviour).
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from kong_token_exchange.sandbox import kong_schema

_NAMESPACE = uuid.UUID("3a0f5c1e-6f8b-5b58-9a63-0f6f1f3f7c11")

# The default workspace; Kong makes a random one per database.
WORKSPACE_ID = str(uuid.uuid5(_NAMESPACE, "workspace:default"))

_TOP_LEVEL = {"_format_version", "_transform", "_comment", "services", "routes", "plugins", "consumers"}
_SERVICE_SCALARS = (
    "name", "protocol", "host", "port", "path", "retries", "connect_timeout", "read_timeout", "write_timeout",
)  # fmt: skip
_SERVICE = {*_SERVICE_SCALARS, "url", "enabled", "tags", "routes", "plugins", "id"}
_ROUTE = {
    "name", "paths", "hosts", "methods", "headers", "protocols", "strip_path", "preserve_host", "service",
    "regex_priority", "https_redirect_status_code", "path_handling", "request_buffering",
    "response_buffering", "tags", "plugins", "id",
}  # fmt: skip
_ROUTE_SCALARS = ("name", "strip_path", "preserve_host", "regex_priority", "https_redirect_status_code")
_PLUGIN = {"name", "config", "route", "service", "enabled", "protocols", "instance_name", "tags", "id"}


class DeclarativeError(ValueError):
    """A `kong.yml` that Kong would refuse, or that uses what the sandbox does not have."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """An upstream API."""

    id: str
    name: str
    protocol: str = "http"
    host: str = ""
    port: int = 80
    path: str | None = None
    retries: int = 5
    connect_timeout: int = 60_000
    write_timeout: int = 60_000
    read_timeout: int = 60_000
    tags: tuple[str, ...] = ()
    created_at: int = 0


@dataclass(frozen=True, kw_only=True)
class Route:
    """Which requests go to a service."""

    id: str
    name: str | None = None
    service: Service | None = None
    paths: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    headers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    protocols: tuple[str, ...] = ("http", "https")
    strip_path: bool = True
    preserve_host: bool = False
    regex_priority: int = 0
    https_redirect_status_code: int = 426
    tags: tuple[str, ...] = ()
    created_at: int = 0


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """Somebody whom plugins can load by id or name."""

    id: str
    username: str | None = None
    custom_id: str | None = None
    tags: tuple[str, ...] = ()
    created_at: int = 0


@dataclass(frozen=True, kw_only=True)
class PluginConfig:
    """One attached plugin: what `cmd_start_instance` sends."""

    id: str
    name: str
    seq: int
    config: Mapping[str, Any]

    def to_json(self) -> bytes:
        """Return the configuration as the plugin server gets it."""
        return json.dumps(self.config, ensure_ascii=False, separators=(",", ":")).encode(
            "utf-8", "surrogateescape"
        )


@dataclass(frozen=True, kw_only=True)
class PluginDescription:
    """What the query command says of the plugin, as far as a gateway needs it."""

    name: str
    phases: tuple[str, ...]
    fields: kong_schema.Fields

    @classmethod
    def parse(cls, document: Any) -> PluginDescription:
        """
        Read the query command's JSON; only the first plugin counts, as in Kong.

        Raises:
            DeclarativeError: no plugin in it, or a protocol other than ProtoBuf:1.
        """
        if not isinstance(document, Mapping) or document.get("Protocol") != "ProtoBuf:1":
            raise DeclarativeError(
                "the query command does not announce ProtoBuf:1, which is all the sandbox drives"
            )
        plugins = document.get("Plugins") or []
        if not plugins:
            raise DeclarativeError("the query command describes no plugin")
        info = plugins[0]
        return cls(
            name=info["Name"], phases=tuple(info["Phases"]), fields=kong_schema.config_fields(info["Schema"])
        )


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """Everything in force after one load."""

    routes: tuple[Route, ...] = ()
    consumers: tuple[Consumer, ...] = ()
    plugins: Mapping[tuple[str | None, str | None], PluginConfig] = field(default_factory=dict)

    def plugin_for(self, route: Route) -> PluginConfig | None:
        """Return the one configuration that applies: route and service, else route, service, global."""
        service_id = route.service.id if route.service else None
        for key in ((route.id, service_id), (route.id, None), (None, service_id), (None, None)):
            if key in self.plugins:
                return self.plugins[key]
        return None


def load(
    source: Mapping[str, Any] | Path,
    description: PluginDescription | None,
    *,
    next_seq: Callable[[], int],
    environ: Mapping[str, str] | None = None,
) -> GatewayConfig:
    """
    Read a configuration.

    Args:
        source: The document, or the path of the YAML file.
        description: The plugin; None allows no plugins at all.
        next_seq: Gives the next `__seq__`; never the same number twice in a gateway's life.
        environ: For vault references; default: this process's environment.

    Raises:
        DeclarativeError: what Kong would refuse; the text begins with the path.
    """
    document = yaml.safe_load(source.read_text(encoding="utf-8")) if isinstance(source, Path) else source
    if not isinstance(document, Mapping):
        raise DeclarativeError("expected a document with _format_version")
    if str(document.get("_format_version")) != "3.0":
        raise DeclarativeError('_format_version: expected "3.0"')
    _refuse_unknown(document, _TOP_LEVEL, "")
    return _Loader(description, next_seq, os.environ if environ is None else environ).load(document)


def _refuse_unknown(entity: Mapping[str, Any], known: set[str], path: str) -> None:
    for name in entity:
        if name not in known:
            raise DeclarativeError(f"{path}.{name}".lstrip(".") + ": unknown field")


def _id(kind: str, entity: Mapping[str, Any], fallback: str) -> str:
    """Return the entity's own id, or one that its name (or its place) gives again at every load."""
    return str(entity.get("id") or uuid.uuid5(_NAMESPACE, f"{kind}:{entity.get('name') or fallback}"))


class _Loader:
    def __init__(
        self, description: PluginDescription | None, next_seq: Callable[[], int], environ: Mapping[str, str]
    ) -> None:
        self._description = description
        self._next_seq = next_seq
        self._environ = environ
        self._now = int(time.time())
        self._services: dict[str, Service] = {}
        self._routes: dict[str, Route] = {}
        self._plugins: dict[tuple[str | None, str | None], PluginConfig] = {}

    def load(self, document: Mapping[str, Any]) -> GatewayConfig:
        for path, entity in _entities(document, "services"):
            self._add_service(entity, path)
        for path, entity in _entities(document, "routes"):
            self._add_route(entity, self._service_of(entity, path), path)
        for path, entity in _entities(document, "plugins"):
            self._add_plugin(
                entity, self._reference(entity, "route"), self._reference(entity, "service"), path
            )
        consumers = [self._consumer(entity, path) for path, entity in _entities(document, "consumers")]
        return GatewayConfig(
            routes=tuple(self._routes.values()), consumers=tuple(consumers), plugins=dict(self._plugins)
        )

    def _add_service(self, entity: Mapping[str, Any], path: str) -> None:
        _refuse_unknown(entity, _SERVICE, path)
        if entity.get("enabled") is False:
            return
        plain = {name: entity[name] for name in _SERVICE_SCALARS if entity.get(name) is not None}
        if entity.get("url"):
            plain.update(_parse_url(str(entity["url"]), path))
        plain.setdefault("name", path)
        if plain.get("protocol", "http") != "http":
            raise DeclarativeError(f"{path}.protocol: the sandbox proxies to http only")
        service = Service(
            id=_id("service", entity, path),
            created_at=self._now,
            tags=tuple(entity.get("tags") or ()),
            **plain,
        )
        if not service.host:
            raise DeclarativeError(f"{path}.host: required field missing")
        self._services[service.name] = service
        for route_path, route in _entities(entity, "routes", path):
            self._add_route(route, service, route_path)
        for plugin_path, plugin in _entities(entity, "plugins", path):
            self._add_plugin(plugin, None, service.id, plugin_path)

    def _add_route(self, entity: Mapping[str, Any], service: Service | None, path: str) -> None:
        _refuse_unknown(entity, _ROUTE, path)
        if not any(entity.get(name) for name in ("paths", "hosts", "methods", "headers")):
            raise DeclarativeError(f"{path}: must set one of 'methods', 'hosts', 'headers', 'paths'")
        for item in entity.get("paths") or ():
            if not str(item).startswith(("/", "~/")):
                raise DeclarativeError(f"{path}.paths: should start with: / (fixed path) or ~/ (regex path)")
        values: dict[str, Any] = {
            name: tuple(entity[name])
            for name in ("paths", "hosts", "methods", "protocols", "tags")
            if entity.get(name)
        }
        values |= {name: entity[name] for name in _ROUTE_SCALARS if entity.get(name) is not None}
        values["headers"] = {
            str(name).lower(): tuple(wanted) for name, wanted in (entity.get("headers") or {}).items()
        }
        route = Route(id=_id("route", entity, path), service=service, created_at=self._now, **values)
        self._routes[route.id] = route
        for plugin_path, plugin in _entities(entity, "plugins", path):
            self._add_plugin(plugin, route.id, None, plugin_path)

    def _add_plugin(
        self, entity: Mapping[str, Any], route_id: str | None, service_id: str | None, path: str
    ) -> None:
        _refuse_unknown(entity, _PLUGIN, path)
        name = entity.get("name")
        if self._description is None or name != self._description.name:
            raise DeclarativeError(f"{path}.name: plugin '{name}' not enabled; the sandbox has one plugin")
        if entity.get("enabled") is False:
            return
        try:
            config = kong_schema.complete(
                self._description.fields, entity.get("config"), self._environ, f"{path}.config"
            )
        except kong_schema.SchemaError as error:
            raise DeclarativeError(str(error)) from None
        plugin_id = _id("plugin", {"id": entity.get("id")}, f"{name}:{route_id or ''}:{service_id or ''}")
        seq = self._next_seq()
        config |= {
            "__plugin_id": plugin_id,
            "__ws_id": WORKSPACE_ID,
            "__key__": f"plugins:{name}:{route_id or ''}:{service_id or ''}:::{WORKSPACE_ID}",
            "__seq__": seq,
        }
        if route_id:
            config["route_id"] = route_id
        if service_id:
            config["service_id"] = service_id
        if entity.get("instance_name"):
            config["plugin_instance_name"] = entity["instance_name"]
        self._plugins[route_id, service_id] = PluginConfig(
            id=plugin_id, name=str(name), seq=seq, config=config
        )

    def _service_of(self, entity: Mapping[str, Any], path: str) -> Service | None:
        name = _name_of(entity.get("service"))
        if name is None:
            return None
        if name not in self._services:
            raise DeclarativeError(f"{path}.service: no service named '{name}'")
        return self._services[name]

    def _reference(self, entity: Mapping[str, Any], kind: str) -> str | None:
        name = _name_of(entity.get(kind))
        if name is None:
            return None
        known: Iterable[Service | Route] = (
            self._services.values() if kind == "service" else self._routes.values()
        )
        for candidate in known:
            if name in (candidate.name, candidate.id):
                return candidate.id
        raise DeclarativeError(f"plugins: no {kind} named '{name}'")

    def _consumer(self, entity: Mapping[str, Any], path: str) -> Consumer:
        _refuse_unknown(entity, {"id", "username", "custom_id", "tags"}, path)
        fallback = str(entity.get("username") or entity.get("custom_id") or path)
        return Consumer(
            id=_id("consumer", entity, fallback),
            username=entity.get("username"),
            custom_id=entity.get("custom_id"),
            tags=tuple(entity.get("tags") or ()),
            created_at=self._now,
        )


def _entities(owner: Mapping[str, Any], name: str, path: str = "") -> list[tuple[str, Mapping[str, Any]]]:
    items = owner.get(name) or []
    place = f"{path}.{name}".lstrip(".")
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise DeclarativeError(f"{place}: expected a list of records")
    return [(f"{place}[{number}]", item) for number, item in enumerate(items)]


def _name_of(reference: Any) -> str | None:
    if isinstance(reference, Mapping):
        reference = reference.get("name") or reference.get("id")
    return None if reference is None else str(reference)


def _parse_url(url: str, path: str) -> dict[str, Any]:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise DeclarativeError(f"{path}.url: not a URL") from None
    if not parts.scheme or not parts.hostname:
        raise DeclarativeError(f"{path}.url: not a URL")
    result: dict[str, Any] = {"protocol": parts.scheme, "host": parts.hostname}
    result["port"] = port or (443 if parts.scheme == "https" else 80)
    if parts.path:
        result["path"] = parts.path
    return result

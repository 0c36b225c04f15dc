"""
Choose the route of a request and the path that goes upstream, as Kong's default router does.

A route matches when each kind of condition that it has (hosts, paths, methods,
headers) has a match. Among matching routes wins the one with more kinds, then
plain hosts before wildcards, then more headers, then regular expressions before
prefixes, then `regex_priority`, then the longer prefix.

Regular expressions are Python's, not Rust's; snis, sources and destinations are not there.

Source: Kong 3.9.1 router flavor `traditional_compatible` (behaviour).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kong_token_exchange.sandbox.declarative import Route

_PERCENT = re.compile(r"%([0-9A-Fa-f]{2})")
_LEADING_DOTS = re.compile(r"\A\.{1,2}/")
_RESERVED = frozenset(b"!*'();:@&=+$,/?%#[]")
_TO_ESCAPE = re.compile(rb"[^!#$&'()*+,/:;=?@\[\]A-Za-z0-9\-_.~%]")


@dataclass(frozen=True, slots=True)
class Match:
    """The chosen route, the part of the path that it strips, the path for the upstream."""

    route: Route
    prefix: str | None
    upstream_path: str


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One route with one of its paths: Kong splits routes so that each path has its own priority."""

    route: Route
    path: str | None
    pattern: re.Pattern[str] | None
    priority: tuple[int, int, int, int, int, int]


class Router:
    """Routes in the order in which they are tried."""

    def __init__(self, routes: Iterable[Route]) -> None:
        candidates = [_candidate(route, path) for route in routes for path in (route.paths or (None,))]
        # sorted() is stable: equal priorities keep the order of the file, where Kong goes by creation time.
        self._candidates = sorted(candidates, key=lambda candidate: candidate.priority, reverse=True)

    def match(
        self, *, method: str, host: str, port: int, target: str, headers: Mapping[str, list[str]]
    ) -> Match | None:
        """
        Return the route for a request, or None.

        Args:
            method: The request's method.
            host: The Host header, a port allowed.
            port: The port the request came in on.
            target: The request target, query included.
            headers: Values by lower-case name.
        """
        path = normalize(target.partition("?")[0])
        for candidate in self._candidates:
            route = candidate.route
            if route.methods and method not in route.methods:
                continue
            if route.hosts and not any(_host_matches(pattern, host, port) for pattern in route.hosts):
                continue
            if not all(
                _header_matches(values, headers.get(name, [])) for name, values in route.headers.items()
            ):
                continue
            matched = _match_path(candidate, path)
            if matched is not None:
                prefix = matched if route.strip_path and candidate.path is not None else None
                return Match(route, prefix, upstream_path(route, prefix, path))
        return None


def _candidate(route: Route, path: str | None) -> _Candidate:
    pattern = re.compile(path[1:]) if path is not None and path.startswith("~") else None
    kinds = sum(map(bool, (route.methods, route.hosts, route.headers, path)))
    plain_hosts = bool(route.hosts) and not any("*" in host for host in route.hosts)
    priority = (
        kinds,
        int(plain_hosts),
        len(route.headers),
        int(pattern is not None),
        route.regex_priority if pattern else 0,
        len(path or "") if pattern is None else 0,
    )
    return _Candidate(route, path, pattern, priority)


def _match_path(candidate: _Candidate, path: str) -> str | None:
    if candidate.path is None:
        return ""
    if candidate.pattern is not None:
        match = candidate.pattern.match(path)
        return match[0] if match else None
    return candidate.path if path.startswith(candidate.path) else None


def _host_matches(pattern: str, host: str, port: int) -> bool:
    name, _, wanted_port = pattern.partition(":")
    host = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and ":" in host else host
    host, name = host.lower(), name.lower()
    if wanted_port and int(wanted_port) != port:
        return False
    if name.startswith("*"):
        return host.endswith(name[1:])
    return host.startswith(name[:-1]) if name.endswith("*") else host == name


def _header_matches(wanted: tuple[str, ...], values: list[str]) -> bool:
    lowered = [value.lower() for value in values]
    return any(
        any(re.search(item[2:].lower(), value) for value in lowered)
        if item.startswith("~*")
        else item.lower() in lowered
        for item in wanted
    )


def upstream_path(route: Route, prefix: str | None, path: str) -> str:
    """Return the path to ask the upstream for: the service's path, then what the route leaves of *path*."""
    base = (route.service.path if route.service else None) or "/"
    stem = base.removesuffix("/")
    if not route.strip_path:
        return escape(base if path == "/" else stem + path)
    rest = path[len(prefix or "/") :]
    # What follows a prefix like `/a` in `/a..` must not climb.
    rest = "" if rest in (".", "..") else _LEADING_DOTS.sub("", rest)
    if rest:
        return escape(stem + "/" + rest.removeprefix("/"))
    if base == "/":
        return "/"
    trailing = path.endswith("/") and (len(path) > 1 or base.endswith("/"))
    return escape(stem + "/" if trailing else stem)


def escape(path: str) -> str:
    """Percent-encode what may not stand in a request line, leaving existing escapes alone."""
    raw = path.encode("utf-8", "surrogateescape")
    return _TO_ESCAPE.sub(lambda match: b"%%%02X" % match[0][0], raw).decode("ascii")


def normalize(path: str) -> str:
    """Decode harmless percent-escapes, remove dot segments, merge slashes."""
    raw = _decode_unreserved(path)
    segments: list[str] = []
    parts = raw.split("/")[1:]
    trailing = parts[-1:] in ([""], ["."], [".."])
    for part in parts:
        if part == "..":
            if segments:
                segments.pop()
        elif part not in ("", "."):
            segments.append(part)
    return "/" + "/".join(segments) + ("/" if trailing and segments else "")


def _decode_unreserved(path: str) -> str:
    if "%" not in path:
        return path

    def decode(match: re.Match[bytes]) -> bytes:
        byte = int(match[1], 16)
        return match[0].upper() if byte in _RESERVED else bytes([byte])

    raw = path.encode("utf-8", "surrogateescape")
    return re.sub(rb"%([0-9A-Fa-f]{2})", decode, raw).decode("utf-8", "surrogateescape")

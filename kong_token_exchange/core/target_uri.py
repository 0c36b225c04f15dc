"""
Target URIs, so that two spellings of one can be compared: scheme, host, port and path.

Query and fragment are left out, as RFC 9449 section 4.3 does.

Source: RFC 3986 section 6.2; RFC 9110 section 7.1; RFC 9449 section 4.3.
"""

from __future__ import annotations

import re

_DEFAULT_PORTS = {"http": 80, "https": 443}
_MAX_PORT = 65535

_HOST = r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~\-]+"
_URI = re.compile(
    rf"(https?)://({_HOST})(?::([0-9]{{1,5}})?)?(/[^?#]*)?(?:[?#].*)?", re.ASCII | re.IGNORECASE
)
_AUTHORITY = re.compile(rf"({_HOST})(?::([0-9]{{1,5}})?)?", re.ASCII)
_PRINTABLE = re.compile(r"[\x21-\x7e]+")
_PERCENT = re.compile(r"%([0-9A-Fa-f]{2})?")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


def normalise_uri(uri: str) -> tuple[str, str] | None:
    """
    Return origin and path of an absolute http or https URI; None for anything else.

    Returns:
        `scheme://host:port` in lower case with the port spelt out, and the path as
        `normalise_path` gives it.
    """
    match = _URI.fullmatch(uri) if _PRINTABLE.fullmatch(uri) and "\\" not in uri else None
    if match is None:
        return None
    scheme, host, port, path = match.groups()
    origin = normalise_origin(scheme, host, int(port) if port else None)
    return None if origin is None else (origin, normalise_path(path or "/"))


def normalise_origin(scheme: str, host: str, port: int | None) -> str | None:
    """Return `scheme://host:port`, None where there is no such origin; a port of None is the scheme's own."""
    scheme = scheme.lower()
    if scheme not in _DEFAULT_PORTS or not _AUTHORITY.fullmatch(host):
        return None
    number = _DEFAULT_PORTS[scheme] if port is None else port
    return f"{scheme}://{host.lower()}:{number}" if 0 < number <= _MAX_PORT else None


def request_origin(*, scheme: str, host: str, port: str, authority: str, addressed: str) -> str | None:
    """
    Return the origin of a request as its client sees it; None where the request names two hosts.

    The port is the client's own word, in its `Host` header: the one that the gateway listens on
    means nothing behind a balancer. Only where a trusted proxy names another host, its port counts.
    A host that is in the request line alone counts for nothing, because Kong chooses the route by the
    header.

    Args:
        scheme: As Kong sees it, a trusted proxy's word included.
        host: Likewise, without a port.
        port: Likewise.
        authority: The `Host` header.
        addressed: As nginx sees it, without a port: the host of the request line, else of the header.

    Source: RFC 9112 section 3.2.2.
    """
    match = _AUTHORITY.fullmatch(authority)
    if match is not None and _same_host(match[1], host):
        return normalise_origin(scheme, match[1], int(match[2]) if match[2] else None)
    if _same_host(host, addressed):
        return None
    return normalise_origin(scheme, host, int(port) if port.isdigit() else None)


def _same_host(one: str, other: str) -> bool:
    return one.lower().rstrip(".") == other.lower().rstrip(".")


def normalise_path(path: str) -> str:
    """
    Return a path with unreserved characters decoded, escapes in upper case and dot segments removed.

    What is no escape stays as it is, so that it equals only itself.

    Source: RFC 3986 sections 6.2.2 and 5.2.4.
    """
    decoded = _PERCENT.sub(_normalise_escape, path)
    return _remove_dot_segments(decoded) if "/." in decoded else decoded


def _normalise_escape(match: re.Match[str]) -> str:
    if match[1] is None:
        return match[0]
    char = chr(int(match[1], 16))
    return char if char in _UNRESERVED else match[0].upper()


def _remove_dot_segments(path: str) -> str:
    segments = path.split("/")[1:]
    kept: list[str] = []
    for segment in segments:
        if segment == "..":
            kept = kept[:-1]
        elif segment != ".":
            kept.append(segment)
    if segments[-1] in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)

"""
Authorization server metadata: where it is, and what of it is believed.

Source: OpenID Connect Discovery 1.0 section 4; RFC 8414 sections 3 and 3.3.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from kong_token_exchange.core.strict_json import Json, JsonError, parse_json_object
from kong_token_exchange.errors import IssuerUnavailableError
from kong_token_exchange.protocol.http_message import HttpResponse

# Keycloak's document is 7 KB, Entra's 2 KB.
MAX_METADATA_BYTES = 256 * 1024

# Two parsers could see two hosts in anything else.
_URL_CHARACTERS = re.compile(r"[\x21-\x5b\x5d-\x7e]+", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9._\-]+|[0-9A-Fa-f:.]+", re.ASCII)
# What the system's resolver takes for a number: 2130706433, 0x7f.1 and 127.1 are all loopback.
_NUMBER_AT_END = re.compile(r"(?:^|\.)(?:[0-9]+|0[xX][0-9A-Fa-f]*)\.?$", re.ASCII)

_DEFAULT_PORTS = {"https": 443, "http": 80}


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuerMetadata:
    """
    The endpoints of one issuer, as its own document names them.

    `token_endpoint` is None where the document names none, or one on another host, which is
    then `token_endpoint_foreign`: our credentials go to no host that is not configured.
    """

    issuer: str
    jwks_uri: str | None
    token_endpoint: str | None
    token_endpoint_foreign: bool = False


def oauth_metadata_url(issuer: str) -> str:
    """Return the RFC 8414 section 3 location: the well-known part before the issuer's path."""
    parts = urlsplit(issuer)
    path = "/.well-known/oauth-authorization-server" + parts.path.rstrip("/")
    return parts._replace(path=path, query="", fragment="").geturl()


def process_metadata(response: HttpResponse, *, issuer: str, url: str, allow_http: bool) -> IssuerMetadata:
    """
    Read a metadata document.

    Args:
        response: The answer of the well-known address.
        issuer: The configured identifier; the document's `issuer` must equal it.
        url: Where the document was fetched; what came over https may not point to http.
        allow_http: Whether plain http beyond loopback is allowed (`insecure_allow_http`).

    Raises:
        IssuerUnavailableError: not the document of this issuer, or an endpoint is not acceptable.

    Source: RFC 8414 section 3.3; docs/threats.md KEY-01, KEY-03, KEY-04.
    """
    if response.status != 200:
        raise IssuerUnavailableError(reason="metadata_status", facts={"http_status": response.status})
    try:
        document = parse_json_object(response.body, max_bytes=MAX_METADATA_BYTES)
    except JsonError as exc:
        raise IssuerUnavailableError(reason="metadata_malformed", facts={"json": str(exc)}) from None
    if document.get("issuer") != issuer:
        raise IssuerUnavailableError(reason="metadata_issuer_differs", facts={"expected": issuer})
    source = urlsplit(url)
    jwks_uri = _endpoint(document, "jwks_uri", source=source, allow_http=allow_http)
    if jwks_uri and not _may_hold_keys(urlsplit(jwks_uri), source):
        raise IssuerUnavailableError(reason="jwks_uri_foreign_host")
    token_endpoint = _endpoint(document, "token_endpoint", source=source, allow_http=allow_http)
    foreign = token_endpoint is not None and _origin(urlsplit(token_endpoint)) != _origin(source)
    return IssuerMetadata(
        issuer=issuer,
        jwks_uri=jwks_uri,
        token_endpoint=None if foreign else token_endpoint,
        token_endpoint_foreign=foreign,
    )


def _endpoint(document: dict[str, Json], name: str, *, source: SplitResult, allow_http: bool) -> str | None:
    value = document.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not is_acceptable_endpoint(value, allow_http=allow_http):
        raise IssuerUnavailableError(reason="metadata_endpoint", facts={"member": name})
    if source.scheme == "https" and urlsplit(value).scheme != "https":
        # Not to loopback either: what is fetched in secret is not then asked for in the open.
        raise IssuerUnavailableError(reason="metadata_endpoint", facts={"member": name})
    return value


def _may_hold_keys(keys: SplitResult, source: SplitResult) -> bool:
    """
    Tell whether a document may send us to this address for keys.

    Keys may live on another host (Google's do), but only a document that came over https may say
    so, and never of an address inside the network: that must be configured.
    """
    if _origin(keys) == _origin(source):
        return True
    return source.scheme == "https" and _is_public_host(keys.hostname or "")


def _is_public_host(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return False
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return _NUMBER_AT_END.search(host) is None
    return address.is_global and not address.is_multicast


def _origin(parts: SplitResult) -> tuple[str, str | None, int | None]:
    port = _DEFAULT_PORTS.get(parts.scheme) if parts.port is None else parts.port
    return parts.scheme, parts.hostname, port


def is_acceptable_endpoint(url: str, *, allow_http: bool) -> bool:
    """Tell whether an endpoint may be called: https, or http to loopback or where it was allowed."""
    if not _URL_CHARACTERS.fullmatch(url):
        return False
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return False
    if not host or not _HOST.fullmatch(host) or "@" in parts.netloc or "#" in url:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and (allow_http or is_loopback(host)))


def is_loopback(host: str) -> bool:
    """Tell whether *host* is this machine by name or number."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

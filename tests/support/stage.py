"""One gateway over the sandbox issuers and an echo upstream: the stage of tests through a gateway."""

from __future__ import annotations

import re
import socket
from typing import Any

import requests

from kong_token_exchange.sandbox.demo import ISSUER_ADDRESS, UPSTREAM_ADDRESSES
from kong_token_exchange.sandbox.issuer import IssuerServer
from kong_token_exchange.sandbox.upstream import EchoUpstream, bearer_token
from tests.support.gateways import load_declarative

PATIENCE_S = 10.0


class Stage:
    """One gateway over the sandbox issuers and an echo upstream."""

    def __init__(self, backend: Any, issuers: IssuerServer, upstream: EchoUpstream) -> None:
        self._backend = backend
        self.issuers = issuers
        self.upstream = upstream
        self.gateway: Any = None

    def start(self, config: dict[str, Any]) -> None:
        self.gateway = self._backend(
            config,
            upstreams=dict.fromkeys(UPSTREAM_ADDRESSES.values(), self.upstream.address),
            issuers={ISSUER_ADDRESS: self.issuers.address},
        )

    def token(self, *scopes: str, **changes: Any) -> str:
        return self.issuers.issuers["internal"].mint(
            scopes=scopes or ("orders", "add-client-2-as-audience"), **changes
        )

    def get(self, path: str = "/orders", token: str | None = None, **options: Any) -> requests.Response:
        headers = options.pop("headers", {})
        if token is not None:
            headers = {"Authorization": f"Bearer {token}", **headers}
        return requests.get(self.gateway.url + path, headers=headers, timeout=30, **options)

    def forwarded(self) -> str | None:
        request = self.upstream.log.last()
        return bearer_token(request) if request else None


def one_route(**changes: Any) -> dict[str, Any]:
    """`kong.yml` with the first route's plugin alone, its configuration changed."""
    config = load_declarative()
    service = config["services"][0]
    route = service["routes"][0]
    route["plugins"][0]["config"].update(changes)
    return {**config, "services": [{**service, "routes": [route]}]}


def raw_statuses(stage: Stage, data: bytes, count: int = 1) -> list[int]:
    """Send *data* on one connection; return the final statuses of *count* answers, fewer where it ends."""
    host, _, port = stage.gateway.url.removeprefix("http://").partition(":")
    received = b""
    with socket.create_connection((host, int(port)), PATIENCE_S) as sock:
        sock.settimeout(PATIENCE_S)
        sock.sendall(data)
        while len(found := _STATUS.findall(received)) < count:
            try:
                piece = sock.recv(65536)
            except ConnectionResetError:
                break
            if not piece:
                break
            received += piece
    return [int(status) for status in found]


def raw_request(
    *lines: bytes, target: bytes = b"/orders", method: bytes = b"GET", body: bytes = b""
) -> bytes:
    """Return a request with exactly these header lines after its host."""
    return b"\r\n".join([method + b" " + target + b" HTTP/1.1", b"Host: gateway", *lines, b"", body])


_STATUS = re.compile(rb"(?:^|\r\n|\})HTTP/1\.1 ([2-5]\d\d) ")

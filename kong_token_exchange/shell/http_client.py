"""
Documents over `requests`: discovery and key sets, one request at a time, within one absolute deadline.

The transport adapter is used without a Session: no redirect is followed, no cookie kept,
no `.netrc`, proxy or CA bundle of the environment is read, because nobody is there to do it.
A connection is reused only where its last answer ended as it announced. A request is sent a
second time only where the first copy cannot have been acted on: see `Call.may_repeat`.

Exchanges go through shell/exchange_client.py, which costs a fraction of it.

Source: docs/adr/0006-http-client.md; docs/threats.md KEY-05, KEY-06, EXC-27, RES-14.
"""

from __future__ import annotations

import socket
import ssl
import time
from typing import Any, ClassVar

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from kong_token_exchange import __version__
from kong_token_exchange.errors import NonConformingResponseError
from kong_token_exchange.protocol.http_message import HttpRequest, HttpResponse
from kong_token_exchange.shell import connections
from kong_token_exchange.shell.connections import Call, DeadlineSender, Resolve, Reuse, connect

# Hosts that connections are kept for: issuers of one gateway, with room.
_MAX_HOSTS = 64
# Idle connections kept per host: one for each thread that may ask; one too few means a TLS
# handshake for each request above it.
_POOL_SIZE = 64

_CHUNK = 16 * 1024


class RequestsSender(DeadlineSender):
    """Implements `ports.HttpSender` over the transport adapter of requests; arguments as `DeadlineSender`."""

    trouble = (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._adapter = _Adapter(self._context, self._resolve)

    def _send(self, request: HttpRequest, max_body: int, call: Call) -> HttpResponse:
        prepared = requests.Request(
            request.method,
            request.url,
            headers={
                **request.headers,
                "Accept-Encoding": "identity",
                "User-Agent": f"kong-token-exchange/{__version__}",
            },
            data=request.body or None,
        ).prepare()
        remaining = call.remaining()
        timeout = (min(connections.CONNECT_TIMEOUT_S, remaining), min(self._read_timeout_s, remaining))
        response = self._adapter.send(prepared, stream=True, timeout=timeout, verify=False, proxies=None)
        try:
            body = _read_body(response.raw, max_body)
        except BaseException:
            # Half an answer is left on the connection: it must not serve another request.
            response.raw.close()
            raise
        response.raw.release_conn()
        headers = {name.lower(): value for name, value in response.headers.items()}
        return HttpResponse(status=response.status_code, headers=headers, body=body)

    def close(self) -> None:
        """Close the pooled connections."""
        self._adapter.close()


def _read_body(raw: urllib3.HTTPResponse, max_body: int) -> bytes:
    if raw.status < 200:
        # An early hint, which http.client takes for the answer. The answer itself still comes and
        # would be read as that of the next request, with somebody else's token in it.
        raise NonConformingResponseError(reason="response_status", facts={"http_status": raw.status})
    if raw.headers.get("content-encoding", "identity").lower() != "identity":
        raise NonConformingResponseError(reason="response_encoded")
    body = bytearray()
    if (raw.length_remaining or 0) > max_body:
        raise NonConformingResponseError(reason="response_too_long")
    while chunk := raw.read1(_CHUNK, decode_content=False):
        body += chunk
        if len(body) > max_body:
            raise NonConformingResponseError(reason="response_too_long")
    if not body and raw.length_remaining is None and not raw.chunked:
        # No length and no body: http.client takes a head that was cut off for a whole one.
        raise urllib3.exceptions.ProtocolError("cut off in the head")
    return bytes(body)


# --- connections ----------------------------------------------------------------------


class _HttpConnection(Reuse, HTTPConnection):
    resolve: ClassVar[Resolve]

    def _new_conn(self) -> socket.socket:
        self.connected_at = time.monotonic()
        return connect(self.host, self.port or 0, resolve=self.resolve)

    @property
    def is_connected(self) -> bool:
        """Tell whether the connection may be used again."""
        return super().is_connected and self.still_good()


class _HttpsConnection(Reuse, HTTPSConnection):
    resolve: ClassVar[Resolve]

    def _new_conn(self) -> socket.socket:
        self.connected_at = time.monotonic()
        return connect(self.host, self.port or 0, resolve=self.resolve)

    @property
    def is_connected(self) -> bool:
        """Tell whether the connection may be used again."""
        return super().is_connected and self.still_good()


# --- pools ----------------------------------------------------------------------------


class _HttpPool(HTTPConnectionPool):
    def _put_conn(self, conn: Any) -> None:
        if conn is not None:
            conn.idle_since = time.monotonic()
        super()._put_conn(conn)


class _HttpsPool(HTTPSConnectionPool):
    def _put_conn(self, conn: Any) -> None:
        if conn is not None:
            conn.idle_since = time.monotonic()
        super()._put_conn(conn)

    def _validate_conn(self, conn: Any) -> None:
        """Connect early, without urllib3's warning: `ssl_verify: false` is warned of once, at start."""
        if conn.is_closed:
            conn.connect()


class _Adapter(HTTPAdapter):
    """An adapter with our TLS context and connections, and nothing of the environment."""

    def __init__(self, context: ssl.SSLContext, resolve: Resolve) -> None:
        self._context = context
        self._resolve = resolve
        super().__init__(
            pool_connections=_MAX_HOSTS, pool_maxsize=_POOL_SIZE, max_retries=0, pool_block=False
        )

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._context, **kwargs)
        http = type("HttpConnection", (_HttpConnection,), {"resolve": self._resolve})
        https = type("HttpsConnection", (_HttpsConnection,), {"resolve": self._resolve})
        self.poolmanager.pool_classes_by_scheme = {
            "http": type("HttpPool", (_HttpPool,), {"ConnectionCls": http}),
            "https": type("HttpsPool", (_HttpsPool,), {"ConnectionCls": https}),
        }

    def build_connection_pool_key_attributes(self, request: Any, verify: Any, cert: Any = None) -> Any:
        """Leave TLS to the context: requests would otherwise turn verification off for `verify=False`."""
        host, _ = super().build_connection_pool_key_attributes(request, verify, cert)
        return host, {}

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Leave TLS to the context: requests would add its own certificate bundle."""

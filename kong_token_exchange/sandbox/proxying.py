"""
From the gateway to the upstream and back: what nginx does once the plugins have run.

The request goes out with the headers that plugins left, minus those that belong
to one connection, plus those that Kong adds; both bodies are streamed.

Source: RFC 9110 section 7.6; Kong 3.9.1 `kong/runloop/handler.lua`,
`kong/templates/nginx_kong.lua` (behaviour).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from kong_token_exchange.sandbox import http1
from kong_token_exchange.sandbox.declarative import Service
from kong_token_exchange.sandbox.pdk import RequestContext
from kong_token_exchange.sandbox.serving import HttpStream

# What stands in Server and Via where Kong puts its name and version.
SERVER_NAME = "kong-token-exchange-sandbox"

# Idle upstream connections kept per address.
_POOL_SIZE = 64

# Headers that nginx's proxy module sets itself or never passes on.
_SET_BY_PROXY = frozenset(
    {
        "host", "connection", "content-length", "transfer-encoding", "te", "keep-alive", "expect", "upgrade",
        "via", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-forwarded-port",
        "x-forwarded-path", "x-forwarded-prefix", "x-real-ip", "x-kong-request-id", "proxy",
        "proxy-connection",
    }
)  # fmt: skip

_OF_ONE_CONNECTION = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "via"})

Address = tuple[str, int]


class ClientGoneError(Exception):
    """The client closed its connection before its request was complete."""


class UpstreamPool:
    """Connections to upstreams, kept open between requests."""

    def __init__(self) -> None:
        self._idle: dict[Address, list[HttpStream]] = {}

    async def take(self, address: Address, *, fresh: bool) -> tuple[HttpStream, bool]:
        """Return a connection to *address*, and whether it was used before; *fresh* asks for a new one."""
        idle = self._idle.setdefault(address, [])
        while idle and not fresh:
            stream = idle.pop()
            if not stream.peer_closed:
                return stream, True
            stream.abort()
        reader, writer = await asyncio.open_connection(*address)
        return HttpStream(reader, writer), False

    def give_back(self, address: Address, stream: HttpStream) -> None:
        """Keep a connection for the next request, if it is clean."""
        idle = self._idle.setdefault(address, [])
        if len(idle) >= _POOL_SIZE or stream.peer_closed:
            stream.abort()
        else:
            idle.append(stream)

    def close(self) -> None:
        """Drop every idle connection."""
        for streams in self._idle.values():
            while streams:
                streams.pop().abort()


def named_in_connection(value: str | None) -> set[str]:
    """
    Return the headers that a Connection header names, lower case.

    Kong removes them after the plugins have run: `Connection: Authorization` takes
    the exchanged token away again.
    """
    if value is None or value.lower() in ("close", "upgrade", "keep-alive"):
        return set()
    return {token.strip().lower() for token in value.split(",")} - {"", "close", "upgrade", "keep-alive"}


@dataclass(slots=True)
class Proxying:
    """
    One request on its way to the upstream and back.

    Args:
        context: The request as plugins left it.
        prefix: The part of the path that the route stripped.
        client: The client's connection, for the answer.
        next_body_part: Gives the request's body piece by piece, None at its end.
        started: When the request came in, by the monotonic clock.
        pool: Connections to upstreams.
        address: Where the upstream really is.
        answering: Set once bytes of the answer have gone to the client.
    """

    context: RequestContext
    prefix: str | None
    client: HttpStream
    next_body_part: Callable[[], Awaitable[bytes | None]]
    started: float
    pool: UpstreamPool
    address: Address
    answering: bool = False

    async def run(self) -> bool:
        """
        Proxy the request.

        Returns:
            True when the client's connection can be used again.

        Raises:
            BadMessageError: 502 or 504 for the upstream's fault, 400 for a malformed request body; when
                `answering` is set it is too late to say so, and the connection can only be closed.
        """
        try:
            return await self._exchange(fresh=False)
        except TimeoutError:
            raise http1.BadMessageError(504) from None
        except (OSError, EOFError):
            raise http1.BadMessageError(502) from None

    @property
    def service(self) -> Service:
        """Return the service; there always is one here."""
        assert self.context.service is not None
        return self.context.service

    async def _exchange(self, *, fresh: bool) -> bool:
        async with asyncio.timeout(self.service.connect_timeout / 1000):
            upstream, reused = await self.pool.take(self.address, fresh=fresh)
        pump: asyncio.Task[None] | None = None
        try:
            sent_at = time.monotonic()
            await upstream.send(self._request_head())
            pump = self._start_pump(upstream)
            response = await self._read_response_head(upstream, pump)
            keep_alive = await self._forward(upstream, response, time.monotonic() - sent_at)
        except ConnectionError:
            upstream.abort()
            if reused and pump is None and not self.answering:
                # An idle connection that the upstream had closed meanwhile: once more, on a new one.
                return await self._exchange(fresh=True)
            raise
        except BaseException:
            upstream.abort()
            raise
        finally:
            # An answer may come before the request has been sent to its end.
            complete = await _settle(pump)
        if response.keep_alive and complete:
            self.pool.give_back(self.address, upstream)
        else:
            upstream.abort()
        return keep_alive and complete

    # -- the request

    def _request_head(self) -> bytes:
        head, context = self.context.head, self.context
        path = context.upstream_path
        # Kong keeps the question mark of an empty query, which nginx alone would drop.
        if context.query or head.target.endswith("?"):
            path += "?" + context.query
        # The Connection header as it was before the plugins ran, and only the first one, as in Kong.
        dropped = _SET_BY_PROXY | named_in_connection(http1.first(head.headers, "connection"))
        headers = [pair for pair in context.headers.pairs if pair[0].lower() not in dropped]
        return http1.render_request_head(context.method, path, [*self._own_headers(), *headers])

    def _own_headers(self) -> list[tuple[str, str]]:
        context, inbound = self.context, self.context.headers
        # Lua writes the number 1.0 as "1".
        version = f"{'1.1' if context.head.minor_version else '1'} {SERVER_NAME}"
        via, forwarded_for = inbound.get("via"), inbound.get("x-forwarded-for")
        te = {token.strip().lower() for token in (inbound.get("te") or "").split(",")}
        headers = [
            ("TE", "trailers" if "trailers" in te else ""),
            ("Via", f"{via}, {version}" if via else version),
            ("Host", context.upstream_host or self._service_host()),
            ("Connection", "keep-alive"),
            (
                "X-Forwarded-For",
                f"{forwarded_for}, {context.client[0]}" if forwarded_for else context.client[0],
            ),
            ("X-Forwarded-Proto", "http"),
            ("X-Forwarded-Host", context.host),
            ("X-Forwarded-Port", str(context.server_port)),
            ("X-Forwarded-Path", context.head.target.partition("?")[0]),
            ("X-Forwarded-Prefix", self.prefix if self.prefix and self.prefix != "/" else ""),
            ("X-Real-IP", context.client[0]),
            ("X-Kong-Request-Id", context.request_id),
            *self._framing(),
        ]
        # nginx does not send a header whose value is empty.
        return [(name, value) for name, value in headers if value]

    def _framing(self) -> list[tuple[str, str]]:
        head, body = self.context.head, self.context.body
        if body is not None:
            return [("Content-Length", str(len(body)))] if body or head.has_body else []
        if head.chunked:
            return [("Transfer-Encoding", "chunked")]
        return [] if head.content_length is None else [("Content-Length", str(head.content_length))]

    def _service_host(self) -> str:
        host, port = self.context.target_address or (self.service.host, self.service.port)
        return host if port == 80 else f"{host}:{port}"

    def _start_pump(self, upstream: HttpStream) -> asyncio.Task[None] | None:
        if self.context.body is not None:
            return asyncio.create_task(upstream.send(self.context.body)) if self.context.body else None
        return asyncio.create_task(self._pump_body(upstream)) if self.context.head.has_body else None

    async def _pump_body(self, upstream: HttpStream) -> None:
        chunked = self.context.head.chunked
        while (part := await self.next_body_part()) is not None:
            await upstream.send(http1.render_chunk(part) if chunked else part)
        if chunked:
            await upstream.send(http1.LAST_CHUNK)

    # -- the response

    async def _read_response_head(
        self, upstream: HttpStream, pump: asyncio.Task[None] | None
    ) -> http1.ResponseHead:
        if pump is None:
            return await self._next_response_head(upstream)
        reading = asyncio.create_task(self._next_response_head(upstream))
        try:
            await asyncio.wait({reading, pump}, return_when=asyncio.FIRST_COMPLETED)
            error = pump.exception() if pump.done() and not reading.done() else None
            # A client that broke its body off is not the upstream's fault. A connection that broke
            # while sending may still hold an answer, so that error waits for the reader's.
            if isinstance(error, ClientGoneError | http1.BadMessageError):
                raise error
            return await reading
        finally:
            reading.cancel()

    async def _next_response_head(self, upstream: HttpStream) -> http1.ResponseHead:
        while True:
            async with asyncio.timeout(self.service.read_timeout / 1000):
                raw = await upstream.read_head(_check_head_size)
            if raw is None:
                raise ConnectionResetError("the upstream closed the connection")
            head = http1.parse_response_head(raw, request_method=self.context.method)
            if head.status >= 200:
                return head

    async def _forward(self, upstream: HttpStream, response: http1.ResponseHead, waited_s: float) -> bool:
        chunked = response.content_length is None and self.context.head.minor_version >= 1
        keep_alive = self.context.head.keep_alive and (chunked or response.content_length is not None)
        headers = self._response_headers(response, waited_s)
        if chunked:
            headers.append(("Transfer-Encoding", "chunked"))
        elif (length := http1.first(response.headers, "content-length")) and response.status != 204:
            headers.append(("Content-Length", length))
        headers.append(("Connection", "keep-alive" if keep_alive else "close"))
        self.answering = True
        await self.client.send(http1.render_response_head(response.status, headers, response.reason))
        decoder = http1.BodyDecoder(
            content_length=response.content_length, chunked=response.chunked, until_eof=True
        )
        while (part := await upstream.next_part(decoder)) is not None:
            await self.client.send(http1.render_chunk(part) if chunked else part)
        if chunked:
            await self.client.send(http1.LAST_CHUNK)
        return keep_alive

    def _response_headers(self, response: http1.ResponseHead, waited_s: float) -> list[tuple[str, str]]:
        dropped = _OF_ONE_CONNECTION | named_in_connection(http1.first(response.headers, "connection"))
        via = http1.first(response.headers, "via")
        waited_ms, total_ms = int(waited_s * 1000), int((time.monotonic() - self.started) * 1000)
        headers = [
            *self.context.response_headers,
            *(pair for pair in response.headers if pair[0].lower() not in dropped),
            ("X-Kong-Upstream-Latency", str(waited_ms)),
            ("X-Kong-Proxy-Latency", str(total_ms - waited_ms)),
            ("Via", f"{via}, 1.1 {SERVER_NAME}" if via else f"1.1 {SERVER_NAME}"),
            ("X-Kong-Request-Id", self.context.request_id),
        ]
        if http1.first(headers, "server") is None:
            headers.append(("Server", SERVER_NAME))
        return headers


async def _settle(pump: asyncio.Task[None] | None) -> bool:
    """End the sending of the body; tell whether it had come to its end by itself."""
    if pump is None:
        return True
    complete = pump.done() and not pump.cancelled() and pump.exception() is None
    pump.cancel()
    with contextlib.suppress(asyncio.CancelledError, OSError, http1.BadMessageError, ClientGoneError):
        await pump
    return complete


def _check_head_size(head: bytearray) -> None:
    if len(head) > http1.MAX_RESPONSE_HEAD_BYTES:
        raise http1.BadMessageError(502)

"""
An embedded gateway that treats a plugin as Kong does; for trying and testing only.

`SandboxGateway` reads a `kong.yml`, starts the plugin server, drives it over its
socket (`plugin_client`) and proxies HTTP/1.1 with keep-alive and streamed bodies
in both directions (`proxying`). What it refuses, adds and removes follows Kong
3.9.1 and the nginx below it; docs/sandbox.md lists the differences.

Source: Kong 3.9.1 `kong/init.lua`, `kong/runloop/handler.lua` (behaviour).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kong_token_exchange.sandbox import declarative, http1, pdk
from kong_token_exchange.sandbox.answers import Answer, error_answer
from kong_token_exchange.sandbox.declarative import GatewayConfig, PluginDescription
from kong_token_exchange.sandbox.plugin_client import (
    READY_TIMEOUT_S,
    Connection,
    PluginClient,
    PluginFailedError,
    PluginProcess,
    prepare_socket_path,
    query_description,
)
from kong_token_exchange.sandbox.proxying import SERVER_NAME, ClientGoneError, Proxying, UpstreamPool
from kong_token_exchange.sandbox.routing import Match, Router
from kong_token_exchange.sandbox.serving import HttpStream, LoopThread

# Log lines kept in memory; the file, if any, gets all of them.
_LOG_LINES = 10_000

# A body that a plugin asks for is held as a whole.
_MAX_PLUGIN_BODY_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Active:
    """The configuration in force; replaced as a whole, so that no request sees half of each."""

    config: GatewayConfig
    router: Router


@dataclass(slots=True)
class _Core:
    """What every request needs of the gateway."""

    active: _Active
    phases: tuple[str, ...]
    client: PluginClient
    upstreams: UpstreamPool
    resolve: dict[str, tuple[str, int]]
    node_id: str
    port: int
    write_log: Any

    def address_of(self, host: str, port: int) -> tuple[str, int]:
        """Return where *host*:*port* really is."""
        return self.resolve.get(f"{host}:{port}", (host, port))


class SandboxGateway:
    """
    The gateway; a context manager.

    Args:
        config: A `kong.yml` document, or the path of one.
        plugin_command: Starts the plugin server on *socket_path*; None when it is managed by somebody else.
        query_command: Prints the plugin's description; default: `python -m kong_token_exchange describe`.
        description: The description itself, instead of a query command.
        socket_path: The plugin server's socket; default: in a directory of its own.
        resolve: Where host:port of a service really is, like curl's --resolve.
        read_timeout_s: How long the plugin may take for one frame (lua_socket_read_timeout).
        log: A file for what Kong would write into its error log; always kept in `log_lines` too.
        environ: For vault references in the configuration; default: this process's environment.
        port: 0 for any free port.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | Path,
        *,
        plugin_command: Sequence[str] | None,
        query_command: Sequence[str] | None = None,
        description: Mapping[str, Any] | None = None,
        socket_path: Path | str | None = None,
        resolve: Mapping[str, tuple[str, int]] | None = None,
        read_timeout_s: float = 60.0,
        log: Path | None = None,
        environ: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self._directory = None if socket_path else tempfile.TemporaryDirectory(prefix="kte-")
        self.socket_path = Path(
            socket_path or Path(self._directory.name if self._directory else "", "plugin.socket")
        )
        self._host, self._environ = host, environ
        self._log_file = log.open("a", encoding="utf-8", errors="replace") if log else None
        self._log_lock = threading.Lock()
        self.log_lines: deque[str] = deque(maxlen=_LOG_LINES)
        self._sequences = itertools.count(1)
        if description is None:
            command = query_command or [sys.executable, "-m", "kong_token_exchange", "describe"]
            description = json.loads(query_description(command))
        self._description = PluginDescription.parse(description)
        name = self._description.name
        self._core = _Core(
            active=self._load(config),
            phases=self._description.phases,
            client=PluginClient(
                name, prepare_socket_path(self.socket_path), log=self.write_log, read_timeout_s=read_timeout_s
            ),
            upstreams=UpstreamPool(),
            resolve=dict(resolve or {}),
            node_id=str(uuid.uuid4()),
            port=port,
            write_log=self.write_log,
        )
        self._process = (
            PluginProcess(plugin_command, name=name, log=self.write_log) if plugin_command else None
        )
        self._thread = LoopThread("sandbox-gateway")
        self._server: asyncio.Server | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- from outside

    @property
    def url(self) -> str:
        """Return the proxy's base URL, without a slash at its end."""
        return f"http://{self._host}:{self._core.port}"

    @property
    def plugin_pid(self) -> int | None:
        """Return the plugin server's process id, or None while there is none."""
        return self._process.pid if self._process else None

    @property
    def plugin_starts(self) -> int:
        """Return how often the plugin server's process has been started."""
        return len(self._process.started) if self._process else 0

    def start(self, *, wait: bool = True) -> None:
        """
        Start the plugin server, listen, and wait until the plugin server listens too.

        Args:
            wait: False to return at once, as Kong does; requests then get 500 for a moment.

        Raises:
            RuntimeError: the plugin server does not come up; the text has its last lines.
        """
        if self._process is not None:
            self._process.start()
        self._thread.start()
        try:
            self._thread.call(self._listen())
            if wait:
                self.wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def wait_until_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """
        Wait until somebody listens on the plugin socket; also after a kill.

        Raises:
            RuntimeError: nobody does.
        """
        try:
            self._thread.call(self._connect_once(timeout_s), timeout_s + 5)
        except TimeoutError:
            recent = "\n".join(list(self.log_lines)[-20:])
            raise RuntimeError(f"the plugin server does not listen on {self.socket_path}\n{recent}") from None

    def stop(self) -> None:
        """Stop listening, drop every connection, end the plugin server."""
        if self._server is not None:
            self._thread.call(self._shut())
            self._server = None
        self._thread.stop()
        if self._process is not None:
            self._process.stop()
        with self._log_lock:
            if self._log_file is not None:
                self._log_file.close()
                self._log_file = None
        if self._directory is not None:
            self._directory.cleanup()

    def reload(self, config: Mapping[str, Any] | Path) -> None:
        """
        Put another configuration in force; requests under way keep the one they began with.

        Raises:
            DeclarativeError: it is invalid; the old one stays.
        """
        self._core.active = self._load(config)

    def kill_plugin_server(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the plugin server's process."""
        if self._process is not None:
            self._process.send_signal(number)

    def write_log(self, level: str, text: str) -> None:
        """Write one line of what would be Kong's error log."""
        line = f"{time.strftime('%Y/%m/%d %H:%M:%S')} [{level}] {text}"
        with self._log_lock:
            self.log_lines.append(line)
            if self._log_file is not None:
                self._log_file.write(line + "\n")
                self._log_file.flush()

    # -- lifecycle

    def _load(self, config: Mapping[str, Any] | Path) -> _Active:
        loaded = declarative.load(
            config, self._description, next_seq=lambda: next(self._sequences), environ=self._environ
        )
        return _Active(loaded, Router(loaded.routes))

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(
            self._serve, self._host, self._core.port, reuse_address=True
        )
        self._core.port = self._server.sockets[0].getsockname()[1]

    async def _connect_once(self, timeout_s: float) -> None:
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    _, writer = await asyncio.open_unix_connection(str(self.socket_path))
                except OSError:
                    await asyncio.sleep(0.02)
                else:
                    writer.close()
                    return

    async def _shut(self) -> None:
        if self._server is not None:
            self._server.close()
        self._core.client.pool.close()
        self._core.upstreams.close()

    # -- one client connection

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = HttpStream(reader, writer)
        with contextlib.suppress(OSError, asyncio.CancelledError, ClientGoneError):
            try:
                while await self._serve_one(stream):
                    pass
            finally:
                writer.close()

    async def _serve_one(self, stream: HttpStream) -> bool:
        """Serve one request; False when the connection is to be closed."""
        try:
            raw = await stream.read_head(http1.check_head_size)
            if raw is None:
                return False
            head = http1.parse_request_head(raw)
        except http1.BadMessageError as error:
            request_id = uuid.uuid4().hex
            answer = error_answer(error.status, request_id, message=error.detail, accept="text/plain")
            await stream.send(_render_answer(answer, request_id, keep_alive=False, head_only=False))
            return False
        return await _Request(self._core, stream, head).serve()


class _Request:
    """One request from its head to the end of its answer."""

    def __init__(self, core: _Core, stream: HttpStream, head: http1.RequestHead) -> None:
        self._core = core
        self._stream = stream
        self._head = head
        self._decoder = http1.BodyDecoder(content_length=head.content_length, chunked=head.chunked)
        self._continued = False
        self._request_id = uuid.uuid4().hex
        self._abandoned: list[Connection] = []
        self._spooled: list[Path] = []
        self._started = time.monotonic()

    async def serve(self) -> bool:
        """Serve the request; True when the connection can be used again."""
        try:
            return await self._serve()
        finally:
            for connection in self._abandoned:
                connection.close()
            for path in self._spooled:
                path.unlink(missing_ok=True)

    async def _serve(self) -> bool:
        active = self._core.active
        match = self._match(active.router)
        if match is None:
            return await self._send_answer(self._error(404))
        if "http" not in match.route.protocols:
            answer = self._error(426)
            answer.headers += [("Connection", "Upgrade"), ("Upgrade", "TLS/1.2, HTTP/1.1")]
            return await self._send_answer(answer)
        context = self._context(active.config, match)
        try:
            refusal = await self._run_plugins(active.config, context)
        except http1.BadMessageError as error:
            refusal = self._error(error.status)
        if refusal is None and context.service is None:
            refusal = self._error(503)
        if refusal is not None:
            return await self._send_answer(refusal)
        return await self._proxy(context, match)

    def _match(self, router: Router) -> Match | None:
        return router.match(
            method=self._head.method,
            host=http1.first(self._head.headers, "host") or "",
            port=self._core.port,
            target=self._head.target,
            headers=pdk.HeaderList(self._head.headers).by_name(),
        )

    def _context(self, config: GatewayConfig, match: Match) -> pdk.RequestContext:
        return pdk.RequestContext(
            head=self._head,
            config=config,
            route=match.route,
            client=self._stream.peer_address,
            server_port=self._core.port,
            request_id=self._request_id,
            request_variable=uuid.uuid4().hex,
            node_id=self._core.node_id,
            upstream_path=match.upstream_path,
            read_body=self._read_body,
            spool_body=self._spool_body,
            write_log=self._core.write_log,
        )

    async def _run_plugins(self, config: GatewayConfig, context: pdk.RequestContext) -> Answer | None:
        """Run the access phase; an answer ends the request here."""
        plugin = config.plugin_for(context.route)
        if plugin is None or "access" not in self._core.phases:
            return None

        async def call_pdk(method: str, arguments: bytes) -> bytes:
            return await pdk.call(context, method, arguments)

        try:
            await self._core.client.handle_event(plugin, "access", call_pdk, self._abandoned)
        except pdk.ResponseExit as exit_:
            return Answer(exit_.status, exit_.headers, exit_.body)
        except PluginFailedError:
            answer = self._error(500)
            answer.headers = [*context.response_headers, *answer.headers]
            return answer
        return None

    async def _proxy(self, context: pdk.RequestContext, match: Match) -> bool:
        assert context.service is not None
        host, port = context.target_address or (context.service.host, context.service.port)
        proxying = Proxying(
            context=context,
            prefix=match.prefix,
            client=self._stream,
            next_body_part=self.next_body_part,
            started=self._started,
            pool=self._core.upstreams,
            address=self._core.address_of(host, port),
        )
        try:
            return await proxying.run()
        except http1.BadMessageError as error:
            self._core.write_log("err", f"{error.status} while proxying to {host}:{port}")
            if proxying.answering:
                return False  # too late for another answer: the client sees a broken connection
            # nginx makes this one, so it is plain text unless the client asks for something else.
            answer = error_answer(error.status, self._request_id, accept=self._accept() or "text/plain")
            answer.headers = [*context.response_headers, *answer.headers, ("Via", f"1.1 {SERVER_NAME}")]
            return await self._send_answer(answer)

    # -- the request's body

    async def next_body_part(self) -> bytes | None:
        """
        Return the next piece of the body, or None at its end; sends 100 Continue first if asked for.

        Raises:
            ClientGoneError: the client left before the end.
            BadMessageError: 400, malformed chunks.
        """
        if self._head.expects_continue and not self._continued and not self._decoder.finished:
            self._continued = True
            await self._stream.send(http1.CONTINUE)
        try:
            return await self._stream.next_part(self._decoder)
        except ConnectionError:
            raise ClientGoneError from None

    async def _read_body(self) -> bytes:
        body = bytearray()
        while (part := await self.next_body_part()) is not None:
            body += part
            if len(body) > _MAX_PLUGIN_BODY_BYTES:
                raise http1.BadMessageError(413)
        return bytes(body)

    def _spool_body(self, body: bytes) -> str:
        handle, path = tempfile.mkstemp(prefix="kte-body-")
        with os.fdopen(handle, "wb") as file:
            file.write(body)
        self._spooled.append(Path(path))
        return path

    # -- answers of the gateway's own

    def _accept(self) -> str | None:
        return http1.first(self._head.headers, "accept")

    def _error(self, status: int) -> Answer:
        return error_answer(status, self._request_id, accept=self._accept() or "application/json")

    async def _send_answer(self, answer: Answer) -> bool:
        # What is left of the body would be taken for the next request.
        keep_alive = self._head.keep_alive and self._body_is_read()
        head_only = self._head.method == "HEAD"
        await self._stream.send(
            _render_answer(answer, self._request_id, keep_alive=keep_alive, head_only=head_only)
        )
        return keep_alive

    def _body_is_read(self) -> bool:
        """Throw away what has arrived of the body; tell whether that was all of it."""
        if self._head.expects_continue and not self._continued:
            return self._decoder.finished
        try:
            self._decoder.decode(self._stream.buffer)
        except http1.BadMessageError:
            return False
        return self._decoder.finished


def _render_answer(answer: Answer, request_id: str, *, keep_alive: bool, head_only: bool) -> bytes:
    given = {name.lower(): value for name, value in answer.headers}
    # A plugin's Connection: close counts, its Server does not.
    keep_alive = keep_alive and given.get("connection", "").lower() != "close"
    headers = [pair for pair in answer.headers if pair[0].lower() not in ("connection", "server")]
    if "content-length" not in given:
        headers.append(("Content-Length", str(len(answer.body))))
    headers.append(("Connection", "keep-alive" if keep_alive else "close"))
    headers += [("Server", SERVER_NAME), ("X-Kong-Request-Id", request_id)]
    head = http1.render_response_head(answer.status, headers)
    return head if head_only else head + answer.body

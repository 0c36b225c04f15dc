"""
Run small HTTP servers beside a test or a demo: a loop in a thread, streams, a request log, faults.

`LoopThread` hosts asyncio code behind an ordinary synchronous interface, so that
tests stay plain functions. `HttpServer` answers one request after the other from
a handler; it keeps what it received and can be told to misbehave (`Fault`).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import parse_qsl

from kong_token_exchange.sandbox import http1

T = TypeVar("T")

# How long starting and stopping may take before something is broken.
_LIFECYCLE_TIMEOUT_S = 15.0

# Requests kept for inspection; the counters count all of them.
_LOG_LENGTH = 1000

# A request body that a handler gets as a whole.
MAX_BODY_BYTES = 16 * 1024 * 1024

# Bytes asked from a socket at a time.
READ_BYTES = 64 * 1024

# A fault that holds an answer back gives up after this, so that no thread waits for ever.
_MAX_HOLD_S = 60.0


class LoopThread:
    """An asyncio loop in a thread of its own."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread; returns when the loop runs."""
        running = threading.Event()

        def run() -> None:
            loop = self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(loop)
            loop.call_soon(running.set)
            try:
                loop.run_forever()
                _finish(loop)
            finally:
                loop.close()

        self._thread = threading.Thread(target=run, name=self._name, daemon=True)
        self._thread.start()
        if not running.wait(_LIFECYCLE_TIMEOUT_S):
            raise RuntimeError(f"{self._name} did not start")

    def call(self, work: Coroutine[Any, Any, T], timeout_s: float = _LIFECYCLE_TIMEOUT_S) -> T:
        """Run *work* in the loop and return its result."""
        if self._loop is None:
            work.close()
            raise RuntimeError(f"{self._name} is not running")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def stop(self) -> None:
        """Cancel what still runs, stop the loop, end the thread."""
        if self._loop is None or self._thread is None:
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_LIFECYCLE_TIMEOUT_S)
        self._loop = self._thread = None


def _finish(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_default_executor())


class HttpStream:
    """One side of an HTTP connection: bytes in a buffer, heads and bodies out of it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.buffer = bytearray()

    @property
    def peer_closed(self) -> bool:
        """Tell whether the other side has ended the stream, or sent something unasked."""
        return self._reader.at_eof() or self._writer.is_closing() or bool(self.buffer)

    @property
    def peer_address(self) -> tuple[str, int]:
        """Return address and port of the other side."""
        address = self._writer.get_extra_info("peername") or ("", 0)
        return str(address[0]), int(address[1])

    async def fill(self) -> bool:
        """Wait for more bytes; False at the end of the stream."""
        data = await self._reader.read(READ_BYTES)
        self.buffer += data
        return bool(data)

    async def read_head(self, limit: Callable[[bytearray], None]) -> bytes | None:
        """
        Return the next head, or None when the stream ended before one was complete.

        Args:
            limit: Called with what has arrived so far; raises to refuse it.
        """
        while (end := http1.find_head_end(self.buffer)) < 0:
            limit(self.buffer)
            if not await self.fill():
                return None
            # Empty lines before a request line are skipped (RFC 9112 section 2.2).
            while self.buffer.startswith((b"\r", b"\n")):
                del self.buffer[:1]
        head = bytes(self.buffer[:end])
        del self.buffer[:end]
        limit(bytearray(head))
        return head

    async def next_part(self, decoder: http1.BodyDecoder) -> bytes | None:
        """
        Return the next piece of a body as it arrives, or None at its end.

        Raises:
            ConnectionError: the stream ended inside the body.
            BadMessageError: malformed chunks.
        """
        while not (payload := decoder.decode(self.buffer)):
            if decoder.finished:
                return None
            if not await self.fill():
                if decoder.until_eof:
                    return None
                raise ConnectionResetError("the message ended early")
        return payload

    async def send(self, data: bytes) -> None:
        """Write *data* and wait while the other side is slow."""
        self._writer.write(data)
        await self._writer.drain()

    async def close(self) -> None:
        """Close the connection; a broken one as well."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def abort(self) -> None:
        """Drop the connection without sending what is still buffered."""
        self._writer.transport.abort()


@dataclass(frozen=True, slots=True)
class Request:
    """One request as a handler sees it."""

    method: str
    target: str
    headers: http1.Headers
    body: bytes

    @property
    def path(self) -> str:
        """Return the target without its query."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        """Return the query string, without the question mark."""
        return self.target.partition("?")[2]

    def header(self, name: str) -> str | None:
        """Return the first value of a header, any case."""
        return http1.first(self.headers, name.lower())

    @property
    def form(self) -> list[tuple[str, str]]:
        """Return the form fields of the body, in order and with repetitions."""
        return parse_qsl(self.body.decode("utf-8", "surrogateescape"), keep_blank_values=True)


@dataclass(frozen=True, slots=True)
class Response:
    """An answer; `Content-Length` is added when it is sent."""

    status: int
    headers: http1.Headers = ()
    body: bytes = b""


@dataclass(slots=True)
class Fault:
    """
    How a path misbehaves.

    Args:
        status: Answer with this status instead of the handler's answer.
        body: The body of that answer; also without a status (then 200).
        headers: Further headers of that answer.
        delay_s: Wait before answering.
        hold: Answer only after this event is set: a delay that a test ends itself.
        drop: Close the connection without an answer.
        raw: Send these bytes instead of an HTTP message, then close.
        times: For so many requests; None until cleared.
    """

    status: int | None = None
    body: bytes | None = None
    headers: http1.Headers = ()
    delay_s: float = 0.0
    hold: threading.Event | None = None
    drop: bool = False
    raw: bytes | None = None
    times: int | None = None

    @property
    def replaces_answer(self) -> bool:
        """Tell whether the handler is not asked at all."""
        return self.status is not None or self.body is not None


@dataclass
class RequestLog:
    """What a server has received: counters per path and the last requests; safe to read from any thread."""

    hits: Counter[str] = field(default_factory=Counter)
    requests: deque[Request] = field(default_factory=lambda: deque(maxlen=_LOG_LENGTH))
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def add(self, request: Request) -> None:
        """Count and keep *request*."""
        with self._changed:
            self.hits[request.path] += 1
            self.requests.append(request)
            self._changed.notify_all()

    def count(self, path: str) -> int:
        """Return how many requests for *path* have arrived."""
        with self._changed:
            return self.hits[path]

    def last(self, path: str | None = None) -> Request | None:
        """Return the newest request, of *path* alone when given."""
        with self._changed:
            return next((item for item in reversed(self.requests) if path in (None, item.path)), None)

    def wait_for(self, path: str, count: int, timeout_s: float = 10.0) -> bool:
        """Wait until *count* requests for *path* have arrived in all; False after *timeout_s*."""
        with self._changed:
            return self._changed.wait_for(lambda: self.hits[path] >= count, timeout_s)

    def clear(self) -> None:
        """Forget everything."""
        with self._changed:
            self.hits.clear()
            self.requests.clear()


Handler = Callable[[Request], Response]


class HttpServer:
    """
    A small HTTP/1.1 server in a thread of its own; a context manager.

    Args:
        handler: Makes the answer; runs in the server's loop, so it must not wait.
        host: The address to listen on; leave it on loopback.
        port: 0 for any free port.
    """

    def __init__(
        self, handler: Handler, *, host: str = "127.0.0.1", port: int = 0, name: str = "server"
    ) -> None:
        self._handler = handler
        self._host, self._port = host, port
        self._thread = LoopThread(name)
        self._server: asyncio.Server | None = None
        self._faults: dict[str, Fault] = {}
        self._faults_lock = threading.Lock()
        self.log = RequestLog()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def address(self) -> tuple[str, int]:
        """Return host and port; the port stays the same after a stop and a start."""
        return self._host, self._port

    @property
    def url(self) -> str:
        """Return the base URL, without a slash at its end."""
        return f"http://{self._host}:{self._port}"

    def start(self) -> None:
        """Listen; after `stop` on the same port again."""
        self._thread.start()
        self._thread.call(self._listen())

    def stop(self) -> None:
        """Stop listening and drop every connection."""
        if self._server is not None:
            self._thread.call(self._shut())
            self._server = None
        self._thread.stop()

    def set_fault(self, path: str, fault: Fault) -> None:
        """Let requests for exactly *path* misbehave from now on."""
        with self._faults_lock:
            self._faults[path] = fault

    def clear_faults(self) -> None:
        """Behave again."""
        with self._faults_lock:
            self._faults.clear()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, self._host, self._port, reuse_address=True)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _shut(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = HttpStream(reader, writer)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            try:
                while await self._serve_one(stream):
                    pass
            finally:
                writer.close()

    async def _serve_one(self, stream: HttpStream) -> bool:
        try:
            head_bytes = await stream.read_head(http1.check_head_size)
            if head_bytes is None:
                return False
            head = http1.parse_request_head(head_bytes)
            if head.expects_continue and head.has_body:
                await stream.send(http1.CONTINUE)
            body = await self._read_body(stream, head)
        except http1.BadMessageError as error:
            await stream.send(_render(Response(error.status), close=True))
            return False
        request = Request(head.method, head.target, head.headers, body)
        self.log.add(request)
        return await self._answer(stream, request, head)

    async def _read_body(self, stream: HttpStream, head: http1.RequestHead) -> bytes:
        body = bytearray()
        decoder = http1.BodyDecoder(content_length=head.content_length, chunked=head.chunked)
        while (part := await stream.next_part(decoder)) is not None:
            body += part
            if len(body) > MAX_BODY_BYTES:
                raise http1.BadMessageError(413)
        return bytes(body)

    async def _answer(self, stream: HttpStream, request: Request, head: http1.RequestHead) -> bool:
        fault = self._take_fault(request.path)
        if fault is not None:
            await _wait_out(fault)
            if fault.drop or fault.raw is not None:
                if fault.raw is not None:
                    await stream.send(fault.raw)
                return False
        if fault is not None and fault.replaces_answer:
            response = Response(fault.status or 200, fault.headers, fault.body or b"")
        else:
            response = self._handler(request)
        await stream.send(_render(response, close=not head.keep_alive, head_only=request.method == "HEAD"))
        return head.keep_alive

    def _take_fault(self, path: str) -> Fault | None:
        with self._faults_lock:
            fault = self._faults.get(path)
            if fault is not None and fault.times is not None:
                fault.times -= 1
                if fault.times <= 0:
                    del self._faults[path]
            return fault


async def _wait_out(fault: Fault) -> None:
    if fault.delay_s:
        await asyncio.sleep(fault.delay_s)
    if fault.hold is not None:
        # The event belongs to another thread; polling lets `stop` end this wait.
        deadline = asyncio.get_running_loop().time() + _MAX_HOLD_S
        while not fault.hold.is_set() and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def _render(response: Response, *, close: bool, head_only: bool = False) -> bytes:
    headers = [*response.headers, ("Content-Length", str(len(response.body)))]
    if close:
        headers.append(("Connection", "close"))
    head = http1.render_response_head(response.status, headers)
    return head if head_only else head + response.body


def json_headers(extra: Mapping[str, str] | None = None) -> http1.Headers:
    """Return the headers of a JSON answer, with *extra* ones behind."""
    return (("Content-Type", "application/json"), *(extra or {}).items())

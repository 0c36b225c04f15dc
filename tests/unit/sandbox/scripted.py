"""
A plugin server that does what a test says, on a real unix socket; and raw HTTP for the other side.

    def access(event):
        token = event.ask("kong.request.get_header", wire.encode_string("authorization"))
        event.ask("kong.service.request.set_header", wire.encode_kv("authorization", "Bearer NEW"))

    with ScriptedPlugin(path, access) as plugin: ...

Unless told otherwise it starts instances under rising ids, closes them, and ends an event
with success when `access` returns. `calls` keeps every RpcCall with its connection's number.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from kong_token_exchange.pluginserver import wire
from kong_token_exchange.sandbox import http1

TIMEOUT_S = 10.0

# The smallest description a gateway can work with: one optional text field.
DESCRIPTION: dict[str, Any] = {
    "Protocol": "ProtoBuf:1",
    "Plugins": [
        {
            "Name": "token-exchange",
            "Priority": 1050,
            "Version": "1",
            "Phases": ["access"],
            "Schema": {
                "name": "token-exchange",
                "fields": [
                    {
                        "config": {
                            "type": "record",
                            "fields": [
                                {"mark": {"type": "string"}},
                                {"leeway": {"type": "number", "default": 0}},
                                {
                                    "secrets": {
                                        "type": "array",
                                        "elements": {"type": "string", "referenceable": True},
                                    }
                                },
                            ],
                        }
                    }
                ],
            },
        }
    ],
}


def declarative(port: int = 1, **service: Any) -> dict[str, Any]:
    """A kong.yml document with one service, one route `/a` and the plugin on it."""
    return {
        "_format_version": "3.0",
        "services": [
            {
                "name": "echo",
                "url": f"http://127.0.0.1:{port}",
                "routes": [
                    {
                        "name": "r",
                        "paths": ["/a"],
                        "strip_path": False,
                        "plugins": [{"name": "token-exchange", "config": {"mark": "one"}}],
                    }
                ],
                **service,
            }
        ],
    }


class PluginSide:
    """The plugin's end of one connection."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.number = number
        self._socket = sock
        self._frames = wire.FrameReader()
        sock.settimeout(TIMEOUT_S)

    def read(self) -> bytes | None:
        """The next frame, or None when Kong's side has left."""
        while (payload := self._frames.next_frame()) is None:
            try:
                data = self._socket.recv(65536)
            except ConnectionError:
                return None
            if not data:
                return None
            self._frames.feed(data)
        return payload

    def write(self, *payloads: bytes) -> None:
        self._socket.sendall(b"".join(map(wire.frame, payloads)))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Left(Exception):  # noqa: N818 - not an error: how conversations end
    """Kong's side closed the connection."""


class Event:
    """One cmd_handle_event."""

    def __init__(self, side: PluginSide, call: wire.HandleEvent) -> None:
        self.side, self.call = side, call
        self.ended = False

    def ask(self, method: str, arguments: bytes = b"") -> bytes:
        """Call the PDK and return the encoded answer."""
        self.side.write(method.encode(), arguments)
        answer = self.side.read()
        if answer is None:
            raise Left
        return answer

    def end(self) -> None:
        self.ended = True
        self.side.write(b"", wire.encode_return(self.call.sequence))

    def exit(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        """Answer the request, then wait for Kong's side to leave."""
        self.side.write(b"kong.response.exit", wire.encode_exit(status, body, headers))
        if self.side.read() is None:
            raise Left


def pass_on(event: Event) -> None:
    """Let every request through."""


class ScriptedPlugin:
    def __init__(
        self,
        path: Path,
        access: Callable[[Event], None] = pass_on,
        start: Callable[[PluginSide, wire.StartInstance], None] | None = None,
    ) -> None:
        self.path, self.access = path, access
        self.calls: list[tuple[int, wire.RpcCall]] = []
        self.left: list[int] = []
        self.errors: list[BaseException] = []
        self.changed = threading.Condition()
        self._start = start or self._start_instance
        self._instance_id = 700
        self._listener: socket.socket | None = None
        self._sides: list[PluginSide] = []

    def __enter__(self) -> Self:
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self.errors:
            raise self.errors[0]

    def listen(self) -> None:
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(512)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening and drop every connection, as a killed process would."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for side in self._sides:
            side.close()

    def of(self, kind: type) -> list[Any]:
        """The calls of one kind, in order."""
        with self.changed:
            return [call for _, call in self.calls if isinstance(call, kind)]

    def wait_for(self, predicate: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(predicate, TIMEOUT_S)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            side = PluginSide(sock, len(self._sides) + 1)
            self._sides.append(side)
            threading.Thread(target=self._serve, args=(side,), daemon=True).start()

    def _serve(self, side: PluginSide) -> None:
        try:
            while (payload := side.read()) is not None:
                self._answer(side, wire.decode_call(payload))
        except (Left, OSError):
            pass
        except BaseException as error:  # noqa: BLE001 - shown when the plugin ends
            self.errors.append(error)
        finally:
            side.close()
            with self.changed:
                self.left.append(side.number)
                self.changed.notify_all()

    def _answer(self, side: PluginSide, call: wire.RpcCall) -> None:
        with self.changed:
            self.calls.append((side.number, call))
            self.changed.notify_all()
        if isinstance(call, wire.StartInstance):
            self._start(side, call)
        elif isinstance(call, wire.HandleEvent):
            event = Event(side, call)
            self.access(event)
            if not event.ended:
                event.end()
        else:
            side.write(wire.encode_return(call.sequence))

    def _start_instance(self, side: PluginSide, call: wire.StartInstance) -> None:
        with self.changed:
            self._instance_id += 1
            status = wire.InstanceStatus(call.name, self._instance_id)
        side.write(wire.encode_return(call.sequence, status))


class HttpClient:
    """Raw HTTP over one connection, for what no HTTP library lets one send."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self.socket = socket.create_connection((host, int(port)), TIMEOUT_S)
        self.buffer = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def get(self, target: str = "/a", *headers: str) -> Answer:
        lines = [f"GET {target} HTTP/1.1", "Host: api.example", *headers, "", ""]
        self.send("\r\n".join(lines).encode("utf-8", "surrogateescape"))
        return self.answer()

    def fill(self) -> bool:
        data = self.socket.recv(65536)
        self.buffer += data
        return bool(data)

    def head(self, method: str = "GET") -> http1.ResponseHead:
        while (end := http1.find_head_end(self.buffer)) < 0:
            assert self.fill(), "closed without an answer"
        head = http1.parse_response_head(bytes(self.buffer[:end]), request_method=method)
        del self.buffer[:end]
        return head

    def part(self, decoder: http1.BodyDecoder) -> bytes:
        """The next piece of a body, as soon as one is there."""
        while not (payload := decoder.decode(self.buffer)):
            if decoder.finished or not self.fill():
                return b""
        return payload

    def answer(self, method: str = "GET") -> Answer:
        head = self.head(method)
        decoder = http1.BodyDecoder(content_length=head.content_length, chunked=head.chunked, until_eof=True)
        return Answer(head, b"".join(iter(lambda: self.part(decoder), b"")))

    def closed(self) -> bool:
        """Whether the other side has ended the connection, nothing being left to read."""
        return not self.buffer and not self.fill()


class Answer:
    def __init__(self, head: http1.ResponseHead, body: bytes) -> None:
        self.head, self.body, self.status = head, body, head.status

    def __getitem__(self, name: str) -> str | None:
        return http1.first(self.head.headers, name.lower())


def get(url: str, target: str = "/a", *headers: str) -> Answer:
    """One GET on a connection of its own."""
    with HttpClient(url) as client:
        return client.get(target, *headers)

"""
Kong's side of the plugin socket, for tests: scripted, strict, and keeping a record.

    kong = FakeKong(path)
    instance_id = kong.start({"audience": "a"})
    done = kong.event(instance_id, Step("kong.request.get_header", "authorization", "Bearer OLD"))
    assert ("kong.service.request.set_header", ("authorization", "Bearer NEW")) in done.calls

As Kong does: sockets are pooled, last used first; a frame's length and body are two
sends; an exit abandons the connection; the plugin's bytes are read in order.
Unlike Kong it does not repeat an event whose connection was closed: `ended` says so.
"""

import json
import select
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from kong_token_exchange.pluginserver import wire
from kong_token_exchange.pluginserver.pdk import METHODS

ANY = object()

# A bound for tests that go wrong, not a wait: nothing here takes long.
TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Step:
    """One call that is expected next, and its answer, given decoded or as bytes."""

    method: str
    argument: Any = ANY
    reply: Any = None
    raw: bytes | None = None

    def encoded(self) -> bytes:
        if self.raw is not None:
            return self.raw
        return b"" if self.reply is None else METHODS[self.method].result.encode(self.reply)


@dataclass
class Done:
    """How an event went: the calls in order, and how it ended."""

    # "success", "exit", "closed", "reset", "broken", "unknown-method", "wrong-sequence"
    ended: str = "?"
    calls: list[tuple[str, Any]] = field(default_factory=list)
    exit: wire.ExitArgs | None = None

    def __getitem__(self, method: str) -> list[Any]:
        return [argument for name, argument in self.calls if name == method]


class KongSide:
    """
    The conversation without a socket: the plugin's bytes in, Kong's bytes out.

    Args:
        steps: Calls that need an answer, in their order.
        headers: Answers to get_header by lower-case name, where no step is left.
    """

    def __init__(
        self, steps: Iterable[Step] = (), headers: Mapping[str, str] | None = None, *, sequence: int = 2
    ) -> None:
        self.done = Done()
        self.over = False
        self.sequence = sequence
        self._steps = list(steps)
        self._headers = headers or {}
        self._reader = wire.FrameReader()
        self._name: str | None = None
        self._returning = False

    def begin(self, instance_id: int, phase: str = "access") -> bytes:
        return wire.frame(wire.encode_call(wire.HandleEvent(self.sequence, instance_id, phase)))

    def receive(self, data: bytes) -> bytes:
        self._reader.feed(data)
        out = b""
        while not self.over and (frame := self._reader.next_frame()) is not None:
            out += self._frame(frame)
        return out

    def _frame(self, frame: bytes) -> bytes:
        if self._returning:
            right = wire.decode_return(frame).sequence == self.sequence
            return self._end("success" if right else "wrong-sequence")
        if self._name is None:
            self._returning = not frame
            self._name = frame.decode() or None
            return b""
        name, self._name = self._name, None
        if name not in METHODS:
            self.done.calls.append((name, frame))
            return self._end("unknown-method")
        method = METHODS[name]
        argument = method.argument.decode(frame)
        self.done.calls.append((name, argument))
        if name == "kong.response.exit":
            self.done.exit = argument
            return self._end("exit")
        return wire.frame(self._answer(name, argument))

    def _answer(self, name: str, argument: Any) -> bytes:
        method = METHODS[name]
        if method.reply_is_empty:
            return b""
        if self._steps:
            step = self._steps.pop(0)
            assert step.method == name, f"expected {step.method}, the plugin called {name}"
            assert step.argument is ANY or step.argument == argument, (step, argument)
            return step.encoded()
        if name == "kong.request.get_header":
            return wire.encode_string(self._headers.get(argument.lower(), ""))
        return b""

    def _end(self, how: str) -> bytes:
        self.done.ended = how
        self.over = True
        return b""


def _is_quiet(sock: socket.socket) -> bool:
    # nginx lets a pooled connection go on which anything arrives, end of file included.
    return not select.select([sock], [], [], 0)[0]


class FakeKong:
    """One gateway worker with its pool of sockets."""

    def __init__(self, path: str, *, plugin: str = "test-plugin") -> None:
        self.path = str(path)
        self.plugin = plugin
        self.pool: list[socket.socket] = []
        self._sequence = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self.pool:
            sock.close()
        self.pool.clear()

    # --- commands ---------------------------------------------------------------------

    def start(self, config: Mapping[str, Any], *, seq: int = 1) -> int:
        status = self.command(
            wire.StartInstance, self.plugin, json.dumps({**config, "__seq__": seq}).encode()
        )
        assert status.instance_status is not None
        return status.instance_status.instance_id

    def close(self, instance_id: int) -> None:
        self.command(wire.CloseInstance, instance_id)

    def command(self, kind: Any, *args: Any) -> wire.RpcReturn:
        sock = self.take()
        sequence = self.next_sequence()
        self.send(sock, wire.encode_call(kind(sequence, *args)))
        payload = self.receive_frame(sock)
        assert payload is not None, "the server closed the connection"
        reply = wire.decode_return(payload)
        assert reply.sequence == sequence
        self.give_back(sock)
        return reply

    # --- events -----------------------------------------------------------------------

    def event(
        self, instance_id: int, *steps: Step, headers: Mapping[str, str] | None = None, phase: str = "access"
    ) -> Done:
        sock = self.take()
        side = KongSide(steps, headers, sequence=self.next_sequence())
        self.send(sock, side.begin(instance_id, phase)[4:])
        return self.converse(sock, side)

    def converse(self, sock: socket.socket, side: KongSide) -> Done:
        """Go on with an event until it ends."""
        while not side.over:
            try:
                data = sock.recv(65536)
            except ConnectionResetError:
                # Kong answers its client with 500, and forgets no instance.
                side.done.ended = "reset"
                break
            if not data:
                side.done.ended = "closed"
                break
            out = side.receive(data)
            try:
                sock.sendall(out)
            except OSError:
                # Kong's own write fails: it answers its client with 500.
                side.done.ended = "broken"
                break
        if side.done.ended == "success":
            self.give_back(sock)
        else:
            sock.close()
        return side.done

    # --- sockets ----------------------------------------------------------------------

    def next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(TIMEOUT_S)
        try:
            sock.connect(self.path)
        except OSError:
            sock.close()
            raise
        return sock

    def take(self) -> socket.socket:
        while self.pool:
            sock = self.pool.pop()
            if _is_quiet(sock):
                return sock
            sock.close()
        return self.connect()

    def give_back(self, sock: socket.socket) -> None:
        self.pool.append(sock)

    def send(self, sock: socket.socket, payload: bytes) -> None:
        sock.sendall(struct.pack("<I", len(payload)))
        sock.sendall(payload)

    def receive_frame(self, sock: socket.socket) -> bytes | None:
        data = b""
        while len(data) < 4 or len(data) < 4 + struct.unpack_from("<I", data)[0]:
            wanted = 4 - len(data) if len(data) < 4 else 4 + struct.unpack_from("<I", data)[0] - len(data)
            part = sock.recv(wanted)
            if not part:
                return None
            data += part
        return data[4:]

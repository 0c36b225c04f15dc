"""
Kong's side of the plugin socket: pooled connections, instances, events, the server's process.

Follows Kong 3.9.1 step by step, in what it does well and in what it does badly:
- one event at a time on a connection; idle connections go to a LIFO pool of 256;
- an instance is started when a request first needs it, and again after any
  configuration change; only then the old id is closed;
- `kong.response.exit` leaves the conversation: nothing more is read, and the
  connection is closed when the request ends;
- a connection that is closed during an event means "instance unknown": every
  instance of the plugin is forgotten and the event repeated, without a pause.
  Kong repeats without end; here it ends after `MAX_REPEATS`;
- every other failure is a 500.

Source: Kong 3.9.1 `kong/runloop/plugin_servers/{plugin,process}.lua`,
`rpc/pb_rpc.lua` (behaviour).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from kong_token_exchange.errors import RemoteProtocolError
from kong_token_exchange.pluginserver import wire
from kong_token_exchange.sandbox.declarative import PluginConfig
from kong_token_exchange.sandbox.pdk import LuaError, UnknownMethodError

# lua_socket_pool_size and lua_socket_keepalive_timeout in Kong.
POOL_SIZE = 256
_IDLE_S = 60.0

# Kong has no such limit; a test that waits for Kong's behaviour would not end.
MAX_REPEATS = 20

# get_instance_id sleeps in steps while another request starts the same instance.
_CLAIM_STEP_S = 0.1
_CLAIM_STEPS = 100

# Kong reads frames of any length; this keeps a broken server from filling the memory.
_MAX_FRAME_BYTES = 64 * 1024 * 1024

# Kong starts a dead plugin server again, at most once a second.
_RESPAWN_S = 1.0

# How long a plugin server may take to end after SIGTERM, and to listen after its start.
_STOP_TIMEOUT_S = 10.0
READY_TIMEOUT_S = 30.0


class RpcError(Exception):
    """A failed call; the text is what Kong's Lua gets as error."""


class PluginFailedError(Exception):
    """The event could not be run: Kong answers 500."""


class Log(Protocol):
    """Where the gateway writes what Kong would write into its error log."""

    def __call__(self, level: str, text: str) -> None:
        """Write one line."""


PdkCall = Callable[[str, bytes], Awaitable[bytes]]


# --- connections ----------------------------------------------------------------------


class Connection(asyncio.Protocol):
    """One connection to the plugin server."""

    def __init__(self) -> None:
        self._reader = wire.FrameReader(_MAX_FRAME_BYTES)
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._ended: str | None = None
        self._pooled = False
        self.idle_since = 0.0

    @property
    def reusable(self) -> bool:
        """Tell whether the connection may go to the pool: open, and nothing unread on it."""
        return self._ended is None and not self._reader.pending_bytes()

    def enter_pool(self) -> None:
        """Lie idle: from here on whatever arrives ends the connection, as nginx does with a pooled one."""
        self._pooled = True
        self.idle_since = time.monotonic()

    def leave_pool(self) -> None:
        """Serve again."""
        self._pooled = False

    def send(self, payload: bytes) -> None:
        """
        Send one frame.

        Raises:
            LuaError: the other side has gone; Kong asserts that sending works.
        """
        if self._transport is None or self._ended is not None or self._transport.is_closing():
            raise LuaError(self._ended or "closed")
        self._transport.write(wire.frame(payload))

    async def receive(self, timeout_s: float) -> bytes:
        """
        Return the next frame.

        Raises:
            RpcError: "closed", "timeout", or what the operating system says.
        """
        while True:
            try:
                payload = self._reader.next_frame()
            except RemoteProtocolError as error:
                raise RpcError(str(error)) from None
            if payload is not None:
                return payload
            if self._ended is not None:
                raise RpcError(self._ended)
            await self._wait(timeout_s)

    async def _wait(self, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        waiter = self._waiter = loop.create_future()
        timer = loop.call_later(timeout_s, self._wake, RpcError("timeout"))
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiter = None

    def _wake(self, error: Exception | None = None) -> None:
        if self._waiter is not None and not self._waiter.done():
            if error is None:
                self._waiter.set_result(None)
            else:
                self._waiter.set_exception(error)

    def close(self) -> None:
        """Close the connection, mid-conversation or not."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Keep what arrived and wake the reader; a pooled connection is closed for it."""
        self._reader.feed(data)
        if self._pooled:
            self.close()
        self._wake()

    def eof_received(self) -> bool:
        """Note the end of the stream; frames that came before it can still be read."""
        self._ended = self._ended or "closed"
        self._wake()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """Note why the connection ended."""
        if self._ended is None:
            reset = isinstance(error, ConnectionResetError)
            self._ended = "connection reset by peer" if reset else str(error) if error else "closed"
        self._wake()


class Pool:
    """Idle connections, newest first."""

    def __init__(self, socket_path: str, size: int = POOL_SIZE) -> None:
        self._path, self._size = socket_path, size
        self._idle: list[Connection] = []
        self.opened = 0

    @property
    def idle(self) -> int:
        """Return how many connections wait in the pool."""
        return len(self._idle)

    async def take(self) -> Connection:
        """
        Return an idle connection or a new one.

        Raises:
            RpcError: nobody listens.
        """
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and time.monotonic() - connection.idle_since < _IDLE_S:
                connection.leave_pool()
                return connection
            connection.close()
        try:
            _, connection = await asyncio.get_running_loop().create_unix_connection(Connection, self._path)
        except OSError as error:
            raise RpcError((error.strerror or str(error)).lower()) from None
        self.opened += 1
        return connection

    def give_back(self, connection: Connection) -> None:
        """Put a connection into the pool, or close it when it is full or not clean."""
        if len(self._idle) >= self._size or not connection.reusable:
            connection.close()
            return
        connection.enter_pool()
        self._idle.append(connection)

    def close(self) -> None:
        """Close every idle connection."""
        while self._idle:
            self._idle.pop().close()


# --- instances and events -------------------------------------------------------------


@dataclass
class _Instance:
    """What Kong knows of a started plugin configuration; without an id it is being started."""

    config: PluginConfig
    id: int | None = None
    plugin_name: str | None = None


class PluginClient:
    """
    Drive one plugin server.

    Args:
        plugin_name: The plugin that it serves.
        socket_path: Where it listens.
        log: Gets what Kong would log.
        read_timeout_s: lua_socket_read_timeout, for each frame.
    """

    def __init__(self, plugin_name: str, socket_path: str, *, log: Log, read_timeout_s: float = 60.0) -> None:
        self._name = plugin_name
        self.pool = Pool(socket_path)
        self._log = log
        self._read_timeout_s = read_timeout_s
        self._message_id = 0
        self._instances: dict[str, _Instance] = {}

    async def handle_event(
        self, config: PluginConfig, phase: str, call_pdk: PdkCall, abandoned: list[Connection]
    ) -> None:
        """
        Run one phase of one request.

        Args:
            config: The configuration in force for the request.
            phase: `access`.
            call_pdk: Answers the plugin's calls; what it raises ends the event.
            abandoned: Gets connections left in mid-conversation, to be closed when the request ends.

        Raises:
            PluginFailedError: Kong would answer 500.
            ResponseExit: the plugin has answered; raised by *call_pdk*.
        """
        for _ in range(MAX_REPEATS + 1):
            try:
                instance_id = await self._get_instance_id(config, abandoned)
                await self._call(wire.HandleEvent(0, instance_id, phase), abandoned, call_pdk)
                return  # noqa: TRY300 - the except clauses below are what goes on
            except RpcError as error:
                if not ("closed" in str(error) or "no plugin instance" in str(error)):
                    self._log("err", f"pluginserver error: {error}")
                    raise PluginFailedError(str(error)) from None
                self._forget_instances()
                self._log("warn", str(error))
            except UnknownMethodError as error:
                self._log("err", f"pluginserver error: {error}")
                raise PluginFailedError(str(error)) from None
            except LuaError as error:
                self._log("err", str(error))
                raise PluginFailedError(str(error)) from None
        self._log("err", f"event repeated {MAX_REPEATS} times: Kong would go on without end")
        raise PluginFailedError("closed")

    def _forget_instances(self) -> None:
        self._instances = {
            key: instance for key, instance in self._instances.items() if instance.plugin_name != self._name
        }

    async def _get_instance_id(self, config: PluginConfig, abandoned: list[Connection]) -> int:
        instance = self._instances.get(config.id)
        for _ in range(_CLAIM_STEPS):
            if instance is None or instance.id is not None:
                break
            await asyncio.sleep(_CLAIM_STEP_S)
            instance = self._instances.get(config.id)
        else:
            self._instances.pop(config.id, None)
            raise RpcError(f"Could not claim instance_id for {config.name} (key: {config.id})")
        if instance is not None and instance.id is not None and instance.config.seq == config.seq:
            return instance.id
        return await self._start_instance(config, instance, abandoned)

    async def _start_instance(
        self, config: PluginConfig, instance: _Instance | None, abandoned: list[Connection]
    ) -> int:
        old_id = instance.id if instance is not None else None
        if instance is None:
            instance = self._instances[config.id] = _Instance(config)
        instance.id = None
        try:
            answer = await self._call(wire.StartInstance(0, config.name, config.to_json()), abandoned)
        except RpcError as error:
            self._log("err", f"starting instance: {error}")
            self._instances.pop(config.id, None)
            raise LuaError(str(error)) from None
        if answer.instance_status is None:
            # The claim stays, as in Kong: other requests wait for it for ten seconds.
            raise LuaError("attempt to index field 'instance_status' (a nil value)")
        instance.id = answer.instance_status.instance_id
        instance.config, instance.plugin_name = config, config.name
        if old_id is not None:
            with contextlib.suppress(RpcError):
                await self._call(wire.CloseInstance(0, old_id), abandoned)
        return instance.id

    async def _call(
        self,
        call: wire.RpcCall,
        abandoned: list[Connection],
        call_pdk: PdkCall | None = None,
    ) -> wire.RpcReturn:
        self._message_id += 1
        sequence = self._message_id + 1
        try:
            connection = await self.pool.take()
        except RpcError as error:
            self._log("err", f"trying to connect: {error}")
            raise
        abandoned.append(connection)  # until the conversation has come to its end
        connection.send(wire.encode_call(replace(call, sequence=sequence)))
        if call_pdk is not None:
            await self._bridge(connection, call_pdk)
        payload = await connection.receive(self._read_timeout_s)
        abandoned.remove(connection)
        self.pool.give_back(connection)
        try:
            answer = wire.decode_return(payload)
        except RemoteProtocolError as error:
            raise LuaError(str(error)) from None
        if answer.sequence != sequence:
            raise LuaError("assertion failed!")
        return answer

    async def _bridge(self, connection: Connection, call_pdk: PdkCall) -> None:
        while method := await connection.receive(self._read_timeout_s):
            arguments = await connection.receive(self._read_timeout_s)
            connection.send(await call_pdk(wire.decode_text(method), arguments))


# --- the process ----------------------------------------------------------------------


class PluginProcess:
    """
    Keep the plugin server's process running, as Kong's worker 0 does.

    Args:
        command: The start command.
        name: For the log's prefix.
        log: Gets the process's output, line by line.
        environ: The process's environment; default: this process's own.
    """

    def __init__(
        self, command: Sequence[str], *, name: str, log: Log, environ: dict[str, str] | None = None
    ) -> None:
        self._command = list(command)
        self._name, self._log, self._environ = name, log, environ
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_running, name="sandbox-plugin-process", daemon=True)
        self.started: list[float] = []

    @property
    def pid(self) -> int | None:
        """Return the process id, or None while no process lives."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        """Start the process and whatever replaces it."""
        self._thread.start()

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, if there is one."""
        if (pid := self.pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self) -> None:
        """End the process with SIGTERM, after a while with SIGKILL."""
        self._stopping.set()
        self.send_signal(signal.SIGTERM)
        # A stopped process does not act on SIGTERM before it continues.
        self.send_signal(signal.SIGCONT)
        self._thread.join(_STOP_TIMEOUT_S)
        if self._thread.is_alive():
            self.send_signal(signal.SIGKILL)
            self._thread.join(_STOP_TIMEOUT_S)

    def _keep_running(self) -> None:
        while not self._stopping.is_set():
            next_start = time.monotonic() + _RESPAWN_S
            self._run_once()
            if self._stopping.wait(max(0.0, next_start - time.monotonic())):
                return

    def _run_once(self) -> None:
        now = time.monotonic()
        try:
            process = self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self._environ,
            )
        except OSError as error:
            self._log("err", f"[pluginserver] cannot start {self._command[0]}: {error.strerror}")
            return
        self.started.append(now)
        if self._stopping.is_set():
            process.terminate()
        self._log("notice", f"[pluginserver] started, pid {process.pid}")
        assert process.stdout is not None
        with process.stdout as output:
            for line in output:
                self._log("info", f"[{self._name}:{process.pid}] {line.decode('utf-8', 'replace').rstrip()}")
        self._log("notice", f"external pluginserver '{self._name}' terminated: {process.wait()}")


def query_description(command: Sequence[str]) -> bytes:
    """
    Run the query command and return what it prints.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(list(command), capture_output=True, timeout=READY_TIMEOUT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"the query command failed: {done.stderr.decode('utf-8', 'replace').strip()}")
    return done.stdout


def prepare_socket_path(path: Path) -> str:
    """Return *path* as text; a Unix socket's path must fit 108 bytes with its end."""
    text = str(path)
    if len(os.fsencode(text)) > 107:
        raise ValueError("the socket's path is longer than 107 bytes")
    return text

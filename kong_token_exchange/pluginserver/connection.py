"""
One connection with Kong: bytes in, bytes and actions out, no I/O.

    state       what it waits for
    IDLE        a command of Kong, or the answers still due to calls that were pipelined
    WAIT_REPLY  the answers to the facts an instance wants first
    OFF_LOOP    a pool thread that runs `access`, and the answers to its calls
    PARKED      the `access` of another event with the same facts
    DRAINING    the end of file that follows an exit; what arrives is thrown away
    DEAD        nothing

Every event ends with a success or with `kong.response.exit`. Closing the
socket instead means "this instance is unknown" to Kong, which then starts the
instance again and repeats the event without bound or delay (pb_rpc.lua), so it
happens for an unknown instance only, and for an instance start that cannot be
carried out, where Kong answers 500 and repeats nothing.

Source: docs/plugin-socket.md.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from kong_token_exchange.errors import LocalProtocolError, RemoteProtocolError
from kong_token_exchange.pluginserver import wire
from kong_token_exchange.pluginserver.contract import Facts, Outcome, PluginType
from kong_token_exchange.pluginserver.faults import FaultLog, Faults
from kong_token_exchange.pluginserver.instances import Instance, InstanceRegistry

# A command carries at most one plugin configuration; see wire.MAX_FRAME_BYTES.
MAX_COMMAND_BYTES = wire.MAX_FRAME_BYTES

# An answer is a header (8 KB by default in nginx), all headers (100 of them), or a
# body that nginx holds in memory (client_body_buffer_size, 8 KB by default).
MAX_REPLY_BYTES = 1024 * 1024

# An over-long frame is read away up to this size; a longer one is no frame at all.
MAX_DRAIN_BYTES = 64 * 1024 * 1024

# Shorter frames are not looked at twice, so a limit cannot be lower.
MIN_LIMIT_BYTES = 64 * 1024

# Encodings of "event on instance N" that are remembered: two orders of fields per
# instance and phase are what Kong sends, so this is never reached by it.
_MAX_KNOWN_EVENTS = 16_384

_read_length = struct.Struct("<I").unpack_from
_EVENT_TAG = b"\xa2\x02"  # field 36 of RpcCall, cmd_handle_event, length-delimited
_SEQUENCE_TAG = 0x08  # field 1, varint
_MAX_SEQUENCE_BYTES = 11  # the tag and an int64
_LENGTHS = tuple(size.to_bytes(4, "little") for size in range(_MAX_SEQUENCE_BYTES + 1))


class State(StrEnum):
    """What a connection waits for."""

    IDLE = "idle"
    WAIT_REPLY = "wait_reply"
    OFF_LOOP = "off_loop"
    PARKED = "parked"
    DRAINING = "draining"
    DEAD = "dead"


class Trigger(StrEnum):
    """What moves a connection from one state to the next."""

    COMMAND = "command"  # answered at once
    EVENT = "event"  # an event on a known instance
    REFUSE = "refuse"  # an event on an unknown instance; a start that cannot be carried out
    OFFLOAD = "offload"  # `warm` said None
    PARK = "park"  # an event with the same facts is in the pool
    SUCCEED = "succeed"
    EXIT = "exit"
    GONE = "gone"  # end of file, ECONNRESET, EPIPE: Kong has left
    CLOSE = "close"  # the wait for end of file took too long, or the server stops


_IDLE, _WAIT, _OFF, _DRAIN, _DEAD = State.IDLE, State.WAIT_REPLY, State.OFF_LOOP, State.DRAINING, State.DEAD
_PARKED = State.PARKED
_EVENT, _SUCCEED, _EXIT, _OFFLOAD = Trigger.EVENT, Trigger.SUCCEED, Trigger.EXIT, Trigger.OFFLOAD

TRANSITIONS: Final[Mapping[State, Mapping[Trigger, State]]] = {
    _IDLE: {
        Trigger.COMMAND: _IDLE,
        Trigger.EVENT: _WAIT,
        Trigger.REFUSE: _DEAD,
        Trigger.EXIT: _DRAIN,
        Trigger.GONE: _DEAD,
        Trigger.CLOSE: _DEAD,
    },
    _WAIT: {
        Trigger.SUCCEED: _IDLE,
        Trigger.EXIT: _DRAIN,
        Trigger.OFFLOAD: _OFF,
        Trigger.GONE: _DEAD,
        Trigger.CLOSE: _DEAD,
    },
    _OFF: {
        Trigger.SUCCEED: _IDLE,
        Trigger.EXIT: _DRAIN,
        Trigger.PARK: _PARKED,
        Trigger.GONE: _DEAD,
        Trigger.CLOSE: _DEAD,
    },
    _PARKED: {
        Trigger.SUCCEED: _IDLE,
        Trigger.EXIT: _DRAIN,
        Trigger.OFFLOAD: _OFF,
        Trigger.GONE: _DEAD,
        Trigger.CLOSE: _DEAD,
    },
    _DRAIN: {Trigger.GONE: _DEAD, Trigger.CLOSE: _DEAD},
    _DEAD: {},
}


# --- actions: what the owner of the socket has to do ----------------------------------


@dataclass(frozen=True, slots=True)
class RunAccess:
    """
    Run `access` of *instance* in a pool thread, or park the event.

    *replies* are its prefetched answers as Kong encoded them, *facts* the same decoded.
    """

    instance: Instance
    replies: tuple[bytes, ...]
    facts: Facts


@dataclass(frozen=True, slots=True)
class Deliver:
    """Hand Kong's answer to the pool thread that waits for it."""

    reply: bytes


@dataclass(frozen=True, slots=True)
class Abandon:
    """The event is over without the pool thread, whose next call must raise; or it is parked no more."""


@dataclass(frozen=True, slots=True)
class Linger:
    """Wait for end of file, but not for long, then `close()`."""


@dataclass(frozen=True, slots=True)
class Close:
    """Close the socket now."""


Action = RunAccess | Deliver | Abandon | Linger | Close
_ABANDON, _LINGER, _CLOSE = Abandon(), Linger(), Close()


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of Kong's bytes is held."""

    command_bytes: int = MAX_COMMAND_BYTES
    reply_bytes: int = MAX_REPLY_BYTES
    drain_bytes: int = MAX_DRAIN_BYTES

    def __post_init__(self) -> None:
        """Refuse limits that would not hold."""
        if min(self.command_bytes, self.reply_bytes, self.drain_bytes) < MIN_LIMIT_BYTES:
            raise ValueError(f"a limit is at least {MIN_LIMIT_BYTES} bytes")


class Host:
    """What all connections of a process share: the plugin, its instances, the constant answers."""

    __slots__ = ("_generation", "events", "faults", "limits", "log", "plugin", "registry")

    def __init__(
        self,
        plugin: PluginType,
        registry: InstanceRegistry,
        *,
        faults: Faults,
        log: FaultLog,
        limits: Limits | None = None,
    ) -> None:
        self.plugin = plugin
        self.registry = registry
        self.faults = faults
        self.log = log
        self.limits = limits or Limits()
        # The bytes of "event on instance N" as Kong sends them, without the sequence.
        self.events: dict[bytes, Instance] = {}
        self._generation = registry.generation()

    def remember(self, key: bytes, instance: Instance) -> None:
        """Note how Kong writes an event on *instance*."""
        if len(self.events) >= _MAX_KNOWN_EVENTS:
            self.events.clear()
        self.events[key] = instance

    def expire(self) -> list[Instance]:
        """Forget what is over in the registry; return the instances to close."""
        removed = self.registry.expire()
        self._forget_stale()
        return removed

    def answer(self, call: wire.RpcCall) -> bytes:
        """Carry out a command that is not an event; return the encoded RpcReturn."""
        sequence = call.sequence
        match call:
            case wire.StartInstance(name=name, config=config):
                instance = self.registry.start(name, config)
                self._forget_stale()
                return wire.encode_return(sequence, _status(instance))
            case wire.CloseInstance(instance_id=instance_id):
                self.registry.close(instance_id)
            case wire.GetInstanceStatus(instance_id=instance_id):
                found = self.registry.find(instance_id)
                if found is not None:
                    return wire.encode_return(sequence, _status(found))
            case wire.GetPluginNames():
                return wire.encode_plugin_names(sequence, [self.plugin.name])
            case wire.GetPluginInfo():  # pragma: no branch - the last kind: an event never comes here
                return wire.encode_plugin_info(sequence, self._info())
        return wire.encode_return(sequence)

    def _info(self) -> wire.PluginInfo:
        plugin = self.plugin
        schema = json.dumps(plugin.schema)
        return wire.PluginInfo(plugin.name, plugin.phases, plugin.version, plugin.priority, schema)

    def _forget_stale(self) -> None:
        generation = self.registry.generation()
        if generation != self._generation:
            self._generation = generation
            self.events.clear()


def _status(instance: Instance) -> wire.InstanceStatus:
    return wire.InstanceStatus(instance.name, instance.instance_id, instance.started_at)


class Connection:
    """
    The state machine of one connection.

    `receive` takes what arrived and returns what to send. What else is to be done
    stands in `actions`, oldest first; the caller empties the list. An `access` in the
    pool speaks through `call` and `finish`, its watchdog through `time_out`.
    """

    __slots__ = (
        "_awaited",
        "_discard",
        "_held",
        "_host",
        "_instance",
        "_need",
        "_replies",
        "_sequence",
        "_skip",
        "_wanted",
        "actions",
        "frames",
        "state",
    )

    def __init__(self, host: Host) -> None:
        self.state = _IDLE
        self.actions: list[Action] = []
        # How many have come; the owner of the socket counts from where it likes.
        self.frames = 0
        self._host = host
        self._held = bytearray()
        self._need = 4
        # Bytes of an over-long frame still to be thrown away.
        self._discard = 0
        # Empty answers still due to calls that were pipelined.
        self._skip = 0
        self._awaited = False
        self._instance: Instance | None = None
        self._replies: list[bytes] = []
        self._wanted = 0
        self._sequence = b""

    # --- bytes ------------------------------------------------------------------------

    def receive(self, data: bytes) -> bytes:  # noqa: C901 - a call less for each frame
        """Take bytes that arrived; return the bytes to send, b"" for none."""
        if self._held:
            held = self._held
            held += data
            if len(held) < self._need:
                return b""
            data = bytes(held)
            held.clear()
        position, size, out = 0, len(data), b""
        if self._discard:
            position, out = self._throw_away(size)
        while size - position >= 4:
            (length,) = _read_length(data, position)
            end = position + 4 + length
            if end > size:
                break
            start, position = position + 4, end
            self.frames += 1
            if length > MIN_LIMIT_BYTES and length > self._limit():
                out += self._too_long()
            elif self._skip:
                self._skip -= 1
            elif self.state is _IDLE:
                out += self._command(data[start:end])
            elif self.state is _WAIT:
                replies = self._replies
                replies.append(data[start:end])
                if len(replies) == self._wanted:
                    out += self._decide()
            elif self.state is _OFF or self.state is _PARKED:
                out += self._pool_reply(data[start:end])
        if position < size:
            out += self._hold(data, position)
        return out

    def _hold(self, data: bytes, position: int) -> bytes:
        # Less than a whole frame is left: keep it, unless its announced length is too long.
        have = len(data) - position
        if self.state is _DRAIN or self.state is _DEAD:
            return b""
        if have < 4:
            self._need = 4
        else:
            (length,) = _read_length(data, position)
            if length > self._host.limits.drain_bytes:
                return self._broken("frame_length_absurd")
            if length > self._limit():
                self._discard = length + 4 - have
                return b""
            self._need = length + 4
        self._held += data[position:]
        return b""

    def _limit(self) -> int:
        limits = self._host.limits
        idle = self.state is _IDLE and not self._skip
        return limits.command_bytes if idle else limits.reply_bytes

    def _throw_away(self, size: int) -> tuple[int, bytes]:
        taken = min(size, self._discard)
        self._discard -= taken
        return taken, b"" if self._discard else self._too_long()

    # --- commands ---------------------------------------------------------------------

    def _command(self, payload: bytes) -> bytes:
        # Kong writes the sequence before or after the command, as its start had it.
        # Either way the rest of the frame is the same for every event on an instance.
        cut = payload.find(_EVENT_TAG)
        if cut > 0:
            sequence, key = payload[:cut], payload[cut:]
        elif cut == 0 and len(payload) > 2:
            cut = 3 + payload[2]
            key, sequence = payload[:cut], payload[cut:]
        else:
            return self._slow_command(payload)
        instance = self._host.events.get(key)
        if (
            instance is None
            or not 1 < len(sequence) <= _MAX_SEQUENCE_BYTES
            or sequence[0] != _SEQUENCE_TAG
            or sequence[-1] > 0x7F
        ):
            return self._slow_command(payload, key)
        return self._begin(instance, sequence)

    def _slow_command(self, payload: bytes, key: bytes = b"") -> bytes:
        host = self._host
        try:
            call = wire.decode_call(payload)
        except RemoteProtocolError as error:
            return self._broken(error.reason)
        if not isinstance(call, wire.HandleEvent):
            return self._carry_out(call)
        instance = host.registry.find(call.instance_id)
        if instance is None:
            return self._refuse()
        sequence = wire.encode_return(call.sequence)
        if call.event_name != "access":
            host.log.note(f"event {call.event_name[:32]!r} is not one this server runs")
            self._go(_EVENT)
            return self._finish(host.faults.server_error)
        if payload in (sequence + key, key + sequence):
            host.remember(key, instance)
        return self._begin(instance, sequence)

    def _carry_out(self, call: wire.RpcCall) -> bytes:
        try:
            answer = self._host.answer(call)
        except BaseException as error:  # noqa: BLE001 - a fault here must not reach other connections
            self._host.log.raised("a command failed", error)
            return self._refuse()
        self._go(Trigger.COMMAND)
        return wire.frame(answer)

    def _refuse(self) -> bytes:
        # What is no event is not repeated by Kong: it answers 500 to a close, and lets others
        # try, while any reply that is none would be misread and leave its claim in place.
        self._go(Trigger.REFUSE)
        self.actions.append(_CLOSE)
        return b""

    def _begin(self, instance: Instance, sequence: bytes) -> bytes:
        self.state = TRANSITIONS[_IDLE][_EVENT]
        self._instance = instance
        self._wanted = instance.wanted
        self._sequence = sequence
        self._replies = []
        return instance.prefetch_frames if instance.wanted else self._decide()

    # --- the event on the loop --------------------------------------------------------

    def _decide(self) -> bytes:
        instance, replies = self._instance, self._replies
        assert instance is not None  # WAIT_REPLY is entered with one
        decoders = instance.decoders
        try:
            if len(replies) == 1:
                facts = [decoders[0](replies[0])]
            else:
                facts = [decode(reply) for decode, reply in zip(decoders, replies, strict=True)]
            outcome = instance.warm(facts)
        except BaseException as error:  # noqa: BLE001 - whatever is raised, the event must end
            return self._fault("warm failed", error)
        if outcome is None:
            self._go(_OFFLOAD)
            self._awaited = False
            self.actions.append(RunAccess(instance, tuple(replies), facts))
            self._replies = []
            return b""
        if type(outcome) is not Outcome:
            outcome = self._no_outcome(outcome)
        return self._finish(outcome)

    def _no_outcome(self, value: object) -> Outcome:
        instance = self._instance
        name = instance.name if instance is not None else ""
        self._host.log.note(f"warm of {name} returned {type(value).__qualname__}, not an Outcome")
        return self._host.faults.server_error

    def _finish(self, outcome: Outcome) -> bytes:
        self._instance = None
        if outcome.status is not None:
            self._go(_EXIT)
            self.actions.append(_LINGER)
            return outcome.frames
        self.state = TRANSITIONS[self.state][_SUCCEED]
        self._skip = outcome.replies
        sequence = self._sequence
        return outcome.frames + _LENGTHS[len(sequence)] + sequence

    def _fault(self, what: str, error: BaseException) -> bytes:
        self._host.log.raised(what, error)
        return self._finish(self._host.faults.server_error)

    # --- the event in the pool --------------------------------------------------------

    def call(self, frames: bytes, replies: int) -> bytes:
        """
        Send calls of the pool thread; all but the last have empty answers.

        Args:
            frames: The encoded calls.
            replies: How many empty answers come before the one that is waited for.

        Raises:
            LocalProtocolError: no event is in the pool, or a call is waited for already.
        """
        if self.state is not _OFF or self._awaited:
            raise LocalProtocolError(reason="call_out_of_turn")
        self._awaited = True
        self._skip += replies
        return frames

    def finish(self, outcome: Outcome) -> bytes:
        """
        End the event that is in the pool or parked.

        Raises:
            LocalProtocolError: no event is there, or a call is waited for.
        """
        if self.state is not _PARKED and (self.state is not _OFF or self._awaited):
            raise LocalProtocolError(reason="finish_out_of_turn")
        return self._finish(outcome)

    def overrule(self, outcome: Outcome) -> bytes:
        """
        End the event with an exit, whatever the pool thread is doing.

        Raises:
            LocalProtocolError: no event is in the pool, or *outcome* is no exit.
        """
        if self.state is not _OFF or outcome.status is None:
            raise LocalProtocolError(reason="overrule_out_of_turn")
        self.actions.append(_ABANDON)
        return self._finish(outcome)

    # --- the event that waits for another one's access --------------------------------

    def park(self) -> None:
        """
        Let the event wait where it would have gone to the pool.

        Raises:
            LocalProtocolError: no event is on its way to the pool.
        """
        if self.state is not _OFF or self._awaited:
            raise LocalProtocolError(reason="park_out_of_turn")
        self._go(Trigger.PARK)

    def unpark(self) -> None:
        """
        Send the parked event on to the pool.

        Raises:
            LocalProtocolError: no event is parked.
        """
        if self.state is not _PARKED:
            raise LocalProtocolError(reason="park_out_of_turn")
        self._go(_OFFLOAD)

    def settle(self, facts: Facts, again: Callable[[], Outcome | None] | None) -> bytes | None:
        """
        Ask again for the parked event what `warm` says, then *again*; return the bytes of its end.

        None, and still parked, where neither has an answer.

        Raises:
            LocalProtocolError: no event is parked.
        """
        instance = self._instance
        if self.state is not _PARKED or instance is None:
            raise LocalProtocolError(reason="park_out_of_turn")
        try:
            outcome = instance.warm(facts)
            if outcome is None and again is not None:
                outcome = again()
        except BaseException as error:  # noqa: BLE001 - whatever is raised, the event must end
            return self._fault("a shared answer failed", error)
        if outcome is None:
            return None
        return self._finish(outcome if type(outcome) is Outcome else self._no_outcome(outcome))

    def _pool_reply(self, payload: bytes) -> bytes:
        if not self._awaited:
            return self._broken("reply_without_call")
        self._awaited = False
        self.actions.append(Deliver(payload))
        return b""

    def is_quiet(self) -> bool:
        """
        Tell whether the connection can be closed without Kong noticing.

        Not while answers to pipelined calls are due: Kong has yet to write them, and
        a write that fails is a 500 to its client.
        """
        return self.state is _IDLE and not self._skip and not self._held and not self._discard

    # --- endings ----------------------------------------------------------------------

    def fail(self) -> bytes:
        """End whatever runs with the constant 500: for a fault in the owner of this connection."""
        if self.state in (_DRAIN, _DEAD):
            return b""
        if self.state in (_OFF, _PARKED):
            self.actions.append(_ABANDON)
        return self._finish(self._host.faults.server_error)

    def gone(self) -> None:
        """Kong has left: end of file, a reset, or a write that failed."""
        self._end(Trigger.GONE)

    def close(self) -> None:
        """Close from our side: the wait for end of file is over, or the server stops."""
        self._end(Trigger.CLOSE)

    def _end(self, trigger: Trigger) -> None:
        if self.state is _DEAD:
            return
        if self.state in (_OFF, _PARKED):
            self.actions.append(_ABANDON)
        self._go(trigger)
        self.actions.append(_CLOSE)
        self._instance = None

    def _broken(self, reason: str) -> bytes:
        # Kong may be waiting inside an event, so an exit is the one answer that is safe.
        self._host.log.note(f"Kong's side of the conversation broke: {reason}")
        return self.fail()

    def _too_long(self) -> bytes:
        if self._skip:
            self._skip -= 1
            return b""
        if self.state is _IDLE:
            # No event is that long, so it was an instance start.
            self._host.log.note("a command above the size limit was refused")
            return self._refuse()
        if self.state in (_OFF, _PARKED):
            self.actions.append(_ABANDON)
        elif self.state is not _WAIT:
            return b""
        return self._finish(self._host.faults.too_large)

    def _go(self, trigger: Trigger) -> None:
        self.state = TRANSITIONS[self.state][trigger]

"""
What a plugin is to this server, and how it answers.

A `PluginType` describes itself and makes one `PluginInstance` per configuration.
An instance names the request facts it always wants (`prefetch`). The loop fetches
them in one write and asks `warm`, which answers from memory: an `Outcome`, or None
when it would have to wait. None sends the event to a pool thread, where `access`
runs as plain synchronous code.

Where many events with the same facts come at once, an instance may let one `access` do for
all of them: see `Coalescing`.

An `Outcome` is the encoded end of an event. Build it once, keep it in a cache and
hand out the same object for every hit: nothing is encoded per request.

    ready = proceed(Calls().set_header("authorization", "Bearer ..."))
    refused = exit_with(401, b'{"error":"invalid_token"}', {"WWW-Authenticate": "Bearer"})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from kong_token_exchange.pluginserver import pdk, wire
from kong_token_exchange.pluginserver.pdk import METHODS, Kong, Method
from kong_token_exchange.pluginserver.wire import EMPTY_FRAME, JsonValue

# A warm answer or an `access` that makes more calls than this is a loop gone wrong;
# a busy plugin makes a dozen.
MAX_CALLS_PER_EVENT = 1000

# The decoded answers to `prefetch`, in its order: text, or what the method returns.
Facts = Sequence[Any]


@dataclass(frozen=True, slots=True)
class Fetch:
    """
    A request fact that an instance wants before it is asked anything.

    Args:
        method: A PDK method that returns something, `kong.request.get_header`.
        argument: Its argument; for get_headers and get_query the maximum.
    """

    method: str
    argument: str = ""

    def resolve(self) -> tuple[Method, bytes]:
        """
        Return the method and its encoded argument.

        Raises:
            ValueError: no such method, or not one that only reads.
        """
        method = METHODS.get(self.method)
        if method is None or method.result is pdk.EMPTY:
            raise ValueError(f"{self.method} cannot be prefetched")
        if method.argument is pdk.STRING:
            return method, wire.encode_string(self.argument)
        if method.argument is pdk.INT:
            return method, wire.encode_int(int(self.argument or pdk.DEFAULT_MAX_HEADERS))
        if method.argument is pdk.EMPTY:
            return method, b""
        raise ValueError(f"{self.method} cannot be prefetched")


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    How an event ends, encoded; made by `proceed` and `exit_with` and never changed.

    Args:
        frames: All that is sent, up to the event's own sequence number.
        replies: How many empty answers Kong will send to those calls.
        status: The HTTP status of an exit, None when the request goes on.
    """

    frames: bytes
    replies: int
    status: int | None = None

    @property
    def is_exit(self) -> bool:
        """Tell whether the request ends here."""
        return self.status is not None


class Calls:
    """
    PDK calls without an answer, encoded as they are added; every method returns the builder.

    Raises:
        TypeError, ValueError: a header that cannot be one (see `pdk.header_text`), a
            value that has no JSON form.
    """

    __slots__ = ("count", "frames")

    def __init__(self) -> None:
        self.frames = bytearray()
        self.count = 0

    def add(self, name: str, argument: bytes) -> Self:
        """Add a call by name with its encoded argument; its answer must be empty."""
        method = METHODS[name]
        if not method.reply_is_empty:
            raise ValueError(f"{name} has an answer and cannot be pipelined")
        self.frames += method.call(argument)
        self.count += 1
        return self

    def set_header(self, name: str, value: str) -> Self:
        """Set a header of the upstream request."""
        return self.add("kong.service.request.set_header", pdk.encode_header(name, value))

    def clear_header(self, name: str) -> Self:
        """Remove a header from the upstream request."""
        return self.add("kong.service.request.clear_header", wire.encode_string(pdk.header_text(name)))

    def set_raw_query(self, query: str) -> Self:
        """Set the query of the upstream request, without "?"."""
        return self.add("kong.service.request.set_raw_query", wire.encode_string(query))

    def response_set_header(self, name: str, value: str) -> Self:
        """Set a header of the answer to the client."""
        return self.add("kong.response.set_header", pdk.encode_header(name, value))

    def ctx_shared_set(self, key: str, value: JsonValue) -> Self:
        """Store a value for later plugins; Kong reads a false as nil."""
        return self.add("kong.ctx.shared.set", wire.encode_kv(key, value))

    def authenticate(
        self, consumer: Mapping[str, JsonValue] | None, credential: Mapping[str, JsonValue] | None
    ) -> Self:
        """Tell later plugins who was authenticated."""
        return self.add("kong.client.authenticate", pdk.encode_authenticate(consumer, credential))

    def set_serialize_value(self, key: str, value: JsonValue) -> Self:
        """Add a member to the object that Kong's logging plugins write."""
        return self.add("kong.log.set_serialize_value", wire.encode_kv(key, value))

    def log(self, level: str, *parts: JsonValue) -> Self:
        """Write to Kong's error log at *level* (err, warn, notice, info, debug, alert, crit)."""
        return self.add(f"kong.log.{level}", wire.encode_list(parts))


def proceed(*calls: Calls) -> Outcome:
    """
    Let the request go on, after *calls* in their order.

    Raises:
        ValueError: more calls than one event may make.
    """
    frames, count = _join(calls)
    return Outcome(frames + EMPTY_FRAME, count)


def exit_with(
    status: int, body: bytes = b"", headers: Mapping[str, str] | None = None, *calls: Calls
) -> Outcome:
    """
    Answer the client here, after *calls*; nothing goes upstream.

    Raises:
        TypeError, ValueError: a header that cannot be one, a status that is none,
            or more calls than one event may make.
    """
    if not 200 <= status <= 599:
        raise ValueError("an exit needs a final HTTP status")
    frames, count = _join(calls)
    end = METHODS[pdk.EXIT_METHOD].call(pdk.encode_exit(status, body, headers))
    return Outcome(frames + end, count, status)


def _join(calls: Sequence[Calls]) -> tuple[bytes, int]:
    count = sum(part.count for part in calls)
    if count > MAX_CALLS_PER_EVENT:
        raise ValueError("more calls than one event may make")
    return b"".join(bytes(part.frames) for part in calls), count


class PluginInstance(Protocol):
    """One configuration of a plugin, started; used by many events at the same time."""

    @property
    def prefetch(self) -> Sequence[Fetch]:
        """The facts wanted first; read once, at the start."""

    def warm(self, facts: Facts) -> Outcome | None:
        """
        Answer from memory, or None to be asked again through `access`.

        Runs on the loop that serves every connection: no I/O, no lock that is
        held for long, no sleep.

        Args:
            facts: The answers to `prefetch`, in its order.
        """

    def access(self, kong: Kong) -> None:
        """
        Answer with whatever it takes; runs in a pool thread and may block.

        Ends by returning, or by `kong.response.exit`, which does not return.
        Facts that were prefetched are answered from memory. Setting calls leave
        together with the end of the event.
        """

    def close(self) -> None:
        """Let go of everything; no event runs on this instance any more."""


@dataclass(frozen=True, slots=True)
class Patience:
    """
    How long an event may wait for the `access` of another one with the same facts.

    Args:
        within_s: Seconds, counted from its arrival; the server's own deadline is the limit.
        overdue: Makes the answer when that is over, from the event's facts; runs on the loop, like `warm`.
    """

    within_s: float
    overdue: Callable[[Facts], Outcome]


class Coalescing(Protocol):
    """
    What an instance may offer beside `PluginInstance`; found by the method's name.

    While one event of the instance is in the pool, others with the very same facts are parked and
    hold no thread. When its `access` is through, each of them is asked through `warm` again. For
    those that memory cannot answer even then, `access` may have called `kong.share(again)` before
    its end: `again()` makes the answer of one more event, runs on the loop, like `warm`, and
    returns None where that event must run by itself. An exception in `access` is 500 for all.
    Without either, the one that came last runs, and the others wait for it.

    Only an `access` that asked Kong for nothing but the facts can be shared: as soon as it does,
    the others run by themselves.
    """

    def coalesce(self, facts: Facts) -> Patience | None:
        """Say how long an event with these facts may be parked; None for "it must run by itself"."""


class PluginType(Protocol):
    """A plugin: what Kong is told about it, and how to start it."""

    @property
    def name(self) -> str:
        """The name in Kong's configuration."""

    @property
    def version(self) -> str:
        """Dotted version."""

    @property
    def priority(self) -> int:
        """Kong's PRIORITY: the higher the earlier."""

    @property
    def phases(self) -> Sequence[str]:
        """The phases Kong calls; this server runs `access`."""

    @property
    def schema(self) -> Mapping[str, Any]:
        """Kong's schema, `{"name": ..., "fields": [...]}`."""

    def start(self, config: Mapping[str, Any]) -> PluginInstance:
        """
        Start an instance.

        Runs on the loop: may read a file, must not wait for the network. One that
        raises is replaced by an instance that answers 500 to every event, since
        the protocol has no error reply; a plugin that wants to say more returns
        such an instance of its own, with a true `start_again` where another start
        of the same configuration may go better.

        Args:
            config: Kong's JSON, defaults filled in, with `__plugin_id` and its like.
        """

"""
Frames recorded from Kong 3.9.1, replayed: given Kong's bytes, the plugin's come out.

The plugin here mirrors the recorded one. It asks for two headers, and `x-scenario`
says what it does then. Each side's bytes are compared as one stream per
connection, since Kong reads strictly in order: the recorded plugin waited for the
answer to each call, ours pipelines, and the bytes are the same.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from kong_token_exchange.pluginserver import wire
from kong_token_exchange.pluginserver.connection import (
    Abandon,
    Close,
    Connection,
    Deliver,
    Linger,
    RunAccess,
    State,
)
from kong_token_exchange.pluginserver.contract import Calls, Facts, Outcome, exit_with, proceed
from kong_token_exchange.pluginserver.instances import Instance as Started
from kong_token_exchange.pluginserver.offload import Access, Called, Ended, Post
from kong_token_exchange.pluginserver.pdk import METHODS, STRING, Codec, Kong, Method
from tests.protocol.test_contract import frames_of
from tests.support import plugins
from tests.support.plugins import AUTHORIZATION, SCENARIO, Bench, Plugin

RECORDED: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "kong" / "wire-3.9.1-protobuf.json").read_text()
)

EMPTY = Codec("Empty", lambda _: b"", lambda _: None)
HEADERS = {"WWW-Authenticate": 'Bearer error="invalid_token"', "Content-Type": "application/json"}
CONSUMER_ID = "8a388226-80e8-4027-a486-25e4f7db5d21"
CREDENTIAL_ID = "8a388226-80e8-4027-a486-25e4f7db5d22"


def warm(facts: Facts) -> Outcome | None:
    match facts[1]:
        case "":
            return proceed(Calls().set_header("authorization", "Bearer NEW"))
        case "pipeline":
            return proceed(Calls().set_header("authorization", "Bearer PIPELINED"))
        case "exit":
            return exit_with(401, b'{"error":"invalid_token"}', HEADERS)
        case "exit_end":
            return exit_with(401, b"x")
        case "hang":
            return proceed()
    return None


def call_unknown_method(kong: Kong) -> None:
    name = "kong.nope.nope"
    kong.request._caller.call(Method(name, EMPTY, EMPTY, wire.frame(name.encode())), b"")


def survey(kong: Kong) -> None:
    kong.request.get_headers(100)
    kong.request.get_path()
    kong.request.get_method()
    kong.request.get_raw_query()
    kong.request.get_query_arg("access_token")
    kong.request.get_forwarded_host()
    kong.client.get_ip()
    kong.client.get_forwarded_ip()
    kong.router.get_route()
    kong.router.get_service()
    for name in ("request_id", "kong_request_id", "http_cookie"):
        kong.nginx.get_var(name)
    kong.ctx.shared.set("tx", "1")
    assert "1" == kong.ctx.shared.get("tx")
    kong.client.get_consumer()
    kong.client.load_consumer("alice", True)
    kong.client.get_credential()
    kong.log.notice("hello from pb")
    kong.log.set_serialize_value("token_exchange", "x")
    kong.request.get_raw_body()
    captures = "kong.request.get_uri_captures"
    kong.request._caller.call(Method(captures, EMPTY, STRING, wire.frame(captures.encode())), b"")
    kong.node.get_id()
    kong.request.get_scheme()
    kong.request.get_forwarded_scheme()
    kong.service.request.clear_header("x-secret")
    kong.response.set_header("x-resp", "1")
    kong.service.request.set_raw_query("a=1")
    kong.client.authenticate({"id": CONSUMER_ID, "username": "x"}, {"id": CREDENTIAL_ID})
    kong.service.request.set_headers({"x-a": "1", "x-b": "2"})


def access(kong: Kong) -> None:
    if kong.request.get_header("X-Scenario") == "badmethod":
        call_unknown_method(kong)
    survey(kong)


def calls_in(rows: list[dict[str, Any]]) -> list[wire.RpcCall]:
    frames = [bytes.fromhex(row["frame_hex"]) for row in rows if row["from"] == "kong" and "frame_hex" in row]
    return [
        wire.decode_call(frame)
        for frame in frames
        if b"\x12\x06access" in frame or b"token-exchange" in frame
    ]


def starts_in(rows: list[dict[str, Any]]) -> dict[bytes, wire.InstanceStatus]:
    """Return what the recorded plugin answered to each configuration."""
    statuses = [
        wire.decode_return(bytes.fromhex(row["frame_hex"])).instance_status
        for row in rows
        if row["from"] == "plugin" and b"token-exchange" in bytes.fromhex(row.get("frame_hex", ""))
    ]
    configs = [call.config for call in calls_in(rows) if isinstance(call, wire.StartInstance)]
    return {config: status for config, status in zip(configs, statuses, strict=True) if status is not None}


class RecordedIds:
    """Gives each configuration the id it had in the recording; knows those that were started before it."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._starts = starts_in(rows)
        self._by_id: dict[int, Started] = {}
        unknown = {int(row["why"].split()[-1]) for row in rows if "why" in row}
        for call in calls_in(rows):
            if isinstance(call, wire.HandleEvent) and call.instance_id not in unknown:
                self._add(wire.InstanceStatus("token-exchange", call.instance_id))

    def start(self, name: str, config: bytes) -> Started:
        assert "token-exchange" == name
        return self._add(self._starts[config])

    def _add(self, status: wire.InstanceStatus) -> Started:
        plugin = plugins.Instance(prefetch=(AUTHORIZATION, SCENARIO), warm=warm, access=access)
        instance = Started(status.name, plugin)
        instance.instance_id, instance.started_at = status.instance_id, status.started_at
        self._by_id[status.instance_id] = instance
        return instance

    def find(self, instance_id: int) -> Started | None:
        return self._by_id.get(instance_id)

    def close(self, instance_id: int) -> None:
        self._by_id.pop(instance_id, None)

    def expire(self) -> list[Started]:
        return []

    def generation(self) -> int:
        return 0


class Replay:
    """One connection, with `access` run in place: its calls are answered from Kong's recorded frames."""

    def __init__(self, connection: Connection, frames: list[bytes]) -> None:
        self.connection = connection
        self.frames = frames
        self.sent = b""
        self.closed = self.abandoned = False

    def run(self) -> None:
        while self.frames:
            self.step()

    def step(self) -> None:
        if not self.frames:
            # Kong answered no more: it closed the connection.
            self.connection.gone()
        else:
            self.sent += self.connection.receive(wire.frame(self.frames.pop(0)))
        self.act()

    def act(self) -> None:
        while self.connection.actions:
            match self.connection.actions.pop(0):
                case RunAccess(instance, replies):
                    self.pool(instance, replies)
                case Deliver(reply):
                    self.replied.deliver(reply)
                case Abandon():
                    self.abandoned = True
                    self.replied.abandon()
                case Close():
                    self.closed = True
                case Linger():
                    pass

    def pool(self, instance: Started, replies: tuple[bytes, ...]) -> None:
        self.replied = Access(instance, replies, None, self.post)
        self.replied.prepare()
        try:
            access(Kong(self.replied))
        except BaseException as error:
            if not self.abandoned or type(error).__name__ != "EventOverError":
                raise
            return
        self.post(Ended(self.replied, self.replied.success()))

    def post(self, post: Post) -> None:
        if isinstance(post, Called):
            self.sent += self.connection.call(post.frames, post.replies)
            # The thread waits: play Kong's frames until its answer is there.
            while self.replied._inbox.empty():
                self.step()
        elif isinstance(post, Ended):
            self.sent += self.connection.finish(post.outcome)


def by_connection(rows: list[dict[str, Any]], side: str) -> dict[int, list[bytes]]:
    result: dict[int, list[bytes]] = defaultdict(list)
    for row in rows:
        if row["from"] == side and "frame_hex" in row:
            result[row["connection"]].append(bytes.fromhex(row["frame_hex"]))
    return result


def replay(name: str) -> dict[int, Replay]:
    rows = RECORDED[name]
    bench = Bench(Plugin(), registry=RecordedIds(rows))
    replays = {}
    for number, frames in by_connection(rows, "kong").items():
        replays[number] = Replay(bench.connection(), frames)
        replays[number].run()
    return replays


# What our server leaves out on purpose: after an exit nothing follows.
LEFT_OUT = {"exit-401-then-end": [b"", b"\x08\x09"]}


@pytest.mark.parametrize("name", RECORDED)
def test_given_the_frames_of_kong_the_recorded_answers_come_out(name: str) -> None:
    expected = by_connection(RECORDED[name], "plugin")
    for number, played in replay(name).items():
        frames = expected.get(number, [])
        left_out = LEFT_OUT.get(name, [])
        if left_out:
            assert left_out == frames[-len(left_out) :]
            frames = frames[: -len(left_out)]

        assert frames == frames_of(played.sent)


@pytest.mark.parametrize(
    ("name", "number", "state"),
    [
        ("first-event-starts-instance", 1, State.IDLE),
        ("pipelined-set-header", 1, State.IDLE),
        ("exit-401", 1, State.DRAINING),
        ("exit-401-then-end", 2, State.DRAINING),
        ("unknown-method", 3, State.DEAD),
        ("pdk-survey-post", 4, State.IDLE),
        ("server-killed-then-unknown-instance", 1, State.DEAD),
        ("server-killed-then-unknown-instance", 2, State.IDLE),
    ],
)
def test_recorded_conversation_leaves_the_connection_in_its_state(
    name: str, number: int, state: State
) -> None:
    played = replay(name)[number]

    assert state == played.connection.state
    assert (state is State.DEAD) == played.closed


def test_the_recording_covers_both_orders_of_fields() -> None:
    events = [
        bytes.fromhex(row["frame_hex"])
        for rows in RECORDED.values()
        for row in rows
        if row["from"] == "kong"
        and b"access" in bytes.fromhex(row.get("frame_hex", ""))
        and "a202" in row["frame_hex"]
    ]
    starts = {frame[:1] for frame in events if len(frame) < 30}

    assert {b"\x08", b"\xa2"} == starts


def test_every_recorded_method_is_in_the_table_but_the_one_that_does_not_exist() -> None:
    sent = {
        bytes.fromhex(row["frame_hex"])
        for rows in RECORDED.values()
        for row in rows
        if row["from"] == "plugin" and "frame_hex" in row
    }
    names = {frame.decode() for frame in sent if frame.startswith(b"kong.")}

    assert {"kong.nope.nope", "kong.request.get_uri_captures"} == names - set(METHODS)

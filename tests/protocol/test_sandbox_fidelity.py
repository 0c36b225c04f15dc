"""
Given the plugin's recorded frames, the sandbox gateway sends what Kong 3.9.1 sent.

A player takes the plugin's part on a real unix socket: it sends the recorded plugin frames
verbatim and compares each frame of the gateway with the recorded one. Decoded frames must be
equal, sequence numbers and instance ids included; left out are `__*` members, the order of
members, and what is new in every Kong: clocks, random ids.
"""

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kong_token_exchange.pluginserver import wire
from kong_token_exchange.sandbox.gateway import SandboxGateway
from kong_token_exchange.sandbox.upstream import EchoUpstream
from tests.unit.sandbox.scripted import TIMEOUT_S, Answer, HttpClient, PluginSide

VECTORS: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[1] / "vectors/kong/wire-3.9.1-protobuf.json").read_text()
)

# The plugin that was recorded, as far as its configuration shows.
FIELDS = [
    {"issuer": {"type": "string", "required": True, "referenceable": True}},
    {"client_id": {"type": "array", "elements": {"type": "string"}}},
    {"client_secret": {"type": "array", "elements": {"type": "string", "referenceable": True}}},
    {"timeout": {"type": "number", "default": 10000}},
    {"leeway": {"type": "number", "default": 0}},
    {"scenario": {"type": "string", "default": "normal"}},
    {"unset": {"type": "string"}},
    {
        "token_exchange": {
            "type": "record",
            "fields": [
                {
                    "request": {
                        "type": "record",
                        "required": True,
                        "fields": [
                            {"empty_scopes": {"type": "boolean", "default": False}},
                            {"scopes": {"type": "array", "elements": {"type": "string"}}},
                        ],
                    }
                },
                {
                    "cache": {
                        "type": "record",
                        "required": True,
                        "fields": [
                            {"enabled": {"type": "boolean", "default": True}},
                            {"ttl": {"type": "number"}},
                        ],
                    }
                },
                {
                    "subject_token_issuers": {
                        "type": "array",
                        "elements": {
                            "type": "record",
                            "fields": [
                                {"issuer": {"type": "string", "required": True}},
                                {"verify_signature": {"type": "boolean", "default": True}},
                                {
                                    "conditions": {
                                        "type": "record",
                                        "fields": [{"has_scopes": {"type": "array"}}],
                                    }
                                },
                            ],
                        },
                    }
                },
            ],
        }
    },
]

DESCRIPTION = {
    "Protocol": "ProtoBuf:1",
    "Plugins": [
        {
            "Name": "token-exchange",
            "Version": "1",
            "Priority": 1050,
            "Phases": ["access"],
            "Schema": {
                "name": "token-exchange",
                "fields": [{"config": {"type": "record", "fields": FIELDS}}],
            },
        }
    ],
}

UPSTREAM_PORT = 19001


def kong_yml(issuer: str, secret: str, client_id: str = "kong", **entry: Any) -> dict[str, Any]:
    config = {
        "issuer": issuer,
        "client_id": [client_id],
        "client_secret": [secret],
        "token_exchange": {"subject_token_issuers": [{"issuer": "https://a.example", **entry}]},
    }
    route = {
        "id": "4726a05a-d550-537e-9fc3-a07c7a1188c7",
        "name": "r1",
        "paths": ["/a"],
        "plugins": [{"name": "token-exchange", "config": config}],
    }
    service = {
        "id": "adbd70b3-4224-5183-a52a-179d7b34ab5b",
        "name": "echo",
        "url": f"http://127.0.0.1:{UPSTREAM_PORT}",
        "routes": [route],
    }
    alice = {"id": "b32379d9-3d28-5683-a79c-72139be6e34f", "username": "alice"}
    return {"_format_version": "3.0", "services": [service], "consumers": [alice]}


VAULT = kong_yml("{vault://env/te-issuer}", "{vault://env/te-secret}")
PLAIN = kong_yml("https://b.example", "secret", conditions={})
CHANGED = kong_yml("https://b.example", "secret", "kong2", conditions={})


# --- comparing ------------------------------------------------------------------------


def without_private(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_private(item) for name, item in value.items() if not name.startswith("__")}
    return [without_private(item) for item in value] if isinstance(value, list) else value


def same_call(recorded: bytes, sent: bytes) -> bool:
    wanted, got = wire.decode_call(recorded), wire.decode_call(sent)
    if isinstance(wanted, wire.StartInstance) and isinstance(got, wire.StartInstance):
        same_config = without_private(json.loads(wanted.config)) == without_private(json.loads(got.config))
        private = {name for name in json.loads(wanted.config) if name.startswith("__")}
        assert private == {name for name in json.loads(got.config) if name.startswith("__")}
        return same_config and (wanted.sequence, wanted.name) == (got.sequence, got.name)
    return wanted == got


def entity(payload: bytes) -> list[tuple[int, Any]]:
    """The fields of a Route, Service or Consumer in any order, without the clock's."""
    return sorted((number, value) for number, value in wire.read_fields(payload) if number not in (2, 3))


def consumer(payload: bytes) -> list[tuple[int, Any]]:
    return sorted((number, value) for number, value in wire.read_fields(payload) if number != 2)


def shape(pattern: str):
    return lambda payload: bool(re.fullmatch(pattern, wire.decode_string(payload)))


COMPARED_BY = {
    "kong.request.get_headers": wire.decode_struct,
    "kong.router.get_route": entity,
    "kong.router.get_service": entity,
    "kong.client.load_consumer": consumer,
    "kong.node.get_id": shape(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
    "kong.nginx.get_var request_id": shape(r"[0-9a-f]{32}"),
    "kong.nginx.get_var kong_request_id": shape(r"[0-9a-f]{32}"),
}


def same_reply(method: bytes, arguments: bytes, recorded: bytes, sent: bytes) -> bool:
    name = method.decode()
    if name == "kong.nginx.get_var":
        name += " " + wire.decode_string(arguments)
    look = COMPARED_BY.get(name, bytes)
    return look(recorded) == look(sent)


# --- playing --------------------------------------------------------------------------


@dataclass(frozen=True)
class Played:
    answer: Answer
    upstream_headers: dict[str, list[str]] | None
    upstream_target: str | None
    compared: int


class Player:
    """Plays the plugin's part of recorded scenarios."""

    def __init__(self, gateway: SandboxGateway, upstream: EchoUpstream, listener: socket.socket) -> None:
        self.gateway, self.upstream, self._listener = gateway, upstream, listener
        self._sides: dict[int, PluginSide] = {}
        self._latest: PluginSide | None = None
        self._asked = (b"", b"")
        self._http = ThreadPoolExecutor(1)

    def play(self, name: str, request: bytes) -> Played:
        self.upstream.log.clear()
        answered = self._http.submit(self._ask, request)
        frames = list(VECTORS[name])
        compared = 0
        while frames:
            plugin_said = []
            while frames and frames[0]["from"] == "plugin" and "frame_hex" in frames[0]:
                plugin_said.append(frames.pop(0))
            if plugin_said:
                self._speak(plugin_said, answered if name == "read-timeout" else None)
                continue
            compared += self._expect(frames.pop(0))
        return self._outcome(answered.result(TIMEOUT_S), compared)

    def _ask(self, request: bytes) -> Answer:
        with HttpClient(self.gateway.url) as client:
            client.send(request)
            return client.answer()

    def _speak(self, items: list[dict[str, Any]], after: Future[Answer] | None) -> None:
        """Send what the plugin sent, in one go: the gateway must not depend on pieces."""
        payloads = [bytes.fromhex(item["frame_hex"]) for item in items]
        if len(payloads) >= 2:
            self._asked = (payloads[0], payloads[1])
        if after is not None and payloads[0] == b"":
            # The plugin woke up long after Kong had given up.
            after.result(TIMEOUT_S)
            assert self._sides[items[0]["connection"]].read() is None
            return
        self._sides[items[0]["connection"]].write(*payloads)

    def _expect(self, item: dict[str, Any]) -> int:
        if item["from"] == "plugin":
            assert self._latest is not None
            self._latest.close()
            return 0
        if item.get("opened"):
            accepted, _ = self._listener.accept()
            self._latest = self._sides[item["connection"]] = PluginSide(accepted, item["connection"])
            return 0
        side = self._latest = self._sides[item["connection"]]
        sent = side.read()
        if item.get("closed"):
            assert sent is None
            return 0
        recorded = bytes.fromhex(item["frame_hex"])
        assert sent is not None
        if self._asked[0]:
            assert same_reply(*self._asked, recorded, sent), (self._asked, recorded, sent)
            self._asked = (b"", b"")
        elif recorded:
            assert same_call(recorded, sent), (recorded, sent)
        else:
            assert sent == b""  # the late reply to a pipelined call
        return 1

    def _outcome(self, answer: Answer, compared: int) -> Played:
        self._asked = (b"", b"")
        request = self.upstream.log.last()
        if request is None:
            return Played(answer, None, None, compared)
        headers: dict[str, list[str]] = {}
        for name, value in request.headers:
            headers.setdefault(name.lower(), []).append(value)
        return Played(answer, headers, request.target, compared)

    def lose_connection(self, number: int) -> None:
        """Die as a killed server does, and wait until the gateway has noticed."""
        self._sides[number].close()
        deadline = time.monotonic() + TIMEOUT_S
        while any(connection.reusable for connection in list(self.gateway._core.client.pool._idle)):
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def close(self) -> None:
        self._http.shutdown()
        for side in self._sides.values():
            side.close()


@contextlib.contextmanager
def playing(path: Path, config: dict[str, Any], read_timeout_s: float = 30.0) -> Iterator[Player]:
    with socket.socket(socket.AF_UNIX) as listener, EchoUpstream() as upstream:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(TIMEOUT_S)
        gateway = SandboxGateway(
            config,
            plugin_command=None,
            description=DESCRIPTION,
            socket_path=path,
            resolve={f"127.0.0.1:{UPSTREAM_PORT}": upstream.address},
            read_timeout_s=read_timeout_s,
            environ={},
        )
        gateway.start(wait=False)
        player = Player(gateway, upstream, listener)
        try:
            yield player
        finally:
            gateway.stop()
            player.close()


# --- the requests that were recorded --------------------------------------------------


def request(*headers: str, start: str = "GET /a/x HTTP/1.1", body: str = "") -> bytes:
    lines = [start, "Host: 127.0.0.1:18000", "User-Agent: curl/7.88.1", "Accept: */*", *headers, "", body]
    return "\r\n".join(lines).encode()


OLD = "Authorization: Bearer OLD"
LARGE = "Bearer " + wire.decode_string(bytes.fromhex(VECTORS["large-token"][3]["frame_hex"])).removeprefix(
    "Bearer "
)
FORM = "access_token=b1&x=y"

REQUESTS = {
    "first-event-starts-instance": request(OLD),
    "get-and-set-header": request(OLD),
    "pipelined-set-header": request(OLD, "X-Scenario: pipeline"),
    "no-authorization-header": request(),
    "large-token": request(f"Authorization: {LARGE}"),
    "exit-401": request(OLD, "X-Scenario: exit"),
    "exit-401-then-end": request(OLD, "X-Scenario: exit_end"),
    "unknown-method": request(OLD, "X-Scenario: badmethod"),
    "pdk-survey": request(
        OLD, "X-Scenario: survey", "Cookie: access_token=c1", start="GET /a/x?access_token=q1 HTTP/1.1"
    ),
    "pdk-survey-post": request(
        OLD,
        "X-Scenario: survey",
        f"Content-Length: {len(FORM)}",
        "Content-Type: application/x-www-form-urlencoded",
        start="POST /a/y?access_token=q1 HTTP/1.1",
        body=FORM,
    ),
}

SURVEY = {"x-a": ["1"], "x-b": ["2"], "authorization": ["Bearer OLD"]}

# Scenario: status, what the upstream got (None: nothing).
OUTCOMES: dict[str, tuple[int, dict[str, list[str]] | None]] = {
    "first-event-starts-instance": (200, {"authorization": ["Bearer NEW"]}),
    "get-and-set-header": (200, {"authorization": ["Bearer NEW"]}),
    "pipelined-set-header": (200, {"authorization": ["Bearer PIPELINED"]}),
    "no-authorization-header": (200, {"authorization": ["Bearer NEW"]}),
    "large-token": (200, {"authorization": ["Bearer NEW"]}),
    "exit-401": (401, None),
    "exit-401-then-end": (401, None),
    "unknown-method": (500, None),
    "pdk-survey": (200, SURVEY),
    "pdk-survey-post": (200, SURVEY),
}


@pytest.fixture(scope="module")
def first_run(tmp_path_factory) -> dict[str, Played]:
    """The scenarios of the first recording, in their order: later ones use earlier connections."""
    path = tmp_path_factory.mktemp("first") / "plugin.socket"
    with playing(path, VAULT) as player:
        return {name: player.play(name, wanted) for name, wanted in REQUESTS.items()}


@pytest.mark.parametrize("name", REQUESTS)
def test_gateway_sends_what_kong_sent(first_run, name):
    played = first_run[name]
    status, headers = OUTCOMES[name]

    assert played.answer.status == status
    if headers is None:
        assert played.upstream_headers is None
    else:
        assert played.upstream_headers is not None
        assert {wanted: played.upstream_headers.get(wanted) for wanted in headers} == headers
    frames = [item for item in VECTORS[name] if item["from"] == "kong" and "frame_hex" in item]
    assert played.compared == len(frames)


def test_survey_changed_the_request_and_the_answer_as_kong_did(first_run):
    played = first_run["pdk-survey"]

    assert played.upstream_target == "/x?a=1"
    assert played.answer["x-resp"] == "1"


def test_exit_gives_the_client_status_headers_and_body(first_run):
    answer = first_run["exit-401"].answer

    assert (answer["www-authenticate"], answer["content-type"]) == (
        'Bearer error="invalid_token"',
        "application/json",
    )
    assert answer.body == b'{"error":"invalid_token"}'


def test_unknown_method_is_kongs_500(first_run):
    body = json.loads(first_run["unknown-method"].answer.body)

    assert body["message"] == "An unexpected error occurred"
    assert re.fullmatch(r"[0-9a-f]{32}", body["request_id"])


def test_read_timeout_is_500_and_the_connection_is_given_up(tmp_path):
    with playing(tmp_path / "plugin.socket", VAULT, read_timeout_s=1.0) as player:
        # The recording goes on on a connection that was opened long before, and at event 13.
        player.gateway._core.client._message_id = 0
        player.play("first-event-starts-instance", REQUESTS["first-event-starts-instance"])
        player._sides[4] = player._sides[1]
        player.gateway._core.client._message_id = 11
        played = player.play("read-timeout", request(OLD, "X-Scenario: hang"))

    assert played.answer.status == 500
    assert played.upstream_headers is None


def test_instances_are_started_again_and_closed_after_any_change_as_kong_does(tmp_path):
    with playing(tmp_path / "plugin.socket", PLAIN) as player:
        wanted = request(OLD)
        started = player.play("instance-start", wanted)
        player.gateway.reload(PLAIN)
        unrelated = player.play("unrelated-plugin-added-instance-restarts", wanted)
        player.gateway.reload(CHANGED)
        changed = player.play("own-config-changed-instance-restarts", wanted)
        player.lose_connection(1)
        killed = player.play("server-killed-then-unknown-instance", wanted)

    for played in (started, unrelated, changed, killed):
        assert played.answer.status == 200
        assert played.upstream_headers is not None
        assert played.upstream_headers["authorization"] == ["Bearer NEW"]
    assert [played.compared for played in (started, unrelated, changed, killed)] == [5, 6, 6, 6]


def test_every_recorded_scenario_is_played():
    played = {*REQUESTS, "read-timeout", "instance-start", "unrelated-plugin-added-instance-restarts"}
    played |= {"own-config-changed-instance-restarts", "server-killed-then-unknown-instance"}

    assert played == set(VECTORS)

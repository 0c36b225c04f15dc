"""
The conversation as a state machine: bytes in, bytes and actions out.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from kong_token_exchange.errors import LocalProtocolError
from kong_token_exchange.pluginserver import wire
from kong_token_exchange.pluginserver.connection import (
    TRANSITIONS,
    Abandon,
    Close,
    Connection,
    Deliver,
    Limits,
    Linger,
    RunAccess,
    State,
    Trigger,
)
from kong_token_exchange.pluginserver.contract import Calls, Facts, Fetch, Outcome, exit_with, proceed
from tests.protocol.test_contract import frames_of
from tests.support.fake_kong import KongSide, Step
from tests.support.plugins import AUTHORIZATION, SCENARIO, Bench, Instance, Plugin

REPLACED = proceed(Calls().set_header("authorization", "Bearer NEW").clear_header("x-token"))
REFUSED = exit_with(401, b"{}", {"WWW-Authenticate": "Bearer"})
GET_AUTHORIZATION = wire.frame(b"kong.request.get_header") + wire.frame(b"\x0a\x0dauthorization")
ANSWER = wire.frame(wire.encode_string("Bearer OLD"))


def event_of(instance_id: int, sequence: int = 2, phase: str = "access") -> bytes:
    return wire.frame(wire.encode_call(wire.HandleEvent(sequence, instance_id, phase)))


def turned(framed: bytes) -> bytes:
    """Return an event's frame with the command before the sequence."""
    payload = framed[4:]
    cut = payload.index(b"\xa2\x02")
    return wire.frame(payload[cut:] + payload[:cut])


def ending(outcome: Outcome, sequence: int = 2) -> bytes:
    return outcome.frames + wire.frame(wire.encode_return(sequence))


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def feed(connection: Connection, data: bytes, size: int = 0) -> bytes:
    return b"".join(connection.receive(piece) for piece in pieces(data, size or max(1, len(data))))


def talk(connection: Connection, side: KongSide, instance_id: int, size: int = 0) -> None:
    """Run one event between the two machines until neither has anything to say."""
    out = feed(connection, side.begin(instance_id), size)
    while out:
        out = feed(connection, side.receive(out), size)


class Seen:
    """A plugin whose `warm` returns what it is told, and keeps the facts it was given."""

    def __init__(self, outcome: Any = REPLACED, **parts: Any) -> None:
        self.outcome = outcome
        self.facts: list[list[Any]] = []
        self.bench = Bench(Plugin(warm=self.warm, **parts))
        self.connection = self.bench.connection()
        self.instance_id = self.bench.start()

    def warm(self, facts: Facts) -> Any:
        self.facts.append(list(facts))
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


# --- the warm path --------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 7, 11])
def test_warm_event_is_fetch_then_calls_and_end_in_one_send(size: int) -> None:
    seen = Seen()
    connection = seen.connection

    assert GET_AUTHORIZATION == feed(connection, event_of(seen.instance_id), size)
    assert State.WAIT_REPLY == connection.state
    assert ending(REPLACED) == feed(connection, ANSWER, size)
    assert State.IDLE == connection.state
    assert [["Bearer OLD"]] == seen.facts
    assert [] == connection.actions


@pytest.mark.parametrize("size", [0, 1, 3, 10])
@pytest.mark.parametrize("turn", [lambda framed: framed, turned], ids=["sequence-first", "command-first"])
def test_pipelined_answers_are_skipped_before_the_next_event(size: int, turn: Any) -> None:
    seen = Seen()
    connection = seen.connection
    for sequence in (2, 3, 127, 128, 300, 2**31, 2**62):
        feed(connection, turn(event_of(seen.instance_id, sequence)), size)
        assert ending(REPLACED, sequence) == feed(connection, ANSWER, size)
        assert b"" == feed(connection, wire.EMPTY_FRAME * 2, size)

    assert 7 == len(seen.facts)


@pytest.mark.parametrize("cut", range(12))
def test_skipped_answers_and_next_event_may_arrive_together_cut_anywhere(cut: int) -> None:
    seen = Seen()
    connection = seen.connection
    feed(connection, event_of(seen.instance_id) + ANSWER)
    data = wire.EMPTY_FRAME * 2 + event_of(seen.instance_id, 3)

    out = connection.receive(data[:cut]) + connection.receive(data[cut:])

    assert GET_AUTHORIZATION == out


def test_event_without_prefetch_is_answered_at_once() -> None:
    seen = Seen(prefetch=())

    assert ending(REPLACED) == seen.connection.receive(event_of(seen.instance_id))
    assert [[]] == seen.facts


@pytest.mark.parametrize("size", [0, 1, 6])
def test_several_facts_are_fetched_in_one_write_and_answered_in_order(size: int) -> None:
    seen = Seen(prefetch=(AUTHORIZATION, Fetch("kong.request.get_headers"), Fetch("kong.router.get_route")))
    steps = [
        Step("kong.request.get_header", "authorization", "a"),
        Step("kong.request.get_headers", 100, {"x": ["1", "2"]}),
        Step("kong.router.get_route", None),
    ]
    side = KongSide(steps)
    talk(seen.connection, side, seen.instance_id, size)

    assert [["a", {"x": ["1", "2"]}, None]] == seen.facts
    assert "success" == side.done.ended


def test_outcome_is_sent_as_it_is_each_time() -> None:
    seen = Seen()
    outs = set()
    for _ in range(3):
        feed(seen.connection, event_of(seen.instance_id))
        outs.add(feed(seen.connection, ANSWER))
        feed(seen.connection, wire.EMPTY_FRAME * 2)

    assert {ending(REPLACED)} == outs


def test_sequence_zero_is_answered_with_an_empty_return() -> None:
    seen = Seen(prefetch=())

    assert REPLACED.frames + wire.EMPTY_FRAME == seen.connection.receive(event_of(seen.instance_id, 0))


def test_an_event_is_remembered_and_forgotten_with_its_instance() -> None:
    seen = Seen(prefetch=())
    host, connection = seen.bench.host, seen.connection
    for sequence in (2, 3):
        connection.receive(event_of(seen.instance_id, sequence))
        connection.receive(wire.EMPTY_FRAME * 2)
        connection.receive(turned(event_of(seen.instance_id, sequence)))
        connection.receive(wire.EMPTY_FRAME * 2)
    assert 1 == len(host.events)

    registry: Any = seen.bench.registry
    registry.close(seen.instance_id)
    registry._grace_s = 0.0
    assert 1 == len(host.expire())
    assert {} == host.events
    connection.receive(event_of(seen.instance_id))
    assert [Close()] == connection.actions


def test_known_events_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kong_token_exchange.pluginserver.connection._MAX_KNOWN_EVENTS", 3)
    seen = Seen(prefetch=(), outcome=proceed())
    for number in range(10):
        instance_id = seen.bench.start(b'{"n":%d}' % number)
        assert ending(proceed()) == seen.connection.receive(event_of(instance_id))

    assert len(seen.bench.host.events) <= 3


@pytest.mark.parametrize(
    "payload",
    [
        # The sequence's own bytes look like the command's tag: 0x08 0xa2 0x02 is 290.
        b"\x08\xa2\x02" + b"\xa2\x02",
        b"\x08\x02" + b"\xa2\x02",
    ],
)
def test_sequence_that_looks_like_the_command_tag_is_read_right(payload: bytes) -> None:
    seen = Seen(prefetch=(), outcome=proceed())
    body = wire.encode_call(wire.HandleEvent(0, seen.instance_id, "access"))[2:]
    sequence = wire.decode_call(payload + body).sequence
    for _ in range(3):
        assert ending(proceed(), sequence) == seen.connection.receive(wire.frame(payload + body))


def test_odd_but_valid_encodings_of_an_event_are_answered() -> None:
    seen = Seen(prefetch=(), outcome=proceed())
    call = wire.encode_call(wire.HandleEvent(0, seen.instance_id, "access"))
    seen.connection.receive(wire.frame(b"\x08\x02" + call))  # known from here on
    for payload, sequence in [
        (b"\x08\x82\x80\x00" + call, 2),  # a varint longer than needed
        (b"\x08\x05\x08\x07" + call, 7),  # the last one counts
        (b"\x10\x01\x08\x07" + call, 7),  # an unknown field
        (call + b"\x08\x07\x10\x01", 7),
    ]:
        out = seen.connection.receive(wire.frame(payload))
        assert out.startswith(wire.EMPTY_FRAME)
        assert sequence == wire.decode_return(frames_of(out)[1]).sequence


def test_known_event_behind_a_cut_sequence_is_no_event() -> None:
    seen = Seen(prefetch=(), outcome=proceed())
    call = wire.encode_call(wire.HandleEvent(0, seen.instance_id, "access"))
    for _ in range(2):
        assert ending(proceed()) == seen.connection.receive(wire.frame(b"\x08\x02" + call))

    assert seen.bench.faults.server_error.frames == seen.connection.receive(wire.frame(b"\x08\x82" + call))


def test_tag_inside_another_field_is_not_learnt_as_an_event() -> None:
    seen = Seen(prefetch=(), outcome=proceed())
    call = wire.encode_call(wire.HandleEvent(0, seen.instance_id, "access"))
    hidden = b"\xa2\x02\x00\x00" + call
    assert ending(proceed()) == seen.connection.receive(wire.frame(b"\x08\x02\x12\x04" + hidden))

    assert seen.bench.faults.server_error.frames == seen.connection.receive(wire.frame(b"\x08\x02" + hidden))


# --- commands -------------------------------------------------------------------------


def returned(out: bytes) -> wire.RpcReturn:
    (payload,) = frames_of(out)
    return wire.decode_return(payload)


def test_start_is_answered_with_the_id_and_close_with_the_sequence() -> None:
    seen = Seen()
    connection = seen.connection
    start = wire.StartInstance(7, "test-plugin", b'{"a":1}')
    status = returned(connection.receive(wire.frame(wire.encode_call(start)))).instance_status

    assert status is not None
    assert ("test-plugin", True) == (status.name, status.started_at > 0)
    assert {"a": 1} == seen.bench.plugin.started[-1]
    close = wire.CloseInstance(8, status.instance_id)
    assert wire.RpcReturn(8) == returned(connection.receive(wire.frame(wire.encode_call(close))))
    assert State.IDLE == connection.state


def test_closing_an_unknown_instance_is_answered() -> None:
    seen = Seen()
    call = wire.frame(wire.encode_call(wire.CloseInstance(8, 99)))

    assert wire.RpcReturn(8) == returned(seen.connection.receive(call))


def test_command_that_cannot_be_carried_out_closes_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, config: bytes) -> None:
        raise MemoryError

    seen = Seen()
    monkeypatch.setattr(seen.bench.registry, "start", fail)

    assert b"" == seen.connection.receive(wire.frame(wire.encode_call(wire.StartInstance(3, "p", b"{}"))))
    assert (State.DEAD, [Close()]) == (seen.connection.state, seen.connection.actions)
    assert "a command failed: MemoryError" in seen.bench.lines


def test_status_names_and_info_are_answered() -> None:
    seen = Seen()

    def ask(call: wire.RpcCall) -> bytes:
        (payload,) = frames_of(seen.connection.receive(wire.frame(wire.encode_call(call))))
        return payload

    found = wire.decode_return(ask(wire.GetInstanceStatus(3, seen.instance_id))).instance_status
    assert found is not None
    assert seen.instance_id == found.instance_id
    assert wire.RpcReturn(4) == wire.decode_return(ask(wire.GetInstanceStatus(4, 99)))
    plugin = seen.bench.plugin
    assert wire.encode_plugin_names(5, ["test-plugin"]) == ask(wire.GetPluginNames(5))
    info = wire.PluginInfo("test-plugin", ["access"], "1.2.3", 1050, '{"name": "test-plugin", "fields": []}')
    assert wire.encode_plugin_info(6, info) == ask(wire.GetPluginInfo(6, plugin.name))


def test_commands_may_be_sent_one_after_the_other() -> None:
    seen = Seen()
    calls = [wire.StartInstance(n, "test-plugin", b"{}") for n in range(3, 6)]
    out = seen.connection.receive(b"".join(wire.frame(wire.encode_call(call)) for call in calls))

    assert [3, 4, 5] == [wire.decode_return(payload).sequence for payload in frames_of(out)]


# --- ends that are not success --------------------------------------------------------


def test_exit_leaves_nothing_to_read_and_waits_for_end_of_file() -> None:
    seen = Seen(REFUSED)
    connection = seen.connection
    connection.receive(event_of(seen.instance_id))

    assert REFUSED.frames == connection.receive(ANSWER)
    assert (State.DRAINING, [Linger()]) == (connection.state, connection.actions)
    connection.actions.clear()
    assert b"" == connection.receive(event_of(seen.instance_id) + b"junk\xff\xff\xff\xff")
    connection.gone()
    assert (State.DEAD, [Close()]) == (connection.state, connection.actions)
    assert b"" == connection.receive(ANSWER)


def test_gw_06_unknown_instance_is_the_one_event_that_closes() -> None:
    seen = Seen()

    assert b"" == seen.connection.receive(event_of(seen.instance_id ^ 1))
    assert (State.DEAD, [Close()]) == (seen.connection.state, seen.connection.actions)


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), SystemExit(1), KeyboardInterrupt(), RecursionError(), MemoryError(), GeneratorExit()],
    ids=lambda error: type(error).__name__,
)
def test_gw_02_exception_in_warm_is_the_constant_500(error: BaseException) -> None:
    seen = Seen(error)
    seen.connection.receive(event_of(seen.instance_id))

    assert seen.bench.faults.server_error.frames == seen.connection.receive(ANSWER)
    assert State.DRAINING == seen.connection.state
    assert f"warm failed: {type(error).__name__}" in seen.bench.lines


@pytest.mark.parametrize("outcome", ["text", b"bytes", True, 0, object()])
def test_answer_that_is_no_outcome_is_the_constant_500(outcome: object) -> None:
    seen = Seen(outcome)
    seen.connection.receive(event_of(seen.instance_id))

    assert seen.bench.faults.server_error.frames == seen.connection.receive(ANSWER)


@pytest.mark.parametrize("reply", [b"\x0a\x05abc", b"\x08\x01", b"\xff", b"\x0b"])
def test_undecodable_fact_is_500_and_never_a_close(reply: bytes) -> None:
    seen = Seen()
    seen.connection.receive(event_of(seen.instance_id))

    assert seen.bench.faults.server_error.frames == seen.connection.receive(wire.frame(reply))
    assert [Linger()] == seen.connection.actions
    assert [] == seen.facts


def test_phase_this_server_does_not_run_is_500() -> None:
    seen = Seen()

    out = seen.connection.receive(event_of(seen.instance_id, phase="rewrite"))

    assert seen.bench.faults.server_error.frames == out


NO_COMMANDS = {
    "empty-frame": b"",
    "http": b"GET / HTTP/1.1",
    "no-command": b"\x08\x05",
    "unknown-command": b"\x08\x01\xaa\x02\x00",
    "event-cut": b"\xa2\x02",
    "event-length-cut": b"\xa2\x02\x0c\x12",
    "event-body-broken": b"\x08\x01\xa2\x02\x01\xff",
}


@pytest.mark.parametrize("payload", NO_COMMANDS.values(), ids=NO_COMMANDS)
def test_what_is_no_command_is_answered_with_500_and_not_closed(payload: bytes) -> None:
    seen = Seen()

    out = seen.connection.receive(wire.frame(payload))

    assert seen.bench.faults.server_error.frames == out
    assert (State.DRAINING, [Linger()]) == (seen.connection.state, seen.connection.actions)


def test_raw_bytes_are_facts_like_any_other() -> None:
    seen = Seen()
    raw = b"Bearer evil\xff\xfe"
    seen.connection.receive(event_of(seen.instance_id))
    out = seen.connection.receive(wire.frame(b"\x0a" + bytes([len(raw)]) + raw))

    assert ending(REPLACED) == out
    assert [[raw.decode("utf-8", "surrogateescape")]] == seen.facts


# --- limits ---------------------------------------------------------------------------

LIMITS = Limits(command_bytes=200_000, reply_bytes=100_000, drain_bytes=1_000_000)


class Limited(Seen):
    def __init__(self, outcome: Any = REPLACED) -> None:
        super().__init__(outcome)
        self.bench = Bench(self.bench.plugin, limits=LIMITS)
        self.connection = self.bench.connection()
        self.instance_id = self.bench.start()


def text_frame(size: int) -> bytes:
    """Return a String answer whose payload has exactly *size* bytes."""
    return wire.frame(b"\x0a" + wire.encode_varint(size - 4) + b"x" * (size - 4))


@pytest.mark.parametrize("size", [0, 1000, 65536])
@pytest.mark.parametrize(("length", "accepted"), [(99_999, True), (100_000, True), (100_001, False)])
def test_answer_above_the_limit_is_read_away_and_answered_400(size: int, length: int, accepted: bool) -> None:
    seen = Limited()
    seen.connection.receive(event_of(seen.instance_id))

    data = text_frame(length)
    assert b"" == feed(seen.connection, data[:-1], size)
    out = seen.connection.receive(data[-1:])

    assert out == (ending(REPLACED) if accepted else seen.bench.faults.too_large.frames)
    assert (1 if accepted else 0) == len(seen.facts)


def test_res_10_answer_above_the_limit_holds_no_memory() -> None:
    seen = Limited()
    seen.connection.receive(event_of(seen.instance_id))
    feed(seen.connection, text_frame(900_000)[:-1], 65536)

    assert 0 == len(seen.connection._held)


def test_what_follows_an_over_long_answer_is_drained() -> None:
    seen = Limited()
    seen.connection.receive(event_of(seen.instance_id))
    out = feed(seen.connection, text_frame(150_000) + event_of(seen.instance_id), 65536)

    assert seen.bench.faults.too_large.frames == out
    assert State.DRAINING == seen.connection.state


def test_rest_of_an_over_long_answer_after_the_end_of_its_event_says_nothing() -> None:
    seen = Limited()
    seen.connection.receive(event_of(seen.instance_id))
    data = text_frame(150_000)
    seen.connection.receive(data[:70_000])
    assert seen.bench.faults.server_error.frames == seen.connection.fail()

    assert b"" == feed(seen.connection, data[70_000:] + ANSWER, 65536)


@pytest.mark.parametrize("whole", [True, False])
def test_over_long_answer_to_a_pipelined_call_is_skipped_too(whole: bool) -> None:
    seen = Limited()
    feed(seen.connection, event_of(seen.instance_id) + ANSWER)
    data = text_frame(150_000) + wire.EMPTY_FRAME

    assert b"" == feed(seen.connection, data, 0 if whole else 65536)
    assert GET_AUTHORIZATION == seen.connection.receive(event_of(seen.instance_id, 3))


def start_of_size(size: int) -> bytes:
    def start(padding: int) -> bytes:
        return wire.encode_call(wire.StartInstance(3, "test-plugin", b" " * padding + b"{}"))

    call = start(size - (len(start(150_000)) - 150_000))
    assert size == len(call)
    return wire.frame(call)


@pytest.mark.parametrize("size", [0, 65536])
def test_start_at_the_limit_is_served(size: int) -> None:
    seen = Limited()

    assert 3 == returned(feed(seen.connection, start_of_size(200_000), size)).sequence


@pytest.mark.parametrize("size", [0, 65536])
def test_start_above_the_limit_is_refused_by_closing(size: int) -> None:
    # No event is that long, and Kong does not repeat an instance start.
    seen = Limited()

    assert b"" == feed(seen.connection, start_of_size(200_001), size)
    assert (State.DEAD, [Close()]) == (seen.connection.state, seen.connection.actions)


def test_length_that_is_no_length_is_answered_at_once() -> None:
    seen = Limited()
    seen.connection.receive(event_of(seen.instance_id))

    assert seen.bench.faults.server_error.frames == seen.connection.receive(b"HTTP/1.1 400")


def test_limit_too_low_to_hold_is_refused() -> None:
    with pytest.raises(ValueError):
        Limits(reply_bytes=1000)


# --- events in the pool ---------------------------------------------------------------


class Pooled(Seen):
    """An event that is in the pool."""

    def __init__(self) -> None:
        super().__init__(None, prefetch=(AUTHORIZATION, SCENARIO))
        feed(self.connection, event_of(self.instance_id) + ANSWER + wire.EMPTY_FRAME)
        self.first = list(self.connection.actions)
        self.connection.actions.clear()


def test_event_without_warm_answer_goes_to_the_pool_with_its_facts() -> None:
    pooled = Pooled()
    (action,) = pooled.first

    assert isinstance(action, RunAccess)
    assert (ANSWER[4:], b"") == action.replies
    assert pooled.instance_id == action.instance.instance_id
    assert State.OFF_LOOP == pooled.connection.state


@pytest.mark.parametrize("size", [0, 1, 5])
def test_call_of_the_pool_gets_its_answer_behind_the_pipelined_ones(size: int) -> None:
    connection = Pooled().connection

    assert b"frames" == connection.call(b"frames", 2)
    feed(connection, wire.EMPTY_FRAME * 2 + ANSWER, size)
    assert [Deliver(ANSWER[4:])] == connection.actions


def test_pool_ends_the_event_and_its_late_answers_are_skipped() -> None:
    pooled = Pooled()
    connection = pooled.connection
    connection.call(b"frames", 1)
    feed(connection, wire.EMPTY_FRAME + ANSWER)
    connection.actions.clear()

    assert ending(REPLACED) == connection.finish(REPLACED)
    assert State.IDLE == connection.state
    out = feed(connection, wire.EMPTY_FRAME * 2 + event_of(pooled.instance_id, 9))
    assert out.startswith(GET_AUTHORIZATION)


def test_pool_exits() -> None:
    connection = Pooled().connection

    assert REFUSED.frames == connection.finish(REFUSED)
    assert (State.DRAINING, [Linger()]) == (connection.state, connection.actions)


@pytest.mark.parametrize("waiting", [True, False])
def test_watchdog_ends_the_event_and_abandons_the_thread(waiting: bool) -> None:
    pooled = Pooled()
    connection = pooled.connection
    if waiting:
        connection.call(b"frames", 0)

    assert REFUSED.frames == connection.overrule(REFUSED)
    assert [Abandon(), Linger()] == connection.actions
    for late in (lambda: connection.finish(REPLACED), lambda: connection.call(b"", 0)):
        with pytest.raises(LocalProtocolError):
            late()
    assert b"" == connection.receive(ANSWER)


def test_end_of_file_abandons_the_thread() -> None:
    connection = Pooled().connection
    connection.gone()

    assert (State.DEAD, [Abandon(), Close()]) == (connection.state, connection.actions)
    connection.gone()
    connection.close()
    assert 2 == len(connection.actions)


def test_bytes_nobody_asked_for_end_the_event_in_the_pool() -> None:
    pooled = Pooled()

    assert pooled.bench.faults.server_error.frames == pooled.connection.receive(ANSWER)
    assert [Abandon(), Linger()] == pooled.connection.actions


def test_over_long_answer_in_the_pool_is_400() -> None:
    seen = Limited(None)
    connection = seen.connection
    feed(connection, event_of(seen.instance_id) + ANSWER)
    connection.actions.clear()
    connection.call(b"frames", 0)

    assert seen.bench.faults.too_large.frames == feed(connection, text_frame(150_000), 65536)
    assert [Abandon(), Linger()] == connection.actions


@pytest.mark.parametrize(
    "act", [lambda c: c.call(b"", 0), lambda c: c.finish(REPLACED), lambda c: c.overrule(REFUSED)]
)
@pytest.mark.parametrize("state", [State.IDLE, State.WAIT_REPLY, State.DRAINING, State.DEAD])
def test_pool_cannot_speak_out_of_turn(act: Any, state: State) -> None:
    connection = in_state(state).connection
    with pytest.raises(LocalProtocolError):
        act(connection)


def test_pool_cannot_call_twice_nor_end_while_it_waits_nor_overrule_with_a_success() -> None:
    connection = Pooled().connection
    with pytest.raises(LocalProtocolError):
        connection.overrule(REPLACED)
    connection.call(b"frames", 0)
    for act in (lambda: connection.call(b"frames", 0), lambda: connection.finish(REPLACED)):
        with pytest.raises(LocalProtocolError):
            act()


# --- the event that waits for another one's access ------------------------------------


def parked() -> Seen:
    seen = Pooled()
    seen.connection.park()
    return seen


def test_the_facts_go_along_decoded_and_encoded() -> None:
    seen = Seen(None)
    feed(seen.connection, event_of(seen.instance_id) + ANSWER)
    (action,) = seen.connection.actions

    assert isinstance(action, RunAccess)
    assert (("Bearer OLD",), (ANSWER[4:],)) == (tuple(action.facts), action.replies)


def test_parked_event_ends_with_what_warm_says_by_now() -> None:
    seen = parked()
    seen.outcome = REPLACED

    assert ending(REPLACED) == seen.connection.settle(["Bearer OLD"], proceed)
    assert (State.IDLE, ["Bearer OLD"]) == (seen.connection.state, seen.facts[-1])


def test_parked_event_ends_with_what_is_shared_where_warm_says_nothing() -> None:
    seen = parked()

    assert REFUSED.frames == seen.connection.settle(["Bearer OLD"], lambda: REFUSED)
    assert (State.DRAINING, [Linger()]) == (seen.connection.state, seen.connection.actions)


@pytest.mark.parametrize("again", [None, lambda: None], ids=["nothing-shared", "not-for-this-one"])
def test_parked_event_without_an_answer_goes_to_the_pool(again: Any) -> None:
    seen = parked()

    assert seen.connection.settle([], again) is None
    assert State.PARKED == seen.connection.state
    seen.connection.unpark()
    assert State.OFF_LOOP == seen.connection.state
    assert ending(REPLACED) == seen.connection.finish(REPLACED)


@pytest.mark.parametrize("value", ["text", 1, True])
def test_shared_answer_that_is_no_outcome_is_500(value: Any) -> None:
    seen = parked()

    assert seen.bench.faults.server_error.frames == seen.connection.settle([], lambda: value)
    assert any(f"returned {type(value).__name__}, not an Outcome" in line for line in seen.bench.lines.lines)


@pytest.mark.parametrize("error", [ValueError("MARKED"), SystemExit("MARKED"), MemoryError("MARKED")])
def test_whatever_a_shared_answer_raises_is_500(error: BaseException) -> None:
    seen = parked()

    def again() -> Outcome:
        raise error

    assert seen.bench.faults.server_error.frames == seen.connection.settle([], again)
    assert "a shared answer failed" in seen.bench.lines
    assert "MARKED" not in seen.bench.lines


def test_parked_event_can_be_ended_by_its_deadline() -> None:
    connection = parked().connection

    assert REFUSED.frames == connection.finish(REFUSED)
    assert State.DRAINING == connection.state


def test_end_of_file_lets_the_parked_event_go() -> None:
    connection = parked().connection
    connection.gone()

    assert (State.DEAD, [Abandon(), Close()]) == (connection.state, connection.actions)


def test_bytes_nobody_asked_for_end_the_parked_event() -> None:
    seen = parked()

    assert seen.bench.faults.server_error.frames == seen.connection.receive(ANSWER)
    assert [Abandon(), Linger()] == seen.connection.actions


def test_over_long_bytes_end_the_parked_event_with_400() -> None:
    seen = Limited(None)
    connection = seen.connection
    feed(connection, event_of(seen.instance_id) + ANSWER)
    connection.actions.clear()
    connection.park()

    assert seen.bench.faults.too_large.frames == feed(connection, text_frame(150_000), 65536)
    assert [Abandon(), Linger()] == connection.actions


PARKING = {
    "park": lambda connection: connection.park(),
    "unpark": lambda connection: connection.unpark(),
    "settle": lambda connection: connection.settle([], None),
}
RIGHT = {("park", State.OFF_LOOP), ("unpark", State.PARKED), ("settle", State.PARKED)}


@pytest.mark.parametrize("act", PARKING)
@pytest.mark.parametrize("state", State)
def test_an_event_is_parked_and_lands_in_its_turn_only(act: str, state: State) -> None:
    connection = in_state(state).connection
    if (act, state) in RIGHT:
        PARKING[act](connection)
        return
    with pytest.raises(LocalProtocolError, match="park_out_of_turn"):
        PARKING[act](connection)
    assert state == connection.state


def test_an_event_that_waits_for_kong_is_not_parked() -> None:
    connection = Pooled().connection
    connection.call(b"frames", 0)
    with pytest.raises(LocalProtocolError, match="park_out_of_turn"):
        connection.park()


# --- the table ------------------------------------------------------------------------


def in_state(state: State) -> Seen:
    if state in (State.OFF_LOOP, State.PARKED):
        pooled = Pooled()
        if state is State.PARKED:
            pooled.connection.park()
        return pooled
    seen = Seen(REFUSED)
    if state is not State.IDLE:
        seen.connection.receive(event_of(seen.instance_id))
    if state is State.DRAINING:
        seen.connection.receive(ANSWER)
    if state is State.DEAD:
        seen.connection.gone()
    seen.connection.actions.clear()
    assert state == seen.connection.state
    return seen


@pytest.mark.parametrize("state", State)
def test_every_state_can_be_left_by_end_of_file(state: State) -> None:
    connection = in_state(state).connection
    connection.gone()

    assert State.DEAD == connection.state


@pytest.mark.parametrize("state", State)
def test_fault_of_the_owner_ends_any_event_with_an_exit(state: State) -> None:
    seen = in_state(state)
    out = seen.connection.fail()

    if state in (State.DRAINING, State.DEAD):
        assert (b"", state) == (out, seen.connection.state)
    else:
        assert (seen.bench.faults.server_error.frames, State.DRAINING) == (out, seen.connection.state)


def test_gw_06_only_an_unknown_instance_and_the_end_lead_to_a_close() -> None:
    closing = {
        (state, trigger)
        for state, row in TRANSITIONS.items()
        for trigger, following in row.items()
        if following is State.DEAD
    }

    assert {(State.IDLE, Trigger.REFUSE)} == {
        pair for pair in closing if pair[1] not in (Trigger.GONE, Trigger.CLOSE)
    }


def test_gw_09_an_exit_is_final() -> None:
    assert {Trigger.GONE, Trigger.CLOSE} == set(TRANSITIONS[State.DRAINING])
    assert set() == set(TRANSITIONS[State.DEAD])


def test_every_state_is_in_the_table_and_reached() -> None:
    assert set(State) == set(TRANSITIONS)
    reached = {following for row in TRANSITIONS.values() for following in row.values()}
    assert set(State) == reached


def test_stress_of_two_machines_cut_at_random() -> None:
    import random

    chance = random.Random(7)
    outcomes = [REPLACED, proceed(), proceed(Calls().log("notice", "x"))]
    seen = Seen(prefetch=(AUTHORIZATION, SCENARIO))
    for sequence in range(2, 400):
        seen.outcome = chance.choice(outcomes)
        side = KongSide(headers={"authorization": f"Bearer {sequence}"}, sequence=sequence)
        talk(seen.connection, side, seen.instance_id, chance.randrange(1, 40))

        assert "success" == side.done.ended
        assert [f"Bearer {sequence}", ""] == seen.facts[-1]


def test_instance_of_the_test_double_is_a_plugin_instance() -> None:
    assert proceed() == Instance().warm([])

"""
Outcomes and fetches: what a plugin hands to the server.
"""

from typing import Any

import pytest

from kong_token_exchange.pluginserver import wire
from kong_token_exchange.pluginserver.contract import (
    MAX_CALLS_PER_EVENT,
    Calls,
    Fetch,
    Outcome,
    exit_with,
    proceed,
)
from kong_token_exchange.pluginserver.pdk import METHODS


def frames_of(data: bytes) -> list[bytes]:
    reader, frames = wire.FrameReader(), []
    reader.feed(data)
    while (payload := reader.next_frame()) is not None:
        frames.append(payload)
    assert 0 == reader.pending_bytes()
    return frames


def calls_of(outcome: Outcome) -> list[tuple[str, Any]]:
    frames = frames_of(outcome.frames)
    if not outcome.is_exit:
        assert b"" == frames.pop()
    names = [frame.decode() for frame in frames[::2]]
    return [
        (name, METHODS[name].argument.decode(argument))
        for name, argument in zip(names, frames[1::2], strict=True)
    ]


def test_every_call_of_the_builder_is_encoded_in_order() -> None:
    calls = (
        Calls()
        .set_header("authorization", "Bearer x")
        .clear_header("x-token")
        .set_raw_query("a=1")
        .response_set_header("x-cache", "hit")
        .ctx_shared_set("k", {"a": "b"})
        .authenticate(None, {"id": "d"})
        .set_serialize_value("k", "v")
        .log("notice", "hello")
    )

    outcome = proceed(calls)

    assert [
        ("kong.service.request.set_header", ("authorization", "Bearer x")),
        ("kong.service.request.clear_header", "x-token"),
        ("kong.service.request.set_raw_query", "a=1"),
        ("kong.response.set_header", ("x-cache", "hit")),
        ("kong.ctx.shared.set", ("k", {"a": "b"})),
        ("kong.client.authenticate", {"credential": {"id": "d"}}),
        ("kong.log.set_serialize_value", ("k", "v")),
        ("kong.log.notice", ["hello"]),
    ] == calls_of(outcome)
    assert (8, None, False) == (outcome.replies, outcome.status, outcome.is_exit)


def test_builders_are_joined_in_their_order() -> None:
    outcome = proceed(Calls().clear_header("a"), Calls(), Calls().clear_header("b").clear_header("c"))

    assert ["a", "b", "c"] == [argument for _, argument in calls_of(outcome)]
    assert 3 == outcome.replies


def test_proceeding_without_calls_is_the_empty_frame() -> None:
    assert Outcome(wire.EMPTY_FRAME, 0) == proceed()


def test_exit_comes_after_the_calls_and_has_no_answer() -> None:
    outcome = exit_with(401, b"{}", {"WWW-Authenticate": "Bearer"}, Calls().response_set_header("a", "b"))

    assert [
        ("kong.response.set_header", ("a", "b")),
        ("kong.response.exit", wire.ExitArgs(401, b"{}", {"WWW-Authenticate": "Bearer"})),
    ] == calls_of(outcome)
    assert (1, 401, True) == (outcome.replies, outcome.status, outcome.is_exit)


def test_an_outcome_does_not_follow_its_builder() -> None:
    calls = Calls().clear_header("a")
    outcome = proceed(calls)
    calls.clear_header("b")

    assert ["a"] == [argument for _, argument in calls_of(outcome)]


@pytest.mark.parametrize("status", [-1, 0, 100, 199, 600, 1000])
def test_exit_without_a_final_status_is_refused(status: int) -> None:
    with pytest.raises(ValueError):
        exit_with(status)


@pytest.mark.parametrize("status", [200, 302, 401, 599])
def test_exit_with_a_final_status_is_made(status: int) -> None:
    assert status == exit_with(status).status


@pytest.mark.parametrize(
    "name", ["kong.request.get_header", "kong.response.exit", "kong.client.get_consumer"]
)
def test_a_call_with_an_answer_is_not_pipelined(name: str) -> None:
    with pytest.raises(ValueError):
        Calls().add(name, b"")


def test_a_call_that_does_not_exist_is_refused() -> None:
    with pytest.raises(KeyError):
        Calls().add("kong.nope.nope", b"")
    with pytest.raises(KeyError):
        Calls().log("shout", "x")


@pytest.mark.parametrize("make", [proceed, lambda *calls: exit_with(401, b"", None, *calls)])
def test_calls_are_limited_exactly(make: Any) -> None:
    calls = Calls()
    for _ in range(MAX_CALLS_PER_EVENT):
        calls.clear_header("a")
    make(calls)
    with pytest.raises(ValueError):
        make(calls, Calls().clear_header("a"))


def test_gw_10_header_with_a_line_break_is_refused() -> None:
    with pytest.raises(ValueError):
        Calls().set_header("a", "b\r\nc")
    with pytest.raises(ValueError):
        Calls().clear_header("a\n")


FETCHES = [
    (Fetch("kong.request.get_header", "authorization"), b"\x0a\x0dauthorization"),
    (Fetch("kong.request.get_method"), b""),
    (Fetch("kong.request.get_headers"), b"\x08\x64"),
    (Fetch("kong.request.get_headers", "5"), b"\x08\x05"),
    (Fetch("kong.router.get_route"), b""),
]


@pytest.mark.parametrize(("fetch", "argument"), FETCHES)
def test_fetch_is_encoded(fetch: Fetch, argument: bytes) -> None:
    assert (METHODS[fetch.method], argument) == fetch.resolve()


@pytest.mark.parametrize(
    "method",
    ["kong.nope.nope", "kong.service.request.set_header", "kong.response.exit", "kong.client.load_consumer"],
)
def test_what_cannot_be_prefetched_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match=method):
        Fetch(method).resolve()

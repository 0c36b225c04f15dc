"""
Frames and messages on their own: cuts, limits, and bytes that are no message.
"""

from typing import Any

import pytest

from kong_token_exchange.errors import RemoteProtocolError
from kong_token_exchange.pluginserver import wire

FRAMES = [b"", b"a", b"kong.request.get_header", b"x" * 300, b"", bytes(range(256))]
STREAM = b"".join(wire.frame(payload) for payload in FRAMES)


def take_all(reader: wire.FrameReader) -> list[bytes]:
    frames = []
    while (payload := reader.next_frame()) is not None:
        frames.append(payload)
    return frames


def test_frames_arrive_whole() -> None:
    reader = wire.FrameReader()
    reader.feed(STREAM)

    assert FRAMES == take_all(reader)
    assert 0 == reader.pending_bytes()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 64])
def test_frames_arrive_in_pieces(size: int) -> None:
    reader, frames = wire.FrameReader(), []
    for start in range(0, len(STREAM), size):
        reader.feed(STREAM[start : start + size])
        frames += take_all(reader)

    assert FRAMES == frames


@pytest.mark.parametrize("left", [1, 3, 4, 5, 10])
def test_bytes_left_over_wait_for_the_rest(left: int) -> None:
    reader, tail = wire.FrameReader(), wire.frame(b"0123456789")
    reader.feed(STREAM + tail[:left])

    assert FRAMES == take_all(reader)
    assert left == reader.pending_bytes()

    reader.feed(tail[left:])
    assert [b"0123456789"] == take_all(reader)


@pytest.mark.parametrize(("size", "accepted"), [(99, True), (100, True), (101, False)])
def test_frame_limit_is_exact(size: int, accepted: bool) -> None:
    reader = wire.FrameReader(max_bytes=100)
    reader.feed(wire.frame(b"x" * size))
    if accepted:
        assert [b"x" * size] == take_all(reader)
        return
    with pytest.raises(RemoteProtocolError) as caught:
        reader.next_frame()

    assert "frame_too_long" == caught.value.reason


BROKEN = {
    "key-cut": (b"\x80", "varint_malformed"),
    "value-missing": (b"\x08", "varint_malformed"),
    "varint-too-long": (b"\x08" + b"\xff" * 10 + b"\x01", "varint_malformed"),
    "length-missing": (b"\x0a", "varint_malformed"),
    "text-cut": (b"\x0a\x05abc", "message_truncated"),
    "fixed64-cut": (b"\x09abc", "message_truncated"),
    "fixed32-cut": (b"\x0dabc", "message_truncated"),
    "group": (b"\x0b", "wire_type_unknown"),
    "field-zero": (b"\x02\x00", "field_number_zero"),
}


@pytest.mark.parametrize(("payload", "reason"), BROKEN.values(), ids=BROKEN)
def test_broken_message_is_refused(payload: bytes, reason: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        list(wire.read_fields(payload))

    assert reason == caught.value.reason


def test_fields_of_every_wire_type_are_read() -> None:
    payload = b"\x08\x96\x01\x12\x02hi\x19" + b"12345678" + b"\x25" + b"1234"

    assert [(1, 150), (2, b"hi"), (3, b"12345678"), (4, b"1234")] == list(wire.read_fields(payload))


NO_CALLS = {
    "empty": (b"", "command_unknown"),
    "sequence-alone": (b"\x08\x01", "command_unknown"),
    "unknown-command": (b"\x08\x01\xaa\x02\x00", "command_unknown"),
    "command-is-a-number": (b"\xa0\x02\x05", "wire_type_mismatch"),
    "sequence-is-text": (b"\x0a\x01x\xa2\x02\x00", "wire_type_mismatch"),
    "instance-id-is-text": (b"\xa2\x02\x03\x0a\x01x", "wire_type_mismatch"),
    "event-name-is-a-number": (b"\xa2\x02\x02\x10\x01", "wire_type_mismatch"),
    "config-is-a-number": (b"\x8a\x02\x02\x10\x01", "wire_type_mismatch"),
    "name-is-a-number": (b"\x82\x02\x02\x08\x01", "wire_type_mismatch"),
}


@pytest.mark.parametrize(("payload", "reason"), NO_CALLS.values(), ids=NO_CALLS)
def test_what_is_no_call_is_refused(payload: bytes, reason: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        wire.decode_call(payload)

    assert reason == caught.value.reason


@pytest.mark.parametrize(
    "payload", [b"\x0a\x80\x80\x01" + b"x" * 16_383, b"\x0a\x05abcd", b"\x0a\x81\x01" + b"x" * 128]
)
def test_text_that_is_cut_is_refused(payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        wire.decode_string(payload)

    assert "message_truncated" == caught.value.reason


RAW = b"Bearer evil\xff\xfe\x80\xc3("


def test_bytes_that_are_not_utf8_come_and_go_unchanged() -> None:
    text = wire.decode_string(b"\x0a" + bytes([len(RAW)]) + RAW)

    assert RAW == wire.encode_text(text)
    assert b"\x0a" + bytes([len(RAW)]) + RAW == wire.encode_string(text)
    assert wire.encode_value(text).endswith(RAW)
    assert {"h": text} == wire.decode_struct(wire.encode_struct({"h": text}))


def test_an_absent_value_reads_as_empty() -> None:
    assert "" == wire.decode_string(b"")
    assert 0 == wire.decode_int(b"")
    assert 0.0 == wire.decode_number(b"")
    assert wire.decode_bool(b"") is False
    assert wire.decode_value(b"") is None
    assert {} == wire.decode_struct(b"")
    assert b"" == wire.decode_byte_string(b"")
    assert wire.decode_raw_body(b"") is None


READERS = [
    wire.decode_return,
    wire.decode_string,
    wire.decode_byte_string,
    wire.decode_int,
    wire.decode_bool,
    wire.decode_number,
    wire.decode_value,
    wire.decode_struct,
    wire.decode_list,
    wire.decode_kv,
    wire.decode_exit,
    wire.decode_raw_body,
    wire.ROUTE.decode,
]


@pytest.mark.parametrize("read", READERS)
def test_field_from_a_later_version_is_passed_over(read: Any) -> None:
    later = b"\x98\x06\x01" + b"\xa2\x06\x02hi"

    assert read(b"") == read(later)


def test_call_with_a_field_from_a_later_version_is_read() -> None:
    call = wire.HandleEvent(2, 3, "access")

    assert call == wire.decode_call(wire.encode_call(call) + b"\x98\x06\x01")


@pytest.mark.parametrize("payload", [b"\x12\x00", b"\x08\x01"])
def test_value_that_is_no_double_is_refused_as_a_number(payload: bytes) -> None:
    if payload[0] == 8:
        with pytest.raises(RemoteProtocolError):
            wire.decode_number(payload)
    else:
        assert 0.0 == wire.decode_number(payload)


def nested(levels: int) -> bytes:
    payload = b"\x22\x01x"
    for _ in range(levels):
        entry = b"\x0a\x00\x12" + wire.encode_varint(len(payload)) + payload
        inner = b"\x0a" + wire.encode_varint(len(entry)) + entry
        payload = b"\x2a" + wire.encode_varint(len(inner)) + inner
    return payload


def test_value_nested_without_end_is_refused() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        wire.decode_value(nested(500))

    assert "value_too_deep" == caught.value.reason


@pytest.mark.parametrize("value", [float("nan"), float("inf"), b"bytes", object(), {1, 2}, [b"x"]])
def test_value_json_does_not_have_is_refused(value: object) -> None:
    with pytest.raises(ValueError):
        wire.encode_value(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("payload", [b"\x11abc", b"\x10\x01", b"\x18\x01"])
def test_value_of_the_wrong_wire_type_is_refused(payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        wire.decode_value(payload)


WRONG_MEMBERS = [{"id": 5}, {"created_at": "x"}, {"created_at": True}, {"tags": "x"}]


@pytest.mark.parametrize("members", WRONG_MEMBERS)
def test_record_member_of_another_type_is_refused(members: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(members))):
        wire.CONSUMER.encode(members)  # type: ignore[arg-type]


def test_record_refuses_a_number_for_a_flag_and_text_for_a_record() -> None:
    with pytest.raises(ValueError, match="by_username"):
        wire.CONSUMER_SPEC.encode({"by_username": 1})
    with pytest.raises(ValueError, match="service"):
        wire.ROUTE.encode({"service": "x"})


def test_record_leaves_out_what_it_does_not_know() -> None:
    assert b"" == wire.CONSUMER.encode({"unknown": 1, "username": None})
    assert {"id": "1"} == wire.CONSUMER.decode(b"\x0a\x011\xfa\x01\x01x")


@pytest.mark.parametrize("config", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000])
def test_config_that_is_no_json_object_is_refused(config: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        wire.decode_config(config)

    assert "config_not_json" == caught.value.reason


def test_instance_status_never_holds_the_configuration() -> None:
    fields = dict(wire.read_fields(wire.encode_return(1, wire.InstanceStatus("p", 7, 9))))

    assert {1: b"p", 2: 7, 4: 9} == dict(wire.read_fields(fields[33]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "payload", [b"\x0d\x00\x00\x80\x3f", b"\x0a\x04abcd", b"\x08\x01"], ids=["float", "bytes", "varint"]
)
def test_a_number_is_a_double_and_nothing_else(payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="wire_type_mismatch"):
        wire.decode_number(payload)

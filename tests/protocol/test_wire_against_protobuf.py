"""
Our codec against Google's, on random messages, in both directions.
"""

from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from kong_token_exchange.pluginserver import wire
from kong_token_exchange.pluginserver.wire import Record
from tests.support import kong_messages
from tests.support.kong_messages import message

INT64 = st.integers(-(2**63), 2**63 - 1)
INT32 = st.integers(-(2**31), 2**31 - 1)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=300)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
OBJECT = st.dictionaries(TEXT, JSON, max_size=5)


def theirs(name: str, payload: bytes) -> Any:
    parsed = message(name)()
    parsed.ParseFromString(payload)
    return parsed


def as_value(value: Any) -> Any:
    return json_format.ParseDict(value, message("Value")())


def as_struct(value: Any) -> Any:
    return json_format.ParseDict(value, message("Struct")())


# --- commands and answers -------------------------------------------------------------

CALLS = st.one_of(
    st.builds(wire.GetPluginNames, INT64),
    st.builds(wire.GetPluginInfo, INT64, TEXT),
    st.builds(wire.StartInstance, INT64, TEXT, st.binary(max_size=200)),
    st.builds(wire.GetInstanceStatus, INT64, INT32),
    st.builds(wire.CloseInstance, INT64, INT32),
    st.builds(wire.HandleEvent, INT64, INT32, TEXT),
)

COMMANDS = {
    wire.GetPluginNames: "cmd_get_plugin_names",
    wire.GetPluginInfo: "cmd_get_plugin_info",
    wire.StartInstance: "cmd_start_instance",
    wire.GetInstanceStatus: "cmd_get_instance_status",
    wire.CloseInstance: "cmd_close_instance",
    wire.HandleEvent: "cmd_handle_event",
}


def their_call(call: wire.RpcCall) -> Any:
    result = message("RpcCall")(sequence=call.sequence)
    command = getattr(result, COMMANDS[type(call)])
    command.SetInParent()
    for member in type(call).__dataclass_fields__:
        if member != "sequence":
            setattr(command, member, getattr(call, member))
    return result


@given(CALLS)
def test_call_we_write_is_read_by_protobuf(call: wire.RpcCall) -> None:
    assert their_call(call) == theirs("RpcCall", wire.encode_call(call))


@given(CALLS)
def test_call_protobuf_writes_is_read_by_us(call: wire.RpcCall) -> None:
    assert call == wire.decode_call(their_call(call).SerializeToString())


@given(CALLS)
def test_call_is_read_with_its_fields_in_either_order(call: wire.RpcCall) -> None:
    sequence = wire.encode_return(call.sequence)
    written = wire.encode_call(call)
    command = written[len(sequence) :]

    assert sequence + command == written
    assert call == wire.decode_call(command + sequence)


@given(INT64, TEXT, INT32, INT64)
def test_instance_status_agrees(sequence: int, name: str, instance_id: int, started_at: int) -> None:
    status = wire.InstanceStatus(name, instance_id, started_at)
    expected = message("RpcReturn")(sequence=sequence)
    expected.instance_status.SetInParent()
    expected.instance_status.name = name
    expected.instance_status.instance_id = instance_id
    expected.instance_status.started_at = started_at

    assert expected == theirs("RpcReturn", wire.encode_return(sequence, status))
    assert wire.RpcReturn(sequence, status) == wire.decode_return(expected.SerializeToString())


@given(INT64)
def test_end_of_an_event_agrees(sequence: int) -> None:
    expected = message("RpcReturn")(sequence=sequence)

    assert expected.SerializeToString() == wire.encode_return(sequence)
    assert wire.RpcReturn(sequence, None) == wire.decode_return(expected.SerializeToString())


@given(INT64, st.lists(TEXT, max_size=3))
def test_plugin_names_agree(sequence: int, names: list[str]) -> None:
    parsed = theirs("RpcReturn", wire.encode_plugin_names(sequence, names))

    assert (sequence, names) == (parsed.sequence, list(parsed.plugin_names.names))
    assert "plugin_names" == parsed.WhichOneof("one")


@given(INT64, st.builds(wire.PluginInfo, TEXT, st.lists(TEXT, max_size=3), TEXT, INT32, TEXT))
def test_plugin_info_agrees(sequence: int, info: wire.PluginInfo) -> None:
    parsed = theirs("RpcReturn", wire.encode_plugin_info(sequence, info))
    said = parsed.plugin_info

    assert sequence == parsed.sequence
    assert info == wire.PluginInfo(said.name, list(said.phases), said.version, said.priority, said.schema)


# --- plain messages -------------------------------------------------------------------

PLAIN = [
    ("String", TEXT, wire.encode_string, wire.decode_string),
    ("ByteString", st.binary(max_size=20_000), wire.encode_byte_string, wire.decode_byte_string),
    ("Int", INT32, wire.encode_int, wire.decode_int),
    ("Bool", st.booleans(), wire.encode_bool, wire.decode_bool),
    ("Number", NUMBER.filter(lambda number: str(number) != "-0.0"), wire.encode_number, wire.decode_number),
]


@pytest.mark.parametrize(("name", "values", "encode", "decode"), PLAIN, ids=[row[0] for row in PLAIN])
def test_plain_message_agrees(name: str, values: Any, encode: Any, decode: Any) -> None:
    @given(values)
    def check(value: Any) -> None:
        expected = message(name)(v=value).SerializeToString()

        assert expected == encode(value)
        assert value == decode(expected)

    check()


@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 16_383, 16_384, 16_385, 70_000])
def test_string_of_border_lengths_agrees(size: int) -> None:
    text = "é" + "x" * (size - 2) if size > 1 else "x" * size
    expected = message("String")(v=text).SerializeToString()

    assert expected == wire.encode_string(text)
    assert text == wire.decode_string(expected)


@pytest.mark.parametrize("size", [1, 126, 127, 128, 129, 5000])
def test_string_with_a_field_behind_it_is_still_read(size: int) -> None:
    text = "x" * size

    assert text == wire.decode_string(wire.encode_string(text) + b"\x10\x01")
    assert "last" == wire.decode_string(wire.encode_string(text) + wire.encode_string("last"))


# --- JSON values ----------------------------------------------------------------------


@given(JSON)
def test_value_agrees(value: Any) -> None:
    assert as_value(value) == theirs("Value", wire.encode_value(value))
    assert value == wire.decode_value(as_value(value).SerializeToString())


@given(OBJECT)
def test_struct_agrees(value: dict[str, Any]) -> None:
    assert as_struct(value) == theirs("Struct", wire.encode_struct(value))
    assert value == wire.decode_struct(as_struct(value).SerializeToString())


@given(st.lists(JSON, max_size=4))
def test_list_value_agrees(items: list[Any]) -> None:
    expected = message("ListValue")(values=[as_value(item) for item in items])

    assert expected == theirs("ListValue", wire.encode_list(items))
    assert items == wire.decode_list(expected.SerializeToString())


@given(TEXT, JSON)
def test_kv_agrees(key: str, value: Any) -> None:
    expected = message("KV")(k=key, v=as_value(value))

    assert expected == theirs("KV", wire.encode_kv(key, value))
    assert (key, value) == wire.decode_kv(expected.SerializeToString())


@given(INT32, st.binary(max_size=100), st.dictionaries(TEXT, TEXT, max_size=4))
def test_exit_args_agree(status: int, body: bytes, headers: dict[str, str]) -> None:
    expected = message("ExitArgs")(status=status, body=body)
    if headers:
        expected.headers.CopyFrom(as_struct(headers))

    assert expected == theirs("ExitArgs", wire.encode_exit(status, body, headers))
    assert wire.ExitArgs(status, body, headers) == wire.decode_exit(expected.SerializeToString())


@given(st.binary(max_size=100))
def test_raw_body_agrees(content: bytes) -> None:
    expected = message("RawBodyResult")(content=content).SerializeToString()

    assert expected == wire.encode_raw_body(content)
    assert content == wire.decode_raw_body(expected)


@pytest.mark.parametrize("member", ["body_filepath", "error"])
def test_raw_body_that_is_elsewhere_is_none(member: str) -> None:
    assert wire.decode_raw_body(message("RawBodyResult")(**{member: "x"}).SerializeToString()) is None


def test_raw_body_in_a_file_is_named_as_protobuf_names_it() -> None:
    parsed = theirs("RawBodyResult", wire.encode_raw_body(None, filepath="/tmp/1"))

    assert "/tmp/1" == parsed.body_filepath


# --- records --------------------------------------------------------------------------

RECORDS = {
    "ConsumerSpec": wire.CONSUMER_SPEC,
    "Consumer": wire.CONSUMER,
    "AuthenticatedCredential": wire.CREDENTIAL,
    "AuthenticateArgs": wire.AUTHENTICATE,
    "Route": wire.ROUTE,
    "Service": wire.SERVICE,
}


def members_of(name: str) -> st.SearchStrategy[dict[str, Any]]:
    kinds: dict[str, Any] = {
        "string": TEXT.filter(bool),
        "int32": INT32.filter(bool),
        "int64": INT64.filter(bool),
        "bool": st.just(True),
    }
    optional = {}
    for field, _, kind in kong_messages.fields(name):
        if kind.startswith("*"):
            optional[field] = st.lists(TEXT, min_size=1, max_size=3)
        elif kind in kinds:
            optional[field] = kinds[kind]
        else:
            optional[field] = members_of(kind)
    return st.fixed_dictionaries({}, optional=optional)


def fill(parsed: Any, members: dict[str, Any]) -> Any:
    for field, value in members.items():
        if isinstance(value, list):
            getattr(parsed, field).extend(value)
        elif isinstance(value, dict):
            getattr(parsed, field).SetInParent()
            fill(getattr(parsed, field), value)
        else:
            setattr(parsed, field, value)
    return parsed


@pytest.mark.parametrize("name", RECORDS)
def test_record_agrees(name: str) -> None:
    record = RECORDS[name]

    @given(members_of(name))
    def check(members: dict[str, Any]) -> None:
        expected = fill(message(name)(), members)

        assert expected == theirs(name, record.encode(members))
        assert members == record.decode(expected.SerializeToString())

    check()


@pytest.mark.parametrize("name", RECORDS)
def test_record_has_every_field_of_the_table(name: str) -> None:
    def numbers(record: Record) -> list[tuple[str, int]]:
        return [(member, number) for number, (member, _) in record.fields.items()]

    assert [(field, number) for field, number, _ in kong_messages.fields(name)] == numbers(RECORDS[name])

"""
Google's protobuf classes for the messages of the plugin socket, built at run time.

The table is that of docs/plugin-socket.md, typed in by hand: the tests compare our
codec with an implementation that shares nothing with it.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, struct_pb2

_T = descriptor_pb2.FieldDescriptorProto
_KINDS = {
    "string": _T.TYPE_STRING,
    "bytes": _T.TYPE_BYTES,
    "bool": _T.TYPE_BOOL,
    "int32": _T.TYPE_INT32,
    "int64": _T.TYPE_INT64,
    "double": _T.TYPE_DOUBLE,
}

# message -> (field, number, kind); "*" repeats, "?" is a member of the message's oneof.
_TABLE: dict[str, list[tuple[str, int, str]]] = {
    "CmdGetPluginNames": [],
    "CmdGetPluginInfo": [("name", 1, "string")],
    "CmdStartInstance": [("name", 1, "string"), ("config", 2, "bytes")],
    "CmdGetInstanceStatus": [("instance_id", 1, "int32")],
    "CmdCloseInstance": [("instance_id", 1, "int32")],
    "CmdHandleEvent": [("instance_id", 1, "int32"), ("event_name", 2, "string")],
    "RpcCall": [
        ("sequence", 1, "int64"),
        ("cmd_get_plugin_names", 31, "?CmdGetPluginNames"),
        ("cmd_get_plugin_info", 32, "?CmdGetPluginInfo"),
        ("cmd_start_instance", 33, "?CmdStartInstance"),
        ("cmd_get_instance_status", 34, "?CmdGetInstanceStatus"),
        ("cmd_close_instance", 35, "?CmdCloseInstance"),
        ("cmd_handle_event", 36, "?CmdHandleEvent"),
    ],
    "PluginNames": [("names", 1, "*string")],
    "PluginInfo": [
        ("name", 1, "string"),
        ("updated_at", 2, "int64"),
        ("loaded_at", 3, "int64"),
        ("phases", 4, "*string"),
        ("version", 5, "string"),
        ("priority", 6, "int32"),
        ("schema", 7, "string"),
    ],
    "InstanceStatus": [
        ("name", 1, "string"),
        ("instance_id", 2, "int32"),
        ("config", 3, ".google.protobuf.Value"),
        ("started_at", 4, "int64"),
    ],
    "RpcReturn": [
        ("sequence", 1, "int64"),
        ("plugin_names", 31, "?PluginNames"),
        ("plugin_info", 32, "?PluginInfo"),
        ("instance_status", 33, "?InstanceStatus"),
    ],
    "KV": [("k", 1, "string"), ("v", 2, ".google.protobuf.Value")],
    "Bool": [("v", 1, "bool")],
    "Int": [("v", 1, "int32")],
    "Number": [("v", 1, "double")],
    "String": [("v", 1, "string")],
    "ByteString": [("v", 1, "bytes")],
    "ExitArgs": [("status", 1, "int32"), ("body", 2, "bytes"), ("headers", 3, ".google.protobuf.Struct")],
    "RawBodyResult": [("content", 1, "?bytes"), ("body_filepath", 2, "?string"), ("error", 3, "?string")],
    "ConsumerSpec": [("id", 1, "string"), ("by_username", 2, "bool")],
    "Consumer": [
        ("id", 1, "string"),
        ("created_at", 2, "int64"),
        ("username", 3, "string"),
        ("custom_id", 4, "string"),
        ("tags", 5, "*string"),
    ],
    "AuthenticatedCredential": [("id", 1, "string"), ("consumer_id", 2, "string")],
    "AuthenticateArgs": [("consumer", 1, "Consumer"), ("credential", 2, "AuthenticatedCredential")],
    "Key": [("id", 1, "string")],
    "Route": [
        ("id", 1, "string"),
        ("created_at", 2, "int64"),
        ("updated_at", 3, "int64"),
        ("name", 4, "string"),
        ("protocols", 5, "*string"),
        ("methods", 6, "*string"),
        ("hosts", 7, "*string"),
        ("paths", 8, "*string"),
        ("headers", 9, "*string"),
        ("https_redirect_status_code", 10, "int32"),
        ("regex_priority", 11, "int32"),
        ("strip_path", 12, "bool"),
        ("preserve_host", 13, "bool"),
        ("snis", 14, "*string"),
        ("sources", 15, "*string"),
        ("destinations", 16, "*string"),
        ("tags", 17, "*string"),
        ("service", 18, "Key"),
    ],
    "Service": [
        ("id", 1, "string"),
        ("created_at", 2, "int64"),
        ("updated_at", 3, "int64"),
        ("name", 4, "string"),
        ("retries", 5, "int32"),
        ("protocol", 6, "string"),
        ("host", 7, "string"),
        ("port", 8, "int32"),
        ("path", 9, "string"),
        ("connect_timeout", 10, "int32"),
        ("write_timeout", 11, "int32"),
        ("read_timeout", 12, "int32"),
        ("tags", 13, "*string"),
        ("client_certificate", 14, "Key"),
    ],
}

_PACKAGE = "kong_token_exchange_test"


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="plugin_socket_test.proto",
        package=_PACKAGE,
        syntax="proto3",
        dependency=[struct_pb2.DESCRIPTOR.name],
    )
    for name, rows in _TABLE.items():
        message = file.message_type.add(name=name)
        if any(kind.startswith("?") for _, _, kind in rows):
            message.oneof_decl.add(name="one")
        for field_name, number, marked in rows:
            field = message.field.add(name=field_name, number=number, label=_T.LABEL_OPTIONAL)
            if marked.startswith("*"):
                field.label = _T.LABEL_REPEATED
            elif marked.startswith("?"):
                field.oneof_index = 0
            kind = marked.lstrip("*?")
            if kind in _KINDS:
                field.type = _KINDS[kind]
            else:
                field.type = _T.TYPE_MESSAGE
                field.type_name = kind if kind.startswith(".") else f".{_PACKAGE}.{kind}"
    return file


_pool = descriptor_pool.DescriptorPool()
_pool.AddSerializedFile(struct_pb2.DESCRIPTOR.serialized_pb)
_pool.Add(_file())


def message(name: str) -> Any:
    """Return the class of a message: one of the table, or google.protobuf's Value, Struct, ListValue."""
    full = f"{_PACKAGE}.{name}" if name in _TABLE else f"google.protobuf.{name}"
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(full))


def fields(name: str) -> list[tuple[str, int, str]]:
    """Return the rows of a message in the table."""
    return _TABLE[name]

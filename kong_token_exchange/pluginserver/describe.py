"""
What Kong's query command prints: the plugin's name, order, phases and schema.

Kong runs it once per start and takes the first plugin. "Protocol" must be there: a
bare list makes Kong speak MsgPack:1, which lets requests through when the plugin
server is gone.

A control plane runs no plugin server and needs the schema alone, in JSON as above or as Lua modules
(`schema_lua`, `handler_lua`), which Kong looks for as `kong.plugins.NAME.schema` and `.handler`.

Source: Kong `kong/runloop/plugin_servers/process.lua`, `kong/db/dao/plugins.lua`;
docs/plugin-socket.md; docs/operations.md (hybrid mode).
"""

from __future__ import annotations

import json
from typing import Any

from kong_token_exchange.pluginserver.contract import PluginType

PROTOCOL = "ProtoBuf:1"


def describe(plugin: PluginType) -> dict[str, Any]:
    """Return the description as Kong wants it."""
    return {
        "Protocol": PROTOCOL,
        "Plugins": [
            {
                "Name": plugin.name,
                "Version": plugin.version,
                "Priority": plugin.priority,
                "Phases": list(plugin.phases),
                "Schema": plugin.schema,
            }
        ],
    }


def describe_json(plugin: PluginType) -> str:
    """Return the description as one line of JSON, fit for a file that `query_cmd` prints."""
    return json.dumps(describe(plugin), separators=(",", ":"), allow_nan=False)


# --- Lua ------------------------------------------------------------------------------

_INDENT = "  "

# In Kong a Lua handler comes before a plugin server's plugin, so on a data plane this one would take
# its place, and one without an access phase would let everything through.
_HANDLER = """-- Stands for the plugin "{name}" on a control plane, which handles no requests.
-- On a node that does, the plugin server is the handler: this file must not be there.
return {{
  VERSION = "{version}",
  PRIORITY = {priority},
  access = function()
    kong.log.err("{name}: handler.lua of a control plane on a data plane; remove it")
    return kong.response.exit(500, {{ error = "server_error" }}, {{ ["Cache-Control"] = "no-store" }})
  end,
}}
"""


def schema_lua(plugin: PluginType) -> str:
    """Return the schema as the Lua module `kong.plugins.NAME.schema`."""
    heading = f"-- The schema of {plugin.name} {plugin.version}, for a control plane of Kong."
    return f"{heading}\nlocal null = ngx.null\n\nreturn {_lua(plugin.schema)}\n"


def handler_lua(plugin: PluginType) -> str:
    """Return the Lua module `kong.plugins.NAME.handler` that a schema in Lua needs beside it; it refuses."""
    return _HANDLER.format(name=plugin.name, version=plugin.version, priority=plugin.priority)


def _lua(value: Any, depth: int = 0) -> str:
    """Write a JSON value as a Lua expression; a list as a table from 1."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return _lua_string(value)
        case dict():
            members = [f"[{_lua_string(name)}] = {_lua(member, depth + 1)}" for name, member in value.items()]
        case _:
            members = [_lua(member, depth + 1) for member in value]
    if not members:
        return "{}"
    inner = _INDENT * (depth + 1)
    return "{\n" + "".join(f"{inner}{member},\n" for member in members) + _INDENT * depth + "}"


def _lua_string(text: str) -> str:
    """Quote *text*; what is not plain ASCII as decimal escapes of its UTF-8 bytes, which Lua 5.1 has."""
    plain = (
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03d}" for byte in text.encode()
    )
    return '"' + "".join(plain) + '"'

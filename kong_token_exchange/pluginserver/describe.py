"""
What Kong's query command prints: the plugin's name, order, phases and schema.

Kong runs it once per start and takes the first plugin. "Protocol" must be there: a
bare list makes Kong speak MsgPack:1, which lets requests through when the plugin
server is gone.

Source: Kong `kong/runloop/plugin_servers/process.lua`; docs/plugin-socket.md.
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

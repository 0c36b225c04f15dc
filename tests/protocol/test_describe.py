"""
What the query command prints.
"""

import json

from kong_token_exchange.pluginserver.describe import describe, describe_json, handler_lua, schema_lua
from tests.support.plugins import Plugin


def test_gw_01_description_names_the_protocol_that_fails_closed() -> None:
    assert "ProtoBuf:1" == describe(Plugin())["Protocol"]


def test_description_holds_what_kong_reads_and_nothing_else() -> None:
    assert {
        "Protocol": "ProtoBuf:1",
        "Plugins": [
            {
                "Name": "test-plugin",
                "Version": "1.2.3",
                "Priority": 1050,
                "Phases": ["access"],
                "Schema": {"name": "test-plugin", "fields": []},
            }
        ],
    } == describe(Plugin())


def test_description_is_one_line_of_json() -> None:
    text = describe_json(Plugin())

    assert "\n" not in text
    assert describe(Plugin()) == json.loads(text)


def test_the_schema_in_lua_is_a_module() -> None:
    assert (
        "-- The schema of test-plugin 1.2.3, for a control plane of Kong.\n"
        "local null = ngx.null\n"
        "\n"
        "return {\n"
        '  ["name"] = "test-plugin",\n'
        '  ["fields"] = {},\n'
        "}\n"
    ) == schema_lua(Plugin())


def test_every_json_value_has_its_lua() -> None:
    plugin = Plugin()
    plugin.schema = {  # type: ignore[misc]
        "values": [None, True, False, 7, -1, 0.5, {}, []],
        "text": 'quote " backslash \\ break \n umlaut \u00e4 bracket ]] end',
        "end": {"nil": "keyword"},
    }

    assert (
        "return {\n"
        '  ["values"] = {\n'
        "    null,\n    true,\n    false,\n    7,\n    -1,\n    0.5,\n    {},\n    {},\n"
        "  },\n"
        '  ["text"] = "quote \\034 backslash \\092 break \\010 umlaut \\195\\164 bracket ]] end",\n'
        '  ["end"] = {\n'
        '    ["nil"] = "keyword",\n'
        "  },\n"
        "}\n"
    ) in schema_lua(plugin)


def test_gw_01_the_handler_in_lua_refuses_in_the_access_phase() -> None:
    text = handler_lua(Plugin())

    assert 'VERSION = "1.2.3"' in text
    assert "PRIORITY = 1050" in text
    assert "access = function()" in text
    assert "kong.response.exit(500" in text

"""
What the query command prints.
"""

import json

from kong_token_exchange.pluginserver.describe import describe, describe_json
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

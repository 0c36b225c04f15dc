"""
The plugin under kong-pdk's own server, for people who already run it.

    python -m kong_token_exchange.stock -p /usr/local/kong

That server speaks MsgPack:1, which lets a request through when the server is gone or hangs: the
latch of docs/operations.md is mandatory with it. `kong-token-exchange serve` needs none.

Source: kong-pdk 0.36 (`kong_pdk.cli.start_dedicated_server`); docs/adr/0008-closed.md.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from kong_token_exchange.plugin import Answer, TokenExchangePlugin
from kong_token_exchange.protocol.bearer import render
from kong_token_exchange.wiring import Shells

# kong-pdk reads these names from a plugin's module.
version = TokenExchangePlugin.version
priority = TokenExchangePlugin.priority


def _config_fields(schema: Mapping[str, Any]) -> list[Any]:
    """Return the fields of the record `config`, which is all that kong-pdk takes of a schema."""
    for member in schema["fields"]:
        if "config" in member:
            fields: list[Any] = member["config"]["fields"]
            return fields
    raise LookupError("config")


Schema = _config_fields(TokenExchangePlugin.schema)


@functools.cache
def _plugin() -> TokenExchangePlugin:
    # Made at the first instance, so in the process that serves.
    return Shells().make_plugin()


class Plugin:
    """kong-pdk's shape of a plugin: one object per configuration, a method per phase."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._instance = _plugin().start(config)

    def access(self, kong: Any) -> None:
        """
        Run the access phase.

        kong-pdk holds a lock until a handler's first call and never gives it back after an
        exception, so the first statement is a call and nothing is raised.
        """
        kong.request.get_method()
        try:
            self._instance.access(kong)
        except BaseException as error:  # noqa: BLE001 - an exception would hang this server and open the gate
            Answer(refusal=render(error)).apply(kong)


if __name__ == "__main__":
    from kong_pdk.cli import start_dedicated_server

    start_dedicated_server(TokenExchangePlugin.name, Plugin, version, priority, Schema)

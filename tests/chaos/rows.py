"""All rows in the order of the table, and the modes of the plugin server that they want."""

from __future__ import annotations

from tests.chaos import rows_clock, rows_idp, rows_keys, rows_load, rows_redis, rows_server
from tests.chaos.gateways import ChaosGateway
from tests.chaos.run import Row

ROWS: tuple[Row, ...] = (
    *rows_idp.ROWS,
    *rows_keys.ROWS,
    *rows_clock.ROWS,
    *rows_redis.ROWS,
    *rows_server.ROWS,
    *rows_load.ROWS,
)

# The order in which modes are run: each change costs a restart of the plugin server.
MODES = ("plain", "workers", "hookedworkers", "hooked", "keys", "cooldown", "smallcache", "clock")

SMALL_CACHE = 200


def enter_mode(gateway: ChaosGateway, mode: str, *, long: bool) -> None:
    """Restart the plugin server as rows of this mode want it."""
    gateway.write_hooks()
    if mode == "plain":
        gateway.set_mode()
    elif mode == "workers":
        gateway.set_mode(extra=("--workers", "2"))
    elif mode == "hookedworkers":
        gateway.set_mode(hooked=True, extra=("--workers", "2"))
    elif mode in ("keys", "cooldown"):
        gateway.write_hooks(constants=rows_keys.constants(mode, long=long))
        gateway.set_mode(hooked=True)
    elif mode == "smallcache":
        gateway.write_hooks(cache_entries=SMALL_CACHE)
        gateway.set_mode(hooked=True)
    else:
        gateway.set_mode(hooked=True)
    gateway.restart_server()


def rows_for(kind: str, *, everything: bool) -> list[Row]:
    """Return the rows that run on one kind of gateway; *everything* where it is the only one."""
    if kind == "kong":
        return [row for row in ROWS if everything or row.both or row.only == "kong"]
    return [row for row in ROWS if row.only != "kong"]

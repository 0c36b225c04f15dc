"""
One server of the comparison as a process of its own: `python -m benchmarks.servers KIND ...`.

    ours              our server with the benchmark's plugin
    ours_unpipelined  the same, but each event ends only after Kong has answered `set_header`
    plugin            our server with the token-exchange plugin
    stock             kong-pdk's server with the benchmark's plugin

All take `--socket PATH`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.plugins import NAME, HeaderSwapPlugin, StockHeaderSwap
from kong_token_exchange.pluginserver import loop as loop_module
from kong_token_exchange.pluginserver.connection import Connection
from kong_token_exchange.pluginserver.contract import Outcome, PluginType
from kong_token_exchange.pluginserver.supervisor import serve_workers
from kong_token_exchange.pluginserver.wire import EMPTY_FRAME
from kong_token_exchange.ports import AuditEvent


class UnpipelinedConnection(Connection):
    """
    A connection that sends the calls of a warm answer, waits for Kong's replies, and only then ends.

    One wait for all calls of the event; the benchmark's plugin makes one.
    """

    __slots__ = ("_parked",)

    def __init__(self, host: Any) -> None:
        super().__init__(host)
        self._parked = False

    def _finish(self, outcome: Outcome) -> bytes:
        if outcome.status is not None or not outcome.replies:
            return super()._finish(outcome)
        self._parked = True
        self._wanted = outcome.replies
        self._replies = []
        return outcome.frames.removesuffix(EMPTY_FRAME)

    def _decide(self) -> bytes:
        if not self._parked:
            return super()._decide()
        self._parked = False
        return super()._finish(Outcome(EMPTY_FRAME, 0))


class Silence:
    """Stands in for metrics and audit that are switched off."""

    def count(self, name: str, **labels: str) -> None:
        """Count nothing."""

    def counter(self, name: str, **labels: str) -> Callable[[], None]:  # noqa: ARG002 - a Protocol's
        """Return what counts nothing."""
        return lambda: None

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Take in nothing."""

    def record(self, event: AuditEvent) -> None:
        """Record nothing."""


def _serve(options: argparse.Namespace, make_plugin: Callable[[], PluginType]) -> int:
    return serve_workers(
        make_plugin, workers=options.workers, socket_path=options.socket, threads=options.threads
    )


def _ours(options: argparse.Namespace) -> int:
    return _serve(options, HeaderSwapPlugin)


def _ours_unpipelined(options: argparse.Namespace) -> int:
    # What `Loop.adopt` makes for each socket.
    vars(loop_module)["Connection"] = UnpipelinedConnection
    return _serve(options, HeaderSwapPlugin)


def _plugin(options: argparse.Namespace) -> int:
    from kong_token_exchange.wiring import Shells  # noqa: PLC0415 - the other kinds do without

    name, _, address = options.resolve.partition("=")
    host, _, port = address.rpartition(":")

    def make_plugin() -> PluginType:
        shells = Shells(resolve={name: (host, int(port))})
        if options.silent:
            shells.metrics = shells.audit = Silence()  # type: ignore[assignment] # both Protocols, none of the classes
        return shells.make_plugin()

    return _serve(options, make_plugin)


def _stock(options: argparse.Namespace) -> int:
    from kong_pdk.cli import start_dedicated_server  # noqa: PLC0415 - the other kinds do without

    folder, name = options.socket.parent, options.socket.name
    sys.argv = [
        sys.argv[0],
        "-p",
        str(folder),
        "--socket-name",
        name,
        *(["--gevent"] if options.gevent else []),
    ]
    start_dedicated_server(
        options.name, StockHeaderSwap, HeaderSwapPlugin.version, HeaderSwapPlugin.priority, []
    )
    return 0


_KINDS = {"ours": _ours, "ours_unpipelined": _ours_unpipelined, "plugin": _plugin, "stock": _stock}


def main() -> int:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.servers")
    parser.add_argument("kind", choices=_KINDS)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gevent", action="store_true", help="of kong-pdk")
    parser.add_argument("--name", default=NAME, help="what kong-pdk calls the plugin; it serves no other")
    parser.add_argument("--silent", action="store_true", help="metrics and audit off")
    parser.add_argument("--resolve", default="", help="HOST:PORT=ADDRESS:PORT of the issuer")
    options = parser.parse_args()
    return _KINDS[options.kind](options)


if __name__ == "__main__":
    sys.exit(main())

"""
The echo API of the compose file, with its log at a second port for whoever checks the stories.

    8080   answers every request with what it received
    8081   {"hits": N, "last": {"path": ..., "headers": [...]}}: what has reached the API so far

For trying and testing only: the second port shows tokens.
"""

# ruff: noqa: INP001 - a script in an image, beside no package
from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable

from kong_token_exchange.sandbox.serving import HttpServer, Request, Response, json_headers
from kong_token_exchange.sandbox.upstream import EchoUpstream

EVERYWHERE = "0.0.0.0"  # noqa: S104 - inside a container; the compose file publishes on loopback


def main() -> None:
    """Serve until told to stop."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    api = EchoUpstream(host=EVERYWHERE, port=8080)

    with api, HttpServer(log_of(api), host=EVERYWHERE, port=8081, name="log"):
        stopped.wait()


def log_of(api: EchoUpstream) -> Callable[[Request], Response]:
    """Return what answers at the second port."""

    def show(_request: Request) -> Response:
        last = api.last_request()
        shown = (
            None if last is None else {"path": last.path, "headers": [list(pair) for pair in last.headers]}
        )
        return Response(200, json_headers(), json.dumps({"hits": api.hits, "last": shown}).encode("ascii"))

    return show


if __name__ == "__main__":
    main()

"""
The plugin server's loop in a thread of the test, on a real unix socket.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from kong_token_exchange.pluginserver.connection import Host, Limits
from kong_token_exchange.pluginserver.faults import make_faults
from kong_token_exchange.pluginserver.instances import LocalInstances
from kong_token_exchange.pluginserver.loop import Loop
from kong_token_exchange.pluginserver.offload import Pool
from kong_token_exchange.pluginserver.server import SocketPath
from tests.support.fake_kong import FakeKong
from tests.support.plugins import Plugin, make_log

WAIT_S = 10.0


def eventually(condition: Callable[[], Any], *, timeout_s: float = WAIT_S) -> Any:
    """Return the first true result of *condition*; fail after *timeout_s*."""
    end = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.002)
    return result


class Running:
    """A server with its loop in a thread; stopped and checked at the end."""

    def __init__(
        self,
        plugin: Plugin,
        folder: Path | None,
        *,
        threads: int = 4,
        queue_limit: int = 4,
        limits: Limits | None = None,
        grace_s: float = 60.0,
        **options: Any,
    ) -> None:
        self.plugin = plugin
        self.faults = make_faults()
        self.log, self.lines = make_log()
        registry = LocalInstances(plugin, failure=self.faults.server_error, log=self.log, grace_s=grace_s)
        host = Host(plugin, registry, faults=self.faults, log=self.log, limits=limits)

        def make_pool(post: Any) -> Pool:
            return Pool(
                threads=threads,
                queue_limit=queue_limit,
                faults=self.faults,
                log=self.log,
                post=post,
                idle_s=60.0,
            )

        self.loop = Loop(host, make_pool, **{"house_s": 0.02, "linger_s": 0.2, **options})
        self.path = str(folder / "plugin.socket") if folder is not None else ""
        self.listener = SocketPath(self.path) if folder is not None else None
        if self.listener is not None:
            self.loop.listen(self.listener.socket)
        self.thread = threading.Thread(target=self.loop.run)
        self.kong = FakeKong(self.path)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kong.__exit__()
        self.stop()

    def stop(self) -> None:
        self.loop.request_stop()
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        if self.listener is not None:
            self.listener.remove()

"""
A real Redis or Valkey of a test's own, on loopback: started, frozen, killed, poisoned.

    with RedisServer() as redis:
        redis.policy()          how the product reaches it
        redis.client().keys()   a client beside the product's

`redis_binary()` is None where neither is on PATH; the tests are then skipped with that reason.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

from kong_token_exchange.core.policy import RedisPolicy
from kong_token_exchange.secret import Secret
from tests.support.fakes import PATIENCE_S

NO_REDIS = "no Redis: neither `redis-server` nor `valkey-server` is on PATH"


def redis_binary() -> str | None:
    """Return the path of a server, of whichever of the two is there."""
    return shutil.which("redis-server") or shutil.which("valkey-server")


def redis_version() -> str | None:
    """Return `redis-7.0.15(path)`, or None."""
    binary = redis_binary()
    if binary is None:
        return None
    told = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=30, check=False)
    found = re.search(r"v=(\S+)", told.stdout)
    name = Path(binary).name.partition("-")[0]
    return (
        f"{found[1] if found else 'unknown'}({name} on path)"
        if name != "redis"
        else (f"{found[1] if found else 'unknown'}(path)")
    )


needs_redis = pytest.mark.skipif(redis_binary() is None, reason=NO_REDIS)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def eventually(condition: Callable[[], Any], *, within: float = PATIENCE_S) -> bool:
    """Wait until something holds; bounded."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.01)
    return bool(condition())


class RedisServer:
    """
    One server process in a folder of its own.

    Args:
        options: Of its command line, without dashes: `requirepass="x"`.
        tls: A PEM file with key and certificate: TLS alone is spoken then.
        kind: `sentinel` for a Sentinel, whose configuration is *text*.
        port: Where it listens; any free one by default.
    """

    def __init__(
        self, *, tls: Path | None = None, port: int | None = None, config: str = "", **options: str
    ) -> None:
        self.port = port or free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="kte-redis-"))
        self._tls = tls
        self._config = config
        self._options = options
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        binary = redis_binary()
        assert binary is not None, NO_REDIS
        options = {
            "bind": "127.0.0.1",
            "port": "0" if self._tls else str(self.port),
            "save": "",
            "appendonly": "no",
            "dir": str(self.folder),
            "loglevel": "warning",
            "logfile": str(self.folder / "log"),
            **self._options,
        }
        if self._tls is not None:
            options |= {
                "tls-port": str(self.port),
                "tls-cert-file": str(self._tls),
                "tls-key-file": str(self._tls),
                "tls-auth-clients": "no",
            }
        lines = [f'{name.replace("_", "-")} "{value}"' for name, value in options.items()]
        path = self.folder / "redis.conf"
        path.write_text("\n".join([*lines, self._config, ""]), encoding="utf-8")
        command = [binary, str(path)] + (["--sentinel"] if "sentinel monitor" in self._config else [])
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert eventually(self.listening), f"Redis does not start: {self.log()}"

    def listening(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def log(self) -> str:
        with contextlib.suppress(OSError):
            return (self.folder / "log").read_text(encoding="utf-8", errors="replace")
        return ""

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it as a crash does; `start` brings it back at the same address, empty."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(PATIENCE_S)
            self.process = None

    stop = kill

    def client(self, **options: Any) -> Any:
        """Return a client beside the product's; only for servers without TLS."""
        import redis

        return redis.Redis("127.0.0.1", self.port, protocol=2, socket_timeout=PATIENCE_S, **options)

    def policy(self, **changes: Any) -> RedisPolicy:
        """Return how the product reaches it, with a patience that a busy machine does not exhaust."""
        return redis_policy(port=self.port, **changes)


def redis_policy(**changes: Any) -> RedisPolicy:
    """Return settings for a server on loopback."""
    usual: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 6379,
        "username": None,
        "password": None,
        "database": 0,
        "connect_timeout_s": PATIENCE_S,
        "read_timeout_s": PATIENCE_S,
        "timeout_s": PATIENCE_S,
        "ssl": False,
        "ssl_verify": True,
        "server_name": None,
        "pool_size": 16,
    }
    changed = {name: Secret(value) if name.endswith("password") else value for name, value in changes.items()}
    return RedisPolicy(**{**usual, **changed})

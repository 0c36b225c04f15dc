"""
The plugin of the benchmark, once for our server and once for kong-pdk's.

Both read `Authorization` (1 KB), look its SHA-256 up in a table, check the entry's expiry and set
`Authorization` to the entry's value (1 KB). The table is the token file of the load generator.
What a plugin would keep ready it keeps ready: here the encoded outcome, there the text.

Some tokens say what shall happen instead: `raise-` raises an exception on the loop, `pool-raise-` in
the pool, `pool-` only goes through the pool, and `pool-slow-` waits there as if an identity provider
took its time.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kong_token_exchange.pluginserver.contract import Calls, Facts, Fetch, Outcome, exit_with, proceed

NAME = "bench"

# How long a slow identity provider takes.
SLOW_S = 2.5

# Every entry has an expiry that is looked at and never reached.
_LIFETIME_S = 3600.0

RAISE, POOL, POOL_RAISE, POOL_SLOW = "raise-", "pool-", "pool-raise-", "pool-slow-"
_SCHEME = "Bearer "

# The server is told by environment where the table is, as Kong would tell it by configuration.
TOKENS_VARIABLE = "BENCH_TOKENS"


def read_tokens(path: Path) -> list[tuple[str, str, str]]:
    """Read the token file: kind, incoming header, what is expected."""
    rows = (line.split("\t") for line in path.read_text(encoding="ascii").splitlines())
    return [(kind, incoming, expected) for kind, incoming, expected in rows]


def digest(header: str) -> bytes:
    """Return what entries are found by."""
    return hashlib.sha256(header.encode("utf-8", "surrogateescape")).digest()


@dataclass(slots=True)
class Entry:
    """One token's end, encoded, and until when it may be used."""

    outcome: Outcome
    header: str
    expires: float


class HeaderSwap:
    """Implements `contract.PluginInstance`."""

    prefetch: Sequence[Fetch] = (Fetch("kong.request.get_header", "authorization"),)

    def __init__(self, tokens: Path) -> None:
        expires = time.time() + _LIFETIME_S
        self._table: dict[bytes, Entry] = {}
        self._pool: dict[str, str] = {}
        for kind, incoming, expected in read_tokens(tokens):
            if incoming.startswith(_SCHEME + POOL):
                self._pool[incoming] = expected
            elif kind == "exit":
                self._table[digest(incoming)] = Entry(exit_with(int(expected), b"refused"), "", expires)
            else:
                outcome = proceed(Calls().set_header("authorization", expected))
                self._table[digest(incoming)] = Entry(outcome, expected, expires)

    def warm(self, facts: Facts) -> Outcome | None:
        """Answer from the table."""
        header: str = facts[0]
        entry = self._table.get(digest(header))
        if entry is None or entry.expires <= time.time():
            return None
        if header.startswith(_SCHEME + RAISE):
            raise RuntimeError
        return entry.outcome

    def access(self, kong: Any) -> None:
        """Answer from the pool."""
        header = kong.request.get_header("authorization")
        if header.startswith(_SCHEME + POOL_RAISE):
            raise RuntimeError
        if header.startswith(_SCHEME + POOL_SLOW):
            time.sleep(SLOW_S)
        kong.service.request.set_header("authorization", self._pool[header])

    def close(self) -> None:
        """Nothing is open."""


class HeaderSwapPlugin:
    """Implements `contract.PluginType`."""

    name = NAME
    version = "1.0.0"
    priority = 1050
    phases = ("access",)
    schema: Mapping[str, Any] = {"name": NAME, "fields": [{"config": {"type": "record", "fields": []}}]}

    def start(self, config: Mapping[str, Any]) -> HeaderSwap:  # noqa: ARG002 - the contract hands it over
        """Start an instance over the table."""
        return HeaderSwap(Path(os.environ[TOKENS_VARIABLE]))


class StockHeaderSwap:
    """The same in kong-pdk's shape."""

    def __init__(self, config: Mapping[str, Any]) -> None:  # noqa: ARG002 - kong-pdk hands it over
        expires = time.time() + _LIFETIME_S
        rows = read_tokens(Path(os.environ[TOKENS_VARIABLE]))
        self._table = {digest(incoming): (expected, expires) for _, incoming, expected in rows}

    def access(self, kong: Any) -> None:
        """Answer from the table."""
        header, _ = kong.request.get_header("authorization")
        expected, expires = self._table[digest(header)]
        if expires > time.time():
            kong.service.request.set_header("authorization", expected)

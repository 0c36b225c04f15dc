"""
What a slow issuer costs those whose tokens are cached: `python -m benchmarks.slow_issuer`.

    python -m benchmarks.slow_issuer [--json path] [--rounds 5] [--rate 2000]

Cached requests come at a steady rate to the full plugin, audit and metrics on. Meanwhile requests
with new tokens wait for an issuer that takes 2.5 s, each with its own or a thousand with one. What is
measured spans their arrival, their wait and their end. Medians of alternating rounds of one run; the
growth is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.arena import SOCKETS, TOKENS, Arena, Contender, exchange_config, write_tokens
from benchmarks.machine import describe, preferred
from benchmarks.native import NoCompilerError, Result
from kong_token_exchange.sandbox.demo import ISSUER_ADDRESS
from kong_token_exchange.sandbox.issuer import Issuer, IssuerServer
from kong_token_exchange.sandbox.serving import Fault

ISSUER_S = 2.5
# From before the first of those who wait has come until after the last of them has gone.
RUN_S = 3.5

# New tokens, and requests for each; more tokens than threads would be refused at once.
CROWDS = {
    "40 requests with new tokens": (40, 1),
    "200 requests with 20 new tokens": (20, 10),
    "1,000 requests with one new token": (1, 1000),
}

# How much p99 of cached requests may grow.
BOUND_MS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Latency of cached requests; medians over the rounds, microseconds."""

    name: str
    p50_us: float
    p99_us: float


class Stage:
    """The plugin on its server with a warm cache, and an issuer that gets slow."""

    def __init__(self, arena: Arena, server: IssuerServer, issuer: Issuer, *, rate: float) -> None:
        self._arena, self._server, self._issuer, self._rate = arena, server, issuer, rate
        self._crowds = 0
        tokens = self._write("cached", TOKENS)
        host, port = server.address
        self._contender = Contender(
            name="plugin",
            server=arena.start("plugin", "--resolve", f"{ISSUER_ADDRESS}={host}:{port}"),
            tokens=tokens,
            plugin="token-exchange",
            config=json.dumps(exchange_config(issuer.issuer)),
            cold_events=TOKENS + SOCKETS,
        )
        # Each token is exchanged once, before the issuer gets slow.
        arena.run(self._contender, pinned=False, seconds=0.1)
        server.set_fault(server.token_path("internal"), Fault(delay_s=ISSUER_S))

    def run(self) -> Result:
        """Send cached requests."""
        return self._arena.run(self._contender, "--rate", self._rate, pinned=False, seconds=RUN_S)

    def run_beside(self, tokens: int, each: int) -> Result:
        """Send cached requests while *each* requests for each of so many new *tokens* wait."""
        with self._waiting(tokens, each):
            return self.run()

    @contextmanager
    def _waiting(self, tokens: int, each: int) -> Iterator[None]:
        contender, events = self._contender, tokens * each
        self._crowds += 1
        command = [
            *(self._arena.programs["loadgen"], "--socket", contender.server.socket_path),
            *("--tokens", self._write(f"new-{self._crowds}", tokens), "--plugin", contender.plugin),
            *("--config", contender.config, "--sockets", events, "--events", events),
        ]
        with subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL) as process:
            yield
            if process.wait(60) != 0:
                raise RuntimeError("those who waited did not end well")

    def _write(self, name: str, count: int) -> Path:
        minted = [
            self._issuer.mint(scopes=["add-client-2-as-audience"], life_s=7200, note=secrets.token_hex(18))
            for _ in range(count)
        ]
        rows = [("learn", f"Bearer {token}", "") for token in minted]
        return write_tokens(self._arena.folder / name, rows)


def measure(*, rounds: int, rate: float) -> list[Figures]:
    """Measure without and with each crowd, in alternating rounds."""
    runs: dict[str, list[Result]] = {"nobody": [], **{name: [] for name in CROWDS}}
    with preferred(), Arena() as arena, arena.issuer() as (server, issuer):
        stage = Stage(arena, server, issuer, rate=rate)
        for number in range(rounds):
            runs["nobody"].append(stage.run())
            for name, (tokens, each) in CROWDS.items():
                runs[name].append(stage.run_beside(tokens, each))
            print(f"  round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return [
        Figures(
            name=name,
            p50_us=statistics.median(run.p50_us for run in series),
            p99_us=statistics.median(run.p99_us for run in series),
        )
        for name, series in runs.items()
    ]


def text(found: Sequence[Figures]) -> str:
    """Return the table."""
    alone = found[0]
    lines = [
        "| waiting for an issuer that takes 2.5 s | p50, ms | p99, ms | p99 grows by, ms | wanted |",
        "|---|---:|---:|---:|---|",
    ]
    for one in found:
        grown = (one.p99_us - alone.p99_us) / 1000
        wanted = "" if one is alone else f"below {BOUND_MS:g}: {'met' if grown < BOUND_MS else '**missed**'}"
        growth = "" if one is alone else f"{grown:.2f}"
        lines.append(
            f"| {one.name} | {one.p50_us / 1000:.2f} | {one.p99_us / 1000:.2f} | {growth} | {wanted} |"
        )
    return "\n".join(lines)


def as_json(found: Sequence[Figures]) -> dict[str, dict[str, float]]:
    """Return the figures by what waited."""
    return {one.name: {"p50_us": round(one.p50_us, 1), "p99_us": round(one.p99_us, 1)} for one in found}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slow_issuer", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the medians as JSON")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds (default: 5)")
    parser.add_argument(
        "--rate", type=float, default=2000.0, metavar="N", help="cached requests a second (default: 2000)"
    )
    options = parser.parse_args(arguments)
    try:
        found = measure(rounds=options.rounds, rate=options.rate)
    except NoCompilerError as exc:
        print(exc, file=sys.stderr)
        return 2
    print(text(found))
    machine = describe()
    print(f"\n{machine}")
    if options.json is not None:
        record = {"machine": machine, "rate": options.rate, "cached_requests": as_json(found)}
        options.json.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
